from typing import Any

import pytest

import fuseplan
from fuseplan.config import CompileRange, PassConfig, Policy, check_ranges
from fuseplan.errors import ConfigError


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
        ({"compile_ranges": "1:8"}, r"compile_ranges='1:8': allowed are sequences of e.g. CompileRange\("),
        ({"compile_ranges": 8}, "compile_ranges=8: allowed are sequences"),
        ({"compile_ranges": [(1, 8)]}, r"compile_ranges=\[\(1, 8\)\]: allowed are sequences"),
        ({"cost_table": 3}, "cost_table=3: allowed are None and paths of files"),
        ({"plan": {}}, "plan={}: allowed are None and paths of files"),
        ({"force": "act_padding"}, "sequences of texts"),
        ({"force": ["act_padding"], "policy": "off"}, "force needs policy planned"),
        ({"node_budget": 0}, "integers of at least 1"),
        ({"costs": "measurd"}, "did you mean 'measured'"),
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
    spaced = PassConfig(policy=" ordered( act_padding ,allreduce_rms )")
    assert spaced.chosen_policy.order == ("act_padding", "allreduce_rms")


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
