"""Sphinx configuration. The site is built without network, and needs none to be read."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import typer.main
from sphinx.domains.python import PyObject
from typer.testing import CliRunner

import fuseplan
from fuseplan.cli import app
from fuseplan.planner.costs import HARDWARE, SHIPPED, CostTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs import measured  # noqa: E402 - found by the line above

project = "fuseplan"
author = "fuseplan contributors"
version = release = fuseplan.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
nitpicky = True
nitpick_ignore_regex = [
    # Of other projects; their inventories can't be had without network.
    (r"py:.*", r"(torch|collections|pathlib|_?pytest|rich)\..*"),
    # Type variables.
    (r"py:class", r"fuseplan\.(frontend|record\.serialization)\.T"),
    # What only the devices that fuseplan brings are made of.
    (r"py:class", r"fuseplan\.devices\.hardware\.Hardware"),
    # What the manager is handed by other parts of fuseplan, and by nobody else.
    (r"py:class", r"fuseplan\.(config\.Environment|planner\.prices\.Prices|planner\.solver\.Solver)"),
]

html_theme = "furo"
html_title = f"fuseplan {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def _committed(name: str) -> dict[str, Any]:
    """A file of figures under benchmarks/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _figures() -> dict[str, str]:
    """The figures that pages quote, from the file that the benchmark wrote."""
    results = _committed("results/planning")
    contest, times = results["contest"], results["contest"]["fuseplan_ms"]
    tangled = {row["component"]: row for row in results["tangled"]}
    overlapping, random_pairs = tangled["overlapping regions"], tangled["random pairs"]
    last = results["scaling"][-1]
    misses = _committed("results/near_misses")
    ratios = {name: row["ratio"] for name, row in misses["workloads"].items()}
    as_built = [ratio for name, ratio in ratios.items() if ", " not in name]
    scaling: list[tuple[object, ...]] = [
        (f"{row['layers']:,}", f"{row['nodes']:,}", f"{row['planned_ms']:,.0f} ms", f"{row['us_per_node']:.0f} us")
        for row in results["scaling"]
    ]
    return {
        "planned_ms": f"{times['planned']['median']:.0f} ms",
        "solving_ms": f"{times['solving']['median']:.0f} ms",
        "total_ms": f"{times['total']['median']:.0f} ms",
        "sequential_ms": f"{contest['sequential_ms']['median']:.0f} ms",
        "ratio": f"{contest['ratio']:.0f}",
        "nodes": f"{contest['nodes']:,}",
        "planning_command": f"`{results['command']}`",
        "planning_machine": f"torch {results['versions']['torch']}, {results['machine']}, {results['date']}",
        "scaling": _table(("layers", "nodes", "planned in", "a node"), scaling),
        "scaling_layers": f"{last['layers']:,}",
        "tangled_candidates": f"{overlapping['candidates']:,}",
        "tangled_conflicts": f"{overlapping['conflicts']:,}",
        "tangled_gap": f"{overlapping['gap']:.0f}",
        "tangled_s": f"{overlapping['s']:.1f} s",
        "misses_least": f"{min(as_built):.0%}",
        "misses_most": f"{max(as_built):.0%}",
        "misses_worst": f"{max(ratios.values()):.0%}",
        "misses_command": f"`{misses['command']}`",
        "random_conflicts": f"{random_pairs['conflicts']:,}",
        "random_gap": f"{random_pairs['gap']:.0%}",
        "random_s": f"{random_pairs['s']:.1f} s",
    }


def _constants(device: str) -> str:
    """The constants of a device's cost model, with their sources."""
    rows = [
        (f"`{name}`", f"{constant.value:,.{2 if constant.unit == 'times' else 0}f} {constant.unit}", constant.source)
        for name, constant in HARDWARE[device].constants()
    ]
    return _table(("constant", "value", "source"), rows)


def _errors() -> str:
    """How far H200's and H100's models are from what was measured, column by column."""
    described, rows = _committed("results/region_h100x2")["columns"], list[tuple[object, ...]]()
    for name, error in _committed("results/reduces")["errors"].items():
        where, column = name.split(": ")
        if column in described or column == "flashinfer":
            what = described.get(column, "the faster of FlashInfer's two kernels, no pad")
            rows.append((f"`{column}`, {where}", what, "these", f"{error['median']:.0%}", f"{error['max']:.0%}"))
    runs = _committed("results/cost_model_h200")["committed"]
    before = _committed("data/h200x2-ar-add-rms-pad")["columns"]
    for column in dict.fromkeys(column for errors in runs.values() for column in errors):
        errors = [run[column] for run in runs.values() if column in run]
        medians = sorted(error["median"] for error in errors)
        span = f"{medians[0]:.0%} to {medians[-1]:.0%}"
        most = f"{max(error['max'] for error in errors):.0%}"
        fitted = "run 1, in part" if column in "UC" else "none"
        rows.append((f"`{column}`, h200 x 2 before", before[column], fitted, span, most))
    return _table(("column", "what was timed", "fitted to", "median error of a run", "largest"), rows)


