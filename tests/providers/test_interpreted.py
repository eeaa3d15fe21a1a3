"""fuseplan's Triton kernels compute what the references do.

Here they run by Triton's interpreter, in processes of their own; tests/gpu has them on a GPU. Each script
`run_*_interpreted` of this folder says what it finds, and the table here what that has to be.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

from fuseplan.dialect import Rounding, ops
from tests.forks import Forks
from tests.providers.stand_ins import printed_by
from tests.providers.test_triton import TRITON

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

KEPT = ("_and_norm", "_and_activation")
Check = Callable[[Any], None]


def holds(cases: int | None = None) -> Check:
    """In each of so many cases."""

    def check(found: Any) -> None:
        assert cases is None or len(found) == cases
        assert all(tree_leaves(found)), found

    return check


def equals(expected: Any) -> Check:
    def check(found: Any) -> None:
        assert found == expected

    return check


def close_to_float64(cases: int) -> Check:
    """Of values around 1, in units in the last place: one rounding of weights, and one of the result."""

    def check(found: dict[str, float]) -> None:
        assert len(found) == cases
        for name, off in found.items():
            assert off <= (4 if "float32" in name else 1), name

    return check


def as_close_as_the_reference(cases: int) -> Check:
    def check(found: dict[str, list[float]]) -> None:
        assert len(found) == cases
        for name, (own, reference) in found.items():
            assert own <= 1.01 * reference + 0.01, name

    return check


def normed(found: dict[str, list[float]]) -> None:
    """However many programs share the width."""
    assert [each[0] for each in found.values()] == [each for each in (1, 2, 2, 3, 4, 1) for _ in range(6)]
    for name, (_, own, reference) in found.items():
        assert own <= 1.25 * reference + 0.01, name


def at_least(cases: int, least: int) -> Check:
    def check(found: Any) -> None:
        assert len(found) == cases
        assert min(tree_leaves(found)) >= least, found

    return check


def at_most(most: int) -> Check:
    def check(found: Any) -> None:
        assert max(tree_leaves(found)) <= most, found

    return check


def refuses(*names: str) -> Check:
    def check(found: list[str]) -> None:
        assert {line.split(":")[0] for line in found} == {f"[triton] {name}" for name in names}

    return check


def no_difference(found: dict[str, dict[str, float]], most: Callable[[str], int | None]) -> None:
    """Asserts that there is none in each op's samples, or in so many of them, but for the order of sums."""
    for op, differences in found.items():
        assert set(differences) == {sample.name for sample in ops[op].samples[: most(op)]}
        for name, difference in differences.items():
            # In float32 sums of squares are added up in another order, which can move an fp8 code by a step.
            allowed = 1 if "quant" in op and "float32" in name else 2e-6 if "float32" in name else 0
            assert difference <= allowed, (op, name)


def samples(found: dict[str, dict[str, float]]) -> None:
    products = {name for name in TRITON.implements if "attention" in name or "linear" in name}
    assert set(found) == set(TRITON.implements) - products
    no_difference(found, lambda op: 1 if op.endswith(KEPT) else None)


FINDINGS: dict[str, dict[str, Check]] = {
    "run_interpreted": {
        "differences": samples,
        "caches": holds(9),
        "out of bounds": holds(4),
        "cached": at_least(3, 12),
        "alone": at_least(2, 15),
        "more than programs": equals(True),
        "not finite": holds(3),
        "cases": equals(len(ops.qk_norm_rope.samples) + 11),
        "refused": equals([]),
        "odd": holds(5),
    },
    "run_attention_interpreted": {
        "sizes": close_to_float64(22),
        "masks": close_to_float64(16),
        "strides": close_to_float64(5),
        "spelled": close_to_float64(27),
        "spelled masks": close_to_float64(28),
        "skipped": holds(12),
        "fully masked": equals([0.0] * 4),
        "no sinks": equals([True, True]),
        "layouts": equals(dict.fromkeys(("cudnn", "flash", "efficient", "cpu"), True)),
        "variants": equals(1),  # for a cache that grows
        "cases": lambda found: equals(4)(found["grouped_attention"]),  # two samples, one once more, and in float16
    },
    "run_cached_attention_interpreted": {
        "steps": close_to_float64(71),
        "stale": equals([True] * 8),
        "out of bounds": holds(4),
        "strides": holds(11),
        "variants": equals(1),  # for all positions and lengths
        "cases": equals([5] * 4),  # three samples of each op, one once more, and in float16
    },
    "run_linear_interpreted": {
        "sizes": as_close_as_the_reference(21),
        "scaled": as_close_as_the_reference(22),
        "layouts": as_close_as_the_reference(6),
        "scaled layouts": as_close_as_the_reference(5),
        "normed": normed,
        "on AMD": equals([True] * 6),
        "special values": holds(8),
        "fitting": at_most(65536),
        "shared": equals([[2, 6, 147456], [1, 6, 147456], [1, 4, 98304], [1, 2, 49152]]),
        "variants": equals([2, 2]),  # up to 16 rows, and up to 32
        "cases": equals([*[13] * 6, 18, 12, 13, 13]),
        "refused": refuses("float32", "transposed"),
        "refused in fp8": refuses("bfloat16", "float16", "float32", "transposed"),
    },
    "run_group_interpreted": {
        "cases": holds(64),  # all roundings, groups of 32 to 512, rows that no tile divides
        "by row": holds(16),
        "kept": holds(6 * len(Rounding)),
        "layouts": holds(24),
        "microscaled": holds(92 - 6),
        "scales": holds(),
        "by scales": holds(7 * 6 + 1),
        "not finite": holds(28),
        "powers": holds(),
        "all of e5m2": holds(),
        "wider": holds(12),
    },
}


@pytest.fixture(scope="module")
def printed(interpreting_forks: Forks) -> Callable[[str], Any]:
    """What a script prints, which runs once."""
    return functools.cache(functools.partial(printed_by, interpreting_forks))


@pytest.mark.parametrize(("script", "what"), [(script, what) for script in FINDINGS for what in FINDINGS[script]])
def test_kernels_do_as_the_references(printed: Callable[[str], Any], script: str, what: str) -> None:
    FINDINGS[script][what](printed(script)[what])


@pytest.mark.nightly
def test_every_sample_that_yields_what_is_quantised_too_gives_the_references_bits(interpreting_forks: Forks) -> None:
    found = printed_by(interpreting_forks, "run_interpreted", "kept")
    assert set(found) == {name for name in TRITON.implements if name.endswith(KEPT)}
    no_difference(found, lambda op: None)


@pytest.mark.nightly
def test_exponents_of_many_rows_are_the_references_by_each_scaling(interpreting_forks: Forks) -> None:
    holds(92)(printed_by(interpreting_forks, "run_group_interpreted", "all"))
