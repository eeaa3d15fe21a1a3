"""`fuseplan bench` and `fuseplan try` as a user meets them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from fuseplan.cli import app
from fuseplan.planner.costs import CostTable
from fuseplan.workloads import catalog
from fuseplan.workloads.models import GptOss, KVCache
from tests.lines import one_line

WORKLOADS = "tests.cli.tuned_workloads"
POLICIES = ["planned", "ordered(act_padding)", "off", "torch.compile"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.usefixtures("by_code_at_night")  # tests/docs has it by code
def test_all_policies_side_by_side_at_each_batch_size() -> None:
    arguments = ["--batch", "3", "--batch", "2", "--repeats", "5", "--steps", "3", "--json"]
    result = run(f"{WORKLOADS}:pads", *arguments)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["schema"], data["tp"], data["device"], data["repeats"]) == (1, 1, "cpu", 5)
    assert [(each["batch"], each["steps"]) for each in data["batches"]] == [(2, 3), (3, 3)]
    for each in data["batches"]:
        assert [row["policy"] for row in each["policies"]] == POLICIES
        fused = {row["policy"]: row["fused"] for row in each["policies"]}
        assert fused == {"planned": {}, "ordered(act_padding)": {"act_padding": 1}, "off": {}, "torch.compile": {}}
        assert {row["policy"]: row["same_as"] for row in each["policies"] if row["same_as"]} == {"off": "planned"}
        for row in each["policies"]:
            assert row["tokens_per_s"] == pytest.approx(each["batch"] * 1e9 / row["step_ns"], abs=0.1)
            low, high = row["change_interval"]
            assert row["policy"] == "torch.compile" or low <= row["change"] <= high
            assert row["noise"] == (low <= 0 <= high)
    assert data["command"].startswith("fuseplan")
    assert data["notes"] == ["costs of the plan are modelled for cpu"]
    assert "0 of 8: compiling planned at batch 2" in result.stderr


@pytest.mark.usefixtures("by_code_at_night")
def test_what_a_person_sees_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "steps.png"
    asked = ["--policy", "ordered(act_padding)", "--batch", "4", "--repeats", "5", "--plot", str(plot)]
    result = run(f"{WORKLOADS}:pads", *asked)
    assert result.exit_code == 0, result.output
    words = [line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith("unclear")]
    assert words[1:] == ["batch", "ordered(act_padding)", "torch.compile"]
    assert f"the plot is in {plot} and {plot.with_suffix('.svg')}" in result.stderr
    assert plot.is_file()
    assert plot.with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "batch=0: give a number of sequences of at least 1"),
        (["--repeats", "4"], "repeats=4: a median and its spread need at least 5"),
        (["--steps", "0"], "steps=0: give a number of steps of at least 1"),
        (["--policy", "planed"], "unknown policy 'planed'"),
        (["--tp", "2"], "tp=2 takes as many processes: torchrun --nproc-per-node 2 -m fuseplan bench ..."),
        (["--costs", "nowhere.json"], "cost table 'nowhere.json' can't be read: No such file or directory"),
    ],
)
def test_what_can_not_be_served_is_one_line(arguments: list[str], text: str) -> None:
    assert one_line(run(f"{WORKLOADS}:pads", *arguments)).startswith(text)


def test_a_plot_without_matplotlib_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = one_line(run(f"{WORKLOADS}:pads", "--plot", str(tmp_path / "steps")))
    assert line == "a plot needs matplotlib: pip install matplotlib"
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_raises_is_one_line() -> None:
    result = run(f"{WORKLOADS}:raises", "--batch", "2", "--repeats", "5")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("fuseplan: the model could not be traced: ")


def test_steps_of_built_in_models_decode_a_token_for_each_sequence() -> None:
    with catalog.build("gpt-oss-120b-tiny", layers=1, weights=True) as built, torch.no_grad():
        (ids, positions, cache), kwargs = built.step(3, context=8)
        assert isinstance(built.model, GptOss)
        assert isinstance(cache, KVCache)
        assert (ids.shape, positions.tolist(), kwargs) == ((3, 1), [[7]], {})
        logits: Tensor = built.model(ids, positions, cache)
        assert logits.shape[:2] == (3, 1)
        # Written at its position, and not before.
        assert cache.k[0][:, 7].abs().sum() > 0
        assert cache.k[0][:, :7].abs().sum() == 0


def test_steps_of_hugging_face_models_too() -> None:
    with catalog.build("llama-3.1-8b-tiny", layers=1, weights=True) as built, torch.no_grad():
        args, kwargs = built.step(2, context=8)
        assert (args, kwargs["position_ids"].tolist()) == ((), [[7], [7]])
        assert built.model(**kwargs).logits.shape[:2] == (2, 1)
        assert kwargs["past_key_values"].layers[0].keys.shape[-2] == 8


def test_steps_of_a_factory_have_its_inputs_made_as_many() -> None:
    with catalog.build(f"{WORKLOADS}:pads", weights=True) as built:
        (x, residual, weight), _ = built.step(20)
        assert (x.shape[0], residual.shape[0], weight.shape) == (20, 20, built.inputs[2].shape)
        assert torch.equal(x[16:], built.inputs[0][:4])
        same, _ = built.step(None)
        assert all(a is b for a, b in zip(same, built.inputs, strict=True))


@pytest.mark.usefixtures("by_code_at_night")  # tests/docs has it by code
def test_one_command_tunes_times_and_explains(tmp_path: Path) -> None:
    table, page = tmp_path / "costs.json", tmp_path / "try.html"
    result = CliRunner().invoke(
        app, ["try", f"{WORKLOADS}:pads", "--batch", "4", "--repeats", "5", "--out", str(table), "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    took = r"; on cpu, batch 4: \S+ \S+ a step under the plan, \S+ \S+ under torch\.compile\.$"
    assert re.search(took, first), first
    assert re.match(
        "The plan fuses nothing|The plan gains nothing|Whether the plan gains anything is unclear|A step takes ", first
    )
    assert "costs are measured for cpu" in "\n".join(rest)
    assert len(CostTable.load(table, device="cpu").rows) == 2
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert re.search(r"\d of \d.*: tuning, ", result.stderr)
    assert f"the report is in {page}" in result.stderr


def test_what_a_try_can_not_write_is_found_before_anything_runs(tmp_path: Path) -> None:
    arguments = [f"{WORKLOADS}:pads", "--html", str(tmp_path / "nowhere" / "try.html")]
    assert one_line(CliRunner().invoke(app, ["try", *arguments]))