def _published() -> str:
    """How the model does on published rows that were kept out of the fits."""
    score = _committed("results/published")
    factors = ", ".join(f"{row['factor']:g}" for row in score["crossovers"])
    rows = [
        ("which of two is faster", f"{score['signs']} rows", f"{score['signs_right']:.0%} right"),
        ("times", f"{score['times']} rows", f"median error of {score['median_error']:.0%}"),
        ("from which size on the other is faster", f"{len(score['crossovers'])} rows", f"off by factors of {factors}"),
    ]
    return _table(("what is asked", "of", "the model"), rows)


def _region(ranks: int) -> str:
    """The all-in-one kernel beside every alternative, by tokens."""
    rows: list[tuple[object, ...]] = []
    for row in _committed(f"results/region_h100x{ranks}")["rows"]:
        median, spread = row["all"]
        ratios = ("over_unfused", "over_peers_single", "over_best_single", "over_flashinfer_alone")
        figures = (f"{row[f'speedup_{name}']:.2f}" for name in ratios)
        limit = f"{row['share_of_limit']:.2f}" if row["tokens"] >= 1024 else ""
        rows.append((f"{row['tokens']:,}", f"{median:.2f} ({spread:.2f}) us", *figures, limit))
    others = ("others' best", "own, then a pad", "FlashInfer without pad", "limit")
    head = ("tokens", "one kernel", "beside unfused", *others)
    return _table(head, rows)


def _kernels() -> str:
    """Each kernel beside torch.compile's code and a copy, by rows."""
    result = _committed("results/kernels_h200")["rows"]
    sizes = sorted({row["rows"] for row in result})
    found = {(row["op"], row["rows"]): row for row in result}
    rows: list[tuple[object, ...]] = []
    for op in dict.fromkeys(row["op"] for row in result):
        times = [found[op, size] for size in sizes]
        rows.append((op, *(f"{row['speedup_over_torch_compile']:.2f}" for row in times)))
        rows.append(("of a copy's bandwidth", *(f"{100 * row['share_of_copy_bandwidth']:.0f} %" for row in times)))
    return _table(("rows", *(f"{size:,}" for size in sizes)), rows)


def _vllm_kernels() -> str:
    """How many times as long as ours vLLM's own kernels take, by rows."""
    result = [row for row in _committed("results/kernels_h200")["rows"] if "vllm" in row]
    sizes = sorted({row["rows"] for row in result})
    found = {(row["op"], row["rows"]): row["vllm"][0] / row["fused"][0] for row in result}
    rows = [(op, *(f"{found[op, size]:.2f}" for size in sizes)) for op in dict.fromkeys(row["op"] for row in result)]
    return _table(("rows", *(f"{size:,}" for size in sizes)), rows)


def _quantised_region() -> str:
    """What fp8 quantisation adds to the fused all-reduce, and the kernel beside others' in pairs, by tokens."""
    result = _committed("results/region_quantised_h200x2")["rows"]
    found = {(row["quantised"], row["tokens"]): row for row in result}
    rows: list[tuple[object, ...]] = []
    for tokens in sorted({row["tokens"] for row in result}):
        cells: list[str] = []
        for how in ("group", "token"):
            row = found[how, tokens]
            median, spread = row["fused"]
            cells += [f"{median:.2f} us ({spread:.2f})", f"{100 * row['over']:.0f} %", f"{row['times_faster']:.2f}"]
        rows.append((f"{tokens:,}", *cells))
    each = ("on top of no quantisation", "beside others' best")
    return _table(("tokens", "scales of 128", *each, "of a token", *each), rows)


def _quantised_steps() -> str:
    """Captured decode steps of models in fp8 beside what else could run them."""
    formats = {"fp8_rows": "a row", "fp8_blocks": "128 elements"}
    others = ("torch.compile", "fuseplan, attention alone", "fuseplan, quantisations left")
    lines: list[tuple[object, ...]] = []
    for (model, how, gpus), rows in measured.quantised_steps().items():
        for row in rows:
            us = row["fuseplan"][0]
            less = (f"{row[side][0]:,.0f} ({100 * (1 - us / row[side][0]):.0f} %)" for side in others)
            lines.append((f"`{model}`", formats[how], gpus, row["batch"], f"{us:,.0f}", *less))
    sides = ("plain `torch.compile` (less)", "attention's fusions alone (less)", "all but quantisations (less)")
    return _table(("model", "a scale for", "GPUs", "batch", "fuseplan", *sides), lines)


