from typing import Any

import pytest

import fuseplan
from fuseplan.config import CompileRange, PassConfig, Policy, check_ranges
from fuseplan.errors import ConfigError
from fuseplan.rules import enabled_rules
from fuseplan.rules.families import BUILT_IN_RULES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fuse_act_pading": True}, "unknown flag of PassConfig 'fuse_act_pading'; did you mean 'fuse_act_padding'"),
        ({"fuse_act_padding": "yes"}, "fuse_act_padding='yes': allowed are True, False and None"),
        ({"eliminate_noops": None}, "eliminate_noops=None: allowed are True and False"),
        ({"max_fusions": -1}, "max_fusions=-1"),
        ({"policy": "greedy"}, r"unknown policy 'greedy'; allowed: planned, off, ordered\(RULE"),
        ({"policy": "off(act_padding)"}, "off takes no rules"),
        ({"policy": "ordered()"}, "lists no rules"),
        ({"policy": "ordered(a, a)"}, "lists a twice"),
        ({"policy": None}, "unknown policy 'None'; allowed: planned, off, ordered"),
        ({"compile_ranges": "1:8"}, r"compile_ranges='1:8': allowed are sequences of e.g. CompileRange\("),
        ({"compile_ranges": 8}, "compile_ranges=8: allowed are sequences"),
        ({"compile_ranges": [(1, 8)]}, r"compile_ranges=\[\(1, 8\)\]: allowed are sequences"),
        ({"cost_table": 3}, "cost_table=3: allowed are None and paths of files"),
        ({"plan": {}}, "plan={}: allowed are None and paths of files"),
    ],
)
def test_bad_flags_say_what_is_allowed(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PassConfig(**flags)


@pytest.mark.parametrize("given", [{}, {"force": ()}, "off", 3])
def test_what_is_no_config_is_refused(given: Any) -> None:
    for entry in (fuseplan.compile, fuseplan.explain):
        with pytest.raises(ConfigError, match=r"config=.*: allowed are None and a PassConfig"):
            entry(len, config=given)
    with pytest.raises(ConfigError, match=r"config=.*: allowed are None and a PassConfig"):
        fuseplan.inductor_options(given)


def test_policies_read_as_they_are_written() -> None:
    for text in ("off", "ordered(act_padding)", "ordered(act_padding, allreduce_rms)"):
        assert str(Policy.parse(text)) == text
    assert PassConfig(policy=" ordered( act_padding ,allreduce_rms )").chosen_policy.order == (
        "act_padding",
        "allreduce_rms",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PassConfig(policy="ordered(act_padding)", fuse_act_padding=False),
            "fuse_act_padding=False contradicts policy",
        ),
        (PassConfig(policy="ordered(act_padding)", fuse_norm_quant=True), "add norm_quant to the list"),
        (PassConfig(policy="ordered(act_padding, quantum)"), "unknown rule 'quantum'"),
    ],
)
def test_flags_that_contradict_the_policy(config: PassConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        enabled_rules(config, BUILT_IN_RULES)


def test_flags_thin_out_the_default_policy() -> None:
    assert "act_padding" not in enabled_rules(PassConfig(fuse_act_padding=False), BUILT_IN_RULES)
    assert "allreduce_rms" in enabled_rules(PassConfig(fuse_act_padding=False), BUILT_IN_RULES)
    assert "act_padding" in enabled_rules(PassConfig(fuse_act_padding=True, fuse_allreduce_rms=True), BUILT_IN_RULES)


def test_composed_rules_need_both_flags() -> None:
    assert "allreduce_rms_padding" in enabled_rules(PassConfig(policy="off"), BUILT_IN_RULES)
    for flag in ("fuse_act_padding", "fuse_allreduce_rms"):
        config = PassConfig(policy="off", **{flag: False})  # type: ignore[arg-type]
        assert "allreduce_rms_padding" not in enabled_rules(config, BUILT_IN_RULES)


def test_ranges() -> None:
    assert str(CompileRange.parse("1:64")) == "1:64"
    assert CompileRange.parse("8") == CompileRange(start=8, end=8)
    assert 8 in CompileRange.parse("8")
    assert 64 in CompileRange.parse("1:64")
    assert 65 not in CompileRange.parse("1:64")
    ranges = (CompileRange.parse("65:512"), CompileRange.parse("1:64"))
    assert check_ranges(ranges) == ranges[::-1]
    assert PassConfig(compile_ranges=ranges) == PassConfig(compile_ranges=ranges[::-1])


@pytest.mark.parametrize("text", ["", "1:", ":8", "a:b", "1-8", "0:8", "9:8", "1:2:3", "-1:8"])
def test_malformed_ranges(text: str) -> None:
    with pytest.raises(ConfigError, match="compile range"):
        CompileRange.parse(text)


def test_overlapping_ranges() -> None:
    with pytest.raises(ConfigError, match="1:64 and 64:65 overlap"):
        PassConfig(compile_ranges=[CompileRange.parse("64:65"), CompileRange.parse("1:64")])
