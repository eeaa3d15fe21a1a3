"""Cosines and sines of rotary embeddings, in the form that ops take."""

from collections.abc import Collection

from torch import fx

from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.graph.facts import aten, tensor_of


def spread(canonical: CanonicalGraph, angle: fx.Node, x: fx.Node, interior: Collection[fx.Node]) -> fx.Node:
    """Cosines or sines with the leading dimensions of size 1 that broadcasting to x gives them; `interior` computes the
    rotation.
    """
    rotated, value = tensor_of(x), tensor_of(angle)
    assert rotated is not None and value is not None
    reader = min(user for user in angle.users if user in interior)
    for _ in range(rotated.dim() - value.dim()):
        value = value.unsqueeze(0)
        angle = canonical.insert_before(reader, aten.unsqueeze.default, (angle, 0), value)
    return angle
