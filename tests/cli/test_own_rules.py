"""`fuseplan explain --rules MODULE`: fusions of one's own beside the built-in ones, and what is refused in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fuseplan.cli import app
from tests.lines import one_line

IMPORTS = """
import torch
from fuseplan.dialect import define, ops
from fuseplan.providers import BUILT_IN_PROVIDERS, KernelCost, provider_of
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules import Rule
"""
OWN = f"""{IMPORTS}
print("imported")

def reference(x, weight, eps, rounding):
    return ops.rms_norm.reference(x, weight, eps, rounding).tanh()

norm_tanh = define(
    "norm_tanh_of_a_module", ops.rms_norm.schema, reference=reference, fake=ops.rms_norm.fake, samples=(), fused=True
)

class NormTanh(Rule):
    name, flags, op, core = "norm_tanh", (), norm_tanh, ops.rms_norm

    def pattern(self, x, weight, eps, rounding):
        return torch.ops.aten.tanh.default(ops.rms_norm(x, weight, eps, rounding))

    def replacement(self, x, weight, eps, rounding):
        return norm_tanh(x, weight, eps, rounding)

found = [NormTanh()]
again = found[0]
here = provider_of("of_a_module", {{norm_tanh: reference}}, cost=KernelCost())

class Model(torch.nn.Module):
    def forward(self, x, weight):
        return torch.nn.functional.rms_norm(x, (64,), weight, 1e-6).tanh()

def model(tp):
    return Model(), (torch.randn(4, 64), torch.randn(64))
"""
BROKEN = f"""{IMPORTS}
class Base(Rule):
    name, flags, op, core = "broken", (), ops.fused_add_rms_norm, ops.rms_norm

    def pattern(self, x, weight, eps, rounding):
        return ops.rms_norm(x, weight, eps, rounding)

    def replacement(self, x, weight, eps, rounding):
        return ops.rms_norm(x, weight, eps, rounding)
"""
MODULES: dict[str, tuple[str | None, str]] = {
    "nowhere": (None, "there is no such module here or installed; name it as Python imports it"),
    "raises": ("raise ValueError('not today')", "importing it failed: ValueError: not today"),
    "ends": ("raise SystemExit(0)", "importing it failed: SystemExit: 0"),
    "needs_more": (
        "import nobody_has_this", "importing it failed: ModuleNotFoundError: No module named 'nobody_has_this'"
    ),
    "has_built_in_ones": (
        f"{IMPORTS}rules, providers = BUILT_IN_RULES, BUILT_IN_PROVIDERS", "the module has no Rule object"
    ),
    "has_a_class": (BROKEN, "the module has no Rule object; add a line: rules = [Base()]"),
    "taken": (
        f"{BROKEN}\nBase.name = 'act_padding'\nrules = (Base(),)",
        "there is a built-in rule 'act_padding'; give it another name",
    ),
    "takes_a_provider": (
        f"{BROKEN}\nrules, provider = (Base(),), provider_of('triton', {{}})",
        "there is a built-in provider 'triton'; give it another name",
    ),
    "disagrees": (
        f"{BROKEN}\nBase.core = ops.silu_and_mul\nrule = Base()",
        "rule broken (Base): the pattern has no silu_and_mul, which the rule names as its core",
    ),
    "nameless": (f"{BROKEN}\ndel Base.name\nrule = Base()", "rule Base is broken: AttributeError: "),
    "flagged": (
        f"{BROKEN}\nBase.flags = ('fuse_mine',)\nrule = Base()",
        "rule Base is broken: AttributeError: 'PassConfig' object has no attribute 'fuse_mine'",
    ),
}  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which is imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_rules_of_a_module_are_explained_and_known_by_name(folder: Path) -> None:
    (folder / "fusions_of_mine.py").write_text(OWN, encoding="utf-8")
    given = "fusions_of_mine:model", "--rules", "fusions_of_mine", "--range", "1:8", "--json"
    result = run(*given, "--rules", "fusions_of_mine")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    planned = data["policies"][0]
    assert planned["fused"]["norm_tanh"] == planned["matched"]["norm_tanh"] == 1
    assert planned["fused"]["act_padding"] == 0
    assert ["norm_tanh"] in [policy.get("order") for policy in data["policies"]]

    forbidden = json.loads(run(*given, "--policy", "planned", "--forbid", "norm_tanh").stdout)
    assert forbidden["policies"][0]["fused"]["norm_tanh"] == 0
    ordered = json.loads(run(*given, "--policy", "ordered(norm_tanh)", "--provider", "of_a_module").stdout)
    assert ordered["policies"][0]["fused"] == {"norm_tanh": 1}
    assert "unknown rule 'norm_tanh'" in run("fusions_of_mine:model", "--policy", "ordered(norm_tanh)").output


@pytest.mark.parametrize("module", MODULES)
def test_what_cannot_be_taken_is_refused_in_one_line(module: str, folder: Path) -> None:
    content, expected = MODULES[module]
    if content is not None:
        (folder / f"{module}.py").write_text(content, encoding="utf-8")
    result = run("gpt-oss-20b-tiny", "--rules", module)
    assert one_line(result).startswith(f"--rules {module}: {expected}")
