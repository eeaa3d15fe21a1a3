"""How far the cost model is off, by the kind of kernel, on devices that were measured and on others."""

import functools
from collections.abc import Iterator, Mapping
from typing import Final

from fuseplan.devices.hardware import EXCHANGES, FUSED, GENERATED, Error

SIDES: Final = {
    GENERATED: "one GPU", FUSED: "one GPU", "eager": "one GPU", "reduce": "ranks",
    **dict.fromkeys(EXCHANGES, "ranks"), "attention": "any attention", "split": "any attention",
    "linear": "any linear layer", "skinny": "any linear layer",
}  # fmt: skip
"""The common source of error of a kind, by its first word: it cancels in the difference of two such kernels, as far as
they take equally long.
"""
_TRITON = (0.089, 0.094, 0.121, 0.099)
_ROWS: Final[Mapping[str, tuple[float, float, float, float]]] = {
    "any attention": (0.186, 0.479, 0.175, 0.224),
    "any linear layer": (0.393, 0.114, 0.155, 0.2),
    "one GPU": (0.362, 0.295, 0.489, 0.362),
    "ranks": (0.075, 0.326, 0.164, 0.279),
    "attention": (0.097, 0.958, 0.06, 0.171),
    "fused": (0.091, 0.09, 0.086, 0.088),
    "fused quant": (0.453, 0.063, 0.314, 0.001),
    "fused rotary": (0.109, 0.093, 1.292, 0.08),
    "generated": (0.084, 0.074, 0.116, 0.077),
    "generated quant": (0.05, 1.564, 0.001, 0.687),
    "generated rotary": (0.078, 0.466, 0.081, 0.452),
    "linear": (0.229, 0.068, 0.002, 0.002),
    "reduce": (0.053, 0.149, 0.107, 0.148),
    "skinny": (0.09, 0.11, 0.002, 0.002),
    "split": (0.177, 0.101, 0.163, 0.061),
    "triton": _TRITON,
}
"""By the source, standard deviations as shares of the modelled time: of times that don't depend on the bytes, less and
more, and of those that do, less and more. From `benchmarks/results/leave_one_out.json`, of H100 and H200, 2026-11-29.
"""
_GUESSED: Final = {"flashinfer": tuple(2 * each for each in _TRITON), "aiter": _TRITON}
"""Errors of exchanges without measured rows beside the same site unfused: FlashInfer's are taken to be twice
fuseplan's.
"""
COMMON: Final = frozenset(SIDES.values())
UNMEASURED: Final = 1.5
"""The factor of errors on other devices over those on H100 and H200. With it, of the rows of
`benchmarks/data/fusions-published.json`, which no fit uses, 59 of 60 times and 27 of 30 savings on MI300X lie in their
intervals, and 5 of 6 times on B300.
"""


@functools.lru_cache(maxsize=256)
def sources_of(kind: str) -> tuple[tuple[str, str], ...]:
    """The sources of error of a kind of kernels: the kind's own and the common one; each for times that don't depend on
    the bytes, and for those that do.
    """
    return tuple((f"{source}, fixed", f"{source}, moved") for source in (kind, SIDES[kind.partition(" ")[0]]))


def _named(rows: Mapping[str, tuple[float, ...]]) -> Iterator[tuple[str, Error]]:
    for source, (fixed_less, fixed_more, moved_less, moved_more) in rows.items():
        yield f"{source}, fixed", Error(less=fixed_less, more=fixed_more)
        yield f"{source}, moved", Error(less=moved_less, more=moved_more)


def wider(errors: Mapping[str, Error], times: float = UNMEASURED) -> dict[str, Error]:
    """Errors of a device that wasn't measured. Common errors aren't wider on the side of shorter times: they would
    exceed the whole time, and don't decide which of two kernels takes longer.
    """
    return {
        name: Error(less=each.less if name.partition(",")[0] in COMMON else times * each.less, more=times * each.more)
        for name, each in errors.items()
    }


HOPPER_ERRORS: Final[Mapping[str, Error]] = dict(_named({**_ROWS, **_GUESSED, "eager": (0.2, 0.5, 0.2, 0.5)}))
"""The errors of H100 and H200. Those of references op by op are guessed, and large."""
UNMEASURED_ERRORS: Final[Mapping[str, Error]] = wider(HOPPER_ERRORS)
"""The errors of all other devices."""
