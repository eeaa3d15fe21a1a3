"""Mutation testing: changes one condition, number or operator at a time, and asks whether a test notices.

python -m tests.mutation                      # every mutant, those aside whose result is known
python -m tests.mutation --sample 10          # ten a file, always the same ten
python -m tests.mutation --again survived     # after writing tests
python -m tests.mutation --show survived      # what the tests didn't notice
python -m tests.mutation --report benchmarks/results/mutation.json
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.mutation.forks import (
    BROKEN,
    BY_ALARM,
    ROOT,
    SOURCE,
    Fork,
    Limits,
    Observed,
    Slot,
    end,
    fork,
    observe,
    observed,
    preload,
    run_pytest,
    wait,
)
from tests.mutation.mutants import Equivalent, Mutant, equivalents, mutants_of

EQUIVALENT = Path(__file__).with_name("equivalent.toml")
KILLED, SURVIVED, TIMEOUT, UNTESTED = "killed", "survived", "timeout", "untested"
EXCLUDED, NOT_RUN = "equivalent", "not run"
NO_SUCH_TEST = (4, 5)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`[tool.mutation]` of pyproject.toml.

    Attributes:
        paths: folders under the package whose files are mutated.
        tests: files of tests that may notice.
        deselected: tests among them that are too slow.
        imported: files of tests that may notice, by file that is run while it is imported alone.
        without: operators to leave out, by file.
    """

    paths: Sequence[str]
    tests: Sequence[str]
    deselected: Sequence[str]
    imported: Mapping[str, Sequence[str]]
    without: Mapping[str, Sequence[str]]

    @cached_property
    def files(self) -> list[str]:
        """Those that are mutated."""
        found = (file for path in self.paths for file in sorted((SOURCE / path).rglob("*.py")))
        return [str(file.relative_to(SOURCE)) for file in found]

    def mutants(self, path: str) -> list[Mutant]:
        """Of one file."""
        return mutants_of(path, (SOURCE / path).read_text(), without=self.without.get(path, ()))


def settings() -> Settings:
    return Settings(**tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("files", nargs="*", help="of the package, e.g. planner/solver.py; none: all")
    parser.add_argument("--tests", nargs="+", help="the only files of tests to ask; default: those of pyproject.toml")
    parser.add_argument("--sample", type=int, help="mutants a file")
    parser.add_argument("--shard", default="1/1", help="which part of how many, e.g. 1/2")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="starts no mutant after that")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--again", action="append", default=[], help="repeat those of a result, e.g. survived")
    parser.add_argument(
        "--folder",
        type=lambda text: Path(text).resolve(),
        default=ROOT / ".mutants",
        help="where copies and results go",
    )
    parser.add_argument("--show", action="append", default=[], help="print those of a result, and run nothing")
    parser.add_argument("--report", type=Path, help="write the summary as JSON, and run nothing")
    parser.add_argument("--least", type=float, default=0.0, help="the score below which the report is a failure")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and not without its forks
    began, config = time.monotonic(), settings()
    if chosen.tests:
        config = replace(config, tests=chosen.tests)
    files = chosen.files or config.files
    with ProcessPoolExecutor(chosen.jobs) as pool:
        mutants = [mutant for found in pool.map(config.mutants, files) for mutant in found]
    known, results = equivalents(EQUIVALENT), Results(chosen.folder / "results.jsonl")
    if chosen.show or chosen.report:
        return tell(mutants, known, results, chosen.show, chosen.report, chosen.least, config)
    excluded = [mutant for mutant in mutants if any(each.is_(mutant) for each in known)]
    wanted = choose([mutant for mutant in mutants if mutant not in excluded], chosen.sample, chosen.shard)
    wanted = [m for m in wanted if results.status(m) is None or results.status(m) in chosen.again]
    print(f"{len(mutants)} mutants, {len(excluded)} of them equivalent, {len(wanted)} to run")
    if wanted:
        facts = facts_of(config, chosen.folder, chosen.jobs)
        for test in facts.failed:
            print(f"not asked, since it fails on the package as it is: {test}")
        preload(facts.modules)
        until = began + 60 * chosen.minutes
        run(wanted, facts, config, results, chosen.folder, chosen.jobs, until)
    return 0


