"""What the plugin makes of vLLM's configuration."""

import logging
import re
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode
from vllm.platforms import current_platform

import fuseplan
from fuseplan.integrations.vllm import plugin
from fuseplan.integrations.vllm.passes import manager_for
from fuseplan.integrations.vllm.plugin import HOOK, KEY, asked_for
from tests.integrations.vllm.conftest import NAMED, Configure, told
from tests.providers.stand_ins import ranks


def test_inert_until_it_is_asked_for(configure: Configure, lines: list[logging.LogRecord]) -> None:
    config = configure()
    assert asked_for(config) is None
    assert KEY not in config.additional_config
    assert not lines


@pytest.mark.parametrize("by_name", [False, True])
def test_asked_for_by_the_environment_or_by_name(
    by_name: bool, configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = configure().compute_hash()
    if not by_name:
        monkeypatch.setenv("FUSEPLAN_VLLM", "1")
    config = configure(**({"compilation_config": NAMED} if by_name else {}))
    assert asked_for(config) == fuseplan.PassConfig()
    assert config.compute_hash() != plain, "a part of vLLM's own cache key"
    assert HOOK not in config.compilation_config.inductor_compile_config, "the real pass is put there by the worker"
    assert re.search(r"is the post-grad pass of vLLM 0\..*: policy planned", told(lines))


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        ({}, False), ({"enable_qk_norm_rope_fusion": False}, False), ({"enable_qk_norm_rope_fusion": True}, True),
        ({"policy": "ordered(qk_norm_rope)"}, True), ({"force": ("qk_norm_rope@layers.0.*:triton",)}, True),
        ({"forbid": ("qk_norm_rope",)}, True), ({"force": ("rope_cache",)}, False),
    ],
)  # fmt: skip
def test_what_was_slower_in_vllm_is_on_where_it_is_named(settings: dict[str, Any], is_on: bool) -> None:
    manager = manager_for(fuseplan.PassConfig(**settings), None, lambda report: None)
    assert ("qk_norm_rope" in manager.rules) is is_on


