"""Models whose linear layers take and hold fp8: by a scale of each row, or of 128 elements of it and of each block of
128 x 128 of a weight; by torchao where it is installed, or by layers written out here that leave the same graph.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fuseplan.config import FUSION_FLAGS

DTYPE, BLOCK = torch.float8_e4m3fn, 128
LARGEST = torch.finfo(DTYPE).max
FORMATS = ("fp8_rows", "fp8_blocks")
UNQUANTISED = "lm_head"
"""The name of the one linear layer that stays as it is, as in published checkpoints."""
ATTENTION, LEFT = "fuseplan, attention alone", "fuseplan, quantisations left"
FLAGS: dict[str, dict[str, Any]] = {
    ATTENTION: dict.fromkeys(FUSION_FLAGS, False) | {"fuse_grouped_attention": None},
    LEFT: {"fuse_norm_quant": False, "fuse_act_quant": False},
}
"""What fuseplan is given as the other sides of a model in fp8."""
MODULES = "quant_api", "quantize_.workflows.float8.float8_tensor", "quantize_.common"


def scales_of(x: Tensor, group: int) -> Tensor:
    """amax(|x|) / 448 of each group of a row, [..., hidden / group] in float32, by torchao's rounding to x's dtype."""
    scales: Tensor = x.unflatten(-1, (-1, group)).abs().amax(-1) / LARGEST
    return scales.float()


def codes_of(x: Tensor, scales: Tensor) -> Tensor:
    """x over the scales of its groups in fp8."""
    groups: Tensor = x.float().unflatten(-1, (scales.shape[-1], -1)) / scales.unsqueeze(-1)
    return groups.clamp(-LARGEST, LARGEST).to(DTYPE).flatten(-2)


class Rows(nn.Module):
    """A linear layer with a scale of each row of what it reads and of its weight.

    Args:
        linear: whose weight [N, K] is quantised; it has no bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = scales_of(linear.weight.float(), linear.in_features)
        self.weight, self.scale = _kept(codes_of(linear.weight, scales)), _kept(scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]"""
        rows = x.reshape(-1, x.shape[-1])
        scales = scales_of(rows, x.shape[-1])
        codes = codes_of(rows, scales)
        product = torch._scaled_mm(
            codes, self.weight.t(), scales, self.scale.t(), out_dtype=x.dtype, use_fast_accum=True
        )
        return product.reshape(*x.shape[:-1], -1)


class Blocks(nn.Module):
    """A linear layer with a scale of every 128 elements of a row that it reads, and of 128 x 128 of its weight.

    Args:
        linear: whose weight [N, K] is quantised; 128 divides both, and it has no bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        blocks = linear.weight.float().unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).transpose(1, 2)
        scales = blocks.abs().amax((-1, -2)) / LARGEST
        each = scales.repeat_interleave(BLOCK, 0)
        self.weight, self.scale = _kept(codes_of(linear.weight, each)), _kept(scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]"""
        rows = x.reshape(-1, x.shape[-1])
        scales = scales_of(rows, BLOCK)
        product = block_product(codes_of(rows, scales), scales, self.weight, self.scale)
        return product.reshape(*x.shape[:-1], -1)


def _kept(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def block_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, block_size: int = BLOCK) -> Tensor:
    """x @ weight.t() in bfloat16, in place of torchao's Triton kernel, with its arguments. On a GPU cuBLAS computes it,
    which takes the scales of x column by column.

    Args:
        x: [M, K] in fp8.
        x_scale: [M, K / 128], or as many elements in another shape.
        weight: [N, K] in fp8.
        weight_scale: [N / 128, K / 128].
        block_size: 128.
    """
    scales = x_scale.reshape(len(x), -1).t().contiguous().t()
    product: Tensor = torch.ops.benchmarks.block_product(x, scales, weight, weight_scale)
    return product


@torch.library.custom_op("benchmarks::block_product", mutates_args=(), tags=(torch.Tag.needs_fixed_stride_order,))
def _block_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return restored(x, x_scale) @ restored(weight, weight_scale.repeat_interleave(BLOCK, 0)).t()
    missing = -len(x) % rows_step(x.device)
    product = _by_cublas(*(with_rows(x, x_scale, missing) if missing else (x, x_scale)), weight, weight_scale)
    return product[: len(x)].contiguous()


@_block_product.register_fake
def _(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.bfloat16)


def _by_cublas(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return torch._scaled_mm(x, weight.t(), x_scale, weight_scale.t(), out_dtype=torch.bfloat16)


def with_rows(codes: Tensor, scales: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes and scales, these column by column, with so many more rows of zeros."""
    more = torch.zeros(rows, codes.shape[1], device=codes.device, dtype=torch.uint8)
    columns = torch.cat([scales.t(), more[:, : scales.shape[1]].t().float()], dim=1)
    return torch.cat([codes.view(torch.uint8), more]).view(DTYPE), columns.t()


