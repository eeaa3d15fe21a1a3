"""What each rule takes, refuses and asks for: its table, its check, and the pieces that all rules are made of."""

import inspect
import operator
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
from fuseplan.rules.base import op_text
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.rules.families.activation import ACTIVATION_RULES
from fuseplan.rules.families.attention import unequal_lengths
from fuseplan.rules.families.norm import NORM_RULES

AR, PAD, QUANT = "fuse_allreduce_rms", "fuse_act_padding", "fuse_norm_quant"
CACHED = ("fuse_cached_attention", "fuse_grouped_attention", "fuse_rope_cache")
QUANTS = ("static_fp8_quant", "dynamic_fp8_quant", "group_fp8_quant", "mx_fp4_quant", "mx_fp8_quant", "nv_fp4_quant")
ENDS = [f"{quant}{kept}" for quant in QUANTS for kept in ("", "_and_norm")]
"""Of fused norms: what is quantised is yielded, too, or not."""
NORM_TABLE = {
    "all_reduce_rms_norm": ("allreduce_rms", (AR,)),
    "all_reduce_fused_add_rms_norm": ("allreduce_rms", (AR,)),
    "rms_norm_pad": ("act_padding", (PAD,)),
    "fused_add_rms_norm_pad": ("act_padding", (PAD,)),
    "all_reduce_rms_norm_pad": ("allreduce_rms_padding", (AR, PAD)),
    "all_reduce_fused_add_rms_norm_pad": ("allreduce_rms_padding", (AR, PAD)),
    **{f"{core}_{quant}": ("norm_quant", (QUANT,)) for core in ("rms_norm", "fused_add_rms_norm") for quant in ENDS},
    **{
        f"all_reduce_{core}_{quant}": ("allreduce_rms_quant", (AR, QUANT))
        for core in ("rms_norm", "fused_add_rms_norm")
        for quant in ENDS
    },
}
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    **NORM_TABLE,
    "add_rms_norm": ("add_rms_norm", ("fuse_add_rms_norm",)),
    **{
        f"silu_and_mul_{quant}{kept}": ("act_quant", ("fuse_act_quant",))
        for quant in QUANTS
        for kept in ("", "_and_activation")
    },
    "qk_norm_rope": ("qk_norm_rope", ("enable_qk_norm_rope_fusion",)),
    "rope_cache": ("rope_cache", ("fuse_rope_cache",)),
    "qk_norm_rope_cache": ("qk_norm_rope_cache", ("enable_qk_norm_rope_fusion", "fuse_rope_cache")),
    "grouped_attention": ("grouped_attention", ("fuse_grouped_attention",)),
    "fused_attention": ("eager_attention", ("fuse_eager_attention",)),
    "rope_cached_attention": ("cached_attention", CACHED),
    "rope_cached_eager_attention": (
        "cached_eager_attention",
        ("fuse_cached_attention", "fuse_eager_attention", "fuse_rope_cache"),
    ),
    "qk_norm_rope_cached_attention": ("qk_norm_cached_attention", ("enable_qk_norm_rope_fusion", *CACHED)),
    "skinny_linear": ("skinny_linear", ("fuse_skinny_linear",)),
    "skinny_linear_add_rms_norm": ("skinny_linear_add_rms_norm", ("fuse_skinny_linear", "fuse_add_rms_norm")),
    "merged_linear_pair": ("merged_linear", ("fuse_merged_linear",)),
    "merged_linear_triple": ("merged_linear", ("fuse_merged_linear",)),
    "merged_linear_silu_and_mul": ("merged_linear_silu_mul", ("fuse_merged_linear",)),
    "linear_silu_and_mul": ("merged_linear_silu_mul", ("fuse_merged_linear",)),
    "skinny_scaled_linear": ("skinny_scaled_linear", ("fuse_scaled_linear",)),
    "merged_scaled_linear_pair": ("merged_scaled_linear", ("fuse_scaled_linear",)),
    "merged_scaled_linear_triple": ("merged_scaled_linear", ("fuse_scaled_linear",)),
}
LINEAR = {"skinny_linear", "merged_linear", "merged_linear_silu_mul"}
SCALED = {"skinny_scaled_linear", "merged_scaled_linear"}
WRITING = {"cached_attention", "cached_eager_attention", "qk_norm_cached_attention"}
OPT_IN = LINEAR | SCALED | WRITING | {"add_rms_norm", "skinny_linear_add_rms_norm"}
MEMBERS = {
    "merged_linear_silu_and_mul": 2,
    "qk_norm_rope": 2,
    "qk_norm_rope_cache": 2,
    "qk_norm_rope_cached_attention": 2,
}
"""Rules with a fused op in common, where that is more than one."""


