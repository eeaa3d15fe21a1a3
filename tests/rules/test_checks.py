"""What each rule takes, refuses and asks for: its table, its check, and the pieces that all rules are made of."""

import inspect
from itertools import product
from typing import Any

import pytest
import torch
from torch import fx

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import PassConfig
from fuseplan.dialect import ops
from fuseplan.errors import ConfigError, RuleError
from fuseplan.record import Reason
from fuseplan.rules import Bindings, EnabledRules, Rule, by_name, disabled_rules, enabled_rules
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.activation import ACTIVATION_RULES
from fuseplan.rules.families.norm import NORM_RULES

AR, PAD, QUANT, QK = "fuse_allreduce_rms", "fuse_act_padding", "fuse_norm_quant", "enable_qk_norm_rope_fusion"
CACHED = ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
QUANTS = ("static_fp8_quant", "dynamic_fp8_quant", "group_fp8_quant", "mx_fp4_quant", "mx_fp8_quant", "nv_fp4_quant")
NORMS, ALL_REDUCES = ("rms_norm", "fused_add_rms_norm"), ("all_reduce_rms_norm", "all_reduce_fused_add_rms_norm")
NORMED, ACTIVATED = (
    [f"{quant}{kept}" for quant in QUANTS for kept in ("", f"_and_{core}")] for core in ("norm", "activation")
)
"""What is quantised is yielded, too, or not."""
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "allreduce_rms": ((AR,), ALL_REDUCES),
    "act_padding": ((PAD,), tuple(f"{core}_pad" for core in NORMS)),
    "allreduce_rms_padding": ((AR, PAD), tuple(f"{core}_pad" for core in ALL_REDUCES)),
    "norm_quant": ((QUANT,), tuple(f"{core}_{end}" for core in NORMS for end in NORMED)),
    "allreduce_rms_quant": ((AR, QUANT), tuple(f"{core}_{end}" for core in ALL_REDUCES for end in NORMED)),
    "add_rms_norm": (("fuse_add_rms_norm",), ("add_rms_norm",)),
    "act_quant": (("fuse_act_quant",), tuple(f"silu_and_mul_{end}" for end in ACTIVATED)),
    "qk_norm_rope": ((QK,), ("qk_norm_rope",)),
    "rope_cache": (("fuse_rope_cache",), ("rope_cache",)),
    "qk_norm_rope_cache": ((QK, "fuse_rope_cache"), ("qk_norm_rope_cache",)),
    "grouped_attention": (("fuse_grouped_attention",), ("grouped_attention",)),
    "eager_attention": (("fuse_eager_attention",), ("fused_attention",)),
    "cached_attention": (CACHED, ("rope_cached_attention",)),
    "cached_eager_attention": (
        ("fuse_cached_attention", "fuse_eager_attention", "fuse_rope_cache"), ("rope_cached_eager_attention",),
    ),
    "qk_norm_cached_attention": ((QK, *CACHED), ("qk_norm_rope_cached_attention",)),
    "skinny_linear": (("fuse_skinny_linear",), ("skinny_linear",)),
    "skinny_linear_add_rms_norm": (("fuse_skinny_linear", "fuse_add_rms_norm"), ("skinny_linear_add_rms_norm",)),
    "merged_linear": (("fuse_merged_linear",), ("merged_linear_pair", "merged_linear_triple")),
    "merged_linear_silu_mul": (("fuse_merged_linear",), ("merged_linear_silu_and_mul", "linear_silu_and_mul")),
    "skinny_scaled_linear": (("fuse_scaled_linear",), ("skinny_scaled_linear",)),
    "merged_scaled_linear": (
        ("fuse_scaled_linear",), ("merged_scaled_linear_pair", "merged_scaled_linear_triple"),
    ),
}  # fmt: skip
"""Each rule's flags and fused ops."""
TABLE = {op: (rule, flags) for rule, (flags, fused) in RULES.items() for op in fused}
LINEAR = {"skinny_linear", "merged_linear", "merged_linear_silu_mul"}
SCALED = {"skinny_scaled_linear", "merged_scaled_linear"}
WRITING = {"cached_attention", "cached_eager_attention", "qk_norm_cached_attention"}
BEHIND = {"add_rms_norm", "skinny_linear_add_rms_norm"}
OPT_IN = LINEAR | SCALED | WRITING | BEHIND
PADDING = {"act_padding", "allreduce_rms_padding"}
MEMBERS = dict.fromkeys(
    ("merged_linear_silu_and_mul", "qk_norm_rope", "qk_norm_rope_cache", "qk_norm_rope_cached_attention"), 2
)
"""Rules with a fused op in common, where that is more than one."""


def op_name(rule: Rule) -> str:
    return rule.op.name


