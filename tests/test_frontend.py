"""The entry points: what `compile`, `inductor_options` and `explain` promise beside what the pass does."""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import fuseplan
from fuseplan.compilation.dispatch import tokens_of
from fuseplan.devices import default_profile
from fuseplan.errors import CompatibilityError, ConfigError, WorkloadError
from fuseplan.record import Reason
from tests.forks import Forks, Request
from tests.helpers import HIDDEN, randn

pytestmark = pytest.mark.usefixtures("by_code_at_night")

PAD = fuseplan.PassConfig(policy="ordered(act_padding)")


class Block(nn.Module):
    """One padded RMSNorm."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.norm(x + x.sin()), (0, 8))


def compiled(model: Any, config: fuseplan.PassConfig = PAD, **arguments: Any) -> tuple[Any, list[fuseplan.Report]]:
    torch._dynamo.reset()
    reports: list[fuseplan.Report] = []
    return fuseplan.compile(model, config=config, on_report=reports.append, **arguments), reports


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def test_modules_functions_and_bound_methods() -> None:
    block, x = Block(), randn(5, HIDDEN)

    def function(x: Tensor) -> Any:
        return block(x)

    for target in (block, function, block.forward):
        model, reports = compiled(target)
        torch.testing.assert_close(model(x), block(x), rtol=2**-7, atol=2**-7)
        assert [report.fused for report in reports] == [{"act_padding": 1}]


def test_modes_are_expanded_and_merged_with_options() -> None:
    model, reports = compiled(Block(), mode="max-autotune-no-cudagraphs", options={"epilogue_fusion": False})
    model(randn(5, HIDDEN))
    assert reports[-1].fused == {"act_padding": 1}
    says = "mode='max-autotune-no-cudagraphs' sets max_autotune=True and options set it to False"
    with pytest.raises(ConfigError, match=says):
        compiled(Block(), mode="max-autotune-no-cudagraphs", options={"max_autotune": False})


def test_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    for door in (COMPILE, OPTIONS, EXPLAIN):
        with pytest.raises(CompatibilityError, match=r"torch 2\.10\.0 is too old"):
            door()


def test_inductor_options_plan_over_the_hull_of_the_ranges() -> None:
    ranges = [fuseplan.CompileRange(start=20, end=30), fuseplan.CompileRange(start=1, end=8)]
    options = fuseplan.inductor_options(fuseplan.PassConfig(compile_ranges=ranges), options={"epilogue_fusion": False})
    assert options["epilogue_fusion"] is False
    assert options["post_grad_custom_post_pass"].compile_range == fuseplan.CompileRange(start=1, end=30)
    assert fuseplan.inductor_options()["post_grad_custom_post_pass"].compile_range is None


def test_calls_go_to_the_graph_of_their_range() -> None:
    ranges = [fuseplan.CompileRange(start=1, end=8), fuseplan.CompileRange(start=9, end=16)]
    block = Block()
    model, reports = compiled(block, fuseplan.PassConfig(policy="ordered(act_padding)", compile_ranges=ranges))
    for tokens in (8, 9):
        model(randn(tokens, HIDDEN))
    assert [graph.range for report in reports for graph in report.graphs] == [(1, 8), (9, 16)]
    with pytest.warns(fuseplan.FuseplanWarning, match="17 tokens lies in none of the compile ranges 1:8, 9:16"):
        outside = model(randn(17, HIDDEN))
    assert len(reports) == 2
    torch.testing.assert_close(outside, block(randn(17, HIDDEN)), rtol=2**-7, atol=2**-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(randn(17, HIDDEN))


def test_tokens_are_the_product_of_leading_dimensions() -> None:
    assert tokens_of([torch.zeros(2, 5, dtype=torch.long)], {}) == 10
    assert tokens_of([None, torch.zeros(2, 5, 7)], {}) == 10
    assert tokens_of([], {"input_ids": torch.zeros(3, dtype=torch.int32)}) == 3
    assert tokens_of([1], {}) is None


def test_training_graphs_are_left_alone_and_reported() -> None:
    with torch.inference_mode(False):
        model, reports = compiled(Block())
        with pytest.warns(fuseplan.FuseplanWarning, match="the graph has a backward and is left unfused") as shown:
            model(randn(5, HIDDEN)).sum().backward()
    assert [warning.filename for warning in shown if warning.category is fuseplan.FuseplanWarning] == [__file__]
    refusals = [refusal for report in reports for graph in report.graphs for refusal in graph.refusals]
    assert {refusal.reason for refusal in refusals} == {Reason.TRAINING}


def test_case_10_what_has_no_effect_is_one_visible_warning() -> None:
    """vLLM #45604 logged enabled fusions with compilation off; #21325, #55720: on, and never anything to do."""
    with pytest.warns(fuseplan.FuseplanWarning, match="torch.compile is switched off by disable=True"):
        fuseplan.compile(Block(), disable=True)
    model, _ = compiled(Block(), fuseplan.PassConfig(fuse_allreduce_rms=True))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model(randn(5, HIDDEN))
        model(randn(5, 2, HIDDEN))
    texts = [str(warning.message) for warning in shown if warning.category is fuseplan.FuseplanWarning]
    assert texts == ["fuse_allreduce_rms=True has no effect: the graph has no all_reduce"]


