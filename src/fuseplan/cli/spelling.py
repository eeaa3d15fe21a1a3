"""Misspelled names and missing files, reported before torch is imported: importing takes seconds, and the error less
than one.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fuseplan.config import CompileRange, Policy, check_ranges, unknown
from fuseplan.errors import ConfigError, PlanError, WorkloadError
from fuseplan.record.files import exists, reading

# The names that other parts define; a test compares each list with them.
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
"""Prefixes of the names of GPUs without a profile."""


def check_spelling(
    workload: str | None = None,
    *,
    device: str | None = None,
    policies: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    selectors: Sequence[str] | None = None,
    ranges: Sequence[str] | None = None,
    own: bool = False,
) -> None:
    """Refuses unknown names, and malformed ranges.

    Args:
        workload: as the user named it.
        device: as the user named it.
        policies: as the user named them.
        providers: as the user named them.
        selectors: of fusions to apply or not to; their rules are checked.
        ranges: compile ranges.
        own: whether the user's modules add rules and providers of other names.

    Raises:
        ConfigError: there is no such device, policy, rule or provider, or a range is malformed, or overlaps another.
        WorkloadError: there is no such workload, file or module.
    """
    if workload is not None and workload not in WORKLOADS:
        _check_elsewhere(workload)
    if device is not None and device not in DEVICES and not device.startswith(GPUS):
        raise unknown("device", device, DEVICES)
    check_ranges([CompileRange.parse(text) for text in ranges or ()])
    named = [name for text in policies or () for name in Policy.parse(text).order]
    named += filter(None, (re.split("[@#:]", text)[0] for text in selectors or ()))
    for kind, given, known in (("rule", named, RULES), ("provider", providers or (), PROVIDERS)):
        for name in given:
            if name not in known and not own:
                raise unknown(kind, name, known)


def check_files(*, costs: Path | None = None, plan: Path | None = None) -> None:
    """Refuses files that aren't there.

    Raises:
        ConfigError: there is no such cost table.
        PlanError: there is no such plan file.
    """
    if costs is not None:
        with reading("cost table", costs, ConfigError):
            costs.stat()
    if plan is not None:
        with reading("plan file", plan, PlanError):
            plan.stat()


def _check_elsewhere(workload: str) -> None:
    """Refuses a workload that is neither a path nor a factory, a path without a file, and a module that isn't
    installed.
    """
    if workload.endswith(".json") or "/" in workload:
        with reading("Hugging Face configuration", Path(workload), WorkloadError):
            Path(workload).stat()
    elif ":" in workload:
        package = workload.partition(":")[0].partition(".")[0]
        if not package.isidentifier() or not _is_installed(package):
            raise WorkloadError(f"{workload}: no module named {package!r} here; run in its folder, or set PYTHONPATH")
    elif not exists(workload):
        error = unknown("workload", workload, WORKLOADS)
        raise WorkloadError(f"{error}, the path of a Hugging Face config.json, or package.module:factory")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None or Path(package).is_dir() or any(Path.cwd().glob(f"{package}.*"))
    except ValueError:  # in sys.modules without a spec
        return True
