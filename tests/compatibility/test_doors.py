"""The entry points on a torch that fuseplan doesn't fit: they fall back, or say so in one line."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import fuseplan
from fuseplan import compatibility
from fuseplan.cli import app
from fuseplan.compatibility import ASIDE, OPTIONAL, PRIVATE_APIS, PrivateApi
from fuseplan.errors import CompatibilityError
from fuseplan.integrations.pytest_plugin import assert_fusions
from tests.compatibility.moved import change, hide, import_anew

NEEDED = [each for each in PRIVATE_APIS if not (ASIDE | OPTIONAL).issuperset(each.users)]
BY_PATH = {each.path: each for each in PRIVATE_APIS}
MOVED = BY_PATH["torch._inductor.compile_fx:_recursive_post_grad_passes"]
FOR_WORKLOADS = BY_PATH["torch.testing._internal.distributed.fake_pg:FakeStore"]
LINE = (
    f"torch {torch.__version__} has changed private interfaces that fuseplan needs: {MOVED.dotted} is gone; "
    "use torch 2.11 to 2.15, or a newer fuseplan"
)


def model(x: Tensor) -> Tensor:
    return x.sin() + 1


@pytest.fixture(scope="module", autouse=True)
def all_imported() -> None:
    """What torch imports late must not be imported from a torch that is altered: it would stay."""
    torch.compile(model)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fuseplan, imported anew on a torch of which one thing is gone."""
    hide(monkeypatch, MOVED)
    return import_anew(monkeypatch)


