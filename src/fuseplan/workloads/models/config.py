"""The shape of a GPT-OSS model: sizes, RoPE and MoE constants, and the published variants."""

from __future__ import annotations

import dataclasses
import math

PAD_MULTIPLE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """Sizes and constants of one GPT-OSS variant.

    Layers alternate between sliding-window and full attention, sliding first. The experts take activations padded
    to `padded_hidden`, the next multiple of 256.

    Raises:
        ValueError: A size is not positive, or two sizes don't fit together.
    """

    name: str
    layers: int
    experts: int
    hidden: int = 2880
    intermediate: int = 2880
    query_heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    experts_per_token: int = 4
    vocab: int = 201088
    sliding_window: int = 128
    norm_eps: float = 1e-5
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rope_theta: float = 150000.0
    yarn_factor: float = 32.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_positions: int = 4096

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise ValueError(f"{field.name}={value} of {self.name} is not positive; give 1 or more")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads={self.query_heads} of {self.name} is not a multiple of kv_heads={self.kv_heads}; "
                f"give e.g. {self.kv_heads * max(1, round(self.query_heads / self.kv_heads))}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} of {self.name} is odd, and RoPE rotates pairs; give {self.head_dim + 1}"
            )
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} of {self.name} exceeds experts={self.experts}; "
                f"give at most {self.experts}"
            )

    @property
    def padded_hidden(self) -> int:
        """`hidden` rounded up to a multiple of 256, the width at which the experts work."""
        return -(-self.hidden // PAD_MULTIPLE) * PAD_MULTIPLE

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """The group sizes that divide the heads, the kv heads, the intermediate size and the vocabulary."""
        common = math.gcd(self.query_heads, self.kv_heads, self.intermediate, self.vocab)
        return tuple(n for n in range(1, common + 1) if common % n == 0)

    def is_sliding(self, layer: int) -> bool:
        """Whether the layer at this index attends to the last `sliding_window` positions only."""
        return layer % 2 == 0

    def with_layers(self, layers: int) -> GptOssConfig:
        """The same model cut or grown to this many layers."""
        return dataclasses.replace(self, layers=layers)


def _tiny(name: str, layers: int, experts: int) -> GptOssConfig:
    """The same structure at a size for a laptop: hidden 320 is padded to 512, and 1, 2 and 4 ranks divide it."""
    return GptOssConfig(
        name=name,
        layers=layers,
        experts=experts,
        hidden=320,
        intermediate=320,
        query_heads=8,
        kv_heads=4,
        vocab=512,
        sliding_window=8,
    )


GPT_OSS_120B = GptOssConfig(name="gpt-oss-120b", layers=36, experts=128)
GPT_OSS_20B = GptOssConfig(name="gpt-oss-20b", layers=24, experts=32)
GPT_OSS_120B_TINY = _tiny("gpt-oss-120b-tiny", layers=4, experts=16)
GPT_OSS_20B_TINY = _tiny("gpt-oss-20b-tiny", layers=2, experts=8)