def _left_out() -> str:
    """How many rows lie in their intervals that weren't seen by the fit."""
    result = _committed("results/leave_one_out")
    rows: list[tuple[object, ...]] = []
    for name in ("one size left out", "one shape left out"):
        found, wide = result[name], result[name]["in intervals of 90 %"]
        for what in ("times", "savings"):
            shares = (f"{100 * each[what]['within']:.0f} %" for each in (found, wide))
            rows.append((name, f"{found[what]['rows']} {what}", *shares))
    between = result["rows of a table between two others"]
    held = f"{100 * between['within']:.0f} %"
    rows.append(("a table's size between two others", f"{between['rows']} times", held, ""))
    return _table(("", "rows", "in intervals of 80 %", "of 90 %"), rows)


def _host_cost() -> str:
    """What the host takes for a layer with a fused op, and with Inductor's kernels."""
    rows: list[tuple[object, ...]] = []
    for row in _committed("results/host_cost_h200")["rows"]:
        sides = ("{:.1f} ({:.1f}) us".format(*row[side]) for side in ("torch.compile", "fuseplan"))
        rows.append((f"`{row['op']}`", row["kernels"], *sides))
    return _table(("fused op", "kernels of Inductor's", "a layer, `torch.compile`", "a layer, fuseplan"), rows)


def _host_calls() -> str:
    """What the host takes for a call of a fused op, past torch's dispatcher and by it."""
    rows = [
        (f"`{row['op']}`", *("{:.1f} ({:.1f}) us".format(*row[side]) for side in ("dispatcher", "direct")))
        for row in _committed("results/host_cost_h200")["calls"]
    ]
    return _table(("fused op", "a call by torch's dispatcher", "as compiled code calls it"), rows)


def _nearer() -> str:
    found, head = _committed("results/nearer"), ("", "one graph", "split at attention")

    def of_torch_compile(row: dict[str, Any]) -> str:
        return f"{row['of_torch_compile']:.2f} ({row['least']:.2f} to {row['most']:.2f})"

    ways = found["one graph"]
    return _table(
        head, [(way, *(of_torch_compile(found[graphs][way]) for graphs in ("one graph", "split"))) for way in ways]
    )


def _vllm_turns() -> str:
    """Times of engines that took turns, fuseplan's with what it took more or less in the same turns."""
    rows: list[tuple[object, ...]] = []
    calls = {("ttft", "1 x 64"): "first token, 1 prompt of 64 tokens", ("ttft", "8 x 128"): "first token, 8 of 128",
             ("ttft", "32 x 1000"): "first token, 32 of 1,000", ("tpot", "32"): "a token, 32 requests",
             ("tpot", "1"): "a token, 1 request"}  # fmt: skip
    for row in _committed("results/vllm_turns_h200")["rows"]:
        model = f"{measured.NAMES[row['model']]}, {row['layers']} layers, TP={row['tp']}"
        for (kind, name), what in calls.items():
            times = ("{:.2f} ({:.2f} to {:.2f})".format(*row[side][kind][name]) if side in row else ""
                     for side in ("stock", "flags", "fuseplan"))  # fmt: skip
            against = (row["against"].get(side) for side in ("stock", "flags"))
            changes = ("" if each is None else "{:+.1%} ({:+.1%} to {:+.1%})".format(*each[kind][name])
                       for each in against)  # fmt: skip
            rows.append((model, what, *times, *changes))
            model = ""
    head = ("", "ms", "vLLM", "vLLM, its fusions on", "fuseplan", "against the former", "against the latter")
    return _table(head, rows)


def _decode() -> str:
    """A decode step on two GPUs: plain, without attention in the plan, and planned, by batch."""
    rows: list[tuple[object, ...]] = []
    sides = ("torch.compile", "without fuse_grouped_attention", "fuseplan")
    for row in _committed("results/decode_h200x2_captured")["rows"]:
        figures = ("{:,.0f} ({:,.0f}) us".format(*row[side]) for side in sides)
        faster = (f"{row['torch.compile'][0] / row[side][0]:.2f}" for side in sides[1:])
        rows.append((row["batch"], *figures, *faster))
    head = ("`torch.compile`", "`fuse_grouped_attention=False`", "fuseplan", "the former", "the latter")
    return _table(("batch", *head), rows)


def _tokens(row: dict[str, Any]) -> str:
    if row["tokens"] > 1:
        return f"{row['tokens']:,} into {row['cache']:,}"
    return f"1 at {row['position']:,} of {row['cache']:,}"


_SIDES = {
    "torch.compile": "`torch.compile`",
    "freezing": "`freezing=True`",
    "flex_attention": "`flex_attention`",
    "enable_gqa": "`enable_gqa` by hand",
    "hand-written": "written by hand",
    "fuseplan": "fuseplan",
}