def test_every_setting_is_a_part_of_the_key(configure: Configure) -> None:
    settings: list[dict[str, Any]] = [
        {}, {"policy": "off"}, {"policy": "ordered(act_padding, allreduce_rms)"},
        {"policy": "ordered(allreduce_rms, act_padding)"}, {"fuse_act_padding": False}, {"forbid": ["allreduce_rms"]},
    ]  # fmt: skip
    keys = [configure(additional_config={KEY: each}).compute_hash() for each in settings]
    assert len(set(keys)) == len(keys)
    again = configure(additional_config={KEY: settings[1]})
    assert again.compute_hash() == keys[1]
    assert asked_for(again) == fuseplan.PassConfig(policy="off")


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({"FUSEPLAN": "0", "FUSEPLAN_VLLM": "1"}, {}), ({"FUSEPLAN_VLLM": "0"}, {}),
        ({"FUSEPLAN": "0"}, {"compilation_config": NAMED}),
    ],
)  # fmt: skip
def test_switched_off(
    variables: dict[str, str], arguments: dict[str, Any], configure: Configure, lines: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = configure(**arguments)
    assert asked_for(config) is None
    assert HOOK not in config.compilation_config.inductor_compile_config
    assert not lines


@pytest.mark.parametrize("arguments", [{"enforce_eager": True}, {"compilation_config": {"mode": 0}}])
def test_an_engine_that_does_not_compile_says_so(
    arguments: dict[str, Any], configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPLAN_VLLM", "1")
    configure(**arguments)
    assert "no graph reaches it" in told(lines, logging.WARNING)


@pytest.mark.parametrize(
    ("settings", "variable", "message"),
    [
        ({"polcy": "planned"}, "1", r"additional_config\['fuseplan'\] has 'polcy'; allowed are .*policy"),
        ({"policy": "best"}, "1", "policy"), ({"compile_ranges": []}, "1", "has 'compile_ranges'"),
        ({"cost_table": "nowhere/costs.json"}, "1", r"costs\.json"),
        (None, "yes", r"FUSEPLAN_VLLM='yes': allowed are 0 \(off\) and 1 \(on\)"),
    ],
)  # fmt: skip
def test_settings_that_do_not_exist(
    settings: dict[str, Any] | None, variable: str, message: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEPLAN_VLLM", variable)
    with pytest.raises(ValueError, match=message):
        configure(**({} if settings is None else {"additional_config": {KEY: settings}}))


def test_nothing_in_the_first_process_makes_a_context(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may fork its workers only where none was made."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a context on the device")

    configs = [configure() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_lazy_init", "current_device", "device_count", "get_device_name", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    keys = []
    for config, device in zip(configs, ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H200"), strict=True):
        monkeypatch.setattr(type(current_platform), "get_device_name", classmethod(lambda cls, found=device: found))
        config.additional_config[KEY] = {}
        plugin.adopt(config)
        keys.append(config.additional_config[KEY][plugin.DIGEST])
    assert keys[0] == keys[2] != keys[1]


def test_a_configuration_is_adopted_once(configure: Configure, lines: list[logging.LogRecord]) -> None:
    """A worker makes another one of it, where it has joined its groups."""
    config = configure(additional_config={KEY: {"policy": "off"}})
    before = config.compute_hash()
    with ranks(2):
        plugin.adopt(config)
    assert config.compute_hash() == before
    assert asked_for(config) == fuseplan.PassConfig(policy="off")
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("settings", "device", "quantization", "ends"),
    [
        ({}, "NVIDIA H200", None, [32, 8192]),
        ({}, "NVIDIA H100 80GB HBM3", "mxfp4", [32, 8192]),
        ({}, "NVIDIA H200", "fp8", [32, 8192]),
        ({}, "NVIDIA H200", "awq", [8192]),
        ({"fuse_merged_linear": True}, "NVIDIA H200", "awq", [8192]),
        ({"fuse_scaled_linear": True}, "NVIDIA H200", "awq", [32, 8192]),
        ({"fuse_merged_linear": False, "fuse_skinny_linear": False}, "NVIDIA H200", "fp8", [32, 8192]),
        ({}, "NVIDIA A100-SXM4-80GB", "fp8", [8192]),
        ({"fuse_scaled_linear": False}, "NVIDIA H200", "fp8", [8192]),
        ({}, "NVIDIA A100-SXM4-80GB", None, [8192]),
        ({"fuse_skinny_linear": True}, "NVIDIA A100-SXM4-80GB", None, [32, 8192]),
        ({"fuse_merged_linear": False}, "NVIDIA H200", None, [32, 8192]),
        ({"fuse_merged_linear": False, "fuse_skinny_linear": False}, "NVIDIA H200", None, [8192]),
        ({"policy": "off"}, "NVIDIA H200", None, [8192]),
    ],
)
def test_linear_layers_of_few_tokens_get_a_compile_range(
    settings: dict[str, Any], device: str, quantization: str | None, ends: list[int], configure: Configure,
    lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = configure()
    compilation, limit = config.compilation_config, config.scheduler_config.max_num_batched_tokens
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(type(current_platform), "get_device_name", classmethod(lambda cls: device))
    monkeypatch.setattr(config.model_config, "quantization", quantization)
    compilation.mode, compilation.compile_ranges_endpoints = CompilationMode.VLLM_COMPILE, [limit]
    before = compilation.compute_hash()
    config.additional_config[KEY] = settings
    plugin.adopt(config)
    assert compilation.compile_ranges_endpoints == [limit if each == 8192 else each for each in ends]
    assert (compilation.compute_hash() != before) is (len(ends) == 2), "vLLM's own cache key has its ranges"
    assert ("a compile range that ends at 32 tokens for linear layers" in told(lines)) is (len(ends) == 2)


def compressed(kind: str, strategy: str) -> dict[str, Any]:
    scheme = {"type": kind, "num_bits": 8, "strategy": strategy}
    return {"config_groups": {"group_0": {"input_activations": scheme}}}


@pytest.mark.parametrize(
    ("method", "given", "is_so"),
    [
        ("fp8", {}, True), ("fp8_per_channel", {}, True), ("fp8", {"activation_scheme": "dynamic"}, True),
        ("fp8", {"activation_scheme": "static"}, False), ("fp8_per_block", {}, False),
        ("fp8", {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, False),
        ("compressed-tensors", {}, False),
        ("compressed-tensors", {"config_groups": {"group_0": {"input_activations": None}}}, False),
        ("compressed-tensors", compressed("float", "token"), True),
        ("compressed-tensors", compressed("float", "tensor"), False),
        ("compressed-tensors", compressed("int", "token"), False),
    ],
)  # fmt: skip
def test_layers_in_fp8_are_known_by_their_checkpoint(method: str, given: dict[str, Any], is_so: bool) -> None:
    assert plugin._quantises_rows(method, given) is is_so


@pytest.mark.parametrize(("ends", "after"), [([16], [16]), ([32], [32]), ([16, 2048], [16, 32, 2048]), (None, None)])
def test_compile_ranges_of_a_user_stay(
    ends: list[int] | None, after: list[int] | None, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.compile_ranges_endpoints = ends
    config.additional_config[KEY] = {"fuse_merged_linear": True}
    plugin.adopt(config)
    assert config.compilation_config.compile_ranges_endpoints == after


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_vllm_does_not_compile_is_told(
    configure: Configure, lines: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    architectures = frozenset({"LlamaForCausalLM"} if listed else {"DeepseekV32ForCausalLM"})
    monkeypatch.setattr("vllm.config.vllm.default_breakable_cudagraph_architectures", lambda: architectures)
    configure(additional_config={KEY: {}})
    what = "LlamaForCausalLM" if listed else "the model"
    said = told(lines, logging.WARNING)
    assert f"this vLLM doesn't compile {what} but captures breakable CUDA graphs of it" in said
    assert "no graph reaches" in said
