import dataclasses
from typing import Any

import pytest

from fuseplan.config import CompileRange, PassConfig
from fuseplan.errors import ConfigError, LockError
from fuseplan.integrations.locks import config_of, pinned, settings_of

OTHERS: dict[str, Any] = {
    "fuse_act_padding": True, "fuse_allreduce_rms": False, "fuse_norm_quant": True, "fuse_act_quant": False,
    "enable_qk_norm_rope_fusion": False, "fuse_rope_cache": False, "fuse_grouped_attention": False,
    "fuse_eager_attention": False, "fuse_cached_attention": True, "fuse_merged_linear": True,
    "fuse_skinny_linear": True, "fuse_scaled_linear": True, "fuse_add_rms_norm": True, "eliminate_noops": False,
    "policy": "off", "compile_ranges": (CompileRange(start=1, end=8), CompileRange(start=9, end=9)),
    "max_fusions": 0, "force": ("act_padding",), "forbid": ("act_quant", "norm_quant"), "node_budget": 7,
    "allow_rounding_changes": True,
}  # fmt: skip
"""Another value than the default of every setting that a lock can pin."""
INEFFECTIVE = {"verify", "verify_timeout_s", "agreement_timeout_s"}
"""Settings of compilations alone: a lock compiles nothing."""
REFUSED: dict[str, Any] = {"costs": "measured", "cost_table": "costs.json", "plan": "plan.json"}


def test_every_setting_is_pinned_or_refused() -> None:
    assert {each.name for each in dataclasses.fields(PassConfig)} == {*OTHERS, *REFUSED, *INEFFECTIVE}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_pinned_is_asked_again(name: str) -> None:
    plain = settings_of(PassConfig(), workload="w", device="h200")
    config = PassConfig(**{name: OTHERS[name]})
    settings = settings_of(config, workload="w", device="h200")
    assert settings != plain
    assert config_of(settings) == dataclasses.replace(config, costs="modelled")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pinned_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}="):
        settings_of(PassConfig(**{name: REFUSED[name]}), workload="w", device="h200")


def test_the_order_of_selectors_means_nothing() -> None:
    first, second = (
        settings_of(PassConfig(forbid=names), workload="w", device="h200")
        for names in (("act_quant", "act_padding"), ("act_padding", "act_quant", "act_padding"))
    )
    assert first == second


@pytest.mark.parametrize("kind", ["flags", "limits"])
def test_names_that_do_not_exist_are_refused(kind: str) -> None:
    settings = settings_of(PassConfig(), workload="w", device="h200")
    change: dict[str, Any] = {kind: {"policy": 1}}
    with pytest.raises(LockError, match=f"settings.{kind}: unknown name 'policy'; allowed: "):
        config_of(dataclasses.replace(settings, **change))


def test_costs_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pinned(PassConfig()).costs == "modelled"
    monkeypatch.setenv("FUSEPLAN", "0")
    with pytest.raises(ConfigError, match="unset FUSEPLAN"):
        pinned(PassConfig())