def _decode_one_gpu() -> str:
    """A call of unmodified models on one GPU: plain, by others' means, and planned."""
    found = _committed("results/decode_one_gpu_h200")["rows"]
    sides = {side: head for side, head in _SIDES.items() if any(side in row for row in found)}
    limited = any("bytes_limit_us" in row for row in found)
    rows: list[tuple[object, ...]] = []
    for row in found:
        failed = dict.fromkeys(row.get("failed", {}), "fails")
        times = ("{:,.0f} ({:,.0f}) us".format(*row[side]) if side in row else failed.get(side, "") for side in sides)
        limit = [f"{row['bytes_limit_us']:,.0f} us" if "bytes_limit_us" in row else ""] if limited else []
        ratios = (row.get("times_faster", {}).get(side) for side in ("enable_gqa", "fuseplan"))
        faster = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        star = " *" if row.keys() & {"plan", "note"} else ""
        rows.append((f"`{row['model']}`{star}", row["batch"], _tokens(row), *times, *limit, *faster))
    limits = ["bytes' limit"] if limited else []
    head = ("model", "batch", "tokens", *sides.values(), *limits, "by hand", "fuseplan")
    return _table(head, rows)


def _bench() -> str:
    """What `fuseplan bench` printed of GPT-OSS: policies down, batches across."""
    result = _committed("results/bench_gpt_oss_120b_h100x2")
    batches = result["batches"]
    steps = [{row["policy"]: row for row in each["policies"]} for each in batches]
    rows: list[tuple[object, ...]] = []
    for policy in steps[0]:
        times = (each[policy] for each in steps)
        figures = (f"{row['step_ns'] / 1e6:.3f} ({row['spread_ns'] / 1e6:.3f}) ms" for row in times)
        rows.append((f"`{policy}`", *figures))
    return _table(("policy", *(f"batch {each['batch']}" for each in batches)), rows)


def _shipped_tables() -> str:
    """Each site of the package's cost tables: its device, sizes, and what was run."""
    rows: list[tuple[object, ...]] = []
    for path in sorted(SHIPPED.iterdir()):
        found: dict[str, list[Any]] = {}
        for row in CostTable.load(path).rows:
            found.setdefault(row.key.rpartition(": ")[0], []).append(row)
        for site, each in found.items():
            sizes = [row.tokens for row in each]
            alternatives = len({row.key for row in each})
            first = each[0]
            ran = f"torch {first.torch}, Triton {first.triton}, {first.date}"
            rows.append((path.stem, f"`{site}`", alternatives, f"{min(sizes):,} to {max(sizes):,}", ran))
    return _table(("device", "site", "alternatives", "rows", "ran"), rows)


def _table(head: tuple[object, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


tables = {
    "h200_constants": _constants("h200"),
    "h200_errors": _errors(),
    "shipped_tables": _shipped_tables(),
    "published_score": _published(),
    "left_out": _left_out(),
    "region_h100x2": _region(2),
    "region_h100x4": _region(4),
    "kernels_h200": _kernels(),
    "vllm_kernels_h200": _vllm_kernels(),
    "quantised_steps": _quantised_steps(),
    "region_quantised_h200x2": _quantised_region(),
    "host_cost_h200": _host_cost(),
    "host_calls_h200": _host_calls(),
    "nearer": _nearer(),
    "vllm_turns": _vllm_turns(),
    "decode_h200x2": _decode(),
    "decode_one_gpu_h200": _decode_one_gpu(),
    "bench_gpt_oss_h100x2": _bench(),
}


def _help(*command: str) -> str:
    """What a command prints when it is asked for help."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="fuseplan", env={"COLUMNS": "100"})
    return f"```none\n{result.output.rstrip()}\n```"


helps = {"help": _help(), **{f"help_{name}": _help(name) for name in typer.main.get_command(app).commands}}
facts = {
    "measured": re.sub(r"\[JSON\]\(benchmarks/results/(\S+)\)", r"`\1`", measured.table()),
    "gpus_run": measured.gpus_run(),
    "ranks_run": measured.ranks_run(),
    "engines_run": measured.engines_run(),
    "in_short": measured.in_short(),
}
myst_substitutions = {**_figures(), **tables, **facts, **helps}


def shorten_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Records list their fields below; nobody calls them with all of them, so the list isn't repeated above."""
    if dataclasses.is_dataclass(obj) and re.match(r"fuseplan\.(record|report)\.", str(getattr(obj, "__module__", ""))):
        return "", None
    return None


def shorten_types(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Fields' types by their last names, as in signatures; napoleon writes them in full."""
    for index, line in enumerate(lines):
        if line.startswith(":vartype "):
            lines[index] = re.sub(r"\b((?:collections|fuseplan|pathlib|torch)\.[\w.]+)", r"~\1", line)


def setup(app: Any) -> None:
    """Sphinx's entry point."""
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", shorten_types, priority=900)  # after napoleon
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
