"""How an entry of a transformers plan splits a module: its weights, and the ops before and after it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

from fuseplan.errors import WorkloadError


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one entry of a plan splits a module or a parameter.

    Attributes:
        dim: the dimension along which weights are split; None: they aren't.
        output: the op on the module's result: `keep` it, `sum` over the ranks, or `gather` along the last dimension.
        packed: the dimension holds two halves (gate and up), each of which is split.
        splits_input: the input is whole and the module takes its slice of the last dimension.
        divides_input: the module's result is the same on every rank, and is summed later.
        routes: the module holds this rank's part of the experts, and takes their numbers among all.
        looks_up: the module is an embedding, and has this rank's part of the rows.
    """

    dim: int | None = None
    output: str = "keep"
    packed: bool = False
    splits_input: bool = False
    divides_input: bool = False
    routes: bool = False
    looks_up: bool = False

    @property
    def pads(self) -> bool:
        """Whether a size may be indivisible by the ranks: the excess of the last ranks is cut off later."""
        return self.output == "gather" or self.looks_up


_ROWS, _COLUMNS, _WHOLE, _SUM = Style(dim=-1, output="sum"), Style(dim=-2), Style(), Style(output="sum")
_GATHERED, _SLICED = Style(dim=-2, output="gather"), Style(dim=-1, output="sum", splits_input=True)
_PACKED_ROWS, _BY_EXPERT = Style(dim=-1, packed=True), Style(dim=0)

STYLES = {
    "colwise": _COLUMNS,
    "colwise_gather_output": _GATHERED,
    "packed_colwise": Style(dim=-2, packed=True),
    "rowwise": _ROWS,
    "rowwise_split_input": _SLICED,
    "packed_rowwise": _PACKED_ROWS,
    "embedding_rowwise": Style(dim=0, output="sum", looks_up=True),
    "embedding_colwise": Style(dim=-1, output="gather"),
    "all_reduce": _SUM,
    "moe_tp_experts": _SUM,
    "moe_identity_expert": Style(divides_input=True),
    "grouped_gemm": _BY_EXPERT,
    "ep_dispatch_experts": Style(output="sum", routes=True),
    # These only differ from a whole module in their gradients, or in transformers' wrapper of a tensor.
    "replicated_with_grad_allreduce": _WHOLE,
    "mla_kv_a_proj": _WHOLE,
    "local_params": _WHOLE,
    "replicate": _WHOLE,
    # Their names in the first releases of transformers 5. Their router masks the experts of other ranks; here the
    # experts do that themselves, as they do in later releases.
    "colwise_rep": _GATHERED,
    "rowwise_rep": _SLICED,
    "local_colwise": _COLUMNS,
    "local_rowwise": Style(dim=-1),
    "local_packed_rowwise": _PACKED_ROWS,
    "local": _WHOLE,
    "gather": _SUM,
    "ep_router": _WHOLE,
}
"""Styles by the names that transformers 5.0 to 5.24 use in their plans."""

KEEPS_COLUMNS = frozenset(name for name, style in STYLES.items() if style.dim == -2 and style.output == "keep")


def style_of(name: str, where: str) -> Style:
    """A style by its name.

    Raises:
        WorkloadError: there is none of that name.
    """
    if name not in STYLES:
        raise WorkloadError(
            f"{where}: the model's tp_plan has the style {name!r}; supported are {', '.join(sorted(STYLES))}"
        )
    return STYLES[name]


def _style_of_part(name: str, style: str) -> Style:
    """The style of a parameter: gate and up, which transformers 5.0 splits as it reads them and packs afterwards."""
    is_read_apart = name == "gate_up_proj" and style in ("local_colwise", "local_rowwise")
    return STYLES["packed_colwise" if is_read_apart else style]


