"""Engines, each in a process of its own. Collected where vLLM is installed: `make test-vllm`."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

ENGINE = Path(__file__).with_name("engine.py")
PROMPTS = [[1, 5, 9, 13], [3, 4], [7, 8, 9, 10, 11, 12, 13]]
ASKED = {"FUSEPLAN_VLLM": "1"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine did.

    Attributes:
        tokens: greedy ones, a list a prompt.
        forced: prompts with continuations.
        log_probabilities: of the tokens of `forced`.
        log: what it printed.
        reports: fuseplan's, as JSON, by rank.
    """

    tokens: list[list[int]]
    forced: list[list[int]]
    log_probabilities: list[list[float]]
    log: str
    reports: dict[int, Any]

    @property
    def lines(self) -> list[str]:
        """What the plugin said."""
        return [line for line in self.log.splitlines() if "plugin.py" in line or "reports.py" in line]


Engine = Callable[..., Run]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(name)`: the folder of a model."""
    from tests.integrations.vllm.checkpoints import save

    saved: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in saved:
            saved[name] = save(name, tmp_path_factory.mktemp(name))
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


@pytest.fixture
def engine(checkpoint: Callable[[str], Path], tmp_path: Path) -> Engine:
    """`engine(model, tp, variables, ...)`: runs one."""

    def run(
        model: str,
        tp: int,
        variables: dict[str, str],
        *,
        cache: Path | None = None,
        forced: Any = None,
        **arguments: Any,
    ) -> Run:
        folder = cache or tmp_path / f"cache_{len(list(tmp_path.iterdir()))}"
        request = {
            "model": str(checkpoint(model)), "arguments": {"tensor_parallel_size": tp, **arguments}, "prompts": PROMPTS,
            "forced": forced,
        }  # fmt: skip
        asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(request))
        answered.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, str(ENGINE), str(asked), str(answered)], env=environment(folder, **variables),
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-6000:]
        answer = json.loads(answered.read_text())
        return Run(
            tokens=answer["tokens"], forced=answer["forced"], log_probabilities=answer["log_probabilities"], log=log,
            reports=reports_in(folder),
        )  # fmt: skip

    return run


def reports_in(folder: Path) -> dict[int, Any]:
    """The reports below a folder, by rank."""
    return {
        int(path.stem.split("_")[1]): json.loads(path.read_text()) for path in folder.glob("fuseplan/*/rank_*.json")
    }
