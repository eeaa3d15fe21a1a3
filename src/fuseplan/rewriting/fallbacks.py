"""How Inductor lowers fused ops: as calls, with the layouts that it requires of custom ops.

It would do so by itself at the first call, with two drawbacks. Up to torch 2.12 it then formats a log line, whether or
not logging is on, with everything that the call depends on. Where every layer reads two results of the one before, that
takes exponential time: a final layer unlike all others took minutes after eight layers. And the generated code calls
the op through torch's dispatcher, which costs the host about as much as the launch.
"""

from typing import Any, Final

import torch
from torch import fx
from torch._library.utils import get_layout_constraint_tag
from torch.torch_version import TorchVersion

from fuseplan.rewriting.shared_inputs import called_by, is_fused

IS_SLOW: Final = TorchVersion(torch.__version__) < "2.13"


def add_fallbacks(graph: fx.Graph) -> None:
    """Registers lowerings of a graph's fused ops with Inductor: of ops that are called directly, and where Inductor's
    own fallback is slow, of all.

    Args:
        graph: a graph with fused ops.
    """
    for node in graph.nodes:
        if is_fused(node) and (IS_SLOW or hasattr(called_by(node), "direct")):
            _add(called_by(node))


def _add(target: Any) -> None:
    from torch._inductor import lowering  # takes long to import

    if target in lowering.lowerings:
        return
    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(target, with_default=True))
    lowering.make_fallback(target, layout_constraint=constraint, warn=False)
    if hasattr(target, "direct"):
        from fuseplan.rewriting.direct import lower

        lowering.lowerings[target] = lower(target)
