"""Fusions around RMSNorm.

[all_reduce_] [fused_add_] rms_norm [_ and the suffix of one of its epilogues] [_and_norm where the unquantised result
is yielded as well], and `add_rms_norm` for a residual add alone
"""

from fuseplan.graph.facts import dtype_text
from fuseplan.graph.ops import DialectOp
from fuseplan.record import Reason, Refusal
from fuseplan.rules.base import Bindings
from fuseplan.rules.families.compose import SUPPORTED, ComposedRule, Member
from fuseplan.rules.families.linear import DEFAULT_ON
from fuseplan.rules.parts import PARTS, RowEpilogue, all_reduce, rms_norm
from fuseplan.rules.parts.base import Kind

NAMES = {
    Kind.PADDING: ("act_padding", "allreduce_rms_padding", "fuse_act_padding"),
    Kind.QUANTISATION: ("norm_quant", "allreduce_rms_quant", "fuse_norm_quant"),
}
"""By kind of epilogue: the names of its rules, without and with an all-reduce, and its flag."""


class NormRule(ComposedRule):
    """y = epilogue(rms_norm(sum_ranks(x) + residual) * weight)

    Where a quantised norm has other readers, like the router of a mixture of experts, the op yields both results.
    """

    def check(self, m: Bindings) -> Refusal | None:
        """Refuses mixed and unsupported dtypes."""
        return unsupported_dtypes(m, "weight")


def unsupported_dtypes(m: Bindings, name: str) -> Refusal | None:
    """Refuses an x in a dtype that no fused norm takes, and a weight, by its name, in another dtype than x."""
    if m.x.dtype not in SUPPORTED:
        names = ", ".join(map(dtype_text, SUPPORTED))
        return m.refuse(Reason.DTYPE, "x", f"x is {dtype_text(m.x.dtype)}; supported are {names}")
    weight = getattr(m, name)
    if weight.dtype != m.x.dtype:
        detail = f"{name} is {dtype_text(weight.dtype)} and x is {dtype_text(m.x.dtype)}; the fused op takes one dtype"
        return m.refuse(Reason.DTYPE, name, detail)
    return None


class AddNormRule(NormRule):
    """y = rms_norm(x + residual) * weight, in a kernel that is launched before the layers around it have ended.

    For many rows Inductor's own kernel is as fast. Without a residual there is nothing to gain: the producer of x would
    no longer be part of the norm's kernel.
    """

    opt_in, default_on = "fuse_add_rms_norm", DEFAULT_ON


def _members() -> list[Member]:
    epilogues = [part for part in PARTS if isinstance(part, RowEpilogue) and rms_norm.PART.name in part.cores]
    members = [
        Member(core=rms_norm.PART, prologue=prologue, residual=residual, epilogue=epilogue, keeps=keeps)
        for prologue in (None, all_reduce.PART)
        for epilogue in (None, *epilogues)
        if prologue or epilogue
        for residual in (False, True)
        for keeps in ((False, True) if epilogue and epilogue.kind is Kind.QUANTISATION else (None,))
    ]
    return [*members, Member(core=rms_norm.PART, residual=True)]


def _rule(member: Member, op: DialectOp) -> NormRule:
    if member.epilogue is None and member.prologue is None:
        return AddNormRule("add_rms_norm", ("fuse_add_rms_norm",), member, op)
    if member.epilogue is None:
        return NormRule("allreduce_rms", ("fuse_allreduce_rms",), member, op)
    alone, reduced, flag = NAMES[member.epilogue.kind]
    if member.prologue is None:
        return NormRule(alone, (flag,), member, op)
    return NormRule(reduced, ("fuse_allreduce_rms", flag), member, op)


_FUSED = [(member, member.define()) for member in _members()]
NORM_FAMILY, KEPT_NORM_FAMILY = (
    {
        (each.prologue is not None, each.residual, each.epilogue.suffix if each.epilogue else None): op
        for each, op in _FUSED
        if bool(each.keeps) is keeps
    }
    for keeps in (False, True)
)
"""Fused norms by (whether an all-reduce comes before them, whether a residual is added, the epilogue's suffix), and
those that also yield the unquantised result.
"""
NORM_RULES = tuple(_rule(member, op) for member, op in _FUSED)
