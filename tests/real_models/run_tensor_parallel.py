"""One rank of a run under torchrun: `run_tensor_parallel.py llama|gpt_oss RESULTS.json`; rank 0 writes what it saw."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import fuseplan
from fuseplan.models import KVCache, workload

REDUCE_FIRST = "ordered(allreduce_rms, act_padding)"
PAD_FIRST = "ordered(act_padding, allreduce_rms)"
IDS = (torch.arange(2 * 9).reshape(2, 9) * 11) % 128
STEPS = 8


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


def llama(folder: Path) -> dict[str, Any]:
    """Hugging Face Llama with its own `tp_plan="auto"`, beside the whole model and beside itself unfused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "llama"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    dist.barrier()
    one_rank = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    whole, whole_weight = one_rank(IDS).logits, one_rank.model.embed_tokens.weight
    split = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, tp_plan="auto")
    plain = compiled(split, "plain")[0](IDS, use_cache=False).logits
    model, reports = compiled(split, "ordered(allreduce_rms)")
    fused = model(IDS, use_cache=False).logits
    return {
        "layers": split.config.num_hidden_layers,
        "applied": [[fusion.op for fusion in report.graphs[0].applied] for report in reports],
        "recognized": [report.recognized for report in reports],
        "splits_embedding": local(split.model.embed_tokens.weight).shape != whole_weight.shape,
        "whole_difference": difference(fused, whole),
        "plain_difference": difference(fused, plain),
        "scale": whole.abs().max().item(),
    }


def generated(forward: Callable[..., Tensor], model: Any) -> tuple[list[int], Tensor]:
    """Greedy tokens from a prompt on a cache, and the logits of a teacher-forced run without one."""
    cache = KVCache.empty(model, 1, 32)
    ids, tokens, start = IDS[:1, :4], [], 0
    for _ in range(STEPS):
        positions = torch.arange(start, start + ids.shape[1])[None]
        logits = forward(ids, positions, cache)
        start += ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens, forward(IDS)


def gpt_oss(folder: Path) -> dict[str, Any]:
    """The tiny GPT-OSS with its experts' all-reduce inside the op and outside, under both orders and unfused."""
    results: dict[str, Any] = {}
    for name in ("gpt-oss-120b-tiny", "gpt-oss-120b-tiny:outer-reduce"):
        group = dist.group.WORLD
        assert group is not None
        model = workload(name).with_layers(2).build(group)
        tokens, logits = generated(compiled(model, "plain")[0], model)
        rows = {}
        for policy in (REDUCE_FIRST, PAD_FIRST):
            forward, reports = compiled(model, policy)
            fused_tokens, fused_logits = generated(forward, model)
            rows[policy] = {
                "fused": [report.fused for report in reports],
                "tokens": fused_tokens,
                "difference": difference(fused_logits, logits),
            }
        results[name] = {"layers": 2, "tokens": tokens, "scale": logits.abs().max().item(), "policies": rows}
    return results


def main() -> None:
    what, results = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.inference_mode():
        outcome = {"llama": llama, "gpt_oss": gpt_oss}[what](results.parent)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, outcome)
    if dist.get_rank() == 0:
        results.write_text(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