@dataclass(frozen=True)
class Split:
    """A module that is being split."""

    module: Any
    group: dist.ProcessGroup
    where: str

    def apply(self, whole: str | None, parts: Mapping[str, str | None]) -> None:
        """Splits the module's own parameters, each by its own style or by the module's, and completes its result."""
        style = STYLES[whole] if whole is not None else _WHOLE
        size = self._size(style)
        styles = {name: _style_of_part(name, part) if part is not None else style for name, part in parts.items()}
        for name, each in styles.items():
            self._narrow(name, each)
        for hook in self._before(style, any(each is _BY_EXPERT for each in styles.values())):
            self.module.register_forward_pre_hook(hook)
        if style.looks_up:
            _look_up_own_rows(self.module, self.group)
        if style.output != "keep":
            self.module.register_forward_hook(_sum(self.group) if style.output == "sum" else _gather(self.group, size))

    def _size(self, style: Style) -> int | None:
        """The size of the last dimension of the gathered result; None where nothing is gathered."""
        if style.output != "gather":
            return None
        weight: Tensor = self.module.weight
        assert style.dim is not None
        return weight.shape[style.dim]

    def _before(self, style: Style, by_expert: bool) -> Iterator[Callable[..., Any]]:
        if style.splits_input:
            yield _change_input(lambda x: x.chunk(self.group.size(), -1)[self.group.rank()])
        if style.divides_input:
            yield _change_input(lambda x: x / self.group.size())
        if style.routes or (style is _SUM and by_expert):
            yield _route(self.module, self.group)

    def _narrow(self, name: str, style: Style) -> None:
        """Keeps this rank's part of one parameter."""
        parameter: Tensor = getattr(self.module, name)
        if style.dim is None:
            return
        if name == "bias" and style.dim == -1:
            kept = parameter.detach() if self.group.rank() == 0 else torch.zeros_like(parameter)
            self.module.bias = nn.Parameter(kept, requires_grad=False)
            return
        dim = parameter.dim() - 1 if name == "bias" else style.dim % parameter.dim()
        halves = parameter.chunk(2, dim) if style.packed else (parameter,)
        missing = -halves[0].shape[dim] % self.group.size()
        if missing and style.pads:
            padding = (*(0, 0) * (parameter.dim() - 1 - dim), 0, missing)
            halves = (F.pad(parameter.detach(), padding),)
        elif missing:
            shape = tuple(parameter.shape)
            raise WorkloadError(
                f"tp={self.group.size()} does not divide dimension {dim} of {name}, {shape}, in {self.where}"
            )
        mine = [half.chunk(self.group.size(), dim)[self.group.rank()] for half in halves]
        setattr(self.module, name, nn.Parameter(torch.cat(mine, dim), requires_grad=False))


def _sum(group: dist.ProcessGroup) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of experts, beside their router's output
            return (collectives.all_reduce(output[0], "sum", group), *output[1:])
        return collectives.all_reduce(output, "sum", group)

    return hook


def _gather(group: dist.ProcessGroup, size: int | None) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # The op itself: its wrapper is deprecated under one name and not there yet under the other.
        ops = torch.ops._c10d_functional
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(output.contiguous(), group.size(), group.group_name))
        whole = torch.cat(gathered.chunk(group.size()), -1)
        return whole if whole.shape[-1] == size else whole[..., :size]

    return hook


def _change_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    return hook


def _look_up_own_rows(module: Any, group: dist.ProcessGroup) -> None:
    """Lets an embedding look up the ids whose rows this rank has; all others yield zeros.

    A hook before it would lose the ids that the one after it needs.
    """
    forward, rows, rank = module.forward, module.weight.shape[0], group.rank()
    module.padding_idx = None  # the row without a gradient, which would have to be one of this rank's

    def look_up(ids: Tensor) -> Tensor:
        # Not by a subtraction of the first row: on the first rank that is 0, and Inductor leaves it out.
        elsewhere = ids.div(rows, rounding_mode="floor") != rank
        found: Tensor = forward(ids.remainder(rows)).masked_fill(elsewhere[..., None], 0)
        return found

    module.forward = look_up


SKIPS_ABSENT_EXPERTS = "_is_expert_parallel"
"""The attribute that transformers itself sets on split experts that skip rows of absent experts."""


def _route(module: Any, group: dist.ProcessGroup) -> Callable[..., Any]:
    """Renumbers experts for a rank that has a part of them. Rows of absent experts get weight 0; experts that can skip
    rows get a number one past their last for these.
    """
    count = module.num_experts // group.size()
    module.num_experts = count
    skips = hasattr(module, SKIPS_ABSENT_EXPERTS)
    if skips:
        setattr(module, SKIPS_ABSENT_EXPERTS, True)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = args
        elsewhere = index // count != group.rank()
        own = index % count
        own = torch.where(elsewhere, count, own) if skips else own
        return hidden, own, weights.masked_fill(elsewhere, 0)

    return hook
