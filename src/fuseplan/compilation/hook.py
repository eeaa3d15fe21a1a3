"""Inductor's hook for custom passes, in which the pass manager stands: what stood there before."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

HOOK = "post_grad_custom_post_pass"


def standing(options: Mapping[str, Any]) -> list[Any]:
    """The custom passes that stand in the hook: of Inductor's options or, without such, of its configuration.

    Where torch scopes custom passes (`custom_pass_context`, as pytorch #184019 proposes it), an object of its own
    stands there for those of the surrounding contexts. It isn't among them: torch runs it beside those of the options,
    and called by one of these it would call that again.
    """
    given = options.get(HOOK, getattr(inductor_config, HOOK))
    passes = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    return [each for each in passes if type(each).__module__ != CustomGraphPass.__module__]


def emptied() -> AbstractContextManager[None]:
    """Nothing stands in Inductor's configuration but what the options bring. What stood there is chained, and where
    torch scopes custom passes it raises if something does.
    """
    empty: AbstractContextManager[None] = inductor_config.patch(post_grad_custom_post_pass=None)
    return empty
