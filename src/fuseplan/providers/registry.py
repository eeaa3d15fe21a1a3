"""Which implementations of fused ops there are, and for each whether it is available here or why not.

The seed asks `rocm_aiter_ops.is_enabled()` in an `if` ladder of its pass manager; here each provider answers for
itself, and the answer carries its reason.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuseplan.dialect import ops
from fuseplan.providers.devices import DeviceProfile, local_vendor
from fuseplan.record import Reason, Refusal


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
        implements: names of the fused ops it implements, each with a check of its arguments: None, or why it refuses
            them.
    """

    name: str
    description: str
    vendors: frozenset[str]
    package: str | None
    distribution: str | None = None
    install: str
    implements: Mapping[str, Callable[[Any], Refusal | None]] = field(default_factory=dict)

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


def accept_all(m: Any) -> Refusal | None:
    """The check of an implementation that takes whatever its op takes."""
    return None


BUILT_IN_PROVIDERS: Sequence[Provider] = (
    Provider(
        name="torch",
        description="plain PyTorch, the reference of every fused op; NCCL and gloo",
        vendors=frozenset({"nvidia", "amd", "cpu"}),
        package=None,
        install="",
        implements={op.name: accept_all for op in ops.values() if op.fused},
    ),
    Provider(
        name="triton",
        description="fuseplan's own Triton kernels",
        vendors=frozenset({"nvidia", "amd"}),
        package="triton",
        install="pip install fuseplan[triton]",
    ),
    Provider(
        name="flashinfer",
        description="FlashInfer's all-reduce fusion and norms",
        vendors=frozenset({"nvidia"}),
        package="flashinfer",
        distribution="flashinfer-python",
        install="pip install flashinfer-python",
    ),
    Provider(
        name="aiter",
        description="AITER's fused norms and custom all-reduce (ROCm)",
        vendors=frozenset({"amd"}),
        package="aiter",
        install="install AITER from its ROCm release",
    ),
)