class Results:
    """What became of mutants, a line each; the last line of a mutant counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else ()
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def status(self, mutant: Mutant) -> str | None:
        row = self.rows.get(mutant.key)
        return None if row is None else str(row["status"])

    def add(self, mutant: Mutant, status: str, **more: object) -> None:
        row = {"key": mutant.key, "path": mutant.path, "lines": list(mutant.lines), "operator": mutant.operator,
               "before": mutant.before, "after": mutant.after, "status": status, **more}  # fmt: skip
        self.rows[mutant.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def choose(mutants: Sequence[Mutant], sample: int | None, shard: str) -> list[Mutant]:
    """In an order that is random and always the same, so that the first of them speak for all."""
    by_file: dict[str, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda mutant: mutant.key):
        by_file.setdefault(mutant.path, []).append(mutant)
    some = [mutant for found in by_file.values() for mutant in found[:sample]]
    random.Random(0).shuffle(some)
    part, parts = map(int, shard.split("/"))
    return some[part - 1 :: parts]


def facts_of(config: Settings, folder: Path, jobs: int) -> Observed:
    """What the tests do on the package as it is, found once for each state of package and tests."""
    shared = hashlib.sha256(json.dumps([config.deselected, config.files]).encode())
    helpers = (file for file in (ROOT / "tests").rglob("*.py") if not file.name.startswith("test_"))
    for file in sorted([*SOURCE.rglob("*.py"), *helpers]):
        shared.update(file.read_bytes())
    slots = {}
    for name in config.tests:
        digest = shared.copy()
        digest.update((ROOT / name).read_bytes())
        slots[name] = Slot(folder / "observed" / f"{name.replace('/', '-')}-{digest.hexdigest()[:16]}")
    todo, running = [name for name, slot in slots.items() if not (slot.folder / "done").exists()], list[Fork]()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name = todo.pop(0)
                slot = Slot.fresh(slots[name].folder)
                work = partial(observe, slot, name, config.deselected, config.files)
                running.append(fork(slot, name, 900, work))
            done, status = wait(running)
            if status != 0:
                sys.exit(f"{done.what} fails on the package as it is: {done.slot.folder / 'log'}")
            (done.slot.folder / "done").touch()
    finally:
        end(running)
    return observed(slots.values())


def run(
    mutants: Sequence[Mutant],
    facts: Observed,
    config: Settings,
    results: Results,
    folder: Path,
    jobs: int,
    until: float,
) -> None:
    """Runs the tests of each mutant, several mutants at a time."""
    free = [Slot.fresh(folder / f"slot-{number}") for number in range(jobs)]
    running: list[Fork] = []
    todo = list(mutants)
    counts: Counter[str] = Counter()
    try:
        while todo or running:
            if time.monotonic() > until:
                todo.clear()
            while todo and free:
                mutant = todo.pop(0)
                tests = selected(mutant, facts, config)
                if tests:
                    running.append(start(free.pop(), mutant, tests, facts, config))
                else:
                    results.add(mutant, UNTESTED)
                    counts[UNTESTED] += 1
            if running:
                done, code = wait(running)
                mutant = done.what
                counts[finish(done, code, results)] += 1
                done.slot.restore(mutant.path)
                free.append(done.slot)
    finally:
        end(running)
    print(dict(counts))


def finish(done: Fork, code: int, results: Results) -> str:
    """Notes what became of a mutant."""
    mutant, note = done.what, done.slot.folder / "failed"
    if code == BROKEN:
        sys.exit(f"tests can't be run on a mutant of {mutant.path}: {done.slot.folder / 'log'}")
    status = TIMEOUT if code == BY_ALARM else KILLED if code else SURVIVED
    by = note.read_text() if note.exists() else f"exit status {code}" if code else ""
    results.add(mutant, status, by=by, seconds=round(time.monotonic() - done.began, 1))
    print(f"{status:9} {mutant.path}:{mutant.lines[0]} {mutant.operator} {by}", flush=True)
    return status


def selected(mutant: Mutant, facts: Observed, config: Settings) -> list[str]:
    """The tests that run what is mutated, the fastest first, then those that run the rest of the function."""
    tests, seconds = facts.tests.get(mutant.path, {}), facts.seconds
    first, last = mutant.lines
    near = {test for line in range(first, last + 1) for test in tests.get(line, ()) if test}
    start, stop = scope(mutant)
    far = {test for line in range(start, stop + 1) for test in tests.get(line, ())}
    if not near:
        # It is run while modules are imported, or for the first test of many alone.
        files = set(config.imported.get(mutant.path, ()))
        far = {test for names in tests.values() for test in names}
        far |= {test for test in seconds if test.split("::")[0] in files} - set(facts.failed)
    return [*sorted(near, key=seconds.__getitem__), *sorted(far - near - {""}, key=seconds.__getitem__)]


def scope(mutant: Mutant) -> tuple[int, int]:
    """The lines of the function that a mutant is in, or its own."""
    import ast

    first, last = mutant.lines
    spans = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse((SOURCE / mutant.path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return max((span for span in spans if span[0] <= first and last <= span[1]), default=(first, last))


def start(slot: Slot, mutant: Mutant, tests: Sequence[str], facts: Observed, config: Settings) -> Fork:
    """Starts the tests of a mutant."""
    note = slot.folder / "failed"
    note.unlink(missing_ok=True)
    slot.write(mutant.path, mutant.source)
    limits = Limits(facts.seconds, note)

    def work() -> int:
        code = run_pytest(slot, ["-x", *tests], limits)
        if code in NO_SUCH_TEST:
            # Names of tests can hang on what is mutated: the files then say whether a test fails.
            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            without = [f"--deselect={each}" for each in (*config.deselected, *facts.failed)]
            code = run_pytest(slot, ["-x", *files, *without], limits)
        return code

    deadline = 120 + 10 * sum(facts.seconds[test] for test in tests)
    return fork(slot, mutant, deadline, work)


def tell(
    mutants: Sequence[Mutant], known: Sequence[Equivalent], results: Results, show: Sequence[str], report: Path | None,
    least: float, config: Settings,
) -> int:  # fmt: skip
    """Prints and writes what is known of mutants.

    Returns:
        1 where the score is too low, or the list of equivalent mutants has entries that are none; else 0.
    """
    tables: dict[str, Counter[str]] = {}
    for mutant in mutants:
        status = EXCLUDED if any(each.is_(mutant) for each in known) else results.status(mutant) or NOT_RUN
        tables.setdefault(mutant.path, Counter())[status] += 1
        if status in show:
            print(f"{mutant.path}:{mutant.lines[0]} {mutant.operator}\n    - {mutant.before}\n    + {mutant.after}")
    for path, counts in tables.items():
        print(f"{path:32} {dict(sorted(counts.items()))}")
    total = sum(tables.values(), Counter())
    print(f"{'all':32} {dict(sorted(total.items()))}: {score(total):.1%}")
    stale = [each for each in known if not any(each.is_(mutant) for mutant in mutants)]
    for each in stale:
        print(f"equivalent.toml: no mutant of {each.path} turns {each.before!r} into {each.after!r}")
    if report is not None:
        report.write_text(json.dumps(summary(tables, config), indent=1) + "\n")
    return 1 if stale or score(total) < least else 0


def score(counts: Mapping[str, int]) -> float:
    """Mutants that were noticed, of all that were run and aren't equivalent."""
    noticed = counts.get(KILLED, 0) + counts.get(TIMEOUT, 0)
    return noticed / max(1, noticed + counts.get(SURVIVED, 0) + counts.get(UNTESTED, 0))


def summary(tables: Mapping[str, Counter[str]], config: Settings) -> dict[str, Any]:
    names = (KILLED, SURVIVED, TIMEOUT, UNTESTED, EXCLUDED, NOT_RUN)
    rows = {
        path: {"mutants": counts.total(), **{name: counts[name] for name in names}, "score": round(score(counts), 4)}
        for path, counts in tables.items()
    }
    total = sum(tables.values(), Counter())
    return {
        "command": "make mutants",
        "date": datetime.date.today().isoformat(),
        "tool": f"cosmic-ray {metadata.version('cosmic-ray')}, its operators; tests/mutation runs them",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "left_out": {path: list(names) for path, names in config.without.items()},
        "total": {"mutants": total.total(), **{name: total[name] for name in names}, "score": round(score(total), 4)},
        "files": rows,
    }


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # what is left to the order of sets is left to the same one each time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-u", "-m", "tests.mutation", *sys.argv[1:]])
    sys.exit(main())
