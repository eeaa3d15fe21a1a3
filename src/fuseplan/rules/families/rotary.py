"""The fusion of QK norm and rotary embedding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fuseplan.graph.facts import dtype_text
from fuseplan.graph.ops import DialectOp, Rounding, Sample, define, draw_near_one, random_tensor
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings, Rule
from fuseplan.rules.families.compose import SUPPORTED
from fuseplan.rules.parts.rms_norm import rms_norm
from fuseplan.rules.parts.rotary import rotary_embedding


def normed(op: DialectOp, name: str, samples: Sequence[tuple[Sample, Rounding]]) -> DialectOp:
    """The fused op of an op that rotates q and k, and of the norms before it: op(rms_norm(q), rms_norm(k), ...).

    It takes the arguments of `op`, with q_weight and k_weight [head_dim] before cos. Before rotary_rounding, which `op`
    may call `rounding`, come eps, added to the mean squares, and `rounding`, one of `Rounding`, for both norms. It
    yields the results of `op`, and also raises ValueError where `rounding` isn't one of `Rounding`.

    Args:
        op: the op that rotates; it may also write caches and attend.
        name: the name of the fused op.
        samples: samples of `op`, each with the rounding of the norms before it.
    """
    parameters = op.parameters
    angles, place = parameters.index("Tensor cos"), next(i for i, each in enumerate(parameters) if each[:4] == "str ")
    weights = ["Tensor q_weight", "Tensor k_weight"]
    norms = [*parameters[:angles], *weights, *parameters[angles:place], "float eps", "str rounding"]
    last = len(norms)

    def run(kind: str, arguments: Sequence[Any]) -> Any:
        norm, (q, k, *others) = getattr(rms_norm, kind), arguments[:angles]
        q_weight, k_weight, *between, eps, rounding = arguments[angles:last]
        heads = norm(q, q_weight, eps, rounding), norm(k, k_weight, eps, rounding)
        return getattr(op, kind)(*heads, *others, *between, *arguments[last:])

    def reference(*arguments: Any) -> Any:
        return run("reference", arguments)

    def fake(*arguments: Any) -> Any:
        return run("fake", arguments)

    def sample(plain: Sample, rounding: Rounding) -> Sample:
        def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
            arguments = plain.make(device, generator)
            q, eps = arguments[0], 1e-6
            noise = [random_tensor(q.shape[-1:], torch.float32, device, generator) for _ in weights]
            drawn = [(1 + 0.1 * each).to(q.dtype) for each in noise]
            return *arguments[:angles], *drawn, *arguments[angles:place], eps, rounding.value, *arguments[place:]

        return Sample(name=f"{plain.name}-{rounding}", make=make)

    reference.__doc__ = f"{op.name} of rms_norm(q, q_weight) and rms_norm(k, k_weight), each as its own reference does."
    return define(
        name,
        f"({', '.join([*norms, 'str rotary_rounding', *parameters[place + 1 :]])}) -> {op.schema.split(' -> ')[1]}",
        reference=reference,
        fake=fake,
        samples=[sample(*each) for each in samples],
        error_factor=op.error_factor,
        fused=True,
        draws={**op.draws, "q_weight": draw_near_one, "k_weight": draw_near_one},
        writes=op.writes,
    )


def by_norms(samples: Sequence[Sample]) -> list[tuple[Sample, Rounding]]:
    """Samples with place of the norms before them: one rounding for all samples, and the others for the first."""
    further = [(samples[0], each) for each in (Rounding.GPT_OSS, Rounding.GEMMA)]
    return [*((each, Rounding.LLAMA) for each in samples), *further]


qk_norm_rope = normed(rotary_embedding, "qk_norm_rope", by_norms(rotary_embedding.samples))

HEADS_FIRST = (0, 2, 1, 3)
"""Between [B, S, heads, head_dim] and [B, heads, S, head_dim]; its own inverse."""


def refuse_dtypes(m: Bindings, others: Sequence[str]) -> Refusal | None:
    """Refuses queries in a dtype that fused norms don't take, and other tensors in another dtype than the queries."""
    if m.q.dtype not in SUPPORTED:
        names = ", ".join(map(dtype_text, SUPPORTED))
        return m.refuse(Reason.DTYPE, "q", f"q is {dtype_text(m.q.dtype)}; supported are {names}")
    for name in others:
        value = getattr(m, name)
        if value.dtype != m.q.dtype:
            found = f"{name} is {dtype_text(value.dtype)} and q is {dtype_text(m.q.dtype)}"
            return m.refuse(Reason.DTYPE, name, f"{found}; the fused op takes one dtype")
    return None


