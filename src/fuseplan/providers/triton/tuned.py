"""Tuned numbers: all thresholds that launchers choose by, each with the device and the benchmark it was measured with.

Device, versions and date are from the benchmark's result for the final choice; the command is the benchmark's. Runs of
the other choices were not kept, and their figures only where a source gives them. Nothing was tuned on a device that
isn't named here.

Launchers have no other thresholds. Constants of the hardware, such as registers of a multiprocessor, or of the kernels,
such as the units of a workspace's layout, are no thresholds and stand where they are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice by size.

    Attributes:
        what: the quantity that is chosen.
        steps: (largest size, choice up to that size), in order; a single number is one step up to infinity.
        device: the device it was measured on.
        versions: versions of the software that ran.
        date: ISO 8601.
        command: the command of the benchmark that shows it.
        source: the measurements, or what is known of them.
    """

    what: str
    steps: tuple[tuple[float, int], ...]
    device: str
    versions: str
    date: str
    command: str
    source: str

    def at(self, size: float) -> int:
        """The best choice at a size."""
        return next(value for most, value in self.steps if size <= most)

    @property
    def value(self) -> int:
        """The best choice at any size."""
        return self.at(inf)


_KERNELS = Found(
    what="",
    steps=(),
    device="NVIDIA H100 80GB HBM3",
    versions="torch 2.11.0+cu130, triton 3.6.0",
    date="2026-11-27",
    command="PYTHONPATH=src:. python benchmarks/kernel_times.py",
    source="other choices' figures were not kept; benchmarks/results/kernels_h100.json is of this one",
)
_ROWS = replace(_KERNELS, device="NVIDIA H200", date="2026-11-29")
_AGAIN = replace(_ROWS, date="2026-11-30")
_ROTARY = replace(
    _KERNELS,
    command="PYTHONPATH=src:. python benchmarks/kernel_times.py --only 'QK norm + RoPE'",
    source="two heads of 128 a thread: 58.9 us instead of 64.5 for 8,192 tokens, and 230 instead of 253 for 32,768",
)
_BETWEEN_RANKS = replace(
    _KERNELS,
    device="2 x NVIDIA H100 80GB HBM3",
    command="torchrun --nproc-per-node 2 benchmarks/region.py",
    source="2,880 elements of bfloat16 a row; other choices' figures were not kept; "
    "benchmarks/results/region_h100x2.json is of this one",
)


def _found(like: Found, what: str, *steps: tuple[float, int], **facts: str) -> Found:
    return replace(like, what=what, steps=steps, **facts)


_NORM_SOURCE = f"2,880 elements of bfloat16 a row, few of which want many threads each; {_KERNELS.source}"
NORM_THREAD: Final[Mapping[str, Found]] = {
    "none": _found(
        _KERNELS, "Elements of a thread, by rows for each multiprocessor.", (1, 16), (inf, 32), source=_NORM_SOURCE
    ),
    "static_fp8_quant": _found(
        _AGAIN, "The same before static fp8 quantisation.", (16, 8), (inf, 64),
        source="2,880 elements of bfloat16 a row, with a residual: 10.7 us with 8, 11.8 with 32 and 10.9 with 64 for "
        "2,048 rows, 44.1, 41.9 and 41.1 for 8,192, 168, 157 and 157 for 32,768",
    ),
    "dynamic_fp8_quant": _found(
        _AGAIN, "The same before dynamic fp8 quantisation.", (2, 8), (inf, 64),
        source="the same: 1.97 us with 8, 2.00 with 32 and 2.24 with 64 for 64 rows, 4.38, 4.05 and 4.05 for 512, "
        "12.2, 11.9 and 10.6 for 2,048, 181, 158 and 158 for 32,768",
    ),
    "group_fp8_quant": _found(
        _AGAIN, "The same before fp8 quantisation of groups.", (1, 16), (2, 32), (inf, 64),
        source="4,096 elements of bfloat16 a row: 1.35 us with 16, 1.35 with 32 and 1.62 with 64 for a row, 2.02, 2.05 "
        "and 2.27 for 128, 4.45, 3.63 and 3.64 for 512, 122, 108 and 109 for 32,768; with a residual 2.44, 2.48 and "
        "2.79 for 128, 6.26, 7.06 and 5.09 for 512",
    ),
}  # fmt: skip
"""Elements of a thread of the norm kernel, by epilogue."""
ONE_ROW: Final = _found(_KERNELS, "Rows of a program of the norm kernel.", (inf, 1), source="not measured otherwise")
GROUPED_ROWS: Final = _found(
    _AGAIN, "The same before fp8 quantisation of groups, without a residual.", (2, 1), (inf, 2),
    source="4,096 elements of bfloat16 a row, 64 a thread: 3.64 us with 1 and 3.58 with 2 for 512 rows, 30.8 and 28.1 "
    "for 8,192, 108.6 and 99.7 for 32,768",
)  # fmt: skip

