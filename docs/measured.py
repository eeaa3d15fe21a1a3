"""What was measured, read from `benchmarks/results`: the table and the chart of README, and facts that pages state.

make pictures                             # writes README's table anew, and the chart
PYTHONPATH=src:. python docs/make_pictures.py measured.svg README.md
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from docs.blocks import ROOT

RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
START, END = "<!-- measured: written by make pictures -->", "<!-- /measured -->"

NAMES = {"llama-3.1-8b": "Llama-3.1-8B", "llama-3.1-8b-fp8": "Llama-3.1-8B in fp8", "qwen3-8b": "Qwen3-8B",
         "gemma-3-12b": "Gemma-3-12B", "gpt-oss-20b": "gpt-oss-20b", "gpt-oss-120b": "gpt-oss-120b"}  # fmt: skip


def committed(name: str) -> dict[str, Any]:
    """A file of measured results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


class Gain(NamedTuple):
    """One bar: whole steps, times as fast as the same without fuseplan.

    Attributes:
        label: what differs within the group.
        times: under the default configuration, or the one that the group names.
        is_clear: whether the quartiles of both sides lie apart.
    """

    label: str
    times: float
    is_clear: bool = True


@dataclass(frozen=True)
class Group:
    """Bars of one model on one machine."""

    title: str
    gains: Sequence[Gain]


# The chart.


def groups() -> list[Group]:
    """Whole decode steps, as they were measured beside plain `torch.compile` or vLLM."""
    return [*_one_gpu(), *_in_fp8(), _tensor_parallel(), _orders(), *_vllm()]


def _one_gpu() -> Iterator[Group]:
    found = committed("decode_one_gpu_h200")
    steps = decode_steps(found)
    for model in dict.fromkeys(row["model"] for row in steps):
        gains = []
        for row in (each for each in steps if each["model"] == model):
            times = row["times_faster"]
            gains.append(Gain(f"batch {row['batch']}", times["fuseplan"]))
        yield Group(f"{NAMES[model]}, Hugging Face, one {gpu(found)}", gains)


def decode_steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Decode steps in bfloat16, on caches of usual length, that were measured with the present kernels."""
    rows: list[dict[str, Any]] = found["rows"]
    return [
        row for row in rows
        if row["tokens"] == 1 and row["dtype"] == "bfloat16" and row["cache"] <= 4096 and "note" not in row
    ]  # fmt: skip


def _in_fp8() -> Iterator[Group]:
    """Models in fp8, each step in one CUDA graph."""
    for (model, how, gpus), rows in quantised_steps().items():
        gains = [Gain(f"batch {row['batch']}", times_of(row)) for row in rows]
        yield Group(f"{NAMES[model]} in fp8, {SCALES[how]}, Hugging Face, {gpus}", gains)


SCALES = {"fp8_rows": "a scale a row", "fp8_blocks": "a scale for 128"}


def quantised_steps() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Captured decode steps in fp8 by model, format and GPUs."""
    one, two = committed("decode_one_gpu_quantised_h200"), committed("decode_quantised_h200x2_captured")
    steps: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in one["rows"]:
        if row.get("captured"):
            steps.setdefault((row["model"], row["quantised"], _gpus(1, one)), []).append(row)
    steps[two["model"], two["quantised"], _gpus(two["ranks"], two)] = two["rows"]
    return {place: sorted(rows, key=lambda row: int(row["batch"])) for place, rows in steps.items()}


def times_of(row: dict[str, Any]) -> float:
    """How many times as fast as plain `torch.compile` fuseplan is."""
    return float(row["torch.compile"][0] / row["fuseplan"][0])


def _tensor_parallel() -> Group:
    found = committed("decode_h200x2_captured")
    gains = [Gain(f"batch {row['batch']}", times_of(row)) for row in found["rows"]]
    return Group(f"Llama-3.1-8B, Hugging Face, {found['ranks']} {gpu(found)}s", gains)


def _orders() -> Group:
    found = committed("bench_gpt_oss_120b_h100x2")
    gains = [
        Gain(f"batch {each['batch']}", 1 / (1 + row["change"]), is_clear=not row["noise"])
        for each in found["batches"]
        for row in each["policies"]
        if row["policy"] == "planned"
    ]
    return Group(f"gpt-oss-120b, plain PyTorch, {found['tp']} {found['device'].upper()}s", gains)


