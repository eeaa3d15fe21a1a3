"""One of two ranks: `python -m tests.real_models.run_tensor_parallel RANK RANKS FOLDER`, which writes FOLDER/RANK.json.
It runs the models that the variable RUN names. Inductor makes code of those that CODED names, with
fuseplan and without it; the graphs of others are interpreted, and without fuseplan these run as they are.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor

import fuseplan
from fuseplan.workloads.models import KVCache, workload
from tests.interpreted import no_code
from tests.ranks import leave
from tests.real_models.cases import CASES, LAYERS, fused_calls

REDUCE_FIRST = "ordered(allreduce_rms, act_padding)"
PAD_FIRST = "ordered(act_padding, allreduce_rms)"
IDS = (torch.arange(2 * 9).reshape(2, 9) * 11) % 128
PROMPT, STEPS = 4, 5
GPT_OSS = ("gpt-oss-120b-tiny", "gpt-oss-120b-tiny:outer-reduce")


def compiled(model: Any, policy: str) -> tuple[Any, list[fuseplan.Report]]:
    """The model compiled under a policy, or by plain torch.compile for `plain`, and the reports to come."""
    torch._dynamo.reset()
    reports: list[fuseplan.Report] = []
    if policy == "plain":
        return torch.compile(model), reports
    return fuseplan.compile(model, config=fuseplan.PassConfig(policy=policy), on_report=reports.append), reports


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that may be a DTensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def difference(left: Tensor, right: Tensor) -> float:
    return (left.float() - right.float()).abs().max().item()


@contextmanager
def without_sums() -> Iterator[None]:
    """Every rank keeps its partial sums."""
    in_place, functional = dist.all_reduce, collectives.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: None
    collectives.all_reduce = lambda tensor, *args, **kwargs: tensor
    try:
        yield
    finally:
        dist.all_reduce, collectives.all_reduce = in_place, functional


def whole_and_split(name: str, folder: Path) -> tuple[Any, Any]:
    """A model, and the same split over the ranks: by transformers, or by fuseplan where a case doesn't ask it to."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    case = CASES[name]
    if not case.distribution:
        return case.build(None), case.build(dist.group.WORLD)
    path = folder / name
    if dist.get_rank() == 0:
        case.build(None).save_pretrained(path)  # type: ignore[operator]
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    distribution = DistributedConfig(**case.distribution)
    split = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, distributed_config=distribution)
    return whole, split


def huggingface(folder: Path, ran: list[str], coded: list[str]) -> dict[str, Any]:
    """Each model split with the model's own plan, beside the whole model and beside itself unfused."""
    from transformers.distributed.configuration_utils import DistributedConfig

    results = {}
    known = {field.name for field in dataclasses.fields(DistributedConfig)}
    for name, case in ((name, CASES[name]) for name in ran):
        if not known.issuperset(case.distribution):
            continue  # transformers 5.17 knows no `ep_size`
        whole, split = whole_and_split(name, folder)
        assert type(split) is type(whole)
        for module in split.modules():
            # transformers 5.17 reduces the gradients of Qwen3's head norms in such hooks, and Dynamo breaks the graph
            # at each. There is no backward here.
            module._backward_hooks.clear()
        expected = whole(IDS).logits
        with without_sums():
            unsummed = split(IDS).logits
        with contextlib.nullcontext() if name in coded else no_code():
            plain = (compiled(split, "plain")[0] if name in coded else split)(IDS, use_cache=False).logits
            model, reports = compiled(split, PAD_FIRST)
            model(IDS, use_cache=False)
            output, calls = fused_calls(lambda: model(IDS, use_cache=False))  # noqa: B023
        (report,) = reports
        results[name] = {
            "model": type(split).__name__,
            "fused": report.fused,
            "calls": calls,
            "recognized": report.recognized,
            "splits_embedding": local(split.model.embed_tokens.weight).shape != whole.model.embed_tokens.weight.shape,
            "whole_difference": difference(output.logits, expected),
            "plain_difference": difference(output.logits, plain),
            "unsummed_difference": difference(unsummed, expected),
            "scale": expected.abs().max().item(),
        }
    return results


def decoded(forward: Callable[..., Tensor], model: Any, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a prefill and decode steps on a cache: greedy, or teacher-forced along given tokens."""
    cache = KVCache.empty(model, 1, 32)
    ids, tokens, steps, start = IDS[:1, :PROMPT], [], [], 0
    for step in range(STEPS):
        positions = torch.arange(start, start + ids.shape[1])[None]
        logits = forward(ids, positions, cache)
        start += ids.shape[1]
        steps.append(logits.clone())
        tokens.append(logits[:, -1:].argmax(-1))
        ids = tokens[-1] if forced is None else forced[0, step].reshape(1, 1)
    return torch.cat(tokens, 1), torch.cat(steps, 1)


def gpt_oss(ran: list[str], coded: list[str]) -> dict[str, Any]:
    """The tiny GPT-OSS with its experts' all-reduce inside the op and outside, under both orders and unfused."""
    results: dict[str, Any] = {}
    for name in ran:
        with contextlib.nullcontext() if name in coded else no_code():
            results[name] = under_both_orders(name, name in coded)
    return results


def under_both_orders(name: str, coded: bool) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    model = workload(name).with_layers(LAYERS).build(group)
    tokens, logits = decoded(compiled(model, "plain")[0] if coded else model, model)
    rows = {}
    for policy in (REDUCE_FIRST, PAD_FIRST) if coded else (PAD_FIRST,):  # which has both rules fire
        forward, reports = compiled(model, policy)
        fused_tokens, _ = decoded(forward, model)
        (_, forced_logits), calls = fused_calls(lambda: decoded(forward, model, tokens))  # noqa: B023
        rows[policy] = {
            "fused": [report.fused for report in reports],
            "calls": calls,
            "tokens": fused_tokens.tolist(),
            "difference": difference(forced_logits, logits),
        }
    return {"tokens": tokens.tolist(), "scale": logits.abs().max().item(), "policies": rows}


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    ran, coded = os.environ["RUN"].split(), os.environ["CODED"].split()
    torch.set_num_threads(1)
    # What torchrun tells its ranks: transformers asks for it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", store=FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    with torch.inference_mode():
        theirs, own = ([name for name in ran if name in known] for known in (CASES, GPT_OSS))
        results = {"asked": theirs, "huggingface": huggingface(folder, theirs, coded), "gpt_oss": gpt_oss(own, coded)}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