def test_the_rules_there_are() -> None:
    assert {rule.op.name: (rule.name, rule.flags) for rule in BUILT_IN_RULES} == TABLE
    assert len(BUILT_IN_RULES) == sum(MEMBERS.get(name, 1) for name in TABLE)
    assert {rule.op.name for rule in BUILT_IN_RULES if rule.is_composed} == {
        name for name, (_, flags) in TABLE.items() if len(flags) > 1
    }


@pytest.mark.parametrize("rule", [*NORM_RULES, *ACTIVATION_RULES], ids=op_name)
def test_a_rule_is_made_of_the_parts_in_its_ops_name(rule: Rule) -> None:
    name = rule.op.name
    core = next(each for each in ("fused_add_rms_norm", "rms_norm", "silu_and_mul") if each in name)
    core = "fused_add_rms_norm" if name == "add_rms_norm" else core
    epilogues = {
        "_pad": "pad", "_static": "static_scaled_fp8_quant", "_dynamic": "dynamic_per_token_scaled_fp8_quant",
        "_group": "per_token_group_fp8_quant", "_mx_fp4": "per_token_mx_fp4_quant", "_mx_fp8": "per_token_mx_fp8_quant",
        "_nv_fp4": "per_token_nv_fp4_quant",
    }  # fmt: skip
    after = [op for text, op in epilogues.items() if text in name]
    parts = [*(["all_reduce"] if name.startswith("all_reduce") else []), core, *after]
    assert rule.core.name == core
    assert rule.describe() == f"{' -> '.join(parts)}  =>  {name}"
    assert tuple(rule.traced_pattern.inputs) == rule.variables
    rule.validate()


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32)


def bound(name: str, dtype: torch.dtype) -> fx.Node:
    node = fx.Graph().placeholder(name)
    node.meta["val"] = torch.empty(2, 4, dtype=dtype)
    return node


@pytest.mark.parametrize("rule", NORM_RULES, ids=op_name)
def test_norms_take_one_dtype_of_three(rule: Rule) -> None:
    for x, weight in product(DTYPES, DTYPES):
        refusal = rule.check(Bindings(rule.name, {"x": bound("hidden", x), "weight": bound("scale", weight)}))
        given, other = (str(dtype).removeprefix("torch.") for dtype in (x, weight))
        if x in (torch.float64, torch.int32):
            expected = "hidden", f"x is {given}; supported are bfloat16, float16, float32"
        elif x is not weight:
            expected = "scale", f"weight is {other} and x is {given}; the fused op takes one dtype"
        else:
            assert refusal is None
            continue
        node, detail = expected
        assert refusal is not None
        assert (refusal.reason, refusal.rule, refusal.nodes) == (Reason.DTYPE, rule.name, (node,))
        assert (refusal.detail, refusal.fix) == (detail, None)


def test_bindings_give_tensors_and_plain_values_and_name_what_there_is() -> None:
    node = bound("y", torch.float16)
    bindings = Bindings("mine", {"x": node, "eps": 1e-6})
    assert bindings.x is node.meta["val"]
    assert bindings.eps == 1e-6
    with pytest.raises(AttributeError, match="rule mine binds no variable 'width'; it binds x, eps"):
        _ = bindings.width
    assert bindings.refuse(Reason.DTYPE, "x", "why").nodes == ("y",)
    assert bindings.refuse(Reason.ATTRIBUTE, "eps", "why", fix="so").nodes == ()


class Pads(Rule):
    """rms_norm -> pad; its subclasses break one thing each."""

    name, flags, op, core = "pads", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        return ops.pad(ops.rms_norm(x, weight, eps, rounding), right)

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        return ops.rms_norm_pad(x, weight, eps, rounding, right)


def another_piece(self: Any, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
    return ops.pad(ops.rms_norm(x, weight, eps, rounding), right), ops.pad(ops.pad(x, right), right)


def padded_twice(self: Any, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
    return (ops.rms_norm_pad(x, weight, eps, rounding, right),) * 2


def broken(**members: Any) -> Rule:
    for name, member in members.items():
        if inspect.isfunction(member):
            member.__name__ = name  # which messages have
    return type("Broken", (Pads,), members)()  # type: ignore[no-any-return]


NOTHING = broken(pattern=lambda self, x, weight, eps, rounding, right: ())


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            broken(core=ops.silu_and_mul),
            r"the pattern has no silu_and_mul, which the rule names as its core; it has rms_norm, pad$",
        ),
        (NOTHING, r"rule pads \(Broken\): the pattern must yield a value that an op computes"),
        (
            broken(pattern=lambda self, x, weight, eps, rounding, right: x),
            r"\(Broken\): the pattern must yield a value that an op computes",
        ),
        (
            broken(replacement=lambda self, x, weight, eps, rounding, right: 1e-5),
            r"\(Broken\): replacement must yield values that ops compute",
        ),
        (broken(pattern=another_piece), r"\(Broken\): pad_default_1 doesn't lead to the first value"),
        (
            broken(replacement=padded_twice),
            r"disagree in outputs: the pattern yields 1, the replacement 2; both must yield the same values",
        ),
    ],
    ids=["core", "nothing", "its input", "its epsilon", "another piece", "too much"],
)
def test_a_rule_that_is_no_rule_is_refused_in_one_line(rule: Rule, says: str) -> None:
    with pytest.raises(RuleError, match=says):
        rule.validate()


