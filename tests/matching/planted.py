"""Real models with one obstacle planted at one place, by hooks: what a user's own code could do there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from fuseplan.config import CompileRange, PassConfig
from fuseplan.explanation.capture import capture
from fuseplan.explanation.explanation import Explanation
from fuseplan.integrations import splitting
from fuseplan.integrations import transformers as huggingface
from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES
from fuseplan.record import Report
from fuseplan.workloads.models import workload
from tests.helpers import all_reduce
from tests.providers.stand_ins import ranks
from tests.real_models.cases import CASES

LAYERS = 2
GPT_OSS = "gpt-oss-120b-tiny:outer-reduce"
WORKLOADS = (GPT_OSS, "llama", "qwen3", "gpt_oss", "mixtral")
PLANS = {
    "gpt_oss": {
        **{f"model.layers.*.self_attn.{part}": "colwise" for part in ("q_proj", "k_proj", "v_proj", "sinks")},
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.experts": "moe_tp_experts",
    }
}
"""For models that bring no `tp_plan` that splits their attention."""


class Place(NamedTuple):
    """A module whose result is all-reduced, and the norm that reads the sum with the residual added."""

    reduced: str
    norm: str


class Garden:
    """A model in which obstacles can be planted.

    Attributes:
        model: on the first of two ranks, with weights that are not there.
        ids: its input.
        group: the name of the process group of the two ranks.
        places: all modules that a layer's norm waits for.
        dynamic: whether it is traced for any number of tokens.
    """

    def __init__(self, name: str, layers: int) -> None:
        world = dist.group.WORLD
        assert world is not None
        self.group = world.group_name
        # Symbolic sizes double the time of a trace, so one model stands for all in that.
        self.dynamic = name == GPT_OSS
        self.ids = torch.randint(100, (1, 16))
        self._kept: list[Tensor] = []
        if name == GPT_OSS:
            self.model: nn.Module = workload(name).with_layers(layers).build(world)
            root, pairs = "", (("attention.o_proj", "post_attention_norm"), ("experts", "input_norm"))
        else:
            config = huggingface.config_from_dict({**CASES[name].config, "num_hidden_layers": layers}, name)
            config.use_cache = False
            self.model = huggingface.build(config, None, name)
            splitting.shard(self.model, world, name, PLANS.get(name))
            root, pairs = (
                "model.",
                (("self_attn.o_proj", "post_attention_layernorm"), (CASES[name].last, "input_layernorm")),
            )
        self.places = [
            Place(f"{root}layers.{layer}.{reduced}", f"{root}layers.{layer + after}.{norm}")
            for layer in range(layers)
            for after, (reduced, norm) in enumerate(pairs)
            if layer + after < layers
        ]
        self.model.register_forward_pre_hook(lambda module, args: self._kept.clear())
        self.model.register_forward_hook(self._add_kept)

    def keep(self, value: Tensor) -> None:
        """Lets the end of the model read a value too."""
        self._kept.append(value.sum())

    def _add_kept(self, module: nn.Module, args: Any, output: Any) -> Any:
        for value in self._kept:
            if isinstance(output, Tensor):
                output = output + value
            else:
                output.logits = output.logits + value
        return output

    def before(self, place: Place, function: Callable[[Tensor], Tensor]) -> None:
        """Changes what is all-reduced."""
        module = self.model.get_submodule(place.reduced)
        inner = getattr(module, "inner", module)
        assert isinstance(inner, nn.Module)
        # Not prepend=True: Dynamo of torch 2.11 guards on another hook than it means where the order was changed.
        later = list(inner._forward_hooks.values())
        inner._forward_hooks.clear()
        inner.register_forward_hook(lambda module, args, output: function(output))
        for hook in later:
            inner.register_forward_hook(hook)

    def after(self, place: Place, function: Callable[[Tensor], Tensor]) -> None:
        """Changes what was all-reduced."""
        module = self.model.get_submodule(place.reduced)
        module.register_forward_hook(lambda module, args, output: function(output))

    def normed(self, place: Place, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Changes the norm's result, given its input and its result."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return function(args[0], output[0]), *output[1:]
            return function(args[0], output)

        self.model.get_submodule(place.norm).register_forward_hook(hook)


@contextmanager
def garden(name: str, layers: int = LAYERS) -> Iterator[Garden]:
    """A workload to plant in."""
    with ranks(2):
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            made = Garden(name, layers)
        yield made


def explain(made: Garden, config: PassConfig, providers: Sequence[str]) -> Report:
    """What a plan for one range on H200 says of the model."""
    traced = capture(made.model, (made.ids,), {}, dynamic=made.dynamic)
    config = replace(config, compile_ranges=(CompileRange(start=1, end=64),))
    allowed = [each for each in BUILT_IN_PROVIDERS if not providers or each.name in providers]
    return Explanation(traced, config, PROFILES["h200"], allowed).report(config.chosen_policy)


# The obstacles.


def a_slice(made: Garden, place: Place) -> None:
    def narrow(summed: Tensor) -> Tensor:
        made.keep(summed[..., -8:])
        return summed[..., :-8]

    made.before(place, lambda partial: F.pad(partial, (0, 8)))
    made.after(place, narrow)


def a_reshape(made: Garden, place: Place) -> None:
    def join(summed: Tensor) -> Tensor:
        made.keep(summed[..., 0, :])
        return summed.reshape(*summed.shape[:-2], -1)

    made.before(place, lambda partial: partial.reshape(*partial.shape[:-1], 2, -1))
    made.after(place, join)


def a_transpose(made: Garden, place: Place) -> None:
    def turn(summed: Tensor) -> Tensor:
        made.keep(summed[..., 0, :])
        return summed.transpose(-1, -2)

    made.before(place, lambda partial: partial.transpose(-1, -2).contiguous())
    made.after(place, turn)


def a_clone(made: Garden, place: Place) -> None:
    # Inductor itself drops a plain clone; this one turns the rows' order in memory around.
    made.after(place, lambda summed: summed.transpose(-1, -2).contiguous().transpose(-1, -2))


def a_cast(made: Garden, place: Place) -> None:
    made.before(place, lambda partial: partial.float())
    made.after(place, lambda summed: summed.to(torch.bfloat16))


def an_extra_user(made: Garden, place: Place) -> None:
    def read(summed: Tensor) -> Tensor:
        made.keep(summed)
        return summed

    made.after(place, read)


def a_dead_output(made: Garden, place: Place) -> None:
    made.normed(place, lambda x, y: x)


def an_fp32_weight(made: Garden, place: Place) -> None:
    norm = made.model.get_submodule(place.norm)
    weight = made.model.get_parameter(f"{place.norm}.weight")
    norm.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    made.normed(place, lambda x, y: y.to(x.dtype))


def an_in_place_add(made: Garden, place: Place) -> None:
    made.after(place, lambda summed: summed.add_(1.0))


def another_group(made: Garden, place: Place) -> None:
    inner = dist.new_group([0, 1]).group_name
    assert inner != made.group
    made.before(place, lambda partial: all_reduce(partial, inner))


def an_unsupported_hidden_size(made: Garden, place: Place) -> None:
    """An adapter of an odd size behind the norm, with an all-reduce and a norm of its own."""

    weight = made.model.get_parameter(f"{place.norm}.weight")

    def adapter(x: Tensor, y: Tensor) -> Tensor:
        narrow = y[..., :-4]
        total = (all_reduce(narrow.sigmoid(), made.group) + narrow).float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y + F.pad((normed * weight[:-4]).to(y.dtype), (0, 4))

    made.normed(place, adapter)


def nothing(made: Garden, place: Place) -> None:
    """For what is set in the configuration."""