def _vllm() -> Iterator[Group]:
    found = committed("vllm_turns_h200")
    for row in found["rows"]:
        stock, planned = (row[side]["tpot"] for side in ("stock", "fuseplan"))
        gains = []
        for count in sorted(stock, key=int):
            (before, low, high), (after, least, most) = stock[count], planned[count]
            is_clear = most < low or high < least
            gains.append(Gain(_count(int(count), "request"), before / after, is_clear=is_clear))
        version = ".".join(row["stock"]["vllm"].split(".")[:2])
        yield Group(f"{NAMES[row['model']]}, vLLM {version}, {_gpus(row['tp'], found)}", gains)


def _gpus(count: int, found: dict[str, Any]) -> str:
    """`one H200`, `2 H200s`."""
    return f"one {gpu(found)}" if count == 1 else f"{count} {gpu(found)}s"


WIDTH, ROW, TITLE, LEFT, TOP, SIDE = 860, 15, 26, 120, 62, 16
LEAST = 0.75
"""Where the axis starts."""
STYLE = """
svg { --ground: #f7f8fa; --frame: #d4d9e0; --ink: #1f2733; --dim: #5c6773; --bar: #1f6feb }
@media (prefers-color-scheme: dark) { svg { --ground: #14181f; --frame: #2c3440; --ink: #d7dde5; --dim: #8b96a5;
--bar: #4c8df6; } }
.of-flashinfer { fill: #3a9d5d } .of-nccl { fill: #c77d1a } .of-symmetric { fill: #8a63d2 } .on { fill: #fff }
.ground { fill: var(--ground); stroke: var(--frame) } .grid { stroke: var(--frame) } .one { stroke: var(--dim) }
text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
.head { font-weight: 700; paint-order: stroke; stroke: var(--ground); stroke-width: 5px }
.dim { fill: var(--dim) } .end { text-anchor: end } .middle { text-anchor: middle }
.box { fill: none; stroke: var(--dim) } .arrow { fill: none; stroke: var(--bar); stroke-width: 1.5 }
.bar { fill: var(--bar) } .unclear { fill: none; stroke: var(--dim); stroke-dasharray: 3 2 }
"""


def gains() -> str:
    """Whole decode steps."""
    return chart("A decode step with fuseplan, times as fast as the same model without it", groups())


def region() -> str:
    """The all-in-one kernel beside others' best."""
    found = [committed(name) for name in ("region_h100x2", "region_h100x4", "region_h200x2")]
    shown = [
        Group(
            f"{each['ranks']} {gpu(each)}s, beside the best of {_peers(each)}",
            [Gain(_count(row["tokens"], "token"), row["speedup_over_peers_single"]) for row in each["rows"]],
        )
        for each in found
    ]
    return chart("All-reduce + add + RMSNorm + pad in one kernel, times as fast as others' best single fusion", shown)


def kernels() -> str:
    """Kernels alone, at the fewest, a middle and the most rows."""
    found = committed("kernels_h200")
    sizes = sorted({row["rows"] for row in found["rows"]})
    chosen = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    speedups = {(row["op"], row["rows"]): row["speedup_over_torch_compile"] for row in found["rows"]}
    shown = [
        Group(op, [Gain(_count(size, "row"), speedups[op, size]) for size in chosen if (op, size) in speedups])
        for op in dict.fromkeys(row["op"] for row in found["rows"])
    ]
    return chart(f"Kernels on one {gpu(found)}, times as fast as torch.compile's own code", shown)


