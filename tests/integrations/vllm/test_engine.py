"""Stock engines beside engines with fuseplan: the same tokens, and everything recognised that there is."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fuseplan.record import Report
from tests.integrations.vllm.checkpoints import CONFIGS, HEAD, HIDDEN, LAYERS
from tests.integrations.vllm.conftest import ASKED, Engines, Run, check_close

EVERYTHING = "ordered(allreduce_rms_padding, allreduce_rms, act_padding, qk_norm_rope)"
FUSED = {"additional_config": {"fuseplan": {"policy": EVERYTHING}}}


@dataclass(frozen=True)
class Four:
    """Four engines of one model."""

    stock: Run
    fused: Run
    stock_of_two: Run
    fused_on_two: Run


@pytest.fixture(scope="module")
def four(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Four]:
    """`four(model)`: on one rank and on two, each without fuseplan and with it."""
    done: dict[str, Four] = {}

    def run(model: str) -> Four:
        if model not in done:
            one, two = {"tensor_parallel_size": 1}, {"tensor_parallel_size": 2}
            cache = tmp_path_factory.mktemp(f"cache_{model}")
            runs = engines(model, [({}, one), (ASKED, one), ({}, two), ({}, two | FUSED)], cache)
            done[model] = Four(*runs)
        return done[model]

    return run


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


def sites_of_two(model: str) -> dict[str, int]:
    """Each reduction is followed by a norm, and Qwen3 norms queries and keys before it rotates them."""
    return {"allreduce_rms": 2 * LAYERS + 1, **({"qk_norm_rope": LAYERS} if model == "qwen3" else {})}


def only_norms_and_reductions(report: Report) -> dict[str, int]:
    return {op: n for op, n in report.recognized.items() if op.startswith(("all_reduce", "rms_norm", "fused_add"))}


@pytest.mark.parametrize("model", CONFIGS)
def test_one_rank(model: str, four: Callable[[str], Four]) -> None:
    """Nothing is reduced, and a plan for a CPU leaves the graph as it is."""
    runs = four(model)
    assert not runs.stock.lines
    assert runs.fused.tokens == runs.stock.tokens
    check_close(runs.fused, runs.stock)
    report = runs.fused.reports[0]
    assert only_norms_and_reductions(report) == recognised(model, 1)
    assert not any(report.matched.values()), "qk_norm_rope is off where nobody names it"
    assert report.policy == "planned"
    adopted, closed = runs.fused.lines
    assert re.search(r"fuseplan \S+ is the post-grad pass of vLLM \S+ \(torch \S+\): policy planned", adopted)
    assert "fuseplan on rank 0: 1 graph; fused:" in closed


@pytest.mark.parametrize("model", CONFIGS)
def test_two_ranks(model: str, four: Callable[[str], Four]) -> None:
    """The same answers, with every all-reduce in its norm on both ranks."""
    runs = four(model)
    assert not runs.stock_of_two.lines
    ours, stock = runs.fused_on_two, runs.stock_of_two
    assert ours.tokens == stock.tokens
    check_close(ours, stock)
    assert sorted(ours.reports) == [0, 1]
    for report in ours.reports.values():
        assert only_norms_and_reductions(report) == recognised(model, 2)
        assert {rule: n for rule, n in report.fused.items() if n} == sites_of_two(model)
    assert len([line for line in runs.fused_on_two.lines if re.search("rank [01]: 1 graph; fused", line)]) == 2
