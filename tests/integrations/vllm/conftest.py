"""Engines in processes of their own. Collected where vLLM is installed: `make test-vllm`."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fuseplan.record import Report
from fuseplan.record.serialization import from_json

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

ENGINE = "tests.integrations.vllm.engine"
ROOT = Path(__file__).parents[3]
MARK = "--- next engine ---"
PROMPTS = [[1, 5, 9, 13], [3, 4], [7, 8, 9, 10, 11, 12, 13]]
ASKED = {"FUSEPLAN_VLLM": "1"}
NAMED = {"inductor_passes": {"post_grad_custom_post_pass": "fuseplan.vllm_pass"}}
Configure = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine did.

    Attributes:
        tokens: greedy ones, a list a prompt.
        forced: prompts with the continuations of the process's first engine.
        log_probabilities: of the tokens of `forced`.
        log: what it printed.
    """

    tokens: list[list[int]]
    forced: list[list[int]]
    log_probabilities: list[list[float]]
    log: str

    @property
    def lines(self) -> list[str]:
        """What the plugin said."""
        return [line for line in self.log.splitlines() if re.search(r"\[(plugin|reports|vllm_version)\.py:", line)]

    @property
    def reports(self) -> dict[int, Report]:
        """Those that it named, by rank."""
        reports = re.findall(r"fuseplan on rank (\d+): .*; report: (\S+)", self.log)
        return {int(rank): from_json(Report, json.loads(Path(path).read_text())) for rank, path in reports}


Engines = Callable[..., list[Run]]


def check_close(left: Run, right: Run) -> None:
    """Teacher-forced: the same tokens go in, so that one difference doesn't make the next ones."""
    from tests.integrations.vllm.checkpoints import CLOSE

    assert left.forced == right.forced
    for ours, theirs in zip(left.log_probabilities, right.log_probabilities, strict=True):
        assert len(ours) == len(theirs) > 12
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= CLOSE


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(name)`: the folder of a model; `deep_` ones have more layers."""
    from tests.integrations.vllm.checkpoints import DEEPER, LAYERS, save

    saved: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in saved:
            kind, layers = (name.removeprefix("deep_"), DEEPER) if name.startswith("deep_") else (name, LAYERS)
            saved[name] = save(kind, tmp_path_factory.mktemp(name), layers=layers)
        return saved[name]

    return of


def environment(cache: Path, **further: str) -> dict[str, str]:
    """For a process of vLLM's on the CPU."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEPLAN", "VLLM"))}
    return {
        **own, "VLLM_CACHE_ROOT": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **further,
    }  # fmt: skip


@pytest.fixture(scope="session")
def engines(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """`engines(model, [(variables, arguments), ...], cache)`: one engine after the other, in one new process. With
    `as_on_gpus` vLLM's own backend splits and compiles the model.
    """

    def run(
        model: str, asked: list[tuple[dict[str, str], dict[str, Any]]], cache: Path, *, forced: Any = None,
        as_on_gpus: bool = False,
    ) -> list[Run]:  # fmt: skip
        folder = tmp_path_factory.mktemp("engines")
        request, answer = folder / "request.json", folder / "answer.json"
        starts = [{"variables": variables, "arguments": arguments} for variables, arguments in asked]
        content: dict[str, Any] = {"model": str(checkpoint(model)), "prompts": PROMPTS, "forced": forced}
        content |= {"engines": starts, "as_on_gpus": as_on_gpus}
        request.write_text(json.dumps(content))
        done = subprocess.run(
            [sys.executable, "-m", ENGINE, str(request), str(answer)], cwd=ROOT, env=environment(cache),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        logs = done.stdout.split(MARK)[1:]
        return [Run(**each, log=log) for each, log in zip(json.loads(answer.read_text()), logs, strict=True)]

    return run


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What the plugin says meanwhile: vLLM's loggers don't propagate."""
    from fuseplan.integrations.vllm.plugin import log

    records: list[logging.LogRecord] = []

    # Not a handler: vLLM clears those when it configures its loggers.
    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return True

    level = log.level
    log.setLevel(logging.INFO)
    log.addFilter(keep)
    yield records
    log.removeFilter(keep)
    log.setLevel(level)


def told(lines: list[logging.LogRecord], level: int = logging.INFO) -> str:
    """The one line that was said."""
    (record,) = lines
    assert record.levelno == level
    return record.getMessage()


@pytest.fixture
def configure(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Configure:
    """`configure(**arguments)`: the `VllmConfig` of an engine."""
    from vllm.engine.arg_utils import EngineArgs

    for name in ("FUSEPLAN", "FUSEPLAN_VLLM"):
        monkeypatch.delenv(name, raising=False)

    def make(**arguments: Any) -> Any:
        return EngineArgs(model=str(checkpoint("llama")), skip_tokenizer_init=True, **arguments).create_engine_config()

    return make