def crossover() -> str:
    """Which of others' kernels is the fastest at each size, measured and by the model."""
    found, drawn, y = committed("crossover"), list[str](), TOP - 20
    kinds = {"FlashInfer": "of-flashinfer", "NCCL": "of-nccl", "symmetric memory": "of-symmetric"}
    sizes = sorted({row["tokens"] for row in found["rows"]})
    step = (WIDTH - LEFT - SIDE) / len(sizes)
    for device, ranks in dict.fromkeys((row["device"], row["ranks"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["device"], row["ranks"]) == (device, ranks)]
        tried = [name.replace("symmetric", "torch's symmetric") for name in kinds if name in rows[0]["measured"]]
        y += TITLE
        drawn.append(text(SIDE, y - 7, f"{ranks} {device.upper()}s: {_listed(tried)}", "head"))
        for side in ("measured", "modelled"):
            drawn.append(text(LEFT - 8, y + ROW - 4, side, "dim end"))
            for row in rows:
                name, times = row["fastest_of_others"][side], row[side]
                x = LEFT + step * sizes.index(row["tokens"])
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{step - 2:.1f}" height="{ROW}" class="{kinds[name]}"/>'
                    + text(
                        round(x + step / 2 - 1, 1), y + ROW - 4, f"{times[name] / times['fuseplan']:.1f}×", "on middle"
                    )
                )
            y += ROW + 3
    legend = [
        text(
            SIDE,
            24,
            "The fastest all-reduce + add + RMSNorm + pad without fuseplan's, times as long as fuseplan's",
            "head",
        )
    ]
    labels = [
        text(round(LEFT + step * (place + 0.5), 1), y + 12, f"{size:,}", "dim middle")
        for place, size in enumerate(sizes)
    ]
    legend += [text(LEFT - 8, y + 12, "tokens", "dim end"), *labels]
    for place, (name, kind) in enumerate(kinds.items()):
        x = LEFT + 150 * place
        legend.append(
            f'<rect x="{x}" y="{y + 24}" width="12" height="11" class="{kind}"/>' + text(x + 17, y + 34, name, "dim")
        )
    return svg(y + 48, [*legend, *drawn])


def chart(title: str, shown: Sequence[Group]) -> str:
    """Bars as SVG."""
    drawn, y = list[str](), TOP

    def place(times: float) -> float:
        return round(LEFT + (times - LEAST) * (WIDTH - LEFT - 90) / (longest - LEAST), 1)

    longest = max(gain.times for group in shown for gain in group.gains)
    for group in shown:
        y += TITLE
        drawn.append(text(16, y - 7, group.title, "head"))
        for gain in group.gains:
            drawn += _bar(gain, y, place)
            y += ROW
    height = y + 16
    ticks = [1 + half / 2 for half in range(1 + int((longest - 1) / 0.5))]
    grid = [
        f'<path d="M{place(tick)} {TOP}V{height - 12}" class="{"one" if tick == 1 else "grid"}"/>'
        + text(place(tick), TOP - 6, f"{tick:g}×" if tick > 1 else "as fast", "dim middle")
        for tick in ticks
    ]
    legend = [text(16, 24, title, "head")]
    if any(not gain.is_clear for group in shown for gain in group.gains):
        legend.append('<rect x="745" y="14" width="12" height="11" class="unclear"/>' + text(762, 24, "unclear", "dim"))
    return svg(height, [*legend, *grid, *drawn])


def svg(height: int, drawn: Sequence[str]) -> str:
    """A picture of that height, for light and dark pages."""
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" class="ground"/>\n{body}\n</svg>\n'
    )


def _bar(gain: Gain, y: int, place: Callable[[float], float]) -> list[str]:
    """A bar from 1 on, to the left where a step is slower."""
    kind = "bar" if gain.is_clear else "unclear"
    start, end = sorted((place(gain.times), place(1)))
    bar = f'<rect x="{start}" y="{y}" width="{max(end - start, 0.5):.1f}" height="{ROW - 4}" class="{kind}"/>'
    label = f"{gain.times:.2f}" + ("" if gain.is_clear else " unclear")
    return [text(LEFT - 8, y + ROW - 5, gain.label, "dim end"), bar, text(end + 5, y + ROW - 5, label, "")]


def text(x: float, y: float, content: str, kind: str) -> str:
    """A line of text at a place."""
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(content)}</text>'


# The table.


def gpu(found: dict[str, Any]) -> str:
    """The name of a GPU as people say it: `H200`."""
    name: str = found.get("device") or found["versions"]["device"]
    return name.removeprefix("NVIDIA ").split()[0].upper()