PART: Final = _found(
    _ROWS, "Elements of a row that a program takes, where others may take the rest, by rows.",
    (8, 512), (256, 1024), (inf, 2048),
    source="14,336 elements of bfloat16 a row, fp8 of groups: 3.98 us with 1,024 by 4 a thread and 4.10 with 2,048 by "
    "8 for 128 rows, 11.9 and 9.4 for 512, 689 and 534 for 32,768",
)  # fmt: skip
PART_THREAD: Final = _found(PART, "Elements of a thread there.", (256, 4), (inf, 8))
ROW_THREAD: Final = _found(
    _ROWS, "Elements of a thread where a program takes all of a row, as far as it has warps.", (inf, 16),
    source="14,336 elements of bfloat16 a row, fp8 of rows, 32 warps, 16 warps, and 16 that take one row after the "
    "other and load ahead: 3.06, 3.20 and 3.20 us for 32 rows, 37.1, 41.2 and 44.3 for 2,048, 540, 543 and 629 for "
    "32,768",
)  # fmt: skip
ROW_WARPS: Final = _found(ROW_THREAD, "The most warps there, where a warp has 32 threads.", (inf, 32))

HEADS: Final = _found(_ROTARY, "Elements of one half of the heads that a program holds.", (inf, 1024))
HEADS_THREAD: Final = _found(_ROTARY, "Elements of one half that a thread holds.", (inf, 8))

SECOND_WAIT_BYTES: Final = _found(
    _BETWEEN_RANKS, "Bytes that the links could send while two shots wait once more than one.", (inf, 7 * 2**16),
    device="4 x NVIDIA H100 80GB HBM3", command="torchrun --nproc-per-node 4 benchmarks/region.py",
    source="2,880 elements of bfloat16 a row: two shots pay from 0.3 MiB on; the times of one shot were not kept, "
    "benchmarks/results/region_h100x4.json is of this choice; not measured with eight ranks",
)  # fmt: skip
FEW_ROWS: Final = _found(
    _BETWEEN_RANKS, "Rows for each multiprocessor up to which a program of an all-reduce takes one row alone.", (inf, 2)
)
SOME_ROWS: Final = _found(
    _BETWEEN_RANKS, "The same up to which, in one shot, it doesn't send ahead, and holds rows in more warps.", (inf, 5)
)
RESIDENT: Final = _found(_BETWEEN_RANKS, "The most programs of an all-reduce for each multiprocessor.", (inf, 2))
REDUCED_THREAD: Final = _found(
    _BETWEEN_RANKS, "Elements of a thread of an all-reduce that doesn't send ahead, by rows for each multiprocessor.",
    (FEW_ROWS.value, 16), (inf, 8),
)  # fmt: skip
REDUCED_REGISTERS: Final = _found(
    _BETWEEN_RANKS, "Registers of a thread there.", (FEW_ROWS.value, 128), (inf, 64)
)  # fmt: skip
AHEAD_THREAD: Final = _found(
    _BETWEEN_RANKS, "Elements of a thread of an all-reduce that sends ahead, or in two shots.", (inf, 32)
)
AHEAD_REGISTERS: Final = _found(_BETWEEN_RANKS, "Registers of a thread there.", (inf, 128))

L2_SHARE: Final = _found(
    _KERNELS, "The most bytes of a call, as a multiple of the L2, up to which it evicts single reads first.", (inf, 1),
    source="12 % of the time is saved where all of them fit, and 3 % lost beyond",
)  # fmt: skip

_SPLIT = replace(
    _KERNELS,
    device="NVIDIA H200",
    date="2026-11-29",
    command="PYTHONPATH=src:. python benchmarks/split_attention.py",
    source="heads of 64, 128 and 256, batch 1, 8 and 32, 1,000 of 1,280 keys and 8,000 of 8,192; all choices' figures "
    "are in benchmarks/results/split_attention_h200.json",
)
SPLIT_KEYS: Final = _found(
    _SPLIT, "Keys of a tile where several programs share a head's, by bytes of a key.", (256, 64), (inf, 32),
    source="with the best number of parts on average 6 % off the best, 1 % for heads of 64 and 256",
)  # fmt: skip
SPLIT_WARPS: Final = _found(_SPLIT, "Warps of such a program.", (inf, 4))
WHOLE_KEYS: Final = _found(
    _SPLIT, "Keys of a tile where a program has all of a head's, by bytes of a key.", (256, 128), (inf, 64),
    source="batch 8, 32 and 64; batch 32, 1,000 of 1,280 keys and 8,000 of 8,192, heads of 128: 36.7 and 244 us with 4 "
    "warps and 2 stages, 47.1 and 285 with 8 and 3; of 64: 23.6 and 144, 32.0 and 184; within 5 % of the best",
)  # fmt: skip
WHOLE_WARPS: Final = _found(WHOLE_KEYS, "Warps of such a program.", (256, 4), (inf, 8))
WHOLE_STAGES: Final = _found(WHOLE_KEYS, "Tiles that are on their way to such a program.", (256, 2), (inf, 3))
SPLIT_STAGES: Final = _found(_SPLIT, "Tiles that are on their way to a program that shares a head's keys.", (inf, 3))
SPLIT_PROGRAMS: Final = _found(
    _SPLIT, "The most programs that share keys for each multiprocessor.", (inf, 2),
    source="batch 8, heads of 128: 4 parts take 15.1 us for 1,000 of 1,280 keys and 67.2 for 8,000 of 8,192, 2 parts "
    "13.9 and 70.3, 8 parts 18.6 and 79.1",
)  # fmt: skip
COMBINED_THREAD: Final = _found(
    _SPLIT, "Elements of parts that a thread puts together.", (inf, 128),
    source="batch 1, 1,000 of 1,280 keys, heads of 128: 6.7 us with one warp, 7.2 with four; of 256: 16.6 and 7.7",
)  # fmt: skip

