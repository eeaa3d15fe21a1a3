"""Built-in workloads: a name, the model behind it, and inputs to run it on."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fuseplan.workloads.models.config import (
    GPT_OSS_20B,
    GPT_OSS_20B_TINY,
    GPT_OSS_120B,
    GPT_OSS_120B_TINY,
    GptOssConfig,
)
from fuseplan.workloads.models.gpt_oss import GptOss, Layer
from fuseplan.workloads.models.tensor_parallel import Shard, check_size, shard_ends_, shard_layer_


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model to build and inputs to call it with.

    `outer_reduce` puts the all-reduce of the experts outside their op.
    """

    config: GptOssConfig
    outer_reduce: bool = False

    @property
    def name(self) -> str:
        """The name as users write it."""
        return self.config.name + (":outer-reduce" if self.outer_reduce else "")

    def with_layers(self, layers: int) -> Workload:
        """The same workload cut or grown to this many layers."""
        return dataclasses.replace(self, config=self.config.with_layers(layers))

    def check_size(self, tp: int) -> None:
        """Raise a ValueError unless the model can be split over this many ranks."""
        check_size(self.config, tp)

    def build(self, group: ProcessGroup | None = None, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> GptOss:
        """The model with random weights, for inference, on the default device; fake under a FakeTensorMode.

        Layers are split as they are made, so a rank never holds more than one whole layer. The whole weights depend on
        the seed and the device alone, so every group size computes the same function.

        Args:
            group: The ranks to split over, None for a whole model.
            dtype: Of all weights.
            seed: Of the random weights; the global generators are left as they were.

        Raises:
            ValueError: The group's size doesn't divide the model.
        """
        shard = Shard.of(group) if group is not None and group.size() > 1 else None
        self.check_size(shard.size if shard else 1)

        def on_layer(layer: Layer) -> None:
            if shard is not None:
                shard_layer_(layer, shard, outer_reduce=self.outer_reduce)

        device, default_dtype = torch.get_default_device(), torch.get_default_dtype()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" and torch.cuda.is_available() else []):
            torch.manual_seed(seed)
            torch.set_default_dtype(dtype)
            try:
                model = GptOss(self.config, on_layer)
            finally:
                torch.set_default_dtype(default_dtype)
        if shard is not None:
            shard_ends_(model, shard)
        return model.requires_grad_(False).eval()

    def example_inputs(self, sequence: int = 16, batch: int = 1, *, seed: int = 0) -> tuple[Tensor]:
        """Random `(input_ids,)`, [batch, sequence] int64, on the default device."""
        ids = torch.randint(
            self.config.vocab, (batch, sequence), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
        )
        return (ids.to(torch.get_default_device()),)


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        workload.name: workload
        for config in (GPT_OSS_120B, GPT_OSS_20B, GPT_OSS_120B_TINY, GPT_OSS_20B_TINY)
        for workload in (Workload(config=config), Workload(config=config, outer_reduce=True))
    }
)


def workload(name: str) -> Workload:
    """The built-in workload of this name.

    Raises:
        ValueError: There is none; the message names the nearest.
    """
    if name not in WORKLOADS:
        near = difflib.get_close_matches(name, WORKLOADS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no built-in workload is called {name!r}; {hint}there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
