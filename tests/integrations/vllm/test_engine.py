"""Stock engines beside engines with fuseplan: the same tokens, and everything recognised that there is."""

import re
from pathlib import Path

import pytest

from fuseplan.record import Report
from fuseplan.record.serialization import from_json
from tests.integrations.vllm.checkpoints import CONFIGS, HEAD, HIDDEN, LAYERS
from tests.integrations.vllm.conftest import ASKED, Engine, Run

SPLIT = "ordered(allreduce_rms_padding, allreduce_rms, act_padding)"
CLOSE = 0.25
"""Of log probabilities; 0.17 was seen. bf16 rounds by 2^-9, and engines differ in where a reduced sum is rounded, if at
all."""


def recognised(model: str, tp: int) -> dict[str, int]:
    """Each layer has two norms on its residual stream, of which the first has none to add, and the head has one; Qwen3
    norms queries and keys too. The embedding and both halves of a layer are reduced.
    """
    found = {f"fused_add_rms_norm[{HIDDEN}]": 2 * LAYERS, f"rms_norm[{HIDDEN}]": 1}
    if model == "qwen3":
        found[f"rms_norm[{HEAD}]"] = 2 * LAYERS
    if tp > 1:
        found[f"all_reduce[{HIDDEN}]"] = 2 * LAYERS + 1
    return found


def only_norms_and_reductions(report: Report) -> dict[str, int]:
    return {op: n for op, n in report.recognized.items() if op.startswith(("all_reduce", "rms_norm", "fused_add"))}


def check_close(left: Run, right: Run) -> None:
    """Teacher-forced: the same tokens go in, so that one difference doesn't make the next ones."""
    assert left.forced == right.forced
    for ours, theirs in zip(left.log_probabilities, right.log_probabilities, strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= CLOSE


@pytest.mark.parametrize("model", CONFIGS)
def test_one_rank(model: str, engine: Engine) -> None:
    """Nothing is reduced, and a plan for a CPU leaves the graph as it is."""
    stock = engine(model, 1, {})
    assert not stock.lines
    assert not stock.reports
    ours = engine(model, 1, ASKED, forced=stock.forced)
    assert ours.tokens == stock.tokens
    check_close(ours, stock)
    report = from_json(Report, ours.reports[0])
    assert only_norms_and_reductions(report) == recognised(model, 1)
    assert report.policy == "planned"
    adopted, closed = ours.lines
    assert re.search(r"fuseplan \S+ is vLLM's post-grad pass: policy planned, vLLM \S+, torch \S+", adopted)
    assert "fuseplan on rank 0: 1 graph; fused:" in closed


@pytest.mark.parametrize("model", CONFIGS)
def test_two_ranks(model: str, engine: Engine, tmp_path: Path) -> None:
    """All-reduces go into their norms on both ranks, from a cold cache and from a warm one."""
    stock = engine(model, 2, {})
    assert not stock.lines
    settings = {"additional_config": {"fuseplan": {"policy": SPLIT}}}
    cache = tmp_path / "shared"
    starts = ["cold", "warm"] if model == "gpt_oss" else ["cold"]
    for start in starts:
        ours = engine(model, 2, {}, cache=cache, forced=stock.forced, **settings)
        assert ours.tokens == stock.tokens, start
        check_close(ours, stock)
        assert sorted(ours.reports) == [0, 1]
        for rank in (0, 1):
            report = from_json(Report, ours.reports[rank])
            assert only_norms_and_reductions(report) == recognised(model, 2), start
            fused = {rule: n for rule, n in report.fused.items() if n}
            assert fused == {"allreduce_rms": 2 * LAYERS + 1}, start
        assert len([line for line in ours.lines if "fuseplan on rank" in line]) == 2
