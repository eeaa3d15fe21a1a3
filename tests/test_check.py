"""`fuseplan check` as a user and CI meet it."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fuseplan.cli import app
from fuseplan.devices import known
from fuseplan.planner.costs import CostTable
from tests import regressing_model
from tests.docs.commands import traced_once
from tests.lines import one_line
from tests.regressing_model import LAYERS, plant

WORKLOAD = "regressing_model:build"
RANGES = 3
SCALE = "regressing_model.py:" + next(
    str(number)
    for number, line in enumerate(Path(regressing_model.__file__).read_text().splitlines(), start=1)
    if "x = x * 0.5" in line
)
"""The line of the obstacle `scale`."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.fixture(scope="module")
def importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model that is on the path of imports."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(regressing_model.__file__, folder / "regressing_model.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("COLUMNS", "120")
        yield folder
    sys.modules.pop("regressing_model", None)


@pytest.fixture
def once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture
def model(importable: Path) -> Path:
    """That folder, with nothing planted."""
    plant(importable)
    return importable


@pytest.fixture(scope="module")
def written(importable: Path) -> str:
    """The lock of the model as it should be."""
    plant(importable)
    path = importable / "fusions.lock"
    result = run(WORKLOAD, "--tp", "2", "--lock", str(path), "--update")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.stdout
    assert f"{LAYERS * RANGES} fusions (allreduce_rms_padding {LAYERS * RANGES})" in result.stdout
    return path.read_text()


@pytest.fixture
def lock(written: str, tmp_path: Path) -> Path:
    """A copy of it."""
    path = tmp_path / "fusions.lock"
    path.write_text(written)
    return path


def test_a_lock_is_small_and_holds_with_and_without_its_own_options(model: Path, lock: Path) -> None:
    data = json.loads(lock.read_text())
    assert data["fusions"] == {
        "1:64, 65:512, 513:8192": {
            "allreduce_rms_padding all_reduce_fused_add_rms_norm_pad triton": ["layers.0-3.norm"]
        }
    }
    assert data["settings"] == {
        "costs": "modelled", "device": "h200", "policy": "planned", "ranges": ["1:64", "65:512", "513:8192"], "tp": 2,
        "workload": WORKLOAD,
    }  # fmt: skip
    result = run(WORKLOAD, "--lock", str(lock))
    assert result.exit_code == 0
    assert result.stdout.split() == (
        f"{lock} holds: 12 fusions (allreduce_rms_padding 12) of {WORKLOAD}, TP=2, planned for h200".split()
    )
    same = ["--tp", "2", "--device", "h200", "--policy", " planned ", "--range", "513:8192", "--range", "1:64"]
    held = run(WORKLOAD, "--lock", str(lock), *same, "--range", "65:512", "--json")
    assert held.exit_code == 0
    assert json.loads(held.stdout)["passed"]


