"""Fits how far the cost model is off, and tries the intervals on what the fit hasn't seen: on each size and each shape
that is left out, and on rows of a table between their neighbours.

    PYTHONPATH=src:. python benchmarks/leave_one_out.py [--write]

Rows are those of benchmarks/measured_rows.py: times of sites on H100 and H200, fused and not, and what fusing saves.
Each kind of kernel errs in what doesn't depend on the bytes and in what does, on the side of shorter times and of
longer ones, by itself and in common with the kernels that it replaces. These shares are fitted by the interval score,
which rewards narrow intervals and fines rows outside of them, at a level of which one row in ten is outside. They are
called intervals of 80 %, which is what they hold of rows left out; those of 90 % are 1.28 times as wide. Where
exchanges between ranks are left out, their constants are fitted anew as benchmarks/calibrate_reduces.py does; those of
linear layers are means.
"""

import argparse
import datetime
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from benchmarks import calibrate_reduces
from benchmarks.calibrate_reduces import with_values
from benchmarks.measured_rows import LINEAR, RANKS, Measured, linear_constants, rows
from fuseplan.devices.errors import SIDES
from fuseplan.planner.costs import HARDWARE, SHIPPED, CostTable, Estimate, Hardware
from fuseplan.planner.costs.estimate import HALF_WIDTH
from fuseplan.planner.costs.table import MEDIAN_OF_FIVE

OUTSIDE = 0.1
"""Of the rows that a fit sees, those outside of the intervals."""
OF_SAVINGS, OF_TIMES = 2.0, 0.1
"""Weights: plans are decided by savings."""
START, NEAR, NEAR_COMMON, PULL = 0.1, 0.02, 0.2, 0.005
"""Where the fit starts, what shares are held near, and how much."""
LEAST, MOST = 0.001, 3.0
BY_BYTES = 0.002
"""At most what a linear layer errs by itself in reading its weights, since both sides read the same as fast; what they
have in common is fitted. Nor does a quantisation in Inductor's own kernel take less than the model's, or a fused one
more, by a share of the bytes."""
OF_NINETY = 1.645 / 1.2816
"""Times as wide as an interval of 80 %: one of 90 %."""
REGRET = 0.02
"""Of the fastest alternative's time: what a choice may cost."""
REST = 0.005
"""Of a time: what no repeats show."""


@dataclass(frozen=True)
class Quantity:
    """A time or a saving.

    Attributes:
        row: its site.
        what: the alternative.
        is_saving: whether it is what that saves beside the site unfused.
        modelled: in us, with what its error comes from.
        measured: in us.
        noise: standard deviation of `measured`.
        whole: a modelled time that the error is judged by.
    """

    row: Measured
    what: str
    is_saving: bool
    modelled: Estimate
    measured: float
    noise: float
    whole: float

    @property
    def off(self) -> float:
        """us more than modelled."""
        return self.measured - self.modelled.ns / 1e3


def quantities(found: Sequence[Measured], changed: Callable[[str], Hardware]) -> list[Quantity]:
    """Of rows, by constants of their devices."""
    result = []
    for row in found:
        sides = (row.unfused, *row.fused)
        times = [Estimate.of(each.kernels(changed(row.device))) for each in sides]
        noises = [max(MEDIAN_OF_FIVE * each.spread_us, REST * each.us) for each in sides]
        for side, time, noise in zip(sides, times, noises, strict=True):
            result.append(Quantity(row, side.what, False, time, side.us, noise, time.ns / 1e3))
        for side, time, noise in zip(sides[1:], times[1:], noises[1:], strict=True):
            result.append(
                Quantity(
                    row, side.what, True, times[0] - time, sides[0].us - side.us, math.hypot(noises[0], noise),
                    times[0].ns / 1e3,
                )
            )  # fmt: skip
    return result


