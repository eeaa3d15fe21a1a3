"""Random blocks that quantise, by every format, under fuseplan: by references the same bits as before, by Triton's
kernels, interpreted, codes next to the exact values.
"""

import importlib.util
import json
from typing import Any

import pytest
import torch

from tests.differential.quantised import KINDS, Block, all_of, differences
from tests.forks import Forks, Request
from tests.rules.parts.microscaling import FP8

MANY = 500
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


pytestmark = pytest.mark.filterwarnings("ignore")  # random shapes do what torch warns of


def right(found: dict[str, Any], count: int) -> None:
    """Prints what was fused, for `pytest -s`."""
    print(json.dumps({name: found[name] for name in ("fused", "kinds", "applied")}))
    assert not found["problems"], "\n".join(found["problems"])
    assert found["fused"] >= count // 4
    if count >= MANY:
        assert not [kind for kind in KINDS if not any(kind in name for name in found["kinds"])]


@pytest.mark.parametrize("count", [8, pytest.param(MANY, marks=pytest.mark.nightly)])
def test_random_blocks_keep_their_bits(count: int, one_rank: str, first_seed: int) -> None:
    right(all_of(range(first_seed, first_seed + count), one_rank), count)


@needs_triton
@pytest.mark.parametrize("count", [4, pytest.param(MANY, marks=pytest.mark.nightly)])
def test_random_blocks_by_triton(count: int, interpreting_forks: Forks, first_seed: int) -> None:
    arguments: tuple[tuple[str, ...], dict[str, str]] = ((str(first_seed), str(first_seed + count)), {})
    module = "tests.differential.run_quantised_interpreted"
    (outcome,) = interpreting_forks.outcomes(interpreting_forks.start(Request(module=module, processes=(arguments,))))
    assert outcome.status == 0, outcome.output
    found = json.loads(outcome.output.splitlines()[-1])
    right(found, count)
    others = sum(number for name, number in found["applied"].items() if not name.endswith(" triton"))
    assert others <= count // 50  # packed scales of less than 3 groups, which the kernels don't take


def test_a_code_that_is_another_is_found(one_rank: str) -> None:
    """In each of several blocks, of one element."""
    for seed in range(10):
        block = Block(seed, one_rank)
        x, r = block.calls[0]
        before = block(x, r)
        codes, scales = (each.clone() for each in before[:2])
        place = codes.numel() - 3
        if codes.dtype is torch.float32:
            codes.view(-1)[place] += codes.abs().max()
        else:
            codes.view(-1).view(torch.uint8)[place] ^= 0x2C if block.formats[0].bits == 8 else 0x66
        after = [codes, scales, *before[2:]]
        assert list(differences(block, before, after, x, r, is_exact=False)), str(block)
        assert not list(differences(block, before, before, x, r, is_exact=True))


def test_a_scale_that_is_another_is_found(one_rank: str) -> None:
    """Codes follow from it as they should."""
    found = 0
    for seed in range(60):
        block = Block(seed, one_rank)
        if block.formats[0].kind != "row" or block.formats[0].code is not FP8:
            continue
        x, r = block.calls[0]
        before, found = block(x, r), found + 1
        scales = before[1].float() * 1.25
        codes = (block.value(x, r)[0].float() / scales).to(FP8).to(before[0].dtype)
        (problem,) = differences(block, before, [codes, scales.to(before[1].dtype), *before[2:]], x, r, is_exact=False)
        assert ": the scale of [" in problem, str(block)
    assert found
