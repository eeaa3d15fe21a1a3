"""What fuseplan ships is read once for the keys of all compilations: to read it takes an eighth of one whose graph is
interpreted.
"""

from collections.abc import Callable
from typing import Any

READ_ANEW: dict[str, Callable[..., Any]] = {}
"""What reads them where it isn't done once, by its name in fuseplan's manager."""


def read_once() -> None:
    """From now on, but in tests/caching, which is about what keys are made of."""
    from fuseplan.compilation import manager
    from fuseplan.providers import BUILT_IN_PROVIDERS
    from fuseplan.rules.families import BUILT_IN_RULES

    shipped = {id(each) for each in (*BUILT_IN_PROVIDERS, *BUILT_IN_RULES)}
    for name in ("rule_content", "provider_content"):
        READ_ANEW[name] = vars(manager)[name]
        vars(manager)[name] = _once(READ_ANEW[name], shipped)


def _once(read: Callable[..., Any], shipped: set[int]) -> Callable[..., Any]:
    found: dict[tuple[int, str], Any] = {}

    def read_once(what: Any, *arguments: Any) -> Any:
        if id(what) not in shipped:
            return read(what, *arguments)
        key = id(what), repr(arguments[:-1])  # the last is what else was read for the same key
        if key not in found:
            found[key] = read(what, *arguments)
        return found[key]

    return read_once
