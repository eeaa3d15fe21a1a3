"""Verification by all workers of a tensor-parallel group together, which none could do alone: of FlashInfer's
all-reduces, say.

A worker compiles its model in the forward pass by which vLLM sizes the KV cache. `VllmBackend.__call__` returns between
compilation and that run: all workers meet there. Memory that kernels share between ranks is allocated then, so that
vLLM accounts for it. A warm start brings no graph and skips this: the report beside vLLM's cache has the outcomes of
the cold one; if that ended before verifying, the warm start verifies before the engine serves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fuseplan.compilation.first_run import digest_of, pending_in, settled, verify_pending
from fuseplan.config import PassConfig
from fuseplan.distributed import Agreement, agree_in_groups
from fuseplan.errors import FuseplanError, UnsupportedError
from fuseplan.record import Pending, Report, Verification
from fuseplan.record.report import merged
from fuseplan.rules.families import BUILT_IN_RULES

GRAPH = "vllm-verified"
"""The key in the group's store."""


def before_first_run(settle: Callable[[], None]) -> None:
    """Lets `settle()` run once vLLM's backend has compiled a model and hasn't run it."""
    from vllm.compilation.backends import VllmBackend

    compile_model: Callable[..., Any] = VllmBackend.__call__

    @functools.wraps(compile_model)
    def settled_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = compile_model(self, *args, **kwargs)
        settle()
        return compiled

    VllmBackend.__call__ = settled_first


def verified_by_all(
    reports: Sequence[Report], config: PassConfig, known: dict[Pending, Verification], give_up: Callable[[], None]
) -> list[Report]:
    """The reports, with their pending fusions verified by all workers, which all call this at once.

    Args:
        reports: of graphs that haven't run yet.
        config: has the deadlines.
        known: outcomes of earlier verification; new ones are added.
        give_up: keeps the compiled graphs from being found in a cache again.

    Raises:
        UnsupportedError: a kernel is wrong on some rank, or a rank didn't come.
        CollectiveError: a rank is left in a kernel.
    """
    pending = [each for each in pending_in(reports) if each not in known]
    if pending:
        try:
            outcomes = _verified(pending, merged(reports), config)
        except FuseplanError:
            give_up()
            raise
        known.update(zip(pending, outcomes, strict=True))
    everything = Agreement(fused=True, verified=tuple(known.values()))
    return [settled(each, everything) for each in reports]


def _verified(pending: Sequence[Pending], report: Report, config: PassConfig) -> Sequence[Verification]:
    groups = tuple(dict.fromkeys(each.group for each in pending))
    ask = functools.partial(agree_in_groups, groups, deadline_s=config.agreement_timeout_s)
    verdict = ask(graph=GRAPH, digest=digest_of(report))
    if verdict.fused:
        verdict = verify_pending(pending, BUILT_IN_RULES, ask, GRAPH, config)
    if verdict.fused:
        return verdict.verified
    wrong = verdict.verified[-1] if verdict.verified else None
    forbidden = f"forbid {wrong.rule}:{wrong.provider}" if wrong is not None else "set VLLM_DISABLE_COMPILE_CACHE=1"
    raise UnsupportedError(
        f"the workers can't verify together what they would run: {verdict.reason}; start the engine again, and if this "
        f"comes again, {forbidden}, or set FUSEPLAN=0"
    )
