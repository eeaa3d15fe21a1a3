"""The command line as a user meets it: what it prints, and one clear line for each request that can't be served."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fuseplan import compatibility
from fuseplan.cli import app
from fuseplan.errors import WorkloadError
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.workloads import catalog
from tests.docs.commands import traced_once
from tests.lines import one_line

FACTORIES = """
import sys
import torch

class Breaks(torch.nn.Module):
    def forward(self, x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

class Raises(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("no such luck\\non two lines")

class Exits(torch.nn.Module):
    def forward(self, x):
        raise SystemExit(0)

def breaks(tp): return Breaks(), (torch.randn(4, 8),)
def raises(tp): return Raises(), (torch.randn(4, 8),)
def wrong(tp): return 3
def fails(tp): raise ValueError("not today")
def exits(tp): sys.exit(0)
def exits_later(tp): return Exits(), (torch.randn(4, 8),)
def no_ops(tp): return (lambda x: 3), (torch.randn(2),)
"""


EXPLAIN = ("explain", "gpt-oss-120b-tiny", "--tp", "2", "--layers", "1", "--range", "1:64")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def told(*arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """Of 4 layers in three ranges."""
    return told("explain", "gpt-oss-120b-tiny", "--tp", "2")


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def by_order(data: dict[str, Any], *order: str) -> dict[str, Any]:
    (policy,) = [policy for policy in data["policies"] if tuple(policy.get("order", ())) == order]
    return dict(policy)


def test_case_1_each_order_starves_the_other_rule(tiny: dict[str, Any]) -> None:
    """vLLM #42411: one site a layer is contested, and one more, after the embedding, is not."""
    layers, ranges = 4, 3
    first = by_order(tiny, "allreduce_rms", "act_padding")
    assert first["fused"] == {"act_padding": 0, "allreduce_rms": (layers + 1) * ranges}
    repaired = by_order(tiny, "act_padding", "allreduce_rms")
    assert repaired["fused"] == {"act_padding": layers * ranges, "allreduce_rms": ranges}
    (off,) = [policy for policy in tiny["policies"] if policy["policy"] == "off"]
    assert set(off["fused"].values()) == {0}
    planned = tiny["policies"][0]
    assert (planned["policy"], planned["gap"]) == ("planned", 0.0)
    assert planned["fused"]["allreduce_rms_padding"] == layers * ranges
    assert planned["objective_ns"] == planned["bound_ns"] == round(planned["saved_us"] * 1000)
    assert all(policy["saved_us"] <= planned["saved_us"] for policy in tiny["policies"])


def test_json_contract(tiny: dict[str, Any]) -> None:
    assert tiny["schema"] == 1
    assert (tiny["workload"], tiny["tp"], tiny["device"]) == ("gpt-oss-120b-tiny", 2, "h200")
    assert tiny["ranges"] == [[1, 64], [65, 512], [513, 8192]]
    for policy in tiny["policies"]:
        totals = dict.fromkeys(policy["fused"], 0)
        for row in policy["per_range"]:
            for rule, count in row["fused"].items():
                totals[rule] += count
        assert totals == policy["fused"]
        assert [row["range"] for row in policy["per_range"]] == tiny["ranges"]


def test_conflicts_name_winner_loser_and_places(tiny: dict[str, Any]) -> None:
    rows = {(row["winner"], row["loser"]): row for row in tiny["conflicts"]}
    contest = ("act_padding", "allreduce_rms")
    for row in (rows[contest], rows[contest[::-1]]):
        assert (row["op"], row["count"], row["rules"]) == ("fused_add_rms_norm", 12, [*contest])
        assert row["sources"] == [f"layers.{layer}.post_attention_norm" for layer in range(4)]


def test_counts_follow_layers_and_ranges() -> None:
    ranges = ["--range", "1:8", "--range", "9:100"]
    data = told("explain", "gpt-oss-120b-tiny:outer-reduce", "--tp", "2", "--layers", "2", *ranges)
    assert by_order(data, "act_padding", "allreduce_rms")["fused"] == {"act_padding": 4, "allreduce_rms": 6}
    assert by_order(data, "allreduce_rms", "act_padding")["fused"] == {"act_padding": 0, "allreduce_rms": 10}


def test_one_rank_has_no_all_reduce_to_fuse() -> None:
    data = told("explain", "gpt-oss-20b-tiny", "--layers", "2", "--range", "1:8")
    assert by_order(data, "act_padding")["fused"] == {"act_padding": 2}


def test_a_screen_has_no_colour_and_more_when_asked() -> None:
    few, more = run(*EXPLAIN), run(*EXPLAIN, "-v")
    assert (few.exit_code, more.exit_code) == (0, 0)
    assert "\nconflict  " in more.stdout
    assert "\nconflict  " not in few.stdout
    assert "\x1b[" not in more.stdout


def test_policies_can_be_named() -> None:
    policies = told(*EXPLAIN, "--policy", "ordered(allreduce_rms)", "--policy", "off")["policies"]
    assert [policy["policy"] for policy in policies] == ["ordered", "off"]
    assert policies[0]["fused"] == {"allreduce_rms": 2}


def test_graph_breaks_are_reported_and_the_rest_explained(factories: Path) -> None:
    result = run("explain", "some_factories:breaks")
    assert result.exit_code == 0
    assert "2 graphs" in result.stdout
    call = "torch._dynamo.graph_break()"
    line = FACTORIES.partition(call)[0].count("\n") + 1
    assert f"graph break: Call to `{call}` (some_factories.py:{line}: {call})" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain", "gpt-os-120b"], "did you mean 'gpt-oss-120b'"),
        (["explain", "gpt-oss-120b", "--tp", "3"],
         "tp=3 does not divide 64 query heads of gpt-oss-120b; use one of 1, 2"),
        (["explain", "gpt-oss-120b", "--tp", "0"], "at least 1"),
        (["explain", "gpt-oss-120b", "--tp", "2147483648"], "tp=2147483648: give a number of ranks of at most 65536"),
        (["explain", "gpt-oss-120b", "--layers", "0"], "at least 1"),
        (["explain", "gpt-oss-120b", "--policy", "planed"],
         "unknown policy 'planed'; allowed: planned, off, ordered(RULE"),
        (["explain", "gpt-oss-120b", "--range", "x"], "FIRST:LAST"),
        (["explain", "some_factories:wrong"], "must return (module, inputs), found int"),
        (["explain", "some_factories:fails"], "ValueError: not today"),
        (["explain", "some_factories:exits"], "the factory failed: it calls sys.exit(0)"),
        (["explain", "some_factories:exits_later"], "could not be traced: it calls sys.exit(0)"),
        (["check", "some_factories:exits", "--lock", "l.lock", "--update"], "the factory failed: it calls sys.exit(0)"),
        (["explain", "some_factories:nonesuch"], "unknown factory 'nonesuch'; allowed: "),
        (["explain", "some_factories:wrong", "--layers", "2"], "is a factory"),
        (["explain", "some_factories:raises"], "could not be traced: no such luck on two lines"),
        (["explain", "some_factories:no_ops"], "it runs no tensor op"),
        (["rules", "act_pading"], "did you mean 'act_padding'"),
        (["providers", "flashinfr"], "did you mean 'flashinfer'?"),
        ([*EXPLAIN, "--force", "act_padding", "--forbid", "act_padding"], "is forced and forbidden"),
        ([*EXPLAIN, "--save-plan", "nowhere/plan.json"], "can't be written"),
        ([*EXPLAIN, "--policy", "off", "--force", "act_padding"],
         "force 'act_padding' applies to policy planned only, and shown is off; add planned, or leave it out"),
    ],
)  # fmt: skip
def test_bad_requests_end_in_one_line_and_status_2(arguments: list[str], expected: str, factories: Path) -> None:
    assert expected in one_line(run(*arguments))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "it isn't JSON"),
        ("[1]", 'has no "model_type"'),
        ('{"model_type": "nonesuch"}', "no causal language model of type 'nonesuch'"),
        ('{"model_type": "bert-japanese"}', "no causal language model"),
        ('{"model_type": "t5"}', "no causal language model of type 't5'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers can't read it"),
    ],
)
def test_broken_configs_end_in_one_line_and_status_2(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert expected in one_line(run("explain", str(path)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def config_of(folder: Path, **further: Any) -> str:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps({**sizes, "vocab_size": 96, **further}))
    return str(folder)


def test_a_config_of_transformers_is_explained(tmp_path: Path) -> None:
    folder = config_of(tmp_path, model_type="qwen3", num_hidden_layers=3, head_dim=16)
    data = told("explain", folder, "--tp", "2", "--range", "1:8")
    fused = {"allreduce_rms": 2 * 3, "grouped_attention": 3, "qk_norm_rope": 3}
    assert by_order(data, *fused)["fused"] == fused
    assert data["recognized"]["fused_add_rms_norm[64]"] + data["recognized"]["rms_norm[64]"] == 2 * 3 + 1
    assert data["recognized"]["rms_norm[16]"] == 2 * 3  # QK norms


def test_graph_breaks_of_a_config_are_named_with_their_lines(tmp_path: Path) -> None:
    folder = config_of(tmp_path, model_type="jetmoe", num_hidden_layers=1)
    result = run("explain", folder, "--range", "1:8", "--policy", "planned", "-v")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert re.search(r"graph break: .*? \(modeling_jetmoe\.py:\d+: expert_size = expert_size\.tolist\(\)\)", shown)
    assert "graph break: a call in which the graph breaks (modeling_jetmoe.py:" in shown
    assert re.search(r"recognised: .*rms_norm\[64\]", shown)


def test_old_torch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    line = one_line(run("explain", "gpt-oss-120b"))
    assert line == "torch 2.10.1+cu128 is too old: fuseplan needs torch 2.11 or newer; pip install -U torch"
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+git1234")
    compatibility.require_supported_torch()


def test_debug_shows_the_traceback() -> None:
    result = run("explain", "gpt-os-120b", "--debug")
    assert result.exit_code == 2
    assert WorkloadError.__name__ in result.stderr
    assert "Traceback" in result.stderr


def test_rules_lists_every_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "320")
    data = told("rules")
    assert sum(len(row["fusions"]) for row in data["rules"]) == len(BUILT_IN_RULES)
    for rule in BUILT_IN_RULES:
        assert rule.describe() in run("rules", rule.name).stdout
    _, *rows = run("rules").stdout.splitlines()[:-2]
    assert [line.split()[0] for line in rows] == sorted({rule.name for rule in BUILT_IN_RULES})
    (norms,) = [line.split() for line in rows if line.startswith("norm_quant ")]
    assert norms[1:3] == ["fuse_norm_quant", str(sum(rule.name == "norm_quant" for rule in BUILT_IN_RULES))]


def test_providers_say_why_not() -> None:
    rows = {row["provider"]: row for row in told("providers")["providers"]}
    assert rows["torch"]["available"]
    assert rows["torch"]["why_not"] is None
    assert {rule.op.name for rule in BUILT_IN_RULES} == set(rows["torch"]["implements"])
    if not torch.cuda.is_available():
        assert rows["aiter"]["why_not"] == "serves AMD GPUs, and this machine has no GPU"
        assert "serves AMD GPUs" in run("providers").stdout


def test_a_provider_tells_what_its_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    (row,) = told("providers", "flashinfer")["providers"]
    kernels = {each["op"]: each for each in row["kernels"]}
    assert list(kernels) == row["implements"]
    reduces = kernels["all_reduce_fused_add_rms_norm"]
    assert reduces["rounds"] == ["gemma", "gpt_oss"]
    assert {"bfloat16 or float16", "2, 4 or 8 ranks", "contiguous"} <= set(reduces["takes"])
    shown = run("providers", "flashinfer").stdout
    assert all(op in shown for op in kernels)
    assert "doesn't round the norm before it is quantised" in shown
    assert "least scale 4.36e-06" in shown
    assert "whatever the op takes" in run("providers", "torch").stdout


def test_what_has_not_been_run_is_said() -> None:
    rows = {row["provider"]: row for row in told("providers")["providers"]}
    assert [name for name in rows if rows[name]["untested"]] == ["aiter", "sdpa", "sdpa_packed", "triton", "vllm_c"]
    assert "not run on ROCm hardware" in run("providers").stdout


def test_plans_are_saved_replayed_and_compared(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(*EXPLAIN, "--save-plan", str(first)).exit_code == 0
    assert run(*EXPLAIN, "--save-plan", str(second), "--forbid", "allreduce_rms_padding").exit_code == 0
    same = run("diff", str(first), str(first))
    assert (same.exit_code, same.stdout.strip()) == (0, "the same fusions at the same places")
    changed = run("diff", str(first), str(second))
    assert (changed.exit_code, "allreduce_rms_padding" in changed.stdout) == (1, True)
    assert json.loads(run("diff", str(first), str(second), "--json").stdout)["changes"]
    fused = told(*EXPLAIN, "--plan", str(second), "--policy", "planned")["policies"][0]["fused"]
    assert (fused["allreduce_rms_padding"], fused["allreduce_rms"]) == (0, 2)
    other = run("explain", "gpt-oss-120b-tiny", "--tp", "2", "--layers", "2", "--range", "1:64", "--plan", str(first))
    assert "doesn't fit this graph: there were" in one_line(other)


def test_what_is_forced_stands_beside_the_plan_without_it() -> None:
    """ "What if": what it saves less, and what changes where."""
    data = told(*EXPLAIN, "--policy", "planned", "--force", "act_padding")
    (asked,), other = data["policies"], data["counterfactual"]
    assert (asked["force"], asked["fused"]["act_padding"]) == (["act_padding"], 1)
    assert (other["force"], other["forbid"]) == (["act_padding"], [])
    assert other["without"]["fused"] == {**asked["fused"], "act_padding": 0, "allreduce_rms_padding": 1}
    (change,), (lost,) = other["changes"], other["lost_us"]
    assert (change["before"], change["after"]) == ("allreduce_rms_padding triton", "act_padding triton")
    assert lost["lost_us"] == pytest.approx(other["without"]["saved_us"] - asked["saved_us"])
    assert lost["lost_us"] > 0
    assert told(*EXPLAIN)["counterfactual"] is None


def test_what_is_forbidden_is_held_against_the_first_order_too() -> None:
    order = "ordered(allreduce_rms, act_padding)"
    arguments = (*EXPLAIN, "--policy", "off", "--policy", order, "--forbid", "allreduce_rms@layers.0.post*")
    other = told(*arguments)["counterfactual"]
    assert (other["force"], other["forbid"]) == ([], ["allreduce_rms@layers.0.post*"])
    assert other["without"]["order"] == ["allreduce_rms", "act_padding"]
    (change,) = other["changes"]
    assert (change["before"].split()[0], change["after"].split()[0]) == ("allreduce_rms", "act_padding")


def test_what_is_forced_may_concern_one_policy_of_several() -> None:
    assert run(*EXPLAIN, "--policy", "off", "--policy", "planned", "--force", "act_padding").exit_code == 0


def test_what_is_forbidden_is_no_conflict_and_not_too_dear() -> None:
    rules = ("act_padding", "allreduce_rms", "allreduce_rms_padding")
    arguments = [argument for rule in rules for argument in ("--forbid", rule)]
    data = told(*EXPLAIN, "--policy", "planned", *arguments)
    assert (data["conflicts"], data["policies"][0]["forbid"]) == ([], [*rules])


def test_a_conflict_says_which_cost_would_flip_it() -> None:
    rows = told(*EXPLAIN, "--policy", "planned")["conflicts"]
    (row,) = [each for each in rows if each["loser"] == "allreduce_rms"]
    assert 0 < row["lost_low_us"] < row["lost_us"] < row["lost_high_us"]
    assert row["flips_at_us"] > 0


def test_devices_and_their_constants() -> None:
    rows = {row["device"]: row for row in told("devices")["devices"]}
    assert {"a100", "h100", "h200", "gh200", "b200", "b300", "l40s", "rtx4090", "mi300x", "mi325x", "mi355x"} <= {*rows}
    assert [name for name, row in rows.items() if row["here"]] == ["cpu"]
    assert all(each["source"] for row in rows.values() for each in row["constants"])
    assert rows["mi355x"]["providers"] == ["aiter", "sdpa", "sdpa_packed", "torch", "triton"]
    assert "NVIDIA H200" in run("devices").stdout


def test_html_is_written_beside_what_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    result = run(*EXPLAIN, "--html", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == 1
    assert result.stderr == f"the report is in {path}\n"
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="view">(.*?)</script>', text)
    view = json.loads(data)
    assert view["headline"].startswith("The plan saves ")
    assert any(row["state"] == "starved" and row["loser"] == "act_padding" for row in view["verdicts"])


def test_html_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "build", None)
    says = "report 'nowhere/report.html' can't be written: No such file or directory"
    assert says in one_line(run(*EXPLAIN, "--html", "nowhere/report.html"))
