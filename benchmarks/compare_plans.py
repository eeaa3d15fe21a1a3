"""Whether two revisions plan the same: saves all that they say of many models, and compares two such files.

    PYTHONPATH=src:. python benchmarks/compare_plans.py save FILE [--quick]
    PYTHONPATH=src:. python benchmarks/compare_plans.py diff OLD NEW [--ignore-rules NAME...]

A file has one JSON object a line, gzipped: `{"case": what was asked, "found": what came out}`.

- Built-in workloads at TP 1, 2, 4 and 8 on H200 and MI355X; four layers of GPT-OSS and Llama on every device; in the
  default ranges, in odd ones, and in one of any size. Found are the report of every policy that `explain` compares, all
  of its plans, prices and refusals in it, the fusion lock, and, of few layers in odd ranges, the rows and constants
  behind the prices.
- Two layers of the models in `examples/configs`, quantised blocks in the spellings of `tests/helpers.py`, and random
  models of `tests/differential`, each beside its text; the latter two with rounding changes allowed and without.
- Public names: `fuseplan.__all__`, flags, schemas of ops, and what `fuseplan rules`, `providers` and `devices` print.

Costs are modelled, and devices are profiles: nothing of this machine has a say. What `diff` doesn't compare:

- names of FX nodes, though it does compare how many there are: `NODES`, `site` of a fusion, `name` of a drawn box,
  and the number in `(mul_45)`, as sentences have it;
- numbers of lines, as in `helpers.py:12`: code above may have moved;
- times that planning took, and versions of packages: `TIMES`, left out by `save` too, and `VERSIONS`;
- with `--ignore-rules`, whatever has one of these names: rules, and their flags, ops and providers, which one of the
  revisions hasn't got. They must be off or match nowhere: a plan that applies them differs.

Exit status 1 where anything differs.
"""

import argparse
import contextlib
import dataclasses
import gzip
import itertools
import json
import random
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from fuseplan.config import CompileRange, PassConfig, Policy
from fuseplan.cpython import uncollected
from fuseplan.errors import WorkloadError
from fuseplan.explanation.capture import Capture, capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.integrations.locks import settings_of
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import to_json
from fuseplan.report.lock import FusionLock
from fuseplan.workloads import catalog

RANKS = (1, 2, 4, 8)
FEW_LAYERS = 4
CONFIGS = Path("examples/configs")
FEW_DEVICES = ("h200", "mi355x")
SOME_DEVICES = ("cpu", "h200", "mi300x", "mi355x")
RANDOM_MODELS, FEW_RANDOM_MODELS = 40, 8
ODD_RANGES = tuple(CompileRange(start=start, end=end) for start, end in ((7, 7), (37, 131), (132, 200)))
RANGES = (catalog.DEFAULT_RANGES, ODD_RANGES, ())

NODES = frozenset({"anchor", "consumed", "members", "nodes"})
TIMES = frozenset({"plan_ns", "stages_ns"})
VERSIONS = frozenset({"version"})
UNCOMPARED = re.compile(r"(?<=\.py):\d+|(?<=\w)_\d+(?=\))")
"""The 12 of `helpers.py:12`, and the 45 of `(mul_45)`."""

Case = tuple[str, Any]
"""What was asked, and what came out as plain JSON values."""


def save(path: Path, *, quick: bool) -> None:
    with gzip.open(path, "wt", compresslevel=4) as file:
        for case, found in cases(quick=quick):
            print(case, file=sys.stderr)
            file.write(json.dumps({"case": case, "found": without(found, TIMES)}) + "\n")


def cases(*, quick: bool) -> Iterator[Case]:
    yield "names", names()
    for workload in catalog.names():
        if quick and "-tiny" not in workload and workload != "gpt-oss-20b":
            continue
        for ranks in RANKS[:2] if quick else RANKS:
            yield from of_workload(workload, ranks, None, FEW_DEVICES)
    for workload in () if quick else ("gpt-oss-120b", "llama-3.1-8b"):
        for ranks in RANKS:
            yield from of_workload(workload, ranks, FEW_LAYERS, tuple(PROFILES))
    for config in [CONFIGS / "qwen3-8b.json"] if quick else sorted(CONFIGS.glob("*.json")):
        yield from of_workload(config.as_posix(), 2, 2, FEW_DEVICES)
    yield from of_quantised_blocks()
    for seed in range(FEW_RANDOM_MODELS if quick else RANDOM_MODELS):
        yield from of_random_model(seed)


