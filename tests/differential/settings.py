"""What random programs are compiled with: flags, policies, what is forced and forbidden, and rules, providers and
passes of one's own that compete with those that are built in.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement

from fuseplan.compilation.manager import PostGradPassManager, ReportCallback
from fuseplan.config import FUSION_FLAGS, CompileRange, PassConfig
from fuseplan.dialect import DialectOp, Rounding, define, ops
from fuseplan.errors import PlanError
from fuseplan.matching import ExternalPass, GraphPass
from fuseplan.planner.candidates import Candidate
from fuseplan.providers import BUILT_IN_PROVIDERS, Offer, Provider, provider_of
from fuseplan.record import Reason, Refusal
from fuseplan.rules import Rule, by_name
from fuseplan.rules.families import BUILT_IN_RULES


def rms_norm_relu_reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> Tensor:
    return ops.rms_norm.reference(x, weight, eps, rounding).relu()  # type: ignore[no-any-return]


rms_norm_rectified = define(
    "rms_norm_rectified", ops.rms_norm.schema, reference=rms_norm_relu_reference, fake=ops.rms_norm.fake,
    samples=ops.rms_norm.samples, fused=True,
)  # fmt: skip
FUSED = [op for op in ops.values() if op.fused]


class NormRelu(Rule):
    """rms_norm -> relu  =>  one op.   y = relu(rms_norm(x) * weight)"""

    name, flags, op, core = "norm_relu", (), rms_norm_rectified, ops.rms_norm

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return torch.ops.aten.relu.default(ops.rms_norm(x, weight, eps, rounding))

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return rms_norm_rectified(x, weight, eps, rounding)


class NormReluWithPads(NormRelu):
    """The same, only together with every pad of the norm by the same provider, and all of them or none."""

    requires, together = ("act_padding",), True


def in_float64(op: DialectOp) -> Any:
    """A kernel that rounds once, at the end."""

    def kernel(*args: Any) -> Any:
        wide = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        results, fakes = op.reference(*wide), op.fake(*args)
        if isinstance(results, tuple):
            return tuple(result.to(fake.dtype) for result, fake in zip(results, fakes, strict=True))
        return results.to(fakes.dtype)

    return kernel


def even_widths(m: Any) -> Refusal | None:
    width = (m.x if "x" in m.values else m.gate).shape[-1]
    return Refusal(reason=Reason.SIZE, detail=f"{width} is odd") if width % 2 else None


OWN_RULES: tuple[Rule, ...] = (NormRelu(),)
COUPLED_RULES: tuple[Rule, ...] = (NormReluWithPads(),)
MINE = provider_of("mine", {rms_norm_rectified: rms_norm_relu_reference}, cost=0.0)
ROOM = 9000
"""Rows that fit into the workspace of a provider."""


def with_little_room(op: DialectOp) -> Any:
    def kernel(*args: Any) -> Any:
        rows = args[0].numel() // args[0].shape[-1]
        if rows > ROOM:
            raise RuntimeError(f"{rows} rows don't fit into a workspace of {ROOM}")
        return op.reference(*args)

    return kernel


WIDE = provider_of("wide", {op: in_float64(op) for op in FUSED}, accepts=even_widths, cost=0.0)
ONE_ROUNDING = provider_of(
    "one_rounding", {op: op.reference for op in FUSED if "fused_add" in op.name}, roundings=[Rounding.FP32], cost=0.0
)
LIMITED = provider_of("limited", {op: with_little_room(op) for op in FUSED if "x" in op.schema}, cost=0.0)
# More rows are refused, and don't run the reference.
LIMITED = replace(LIMITED, implements=dict.fromkeys(LIMITED.implements, Offer(cost=0.0, most_rows=lambda m: ROOM)))
RULE_NAMES = sorted(by_name((*BUILT_IN_RULES, *OWN_RULES)))


@functools.cache
def product_and_relu() -> PatternMatcherPass:
    """Somebody's pass, which takes the last product of many norms: relu(x * y) -> clamp(x * y, 0)."""
    result = PatternMatcherPass(pass_name="product_relu")
    inputs = [torch.ones(4, 4), torch.ones(4, 4)]
    register_replacement(
        lambda x, y: torch.relu(x * y), lambda x, y: torch.clamp_min(x * y, 0.0), inputs, fwd_only, result
    )
    return result


def negated(graph: fx.Graph) -> None:
    """Somebody's pass, which is a function: -x -> x * -1."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default):
        node.target = torch.ops.aten.mul.Tensor
        node.args = (*node.args, -1)


class Negated:
    """The same as an object."""

    __slots__ = ()

    def __call__(self, graph: fx.Graph) -> None:
        negated(graph)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a model is compiled with.

    Attributes:
        config: flags, policy, what is forced.
        rules: beside the built-in ones.
        providers: beside the built-in ones.
        saving_us: what a match of somebody's pass saves; None: there is no such pass.
        function: somebody's pass that is a function of the graph.
        freezing: whether Inductor makes constants of the buffers.
    """

    config: PassConfig = field(default_factory=PassConfig)
    rules: tuple[Rule, ...] = ()
    providers: tuple[Provider, ...] = ()
    saving_us: float | None = None
    function: Callable[[fx.Graph], None] | None = None
    freezing: bool = False

    @functools.cached_property
    def passes(self) -> tuple[ExternalPass | GraphPass, ...]:
        """Somebody's passes."""
        planned = [] if self.saving_us is None else [ExternalPass(matcher=product_and_relu(), saving_us=self.saving_us)]
        return (*planned, *([] if self.function is None else [self.function]))

    def manager(
        self, on_report: ReportCallback | None = None, shuffle: random.Random | None = None
    ) -> PostGradPassManager:
        """A pass manager; with `shuffle`, what it is given is in another order, which has no meaning."""
        rules, providers = [*BUILT_IN_RULES, *self.rules], [*BUILT_IN_PROVIDERS, *self.providers]
        if shuffle is not None:
            shuffle.shuffle(rules)
            shuffle.shuffle(providers)
        given: dict[str, Any] = {"rules": rules, "providers": providers, "passes": self.passes}
        return PostGradPassManager(self.config, on_report=on_report, **given)

    def __str__(self) -> str:
        given = {name: value for name, value in vars(self.config).items() if value != getattr(PassConfig(), name)}
        parts = [f"{name}={str(value) if name == 'policy' else value!r}" for name, value in given.items()]
        parts += [f"rule {rule.name}" for rule in self.rules] + [f"provider {each.name}" for each in self.providers]
        parts += [f"product_relu saves {self.saving_us} us"] if self.saving_us is not None else []
        parts += ["a function is a pass"] if self.function is not None else []
        return ", ".join([*parts, *(["freezing"] if self.freezing else [])])