def op_name(rule: Rule) -> str:
    return rule.op.name


def test_the_rules_there_are() -> None:
    assert {rule.op.name: (rule.name, rule.flags) for rule in BUILT_IN_RULES} == TABLE
    assert len(BUILT_IN_RULES) == sum(MEMBERS.get(name, 1) for name in TABLE)
    assert {rule.op.name for rule in BUILT_IN_RULES if rule.is_composed} == {
        name for name, (_, flags) in TABLE.items() if len(flags) > 1
    }


@pytest.mark.parametrize("name", sorted(name for name in TABLE if "reduce" not in name))
def test_samples_are_like_what_models_hand_over(name: str) -> None:
    """Weights of norms are near 1, and scores have the scale of their width."""
    op = getattr(ops, name)
    names = [argument.name for argument in op.overload._schema.arguments]
    for sample in op.samples:
        given = dict(zip(names, sample.make(torch.device("cpu"), torch.Generator().manual_seed(0)), strict=True))
        for name in {*names} & {"weight", "norm_weight", "q_weight", "k_weight"}:
            if given[name].dim() == 1:
                assert (given[name] - 1).abs().max() < 0.7
        if "q" in names and "scale" in names:
            assert given["scale"] == pytest.approx(given["q"].shape[-1] ** -0.5)


@pytest.mark.parametrize("rule", [*NORM_RULES, *ACTIVATION_RULES], ids=op_name)
def test_a_rule_is_made_of_the_parts_in_its_ops_name(rule: Rule) -> None:
    name = rule.op.name
    core = next(each for each in ("fused_add_rms_norm", "rms_norm", "silu_and_mul") if each in name)
    if name == "add_rms_norm":
        core = "fused_add_rms_norm"
    epilogues = {
        "_pad": "pad", "_static": "static_scaled_fp8_quant", "_dynamic": "dynamic_per_token_scaled_fp8_quant",
        "_group": "per_token_group_fp8_quant", "_mx_fp4": "per_token_mx_fp4_quant", "_mx_fp8": "per_token_mx_fp8_quant",
        "_nv_fp4": "per_token_nv_fp4_quant",
    }  # fmt: skip
    after = [op for text, op in epilogues.items() if text in name]
    parts = [*(["all_reduce"] if name.startswith("all_reduce") else []), core, *after]
    assert rule.core.name == core
    assert rule.describe() == f"{' -> '.join(parts)}  =>  {name}"
    # What the pad or the quantisation yields, the unpadded value, the scales, what is quantised, and the sum.
    sums = core == "fused_add_rms_norm" or name.startswith("all_reduce")
    has_scales = any(kind in name for kind in ("_dynamic", "_group", "_mx", "_nv"))
    is_kept = name.endswith(("_and_norm", "_and_activation"))
    expected = 1 + ("pad" in name or has_scales) + is_kept + sums
    assert len(rule.traced_pattern.outputs) == expected
    assert tuple(rule.traced_pattern.inputs) == rule.variables
    items = [node for node in rule.traced_pattern.outputs if node.target is operator.getitem]
    scales = [(after[0], 0), (after[0], 1)] if has_scales else []
    unpadded = [(core, 0)] if core == "fused_add_rms_norm" and ("pad" in name or is_kept or not after) else []
    total = [(core, 1)] if core == "fused_add_rms_norm" else []
    assert [(op_text(item.all_input_nodes[0].target), item.args[1]) for item in items] == [*scales, *unpadded, *total]
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
            assert refusal is not None
            assert (refusal.reason, refusal.rule, refusal.nodes) == (Reason.DTYPE, rule.name, ("hidden",))
            assert refusal.detail == f"x is {given}; supported are bfloat16, float16, float32"
            assert refusal.mend is None
        elif x is not weight:
            assert refusal is not None
            assert (refusal.reason, refusal.rule, refusal.nodes) == (Reason.DTYPE, rule.name, ("scale",))
            assert refusal.detail == f"weight is {other} and x is {given}; the fused op takes one dtype"
            assert refusal.mend is None
        else:
            assert refusal is None


