"""Mutation testing: changes one condition, number or operator at a time, and asks whether a test notices.

python -m tests.mutation                      # every mutant, those aside whose result is known
python -m tests.mutation --sample 150         # that many a package, always the same ones
python -m tests.mutation matching             # a package, or a file of one, e.g. matching/trial.py
python -m tests.mutation --again survived     # after writing tests
python -m tests.mutation --show survived      # what the tests didn't notice
python -m tests.mutation --sample 150 --least 0.85 --report benchmarks/results/mutation.json
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
from collections.abc import Collection, Mapping, Sequence
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
class Package:
    """What is sampled and scored together.

    Attributes:
        paths: folders and files under the package whose files are mutated.
        tests: files of tests that may notice.
    """

    paths: Sequence[str]
    tests: Sequence[str]

    @cached_property
    def files(self) -> list[str]:
        """Those that are mutated."""
        places = (SOURCE / path for path in self.paths)
        found = (file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py"))))
        return [str(file.relative_to(SOURCE)) for file in found]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`[tool.mutation]` of pyproject.toml.

    Attributes:
        packages: by name.
        deselected: tests of theirs that are too slow.
        imported: files of tests that may notice, by file that is run while it is imported alone.
        without: operators to leave out, by file.
    """

    packages: Mapping[str, Package]
    deselected: Sequence[str]
    imported: Mapping[str, Sequence[str]]
    without: Mapping[str, Sequence[str]]

    def chosen(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The files of each package that are named, or whose package is; all for no name."""
        if unknown := {*names} - {*self.packages} - {file for each in self.packages.values() for file in each.files}:
            sys.exit(f"no package or file that is mutated: {', '.join(sorted(unknown))}")
        found = {
            package: [file for file in each.files if not names or package in names or file in names]
            for package, each in self.packages.items()
        }
        return {package: files for package, files in found.items() if files}

    def mutants(self, path: str) -> list[Mutant]:
        """Of one file."""
        return mutants_of(path, (SOURCE / path).read_text(), without=self.without.get(path, ()))


def settings() -> Settings:
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]
    return Settings(**{**read, "packages": {name: Package(**each) for name, each in read["packages"].items()}})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "names", nargs="*", help="packages of pyproject.toml, or files, e.g. planner/solver.py; none: all"
    )
    parser.add_argument("--tests", nargs="+", help="the only files of tests to ask; default: those of pyproject.toml")
    parser.add_argument("--sample", type=int, help="mutants a package")
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
    parser.add_argument(
        "--least", type=float, default=0.0, help="the score of a package below which its report is a failure"
    )
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and not without its forks
    began, config = time.monotonic(), settings()
    files = config.chosen(chosen.names)
    if chosen.tests:
        asked = {name: replace(each, tests=chosen.tests) for name, each in config.packages.items()}
        config = replace(config, packages=asked)
    with ProcessPoolExecutor(chosen.jobs) as pool:
        found = {name: pool.map(config.mutants, paths) for name, paths in files.items()}
        mutants = {name: [mutant for each in of_files for mutant in each] for name, of_files in found.items()}
    mutated = {path for paths in files.values() for path in paths}
    known = [each for each in equivalents(EQUIVALENT) if not chosen.names or each.path in mutated]
    results = Results(chosen.folder / "results.jsonl")
    if chosen.show or chosen.report or chosen.least:
        return tell(mutants, known, results, chosen.sample, chosen.show, chosen.report, chosen.least, config)
    drawn = [mutant for each in mutants.values() for mutant in choose(each, known, chosen.sample)]
    random.Random(0).shuffle(drawn)  # so that the first of them speak for all
    part, parts = map(int, chosen.shard.split("/"))
    wanted = [m for m in drawn[part - 1 :: parts] if results.status(m) in (None, *chosen.again)]
    print(f"{sum(map(len, mutants.values()))} mutants, {len(drawn)} of them drawn, {len(wanted)} to run")
    if wanted:
        facts = facts_of(config, files, chosen.folder, chosen.jobs)
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


def choose(mutants: Sequence[Mutant], known: Sequence[Equivalent], sample: int | None) -> list[Mutant]:
    """Mutants of a package that aren't equivalent: some at random, which stay the same while their files do."""
    rest = [mutant for mutant in mutants if not any(each.is_(mutant) for each in known)]
    return sorted(rest, key=lambda mutant: mutant.key)[:sample]


def facts_of(config: Settings, packages: Collection[str], folder: Path, jobs: int) -> Observed:
    """What the tests of packages do on these as they are, found once for each state of package and tests."""
    mutated: dict[str, list[str]] = {}
    for package in config.packages.values():
        for test in package.tests:
            mutated.setdefault(test, []).extend(package.files)
    asked = {test: mutated[test] for name in packages for test in config.packages[name].tests}
    shared = hashlib.sha256(json.dumps(config.deselected).encode())
    helpers = (file for file in (ROOT / "tests").rglob("*.py") if not file.name.startswith("test_"))
    for file in sorted([*SOURCE.rglob("*.py"), *helpers]):
        shared.update(file.read_bytes())
    slots = {}
    for name, files in asked.items():
        digest = shared.copy()
        digest.update(json.dumps(files).encode() + (ROOT / name).read_bytes())
        slots[name] = Slot(folder / "observed" / f"{name.replace('/', '-')}-{digest.hexdigest()[:16]}")
    todo, running = [name for name, slot in slots.items() if not (slot.folder / "done").exists()], list[Fork]()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name = todo.pop(0)
                slot = Slot.fresh(slots[name].folder)
                work = partial(observe, slot, name, config.deselected, asked[name])
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
    mutants: Mapping[str, Sequence[Mutant]], known: Sequence[Equivalent], results: Results, sample: int | None,
    show: Sequence[str], report: Path | None, least: float, config: Settings,
) -> int:  # fmt: skip
    """Prints and writes what is known of mutants, by package.

    Returns:
        1 where a score is too low, or the list of equivalent mutants has entries that are none; else 0.
    """
    packages = dict[str, dict[str, Counter[str]]]()
    for name, found in mutants.items():
        drawn = {mutant.key for mutant in choose(found, known, sample)}
        tables = packages[name] = dict[str, Counter[str]]()
        for mutant in found:
            status = (results.status(mutant) if mutant.key in drawn else None) or NOT_RUN
            if any(each.is_(mutant) for each in known):
                status = EXCLUDED
            tables.setdefault(mutant.path, Counter())[status] += 1
            if status in show:
                print(f"{mutant.path}:{mutant.lines[0]} {mutant.operator}\n    - {mutant.before}\n    + {mutant.after}")
    for name, tables in packages.items():
        for path, counts in tables.items():
            print(f"{path:32} {dict(sorted(counts.items()))}")
        row = summary(sum(tables.values(), Counter()))
        print(f"{name:32} {row['score']:.1%} of {row['run']} mutants, 95 %: {row['low']:.1%} to {row['high']:.1%}")
    stale = [each for each in known if not any(each.is_(mutant) for found in mutants.values() for mutant in found)]
    for each in stale:
        print(f"equivalent.toml: no mutant of {each.path} turns {each.before!r} into {each.after!r}")
    content = report_of(packages, sample, config)
    if report is not None:
        report.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if stale or any(row["score"] < least for row in content["packages"].values()) else 0