class NormedRule(Rule):
    """A rule for queries and keys that are normed and rotated.

    Args:
        transposes: whether heads are normed in [B, S, heads, head_dim] and rotated in [B, heads, S, head_dim], as in
            Hugging Face's models.
    """

    def __init__(self, *, transposes: bool) -> None:
        self.transposes = transposes

    def _moved(self, value: Any) -> Any:
        return torch.ops.aten.permute.default(value, [*HEADS_FIRST]) if self.transposes else value

    def _rotated(self, bound: Mapping[str, Any]) -> tuple[Any, Any]:
        """(queries, keys), normed and rotated."""
        q, k = (
            self._moved(rms_norm(bound[name], bound[f"{name}_weight"], bound["eps"], bound["rounding"]))
            for name in ("q", "k")
        )
        rotated = rotary_embedding(q, k, bound["cos"], bound["sin"], bound["rotary_rounding"])
        return rotated[0], rotated[1]


class QkNormRope(NormedRule):
    """rms_norm(q), rms_norm(k) (-> transpose) -> rotary_embedding  =>  one op.

    y = n * cos + cat(-n2, n1) * sin,   n = rms_norm(x) * weight,   of the queries and of the keys

    Where it `transposes`, the fused op stays in the first layout, and its results are views in the second.
    """

    name, flags = "qk_norm_rope", ("enable_qk_norm_rope_fusion",)
    op, core = qk_norm_rope, rms_norm

    def pattern(self, **bound: Any) -> Any:
        return self._rotated(bound)

    def replacement(self, **bound: Any) -> Any:
        angles = {name: self._moved(bound[name]) for name in ("cos", "sin")}
        return tuple(map(self._moved, super().replacement(**{**bound, **angles})))

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses mixed and unsupported dtypes, and other layouts of the angles."""
        return refuse_dtypes(m, ("k", "q_weight", "k_weight")) or self._shapes(m)

    def _shapes(self, m: Bindings) -> Refusal | None:
        q, k, cos = m.q, m.k, m.cos
        if k.dim() != q.dim() or list(q.shape[:-2]) != list(k.shape[:-2]):
            shapes = f"q is {[*q.shape]} and k is {[*k.shape]}"
            if k.dim() == q.dim() > 2 and q.shape[-2] == k.shape[-2] and list(q.shape[:-3]) == list(k.shape[:-3]):
                detail = f"{shapes}, heads before tokens; the fused op takes tokens before heads"
                return m.refuse(
                    Reason.SIZE, "k", detail, fix="norm queries and keys before heads and tokens change places"
                )
            return m.refuse(Reason.SIZE, "k", f"{shapes}; they may only differ in the number of heads")
        heads = 1 if self.transposes else -2
        if cos.dim() != q.dim() or cos.shape[heads] != 1:
            detail = f"cos is {[*cos.shape]}; the fused op takes angles of each token, the same for all of its heads"
            return m.refuse(Reason.SIZE, "cos", detail, fix="give cos and sin a dimension of size 1 for the heads")
        return None


ROTARY_RULES: tuple[Rule, ...] = (QkNormRope(transposes=False), QkNormRope(transposes=True))
