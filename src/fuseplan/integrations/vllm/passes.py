"""fuseplan's pass manager as vLLM needs it: it knows vLLM's groups."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, PassConfig
from fuseplan.matching import GraphPass
from fuseplan.providers import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS
from fuseplan.record import Report
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES


def manager_for(
    config: PassConfig,
    compile_range: CompileRange | None,
    on_report: Callable[[Report], None],
    *,
    previous: Sequence[GraphPass] = (),
    passes: Sequence[object] = (),
    settles: bool = False,
) -> PostGradPassManager:
    """A manager for one compile range; `settles` as for `PostGradPassManager`."""
    return PostGradPassManager(
        config, compile_range=compile_range, on_report=on_report, previous=previous, passes=passes,
        engine_groups=process_groups, rules=_rules(config), providers=(*BUILT_IN_PROVIDERS, *ENGINE_PROVIDERS),
        settles=settles,
    )  # fmt: skip


SLOWER: Final = "qk_norm_rope"
"""With it a token of Qwen3-8B took 1.6 to 2.7 % longer on one H200, in CUDA graphs of vLLM 0.22, and no less in another
run: Inductor's own code for these norms is hard to beat there, and the cost model doesn't know.
"""


def _rules(config: PassConfig) -> Sequence[Rule]:
    """All rules, `SLOWER` only on request."""
    selected = (re.split("[@#:]", selector)[0] for selector in (*config.force, *config.forbid))
    named = {*config.chosen_policy.order, *selected}
    is_asked = config.enable_qk_norm_rope_fusion is True or SLOWER in named
    return [rule for rule in BUILT_IN_RULES if is_asked or rule.name != SLOWER]


def process_groups() -> Mapping[object, str]:
    """vLLM's identifiers of groups in graphs, names and handles of shared-memory communicators, with the names of
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
