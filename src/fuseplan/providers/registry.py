"""Which implementations of fused ops there are, and for each whether it is available here or why not.

vLLM asks `rocm_aiter_ops.is_enabled()` in an `if` ladder of its pass manager; here each provider answers for
itself, and the answer carries its reason.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuseplan.dialect import DialectOp, Rounding, implement, ops
from fuseplan.providers.devices import DeviceProfile, local_vendor
from fuseplan.providers.gates import FLASHINFER_ALL_REDUCE, FLASHINFER_ALL_REDUCE_QUANT, Accepts, accept_all
from fuseplan.providers.triton import ACCEPTS as TRITON_ACCEPTS
from fuseplan.record import Reason, Refusal


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One fused op of a provider: what it accepts, and where its kernel rounds.

    Attributes:
        accepts: None, or why it refuses the arguments.
        roundings: the conventions that its kernel computes; None: whichever it is asked for.
    """

    accepts: Accepts
    roundings: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A library that can implement fused ops.

    Attributes:
        name: `torch`, `triton`, `flashinfer`, `aiter`.
        description: for a person.
        vendors: whose devices it serves.
        package: the Python package it needs, None where fuseplan's own requirements bring it.
        distribution: the name under which the package is installed, where it differs.
        install: what to do where the package is missing.
        implements: the fused ops, by name, that fuseplan runs by it.
        prices: further fused ops, by name, that its library has and that the cost model prices, but that fuseplan
            does not call yet: they are candidates where a plan is only explained.
        runs_alone: whether its collective kernels can be tried by one rank alone, in `distributed.workspace.alone`.
    """

    name: str
    description: str
    vendors: frozenset[str]
    package: str | None
    distribution: str | None = None
    install: str
    implements: Mapping[str, Offer] = field(default_factory=dict)
    prices: Mapping[str, Offer] = field(default_factory=dict)
    runs_alone: bool = False

    def offers(self, device: DeviceProfile | None = None) -> Mapping[str, Offer]:
        """The fused ops that are candidates: for another device than this one, those that are only priced too."""
        return self.implements if device is None else {**self.prices, **self.implements}

    def unavailable(self, device: DeviceProfile | None = None) -> Refusal | None:
        """Why this provider can't run, or None if it can.

        Args:
            device: a profile whose software is taken as present; None asks about this machine.
        """
        vendor = device.vendor if device else local_vendor()
        if vendor not in self.vendors:
            where = device.name if device else "this machine"
            served = " and ".join(_VENDOR_NAMES[name] for name in sorted(self.vendors))
            return self._refuse(
                f"serves {served}, and {where} has {'no GPU' if vendor == 'cpu' else _VENDOR_NAMES[vendor]}"
            )
        if device is None and self.package is not None and importlib.util.find_spec(self.package) is None:
            return self._refuse(f"the package {self.package} is not installed", mend=self.install)
        return None

    def version(self) -> str | None:
        """The version of the package it needs, None where it needs none or the package is not installed."""
        if self.package is None:
            return None
        try:
            return importlib.metadata.version(self.distribution or self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _refuse(self, detail: str, mend: str | None = None) -> Refusal:
        return Refusal(reason=Reason.PROVIDER, detail=detail, mend=mend)


_VENDOR_NAMES = {"nvidia": "NVIDIA GPUs", "amd": "AMD GPUs", "cpu": "CPUs"}


def _offers(names: Iterable[str], *roundings: Rounding, accepts: Accepts = accept_all) -> dict[str, Offer]:
    computed = frozenset(rounding.value for rounding in roundings) if roundings else None
    return {name: Offer(accepts=accepts, roundings=computed) for name in names}


def provider_of(
    name: str,
    kernels: Mapping[DialectOp, Callable[..., Any]],
    *,
    description: str = "",
    vendors: Iterable[str] = ("nvidia", "amd", "cpu"),
    accepts: Accepts = accept_all,
) -> Provider:
    """A provider of one's own: it runs fused ops by given kernels.

    Args:
        name: unique among the providers that are handed over together.
        kernels: by fused op; a kernel takes and yields what the op's reference does.
        description: for a person.
        vendors: whose devices it serves.
        accepts: a check of arguments, as `Bindings`: None, or why it refuses them.

    Raises:
        RuleError: a kernel of that name is registered for one of the ops already.
    """
    for op, kernel in kernels.items():
        implement(op, name, kernel)
    offers = {op.name: Offer(accepts=accepts) for op in kernels}
    return Provider(
        name=name, description=description, vendors=frozenset(vendors), package=None, install="", implements=offers
    )


ALL_FUSED = tuple(op.name for op in ops.values() if op.fused)

BUILT_IN_PROVIDERS: Sequence[Provider] = (
    Provider(
        name="torch",
        description="plain PyTorch, the reference of every fused op; NCCL and gloo",
        vendors=frozenset({"nvidia", "amd", "cpu"}),
        package=None,
        install="",
        implements=_offers(ALL_FUSED),
    ),
    Provider(
        name="triton",
        description="fuseplan's own Triton kernels",
        vendors=frozenset({"nvidia", "amd"}),
        package="triton",
        install="pip install fuseplan[triton]",
        implements={name: Offer(accepts=accepts) for name, accepts in TRITON_ACCEPTS.items()},
        runs_alone=True,
    ),
    Provider(
        name="flashinfer",
        description="FlashInfer's all-reduce fusion and norms",
        vendors=frozenset({"nvidia"}),
        package="flashinfer",
        distribution="flashinfer-python",
        install="pip install flashinfer-python",
        # FlashInfer at fb28d724, include/flashinfer/comm/trtllm_allreduce_fusion.cuh: sums in the activation dtype,
        # one rounding after the weight, then float(y) * (1 / scale). Its norm + quant kernels (norm.cuh) quantise the
        # unrounded y, which no graph that casts y first computes.
        prices={
            **_offers(["all_reduce_fused_add_rms_norm"], Rounding.GPT_OSS, accepts=FLASHINFER_ALL_REDUCE),
            **_offers(
                ["all_reduce_fused_add_rms_norm_static_fp8_quant"],
                Rounding.GPT_OSS,
                accepts=FLASHINFER_ALL_REDUCE_QUANT,
            ),
        },
    ),
    Provider(
        name="aiter",
        description="AITER's fused norms and custom all-reduce (ROCm)",
        vendors=frozenset({"amd"}),
        package="aiter",
        install="install AITER from its ROCm release",
        # AITER, aiter/ops/triton/_triton_kernels/fused_add_rmsnorm_pad.py: the sum stays in float32, one rounding at
        # the end. Its all-reduce + norm kernels are taken to do the same.
        prices={
            **_offers(
                ["fused_add_rms_norm_pad", "all_reduce_fused_add_rms_norm", "all_reduce_fused_add_rms_norm_pad"],
                Rounding.FP32,
            ),
            **_offers(["rms_norm_pad", "all_reduce_rms_norm"], Rounding.GPT_OSS),
        },
    ),
)
