"""One block written in several ways: whatever its author chose, the same is matched in it."""

import random

import pytest

from fuseplan.config import PassConfig
from fuseplan.record import Report
from tests.differential.program import Program, Spec
from tests.differential.recording import record_program
from tests.differential.settings import Setting

WEIGHTED = ("llama", "gpt_oss", "power_of_half", "power_of_function", "built_in")
UNWEIGHTED = ("without_weight", "power_without_weight")
FORMS = ("deeper", "deep", "swapped", "deep and swapped", "by power", "unweighted", "unweighted by power")


def written(seed: int, form: str = "") -> Program:
    """A block that follows from a seed, in one of several forms."""
    rng = random.Random(seed)
    width, rows = rng.choice((16, 48, 64)), rng.choice((3, 8))
    dtype = rng.choice(("bfloat16", "float16", "float32"))
    tensors = {name: Spec(name=name, shape=(rows, width), dtype=dtype, kind="normal") for name in ("x", "r")}
    weight = Spec(name="weight", shape=(width,), dtype=dtype, kind="weight", state=True)
    scale = Spec(name="bound", shape=(1,), dtype="float32", kind="scale", state=True)
    spelling = rng.choice(("llama", "gpt_oss", "built_in"))
    reduced = rng.choice(("all_reduce({})", "all_reduce({})", "all_reduce(torch.sin({}))", "{}")).format("x")
    epilogue = rng.choice(("F.pad(y, (0, 8))", "quantize(y, self.bound)", "y * 2"))
    swapped, depth = rng.random() < 0.5, rng.choice((0, 1))
    if "power" in form:
        spelling = {"llama": "power_of_half"}.get(spelling, "power_of_function")
    if "unweighted" in form:
        spelling = UNWEIGHTED["power" in form]
    depth = {"deeper": 2, "deep": 6, "deep and swapped": 6}.get(form, depth)
    residual = f"deepened(r, {depth})"
    addends = (residual, reduced) if swapped != ("swapped" in form) else (reduced, residual)
    lines = (f"y, total = {spelling}({', '.join(addends)}, self.weight)", f"z = {epilogue}")
    return Program(
        seed=seed, specs=(*tensors.values(), weight, scale), lines=lines, results=("z", "total"), sizes=({},)
    )  # fmt: skip


def matched(program: Program, group: str) -> dict[str, int]:
    """What rules match in a program, whatever is chosen."""
    reports: list[Report] = []
    (recorded,) = record_program(program, group)
    Setting(config=PassConfig(policy="off")).manager(reports.append)(recorded.copy())
    return {rule: count for report in reports for rule, count in sorted(report.matched.items()) if count}


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("form", FORMS)
def test_how_a_block_is_written_changes_no_match(form: str, count: int, one_rank: str, first_seed: int) -> None:
    found = 0
    for seed in range(first_seed, first_seed + count):
        first, other = written(seed), written(seed, form)
        usual, others = matched(first, one_rank), matched(other, one_rank)
        found += bool(usual)
        assert others == usual, f"of {first}\n{usual} is matched; of\n{other}\n{others}"
    assert found >= count / 2
