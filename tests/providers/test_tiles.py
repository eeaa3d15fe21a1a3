"""Thresholds are data: with them launchers choose what was recorded, for a grid of sizes on made-up devices. No kernel
runs.

python -m tests.providers.test_tiles > tests/providers/data/tiles.json
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fuseplan.dialect import Rounding, ops
from fuseplan.providers.triton import activation, all_reduce_norm, launching, norm, qk_norm_rope, tuned
from fuseplan.providers.triton.epilogues import epilogue_of
from fuseplan.providers.triton.launching import Norm
from tests.providers.epilogues import own
from tests.providers.stand_ins import snapshot

H100 = {"multiprocessors": 132, "shared_bytes": 232448, "cache_bytes": 50 * 2**20, "is_nvidia": True}
MI300X = {"multiprocessors": 304, "shared_bytes": 65536, "cache_bytes": 4 * 2**20, "is_nvidia": False}
DEVICES = {"h100": H100, "mi300x": MI300X}
ROWS = (1, 2, 8, 9, 64, 132, 133, 264, 265, 304, 528, 529, 660, 661, 1056, 1057, 1216, 2433, 8192, 70000)
WIDTHS = (100, 2880, 8192, 14336, 65536)


FINISHES: dict[str, Any] = {
    "none": epilogue_of(None)(),
    "pad": epilogue_of("pad")(**own("pad", right=192)),
    "static": epilogue_of("static_fp8_quant")(**own("static_fp8_quant")),
    "dynamic": epilogue_of("dynamic_fp8_quant")(**own("dynamic_fp8_quant")),
    "group": epilogue_of("group_fp8_quant")(**own("group_fp8_quant", group_size=128)),
}
CHOICES = ("ROWS", "BLOCK", "STAGES", "LOOPS", "EVICTION", "Q_ROWS", "K_ROWS", "WIDTH", "num_warps", "maxnreg",
           "launch_pdl")  # fmt: skip


@contextmanager
def recorded(module: Any, kernel: str, device: dict[str, Any]) -> Iterator[list[Any]]:
    """What a launcher launches on a device: grids and tiles."""
    launched: list[Any] = []

    def launch(grid: tuple[int, ...], **options: Any) -> None:
        launched.append([list(grid), {name: options[name] for name in CHOICES if name in options}])

    class Recorder:
        """In a kernel's place."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launch(grid, **options)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, kernel, Recorder()))
        for name, value in device.items():
            for owner in {launching, module}:
                if hasattr(owner, name):
                    patches.enter_context(mock.patch.object(owner, name, return_value=value))
        patches.enter_context(mock.patch.object(launching, "launches_early", return_value=device["is_nvidia"]))
        yield launched


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def choices() -> dict[tuple[str, int], list[Any]]:
    """By kernel, device and width, and by rows: grids and tiles."""
    found: dict[tuple[str, int], list[Any]] = {}
    for (name, device), rows, width in itertools.product(DEVICES.items(), ROWS, WIDTHS):
        how = Norm(weight=empty(width), eps=1e-5, rounding=Rounding.GPT_OSS)
        for (finish, epilogue), kind in itertools.product(FINISHES.items(), ("bfloat16", "float32")):
            if finish == "group" and (width % 128 or kind == "float32"):
                continue
            x, case = empty(rows, width, dtype=getattr(torch, kind)), f"{name} {width} {finish} {kind}"
            with recorded(norm, "_norm", device) as found[f"norm {case}", rows]:
                norm.launch(x, x, how, epilogue)
            if finish in ("static", "dynamic", "group"):
                with recorded(activation, "_silu_and_mul", device) as found[f"activation {case}", rows]:
                    activation.launch(x, x, "llama", epilogue)
    heads_of, widths = ((32, 8), (64, 8), (5, 1)), (64, 96, 128, 256)
    for (name, device), rows, heads, width in itertools.product(DEVICES.items(), (1, 64, 8192), heads_of, widths):
        q, k, angles = (empty(rows, count, width) for count in (*heads, 1))
        weight, case = empty(width), f"qk {name} {heads[0]}+{heads[1]} {width}"
        arguments = q, k, weight, weight, angles, angles, 1e-6, "llama", "products"
        with recorded(qk_norm_rope, "_qk_norm_rope", device) as found[case, rows]:
            qk_norm_rope.launch(SimpleNamespace(**dict(zip(ops.qk_norm_rope.arguments, arguments, strict=True))))
    for processors, rows, width, ranks in itertools.product((132, 304), ROWS, WIDTHS, (2, 4, 8)):
        workspace: Any = SimpleNamespace(
            processors=processors, ranks=ranks, one_shot=ranks <= 2, loopback=False,
            shot_words=(32 if ranks == 2 else 4) * 2**19, sums_words=0 if ranks == 2 else 2**24,
        )  # fmt: skip
        for finish in ("none", "pad"):
            made = all_reduce_norm.Schedule.of(empty(rows, width), FINISHES[finish], workspace)
            kept = {"two_shot": made.two_shot, "lag": made.lag, "tile": dataclasses.astuple(made.tile)}
            found[f"all_reduce {processors} {width} {ranks} {finish}", rows] = [[[made.programs], kept]]
    return found


def table() -> dict[str, Any]:
    """The same, small enough for a file: distinct choices, and for each kernel and width their numbers by rows."""
    known: dict[str, int] = {}
    lines: dict[str, list[int]] = {}
    for (case, rows), choice in choices().items():
        # A grid of as many programs for each row is one choice, whatever the rows.
        grids = ([size if size % rows else f"{size // rows} a row" for size in grid] for grid, _ in choice)
        launched = [[grid, kept] for grid, (_, kept) in zip(grids, choice, strict=True)]
        number = known.setdefault(json.dumps(launched, sort_keys=True), len(known))
        lines.setdefault(case, []).append(number)
    by_rows = {case: " ".join(map(str, numbers)) for case, numbers in lines.items()}
    return {"choices": [json.loads(each) for each in known], "by_rows": by_rows}


def test_launchers_choose_what_was_recorded() -> None:
    assert table() == snapshot("tiles")


def test_each_threshold_says_where_it_was_found() -> None:
    found = [each for each in vars(tuned).values() if isinstance(each, tuned.Found) and each.what]
    for each in (*found, *tuned.NORM_THREAD.values()):
        assert each.what.endswith(".")
        assert each.device
        assert each.date >= "2026-11-27"
        assert "benchmarks/" in each.command
        assert each.source


if __name__ == "__main__":
    made = table()
    choice_lines = ",\n".join(json.dumps(each) for each in made["choices"])
    case_lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(numbers)}" for case, numbers in made["by_rows"].items())
    print(f'{{"choices": [\n{choice_lines}\n],\n"by_rows": {{\n{case_lines}\n}}}}')