@pytest.mark.parametrize("name", ["pads", "_p4ds", "P", "4pads", "two words", "", "a-b"])
def test_names_of_rules(name: str) -> None:
    rule = Pads()
    rule.name = name
    if name in ("pads", "_p4ds", "P"):
        rule.validate()
        return
    with pytest.raises(RuleError, match="a name is one word of letters, digits and underscores"):
        rule.validate()


def test_members_are_listed_by_rule_whatever_their_order() -> None:
    listed = by_name(BUILT_IN_RULES)
    assert list(listed) == sorted(RULES)
    assert [rule.op.name for rule in listed["norm_quant"]] == sorted(RULES["norm_quant"][1])
    assert by_name(BUILT_IN_RULES[::-1]) == listed


ALL = set(RULES) - OPT_IN


@pytest.mark.parametrize(
    ("config", "enabled", "disabled"),
    [
        ({}, ALL, {}),
        ({PAD: False, "policy": "off"}, ALL - PADDING, dict.fromkeys(PADDING, PAD)),
        (
            {PAD: False, AR: False},
            ALL - PADDING - {"allreduce_rms", "allreduce_rms_quant"},
            {"act_padding": PAD, "allreduce_rms": AR, "allreduce_rms_padding": AR, "allreduce_rms_quant": AR},
        ),
        ({"policy": "ordered(act_quant, norm_quant)"}, {"act_quant", "norm_quant"}, {}),
        ({"fuse_skinny_linear": True}, ALL | {"skinny_linear"}, {}),
        ({"fuse_skinny_linear": True, "fuse_add_rms_norm": True}, ALL | BEHIND | {"skinny_linear"}, {}),
        ({"fuse_scaled_linear": True}, ALL | SCALED, {}),
        ({"fuse_scaled_linear": False}, ALL, dict.fromkeys(SCALED, "fuse_scaled_linear")),
        ({"fuse_merged_linear": False}, ALL, dict.fromkeys(LINEAR - {"skinny_linear"}, "fuse_merged_linear")),
        (
            {"fuse_cached_attention": True, "fuse_grouped_attention": False},
            ALL - {"grouped_attention"} | {"cached_eager_attention"},
            dict.fromkeys(WRITING - {"cached_eager_attention"} | {"grouped_attention"}, "fuse_grouped_attention"),
        ),
        # One of two flags that are True is no request for the rule that needs both.
        ({"policy": "ordered(act_padding)", "fuse_act_padding": True}, {"act_padding"}, {}),
    ],
)
def test_flags_and_policies_choose_rules(config: dict[str, Any], enabled: set[str], disabled: dict[str, str]) -> None:
    given = PassConfig(**config)
    assert set(enabled_rules(given, BUILT_IN_RULES)) == enabled
    assert disabled_rules(given, BUILT_IN_RULES) == disabled


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"policy": "ordered(act_quant)", "fuse_act_quant": False},
            r"fuse_act_quant=False contradicts policy ordered\(act_quant\): switch the flag on or take act_quant off",
        ),
        (
            {"policy": "ordered(act_quant)", "fuse_norm_quant": True},
            r"fuse_norm_quant=True contradicts policy ordered\(act_quant\): add norm_quant to the list",
        ),
        ({"policy": "ordered(act_kwant)"}, "unknown rule 'act_kwant'; did you mean 'act_quant'"),
    ],
)
def test_requests_that_contradict_the_policy(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        enabled_rules(PassConfig(**config), BUILT_IN_RULES)


@pytest.mark.parametrize(
    ("asked", "overruled"),
    [(True, {"fuse_cached_attention": ("cached_attention", "fuse_grouped_attention")}), (None, {}), (False, {})],
)
def test_what_is_asked_for_may_be_switched_off_by_another_flag(asked: bool | None, overruled: dict[str, Any]) -> None:
    config = PassConfig(fuse_cached_attention=asked, fuse_grouped_attention=False)
    assert EnabledRules(config, BUILT_IN_RULES, device="h200").overruled == overruled


def test_rules_are_validated_when_they_are_chosen() -> None:
    with pytest.raises(RuleError, match="must yield a value"):
        enabled_rules(PassConfig(), [NOTHING])
    with pytest.raises(RuleError, match="must yield a value"):
        PostGradPassManager(PassConfig(), rules=[NOTHING])
    assert enabled_rules(PassConfig(), [Pads()]).keys() == {"pads"}
    assert disabled_rules(PassConfig(), [Pads()]) == {}