def draw(rng: random.Random) -> Setting:
    """A setting that forces nothing."""
    drawn = (flag for flag in FUSION_FLAGS if "attention" not in flag)
    flags: dict[str, Any] = {flag: rng.choice((None, None, None, True, True, False)) for flag in drawn}
    rules = rng.choices(((), OWN_RULES, COUPLED_RULES), (5, 3, 2))[0]
    providers = [each for each, often in ((WIDE, 0.3), (ONE_ROUNDING, 0.3), (LIMITED, 0.2)) if rng.random() < often]
    if rules == COUPLED_RULES and WIDE not in providers:
        providers.append(WIDE)
    policy = rng.choices(("planned", "ordered", "off"), (5, 4, 0.2))[0]
    if policy == "ordered":
        flags = dict.fromkeys(flags)
        names = [name for name in RULE_NAMES if rules or name != NormRelu.name]
        policy = f"ordered({', '.join(rng.sample(names, rng.randint(2, len(names))))})"
    return Setting(
        config=PassConfig(
            **flags,
            policy=policy,
            costs="modelled",
            eliminate_noops=rng.random() < 0.8,
            max_fusions=rng.choice((None, None, None, None, 0, 1, 2, 3)),
            allow_rounding_changes=rng.random() < 0.3,
            verify=rng.choices(("off", "always"), (4, 1))[0],
        ),
        rules=rules,
        providers=(*providers, *([MINE] if rules else [])),
        saving_us=rng.choice((None, None, None, 0.1, 50.0)),
        function=rng.choice((None, None, None, negated, Negated())),
        freezing=rng.random() < 0.15,
    )


def in_ranges(setting: Setting, tokens: Sequence[int], rng: random.Random) -> Setting:
    """The same setting with graphs and plans of their own for some of the numbers of tokens that a model is called
    with, and for others; one call in five lies in none of them.
    """
    ends = sorted({count for count in tokens if rng.random() < 0.8} | {rng.randint(1, 64) for _ in range(2)})
    ranges, start = [], 1
    for end in ends:
        if rng.random() < 0.3:
            start = end
        ranges.append(CompileRange(start=start, end=end))
        start = end + 1
    return replace(setting, config=replace(setting.config, compile_ranges=tuple(ranges)))


def fuses(setting: Setting, graph: fx.Graph) -> bool:
    """Whether something is chosen for a graph."""
    found = _chosen(setting, graph)
    return found is not None and bool(found[1])


def coupling_broken(setting: Setting, graph: fx.Graph) -> list[str]:
    """Whether what is chosen for a graph leaves out what a rule asks for, however it was chosen."""
    found = _chosen(setting, graph)
    if found is None:
        return []
    program, selected = found
    broken = [pair for pair in program.requires if pair[0] in selected and pair[1] not in selected]
    torn = [group for group in program.together if 0 < len(group & selected) < len(group)]
    return [f"a rule is applied without what it requires: {broken or torn}"] if broken or torn else []


def _chosen(setting: Setting, graph: fx.Graph) -> tuple[Any, set[int]] | None:
    """(what there is to choose from, what is chosen); None where what is asked contradicts itself: places are counted
    otherwise here where a pass of the setting's own runs before.
    """
    manager = setting.manager()
    try:
        analysis = manager.analyze(graph)
        selected = set(manager.decide(analysis, setting.config.chosen_policy, "graph_0").selected)
    except PlanError:
        return None
    return analysis.problem.program, selected


def direct(setting: Setting, candidates: Sequence[Candidate], rng: random.Random) -> Setting:
    """The same setting, in which some of a graph's candidates are forced or forbidden; they may contradict each other.

    The model of a CPU finds hardly a fusion worth it, so that most plans fuse what is forced.
    """
    selectors = sorted({_selector(each, rng) for each in candidates})
    is_planned = setting.config.chosen_policy.name == "planned"
    if not selectors or rng.random() > (0.9 if is_planned else 0.3):
        return setting
    chosen = rng.sample(selectors, min(len(selectors), rng.choice((1, 1, 2, 3, 5))))
    forced = chosen[rng.choice((0, 0, 0, 1)) :] if is_planned else []
    forbidden = [each for each in chosen if each not in forced]
    return replace(setting, config=replace(setting.config, force=forced, forbid=forbidden))


def _selector(candidate: Candidate, rng: random.Random) -> str:
    place = f"#{candidate.site.ordinal}" if candidate.site is not None and rng.random() < 0.8 else ""
    provider = f":{candidate.provider}" if rng.random() < 0.5 else ""
    return f"{candidate.rule}{place}{provider}"