def test_explain_counts_what_compile_fuses_between_graph_breaks() -> None:
    block = Block()

    def broken(x: Tensor) -> Any:
        y = block(x)
        torch._dynamo.graph_break()
        return block(y[..., :HIDDEN])

    explained = fuseplan.explain(broken, randn(5, HIDDEN), config=PAD)
    model, reports = compiled(broken)
    model(randn(5, HIDDEN))
    assert explained.fused == {"act_padding": sum(each.fused["act_padding"] for each in reports)} == {"act_padding": 2}
    assert [graph.rewritten for graph in explained.graphs] == [False] * 2
    assert [graph.rewritten for report in reports for graph in report.graphs] == [True] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_torch_compile_refuses_is_one_line() -> None:
    scripted = torch.jit.script(nn.RMSNorm(HIDDEN))
    with pytest.raises(WorkloadError, match=r"could not be traced: torch.compile does not support .*torch.jit.script"):
        fuseplan.explain(scripted, randn(5, HIDDEN))


@pytest.mark.parametrize("policy", ["planned", "ordered(act_padding)"])
def test_what_is_empty_is_planned_and_compiled(policy: str) -> None:
    config = fuseplan.PassConfig(policy=policy)
    assert fuseplan.explain(Block(0), randn(5, 0), config=config, device="h200").fused["act_padding"] == 1
    assert fuseplan.explain(Block(), randn(0, HIDDEN), config=config, device="h200").fused["act_padding"] == 1
    block, _ = compiled(Block(), config)
    assert [block(randn(rows, HIDDEN)).shape for rows in (0, 4, 0)] == [(rows, HIDDEN + 8) for rows in (0, 4, 0)]


def test_a_model_on_the_meta_device_is_refused_with_what_works() -> None:
    def build(device: str) -> tuple[nn.Module, Tensor]:
        model = nn.Sequential(nn.RMSNorm(64, eps=1e-6, device=device), nn.ConstantPad1d((0, 64), 0.0))
        return model, torch.empty(4, 64, device=device)

    with pytest.raises(WorkloadError, match="is on the meta device"):
        fuseplan.explain(*build("meta"), device="h200")
    with FakeTensorMode():
        model, x = build("cpu")
    assert fuseplan.explain(model, x, device="h200").fused["act_padding"] == 1


