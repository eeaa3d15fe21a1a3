"""Two ranks with gloo: what fires, and that fused and unfused runs agree."""

from collections import Counter
from typing import Any

import pytest
import transformers
from torch.torch_version import TorchVersion

from tests.forks import Forks
from tests.ranks import seen_by_ranks
from tests.real_models.cases import CASES, LAYERS, ROUNDOFF, norms
from tests.real_models.run_tensor_parallel import GPT_OSS, PAD_FIRST, REDUCE_FIRST, STEPS

SCALES_EMBEDDING = ("gemma3",)
"""Models with an op between the embedding's all-reduce and the first norm."""

BY_DAY = ("llama", "gpt-oss-120b-tiny:outer-reduce")
"""A dense model, and plain PyTorch with experts and all-reduces to fuse. `test_huggingface` has experts too."""

pytestmark = pytest.mark.distributed
Seen = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((BY_DAY, ()), id="interpreted"),
        pytest.param(((*CASES, *GPT_OSS), (*CASES, *GPT_OSS)), marks=pytest.mark.nightly, id="all coded"),
    ],
)
def seen(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two ranks saw. Inductor makes code at night, of all models; by day graphs are interpreted."""
    ran, coded = map(" ".join, request.param)
    folder, module = tmp_path_factory.mktemp("ranks"), "tests.real_models.run_tensor_parallel"
    return seen_by_ranks(forks, module, 2, folder, statuses=[0, 0], RUN=ran, CODED=coded)


def test_huggingface_models_with_their_own_plans(seen: Seen) -> None:
    first, second = (rank["huggingface"] for rank in seen)
    assert list(first) == list(second)
    missing = set(seen[0]["asked"]).difference(first)
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


def test_gpt_oss_under_both_orders(seen: Seen) -> None:
    first, second = (rank["gpt_oss"] for rank in seen)
    assert list(first) == list(second)
    assert first
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
        assert PAD_FIRST in result["policies"]
        for policy, row in result["policies"].items():
            assert row["fused"] == [expected[policy]] * 2, "one graph for the prompt, one for decoding"
            assert row["calls"] == {op: STEPS * count for op, count in ran[policy].items() if count}
            (tokens,) = row["tokens"]
            assert len(tokens) == STEPS
            assert row["tokens"] == result["tokens"]
            assert len(set(tokens)) > 1, "a constant sequence would show nothing"
            # A fused op rounds what the plain graph keeps in float32 at most once more at each norm.
            assert row["difference"] <= (2 * LAYERS + 1) * ROUNDOFF * result["scale"]