def test_activations_refuse_nothing_themselves() -> None:
    for rule in BUILT_IN_RULES:
        if rule.name == "act_quant":
            assert rule.check(Bindings(rule.name, {"gate": bound("gate", torch.float64)})) is None


@pytest.mark.parametrize(
    ("values", "mask", "refused"),
    [
        (5, None, None),
        (5, (3, 5), None),
        (5, (5, 1), None),
        (4, None, "attention reads 5 keys and 4 values, and the graph doesn't know these to be equal"),
        (1, (3, 5), "attention reads 5 keys and 1 values"),
        (5, (5, 4), "attention reads 5 keys and a mask of 4"),
    ],
)
def test_attention_refuses_keys_values_and_masks_of_different_lengths(
    values: int, mask: tuple[int, int] | None, refused: str | None
) -> None:
    given = {"k": torch.empty(1, 2, 5, 8), "v": torch.empty(1, 2, values, 8), "mask": mask and torch.empty(1, 1, *mask)}
    found = unequal_lengths(Bindings("grouped_attention", given))
    if refused is None:
        assert found is None
    else:
        assert found is not None
        assert found.reason is Reason.SIZE
        assert found.detail.startswith(refused)


def test_bindings_give_tensors_and_plain_values_and_name_what_there_is() -> None:
    node = bound("y", torch.float16)
    bindings = Bindings("mine", {"x": node, "eps": 1e-6})
    assert bindings.x is node.meta["val"]
    assert bindings.eps == 1e-6
    with pytest.raises(AttributeError, match="rule mine binds no variable 'width'; it binds x, eps"):
        _ = bindings.width
    assert bindings.refuse(Reason.DTYPE, "x", "why").nodes == ("y",)
    assert bindings.refuse(Reason.ATTRIBUTE, "eps", "why", mend="so").nodes == ()


class Pads(Rule):
    """rms_norm -> pad; its subclasses break one thing each."""

    name, flags, op, core = "pads", (), ops.rms_norm_pad, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        return ops.pad(ops.rms_norm(x, weight, eps, rounding), right)

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        return ops.rms_norm_pad(x, weight, eps, rounding, right)


def two_pieces(self: Any, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
    y = ops.rms_norm(x, weight, eps, rounding)
    ops.silu_and_mul(ops.pad(x, right), x, rounding)
    return ops.pad(y, right)


def another_piece(self: Any, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
    return ops.pad(ops.rms_norm(x, weight, eps, rounding), right), ops.pad(ops.pad(x, right), right)


def padded_twice(self: Any, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
    return (ops.rms_norm_pad(x, weight, eps, rounding, right),) * 2


def broken(**members: Any) -> Rule:
    for name, member in members.items():
        if inspect.isfunction(member):
            member.__name__ = name  # which messages have
    return type("Broken", (Pads,), members)()  # type: ignore[no-any-return]


class YieldsWhatItComputes(Pads):
    """A further value that is computed from what leads to the first."""

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        y = ops.rms_norm(x, weight, eps, rounding)
        return ops.pad(y, right), torch.ops.aten.relu.default(y)

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any, right: Any) -> Any:
        padded = ops.rms_norm_pad(x, weight, eps, rounding, right)
        return padded, torch.ops.aten.relu.default(padded)


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
        (broken(pattern=two_pieces), r"\(Broken\): pad_default doesn't lead to the first value that the p"),
        (broken(pattern=another_piece), r"\(Broken\): pad_default_1 doesn't lead to the first value"),
        (
            broken(replacement=padded_twice),
            r"disagree in outputs: the pattern yields 1, the replacement 2; both must yield the same values",
        ),
    ],
    ids=["core", "nothing", "its input", "its epsilon", "two pieces", "another piece", "too much"],
)
def test_a_rule_that_is_no_rule_is_refused_in_one_line(rule: Rule, says: str) -> None:
    with pytest.raises(RuleError, match=says):
        rule.validate()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("pads", True), ("_p4ds", True), ("P", True), ("4pads", False), ("two words", False), ("", False), ("a-b", False)],
)
def test_names_of_rules(name: str, allowed: bool) -> None:
    rule = Pads()
    rule.name = name
    if allowed:
        rule.validate()
    else:
        with pytest.raises(RuleError, match="a name is one word of letters, digits and underscores"):
            rule.validate()


