"""Inductor's hook for custom passes, which the pass manager takes: the passes that it had before."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

HOOK = "post_grad_custom_post_pass"


def standing(options: Mapping[str, Any]) -> list[Any]:
    """The custom passes in the hook: of Inductor's options or, without such, of its configuration.

    Where torch scopes custom passes (`custom_pass_context`, as pytorch #184019 proposes it), the hook has an object of
    torch's for those of the surrounding contexts. It is left out: torch runs it beside the options' passes, and if one
    of these called it, it would call that again.
    """
    given = options.get(HOOK, getattr(inductor_config, HOOK))
    passes = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    return [each for each in passes if type(each).__module__ != CustomGraphPass.__module__]


def emptied() -> AbstractContextManager[None]:
    """Empties the hook in Inductor's configuration, so that only the options set it. Its former passes are chained, and
    where torch scopes custom passes it raises if the hook isn't empty.
    """
    empty: AbstractContextManager[None] = inductor_config.patch(post_grad_custom_post_pass=None)
    return empty
