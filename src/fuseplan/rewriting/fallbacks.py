"""How Inductor lowers fused ops: as calls, with the layouts that it asks of custom ops.

It would do so unasked where it first meets one. But up to torch 2.12 it then writes a log line, whether or not anybody
reads it, of all that the call depends on, and of a graph in which every layer reads two results of the one before that
takes exponential time: a final layer that no other layer was like took minutes behind eight of them.
"""

from typing import Final

import torch
from torch import fx
from torch._library.utils import get_layout_constraint_tag
from torch.torch_version import TorchVersion

from fuseplan.rewriting.shared_inputs import called_by, is_fused

IS_SLOW: Final = TorchVersion(torch.__version__) < "2.13"


def add_fallbacks(graph: fx.Graph) -> None:
    """Has Inductor know the fused ops of a graph before it lowers it, as it would when it meets them.

    Args:
        graph: in which fused ops are.
    """
    from torch._inductor import lowering  # takes long to import

    for node in graph.nodes:
        target = called_by(node)
        if is_fused(node) and target not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(target, with_default=True))
            lowering.make_fallback(target, layout_constraint=constraint, warn=False)
