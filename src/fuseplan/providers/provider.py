"""`Provider`, the record of a provider of fused ops: its devices, requirements, limits, rounding and cost.

vLLM asks `rocm_aiter_ops.is_enabled()` in an `if` ladder of its pass manager; here each provider answers for itself,
and gives a reason.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from fuseplan.config import unknown
from fuseplan.devices import VENDOR_NAMES, DeviceProfile, local_vendor
from fuseplan.dialect import ActivationRounding, AttentionRounding, DialectOp, Rounding, implement, ops
from fuseplan.errors import ConfigError
from fuseplan.providers.declared import Cost, KernelCost, checked_cost
from fuseplan.providers.gates import Accepts, Offer, Unshared, accept_all
from fuseplan.providers.timing import Timing
from fuseplan.record import Reason, Refusal
from fuseplan.record.text import one_line

Needs = Callable[[Callable[[], Any], TorchDispatchMode], frozenset[object]]
"""A key of the machine code that a call needs, from the call and a mode in which tensors have no data."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A library that can implement fused ops.

    Attributes:
        name: unique.
        description: for a person.
        vendors: the vendors of the devices it serves.
        package: the Python package it needs; None if fuseplan's own requirements include it.
        distribution: the name under which the package is installed, where it differs.
        oldest: the first supported version of the package, if there is one.
        install: what to do where the package is missing or too old.
        implements: the fused ops, by name, that fuseplan runs by it.
        prices: further fused ops, by name, that its library has and the cost model prices, but that fuseplan doesn't
            call yet: they are candidates where a plan is only explained.
        runs_alone: whether its collective kernels use fuseplan's own workspaces: one rank can run those by itself, in
            `distributed.workspace.loopback`. Others are verified by all ranks of a group together, before the first
            run.
        timing: how the cost model prices its kernels; None: it doesn't know them, and offers without a cost are only
            assumed to save time.
        available: a function that returns None, or why the provider can't run on this machine; None: it needs only its
            package.
        untested: the hardware that its kernels haven't been run on, for a person; None if they have been run.
        needs: a key of the machine code that a call of its kernels needs, from tensors without data and their mode;
            None: its code doesn't depend on sizes.
        compile_ahead: compiles the code for all given calls of its kernels at once, and runs none; None: code is
            compiled at the first call.
        uuid: for a user's provider, a value, or a function that returns one, that changes with its kernels and checks;
            compiled graphs are cached under it. None: each of these functions has a `uuid` of its own, or graphs aren't
            cached.
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
    timing: Timing | None = None
    available: Callable[[], str | None] | None = None
    untested: str | None = None
    needs: Needs | None = None
    compile_ahead: Callable[[Iterable[Callable[[], Any]]], None] | None = None
    uuid: Any = None

    def offers(self, device: DeviceProfile | None = None) -> Mapping[str, Offer]:
        """The fused ops that are candidates; for a device other than this one, also the ops that are only priced."""
        return self.implements if device is None else {**self.prices, **self.implements}

    def runs(self, op: str) -> bool:
        """Whether a planned fused op, by name, is applied; ops that are only priced are not."""
        return op in self.implements

    def unavailable(self, device: DeviceProfile | None = None) -> Refusal | None:
        """Why this provider can't run, or None if it can.

        Args:
            device: a profile whose software is taken as present; None asks about this machine.
        """
        vendor = device.vendor if device else local_vendor()
        if vendor not in self.vendors:
            where = device.name if device else "this machine"
            served = " and ".join(VENDOR_NAMES[name] for name in sorted(self.vendors))
            return self._refuse(
                f"serves {served}, and {where} has {'no GPU' if vendor == 'cpu' else VENDOR_NAMES[vendor]}"
            )
        if device is not None:
            return None
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return self._refuse(f"the package {self.package} is not installed", fix=self.install)
        return self._outdated() or self._unready()

    def _unready(self) -> Refusal | None:
        """The refusal by its owner's `available`, or None."""
        if self.available is None:
            return None
        try:
            why = self.available()
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"can't tell whether {self.name} is available: {reason}") from error
        if why is not None and not isinstance(why, str):
            raise ConfigError(
                f"available() of {self.name} returns {one_line(repr(why), 80)}: allowed are None and a line that says "
                "why it can't run here"
            )
        return None if why is None else self._refuse(one_line(why), fix=self.install or None)

    def _outdated(self) -> Refusal | None:
        """The refusal of the installed package, or None."""
        if self.oldest is None:
            return None
        name, version = self.distribution or self.package, self.version()
        if version is None:
            detail = f"the package {self.package} that is installed isn't that of {name}"
        elif TorchVersion(version) < self.oldest:
            detail = f"{name} {version} is installed, and {self.oldest} is the oldest that will do"
        else:
            return None
        return self._refuse(detail, fix=self.install)

    def version(self) -> str | None:
        """The version of the package it needs; None if it needs none or the package isn't installed."""
        if self.package is None:
            return None
        try:
            return importlib.metadata.version(self.distribution or self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _refuse(self, detail: str, fix: str | None = None) -> Refusal:
        return Refusal(reason=Reason.PROVIDER, detail=detail, fix=fix)


def provider_of(
    name: str,
    kernels: Mapping[DialectOp, Callable[..., Any]],
    *,
    description: str = "",
    vendors: Iterable[str] = tuple(VENDOR_NAMES),
    accepts: Accepts = accept_all,
    roundings: Iterable[str] | None = None,
    most_rows: Callable[[Any], int] | None = None,
    available: Callable[[], str | None] | None = None,
    cost: Cost | Timing | None = None,
    uuid: Any = None,
) -> Provider:
    """A custom provider, which runs fused ops by the given kernels.

    Args:
        name: unique among the providers given together.
        kernels: kernels by fused op; a kernel has the arguments and results of the op's reference.
        description: for a person.
        vendors: the vendors of the devices it serves.
        accepts: a check of arguments, as `Bindings`, that returns a refusal or None.
        roundings: the conventions that the kernels compute, of `Rounding`, `ActivationRounding` or `AttentionRounding`;
            a graph with another rounding is refused, unless `allow_rounding_changes` is set. None: any requested one.
        most_rows: the most rows of its first tensor that a kernel takes, as a function of the arguments, which are
            attributes named as in the op's schema; a call with more runs the op's reference. None: any number.
        available: a function that returns None, or one line for reports on why the kernels can't run on this machine.
            It isn't called if the plan is for another device. None: they run on any device of `vendors`.
        cost: the cost of a call: a `Timing` such as `ONE_KERNEL`, as for fuseplan's own kernels; a `KernelCost`;
            microseconds; or a function that returns microseconds, given the arguments as `Bindings` whose tensors have
            no data and numbers as sizes. None: not declared; the ops aren't applied until they are measured, unless
            they are forced or the policy is `ordered`. A `Timing` prices ops that fuseplan has kernels for, and any
            other op as `KernelCost()`.
        uuid: a value that changes with the kernels and the check, such as a version or a hash of their source, or a
            function that returns it. Without it, graphs are compiled and kernels verified at every start.

    Raises:
        RuleError: a kernel of that name is already registered for one of the ops.
        ConfigError: an argument is none of these, or a convention or a vendor is unknown.
    """
    served = _served(vendors)
    for argument, value in (("accepts", accepts), ("most_rows", most_rows), ("available", available)):
        if not callable(value) and (value is not None or argument == "accepts"):
            raise ConfigError(f"{argument}={value!r}: give a function{'' if argument == 'accepts' else ', or None'}")
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
        raise ConfigError(f"provider {name!r}: a name is one word of letters, digits and underscores")
    if not isinstance(kernels, Mapping) or not all(isinstance(op, DialectOp) for op in kernels):
        raise ConfigError(f"kernels={kernels!r}: give a dict of kernels by the ops that `define` returned")
    timing = cost if isinstance(cost, Timing) else None
    declared = KernelCost() if isinstance(cost, Timing) else cost
    checked_cost(declared)
    conventions = None if roundings is None else _conventions(roundings)
    for op, kernel in kernels.items():
        implement(op, name, kernel, most_rows=most_rows)
    offer = Offer(accepts=accepts, roundings=conventions, cost=declared, most_rows=most_rows)
    return Provider(
        name=name, description=description, vendors=served, package=None, install="",
        implements={op.name: offer for op in kernels}, timing=timing, available=available, uuid=uuid,
    )  # fmt: skip


def _served(given: Iterable[str]) -> frozenset[str]:
    if isinstance(given, str) or not isinstance(given, Iterable) or not (served := frozenset(given)):
        raise ConfigError(f"vendors={given!r}: give a set of {', '.join(VENDOR_NAMES)}")
    for each in sorted(served - VENDOR_NAMES.keys(), key=str):
        raise unknown("vendor", str(each), VENDOR_NAMES)
    return served


def _conventions(given: Iterable[str]) -> frozenset[str]:
    known = {*map(str, Rounding), *map(str, ActivationRounding), *map(str, AttentionRounding)}
    if isinstance(given, str):
        raise ConfigError(f"roundings={str(given)!r}: give a set of conventions, {{{str(given)!r}}}")
    if not isinstance(given, Iterable) or not (conventions := frozenset(map(str, given))):
        raise ConfigError(f"roundings={given!r}: give a set of conventions, or None for any")
    for each in sorted(conventions - known):
        raise unknown("rounding", each, known)
    return conventions


def without_shared_memory(providers: Iterable[Provider], why: str) -> list[Provider]:
    """The providers without the collective kernels that use fuseplan's own workspaces.

    Args:
        providers: any providers.
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
