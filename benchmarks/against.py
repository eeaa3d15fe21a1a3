"""Planning by this revision and by another one, turn by turn, for `planning.py --against`.

Each revision plans the same model in a process of its own, by its own `planning.py`. This one does so twice: by the
rules that the other one has, and by all of its own. While they plan, all have the same one core. Times are of the CPU:
those of a clock would say how busy the machine is.
"""

import contextlib
import functools
import inspect
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD, RANKS, TURNS = "gpt-oss-120b", 2, 15


def compared(other: str, workload: str = WORKLOAD, turns: int = TURNS) -> dict[str, Any]:
    """Both revisions, by stage in milliseconds of CPU time, and what tracing and planning hold at most.

    Args:
        other: a revision of this repository, or a folder with a checkout of one.
        workload: what they plan, at two ranks.
        turns: how often each of them does.
    """
    with _checkout(other) as theirs, contextlib.ExitStack() as stack:
        old = stack.enter_context(_Planner(theirs))
        same, new = (stack.enter_context(_Planner(ROOT)) for _ in range(2))
        shared = [rule for rule in old.rules if rule in new.rules]
        planners = {"theirs": old, "ours, by their rules": same, "ours": new}
        for planner, rules in zip(planners.values(), (None, shared, None), strict=True):
            planner.ask([workload, rules])
        found = [{name: planner.ask("time") for name, planner in planners.items()} for _ in range(turns)]
        peaks = {name: round(planner.ask("memory")) for name, planner in planners.items()}
    stages = {name: [stage for stage in found[0][name] if stage != "fused"] for name in planners}
    first, second, _ = planners
    return {
        "revision": other,
        "turns": turns,
        "rules": {"theirs": len(old.rules), "shared": len(shared), "ours": len(new.rules)},
        "cpu_ms": {
            name: {stage: spread([turn[name][stage] for turn in found]) for stage in stages[name]} for name in planners
        },
        "planned_ratio": spread([turn[second]["planned"] / turn[first]["planned"] for turn in found]),
        "total_ratio": spread([turn[second]["total"] / turn[first]["total"] for turn in found]),
        "peak_bytes_per_node": peaks,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and interquartile range."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": round(median(values), 2), "least": round(min(values), 2), "iqr": round(high - low, 2)}


@contextlib.contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    """A folder with a revision's package and benchmarks."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    archive = subprocess.run(
        ["git", "archive", revision, "src", "benchmarks"], cwd=ROOT, check=True, capture_output=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


class _Planner:
    """A process that plans by one revision when it is asked to.

    Attributes:
        rules: the names of its rules, each with its fused op.
    """

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join(str(root / each) for each in ("src", "benchmarks"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.rules: list[list[str]] = self._read()

    def ask(self, what: Any) -> Any:
        """Sends a request: first the workload, and the rules to plan by, None for all; then `time` or `memory`."""
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._process.args!r} ended; its output is above")
        return json.loads(line)

    def __enter__(self) -> "_Planner":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """In a process of one revision: answers `_Planner.ask`. Whatever this uses of `planning`, any revision's has."""
    import planning

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints isn't an answer
    time.perf_counter, time.perf_counter_ns = time.process_time, time.process_time_ns
    every = inspect.signature(planning.PostGradPassManager).parameters["rules"].default
    print(json.dumps([_named(rule) for rule in every]), file=answers, flush=True)
    workload, kept = json.loads(sys.stdin.readline())
    if kept is not None:
        rules = [rule for rule in every if _named(rule) in kept]
        planning.PostGradPassManager = functools.partial(planning.PostGradPassManager, rules=rules)
    build = (getattr(planning, "catalog", None) or planning.workloads).build
    with build(workload, tp=RANKS) as built:
        (gm,) = planning.capture(built.model, built.inputs, {}, dynamic=True).graphs
        planning.pipeline(gm.graph)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            result = planning.pipeline(gm.graph) if json.loads(line) == "time" else _peak(planning, gm.graph)
            print(json.dumps(result), file=answers, flush=True)


def _named(rule: Any) -> list[str]:
    return [rule.name, rule.op.name]


def _peak(planning: Any, graph: Any) -> float:
    """The most bytes that planning holds, by node of the graph."""
    tracemalloc.start()
    manager = planning.manager_for()
    manager.decide(manager.analyze(graph), manager.config.chosen_policy, "graph_0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / len(graph.nodes)


if __name__ == "__main__":
    serve()