def names() -> dict[str, Any]:
    """What a user can write."""
    printed = {command: json.loads(_output(command)) for command in ("rules", "providers", "devices")}
    schemas = [str(each) for each in torch._C._jit_get_all_schemas() if each.name.startswith("fuseplan::")]
    return {
        "public": sorted(fuseplan.__all__),
        "flags": {each.name: f"{each.type} = {each.default!r}" for each in dataclasses.fields(PassConfig)},
        "schemas": {text.partition("(")[0]: text for text in sorted(schemas)},
        **{command: _by_name(found[command]) for command, found in printed.items()},
    }


def _output(command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "fuseplan", command, "--json"], check=True, capture_output=True, text=True
    ).stdout


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows by what their first column says: one more of them is one difference."""
    return {next(iter(row.values())): row for row in rows}


def of_workload(workload: str, ranks: int, layers: int | None, devices: Sequence[str]) -> Iterator[Case]:
    """A workload on many devices, traced once."""
    name = f"{workload} tp={ranks}" + (f" layers={layers}" if layers else "")
    try:
        with catalog.build(workload, tp=ranks, layers=layers) as built:
            traced = capture(built.model, built.inputs, {}, dynamic=True)
            for device, ranges in itertools.product(devices, RANGES):
                spans = ",".join(map(str, ranges)) or "any size"
                has_evidence = ranges == ODD_RANGES and (layers is not None or "-tiny" in workload)
                config = PassConfig(compile_ranges=ranges, costs="modelled")
                yield f"{name} {device} {spans}", explained(traced, config, device, workload, evidence=has_evidence)
    except WorkloadError as error:
        yield name, {"error": str(error)}


@uncollected()
def explained(
    traced: Capture, config: PassConfig, device: str, workload: str, *, evidence: bool = False
) -> dict[str, Any]:
    explanation = Explanation(traced, config, PROFILES[device], BUILT_IN_PROVIDERS)
    policies = [config.chosen_policy, *explanation.orders(), Policy(name="off")]
    reports = {str(policy): explanation.report(policy) for policy in policies}
    lock = FusionLock.of(settings_of(config, workload=workload, device=device), reports["planned"])
    return {
        "breaks": list(map(str, traced.breaks)),
        "reports": {policy: to_json(report) for policy, report in reports.items()},
        "fused": {policy: report.fused for policy, report in reports.items()},
        "conflicts": {policy: to_json(report.conflicts) for policy, report in reports.items()},
        "near_misses": to_json(reports["planned"].near_misses),
        "lock": lock.text().splitlines(),
        "evidence": to_json(explanation.evidence(policies)) if evidence else None,
    }


def of_quantised_blocks() -> Iterator[Case]:
    from tests.helpers import SPELLINGS, Norm, all_reduce, quantize, quantize_rows, randn

    def block(norm: Norm, group: str) -> Callable[..., Any]:
        def model(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> list[Any]:
            first, total = norm(all_reduce(x, group), residual, weight)
            second, total = norm(all_reduce(total.sin(), group), total, weight)
            third, total = norm(total.cos(), total, weight)
            fourth, total = norm(all_reduce(total.tanh(), group), total, weight)
            gate, up = fourth.chunk(2, -1)
            static = [quantize(y, scale) for y in (first, norm(total, None, weight)[0], F.silu(gate) * up)]
            dynamic = [quantize_rows(y) for y in (second, fourth, F.silu(up) * gate)]
            return [*static, quantize(third, scale, reciprocal=True), *dynamic]

        return model

    inputs = (randn(16, 4096), randn(16, 4096, seed=1), randn(4096, seed=2), torch.tensor(0.5))
    for spelling, norm in SPELLINGS.items():
        with two_ranks() as group:
            traced = capture(block(norm, group), inputs, {}, dynamic=True)
            for allowed in (False, True):
                yield from of_capture(traced, f"quantised {spelling}", catalog.DEFAULT_RANGES, allowed)


def of_capture(traced: Capture, name: str, ranges: Sequence[CompileRange], allowed: bool) -> Iterator[Case]:
    """A model on some devices, with rounding changes allowed or not."""
    config = PassConfig(compile_ranges=ranges, costs="modelled", allow_rounding_changes=allowed)
    for device in SOME_DEVICES:
        rounding = " rounding changes allowed" if allowed else ""
        yield f"{name} {device}{rounding}", explained(traced, config, device, name)


def of_random_model(seed: int) -> Iterator[Case]:
    from tests.differential.generate import generate

    program = generate(seed, most=4)
    name, found = f"random model {seed}", {"program": str(program).splitlines()}
    with two_ranks() as group, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random models do what torch warns of
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            traced = capture(program.module(group), program.inputs(0), {}, dynamic=False)
        except WorkloadError as error:
            yield name, {**found, "error": str(error).splitlines()[0]}
            return
        yield name, found
        for allowed in (False, True):
            yield from of_capture(traced, name, (), allowed)


@contextlib.contextmanager
def two_ranks() -> Iterator[str]:
    """The name of a group of two ranks, the other of which isn't there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


