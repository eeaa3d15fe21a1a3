"""What was measured on H100 and H200 of single sites, fused and not, beside the kernels that the cost model prices."""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibrate_reduces import REGIONS, kernels_of, regions
from benchmarks.contest import Contest
from fuseplan.devices.reduces import without_multicast
from fuseplan.planner.costs import HARDWARE, SHIPPED, CostTable, Hardware, Kernel, Region
from fuseplan.rules.parts.attention.traffic import AttentionRegion, grouped
from fuseplan.rules.parts.dynamic_fp8 import DynamicFp8
from fuseplan.rules.parts.group_fp8 import GroupFp8
from fuseplan.rules.parts.linear import LinearRegion, library_kernels, skinny_kernel
from fuseplan.rules.parts.pad import Padding
from fuseplan.rules.parts.rms_norm import PART as RMS_NORM
from fuseplan.rules.parts.rotary import Rotation
from fuseplan.rules.parts.silu_and_mul import PART as SILU_AND_MUL
from fuseplan.rules.parts.static_fp8 import StaticFp8
from fuseplan.rules.parts.traffic import Tail

RESULTS = Path(__file__).parent / "results"
Priced = Callable[[Hardware], tuple[Kernel, ...]]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A measured time, and the kernels that the model makes of it on a device.

    Attributes:
        what: the alternative.
        us: the median.
        spread_us: the interquartile range of the repeats; 0 where the file has none.
        kernels: of it.
    """

    what: str
    us: float
    spread_us: float
    kernels: Priced


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One site at one size.

    Attributes:
        device: of the profiles.
        family: the ops.
        shape: all else than the size: the file, or the widths.
        size: rows, or keys of a cache.
        unfused: the site as it is without fuseplan.
        fused: under one fusion or another.
        ranks: of an all-reduce.
    """

    device: str
    family: str
    shape: str
    size: int
    unfused: Side
    fused: tuple[Side, ...]
    ranks: int = 1


def rows() -> list[Measured]:
    """All of them."""
    return [*_regions(), *_tables(), *_kernels(), *_linears(), *_attention()]


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


FUSED = ("pad_nccl", "reduce_then_pad", "all")
RANKS, LINEAR = "all_reduce + add + norm + pad", "linear layers"


def _regions() -> Iterator[Measured]:
    """All-reduce, residual add, norm and pad among two ranks and four."""
    files = {(device, ranks): name for name, (device, ranks) in REGIONS.items()}
    found: dict[tuple[str, int, int], dict[str, Side]] = {}
    for row in regions():
        name = files[row.device, row.ranks]
        ((_, spread),) = (
            (each[row.column] for each in _read(name)["rows"] if each["tokens"] == row.tokens)
            if (row.column != "flashinfer")
            else ((0, 0),)
        )
        side = Side(
            what=row.column, us=row.us, spread_us=spread, kernels=lambda hardware, row=row: kernels_of(hardware, row)
        )
        found.setdefault((row.device, row.ranks, row.tokens), {})[row.column] = side
    for (device, ranks, tokens), sides in found.items():
        yield Measured(
            device=device, family=RANKS, shape=files[device, ranks], size=tokens, ranks=ranks,
            unfused=sides["unfused"], fused=tuple(sides[each] for each in FUSED if each in sides),
        )  # fmt: skip


TABLES = {
    "all_reduce[2] -> add -> rms_norm -> pad 2880:3072 2880 bfloat16 vllm_fp32_residual": {
        "width": 2880, "residual": True, "tail": Padding(padded=3072),
    },
    "all_reduce[2] -> rms_norm 2880 bfloat16 llama": {"width": 2880},
    "all_reduce[2] -> add -> rms_norm 4096 bfloat16 llama": {"width": 4096, "residual": True},
}  # fmt: skip
"""Sites of the package's table of H100, each with the changes of a region."""


def _tables() -> Iterator[Measured]:
    """In context, as `fuseplan tune` measured them."""
    table = CostTable.load(SHIPPED / "h100.json")
    for key, changes in TABLES.items():
        alternatives = sorted({row.key.removeprefix(f"{key}: ") for row in table.rows if row.key.startswith(f"{key}:")})
        ours = [each for each in alternatives if each.endswith(" triton")]
        for tokens in sorted({row.tokens for row in table.rows if row.key == f"{key}: unfused"}):

            def side(alternative: str, key: str = key, tokens: int = tokens, changes: Any = changes) -> Side:
                row = table.lookup(f"{key}: {alternative}", tokens)
                assert row is not None
                whole = Region(core=RMS_NORM.traffic, tokens=tokens, reduce=True, ranks=2, **changes)
                taken = None
                if alternative != "unfused":
                    taken = whole if alternative.startswith("allreduce") else whole.without_reduce()
                    taken = taken if "pad" in alternative.split()[1] else taken.without_tail()
                return Side(
                    what=alternative, us=row.time_ns / 1e3, spread_us=row.spread_ns / 1e3,
                    kernels=lambda hardware: _model(hardware).alternative(whole, taken, "triton"),
                )  # fmt: skip

            yield Measured(
                device=table.device, family="all_reduce + norm, in context", shape=key, size=tokens, ranks=2,
                unfused=side("unfused"), fused=tuple(map(side, ours)),
            )  # fmt: skip


