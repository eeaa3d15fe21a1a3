"""One rank of two: `run_ranks.py RANK 2 FOLDER` runs every scenario and writes what it saw to FOLDER/RANK.json."""

import dataclasses
import datetime
import functools
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

import fuseplan
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.dialect import ops
from fuseplan.errors import CollectiveError
from fuseplan.explanation.capture import capture
from fuseplan.graph.facts import process_group
from fuseplan.providers import provider_of
from fuseplan.record import Refusal, Verification
from fuseplan.rules import Bindings
from fuseplan.verification import together
from tests.helpers import HIDDEN, all_reduce, llama
from tests.interpreted import no_code
from tests.verification.fused_norm import AddNormRelu, add_norm_relu, reference

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[3])
FUSE = fuseplan.PassConfig(policy="ordered(allreduce_rms)", agreement_timeout_s=60)
WEIGHT = torch.linspace(0.5, 1.5, HIDDEN).bfloat16()


class Careless(AddNormRelu):
    """A rule that raises on one rank."""

    def check(self, m: Bindings) -> Refusal | None:
        raise KeyError("only on rank 1")


def model(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    return model_of(group.group_name, x, residual)


def model_of(group_name: str, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    y, total = llama(all_reduce(x, group_name), residual, WEIGHT)
    return y.relu(), total


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(RANK)
    x = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
    return x, torch.ones(rows, HIDDEN).bfloat16()


def close(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Inductor's own code rounds otherwise than eager ops."""
    pairs = zip(actual, expected, strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2**-6) for a, b in pairs)


def calls(function: Any) -> int:
    """Fused ops that a call runs."""
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("fuseplan::"))


def run(config: fuseplan.PassConfig, **options: Any) -> dict[str, Any]:
    """What one rank sees of a compilation whose graphs are interpreted: they say nothing of a compile cache."""
    with no_code():
        return run_coded(config, **options)


def run_coded(config: fuseplan.PassConfig, **options: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    reports: list[fuseplan.Report] = []
    compiled = fuseplan.compile(model, config=config, on_report=reports.append, dynamic=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        outputs = compiled(*inputs(3))
    expected = model(*inputs(3))
    more = compiled(*inputs(5)), model(*inputs(5))
    return {
        "right": close((*outputs, *more[0]), (*expected, *more[1])),
        "fused": [report.fused.get("allreduce_rms", 0) for report in reports],
        "cached": [graph.from_cache for graph in reports[0].graphs],
        "pending": [len(graph.pending) for report in reports for graph in report.graphs],
        "verified": [[each.passed, each.ranks, each.tokens] for each in reports[-1].graphs[0].verified],
        "calls": calls(lambda: compiled(*inputs(3))),
        "warnings": [str(warning.message) for warning in caught if "graph" in str(warning.message)],
    }


def cache(name: str) -> Path:
    """A cold one, but for what a C++ compiler made before, which lies in folders of two letters."""
    path, before = FOLDER / f"cache-{name}-{RANK}", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    for made in Path(before).glob("??") if before.startswith(str(FOLDER)) else ():
        shutil.copytree(made, path / made.name)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    return path


def scenarios() -> dict[str, Any]:
    results: dict[str, Any] = {}
    first = cache("first")
    results["equal plans"] = run_coded(FUSE)
    if RANK == 1:
        cache("second")
    results["rank 0 warm, rank 1 cold"] = run_coded(FUSE)
    if RANK == 0:
        shutil.rmtree(first / "fuseplan" / "reports")
    results["rank 0 warm without its report"] = run_coded(FUSE)
    name = ("allreduce_rms",)
    results["opposing plans"] = run(
        fuseplan.PassConfig(agreement_timeout_s=60, force=name if RANK else (), forbid=() if RANK else name)
    )
    mine = provider_of("mine", {add_norm_relu: reference}, cost=0.0)
    rule = Careless() if RANK == 1 else AddNormRelu()
    results["rank 1 raises"] = run(fuseplan.PassConfig(agreement_timeout_s=60), rules=[rule], providers=[mine])
    results["short of memory once"] = short_of_memory_once()
    results["verified"] = verified()
    results |= met_before_the_first_run()
    if RANK == 1:
        time.sleep(3)
    late = fuseplan.PassConfig(policy="ordered(allreduce_rms)", agreement_timeout_s=0.5)
    results["rank 1 late"] = run(late)
    return results


SHORT = [torch.OutOfMemoryError("CUDA out of memory")] * RANK


def short_once(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Fails once, on rank 1."""
    if SHORT:
        raise SHORT.pop()
    return reference(*arguments)


def short_of_memory_once() -> list[dict[str, Any]]:
    """Three starts, of which a kernel can't be verified on one rank in the first."""
    cache("short")
    config = fuseplan.PassConfig(policy="ordered(add_norm_relu)", agreement_timeout_s=60)
    mine = provider_of("short_once", {add_norm_relu: short_once}, uuid="1")
    return [run_coded(config, rules=[AddNormRelu()], providers=[mine]) for _ in range(3)]


def sums(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As a library does it whose kernels reduce over ranks."""
    reduced = x.clone()
    dist.all_reduce(reduced, group=process_group(rest[-1]))
    return ops.fused_add_rms_norm.reference(*(reduced, *rest[:-1]))  # type: ignore[no-any-return]


def doubles(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Right where the other rank holds what this one does."""
    return ops.fused_add_rms_norm.reference(*(2 * x, *rest[:-1]))  # type: ignore[no-any-return]


def wrong_on_rank_1(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, total = sums(x, *rest)
    return y + RANK, total


def raises_on_rank_1(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    results = sums(x, *rest)
    if RANK == 1:
        raise RuntimeError("no more")
    return results


def stays_away_on_rank_1(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if RANK == 1:
        raise RuntimeError("not at all")
    return sums(x, *rest)


OP = ops["all_reduce_fused_add_rms_norm"]
KERNELS = (sums, doubles, wrong_on_rank_1, raises_on_rank_1, stays_away_on_rank_1)
PROVIDERS = {kernel.__name__: provider_of(kernel.__name__, {OP: kernel}, cost=0.0, uuid="1") for kernel in KERNELS}


def verified() -> dict[str, Any]:
    """Collective kernels, verified by each rank alone and by both in lock step."""
    plays_both = dataclasses.replace(provider_of("plays_both", {OP: doubles}, cost=0.0), runs_alone=True)
    providers = [PROVIDERS["sums"], PROVIDERS["doubles"], plays_both]
    (gm,) = capture(model, inputs(3), {}, dynamic=True).graphs
    span = fuseplan.CompileRange(start=1, end=8)
    manager = PostGradPassManager(fuseplan.PassConfig(), compile_range=span, providers=providers)
    problem = manager.analyze(gm.graph).problem
    results: dict[str, Any] = {}
    for name, rank in (("alone", None), ("in lock step", RANK)):
        verifier = dataclasses.replace(manager.verifier, rank=rank)
        outcomes = verifier.verify(problem.candidates, problem.canonical, (span.start, span.end))
        results[name] = {each.provider: each.detail for each in outcomes if isinstance(each, Verification)}
    return results


def only(provider: str, **changes: Any) -> fuseplan.PassConfig:
    span = fuseplan.CompileRange(start=1, end=8)
    settings = {"agreement_timeout_s": 60, "compile_ranges": (span,), "force": (f"allreduce_rms:{provider}",)}
    return fuseplan.PassConfig(**{**settings, **changes})


def met_before_the_first_run() -> dict[str, Any]:
    """Collective kernels under `fuseplan.compile`."""
    results: dict[str, Any] = {}
    cache("met")
    results["met"] = run_coded(only("sums"), providers=[PROVIDERS["sums"]])
    if RANK == 1:
        cache("met again")
    results["met, rank 0 warm, rank 1 cold"] = run_coded(only("sums"), providers=[PROVIDERS["sums"]])
    for name in ("wrong_on_rank_1", "raises_on_rank_1"):
        results[name] = run(only(name), providers=[PROVIDERS[name]])
    made = together._trial

    def late(*arguments: Any) -> Any:
        time.sleep(3 * RANK)
        return made(*arguments)

    with mock.patch.object(together, "_trial", late):
        hasty = only("sums", agreement_timeout_s=0.5, verify_timeout_s=1)
        results["late to verify"] = run(hasty, providers=[PROVIDERS["sums"]])
    results["left in a kernel"] = left_in_a_kernel()
    return results


def left_in_a_kernel() -> list[str]:
    """In a group of its own, which is of no use any more then."""
    group = dist.new_group()
    torch._dynamo.reset()
    compiled = fuseplan.compile(
        functools.partial(model_of, group.group_name), config=only("stays_away_on_rank_1", verify_timeout_s=1),
        providers=[PROVIDERS["stays_away_on_rank_1"]], dynamic=True,
    )  # fmt: skip
    raised = []
    for _ in range(2):
        try:
            compiled(*inputs(3))
        except CollectiveError as error:
            raised.append(str(error))
    return raised


def after_a_death() -> dict[str, Any]:
    """Rank 1 ends before a graph's first run; rank 0 has to find out, and may not hang."""
    if RANK == 1:
        os._exit(7)
    torch._dynamo.reset()
    start = time.monotonic()
    try:
        fuseplan.compile(model, config=fuseplan.PassConfig(policy=FUSE.policy, agreement_timeout_s=0.5))(*inputs(2))
    except Exception as error:  # noqa: BLE001 - which one is gloo's to say
        return {"raised": type(error).__name__, "seconds": time.monotonic() - start}
    return {"raised": None, "seconds": time.monotonic() - start}


def meet(count: int) -> None:
    """With the other ranks."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int(os.environ["PORT"]), count, is_master=RANK == 0)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=count, timeout=datetime.timedelta(seconds=60))


def main() -> None:
    meet(2)
    with torch.inference_mode():
        results = scenarios()
        (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
        dist.barrier()
        results["rank 1 dies"] = after_a_death()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