_LINEAR = replace(
    _SPLIT,
    command="PYTHONPATH=src:. python benchmarks/skinny_linear.py",
    source="1, 8, 16 and 32 rows of bfloat16; 4,096 to 6,144, to 28,672 and to 4,096, and 14,336 to 4,096; the figures "
    "of all choices are in benchmarks/results/skinny_linear_h200.json",
)
LINEAR_FEATURES: Final = _found(
    _LINEAR, "Rows of weights of a tile, by rows of all weights for each multiprocessor.", (40, 32), (inf, 64),
    source="within 3 % of the best of 16 to 128; of more than 16 rows of x the latter: 14,336 to 4,096, 32 rows: "
    "32.9 us with 64 and 128 columns, 36.9 with 32 and 256",
)  # fmt: skip
LINEAR_WIDTH: Final = _found(LINEAR_FEATURES, "Columns of these on their way at a time.", (40, 256), (inf, 128))
LINEAR_STAGES: Final = _found(
    LINEAR_FEATURES, "Tiles that are on their way to a program.", (64, 6), (inf, 4),
    source="6 where a processor has one tile of 64 at most: a layer of Qwen3-8B's shape without its attention, between "
    "others in one graph, takes 0.7 us of 105 less so at 1, 8 and 32 rows",
)  # fmt: skip
LINEAR_SPLITS: Final = _found(
    LINEAR_FEATURES, "The most programs that share the width of a tile of 64 where the norm behind puts parts "
    "together.", (inf, 4),
    source="the same layer, 4,096 and 12,288 to 4,096, two programs a tile: 112.5 to 107.2 us at 32 rows, 0.2 and 0.6 "
    "us at 8 rows and at 1; with fewer stages or larger tiles slower",
)  # fmt: skip
LINEAR_WARPS: Final = _found(LINEAR_FEATURES, "Warps of a program.", (inf, 4))

_SCALED = replace(
    _SPLIT,
    command="PYTHONPATH=src:. python benchmarks/scaled_linear.py",
    source="1, 8, 16 and 32 rows of fp8; 4,096 to 4,096, to 6,144 and to 28,672, and 14,336 to 4,096: within 4 % of "
    "the best of 25 choices of 16 to 128 features, 128 to 512 columns, 3 to 8 stages, 4 and 8 warps, 1 to 8 parts",
)
SCALED_FEATURES: Final = _found(
    _SCALED, "Rows of weights of a tile in fp8.", (inf, 64),
    source="of 32, which aren't multiplied in fp8, 14,336 to 4,096 takes 24.2 us in place of 18.4 for 32 rows; of 128 "
    "19.6, and to 28,672 as long",
)  # fmt: skip
SCALED_WIDTH: Final = _found(_SCALED, "Columns of these on their way at a time.", (inf, 256))
SCALED_STAGES: Final = _found(
    _SCALED, "Tiles that are on their way to a program, by programs for each multiprocessor.", (1, 6), (inf, 4),
    source="8 rows: 4,096 to 28,672 30.8 us with 4 and 32.9 with 6; 14,336 to 4,096 17.9 and 17.7",
)  # fmt: skip
SCALED_SPLITS: Final = _found(
    _SCALED, "The most programs that share the width of a tile.", (inf, 4),
    source="two for each tile where there are 64 tiles: 17.7 us, four 18.2 and eight 21; no more than a multiprocessor "
    "has one of",
)  # fmt: skip
SCALED_WARPS: Final = _found(_SCALED, "Warps of a program.", (inf, 4))
SCALED_COMBINED: Final = _found(_SCALED, "Features that a program of the second kernel has.", (inf, 256))
