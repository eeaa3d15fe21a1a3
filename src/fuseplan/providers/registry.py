"""Which implementations of fused ops there are, and for each whether it is available here or why not.

vLLM asks `rocm_aiter_ops.is_enabled()` in an `if` ladder of its pass manager; here each provider answers for
itself, and the answer carries its reason.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.torch_version import TorchVersion

from fuseplan.devices import DeviceProfile, local_vendor
from fuseplan.dialect import DialectOp, implement, ops
from fuseplan.providers import aiter, attention, flashinfer
from fuseplan.providers.declared import Cost, checked_cost
from fuseplan.providers.gates import Accepts, Offer, Unshared, accept_all
from fuseplan.providers.triton import ACCEPTS as TRITON_ACCEPTS
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
        oldest: the first version of it that will do, where that matters.
        install: what to do where the package is missing or too old.
        implements: the fused ops, by name, that fuseplan runs by it.
        prices: further fused ops, by name, that its library has and that the cost model prices, but that fuseplan
            does not call yet: they are candidates where a plan is only explained.
        runs_alone: whether its collective kernels can be tried by one rank alone, in `distributed.workspace.alone`;
            others' are verified by all ranks of a group together, before the first run.
        untested: on what its kernels have not been run, for a person; None where they have been.
        uuid: of a provider of a user's own: what tells its kernels and checks from former ones, or a function that
            returns it; compiled graphs are cached under it. None: each of these functions has a `uuid` of its own, or
            graphs are not cached.
    """

    name: str
    description: str
    vendors: frozenset[str]
    package: str | None
    distribution: str | None = None
    oldest: str | None = None
    install: str
    implements: Mapping[str, Offer] = field(default_factory=dict)
    prices: Mapping[str, Offer] = field(default_factory=dict)
    runs_alone: bool = False
    untested: str | None = None
    uuid: Any = None

    def offers(self, device: DeviceProfile | None = None) -> Mapping[str, Offer]:
        """The fused ops that are candidates: for another device than this one, those that are only priced too."""
        return self.implements if device is None else {**self.prices, **self.implements}

    def runs(self, op: str) -> bool:
        """Whether a fused op, by name, is applied where it is planned: one that is only priced is not."""
        return op in self.implements

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
        return self._outdated() if device is None else None

    def _outdated(self) -> Refusal | None:
        """Why the package that is installed won't do, or None."""
        if self.oldest is None:
            return None
        name, version = self.distribution or self.package, self.version()
        if version is None:
            detail = f"the package {self.package} that is installed isn't that of {name}"
        elif TorchVersion(version) < self.oldest:
            detail = f"{name} {version} is installed, and {self.oldest} is the oldest that will do"
        else:
            return None
        return self._refuse(detail, mend=self.install)

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


@dataclass(frozen=True, kw_only=True)
class SharedHeads(Provider):
    """torch's attention on keys and values with fewer heads than queries: whether a kernel takes that depends on whose
    device it is.
    """

    def offers(self, device: DeviceProfile | None = None) -> Mapping[str, Offer]:
        """As for any provider; for another device than this one, by the kernel that torch runs there."""
        return attention.shared_offers(device.vendor if device else None)


_VENDOR_NAMES = {"nvidia": "NVIDIA GPUs", "amd": "AMD GPUs", "cpu": "CPUs"}


