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
from tests import regressing_model
from tests.docs.commands import traced_once
from tests.lines import one_line
from tests.regressing_model import LAYERS, plant

WORKLOAD = "regressing_model:build"
RANGES = 3


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def check(lock: Path, *arguments: str, status: int = 0) -> str:
    """What is printed of the model beside a lock."""
    result = run(WORKLOAD, "--lock", str(lock), *arguments)
    assert result.exit_code == status, result.output
    return result.stdout


def verdict(lock: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(check(lock, *arguments, "--json", status=status))
    return found


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
def model(importable: Path) -> Path:
    """That folder, with nothing planted."""
    plant(importable)
    return importable


@pytest.fixture(scope="module")
def written(importable: Path) -> str:
    """The lock of the model as it should be."""
    plant(importable)
    path = importable / "fusions.lock"
    shown = check(path, "--tp", "2", "--update")
    assert "wrote" in shown
    assert f"{LAYERS * RANGES} fusions (allreduce_rms_padding {LAYERS * RANGES})" in shown
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
    says = f"{lock} holds: 12 fusions (allreduce_rms_padding 12) of {WORKLOAD}, TP=2, planned for h200"
    assert check(lock).split() == says.split()
    same = ["--tp", "2", "--device", "h200", "--policy", " planned ", "--range", "513:8192", "--range", "1:64"]
    assert verdict(lock, *same, "--range", "65:512")["passed"]


def test_a_regression_names_the_fusion_the_place_and_the_line(model: Path, lock: Path) -> None:
    plant(model, "1 scale")
    before = lock.read_text()
    text = " ".join(check(lock, status=1).split())
    assert f"{lock} doesn't hold: 3 moved" in text
    assert text.endswith("the same command with --update pins it")
    assert lock.read_text() == before
    data = verdict(lock, status=1)
    assert (data["schema"], data["passed"], data["workload"], data["tp"]) == (1, False, WORKLOAD, 2)
    assert data["locked"] == {"allreduce_rms_padding": LAYERS * RANGES}
    assert data["fused"] == {"act_padding": RANGES, "allreduce_rms_padding": (LAYERS - 1) * RANGES}
    (moved,) = data["differences"]
    assert (moved["change"], moved["count"]) == ("moved", RANGES)
    assert moved["where"][0]["places"] == ["layers.1.norm"]
    assert (moved["before"].split()[0], moved["after"].split()[0]) == ("allreduce_rms_padding", "act_padding")
    cause = moved["cause"]
    assert (cause["kind"], cause["near_miss"]["sites"]) == ("near miss", ["layers.1.norm"])
    assert cause["detail"].startswith("aten.mul.Tensor stands between all_reduce and fused_add_rms_norm")
    assert "scale before all_reduce" in cause["mend"]
    line = "x = x * 0.5"
    number = Path(regressing_model.__file__).read_text().partition(line)[0].count("\n") + 1
    assert (cause["line"], cause["code"]) == (f"regressing_model.py:{number}", line)


def test_an_update_pins_what_changed_and_then_holds(model: Path, lock: Path) -> None:
    plant(model, "1 scale")
    before = set(lock.read_text().splitlines())
    check(lock, "--update")
    after = set(lock.read_text().splitlines())
    assert {line.strip() for line in after - before} >= {'"layers.0,2-3.norm"', '"layers.1.norm"'}
    assert not verdict(lock, "--update")["written"]
    assert {each.name for each in lock.parent.iterdir()} == {"fusions.lock"}


def test_an_update_can_pin_another_question(model: Path, lock: Path) -> None:
    shown = check(lock, "--update", "--range", "8", "--policy", "ordered(act_padding)", "--device", "mi355x")
    assert "ranges: 1:64, 65:512, 513:8192 -> 8" in shown
    assert "device: h200 -> mi355x" in shown
    data = json.loads(lock.read_text())
    assert data["fusions"] == {"8": {"act_padding fused_add_rms_norm_pad triton": ["layers.0-3.norm"]}}
    assert data["settings"]["tp"] == 2


@pytest.mark.parametrize(
    ("arguments", "pinned", "asked"),
    [
        (["--device", "h100"], "device=h200", "device=h100"),
        (["--range", "1:8"], "ranges=1:64, 65:512, 513:8192", "ranges=1:8"),
        (["--force", "act_padding"], "force=none", "force=act_padding"),
        (["--forbid", "act_padding"], "forbid=none", "forbid=act_padding"),
        (["--provider", "triton"], "providers=all", "providers=triton"),
        (["--layers", "3"], "layers=none", "layers=3"),
        (["--allow-rounding-changes"], "allow_rounding_changes=False", "allow_rounding_changes=True"),
        (["--tp", "4", "--policy", "off"], "policy=planned and tp=2", "policy=off and tp=4"),
    ],
)
def test_options_that_contradict_the_lock_are_one_line(
    arguments: list[str], pinned: str, asked: str, lock: Path
) -> None:
    line = one_line(run(WORKLOAD, "--lock", str(lock), *arguments))
    assert f"pins {pinned}, and the command line says {asked}" in line
    assert line.endswith("leave it out, or pin it with --update")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
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
        (changed(good, costs="measured"), "a lock pins modelled ones"),
        (changed(good, workload="other:build"), f"is of workload 'other:build', not '{WORKLOAD}'; name another file"),
        (changed(good, device="h20x"), "did you mean 'h200'"),
        (changed(good, force=["act_pading"]), "did you mean 'act_padding'"),
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
    data = verdict(lock, status=1)
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
    other, table = tmp_path / "other.lock", tmp_path / "table.json"
    table.write_text("broken")
    there = SimpleNamespace(name="AMD Instinct MI355X", multi_processor_count=256)
    monkeypatch.setenv("FUSEPLAN_COSTS", str(table))
    monkeypatch.setattr(known, "local_vendor", lambda: "amd")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: there.name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: there)
    check(other, "--tp", "2", "--update")
    assert other.read_text() == lock.read_text()
    monkeypatch.setenv("FUSEPLAN", "0")
    assert "FUSEPLAN=0 switches every fusion off" in one_line(run(WORKLOAD, "--lock", str(lock)))


