"""The configurations in `examples/configs`: what there is to recognise in each model, and what feeds what at TP=2."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TP = 2


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """What a model has, by its architecture.

    Attributes:
        layers: how many.
        hidden: the width of the residual stream.
        added: norms a layer on a sum with the residual stream, beside the model's first norm, which has no sum.
        plain: further norms of that width a layer.
        heads: norms a layer on queries and keys, by the width of a head.
        reduced: all-reduces a layer, each of which goes into a norm, after a residual add or without one.
        rotated: sites of `qk_norm_rope` a layer; where there are none, whatever norms heads is a near miss of it.
    """

    layers: int
    hidden: int
    added: int = 2
    plain: int = 0
    heads: Mapping[int, int] | None = None
    reduced: int = 2
    rotated: int = 0

    def norms(self, layers: int) -> dict[str, int]:
        """Norms of so many layers, as reports count them."""
        heads = {f"rms_norm[{width}]": count * layers for width, count in (self.heads or {}).items()}
        plain = {f"rms_norm[{self.hidden}]": self.plain * layers + 1}
        return {f"fused_add_rms_norm[{self.hidden}]": self.added * layers, **plain, **heads}

    def all_reduces(self, layers: int) -> dict[str, int]:
        """All-reduces of so many layers, likewise."""
        return {f"all_reduce[{self.hidden}]": self.reduced * layers}


FULL_SIZE = {
    # Norms behind attention and MLP, before the residual add: its all-reduces go into those. Its heads are normed
    # after they change places with tokens.
    "gemma-3-27b": FullSize(layers=62, hidden=5376, plain=2, heads={128: 2}),
    # Its plan splits experts alone: attention, whole on every rank, needs no all-reduce.
    "gpt-oss-120b": FullSize(layers=36, hidden=2880, reduced=1),
    "gpt-oss-20b": FullSize(layers=24, hidden=2880, reduced=1),
    "llama-3.1-70b": FullSize(layers=80, hidden=8192),
    "llama-3.1-8b": FullSize(layers=32, hidden=4096),
    "mixtral-8x7b": FullSize(layers=32, hidden=4096),
    "phi-4": FullSize(layers=40, hidden=5120),
    "qwen3-30b-a3b": FullSize(layers=48, hidden=2048, heads={128: 2}, rotated=1),
    "qwen3-8b": FullSize(layers=36, hidden=4096, heads={128: 2}, rotated=1),
}


def config_path(name: str) -> Path:
    """Where the `config.json` of a model is."""
    return ROOT / f"examples/configs/{name}.json"
