"""Two ranks under torchrun with gloo: what fires, and that fused and unfused runs agree."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch.torch_version import TorchVersion

from tests.real_models.cases import CASES, LAYERS, ROUNDOFF, norms
from tests.real_models.run_tensor_parallel import GPT_OSS, PAD_FIRST, REDUCE_FIRST, STEPS

SCRIPT = Path(__file__).with_name("run_tensor_parallel.py")

SCALES_EMBEDDING = ("gemma3",)
"""Models with an op between the embedding's all-reduce and the first norm."""

pytestmark = pytest.mark.distributed


def coded(*names: str, of: Iterable[str]) -> pytest.MarkDecorator:
    """Inductor makes code of these models; of all of them at night."""
    everything = pytest.param((*of,), marks=pytest.mark.nightly, id="all coded")
    return pytest.mark.parametrize("coded", [pytest.param(names, id="one coded"), everything])


def torchrun(what: str, folder: Path, *coded: str) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    results = folder / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(SCRIPT), what, str(results), *coded]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks: list[dict[str, Any]] = json.loads(results.read_text())
    assert len(ranks) == 2
    return ranks


@coded("llama", of=CASES)
def test_huggingface_models_with_their_own_plans(coded: tuple[str, ...], tmp_path: Path) -> None:
    first, second = torchrun("huggingface", tmp_path, *coded)
    assert list(first) == list(second)
    missing = set(CASES).difference(first)
    assert missing == (set() if TorchVersion(transformers.__version__) >= "5.23" else {"gpt_oss"})
    for name in first:
        case = CASES[name]
        assert first[name]["fused"] == second[name]["fused"]
        for rank in (first[name], second[name]):
            reduced = Counter({case.op: case.reduced * LAYERS})
            if rank["splits_embedding"] and name not in SCALES_EMBEDDING:
                # Newer transformers split the embedding too; its all-reduce goes into the first norm.
                reduced["all_reduce_rms_norm"] += 1
            assert rank["calls"] == reduced, name
            fired = {rule: count for rule, count in rank["fused"].items() if count}
            assert fired == {"allreduce_rms": sum(reduced.values())}, name
            assert norms(rank["recognized"]) == case.norms, name

            # Splitting rounds each rank's partial sum and then their sum, where the whole model rounds once, and both
            # compiled runs may differ from eager by a rounding: two for each of the 2 * LAYERS things that are added.
            rounding = 2 * LAYERS * ROUNDOFF * rank["scale"]
            assert rank["whole_difference"] <= 2 * rounding, name
            # Fused and unfused reduce the same partial sums: one.
            assert rank["plain_difference"] <= rounding, name
            assert rank["unsummed_difference"] > 4 * rounding, f"{name}: the bound would not notice a lost all-reduce"


@coded("gpt-oss-120b-tiny", of=GPT_OSS)
def test_gpt_oss_under_both_orders(coded: tuple[str, ...], tmp_path: Path) -> None:
    first, second = torchrun("gpt_oss", tmp_path, *coded)
    assert list(first) == list(second)
    for name, result in (*first.items(), *second.items()):
        inner = not name.endswith(":outer-reduce")
        sites = (1 if inner else 2) * LAYERS + 1
        expected = {
            REDUCE_FIRST: {"allreduce_rms": sites, "act_padding": 0},
            PAD_FIRST: {"allreduce_rms": sites - LAYERS, "act_padding": LAYERS},
        }
        ran = {
            REDUCE_FIRST: {"all_reduce_rms_norm": 1, "all_reduce_fused_add_rms_norm": sites - 1},
            PAD_FIRST: {
                "all_reduce_rms_norm": 1,
                "all_reduce_fused_add_rms_norm": sites - 1 - LAYERS,
                "fused_add_rms_norm_pad": LAYERS,
            },
        }
        for policy, row in result["policies"].items():
            assert row["fused"] == [expected[policy]] * 2, "one graph for the prompt, one for decoding"
            assert row["calls"] == {op: STEPS * count for op, count in ran[policy].items() if count}
            (tokens,) = row["tokens"]
            assert len(tokens) == STEPS
            assert row["tokens"] == result["tokens"]
            assert len(set(tokens)) > 1, "a constant sequence would show nothing"
            # A fused op rounds what the plain graph keeps in float32 at most once more at each norm.
            assert row["difference"] <= (2 * LAYERS + 1) * ROUNDOFF * result["scale"]