def _model(hardware: Hardware) -> Contest:
    """As these runs were made."""
    return Contest(without_multicast(hardware))


KERNELS: dict[str, tuple[Any, int, bool, Tail]] = {
    "add + RMSNorm + pad": (RMS_NORM, 2880, True, Padding(padded=3072)),
    "add + RMSNorm + static fp8": (RMS_NORM, 2880, True, StaticFp8()),
    "add + RMSNorm + dynamic fp8": (RMS_NORM, 2880, True, DynamicFp8()),
    "SiLU-mul + static fp8": (SILU_AND_MUL, 14336, False, StaticFp8()),
    "SiLU-mul + dynamic fp8": (SILU_AND_MUL, 14336, False, DynamicFp8()),
    "RMSNorm + group fp8": (RMS_NORM, 4096, False, GroupFp8(group_size=128)),
    "add + RMSNorm + group fp8": (RMS_NORM, 4096, True, GroupFp8(group_size=128)),
    "SiLU-mul + group fp8": (SILU_AND_MUL, 14336, False, GroupFp8(group_size=128)),
    "QK norm + RoPE": (RMS_NORM, 128, False, Rotation(q_heads=32, k_heads=8, angles=256)),
}
"""Core, width, residual and epilogue."""


def _kernels() -> Iterator[Measured]:
    """Ops of one GPU, whose arguments come from memory, not from a cache."""
    for device in ("h100", "h200"):
        for row in _read(f"kernels_{device}")["rows"]:
            core, width, residual, tail = KERNELS[row["op"]]
            heads = tail.q_heads if isinstance(tail, Rotation) else 1
            region = Region(
                core=core.traffic, tokens=row["rows"] * heads, width=width, residual=residual, tail=tail
            )  # fmt: skip
            yield Measured(
                device=device, family="norm or activation", shape=row["op"], size=row["rows"],
                unfused=_side(row, "torch.compile", lambda hardware, r=region: _model(hardware).unfused(r)),
                fused=(_side(row, "fused", lambda hardware, r=region: _model(hardware).fused(r, "triton")),),
            )  # fmt: skip


def _side(row: dict[str, Any], what: str, kernels: Priced) -> Side:
    us, spread = row[what] if isinstance(row[what], list) else (row[what], 0.0)
    return Side(what=what, us=us, spread_us=spread, kernels=kernels)


def _linears() -> Iterator[Measured]:
    """Linear layers of few rows."""
    for row in _read("skinny_linear_h200")["rows"]:
        region = LinearRegion(rows=row["rows"], width=row["width"], features=tuple(row["features"]), itemsize=2)

        def separate(hardware: Hardware, region: LinearRegion = region, row: Any = row) -> tuple[Kernel, ...]:
            kernels = library_kernels(hardware, region)
            if "SiLU" in row["layers"]:
                nbytes = 6 * region.rows * region.features[0]
                kernels = (*kernels, Contest(hardware).local("silu_and_mul", nbytes))
            return kernels

        yield Measured(
            device="h200", family=LINEAR, shape=row["layers"], size=row["rows"],
            unfused=_side(row, "separate", separate),
            fused=(_side(row, "fuseplan", lambda hardware, r=region: (skinny_kernel(hardware, r),)),),
        )  # fmt: skip


def linear_constants(found: Sequence[Measured]) -> dict[str, float]:
    """The means that `devices.nvidia.H200_LINEAR` has, of some of these rows."""
    hardware, library, skinny = HARDWARE["h200"], list[float](), list[float]()
    for row in found:
        kernels, (fused,) = row.unfused.kernels(hardware), row.fused[0].kernels(hardware)
        products = [each for each in kernels if each.kind == "linear"]
        rest = sum(each.ns for each in kernels) - sum(each.launch for each in products)
        library.append((1e3 * row.unfused.us - rest) / len(products))
        skinny.append(1e3 * row.fused[0].us - fused.moved)
    return {"linear.library": statistics.fmean(library), "linear.skinny": statistics.fmean(skinny)}


HEADS = {"llama": (32, 8, 128), "gpt-oss": (64, 8, 64), "gemma3": (8, 4, 256)}
FULL = 0.75
"""Of the keys of a cache, at least so many are valid: the model prices all of them."""


def _attention() -> Iterator[Measured]:
    """One query on a static cache, by cuDNN and by fuseplan's kernel, as it was chosen to be."""
    for row in _read("split_attention_h200")["rows"]:
        if row["valid"] < FULL * row["keys"]:
            continue
        q_heads, heads, width = HEADS[row["model"]]
        region = AttentionRegion(
            batch=row["batch"], q_heads=q_heads, heads=heads, queries=1, keys=row["valid"], width=width, itemsize=2,
            kernel="cudnn",
        )  # fmt: skip
        yield Measured(
            device="h200", family="attention", shape=f"{row['model']}, batch {row['batch']}", size=row["keys"],
            unfused=_side(row, "cudnn", lambda hardware, r=region: grouped(hardware, r, "shared")),
            fused=(
                Side(
                    what="split", us=row["grid"][0][-1], spread_us=0.0,
                    kernels=lambda hardware, r=region: grouped(hardware, r, "split"),
                ),
            ),
        )  # fmt: skip