@dataclass(frozen=True)
class Fit:
    """Shares by the source of the error, on either side."""

    sources: tuple[str, ...]
    less: NDArray[Any]
    more: NDArray[Any]

    def half_widths(self, found: Sequence[Quantity]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Below and above, in us, with the noise of what was measured."""
        matrix = exposures(found, self.sources)
        noise = np.array([each.noise for each in found])
        return _half_widths(matrix, noise, self.less, self.more)

    def holds(self, found: Sequence[Quantity], times: float = 1.0) -> NDArray[Any]:
        """Which of them lie in their intervals, or in ones so many times as wide."""
        below, above = (times * each for each in self.half_widths(found))
        off = np.array([each.off for each in found])
        return (off >= -below) & (off <= above)


def exposures(found: Sequence[Quantity], sources: Sequence[str]) -> NDArray[Any]:
    return np.array([[each.modelled.exposure.get(source, 0.0) / 1e3 for source in sources] for each in found])


def _half_widths(matrix: Any, noise: Any, less: Any, more: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    plus, minus = np.maximum(matrix, 0), np.maximum(-matrix, 0)
    below = np.sqrt(((plus * less) ** 2 + (minus * more) ** 2).sum(1) + noise**2)
    above = np.sqrt(((plus * more) ** 2 + (minus * less) ** 2).sum(1) + noise**2)
    return HALF_WIDTH * below, HALF_WIDTH * above


def fit(found: Sequence[Quantity]) -> Fit:
    """The shares that score best."""
    sources = tuple(sorted({source for each in found for source in each.modelled.exposure}))
    matrix, noise = exposures(found, sources), np.array([each.noise for each in found])
    off, count = np.array([each.off for each in found]), len(sources)
    many = Counter((each.row.family, each.is_saving) for each in found)
    weight = np.array(
        [
            (OF_SAVINGS if each.is_saving else OF_TIMES) / math.sqrt(many[each.row.family, each.is_saving]) / each.whole
            for each in found
        ]
    )
    near = np.array([NEAR_COMMON if _is_common(source) else NEAR for source in sources] * 2)
    most = np.array([MOST] * 2 * count)
    for index, source in enumerate(sources):
        if source in ("linear, moved", "skinny, moved"):
            most[[index, count + index]] = BY_BYTES
        if source == "generated quant, moved":
            most[index] = LEAST
        if source == "fused quant, moved":
            most[count + index] = LEAST

    def score(logs: NDArray[Any]) -> float:
        shares = np.exp(logs)
        below, above = _half_widths(matrix, noise, shares[:count], shares[count:])
        fines = np.maximum(-below - off, 0) + np.maximum(off - above, 0)
        return float((weight * (below + above + 2 / OUTSIDE * fines)).sum() + PULL * ((logs - np.log(near)) ** 2).sum())

    start = np.log(np.clip(np.maximum(near, START), LEAST, most))
    bounds = [(math.log(LEAST), math.log(each)) for each in most]
    best = minimize(score, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 400, "maxfun": 10**6})
    shares = np.exp(best.x)
    return Fit(sources, shares[:count], shares[count:])


def _is_common(source: str) -> bool:
    return source.partition(",")[0] in SIDES.values()


def without(left_out: Sequence[Measured]) -> Callable[[str], Hardware]:
    """Devices as they would be known if some rows hadn't been measured."""
    (family,) = {row.family for row in left_out}
    if family == RANKS:
        gone = {(row.device, row.ranks, row.size) for row in left_out}
        ours = [row for row in calibrate_reduces.regions() if (row.device, row.ranks, row.tokens) not in gone]
        tables = [row for row in calibrate_reduces.published() if row.device in HARDWARE.keys() & {"h100", "h200"}]
        values = {name: each["value"] for name, each in calibrate_reduces.fit("h200", [*ours, *tables]).items()}
    elif family == LINEAR:
        gone = {(row.shape, row.size) for row in left_out}
        values = linear_constants([row for row in rows() if (row.shape, row.size) not in gone and row.family == family])
    else:
        return HARDWARE.__getitem__
    changed = {device: with_values(HARDWARE[device], values) for device in ("h100", "h200")}
    return changed.__getitem__


def left_out(found: Sequence[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    """Each size of a family, and each shape."""
    for name in ("size", "shape"):
        for family in dict.fromkeys(row.family for row in found):
            members = [row for row in found if row.family == family]
            for value in dict.fromkeys(getattr(row, name) for row in members):
                yield name, [row for row in members if getattr(row, name) == value]


def tried(found: Sequence[Measured]) -> dict[str, Any]:
    """Of rows that neither constants nor intervals are fitted on, how many lie in the intervals."""
    counts, wide = Counter[tuple[str, str, str, bool]](), Counter[tuple[str, str, str, bool]]()
    for name, gone in left_out(found):
        devices = without(gone)
        kept = [row for row in found if row not in gone]
        unseen = quantities(gone, devices)
        best = fit(quantities(kept, devices))
        for counted, times in ((counts, 1.0), (wide, OF_NINETY)):
            for quantity, held in zip(unseen, best.holds(unseen, times), strict=True):
                what = "savings" if quantity.is_saving else "times"
                counted[name, quantity.row.family, what, bool(held)] += 1
    result: dict[str, Any] = {}
    for name in ("size", "shape"):
        of_name = {key[1:]: count for key, count in counts.items() if key[0] == name}
        families = dict.fromkeys(family for family, _, _ in of_name)
        result[f"one {name} left out"] = {
            **{what: _share(of_name, what=what) for what in ("times", "savings")},
            "in intervals of 90 %": {
                what: _share({key[1:]: count for key, count in wide.items() if key[0] == name}, what=what)
                for what in ("times", "savings")
            },
            "by_family": {
                family: {what: _share(of_name, what=what, family=family) for what in ("times", "savings")}
                for family in families
            },
        }
    return result


def _counted(found: Sequence[Quantity], held: Sequence[Any]) -> Counter[tuple[str, str, bool]]:
    names = ("savings" if each.is_saving else "times" for each in found)
    return Counter(("", name, bool(each)) for name, each in zip(names, held, strict=True))


def _share(counts: Any, *, what: str, family: str | None = None) -> dict[str, Any]:
    chosen = {key: count for key, count in counts.items() if key[1] == what and family in (None, key[0])}
    total, held = sum(chosen.values()), sum(count for key, count in chosen.items() if key[2])
    return {"rows": total, "within": round(held / total, 3)}


def interpolated() -> dict[str, Any]:
    """Of each row of the package's tables between two others, whether the interval of its neighbours holds it."""
    held = []
    for path in sorted(SHIPPED.iterdir()):
        table = CostTable.load(path)
        for row in table.rows:
            others = CostTable(device=table.device, rows=tuple(each for each in table.rows if each is not row))
            found = others.interpolate(row.key, row.tokens)
            if found is not None:
                deviation = math.hypot(others.deviation(row.key, row.tokens), MEDIAN_OF_FIVE * row.spread_ns)
                held.append(abs(found[0] - row.time_ns) <= HALF_WIDTH * deviation)
    return {"rows": len(held), "within": round(sum(held) / len(held), 3)}


def regrets() -> dict[str, Any]:
    """What choices cost that are made without a size: at each site and size of the package's tables, how much
    longer the alternative takes that is the fastest by the sizes around it than the fastest one.
    """
    found = []
    for path in sorted(SHIPPED.iterdir()):
        table = CostTable.load(path)
        sites: dict[tuple[str, int], dict[str, int]] = {}
        for row in table.rows:
            sites.setdefault((row.key.partition(": ")[0], row.tokens), {})[row.key] = row.time_ns
        for (_, tokens), times in sites.items():
            others = CostTable(device=table.device, rows=tuple(each for each in table.rows if each.tokens != tokens))
            around = {key: others.interpolate(key, tokens) for key in times}
            if all(around.values()):
                chosen = min(times, key=lambda key: around[key] or (0, 0))
                found.append(times[chosen] / min(times.values()) - 1)
    within = sum(regret <= REGRET for regret in found) / len(found)
    return {"choices": len(found), "within": round(within, 3), "most": round(max(found), 4)}


def result() -> dict[str, Any]:
    """All of it."""
    found = rows()
    seen = quantities(found, HARDWARE.__getitem__)
    best = fit(seen)
    held = best.holds(seen)
    names = dict.fromkeys(source.partition(",")[0] for source in best.sources)
    shares = dict(zip(best.sources, zip(best.less, best.more, strict=True), strict=True))
    return {
        "errors": {
            name: [round(float(share), 3) for part in ("fixed", "moved") for share in shares.get(f"{name}, {part}", ())]
            for name in names
        },
        "seen": {what: _share(_counted(seen, held), what=what) for what in ("times", "savings")},
        **tried(found),
        "rows of a table between two others": interpolated(),
        f"choices by the sizes around, within {REGRET:.0%} of the fastest": regrets(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/leave_one_out.json")
    write = parser.parse_args().write
    found = {
        "what": "rows within the interval of 80 %, as shares, and how far the model is off by the kind of kernel: "
        "standard deviations as shares of what it says, of times that don't depend on the bytes (less, more) and of "
        "those that do (less, more)",
        "command": "PYTHONPATH=src:. python benchmarks/leave_one_out.py --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "no device: committed results of H100 and H200",
        **result(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if write:
        (Path(__file__).parent / "results/leave_one_out.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
