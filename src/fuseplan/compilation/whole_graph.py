"""Why a graph is left unfused as a whole, and what a package needs where it runs."""

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import fx
from torch._inductor.virtualized import V
from torch.torch_version import TorchVersion

from fuseplan.compilation.analysis import UNCALLED, Analysis
from fuseplan.config import Environment
from fuseplan.dialect import is_inlined
from fuseplan.errors import UnsupportedError
from fuseplan.graph.facts import groups_in, is_on_cpu, is_training
from fuseplan.matching import ExternalMatch, Match
from fuseplan.planner import Decision, Problem
from fuseplan.providers import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS
from fuseplan.record import Reason, Refusal
from fuseplan.record.text import one_line
from fuseplan.rules.families import BUILT_IN_RULES


def hands_off(graph: fx.Graph, environment: Environment) -> Refusal | None:
    """Why a graph is left unfused as a whole, or None.

    Raises:
        UnsupportedError: the graph is compiled by AOTInductor, and has collectives.
    """
    if not environment.enabled:
        return Refusal(reason=Reason.DISABLED, detail="FUSEPLAN=0 switches every fusion off", fix="unset FUSEPLAN")
    if is_training(graph):
        return Refusal(
            reason=Reason.TRAINING,
            detail="the graph has a backward and is left unfused; fuseplan is for inference",
            fix="run the model under torch.inference_mode() or torch.no_grad()",
        )
    if V.aot_compilation and (groups := groups_in(graph)):
        raise UnsupportedError(
            f"the graph has collectives of {', '.join(groups)}, and AOTInductor is supported for one process alone; "
            "leave fuseplan's options out, or use torch.compile"
        )
    return None


CALLS_OPS: Final = "2.13"
"""The release of torch whose packages call ops as they were written, as far as that was tried, on CPUs. Those of 2.11
hand them other dtypes (bfloat16 becomes quint8). On GPUs it couldn't be tried: the torch 2.11 there ended the process
when it loaded any package, also one without fuseplan.
"""


def lost_in_package(analysis: Analysis, chosen: Iterable[int]) -> dict[int, str]:
    """The chosen candidates whose ops an AOTInductor package can't be trusted to call, and why."""
    if not V.aot_compilation:
        return {}
    if not is_on_cpu(analysis.canonical.graph):
        where = "on a GPU"
    elif TorchVersion(torch.__version__) < CALLS_OPS:
        where = f"before torch {CALLS_OPS}; this is {torch.__version__}"
    else:
        return {}
    candidates = analysis.problem.candidates
    return {index: f"{UNCALLED} {where}" for index in chosen if _is_called(candidates[index].match)}


def _is_called(match: Match | ExternalMatch) -> bool:
    return isinstance(match, Match) and not is_inlined(match.rule.op, match.provider)


_PROVIDERS: Final = (*BUILT_IN_PROVIDERS, *ENGINE_PROVIDERS)


def needed_by_package(problem: Problem, decision: Decision) -> list[Refusal]:
    """The note that an AOTInductor package calls fuseplan's ops, with rules and providers; inlined kernels leave no op
    to call.
    """
    if not V.aot_compilation:
        return []
    called = [each for each in (problem.candidates[i] for i in decision.selected) if _is_called(each.match)]
    rules = sorted({each.rule for each in called})
    if not rules:
        return []
    users = sorted({f"rule {name}" for name in rules} - {f"rule {rule.name}" for rule in BUILT_IN_RULES})
    users += sorted({f"provider {each.provider}" for each in called} - {f"provider {each.name}" for each in _PROVIDERS})
    further = f" and after importing the definition of {' and '.join(users)}" if users else ""
    detail = (
        f"the package calls fuseplan's ops ({', '.join(rules)}): load it in Python, after `import fuseplan.providers`"
        f"{further}"
    )
    return [Refusal(reason=Reason.PACKAGE, detail=detail, fix=f"forbid={rules} makes one without them")]


def fault(error: Exception) -> Refusal:
    """The refusal of a graph because of an unexpected error, with the place that raised it: for torch's own functions,
    their caller.
    """
    frames, torchs = traceback.extract_tb(error.__traceback__), Path(torch.__file__).parent
    frame = next((each for each in reversed(frames) if torchs not in Path(each.filename).parents), frames[-1])
    where = f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})"
    return Refusal(
        reason=Reason.FAULT,
        detail=f"the graph is left unfused, since {where} raises {type(error).__name__}: {one_line(error)}",
        fix="if that is your own code, fix it; otherwise report it with the files that FUSEPLAN_DEBUG_DIR writes",
    )
