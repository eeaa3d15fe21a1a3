"""The mark `sampled`, of tests whose parameters are a product: by day each value once, and the rest at night."""

from collections import defaultdict

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `sampled`, each value of each parameter is tried by day, and all other combinations at night."""
    products = defaultdict[str, list[pytest.Function]](list)
    for item in items:
        by_night = item.get_closest_marker("nightly") is not None
        if isinstance(item, pytest.Function) and item.get_closest_marker("sampled") and not by_night:
            products[item.nodeid.partition("[")[0]].append(item)
    for left in products.values():
        tried = set[tuple[str, int]]()
        while left:
            best = max(left, key=lambda item: len(_values_of(item) - tried))  # the first of equals
            if _values_of(best) <= tried:
                break
            tried |= _values_of(best)
            left.remove(best)
        for item in left:
            item.add_marker("nightly")


def _values_of(item: pytest.Function) -> set[tuple[str, int]]:
    return {(name, id(value)) for name, value in item.callspec.params.items()}