def restored(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes times the scales of their groups, in bfloat16."""
    groups: Tensor = codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)
    return groups.flatten(-2).bfloat16()


@functools.cache
def rows_step(device: torch.device) -> int:
    """Of how many rows cuBLAS takes a multiple: 1, or 4, since scales of a group then begin at 16 bytes.

    Raises:
        RuntimeError: it takes neither, or computes something else.
    """
    failed: list[str] = []
    for rows in (1, 4):
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(rows, 1024, device=device, generator=generator, dtype=torch.bfloat16)
        layer = Blocks(nn.Linear(1024, 512, bias=False, device=device, dtype=torch.bfloat16))
        scales = scales_of(x, BLOCK)
        codes, wide = codes_of(x, scales), layer.scale.repeat_interleave(BLOCK, 0)
        try:
            got = _by_cublas(codes, scales.t().contiguous().t(), layer.weight, layer.scale)
        except RuntimeError as error:
            failed.append(str(error).splitlines()[0])
            continue
        wanted = restored(codes, scales).float() @ restored(layer.weight, wide).float().t()
        if (got.float() - wanted).norm() < 0.02 * wanted.norm():
            return rows
        failed.append(f"{rows} rows: another result than of the numbers themselves")
    raise RuntimeError(f"torch._scaled_mm takes no scales of 1 x 128 and 128 x 128 here: {'; '.join(failed)}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what a library logs of other versions and platforms."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def torchao_here() -> Any:
    """torchao.quantization, or None without it."""
    with quiet(), contextlib.suppress(ImportError):
        return importlib.import_module("torchao.quantization")
    return None


def quantised(model: nn.Module, how: str) -> str:
    """Quantises a model's linear layers but `lm_head`, in place; those of a model that is split, each rank's part.

    Args:
        model: on the device where it will run, in bfloat16.
        how: one of `FORMATS`.

    Returns:
        By what.

    Raises:
        ValueError: another format, or the model is split and torchao isn't installed.
    """
    if how not in FORMATS:
        raise ValueError(f"{how!r} is no format of this benchmark; allowed: {', '.join(FORMATS)}")
    library = torchao_here()
    if library is not None:
        return _by_torchao(library, model, how)
    layer = Rows if how == "fp8_rows" else Blocks
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Linear) and name != UNQUANTISED:
                if isinstance(child.weight, DTensor):
                    raise ValueError("the layers of a model that transformers has split need torchao 0.18")
                setattr(parent, name, layer(child))
    return f"layers written out, torch {torch.__version__}"


def _nothing(granularity: Any) -> None:
    """In the place of a check."""


def _by_torchao(library: Any, model: nn.Module, how: str) -> str:
    blocks = [library.PerBlock([1, BLOCK]), library.PerBlock([BLOCK, BLOCK])]
    modules: list[Any] = [importlib.import_module(f"torchao.quantization.{each}") for each in MODULES]
    api, tensors, kernels = modules
    if next(model.parameters()).device.type == "cpu":
        api._check_hardware_support = _nothing  # it asks for a GPU; all else of it runs on a CPU
    config = library.Float8DynamicActivationFloat8WeightConfig(
        granularity=library.PerRow() if how == "fp8_rows" else blocks,
        kernel_preference=kernels.KernelPreference.TORCH,
        set_inductor_config=False,
    )

    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.weight = _kept(module.weight.to_local())

    def takes(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name.endswith(UNQUANTISED)

    library.quantize_(model, config, filter_fn=takes)
    version = importlib.import_module("torchao").__version__
    if how == "fp8_rows":
        return f"torchao {version}"
    tensors.blockwise_fp8_gemm = block_product
    return f"torchao {version}, torch._scaled_mm in place of its Triton kernel of the product"


def stored_bytes(value: Tensor) -> int:
    """Of a weight: of what a quantised one consists of, where it is one of torchao."""
    if not hasattr(value, "__tensor_flatten__"):
        return value.nbytes
    return sum(getattr(value, name).nbytes for name in value.__tensor_flatten__()[0])
