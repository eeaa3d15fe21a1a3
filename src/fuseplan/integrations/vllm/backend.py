"""Hooks fuseplan into vLLM's own backend, which splits a model at attention and compiles the pieces."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from fuseplan.integrations.vllm import support
from fuseplan.integrations.vllm.reports import Journal
from fuseplan.integrations.vllm.together import before_first_run

STOCK = "vllm.compilation.passes.pass_manager.PostGradPassManager"
OURS = "fuseplan.integrations.vllm.pass_manager.FuseplanPassManager"

log = logging.getLogger("vllm.fuseplan")


def offer_pass_manager(journal: Journal, settle: Callable[[], None]) -> None:
    """Lets the platform name fuseplan's pass manager where it would name vLLM's. The backend asks when it compiles.

    Args:
        journal: has the reports of its graphs.
        settle: called once they are compiled, before they run.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    theirs: str = current_platform.get_pass_manager_cls()
    name = functools.cache(lambda: _pass_manager(journal, theirs, settle))
    platform.get_pass_manager_cls = classmethod(lambda cls: name())


def _pass_manager(journal: Journal, theirs: str, settle: Callable[[], None]) -> str:
    """The pass manager to use. Where it isn't fuseplan's, one line says why."""
    why = support.missing(support.BACKEND)
    if why is None and theirs not in (STOCK, OURS):
        why = f"the platform has a pass manager of its own ({theirs})"
    if why is not None:
        log.warning(support.nothing(why))
        journal.silence()
        return theirs
    _count_repeats(journal)
    before_first_run(settle)
    return OURS


def _count_repeats(journal: Journal) -> None:
    """vLLM compiles equal pieces, mostly layers, once: no pass sees the others."""
    from vllm.compilation.backends import CompilerManager

    compile_piece: Callable[..., Any] = CompilerManager.compile

    @functools.wraps(compile_piece)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(journal.reports)
        compiled = compile_piece(self, *args, **kwargs)
        journal.note(compiled, before)
        return compiled

    CompilerManager.compile = counted