def test_a_rule_may_yield_what_it_computes_on_the_way() -> None:
    rule = YieldsWhatItComputes()
    rule.validate()
    assert [op_text(node.target) for node in rule.calls] == ["rms_norm", "pad", "aten.relu.default"]
    assert not rule.is_composed


def test_a_replacement_is_traced_for_nodes_and_plain_values() -> None:
    node = bound("y", torch.float16)
    traced = Pads().trace_replacement({"x": node, "weight": node, "eps": 0.5, "rounding": "llama", "right": 3})
    (call,) = traced.graph.find_nodes(op="call_function", target=ops.rms_norm_pad.overload)
    assert list(traced.inputs) == ["x", "weight"]
    assert call.args == (traced.inputs["x"], traced.inputs["weight"], 0.5, "llama", 3)
    assert traced.outputs == (call,)


def test_members_are_listed_by_rule_whatever_their_order() -> None:
    listed = by_name(BUILT_IN_RULES)
    assert list(listed) == sorted({name for name, _ in TABLE.values()})
    assert [rule.op.name for rule in listed["norm_quant"]] == sorted(
        name for name, (rule, _) in TABLE.items() if rule == "norm_quant"
    )
    assert by_name(BUILT_IN_RULES[::-1]) == listed


ALL = {name for name, _ in TABLE.values()} - OPT_IN


@pytest.mark.parametrize(
    ("config", "enabled", "disabled"),
    [
        ({}, ALL, {}),
        ({"fuse_act_padding": True}, ALL, {}),
        ({"fuse_act_quant": False}, ALL - {"act_quant"}, {"act_quant": "fuse_act_quant"}),
        (
            {"fuse_act_padding": False, "policy": "off"},
            ALL - {"act_padding", "allreduce_rms_padding"},
            {"act_padding": "fuse_act_padding", "allreduce_rms_padding": "fuse_act_padding"},
        ),
        (
            {"fuse_act_padding": False, "fuse_allreduce_rms": False},
            ALL - {"act_padding", "allreduce_rms", "allreduce_rms_padding", "allreduce_rms_quant"},
            {
                "act_padding": "fuse_act_padding",
                "allreduce_rms": "fuse_allreduce_rms",
                "allreduce_rms_padding": "fuse_allreduce_rms",
                "allreduce_rms_quant": "fuse_allreduce_rms",
            },
        ),
        ({"policy": "ordered(act_quant, norm_quant)"}, {"act_quant", "norm_quant"}, {}),
        (
            {"policy": "ordered(act_quant)", "fuse_act_padding": False},
            {"act_quant"},
            {"act_padding": "fuse_act_padding", "allreduce_rms_padding": "fuse_act_padding"},
        ),
        ({"fuse_add_rms_norm": True}, ALL | {"add_rms_norm"}, {}),
        ({"fuse_skinny_linear": True}, ALL | {"skinny_linear"}, {}),
        (
            {"fuse_skinny_linear": True, "fuse_add_rms_norm": True},
            ALL | {"add_rms_norm", "skinny_linear", "skinny_linear_add_rms_norm"},
            {},
        ),
        ({"fuse_scaled_linear": True}, ALL | SCALED, {}),
        ({"fuse_scaled_linear": False}, ALL, dict.fromkeys(SCALED, "fuse_scaled_linear")),
        ({"fuse_merged_linear": True}, ALL | LINEAR - {"skinny_linear"}, {}),
        ({"fuse_merged_linear": False}, ALL, dict.fromkeys(LINEAR - {"skinny_linear"}, "fuse_merged_linear")),
        ({"fuse_cached_attention": True}, ALL | WRITING, {}),
        (
            {"fuse_cached_attention": True, "fuse_grouped_attention": False},
            ALL - {"grouped_attention"} | {"cached_eager_attention"},
            dict.fromkeys(WRITING - {"cached_eager_attention"} | {"grouped_attention"}, "fuse_grouped_attention"),
        ),
        ({"policy": "ordered(merged_linear)"}, {"merged_linear"}, {}),
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