def test_a_configuration_is_named_by_its_path_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 96, **sizes}))
    (tmp_path / "locks").mkdir()
    lock = tmp_path / "locks" / "llama.lock"
    with traced_once():
        assert run(str(config), "--lock", str(lock), "--tp", "2", "--range", "40:48", "--update").exit_code == 0
        assert json.loads(lock.read_text())["settings"]["workload"] == "../configs/config.json"
        monkeypatch.chdir(tmp_path / "configs")
        held = run("config.json", "--lock", "../locks/llama.lock", "--json")
        assert (held.exit_code, json.loads(held.stdout)["fused"]) == (0, {"allreduce_rms": 2})
        monkeypatch.chdir(tmp_path)
        assert run("configs", "--lock", str(lock)).exit_code == 0
        lock.write_text(lock.read_text().replace("../configs/config.json", "../configs"))  # as older ones have it
        for name in ("configs", "configs/config.json"):
            assert run(name, "--lock", str(lock)).exit_code == 0


def test_a_built_in_workload_whose_last_layer_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.lock"
    arguments = ["gpt-oss-120b-tiny", "--lock", str(path)]
    assert run(*arguments, "--tp", "2", "--layers", "2", "--range", "1:64", "--update").exit_code == 0
    text = path.read_text()
    assert text.count("layers.0-1.post_attention_norm") == 1
    path.write_text(text.replace("layers.0-1.post", "layers.0-2.post"))
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    (lost,) = json.loads(result.stdout)["differences"]
    assert (lost["change"], lost["cause"]["kind"]) == ("lost", "gone")
    assert lost["where"][0]["places"] == ["layers.2.post_attention_norm"]
