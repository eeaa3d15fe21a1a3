"""A `Bench` as a picture: PNG and SVG."""

import io
import textwrap
from pathlib import Path
from typing import Any

from fuseplan.errors import ReportError
from fuseplan.record.bench import PLAIN, BatchTimes, Bench
from fuseplan.record.files import check_writable, write_whole, writing
from fuseplan.report.bench import change_text, time_text

PLANNED, OTHER, WITHOUT, INK, FAINT = "#0b6e4f", "#a9b8c6", "#5d6d7e", "#1c2833", "#d5dbe1"
COLUMNS = 3
MISSING = "a plot needs matplotlib: pip install matplotlib"


def check_plot(path: Path) -> None:
    """Finds out early that `save_plot` would fail.

    Raises:
        ReportError: matplotlib isn't installed, or the files can't be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError(MISSING) from None
    for file in plot_files(path):
        with writing("plot", file, ReportError):
            check_writable(file)


def plot_files(path: Path) -> tuple[Path, Path]:
    """The PNG and the SVG for a path, with or without one of their suffixes."""
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path
    return stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")


def save_plot(bench: Bench, path: Path) -> tuple[Path, Path]:
    """Writes the picture as PNG and as SVG, each whole or not at all.

    Raises:
        ReportError: matplotlib isn't installed, or a file can't be written.
    """
    check_plot(path)
    import matplotlib as mpl

    # Text stays text, without the time of day, so that equal figures are equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fuseplan", "font.family": "sans-serif"}):
        figure = _figure(bench)
        for file in plot_files(path):
            kind = file.suffix[1:]
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
            with writing("plot", file, ReportError):
                write_whole(file, content.getvalue())
    return plot_files(path)


def _figure(bench: Bench) -> Any:
    """Panels side by side, one a batch size: the time of a step under each policy, from zero, with its spread."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(bench.batches))
    rows = -(-len(bench.batches) // columns)
    policies = max(len(times.policies) for times in bench.batches)
    height = 1.0 + rows * (0.75 + 0.42 * policies)
    figure = Figure(figsize=(2.2 + 3.6 * columns, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, times in enumerate(bench.batches):
        _panel(axes[index // columns][index % columns], times, names=index % columns == 0)
    for index in range(len(bench.batches), rows * columns):
        axes[index // columns][index % columns].set_axis_off()
    figure.suptitle(f"{bench.workload}: time of a step", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    about = (
        f"TP={bench.tp}, {bench.device}, torch {bench.torch}; median and interquartile range of {bench.repeats} "
        "repeats. In brackets: 95 % interval of the paired difference to torch.compile"
    )
    figure.supxlabel(about, x=0.01, ha="left", fontsize=8, color=WITHOUT)
    return figure


def _wrapped(policy: str) -> str:
    """A long order on several lines."""
    return "\n".join(textwrap.wrap(policy, 26, break_long_words=False))


def _panel(axes: Any, times: BatchTimes, *, names: bool) -> None:
    """Bars from zero, the plan's in its own colour; whiskers are the interquartile range."""
    unit, size = ("ms", 1e6) if max(each.step_ns for each in times.policies) >= 1e6 else ("us", 1e3)
    places = range(len(times.policies))
    for place, each in zip(places, times.policies, strict=True):
        colour = PLANNED if each.policy == "planned" else WITHOUT if each.policy == PLAIN else OTHER
        axes.barh(place, each.step_ns / size, height=0.62, color=colour, zorder=2)
        half = each.spread_ns / 2 / size
        axes.errorbar(each.step_ns / size, place, xerr=half, color=INK, capsize=2.5, elinewidth=1, zorder=3)
        text = "  ".join(filter(None, (time_text(each.step_ns), change_text(times, each))))
        end = (each.step_ns + each.spread_ns / 2) / size
        weight = "bold" if each.policy == "planned" else "normal"
        axes.annotate(
            text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK,
            fontweight=weight, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=4,
        )  # fmt: skip
    longest = max(each.step_ns + each.spread_ns / 2 for each in times.policies) / size
    axes.set_xlim(0, longest * 1.5)
    axes.set_ylim(len(times.policies) - 0.45, -0.55)
    axes.set_yticks(places, [_wrapped(each.policy) for each in times.policies] if names else [])
    fastest = max(times.tokens_per_s(each) for each in times.policies)
    axes.set_title(f"batch {times.batch}, up to {fastest:,.0f} tokens/s", loc="left", fontsize=10, color=INK)
    axes.set_xlabel(f"{unit} a step", fontsize=8.5, color=WITHOUT)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=WITHOUT)
    axes.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(side == "left")
    axes.spines["left"].set_color(WITHOUT)