def test_a_regression_names_the_fusion_the_place_and_the_line(model: Path, lock: Path) -> None:
    plant(model, "1 scale")
    before = lock.read_text()
    shown = run(WORKLOAD, "--lock", str(lock))
    assert shown.exit_code == 1
    text = " ".join(shown.stdout.split())
    assert f"{lock} doesn't hold: 3 moved" in text
    assert text.endswith("the same command with --update pins it")
    assert lock.read_text() == before
    result = run(WORKLOAD, "--lock", str(lock), "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert (data["schema"], data["passed"], data["workload"], data["tp"]) == (1, False, WORKLOAD, 2)
    assert data["locked"] == {"allreduce_rms_padding": LAYERS * RANGES}
    assert data["fused"] == {"act_padding": RANGES, "allreduce_rms_padding": (LAYERS - 1) * RANGES}
    (moved,) = data["differences"]
    assert (moved["change"], moved["count"]) == ("moved", RANGES)
    assert moved["where"][0]["places"] == ["layers.1.norm"]
    assert (moved["before"].split()[0], moved["after"].split()[0]) == ("allreduce_rms_padding", "act_padding")
    assert moved["cause"]["kind"] == "near miss"
    assert moved["cause"]["detail"].startswith("aten.mul.Tensor stands between all_reduce and fused_add_rms_norm")
    assert (moved["cause"]["code"], "scale before all_reduce" in moved["cause"]["mend"]) == ("x = x * 0.5", True)
    assert moved["cause"]["near_miss"]["sites"] == ["layers.1.norm"]
    assert moved["cause"]["line"] == SCALE


def test_an_update_pins_what_changed_and_then_holds(model: Path, lock: Path) -> None:
    plant(model, "1 scale")
    before = set(lock.read_text().splitlines())
    result = run(WORKLOAD, "--lock", str(lock), "--update")
    assert result.exit_code == 0
    after = set(lock.read_text().splitlines())
    assert {line.strip() for line in after - before} >= {'"layers.0,2-3.norm"', '"layers.1.norm"'}
    again = run(WORKLOAD, "--lock", str(lock), "--update", "--json")
    assert again.exit_code == 0
    assert not json.loads(again.stdout)["written"]
    assert {each.name for each in lock.parent.iterdir()} == {"fusions.lock"}


def test_an_update_can_pin_another_question(model: Path, lock: Path) -> None:
    further = ["--range", "8", "--policy", "ordered(act_padding)", "--device", "mi355x"]
    result = run(WORKLOAD, "--lock", str(lock), "--update", *further)
    assert result.exit_code == 0
    assert "ranges: 1:64, 65:512, 513:8192 -> 8" in result.stdout
    assert "device: h200 -> mi355x" in result.stdout
    data = json.loads(lock.read_text())
    assert data["fusions"] == {"8": {"act_padding fused_add_rms_norm_pad triton": ["layers.0-3.norm"]}}
    assert data["settings"]["tp"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tp", "4"], "pins tp=2, and the command line says tp=4"),
        (["--device", "h100"], "pins device=h200, and the command line says device=h100"),
        (["--range", "1:8"], "pins ranges=1:64, 65:512, 513:8192, and the command line says ranges=1:8"),
        (["--policy", "off"], "pins policy=planned, and the command line says policy=off"),
        (["--force", "act_padding"], "pins force=none, and the command line says force=act_padding"),
        (["--forbid", "act_padding"], "pins forbid=none, and the command line says forbid=act_padding"),
        (["--provider", "triton"], "pins providers=all, and the command line says providers=triton"),
        (["--layers", "3"], "pins layers=none, and the command line says layers=3"),
        (["--allow-rounding-changes"],
         "pins allow_rounding_changes=False, and the command line says allow_rounding_changes=True"),
        (["--tp", "4", "--policy", "off"],
         "pins policy=planned and tp=2, and the command line says policy=off and tp=4"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_lock_are_one_line(arguments: list[str], says: str, lock: Path) -> None:
    line = one_line(run(WORKLOAD, "--lock", str(lock), *arguments))
    assert says in line
    assert line.endswith("leave it out, or pin it with --update")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "h20"], "did you mean 'h200'"),
        (["--provider", "tritonn"], "did you mean 'triton'"),
        (["--range", "9:1"], "empty"),
        (["--tp", "0"], "at least 1"),
        (["--tp", "2147483648"], "tp=2147483648: allowed are at most 65536 ranks"),
        (["--force", "act_padding", "--policy", "off"], "force needs policy planned"),
        (["--layers", "2"], "is a factory"),
        (["--force", ""], "selector '' isn't of the form RULE"),
    ],
)
def test_requests_that_cannot_be_served_write_nothing(
    arguments: list[str], says: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fusions.lock"
    assert says in one_line(run(WORKLOAD, "--lock", str(path), "--update", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_no_lock_says_how_to_write_one(model: Path, tmp_path: Path) -> None:
    line = one_line(run(WORKLOAD, "--lock", str(tmp_path / "fusions.lock")))
    assert line.endswith("fusions.lock'; the same command with --update writes it")
    assert "can't be written: No such file or directory" in one_line(
        run(WORKLOAD, "--lock", str(tmp_path / "nowhere" / "fusions.lock"), "--update")
    )
    for update in ([], ["--update"]):
        line = one_line(run(WORKLOAD, "--lock", str(tmp_path), *update))
        assert line.endswith(f"can't be read: Is a directory; name a file, e.g. '{tmp_path / 'fusions.lock'}'")


def changed(text: str, **settings: Any) -> str:
    data = json.loads(text)
    data["settings"].update(settings)
    return json.dumps(data)


@pytest.mark.parametrize("update", [False, True])
def test_a_broken_lock_is_one_line(update: bool, model: Path, lock: Path) -> None:
    good = lock.read_text()
    for broken, says in (
        ("<<<<<<< HEAD\n" + good, "isn't JSON"),
        (good.replace('"schema": 1', '"schema": 9'), "has schema 9; this version reads 1"),
        (good.replace("layers.0-3", "layers.3-0"), "don't ascend"),
        (changed(good, tp="two"), "settings.tp: expected int"),
        (changed(good, costs="measured"), "a lock pins modelled ones"),
        (changed(good, workload="other:build"), f"is of workload 'other:build', not '{WORKLOAD}'; name another file"),
        (changed(good, device="h20x"), "did you mean 'h200'"),
        (changed(good, force=["act_pading"]), "did you mean 'act_padding'"),
        (changed(good, forbid=[""]), "selector '' isn't of the form"),
        (changed(good, force=["act_padding"], policy="off"), "force needs policy planned"),
        (changed(good, policy="plan"), "unknown policy 'plan'"),
        (changed(good, flags={"fuse_everything": True}), "settings.flags: unknown name 'fuse_everything'"),
        (changed(good, limits={"fuse_act_padding": 1}), "settings.limits: unknown name 'fuse_act_padding'"),
        (changed(good, force=["act_padding", "allreduce_rms"]),
         "force 'act_padding' and force 'allreduce_rms' contradict each other at"),
    ):  # fmt: skip
        lock.write_text(broken)
        line = one_line(run(WORKLOAD, "--lock", str(lock), *(["--update"] if update else [])))
        assert says in line
        assert str(lock) in line
        assert lock.read_text() == broken


def test_flags_and_limits_of_a_lock_are_asked_again(model: Path, lock: Path) -> None:
    lock.write_text(changed(lock.read_text(), flags={"fuse_allreduce_rms": False}, limits={"max_fusions": 2}))
    data = json.loads(run(WORKLOAD, "--lock", str(lock), "--json").stdout)
    assert data["fused"] == {"act_padding": 2 * RANGES}
    causes = {row["cause"]["detail"] for row in data["differences"]}
    assert causes == {"it matches, and fuse_allreduce_rms=False switches it off"}


def test_what_selects_nothing_is_said_when_it_is_pinned_and_whenever_it_is_asked(model: Path, tmp_path: Path) -> None:
    lock = ["--lock", str(tmp_path / "fusions.lock")]
    says = "'act_padding@layer.*' is forced or forbidden, and selects no match in this graph"
    written = run(WORKLOAD, *lock, "--update", "--forbid", "act_padding@layer.*")
    assert (written.exit_code, written.stderr) == (0, f"warning: {says}\n")
    held = run(WORKLOAD, *lock, "--json")
    assert (held.exit_code, held.stderr) == (0, "")
    (warning,) = json.loads(held.stdout)["warnings"]
    assert (warning["reason"], warning["detail"]) == ("no effect", says)


def test_the_environment_changes_nothing_silently(
    model: Path, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that is written on another machine, beside another cost table, is the same to the byte."""
    other = tmp_path / "other.lock"
    table = tmp_path / "table.json"
    there = SimpleNamespace(name="AMD Instinct MI355X", multi_processor_count=256)
    for text in ("broken", None):
        if text is None:
            CostTable(device="h200").save(table)
        else:
            table.write_text(text)
        monkeypatch.setenv("FUSEPLAN_COSTS", str(table))
        monkeypatch.setattr(known, "local_vendor", lambda: "amd")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: there.name)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: there)
        assert run(WORKLOAD, "--tp", "2", "--lock", str(other), "--update").exit_code == 0
        assert other.read_text() == lock.read_text()
        other.unlink()
    monkeypatch.setenv("FUSEPLAN", "0")
    assert "FUSEPLAN=0 switches every fusion off" in one_line(run(WORKLOAD, "--lock", str(lock)))


@pytest.mark.usefixtures("once")
def test_a_configuration_is_named_by_its_path_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 96, **sizes}))
    (tmp_path / "locks").mkdir()
    lock = tmp_path / "locks" / "llama.lock"
    arguments = ["--lock", str(lock), "--tp", "2", "--range", "40:48"]
    assert run(str(config), *arguments, "--update").exit_code == 0
    assert json.loads(lock.read_text())["settings"]["workload"] == "../configs/config.json"
    monkeypatch.chdir(tmp_path / "configs")
    held = run("config.json", "--lock", "../locks/llama.lock", "--json")
    assert json.loads(held.stdout)["fused"] == {"allreduce_rms": 2}
    assert held.exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert run("configs", "--lock", str(lock)).exit_code == 0
    lock.write_text(lock.read_text().replace("../configs/config.json", "../configs"))  # as older ones have it
    for name in ("configs", "configs/config.json"):
        assert run(name, "--lock", str(lock)).exit_code == 0


@pytest.mark.usefixtures("once")
def test_a_built_in_workload(tmp_path: Path) -> None:
    path = tmp_path / "tiny.lock"
    arguments = ["gpt-oss-120b-tiny", "--lock", str(path)]
    assert run(*arguments, "--tp", "2", "--layers", "2", "--range", "1:64", "--update").exit_code == 0
    data = json.loads(path.read_text())
    assert data["fusions"]["1:64"] == {
        "allreduce_rms all_reduce_rms_norm triton": ["layers.0.input_norm"],
        "allreduce_rms_padding all_reduce_fused_add_rms_norm_pad triton": ["layers.0-1.post_attention_norm"],
    }
    path.write_text(path.read_text().replace("layers.0-1.post", "layers.0-2.post"))
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    (lost,) = json.loads(result.stdout)["differences"]
    assert (lost["change"], lost["cause"]["kind"]) == ("lost", "gone")
    assert lost["where"][0]["places"] == ["layers.2.post_attention_norm"]
