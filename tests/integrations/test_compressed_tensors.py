"""compressed-tensors' quantised linear layers: the graphs that its own code leaves to Inductor.

What a layer reads is quantised and scaled back at once, in the precision of the model, and goes into a product of that
precision. Every layer's `forward` swaps its weight by an object that Dynamo doesn't trace, so as it is, a graph ends at
each layer.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fuseplan
from tests.helpers import randn
from tests.integrations.quantised import LAYERS, RULES, Block, blocks, fused, quiet, refusals_of
from tests.interpreted import no_code

WIDTH, INNER = 256, 512
SWAPS_WEIGHTS = "compressed_tensors.quantization.lifecycle.forward.patch_attr"
"""Of a compressed layer it puts the weight in the place of itself."""


@pytest.fixture(scope="module")
def quantisation() -> Iterator[Any]:
    with quiet("compressed_tensors.quantization") as library:
        yield library


Quantise = Callable[[str], nn.Module]


@pytest.fixture
def quantised(quantisation: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quantise]:
    """Makes models by the name of a scheme, whose layers Dynamo traces."""
    monkeypatch.setattr(SWAPS_WEIGHTS, lambda *arguments: nullcontext(), raising=False)
    # The first release calculates a constant by Tensor.item().
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield lambda scheme: model_of(quantisation, scheme)


def model_of(quantisation: Any, scheme: str) -> nn.Module:
    return compressed(quantisation, blocks(WIDTH, INNER), scheme)


def compressed(quantisation: Any, model: nn.Module, scheme: str) -> nn.Module:
    """A model with its linear layers quantised, but for a head."""
    groups = {"all": quantisation.preset_name_to_scheme(scheme, ["Linear"])}
    config = quantisation.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    quantisation.apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "quantization_status"):
            for name, parameter in layer.named_parameters():
                if name == "input_scale":
                    parameter.data.fill_(2.0**-6)
            layer.quantization_status = quantisation.QuantizationStatus.COMPRESSED
    return model


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("FP8_DYNAMIC", "dynamic_fp8_quant"), ("FP8_BLOCK", "group_fp8_quant"), ("FP8", "static_fp8_quant")],
)
def test_every_norm_and_activation_quantises(quantised: Quantise, scheme: str, kind: str) -> None:
    model = quantised(scheme)
    for layer in model.modules():
        if hasattr(layer, "input_zero_point"):
            del layer.input_zero_point
        if isinstance(layer, Block) and scheme == "FP8":
            layer.up.input_scale = layer.gate.input_scale  # a scale is of what is read, not of who reads it
    counts, applied, got, wanted = fused(model, randn(2, 3, WIDTH))
    assert counts == dict.fromkeys(RULES, LAYERS)
    assert applied == {f"rms_norm_{kind}", f"fused_add_rms_norm_{kind}", f"silu_and_mul_{kind}"}
    assert torch.equal(got, wanted)


def test_a_plan_leaves_rows_to_inductor_that_are_restored_at_once(quantised: Quantise) -> None:
    """One kernel of Inductor's quantises a row and restores it; of groups it makes two."""
    rows = fuseplan.explain(quantised("FP8_DYNAMIC"), randn(2, 3, WIDTH), device="h200")
    assert rows.fused["norm_quant"] == rows.fused["act_quant"] == 0
    assert rows.saved_us >= 0


def test_a_graph_ends_at_each_of_its_layers(quantisation: Any) -> None:
    counts, applied, *_ = fused(model_of(quantisation, "FP8_DYNAMIC"), randn(2, 3, WIDTH))
    assert counts == dict.fromkeys(RULES, 0)
    assert applied == set()


ROUNDED = "quantisation not recognised: numbers are rounded to the values of e2m1"


@pytest.mark.parametrize(
    ("scheme", "shape", "says"),
    [
        ("FP8_DYNAMIC", (6, WIDTH), "the scale is computed from all rows at once"),
        ("FP8", (2, 3, WIDTH), "is added to the scaled value, and the op has none"),
        ("MXFP4", (2, 3, WIDTH), f"MXFP4 {ROUNDED}"),
        ("NVFP4", (2, 3, WIDTH), f"NVFP4 {ROUNDED}"),
        ("MXFP8", (2, 3, WIDTH), "exponents are computed in another way than by any scaling of the op"),
    ],
)
def test_what_is_left_alone_is_named(quantised: Quantise, scheme: str, shape: tuple[int, ...], says: str) -> None:
    """Of rows without a batch, a scale a token is one of all of them; a given scale comes with a zero point. Codes in
    fp4 are numbers throughout.
    """
    details = refusals_of(quantised(scheme), randn(*shape), "h200")
    assert any(says in detail for detail in details), details


COUNTS = {
    "FP8_DYNAMIC": (2, 1), "FP8_BLOCK": (2, 1), "FP8": (0, 0), "MXFP8": (0, 0), "MXFP4": (0, 0), "NVFP4": (0, 0),
    "W8A8": (0, 0),
}  # fmt: skip
"""By scheme: how many norms and activations of each layer of a whole model quantise what layers behind them read."""


@pytest.mark.parametrize("scheme", COUNTS)
def test_a_whole_model_of_transformers(quantised: Quantise, quantisation: Any, scheme: str) -> None:
    """A Llama whose linear layers are quantised, its head aside, from tokens to logits: attention's result alone is
    quantised by itself. `FP8` has zero points, and the others no codes that an op yields.
    """
    norms, activations = COUNTS[scheme]
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM(config)
    model = compressed(quantisation, llama.eval().bfloat16(), scheme)
    counts, _, got, wanted = fused(model, torch.arange(12).reshape(2, 6), no_code())
    assert counts == {"norm_quant": norms * LAYERS, "act_quant": activations * LAYERS}
    if norms:
        assert (got.logits - wanted.logits).norm() <= 0.05 * wanted.logits.norm()
