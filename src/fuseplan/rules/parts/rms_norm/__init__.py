"""RMSNorm, with and without a residual add before it."""

from fuseplan.rules.parts.base import Core, Reported, Stage
from fuseplan.rules.parts.rms_norm.engines import ENGINE_OPS
from fuseplan.rules.parts.rms_norm.op import fused_add_rms_norm, rms_norm
from fuseplan.rules.parts.rms_norm.spellings import raise_rms_norms
from fuseplan.rules.parts.traffic import Middle

PART = Core(
    name="rms_norm",
    ops=(rms_norm, fused_add_rms_norm),
    residual_op=fused_add_rms_norm,
    result="norm",
    weight=-3,
    raising=((Stage.CORES, raise_rms_norms),),
    engine_ops=ENGINE_OPS,
    reported=Reported.ALWAYS,
    traffic=Middle(
        name="rms_norm", has_weight=True, reads_sums=True, reduces_rows=True, eager_kernels=11, residual_kernels=4
    ),
)

__all__ = ["PART", "fused_add_rms_norm", "rms_norm"]