def without(value: Any, keys: frozenset[str]) -> Any:
    """A JSON value without those keys of its objects."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def comparable(value: Any, ignored: frozenset[str]) -> Any:
    """A JSON value without what isn't compared."""
    if isinstance(value, list):
        return [comparable(item, ignored) for item in value if not _is_named(item, ignored)]
    if isinstance(value, str):
        return UNCOMPARED.sub("", value)
    if not isinstance(value, dict):
        return value
    hidden = NODES | ({"site"} if "anchor" in value else {"name"} if "members" in value else set())
    result = {}
    for key, item in value.items():
        kept = _without_names(key, ignored)
        if key not in ignored and kept not in result and key not in VERSIONS | TIMES:
            result[kept] = _hidden(item) if key in hidden else comparable(item, ignored)
    return result


def _is_named(item: Any, ignored: frozenset[str]) -> bool:
    """Whether an item of a list is, or is about, one of the names."""
    if isinstance(item, dict):
        return not ignored.isdisjoint(_texts(item.get(key) for key in ("rule", "provider", "op", "flag", "name")))
    return isinstance(item, str) and item in ignored


def _texts(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _without_names(key: str, ignored: frozenset[str]) -> str:
    """`ordered(a, b)` without those rules; any other key as it is."""
    policy, separator, rest = key.partition("(")
    if policy != "ordered" or not separator or not rest.endswith(")"):
        return key
    return f"ordered({', '.join(name for name in rest[:-1].split(', ') if name not in ignored)})"


def _hidden(value: Any) -> Any:
    return [_hidden(item) for item in value] if isinstance(value, list) else "a node"


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            if key not in new:
                yield f"{path}.{key}: {_shown(old[key])} is gone"
            elif key not in old:
                yield f"{path}.{key}: {_shown(new[key])} is new"
            else:
                yield from differences(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{path}: {len(old)} items -> {len(new)} items"
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            yield from differences(before, after, f"{path}[{index}]")
    elif old != new or type(old) is not type(new):
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def read(path: Path) -> Iterator[tuple[str, str]]:
    """Cases, and what came out as JSON text."""
    with gzip.open(path, "rt") as file:
        for line in file:
            head, _, rest = line.rstrip("\n").partition('", "found": ')
            yield json.loads(head.removeprefix('{"case": ') + '"'), rest[:-1]


def diff(old: Path, new: Path, ignored: frozenset[str], most: int) -> int:
    """Prints the first differences of each case: how many cases differ."""
    known = {case: zlib.compress(text.encode(), 1) for case, text in read(old)}
    differ, equal = 0, 0
    for case, text in read(new):
        if case not in known:
            lines = ["it is new"]
        else:
            before = zlib.decompress(known.pop(case)).decode()
            lines = [] if before == text else list(itertools.islice(_of_case(before, text, ignored), most))
        differ, equal = differ + bool(lines), equal + (not lines)
        for line in lines:
            print(f"{case}: {line}")
    for case in known:
        print(f"{case}: it is gone")
    print(f"{differ + len(known)} of {differ + len(known) + equal} cases differ")
    return differ + len(known)


def _of_case(old: str, new: str, ignored: frozenset[str]) -> Iterator[str]:
    return differences(comparable(json.loads(old), ignored), comparable(json.loads(new), ignored))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save", help="save what this revision plans")
    saving.add_argument("file", type=Path)
    saving.add_argument("--quick", action="store_true", help="few devices and ranks, and small models: under a minute")
    comparing = commands.add_parser("diff", help="compare two files")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--ignore-rules", nargs="+", default=[], metavar="NAME", help="what one of them hasn't got")
    comparing.add_argument("--most", type=int, default=5, metavar="N", help="differences shown of a case; default: 5")
    given = parser.parse_args(arguments)
    if given.command == "save":
        save(given.file, quick=given.quick)
        return 0
    return int(diff(given.old, given.new, frozenset(given.ignore_rules), given.most) > 0)


if __name__ == "__main__":
    sys.exit(main())