def summary(counts: Counter[str]) -> dict[str, Any]:
    """How many became what; the score: those that were noticed, of all that were run; and its interval at 95 %, after
    Wilson: where all mutants would lie, that these are a sample of.
    """
    from scipy.stats import binomtest  # not in the process that forks

    noticed = counts[KILLED] + counts[TIMEOUT]
    run = noticed + counts[SURVIVED] + counts[UNTESTED]
    low, high = binomtest(noticed, run).proportion_ci(0.95, method="wilson") if run else (0.0, 1.0)
    return {
        "mutants": counts.total(),
        **{name: counts[name] for name in (KILLED, SURVIVED, TIMEOUT, UNTESTED, EXCLUDED, NOT_RUN)},
        "run": run,
        "score": round(noticed / max(1, run), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def report_of(
    packages: Mapping[str, Mapping[str, Counter[str]]], sample: int | None, config: Settings
) -> dict[str, Any]:
    return {
        "command": "make mutants",
        "date": datetime.date.today().isoformat(),
        "tool": f"cosmic-ray {metadata.version('cosmic-ray')}, its operators; tests/mutation runs them",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "sample": sample,
        "left_out": {path: list(names) for path, names in config.without.items()},
        "packages": {
            name: {
                **summary(sum(tables.values(), Counter())),
                "files": {path: summary(c) for path, c in tables.items()},
            }
            for name, tables in packages.items()
        },
    }


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # what is left to the order of sets is left to the same one each time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-u", "-m", "tests.mutation", *sys.argv[1:]])
    sys.exit(main())
