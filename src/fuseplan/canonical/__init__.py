"""Raising a post-grad graph into the dialect, on a copy.

`canonicalize` reads like the list of what it does; every step is a function of its own, a file per source.
"""

from collections.abc import Mapping

from torch import fx

from fuseplan.canonical.activations import raise_silu_and_mul
from fuseplan.canonical.attention import raise_attention
from fuseplan.canonical.collectives import hoist_views, raise_all_reduces
from fuseplan.canonical.layout import raise_pads, sink_reshapes
from fuseplan.canonical.noops import eliminate_noops
from fuseplan.canonical.norms import raise_rms_norms
from fuseplan.canonical.quant import raise_quants
from fuseplan.canonical.rotary import raise_rotary_embeddings
from fuseplan.canonical.view import CanonicalGraph
from fuseplan.canonical.vllm import raise_vllm
from fuseplan.graph.surgery import sort_topologically

NO_GROUPS: Mapping[object, str] = {}


def canonicalize(
    graph: fx.Graph, *, see_through_noops: bool = True, engine_groups: Mapping[object, str] = NO_GROUPS
) -> CanonicalGraph:
    """The graph in the dialect.

    Args:
        graph: a functional post-grad graph with fake tensors in `meta["val"]`; it is not changed.
        see_through_noops: `PassConfig.eliminate_noops`.
        engine_groups: what an engine calls its groups, and the names of the process groups behind them.

    Returns:
        A raised copy, topologically sorted, that knows the original of each of its values.
    """
    canonical = CanonicalGraph.copy_of(graph)
    if see_through_noops:
        eliminate_noops(canonical)
    raise_all_reduces(canonical)
    raise_vllm(canonical, engine_groups)
    hoist_views(canonical)
    raise_rms_norms(canonical)
    raise_silu_and_mul(canonical)
    raise_pads(canonical)
    raise_quants(canonical)
    raise_rotary_embeddings(canonical)
    raise_attention(canonical)
    sink_reshapes(canonical)
    sort_topologically(canonical.graph)
    return canonical


__all__ = ["CanonicalGraph", "canonicalize"]
