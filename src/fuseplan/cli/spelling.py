"""Misspelled names, reported before torch is imported: importing takes seconds, and the error less than one."""

from collections.abc import Sequence
from pathlib import Path

from fuseplan.config import Policy, unknown
from fuseplan.errors import WorkloadError

# What these parts have by name; a test holds each list against them.
WORKLOADS = (
    "gpt-oss-120b", "gpt-oss-120b-tiny", "gpt-oss-120b-tiny:outer-reduce", "gpt-oss-120b:outer-reduce",
    "gpt-oss-20b", "gpt-oss-20b-tiny", "gpt-oss-20b-tiny:outer-reduce", "gpt-oss-20b:outer-reduce",
    "llama-3.1-8b", "llama-3.1-8b-tiny",
)  # fmt: skip
DEVICES = (
    "a100", "a100-40gb", "a100-pcie", "a100-pcie-40gb", "b200", "b300", "cpu", "gh200", "gh200-144gb", "h100",
    "h100-nvl", "h100-pcie", "h20-96gb", "h200", "l40s", "mi300x", "mi325x", "mi355x", "rtx4090",
)  # fmt: skip
RULES = (
    "act_padding", "act_quant", "add_rms_norm", "allreduce_rms", "allreduce_rms_padding", "allreduce_rms_quant",
    "cached_attention", "cached_eager_attention", "eager_attention", "grouped_attention", "merged_linear",
    "merged_linear_silu_mul", "merged_scaled_linear", "norm_quant", "qk_norm_cached_attention", "qk_norm_rope",
    "qk_norm_rope_cache", "rope_cache", "skinny_linear", "skinny_linear_add_rms_norm", "skinny_scaled_linear",
)  # fmt: skip
PROVIDERS = ("aiter", "flashinfer", "sdpa", "sdpa_packed", "torch", "triton")

GPUS = ("nvidia-", "amd-")
"""How the names of GPUs without a profile start."""


def check_spelling(
    workload: str | None = None,
    *,
    device: str | None = None,
    policies: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    own: bool = False,
) -> None:
    """Refuses names that stand for nothing, whatever is installed.

    Args:
        workload: as the user named it.
        device: likewise.
        policies: likewise.
        providers: likewise.
        own: whether modules of the user's bring rules and providers of other names.

    Raises:
        ConfigError: there is no such device, policy, rule or provider.
        WorkloadError: there is no such workload.
    """
    if workload is not None and workload not in WORKLOADS and not _may_be_elsewhere(workload):
        error = unknown("workload", workload, WORKLOADS)
        raise WorkloadError(f"{error}, the path of a Hugging Face config.json, or package.module:factory")
    if device is not None and device not in DEVICES and not device.startswith(GPUS):
        raise unknown("device", device, DEVICES)
    orders = [name for text in policies or () for name in Policy.parse(text).order]
    for kind, given, known in (("rule", orders, RULES), ("provider", providers or (), PROVIDERS)):
        for name in given:
            if name not in known and not own:
                raise unknown(kind, name, known)


def _may_be_elsewhere(workload: str) -> bool:
    """Whether it is a path or a factory."""
    try:
        return ":" in workload or "/" in workload or workload.endswith(".json") or Path(workload).exists()
    except OSError:  # too long for a file
        return False
