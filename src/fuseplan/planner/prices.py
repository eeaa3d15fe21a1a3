"""Where prices come from: the model of a device, and measured rows."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fuseplan.caching.content import content_of
from fuseplan.devices.hardware import FUSED, GENERATED, Error
from fuseplan.planner.alternatives import row_key
from fuseplan.planner.costs import ROW, CostModel, CostTable, Estimate, Exposure
from fuseplan.rules.families.sites import Shape
from fuseplan.rules.parts.traffic import Kernel, Tail


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Where prices come from.

    Attributes:
        model: of the device that the plan is for.
        table: measured rows, or a user's own.
        source: model or table; `auto` takes the table where it has all rows of a component, and else the model.
    """

    model: CostModel
    table: CostTable | None = None
    source: str = "auto"
    _cache: dict[Hashable, Estimate] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> list[str]:
        """The fields that a plan depends on."""
        model = [self.model.name, self.model.pad, content_of(self.model.hardware).digest]
        return [*model, self.source, self.table.digest if self.table else ""]

    @property
    def launch_ns(self) -> int:
        """The time of a kernel with next to no work."""
        return round(self.model.hardware.launch.value)

    @property
    def errors(self) -> Mapping[str, Error]:
        """How far off the model is on the device."""
        return self.model.hardware.errors

    def unfused(self, shape: Shape) -> Estimate:
        """A site as Inductor leaves it, by the model."""
        return self._once((shape,), lambda: shape.unfused(self.model))

    def fused(self, shape: Shape, provider: str, *, reduce: bool, tail: Tail | None) -> Estimate:
        """A fused op at a site, by the model."""
        key = (shape, provider, reduce, tail)
        return self._once(key, lambda: of_fused_op(shape.fused(self.model, provider, reduce=reduce, tail=tail)))

    def within(self, shape: Shape, provider: str, *, reduce: bool, tail: Tail | None) -> Estimate:
        """The time that a site adds to another site's fused op that fuses parts of it, by the model."""
        key = ("within", shape, provider, reduce, tail)
        return self._once(key, lambda: of_fused_op(shape.within(self.model, provider, reduce=reduce, tail=tail)))

    def rest(self, shape: Shape, *, reduce: bool, tail: Tail | None) -> Estimate:
        """The parts of a site that a fused op leaves, by the model."""
        return self._once((shape, reduce, tail), lambda: shape.rest(self.model, reduce=reduce, tail=tail))

    def _once(self, key: Hashable, compute: Callable[[], tuple[Kernel, ...]]) -> Estimate:
        if key not in self._cache:
            self._cache[key] = Estimate.of(compute())
        return self._cache[key]

    def times(self, signature: str, alternative: str, rows: Sequence[int]) -> "list[tuple[int, int]] | None":
        """(time, spread) in ns of a component under an alternative, by size; None where the table lacks a size."""
        assert self.table is not None
        times = [self.table.interpolate(row_key(signature, alternative), each) for each in rows]
        known = [time for time in times if time is not None]
        return known if len(known) == len(times) else None

    def deviations(self, signature: str, alternatives: tuple[str, str], rows: int) -> Exposure:
        """The exposure of the difference of two alternatives in the table, at one size."""
        assert self.table is not None
        keys = [row_key(signature, each) for each in alternatives]
        return {f"{ROW}{key}": sign * self.table.deviation(key, rows) for key, sign in zip(keys, (1, -1), strict=True)}


def of_fused_op(kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """Kernels of a fused op, none of which Inductor generates."""
    return tuple(
        replace(each, kind=each.kind.replace(GENERATED, FUSED)) if GENERATED in each.kind else each for each in kernels
    )
