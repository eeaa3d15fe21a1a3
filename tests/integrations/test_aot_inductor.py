"""Packages of AOTInductor: what they hold, where they can be loaded, and what isn't put into one."""

import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.torch_version import TorchVersion

import fuseplan
from fuseplan.compilation import whole_graph
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.compilation.whole_graph import CALLS_OPS, hands_off, lost_in_package
from fuseplan.config import Environment
from fuseplan.errors import UnsupportedError
from fuseplan.matching import Match
from fuseplan.providers.attention import SHARED as SHARED_KERNEL
from fuseplan.record import Reason
from fuseplan.rules.families import BUILT_IN_RULES
from tests.attention import BATCH, HEAD_DIM, HEADS, KEYS, SHARED, hugging_face
from tests.helpers import HIDDEN, post_grad, randn
from tests.test_frontend import PAD, Block
from tests.verification.fused_norm import WEIGHT, AddNormRelu, model, provider, right

Package = Callable[..., tuple[Path, list[fuseplan.Report], list[str]]]


class Attending(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, hugging_face(k), hugging_face(v))


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Writes a model's package."""

    def write(
        model: nn.Module, inputs: tuple[Tensor, ...], sizes: tuple[Any, ...], config: fuseplan.PassConfig | None = None
    ) -> tuple[Path, list[fuseplan.Report], list[str]]:
        reports: list[fuseplan.Report] = []
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            program = torch.export.export(model, inputs, dynamic_shapes=sizes)
            options = fuseplan.inductor_options(config, on_report=reports.append)
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
            )
        said = [str(each.message) for each in shown if each.category is fuseplan.FuseplanWarning]
        return Path(path), reports, said

    return write


def python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)


def is_called_in(path: Path) -> bool:
    """Whether a package's code calls an op of fuseplan's."""
    with zipfile.ZipFile(path) as package:
        return any(b"fuseplan::" in package.read(name) for name in package.namelist())


def test_a_package_of_inlined_kernels_has_nothing_of_fuseplan(package: Package) -> None:
    """Grouped attention by torch's own kernels: C++ can load it."""
    q, k, v = randn(BATCH, HEADS, 5, HEAD_DIM), *(randn(BATCH, SHARED, KEYS, HEAD_DIM) for _ in range(2))
    batch = torch.export.Dim("batch", min=2, max=16)
    path, reports, said = package(Attending(), (q, k, v), ({0: batch}, {0: batch}, {0: batch}))
    assert reports[-1].fused["grouped_attention"] == 1
    assert not said
    assert not is_called_in(path)
    loaded = torch._inductor.aoti_load_package(str(path))
    q, k, v = (torch.cat((each, each)) for each in (q, k, v))
    torch.testing.assert_close(loaded(q, k, v), Attending()(q, k, v))


@pytest.mark.skipif(TorchVersion(torch.__version__) < CALLS_OPS, reason="this torch's packages call no ops")
def test_a_package_that_calls_ops_says_so(package: Package) -> None:
    model, x = Block(), randn(5, HIDDEN)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    path, reports, said = package(model, (x,), (rows,), PAD)
    assert reports[-1].fused == {"act_padding": 1}
    text = "the package calls fuseplan's ops (act_padding): load it in Python, after `import fuseplan.providers`"
    assert [(each.reason, each.detail) for each in reports[-1].warnings] == [(Reason.PACKAGE, text)]
    assert said == [f"{text}; forbid=['act_padding'] makes one without them"]
    assert is_called_in(path)
    x = randn(9, HIDDEN)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x), model(x), rtol=0.02, atol=0.02)
    loading = f"import torch; torch._inductor.aoti_load_package({str(path)!r})"
    assert b"Could not find schema for fuseplan::" in python(loading).stderr
    assert python(f"import fuseplan.providers; {loading}").returncode == 0


@pytest.mark.parametrize(
    ("version", "device", "packaged", "why"),
    [
        ("2.12.1", "cpu", True, "before torch 2.13; this is 2.12.1"),
        ("2.13.0", "cpu", True, None),
        ("2.13.0", "cuda", True, "on a GPU"),
        ("2.11.0", "cuda", False, None),
    ],
)
def test_ops_are_left_out_where_packages_were_not_seen_to_call_them(
    version: str, device: str, packaged: bool, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    graph, rules = fx.Graph(), {rule.name: rule for rule in BUILT_IN_RULES}
    core = graph.placeholder("x")
    with FakeTensorMode():
        core.meta["val"] = torch.empty(2, device=device)
    matches = [
        Match(rule=rules[name], provider=provider, values={}, consumed=(), outputs=(), core=core)
        for name, provider in [("grouped_attention", SHARED_KERNEL), ("act_padding", "torch")]
    ]
    problem = SimpleNamespace(candidates=[SimpleNamespace(match=each) for each in (*matches, object())])
    analysis: Any = SimpleNamespace(canonical=SimpleNamespace(graph=graph), problem=problem)
    with V.set_aot_compilation(packaged):
        found = lost_in_package(analysis, range(3))
    assert found == ({} if why is None else {1: f"can't be called by AOTInductor's packages {why}"})


@pytest.mark.parametrize(
    ("asked", "is_told"),
    [
        ({"policy": "ordered(act_padding)"}, True),
        ({"force": ("act_padding",)}, True),
        ({"policy": "off"}, False),
        ({}, False),
    ],
)
def test_only_what_was_chosen_is_said_to_be_left_out(
    asked: dict[str, Any], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = post_grad(Block(), randn(5, HIDDEN))
    monkeypatch.setattr(whole_graph, "CALLS_OPS", "99")
    reports: list[fuseplan.Report] = []
    with V.set_aot_compilation(True):
        PostGradPassManager(fuseplan.PassConfig(**asked), on_report=reports.append)(graph)
    assert not reports[0].graphs[0].applied
    why = f"can't be called by AOTInductor's packages before torch 99; this is {torch.__version__}"
    text = f"act_padding is not applied: torch's fused_add_rms_norm_pad {why}"
    told = [(each.reason, each.detail, each.fix) for each in reports[0].warnings]
    assert told == ([(Reason.PACKAGE, text, "forbid act_padding:torch")] if is_told else [])


@pytest.mark.skipif(TorchVersion(torch.__version__) < CALLS_OPS, reason="this torch's packages call no ops")
def test_rules_and_providers_of_a_user_are_named() -> None:
    """Their ops are defined by their own modules."""
    own = provider(right)
    graph = post_grad(model, randn(5, HIDDEN), randn(5, HIDDEN, seed=1), WEIGHT)
    reports: list[fuseplan.Report] = []
    config = fuseplan.PassConfig(force=("add_norm_relu",))
    with V.set_aot_compilation(True):
        PostGradPassManager(config, rules=[AddNormRelu()], providers=[own], on_report=reports.append)(graph)
    (told,) = [each.detail for each in reports[0].warnings if each.reason is Reason.PACKAGE]
    assert told == (
        "the package calls fuseplan's ops (add_norm_relu): load it in Python, after `import fuseplan.providers` "
        f"and after importing the definition of rule add_norm_relu and provider {own.name}"
    )


def test_collectives_are_refused() -> None:
    graph = fx.Graph()
    graph.output(
        graph.call_function(torch.ops._c10d_functional.all_reduce.default, (graph.placeholder("x"), "sum", "tp"))
    )
    environment = Environment(enabled=True)
    assert hands_off(graph, environment) is None
    with V.set_aot_compilation(True), pytest.raises(UnsupportedError, match="collectives of tp, and AOTInductor is"):
        hands_off(graph, environment)
