"""What the plugin makes of vLLM's configuration."""

import logging
from typing import Any

import pytest

import fuseplan
from fuseplan.integrations.vllm.plugin import HOOK, KEY, asked_for
from tests.integrations.vllm.conftest import NAMED, Configure


def test_inert_until_it_is_asked_for(configure: Configure, lines: list[logging.LogRecord]) -> None:
    config = configure()
    assert asked_for(config) is None
    assert KEY not in config.additional_config
    assert not lines


def test_asked_for_by_the_environment(
    configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = configure().compute_hash()
    monkeypatch.setenv("FUSEPLAN_VLLM", "1")
    config = configure()
    assert asked_for(config) == fuseplan.PassConfig()
    assert config.compute_hash() != plain, "a part of vLLM's own cache key"
    (record,) = lines
    assert record.levelno == logging.INFO
    assert "is the post-grad pass of vLLM 0." in record.getMessage()
    assert ": policy planned" in record.getMessage()


def test_asked_for_by_name(configure: Configure, lines: list[logging.LogRecord]) -> None:
    config = configure(compilation_config=NAMED)
    assert asked_for(config) == fuseplan.PassConfig()
    assert HOOK not in config.compilation_config.inductor_compile_config, "the real pass is put there by the worker"
    assert len(lines) == 1


def test_every_setting_is_a_part_of_the_key(configure: Configure) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"policy": "off"},
        {"policy": "ordered(act_padding, allreduce_rms)"},
        {"policy": "ordered(allreduce_rms, act_padding)"},
        {"fuse_act_padding": False},
        {"forbid": ["allreduce_rms"]},
    ]
    keys = [configure(additional_config={KEY: each}).compute_hash() for each in settings]
    assert len(set(keys)) == len(keys)
    again = configure(additional_config={KEY: settings[1]})
    assert again.compute_hash() == keys[1]
    assert asked_for(again) == fuseplan.PassConfig(policy="off")


@pytest.mark.parametrize("variables", [{"FUSEPLAN": "0", "FUSEPLAN_VLLM": "1"}, {"FUSEPLAN_VLLM": "0"}])
def test_switched_off(
    variables: dict[str, str], configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asked_for(configure()) is None
    assert not lines


def test_switched_off_where_it_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPLAN", "0")
    config = configure(compilation_config=NAMED)
    assert asked_for(config) is None
    assert HOOK not in config.compilation_config.inductor_compile_config


@pytest.mark.parametrize("arguments", [{"enforce_eager": True}, {"compilation_config": {"mode": 0}}])
def test_an_engine_that_does_not_compile_says_so(
    arguments: dict[str, Any], configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPLAN_VLLM", "1")
    configure(**arguments)
    (record,) = lines
    assert record.levelno == logging.WARNING
    assert "no graph reaches it" in record.getMessage()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polcy": "planned"}, r"additional_config\['fuseplan'\] has 'polcy'; allowed are .*policy"),
        ({"policy": "best"}, "policy"),
        ({"compile_ranges": []}, "has 'compile_ranges'"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], message: str, configure: Configure) -> None:
    with pytest.raises(ValueError, match=message):
        configure(additional_config={KEY: settings})


def test_the_switch_has_two_values(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEPLAN_VLLM", "yes")
    with pytest.raises(ValueError, match=r"FUSEPLAN_VLLM='yes': allowed are 0 \(off\) and 1 \(on\)"):
        configure()