def table() -> str:
    """The rows of README: machines and engines, and what was measured there."""
    head = ("GPUs", "engine", "what", "measured", "results")
    lines = [head, ("---",) * len(head), *_rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows() -> Iterator[tuple[str, ...]]:
    found = committed("decode_one_gpu_h200")
    steps = decode_steps(found)
    lines = []
    for model in dict.fromkeys(row["model"] for row in steps):
        times = [row["times_faster"]["fuseplan"] for row in steps if row["model"] == model]
        lines.append(f"{NAMES[model]} {_span(times)}")
    one = f"one {gpu(found)}"
    yield one, "`torch.compile`, Hugging Face", f"a decode step of {found['layers']} layers, {_batches(steps)}", \
        f"times as fast: {', '.join(lines)}", _link("decode_one_gpu_h200")  # fmt: skip
    yield from _fp8_rows()
    yield _vllm_row()
    found = committed("kernels_h200")
    speedups = [row["speedup_over_torch_compile"] for row in found["rows"]]
    beside = [row["vllm"][0] / row["fused"][0] for row in found["rows"] if "vllm" in row]
    yield one, "kernels alone", "norms, activations, rotary embedding", \
        f"{_span(speedups)} times as fast as `torch.compile`'s, with fp8 {_span(beside)} times as fast as vLLM's own", \
        _link("kernels_h200")  # fmt: skip
    found = committed("decode_h200x2_captured")
    times = [times_of(row) for row in found["rows"]]
    yield f"{found['ranks']} {gpu(found)}s", "`torch.compile`, Hugging Face", \
        f"a decode step of Llama-3.1-8B, {found['layers']} layers, {_batches(found['rows'])}", \
        f"{_span(times)} times as fast", _link("decode_h200x2_captured")  # fmt: skip
    found = committed("bench_gpt_oss_120b_h100x2")
    less = [-100 * row["change"] for each in found["batches"] for row in each["policies"] if row["policy"] == "planned"]
    yield f"{found['tp']} {found['device'].upper()}s", "`torch.compile`, plain PyTorch", \
        f"a decode step of gpt-oss-120b's shape, {_layers_of_bench()} layers, {_batches(found['batches'])}", \
        f"{_percent(less, 1)} less time", _link("bench_gpt_oss_120b_h100x2")  # fmt: skip
    for name in ("region_h100x2", "region_h100x4", "region_h200x2"):
        found = committed(name)
        speedups = [row["speedup_over_peers_single"] for row in found["rows"]]
        sizes = [row["tokens"] for row in found["rows"]]
        yield f"{found['ranks']} {gpu(found)}s", "kernels alone", \
            f"all-reduce + add + RMSNorm + pad in one, {sizes[0]} to {sizes[-1]:,} tokens", \
            f"{_span(speedups)} times as fast as the best of {_peers(found)}", _link(name)  # fmt: skip
    found = committed("region_quantised_h200x2")
    speedups, sizes = [row["times_faster"] for row in found["rows"]], [row["tokens"] for row in found["rows"]]
    yield f"{found['ranks']} {gpu(found)}s", "kernels alone", \
        f"all-reduce + add + RMSNorm + fp8 quantisation in one, {min(sizes)} to {max(sizes):,} tokens", \
        f"{_span(speedups)} times as fast as the best of {_peers(found)}", _link("region_quantised_h200x2")  # fmt: skip
    found = committed("decode_one_gpu_cpu")
    steps = [row for row in found["rows"] if row["tokens"] == 1]
    lines = [
        f"{dtype} {_span([row['times_faster']['fuseplan'] for row in steps if row['dtype'] == dtype])}"
        for dtype in dict.fromkeys(row["dtype"] for row in steps)
    ]
    yield f"none: a {found['device']}", "`torch.compile`, Hugging Face", \
        f"a decode step of {found['layers']} layers, narrower, {_batches(steps)}", \
        f"times as fast: {', '.join(lines)}", _link("decode_one_gpu_cpu")  # fmt: skip
    yield "8 GPUs; AMD's", "", "nothing was run: prices are modelled", "", ""


def _fp8_rows() -> Iterator[tuple[str, ...]]:
    """Steps of models in fp8, a row for each result."""
    names = {1: "decode_one_gpu_quantised_h200", 2: "decode_quantised_h200x2_captured"}
    for count, name in names.items():
        found = committed(name)
        gpus = _gpus(count, found)
        steps = {place: rows for place, rows in quantised_steps().items() if place[2] == gpus}
        lines = [
            f"{NAMES[model]} ({SCALES[how]}) {_span([times_of(row) for row in rows])}"
            for (model, how, _), rows in steps.items()
        ]
        yield gpus, "`torch.compile`, Hugging Face, fp8 by torchao", \
            f"a decode step of {found['layers']} layers, {_batches(next(iter(steps.values())))}", \
            f"times as fast: {', '.join(lines)}", _link(name)  # fmt: skip


def _vllm_row() -> tuple[str, ...]:
    found = committed("vllm_turns_h200")
    lines = []
    for row, group in zip(found["rows"], _vllm(), strict=True):
        if not row["fused"]:
            lines.append(f"{group.title.split(', vLLM')[0]} nothing is fused")
            continue
        changes = [
            f"{100 * abs(1 - 1 / gain.times):.1f} % {'less' if gain.times > 1 else 'more'}"
            f"{'' if gain.is_clear else ' (unclear)'}"
            for gain in group.gains
        ]
        where = _gpus(row["tp"], found)
        lines.append(f"{group.title.split(', vLLM')[0]} on {where} {' and '.join(changes)}")
    counts = " and ".join(gain.label.split()[0] for gain in group.gains)
    layers = sorted({row["layers"] for row in found["rows"]})
    version = found["rows"][0]["stock"]["vllm"]
    return engines_run(), f"vLLM {version}", f"{_listed([str(each) for each in layers])} layers, {counts} requests", \
        f"time a token: {'; '.join(lines)}", _link("vllm_turns_h200")  # fmt: skip


def _peers(found: dict[str, Any]) -> str:
    return "NCCL and FlashInfer" if found["flashinfer"] == "installed" else "NCCL"


def _link(name: str) -> str:
    return f"[JSON](benchmarks/results/{name}.json)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _percent(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f} %"


def _batches(rows: Sequence[dict[str, Any]]) -> str:
    return f"batch {', '.join(str(size) for size in sorted({row['batch'] for row in rows}))}"


def with_table(text: str) -> str:
    """README's text with the table of today's results."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


# Facts, as pages state them.


def gpus_run() -> str:
    """The GPUs that something was measured on: `H100 and H200`."""
    named = (str(each.get("device") or each.get("versions", {}).get("device") or "") for each in _every_result())
    return _listed(sorted({gpu({"device": name}) for name in named if name.upper().startswith(("NVIDIA", "AMD"))}))


def ranks_run() -> str:
    """How many ranks all-reduces were measured with: `2 and 4`."""
    found = (each.get("ranks") or each.get("tp") for each in _every_result())
    return _listed([str(count) for count in sorted({count for count in found if count})])


def engines_run() -> str:
    """How many GPUs engines of vLLM were timed on: `one H200 and 2 H200s`."""
    found = committed("vllm_turns_h200")
    return " and ".join(_gpus(count, found) for count in sorted({row["tp"] for row in found["rows"]}))


def in_short() -> str:
    """What a reader may expect of decode steps, in a sentence."""
    one, two = committed("decode_one_gpu_h200"), committed("decode_h200x2_captured")
    single = _span([row["times_faster"]["fuseplan"] for row in decode_steps(one)])
    several = _span([row["torch.compile"][0] / row["fuseplan"][0] for row in two["rows"]])
    fused = [group for group, row in zip(_vllm(), committed("vllm_turns_h200")["rows"], strict=True) if row["fused"]]
    gains = [gain for group in fused for gain in group.gains]
    clear = [gain for gain in gains if gain.is_clear]
    assert all(gain.times > 1 for gain in clear)
    less = _percent([100 * (1 - 1 / gain.times) for gain in clear], 1)
    layers = one["layers"]
    assert layers == two["layers"]
    runs = f"{len(clear)} of {len(gains)} runs; in the others no difference was clear"
    return (
        f"In short: a decode step of {layers} layers of Hugging Face models was {single} times as fast on one "
        f"{gpu(one)}, and {several} times on {_gpus(two['ranks'], two)}. In vLLM a token took {less} less time in "
        f"{f'all {len(gains)} runs' if len(clear) == len(gains) else runs}."
    )


def layers_run() -> str:
    """How many layers the models of the chart have: `4 to 12`."""
    found = [committed(name)["layers"] for name in ("decode_one_gpu_h200", "decode_h200x2_captured")]
    found += [row["layers"] for row in committed("vllm_turns_h200")["rows"]]
    found.append(_layers_of_bench())
    return f"{min(found)} to {max(found)}"


def _layers_of_bench() -> int:
    (layers,) = re.findall(r"--layers (\d+)", committed("bench_gpt_oss_120b_h100x2")["command"])
    return int(layers)


def _every_result() -> Iterator[dict[str, Any]]:
    return (committed(path.stem) for path in sorted(RESULTS.glob("*.json")))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
