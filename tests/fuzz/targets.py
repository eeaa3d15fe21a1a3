"""Everything that reads what others wrote, as functions of bytes: each ends in a value that can be used, or in a line.

What is read is used as its reader's callers use it, since a value that nobody can show or save would be no better than
a crash.
"""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fuseplan.caching.store import LARGEST_BYTES
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.errors import ConfigError, LockError, PlanError, WorkloadError
from fuseplan.integrations import transformers as huggingface
from fuseplan.integrations.locks import config_of
from fuseplan.planner import check_selector
from fuseplan.planner.costs import CostTable
from fuseplan.record import Plan, Refusal, Rejected, Report, SavedPlans, Selected, diff, from_json, to_json
from fuseplan.record.parsing import parse_json
from fuseplan.record.text import LONGEST_QUOTE
from fuseplan.report import FusionLock, render_report
from fuseplan.report.drift import drifts
from fuseplan.report.places import fold, unfold
from fuseplan.report.verdict import Verdict, render_verdict
from tests.report.locked import applied, graph, lock_of, loss, norms, refusal, report

LONGEST_LINE = 2 * LONGEST_QUOTE
"""Of an error: what it quotes, and words of its own around that."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        read: reads a file's content and uses it.
        errors: the only ones that it may raise.
        seeds: contents that it takes.
    """

    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def __call__(self, content: bytes) -> bool:
        """Whether the content is taken."""
        text = None
        try:
            self.read(content)
        except self.errors as error:
            text = str(error)
        if text is not None:
            assert text.isprintable(), text
            assert 0 < len(text) <= LONGEST_LINE, text
        return text is None


def _path(content: bytes) -> Path:
    path = Path(_FOLDER.name) / "file"
    path.write_bytes(content)
    return path


_FOLDER = tempfile.TemporaryDirectory()


def _shown(renderable: object) -> None:
    output = io.StringIO()
    Console(file=output, width=100, force_terminal=False).print(renderable)
    assert output.getvalue().replace("\n", "").isprintable()


def _read_plans(content: bytes) -> None:
    saved = SavedPlans.load(_path(content))
    diff(saved, PLANS)
    saved.save(path := _path(b""))
    assert SavedPlans.load(path) == saved
    assert not diff(saved, saved)


def _read_table(content: bytes) -> None:
    table = CostTable.parse(content, name="costs.json")
    assert CostTable.parse(json.dumps(table._content()).encode()).digest == table.digest
    for row in table.rows[:10]:
        assert table.interpolate(row.key, row.tokens) == (row.time_ns, row.spread_ns)


def _read_lock(content: bytes) -> None:
    lock = FusionLock.load(_path(content))
    assert FusionLock.load(_path(lock.text().encode())) == lock
    found = drifts(lock, REPORT)
    _shown(render_verdict(Verdict(path="a.lock", lock=lock, found=lock, drifts=found, fix="fix")))
    config_of(lock.settings)


def _read_report(content: bytes) -> None:
    found = from_json(Report, parse_json(content, most_bytes=LARGEST_BYTES))
    assert from_json(Report, to_json(found)) == found
    _shown(render_report(found))


def _read_words(content: bytes) -> None:
    """What a lock or a command line has as text."""
    text = content.decode("utf-8", "surrogateescape")
    reads: tuple[Callable[[str], object], ...] = (Policy.parse, CompileRange.parse, _check_selector)
    refused = 0
    for read in reads:
        try:
            read(text)
        except ConfigError as error:
            message = str(error)
            refused += 1
            assert message.isprintable()
    PassConfig(forbid=(text,))
    if refused == len(reads):
        raise ConfigError("no reader takes it")


def _check_selector(text: str) -> None:
    check_selector(text, ["act_padding"])


def _read_places(content: bytes) -> None:
    lines = content.decode("utf-8", "replace").split("\n")
    places = unfold(lines)
    assert unfold(fold(places)) == places


PLANS = SavedPlans(
    workload="w", tp=2,
    plans=(
        Plan(
            graph="graph_0", range=(1, 64), device="h200", prices=("modelled",), sites=("rms_norm 2880 bfloat16",),
            selected=(Selected(name="#0 act_padding rms_norm_pad triton", signature="s", source="m.0", saving_ns=5),),
            rejected=(
                Rejected(name="#0 a b c", signature="s", source=None, saving_ns=-1, blocked_by=("x",), lost_ns=2,
                         flips_at_ns=None),
            ),
            objective_ns=5, bound_ns=5, unfused_ns=9, components=1, classes=1, cuts=(("a", "b"),),
        ),
    ),
)  # fmt: skip
REPORT = report(
    graph(
        applied("act_padding", norms(range(3))), [loss("allreduce_rms", "layers.0.norm")], [refusal(None, "layers.1")]
    ),
    warnings=(Refusal(reason=refusal(None, None).reason, detail="has no effect"),),
)
ROW = {
    "key": "site: unfused", "tokens": 8, "time_ns": 12_000, "spread_ns": 100, "provenance": "measured",
    "device": "h200", "torch": "2.11.0", "triton": "", "topology": "tp2", "date": "2026-11-22", "command": "made up",
}  # fmt: skip
CONFIGURATION = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "auto_map": {"AutoModel": "a--b.c"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attn_implementation": "somebody/kernel",
}  # fmt: skip


def _text(value: object) -> bytes:
    return json.dumps(value).encode()


TARGETS: Mapping[str, Target] = {
    "plans": Target(
        _read_plans, (PlanError,), (_text({**to_json(PLANS), "plans": [to_json(plan) for plan in PLANS.plans]}),)
    ),
    "table": Target(
        _read_table, (ConfigError,), (_text({"schema": 1, "device": "h200", "rows": [ROW, {**ROW, "tokens": 16}]}),)
    ),
    "lock": Target(
        _read_lock, (LockError, ConfigError),
        (lock_of(*applied("act_padding", [*norms(range(9)), "a x2", None])).text().encode(),),
    ),
    "report": Target(_read_report, (ValueError,), (_text(to_json(REPORT)),)),
    "configuration": Target(
        lambda content: huggingface.load_config(_path(content)), (WorkloadError,),
        (_text(CONFIGURATION), _text({**CONFIGURATION, "model_type": "mixtral", "text_config": {"auto_map": 1}})),
    ),
    "words": Target(
        _read_words, (ConfigError,),
        (b"ordered(act_padding, b)", b"1:64", b"act_padding@model.layers.3.*:triton", b"act_padding#3", b"planned"),
    ),
    "places": Target(_read_places, (ValueError,), (b"layers.0-6,8.norm x2\nnorm\n=a-1 x1", b"(no module) x3")),
}  # fmt: skip