def provider_of(
    name: str,
    kernels: Mapping[DialectOp, Callable[..., Any]],
    *,
    description: str = "",
    vendors: Iterable[str] = ("nvidia", "amd", "cpu"),
    accepts: Accepts = accept_all,
    cost: Cost | None = None,
    most_rows: Callable[[Any], int] | None = None,
    uuid: Any = None,
) -> Provider:
    """A provider of one's own: it runs fused ops by given kernels.

    Args:
        name: unique among the providers that are handed over together.
        kernels: by fused op; a kernel takes and yields what the op's reference does.
        description: for a person.
        vendors: whose devices it serves.
        accepts: a check of arguments, as `Bindings`: None, or why it refuses them.
        cost: what a call takes: a `KernelCost`, microseconds, or a function of the arguments, as `Bindings` whose
            tensors have numbers for sizes and no data, that returns microseconds. None: nobody has said; the ops aren't
            applied before they were measured, unless they are forced or the policy is `ordered`.
        most_rows: how many rows of its first tensor a kernel takes, for given arguments, as attributes by the names
            that the op's schema has; a call of more runs the op's reference. None: any number.
        uuid: what tells the kernels and the check from former ones, such as a version or a hash of their source, or a
            function that returns it. Without it graphs are compiled, and kernels verified, anew at every start.

    Raises:
        RuleError: a kernel of that name is registered for one of the ops already.
        ConfigError: the cost is none of these.
    """
    checked_cost(cost)
    for op, kernel in kernels.items():
        implement(op, name, kernel, most_rows=most_rows)
    offers = {op.name: Offer(accepts=accepts, cost=cost, most_rows=most_rows) for op in kernels}
    return Provider(
        name=name, description=description, vendors=frozenset(vendors), package=None, install="", implements=offers,
        uuid=uuid,
    )  # fmt: skip


def without_shared_memory(providers: Iterable[Provider], why: str) -> list[Provider]:
    """The same without the kernels whose ranks meet in fuseplan's own workspaces; `why` is said of those.

    Args:
        providers: any.
        why: why the ranks can't have such memory.
    """

    def withdrawn(offers: Mapping[str, Offer]) -> Mapping[str, Offer]:
        refusing = Unshared(why=why)
        return {
            name: replace(offer, accepts=refusing) if ops[name].collective else offer for name, offer in offers.items()
        }

    return [
        replace(each, implements=withdrawn(each.implements), prices=withdrawn(each.prices)) if each.runs_alone else each
        for each in providers
    ]


ALL_FUSED = tuple(op.name for op in ops.values() if op.fused)

BUILT_IN_PROVIDERS: Sequence[Provider] = (
    Provider(
        name="torch",
        description="plain PyTorch, the reference of every fused op; NCCL and gloo",
        vendors=frozenset({"nvidia", "amd", "cpu"}),
        package=None,
        install="",
        implements=dict.fromkeys(ALL_FUSED, Offer()),
    ),
    SharedHeads(
        name=attention.SHARED,
        description="torch's attention kernels, on heads that queries share",
        vendors=frozenset({"nvidia", "amd", "cpu"}),
        package=None,
        install="",
        implements=attention.shared_offers(None),
        untested="not run on AMD's GPUs so far",
    ),
    Provider(
        name=attention.PACKED,
        description="torch's attention kernels, on one query token's heads stacked as tokens",
        vendors=frozenset({"nvidia", "amd", "cpu"}),
        package=None,
        install="",
        implements=attention.PACKED_OFFERS,
        untested="not run on AMD's GPUs so far",
    ),
    Provider(
        name="triton",
        description="fuseplan's own Triton kernels",
        vendors=frozenset({"nvidia", "amd"}),
        package="triton",
        install="pip install fuseplan[triton]",
        implements={name: Offer(accepts=accepts) for name, accepts in TRITON_ACCEPTS.items()},
        runs_alone=True,
        untested="not run on AMD's GPUs so far, and its all-reduces on no more than four GPUs",
    ),
    Provider(
        name="flashinfer",
        description="FlashInfer's all-reduce fusion and norms",
        vendors=frozenset({"nvidia"}),
        package="flashinfer",
        distribution="flashinfer-python",
        oldest=flashinfer.OLDEST,
        install="pip install -U flashinfer-python",
        implements=flashinfer.OFFERS,
    ),
    Provider(
        name="aiter",
        description="AITER's Triton add + RMSNorm + pad and custom all-reduce (ROCm)",
        vendors=frozenset({"amd"}),
        package="aiter",
        distribution="amd-aiter",
        oldest=aiter.OLDEST,
        install=f"install AITER {aiter.OLDEST} or newer from its ROCm release",
        implements=aiter.OFFERS,
        untested="not run on ROCm hardware so far: its calls are held against AITER's signatures alone",
    ),
)
