"""fuseplan's pass manager as vLLM needs it: it knows vLLM's groups."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuseplan.config import CompileRange, PassConfig
from fuseplan.manager import PostGradPassManager
from fuseplan.matching import GraphPass
from fuseplan.record import Report


def manager_for(
    config: PassConfig,
    compile_range: CompileRange | None,
    on_report: Callable[[Report], None],
    *,
    previous: Sequence[GraphPass] = (),
    passes: Sequence[object] = (),
) -> PostGradPassManager:
    """A manager for one compile range."""
    return PostGradPassManager(
        config, compile_range=compile_range, on_report=on_report, previous=previous, passes=passes,
        engine_groups=process_groups, defaults=False,
    )  # fmt: skip


def process_groups() -> Mapping[object, str]:
    """What vLLM calls its groups in graphs, by name and by the handle of a shared-memory communicator, and the names of
    torch's process groups behind them.
    """
    state: Any = sys.modules.get("vllm.distributed.parallel_state")
    names: dict[object, str] = {}
    for name, reference in dict(getattr(state, "_groups", {})).items():
        group = reference()
        if group is None or group.world_size == 1:
            continue
        names[name] = group.device_group.group_name
        communicator = getattr(group.device_communicator, "dist_module", None)
        handle = getattr(communicator, "handle", None)
        if handle is not None:
            names[handle] = group.device_group.group_name
    return names
