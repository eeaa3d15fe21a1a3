"""Which vLLM fuseplan works with: not too old, and with the interfaces that the plugin is built on.

An engine never stops for it: vLLM then runs as it does without fuseplan, and one line says why.
"""

import functools
import re

import torch
import vllm

import fuseplan
from fuseplan.compatibility import OLDEST_TORCH, PrivateApi, find_moved, incompatibility

OLDEST_VLLM = (0, 22)
TRIED = {(0, 22): (2, 11), (0, 32): (2, 13)}
"""Releases of vLLM that it was run in, and the torch beside each: 0.22 on GPUs, by hand, and 0.32 on CPUs, by tests."""

SHOWN = 2
"""Missing interfaces that a message names; where one moves, its neighbours mostly move with it."""

SOURCE_BUILD = (0, 1)
"""The version of a build without a tag: `0.1.dev1+g1234567`."""


def _vllm(path: str, args: int | None = None) -> PrivateApi:
    return PrivateApi(f"vllm.{path}", ("integrations",), args)


HOOKS = (
    _vllm("config:VllmConfig.__post_init__", 0),
    _vllm("v1.worker.worker_base:WorkerBase"),
)
"""Interfaces that tell fuseplan whether it is requested. Without them it can't be."""

CONFIGURATION = (
    *map(_vllm, (
        "config:CompilationConfig.backend", "config:CompilationConfig.inductor_compile_config",
        "config:CompilationConfig.inductor_passes", "config:CompilationConfig.mode", "config:CompilationMode.NONE",
        "config:CompilationMode.VLLM_COMPILE", "config:VllmConfig.additional_config",
        "config:VllmConfig.compilation_config", "config:VllmConfig.model_config", "platforms:current_platform",
    )),
    _vllm("platforms.interface:Platform.get_device_name"),
    _vllm("platforms.interface:Platform.is_cuda_alike", 0),
)  # fmt: skip
"""Interfaces used in each process that holds a configuration."""

WORKER = (
    *map(_vllm, (
        "config:ParallelConfig.data_parallel_index", "config:ParallelConfig.rank",
        "config:VllmConfig.parallel_config", "distributed.parallel_state:GroupCoordinator.cpu_group",
        "distributed.parallel_state:GroupCoordinator.device_communicator",
        "distributed.parallel_state:GroupCoordinator.device_group",
        "distributed.parallel_state:GroupCoordinator.rank_in_group",
        "distributed.parallel_state:GroupCoordinator.world_size", "distributed.parallel_state:_groups",
        "envs:VLLM_CACHE_ROOT",
    )),
    _vllm("config:VllmConfig.compute_hash", 0),
    _vllm("distributed.parallel_state:get_tp_group", 0),
    _vllm("platforms.interface:Platform.get_pass_manager_cls", 0),
    _vllm("v1.worker.worker_base:WorkerBase.compile_or_warm_up_model", 0),
)  # fmt: skip
"""Interfaces used in workers."""

BACKEND = (
    _vllm("compilation.backends:CompilerManager.compile"),
    _vllm("compilation.backends:VllmBackend.__call__", 2),
    _vllm("compilation.passes.inductor_pass:InductorPass.hash_dict", 1),
    _vllm("compilation.passes.inductor_pass:get_pass_context", 0),
    _vllm("compilation.passes.inductor_pass:pass_context", 1),
    _vllm("compilation.passes.pass_manager:PostGradPassManager.__call__", 1),
    _vllm("compilation.passes.pass_manager:PostGradPassManager.configure", 1),
    _vllm("compilation.passes.pass_manager:PostGradPassManager.uuid", 0),
    _vllm("config.utils:Range.end"),
    _vllm("config.utils:Range.start"),
)
"""Interfaces used while vLLM's own backend compiles. Checked then, since importing them initialises devices."""

INTERFACES = (*HOOKS, *CONFIGURATION, *WORKER, *BACKEND)
"""All interfaces. A test compares the list with the source."""


@functools.cache
def missing(interfaces: tuple[PrivateApi, ...]) -> str | None:
    """The interfaces of vLLM that fuseplan needs and that have changed, or None."""
    moved = find_moved(interfaces)
    if not moved:
        return None
    more = f", and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    return f"vLLM {vllm.__version__} lacks interfaces that fuseplan needs: {', '.join(map(str, moved[:SHOWN]))}{more}"


def obstacle() -> str | None:
    """Why fuseplan can't work with the installed vLLM or torch, or None; workers and the backend check more."""
    release = numbers(vllm.__version__)
    if release is not None and release < OLDEST_VLLM:
        return f"vLLM {vllm.__version__} is too old: it needs {dotted(OLDEST_VLLM)} or newer"
    beside = numbers(torch.__version__)
    if beside is not None and beside < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old: it needs {dotted(OLDEST_TORCH)} or newer"
    return incompatibility() or missing(CONFIGURATION)


def tried() -> bool:
    """Whether the tests are run on releases such as these."""
    release = numbers(vllm.__version__)
    return release is not None and TRIED.get(release) == numbers(torch.__version__)


def untried() -> str:
    """The note on others."""
    known = " and ".join(f"{dotted(release)} with torch {dotted(beside)}" for release, beside in sorted(TRIED.items()))
    return f"written for these versions, and not tried with them: vLLM {known} are"


def versions() -> str:
    """The versions of vLLM and torch, in words."""
    return f"vLLM {vllm.__version__} (torch {torch.__version__})"


def nothing(why: str) -> str:
    """The log line of an engine that runs without fuseplan."""
    return f"fuseplan {fuseplan.__version__} does nothing: {why}; vLLM runs without it"


def numbers(version: str) -> tuple[int, int] | None:
    """Major and minor version, or None of a build without one."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or ("dev" in version and (int(found[1]), int(found[2])) == SOURCE_BUILD):
        return None
    return int(found[1]), int(found[2])


def dotted(version: tuple[int, int]) -> str:
    """`0.22`"""
    return ".".join(map(str, version))
