"""How near to a float32 run torch.compile's own code, fused norms that round as the graph does, and others come.

    PYTHONPATH=src python benchmarks/nearer.py [--write]

Llama's layers in bfloat16 with random weights, on a CPU, their norms as vLLM's layers compute them. Each way is held
against a float32 run of the same weights, by the log probabilities of a prompt's tokens:

- `eager`: op by op. Everything is rounded where it is written.
- `torch.compile`: keeps float32 inside of its kernels, the residual stream from one layer to the next among it.
- `torch.compile, emulating casts`: the same with `emulate_precision_casts`, which rounds where it is written.
- `fused`: each residual add and norm is an op that rounds where the graph does, as fuseplan's kernels do by default.
- `fused, rounded once`: an op that rounds neither the sum nor the normalised value, by `allow_rounding_changes`.
- `fused, float32 residual`: the model hands its residual stream on in float32.

Each as one graph, and split before attention, as vLLM splits graphs: a residual is written down there in bfloat16.
"""

import math
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from committed import main
from torch import Tensor, nn

import fuseplan
from fuseplan.dialect import ops
from fuseplan.providers import ONE_KERNEL, provider_of

HIDDEN, HEADS, INTERMEDIATE, LAYERS, VOCABULARY, TOKENS = 512, 8, 1408, 8, 4096, 128
SEEDS = range(8)
EPS = 1e-5


class Norm(nn.Module):
    """vLLM's RMSNorm: the sum is rounded for the residual stream, unless that is float32, and the normalised value
    before the weight.
    """

    def __init__(self, wide_residual: bool) -> None:
        super().__init__()
        self.wide_residual = wide_residual
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = x.float() if residual is None else x.float() + residual.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.weight, wide if self.wide_residual else wide.to(x.dtype)


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, wide_residual: bool, split: bool) -> None:
        super().__init__()
        self.split = split
        self.norms = nn.ModuleList([Norm(wide_residual), Norm(wide_residual)])
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.norms[0](x, residual)
        if self.split:
            torch._dynamo.graph_break()
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(0, 1) for each in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, residual = self.norms[1](self.out(attended.transpose(0, 1).flatten(1)), residual)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up), residual


class Model(nn.Module):
    """Log probabilities of the next tokens of a prompt."""

    def __init__(self, *, wide_residual: bool = False, split: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Layer(wide_residual, split) for _ in range(LAYERS)])
        self.norm = Norm(wide_residual)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, residual = self.embedding(tokens), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        x, _ = self.norm(x, residual)
        scores = self.head(x).float().log_softmax(-1)
        return scores[:-1].gather(-1, tokens[1:, None]).squeeze(-1)


def rounded_once(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    y, total = ops.add_rms_norm.reference(x, residual, weight, eps, "fp32")
    return y, total


ONCE = provider_of("once", {ops.add_rms_norm: rounded_once}, roundings={"fp32"}, cost=ONE_KERNEL, uuid="1")


class Fused:
    """A model compiled by fuseplan with every residual add and norm fused.

    Args:
        model: what is compiled.
        provider: whose op is run.
        settings: further fields of `PassConfig`.
    """

    def __init__(self, model: Model, provider: str, **settings: Any) -> None:
        self.reports: list[fuseplan.Report] = []
        config = fuseplan.PassConfig(
            fuse_add_rms_norm=True, force=(f"add_rms_norm:{provider}",), verify="off", **settings
        )
        self.run = fuseplan.compile(model, config=config, providers=[ONCE], on_report=self.reports.append)

    def __call__(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.run(tokens)
        for report in self.reports:
            counts = [count for op, count in report.recognized.items() if op.startswith("fused_add_rms_norm")]
            assert report.fused["add_rms_norm"] == sum(counts)
        return found


def ways(model: Model, wide: Model) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, what computes the log probabilities."""
    return {
        "eager": model,
        "torch.compile": torch.compile(model),
        "torch.compile, emulating casts": torch.compile(model, options={"emulate_precision_casts": True}),
        "fused": Fused(model, "torch"),
        "fused, rounded once": Fused(model, "once", allow_rounding_changes=True),
        "fused, float32 residual": Fused(wide, "torch"),
    }


def draw(model: Model, seed: int) -> None:
    """Random weights, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        mean_, spread = (1.0, 0.1) if parameter.dim() == 1 else (0.0, 1 / math.sqrt(parameter.shape[1]))
        spread = 1.0 if name == "embedding.weight" else spread
        parameter.copy_(mean_ + spread * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def distances_of(*, split: bool) -> dict[str, Any]:
    """By way, the mean distance from float32, and what that is of torch.compile's."""
    torch._dynamo.reset()
    model, wide = (Model(wide_residual=each, split=split).bfloat16() for each in (False, True))
    every = ways(model, wide)
    distances: dict[str, list[float]] = {name: [] for name in every}
    for seed in SEEDS:
        draw(model, seed)
        wide.load_state_dict(model.state_dict())
        exact = Model()
        exact.load_state_dict({name: each.float() for name, each in model.state_dict().items()})
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(seed))
        truth = exact(tokens)
        for name, run in every.items():
            distances[name].append((run(tokens) - truth).abs().mean().item())
    stock = distances["torch.compile"]
    rows = {}
    for name, own in distances.items():
        ratios = [a / b for a, b in zip(own, stock, strict=True)]
        rows[name] = {
            "distance": round(mean(own), 5), "of_torch_compile": round(median(ratios), 2),
            "least": round(min(ratios), 2), "most": round(max(ratios), 2),
        }  # fmt: skip
    return rows


def measure() -> dict[str, Any]:
    """Of whole graphs, and of such as vLLM splits."""
    sizes = {"layers": LAYERS, "hidden": HIDDEN, "tokens": TOKENS, "models": len(SEEDS)}
    return {**sizes, "one graph": distances_of(split=False), "split": distances_of(split=True)}


WHAT = (
    "mean distance of the log probabilities of a prompt's tokens from a float32 run of the same weights; "
    "`of_torch_compile`: the median over models of what that is of torch.compile's, `least` and `most` beside it"
)

if __name__ == "__main__":
    main("nearer", __doc__ or "", WHAT, measure)