COMPILE, OPTIONS, EXPLAIN = (
    lambda **more: fuseplan.compile(lambda x: x, **more),
    fuseplan.inductor_options,
    lambda **more: fuseplan.explain(lambda x: x, torch.ones(1), **more),
)
ANOTHER_TYPE: list[tuple[Sequence[Callable[..., Any]], dict[str, Any], str]] = [
    ((fuseplan.explain, fuseplan.compile), {"model": None}, "model=None: allowed are modules and functions$"),
    ((fuseplan.explain, fuseplan.compile), {"model": "llama"}, "model='llama': allowed are modules and functions$"),
    ((COMPILE, OPTIONS), {"on_report": 3}, "on_report=3: allowed are None and functions$"),
    ((COMPILE, OPTIONS), {"passes": 3},
     "pass 3 is neither a PatternMatcherPass, an ExternalPass nor a function of a graph"),
    ((COMPILE, OPTIONS), {"passes": None}, "pass None is neither"),
    ((COMPILE, OPTIONS), {"options": ["max_autotune"]},
     r"options=\['max_autotune'\]: allowed are None and dictionaries"),
    ((COMPILE,), {"backend": "eager"}, "backend='eager': fusions are passes of Inductor"),
    ((EXPLAIN,), {"device": 3}, "device=3: allowed are None, names of devices and profiles$"),
    ((EXPLAIN,), {"passes": [object()]}, r"explain takes no passes=; fuseplan\.compile"),
    *(
        ((COMPILE, OPTIONS, EXPLAIN), {name: given},
         rf"{name}={re.escape(repr(given))}: allowed are sequences of instances of {kind}$")
        for name, kind in (("rules", "Rule"), ("providers", "Provider"))
        for given in (3, ("allreduce_rms",), (None,))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("doors", "given", "says"), ANOTHER_TYPE, ids=[says[:30] for *_, says in ANOTHER_TYPE])
def test_what_is_of_another_type_is_one_line(
    doors: Sequence[Callable[..., Any]], given: dict[str, Any], says: str
) -> None:
    for take in doors:
        with pytest.raises(fuseplan.FuseplanError, match=f"^{says}") as raised:
            take(**given)
        assert isinstance(raised.value, ConfigError) or "explain takes no passes" in says


WARM = """
import torch, fuseplan
from tests.helpers import randn
from tests.test_frontend import Block, PAD
torch.manual_seed(0)
reports = []
block = Block()
with torch.inference_mode():
    model = fuseplan.compile(block, config=PAD, on_report=reports.append)
    difference = (model(randn(5, 64)) - block(randn(5, 64))).abs().max().item()
(graph,) = reports[0].graphs
print(graph.from_cache, reports[0].fused["act_padding"], len(graph.applied), difference < 2 ** -6)
"""


def test_a_warm_compile_cache_still_reports(forks: Forks, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(WARM, encoding="utf-8")
    request = Request(path=str(path), environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}, is_told=False)
    for was_warm in (False, True):
        (done,) = forks.outcomes(forks.start(request))
        assert (done.status, done.output) == (0, f"{was_warm} 1 1 True\n")


def test_explain_leaves_the_users_tensors_as_they_were() -> None:
    ranges = (fuseplan.CompileRange(start=1, end=8),)
    fresh, marked = randn(5, HIDDEN), randn(5, HIDDEN)
    torch._dynamo.maybe_mark_dynamic(marked, 1)
    before = {name: set(value) if isinstance(value, set) else value for name, value in marked.__dict__.items()}
    for x in (fresh, marked):
        report = fuseplan.explain(Block(), x, config=fuseplan.PassConfig(compile_ranges=ranges))
        assert report.recognized
    assert fresh.__dict__ == {}
    assert marked.__dict__ == before


def test_advice_on_what_is_never_run_is_not_given() -> None:
    @functools.lru_cache
    def twice(value: int) -> int:
        return 2 * value

    fuseplan.explain(lambda x: x * twice(3), randn(4, 8))


def test_explain_is_for_a_gpu_where_nobody_says_otherwise() -> None:
    """As on the command line: this machine's, or an H200."""
    reports = (fuseplan.explain(Block(), randn(5, HIDDEN), device=device) for device in (None, "cpu"))
    named = [re.findall(r"priced for (\S+)", str(report)) for report in reports]
    assert named == [[default_profile().name], ["cpu"]]
    assert default_profile().vendor != "cpu"


def test_a_class_is_not_explained_and_stays_as_it_is() -> None:
    """torch.compile would wrap what it calls, and so every module of it that is built later."""

    class Own(torch.nn.RMSNorm):
        pass

    before = Own.__call__, Own._call_impl
    with pytest.raises(ConfigError, match=r"^model is the class Own: explain an instance of it, Own\(\.\.\.\)$"):
        fuseplan.explain(Own, randn(4, 8))
    assert (Own.__call__, Own._call_impl) == before