@pytest.fixture
def moved_later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the modules that are imported already look at a torch of which one thing is gone."""

    def move(api: PrivateApi = MOVED) -> None:
        hide(monkeypatch, api)
        compatibility.incompatibility.cache_clear()

    yield move
    compatibility.incompatibility.cache_clear()


@pytest.mark.parametrize("api", NEEDED, ids=lambda api: api.dotted)
def test_every_entry_point_outlives_what_is_gone(api: PrivateApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, api)
    anew = import_anew(monkeypatch)
    assert [name for name in anew.__all__ if not hasattr(anew, name)] == []
    with pytest.warns(fuseplan.FuseplanWarning, match=f"{api.module}.*is gone") as caught:
        compiled = anew.compile(model, config=anew.PassConfig(), dynamic=False)
    assert [warning.filename for warning in caught] == [__file__]
    assert "\n" not in str(caught[0].message)
    assert compiled._torchdynamo_orig_callable is model
    with pytest.warns(fuseplan.FuseplanWarning, match=torch.__version__.replace("+", r"\+")):
        assert anew.inductor_options(anew.PassConfig(), options={"max_autotune": True}) == {"max_autotune": True}
    for refuse, given in ((anew.explain, model), (anew.PostGradPassManager, anew.PassConfig())):
        with pytest.raises(CompatibilityError, match="is gone"):
            refuse(given)


def test_the_line_names_torch_and_what_moved(moved: Any) -> None:
    with pytest.warns(fuseplan.FuseplanWarning) as caught:
        moved.compile(model)
    assert [str(each.message) for each in caught] == [
        f"{LINE}; the model is compiled by torch.compile, without fuseplan's fusions"
    ]
    with pytest.warns(fuseplan.FuseplanWarning) as caught:
        moved.inductor_options()
    assert [str(each.message) for each in caught] == [f"{LINE}; these options are without fuseplan's fusions"]
    with pytest.raises(CompatibilityError) as raised:
        moved.explain(model, torch.ones(2))
    assert str(raised.value) == LINE


def test_only_the_first_of_many_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.pattern_matcher", None)
    anew = import_anew(monkeypatch)
    count = sum(each.module == "torch._inductor.pattern_matcher" for each in PRIVATE_APIS)
    with pytest.warns(fuseplan.FuseplanWarning, match=f"can't be imported .*, and {count - 2} more; use torch"):
        anew.compile(model)


@pytest.mark.parametrize("alter", [hide, change])
def test_the_fallback_runs_the_model(alter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alter(monkeypatch, MOVED)
    anew = import_anew(monkeypatch)
    config = anew.PassConfig(compile_ranges=[anew.CompileRange(start=1, end=8)])
    ours = anew.ExternalPass(matcher=object())
    graphs = torch._dynamo.utils.counters["stats"]
    with pytest.warns(fuseplan.FuseplanWarning, match=MOVED.dotted):
        compiled = anew.compile(model, config=config, on_report=print, passes=[ours], fullgraph=True)
    torch._dynamo.reset()
    before = graphs["unique_graphs"]
    with torch.inference_mode():
        torch.testing.assert_close(compiled(torch.ones(3, 4)), torch.ones(3, 4).sin() + 1)
    assert graphs["unique_graphs"] == before + 1


@pytest.mark.parametrize(
    ("api", "options", "note"),
    [
        (MOVED, {"max_autotune": True, "epilogue_fusion": False}, "fusions"),
        (BY_PATH["torch._inductor:list_mode_options"], {"epilogue_fusion": False}, "fusions and without mode="),
    ],
)
def test_a_mode_beside_options_is_expanded_while_torch_tells_how(
    api: PrivateApi, options: dict[str, Any], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, api)
    anew = import_anew(monkeypatch)
    if api is not MOVED:
        monkeypatch.setattr(torch, "_inductor", sys.modules["torch._inductor"])
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda model, **arguments: given.update(arguments))
    with pytest.warns(fuseplan.FuseplanWarning, match=note):
        anew.compile(model, mode="max-autotune-no-cudagraphs", options={"epilogue_fusion": False}, dynamic=False)
    assert "mode" not in given
    assert given["dynamic"] is False
    assert {name: given["options"].get(name) for name in options} == options


def test_old_torch_is_an_error_even_where_more_is_missing(moved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    for door in (lambda: moved.compile(model), moved.inductor_options, lambda: moved.explain(model)):
        with pytest.raises(CompatibilityError, match=r"torch 2\.10\.0 is too old"):
            door()


def test_the_range_of_versions_is_the_same_everywhere() -> None:
    root = Path(__file__).parents[2]
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    found = re.findall(r'^NEWEST_TORCH \?= torch==(\d+)\.(\d+)\.|^    "torch>=(\d+)\.(\d+)', text, re.MULTILINE)
    newest, oldest = (tuple(int(part) for part in match if part) for match in found)
    assert compatibility.OLDEST_TORCH == oldest < newest <= compatibility.NEWEST_TORCH


def test_what_only_workloads_need_stops_the_command_line_alone(moved_later: Any) -> None:
    moved_later(FOR_WORKLOADS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(fuseplan.inductor_options()) == {"post_grad_custom_post_pass"}
        fuseplan.compile(model)
    result = CliRunner().invoke(app, ["explain", "gpt-oss-120b-tiny"])
    assert result.exit_code == 2
    assert f"{FOR_WORKLOADS.dotted} is gone" in result.stderr


def test_the_command_line_and_the_pytest_plugin_say_it_in_one_line(moved_later: Any) -> None:
    moved_later()
    for arguments in (["explain", "gpt-oss-120b-tiny"], ["check", "gpt-oss-20b", "--lock", "y"], ["devices"]):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"fuseplan: {LINE}\n")
    with pytest.raises(CompatibilityError, match="is gone"):
        assert_fusions(model, (torch.ones(2),), {"act_padding": 0})


EXTENSIONS = """
import importlib, sys
import torch
from fuseplan.compatibility import PRIVATE_APIS
from tests.compatibility.moved import Altered

for module in sorted({each.module for each in PRIVATE_APIS} - {"torch"}):
    gone = {each.attributes[0]: None for each in PRIVATE_APIS if each.module == module}
    if module.startswith("torch._inductor"):
        sys.modules[module] = None
    else:
        sys.modules[module] = Altered(importlib.import_module(module), gone)
for name in "rules providers dialect config record report errors cli integrations.pytest_plugin".split():
    importlib.import_module(f"fuseplan.{name}")
from fuseplan.cli import main
sys.argv = ["fuseplan", "rules"]
main()
"""


@pytest.mark.nightly
def test_rules_and_providers_of_ones_own_can_be_imported_whatever_moved() -> None:
    """A program that brings some goes on with the fallback."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", EXTENSIONS], check=False, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "allreduce_rms" in done.stdout
