"""The entry points: `compile`, `inductor_options`, `explain`."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import list_mode_options

from fuseplan.arguments import called, instance, instances, mapping
from fuseplan.caching import store
from fuseplan.compatibility import require_supported_torch
from fuseplan.compilation.dispatch import Dispatch
from fuseplan.compilation.first_run import AgreedGraph, digest_of, groups_of, settle, settled
from fuseplan.compilation.floats import Floats, constant
from fuseplan.compilation.hook import HOOK, emptied, standing
from fuseplan.compilation.manager import PostGradPassManager, ReportCallback
from fuseplan.compilation.regions import identity_of, region_of, values_of
from fuseplan.config import CompileRange, PassConfig, settings
from fuseplan.cpython import uncollected
from fuseplan.devices import asked_profile
from fuseplan.distributed import Agreement
from fuseplan.distributed.agreement import failed
from fuseplan.errors import ConfigError, FuseplanWarning
from fuseplan.explanation.capture import capture, no_caches
from fuseplan.explanation.explanation import Explanation
from fuseplan.providers import BUILT_IN_PROVIDERS, DeviceProfile, Provider, without_shared_memory
from fuseplan.record import Report
from fuseplan.record.report import merged
from fuseplan.report.summary import tell
from fuseplan.report.trace import publish
from fuseplan.rules import Rule
from fuseplan.rules.families import BUILT_IN_RULES

T = TypeVar("T", bound=Callable[..., Any])


def inductor_options(
    config: PassConfig | None = None,
    *,
    on_report: ReportCallback | None = None,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[object] = (),
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = (),
) -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)`, or `inductor_configs=` of AOTInductor's
    `aoti_compile_and_package`, that put fuseplan into Inductor's custom-pass hook. A `FuseplanWarning` names settings
    without effect, and packages that need fuseplan where they are loaded.

    One plan serves every number of tokens that the graph may see; `fuseplan.compile` makes one for each compile range.
    It also lets ranks settle before a graph's first run; here a kernel that they would have to verify together is
    refused.

    Args:
        config: flags and policy; None: the defaults.
        on_report: called with a `Report` for every graph that is compiled cold. A warm compile cache skips the pass and
            this call; `fuseplan.compile` delivers reports then, too.
        options: further Inductor options. A custom pass among them, or in Inductor's global configuration, runs before
            fuseplan's and is not dropped.
        passes: other people's passes, as for `compile`.
        rules: fusions beside the built-in ones, as for `compile`.
        providers: as for `compile`.

    Returns:
        `options` with fuseplan's pass manager in its hook.

    Raises:
        ConfigError: `config` is none, flags and policy contradict each other, or the environment is malformed.
        CompatibilityError: this torch is too old. Where private interfaces of torch's have moved, a `FuseplanWarning`
            names them, and `options` come back as they are.
    """
    require_supported_torch()
    config = settings(config)
    ranges = config.compile_ranges
    whole = CompileRange(start=ranges[0].start, end=ranges[-1].end) if ranges else None
    further = _Further(passes, instances("rules", rules, Rule), instances("providers", providers, Provider))
    warner = store.Warner(called("on_report", on_report, optional=True))
    return _options(config, whole, warner, mapping("options", options), further)


class _Further(NamedTuple):
    """A user's rules, providers and passes."""

    passes: Sequence[object]
    rules: Sequence[Rule]
    providers: Sequence[Provider]
    apart: str | None = None
    """Why ranks can't share memory; None where that isn't known."""


def _options(
    config: PassConfig,
    compile_range: CompileRange | None,
    on_report: ReportCallback | None,
    options: dict[str, Any],
    further: _Further,
    *,
    settles: bool = False,
) -> dict[str, Any]:
    previous = standing(options)
    providers: Sequence[Provider] = (*BUILT_IN_PROVIDERS, *further.providers)
    if further.apart is not None:
        providers = without_shared_memory(providers, further.apart)
    manager = PostGradPassManager(
        config, compile_range=compile_range, on_report=on_report, previous=previous, passes=further.passes,
        rules=(*BUILT_IN_RULES, *further.rules), providers=providers, settles=settles,
    )  # fmt: skip
    return {**options, HOOK: manager}


def compile(
    model: T,
    *,
    config: PassConfig | None = None,
    on_report: ReportCallback | None = None,
    passes: Sequence[object] = (),
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = (),
    **torch_compile_arguments: Any,
) -> T:
    """`torch.compile(model)` with planned fusions.

    The first compilation logs one line, the fusions and their saving, or why there are none:
    `logging.getLogger("fuseplan.compiled").setLevel(logging.WARNING)` switches it off.

    Args:
        model: a module, function or bound method.
        config: flags, policy and compile ranges; None: the defaults. With `compile_ranges`, a call goes to the graph
            whose range holds its number of tokens: the product of the leading dimensions of its first tensor argument,
            [B, S] for integers, [B, S, hidden] for activations. A call outside of all ranges runs as under plain
            `torch.compile`.
        on_report: called with a `Report` for every graph that is compiled, from a warm compile cache too; and once more
            before its first run, where ranks verified it together or settled on running it unfused.
        passes: other people's passes: `PatternMatcherPass` objects, unmodified, join the plan under `planned`, each
            match worth one kernel launch, or the saving that an `ExternalPass` around the pass declares. Functions of a
            graph, and passes whose patterns contain ops that another one puts in, run before or after the plan, in
            their order.
        rules: fusions beside the built-in ones.
        providers: further ones; `providers.provider_of` makes one of kernels.
        **torch_compile_arguments: go to `torch.compile` (`dynamic`, `fullgraph`, `mode`, `options` ...).

    Returns:
        The result of `torch.compile`. With compile ranges each call chooses among several graphs; a module is still
        torch's own `OptimizedModule`, whose copies share compiled code and compute with their own weights.

    Raises:
        ConfigError: `model` can't be called, flags and policy contradict each other, `backend` isn't Inductor, `mode`
            and `options` set one option to different values.
        CompatibilityError: this torch is too old. Where private interfaces of torch's have moved, a `FuseplanWarning`
            names them, and the model is compiled by plain `torch.compile`.
    """
    require_supported_torch()
    model, config = called("model", model), settings(config)
    arguments = dict(torch_compile_arguments)
    backend = arguments.pop("backend", "inductor")
    if backend != "inductor":
        raise ConfigError(f"backend={backend!r}: fusions are passes of Inductor; leave backend out or use 'inductor'")
    given = mapping("options", arguments.pop("options", None))
    options = _merge_mode(arguments.pop("mode", None), given, arguments.get("dynamic"))
    _warn_if_nothing_compiles(arguments)
    further = _Further(passes, instances("rules", rules, Rule), instances("providers", providers, Provider))
    warner = _Teller(called("on_report", on_report, optional=True))

    def branch(compile_range: CompileRange | None) -> _Branch:
        backend = _Backend(config, compile_range, warner, options, arguments.get("dynamic"), further)
        return _Branch({**arguments, "backend": backend})

    if not config.compile_ranges:
        return Dispatch({}, branch(None), warner.warn).compile(model)
    branches = {compile_range: branch(compile_range) for compile_range in config.compile_ranges}
    return Dispatch(branches, _Branch({**arguments, "options": options}), warner.warn).compile(model)


class _Teller(store.Warner):
    """Also logs the result of the first compilation in a line, on the first rank."""

    has_logged = False

    def __call__(self, report: Report) -> None:
        super().__call__(report)
        if not self.has_logged and not (dist.is_initialized() and dist.get_rank()):
            tell(report, hint=self.on_report is None)
        self.has_logged = True


@dataclass(frozen=True)
class _Branch:
    """`torch.compile` with its arguments."""

    arguments: Mapping[str, Any]

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        backend = self.arguments.get("backend")
        if isinstance(backend, _Backend):
            return backend.region.compile(function, self.arguments)
        # torch removes options that aren't Inductor's.
        options = dict(self.arguments["options"])
        return region_of("plain", values_of(options)).compile(function, {**self.arguments, "options": options})


def _merge_mode(mode: str | None, options: Mapping[str, Any], dynamic: bool | None) -> dict[str, Any]:
    """torch.compile refuses a mode beside options; here the mode is expanded to its options."""
    expanded = dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}
    for name, value in options.items():
        if expanded.get(name, value) != value:
            raise ConfigError(f"mode={mode!r} sets {name}={expanded[name]!r} and options set it to {value!r}; drop one")
    return {**expanded, **options}


def _warn_if_nothing_compiles(arguments: Mapping[str, Any]) -> None:
    if arguments.get("disable") or torch._dynamo.config.disable:
        why = "disable=True" if arguments.get("disable") else "torch._dynamo.config.disable (TORCHDYNAMO_DISABLE)"
        text = f"fuseplan has no effect: torch.compile is switched off by {why}, so no graph reaches it"
        warnings.warn(text, FuseplanWarning, stacklevel=3)


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


class _Backend(torch._TorchCompileInductorWrapper):
    """Inductor with fuseplan's pass, which delivers a report for every graph, compiled cold or found in a warm
    cache.
    """

    __name__ = "fuseplan"

    def __init__(
        self,
        config: PassConfig,
        compile_range: CompileRange | None,
        deliver: store.Warner,
        options: Mapping[str, Any],
        dynamic: bool | None,
        further: _Further,
    ) -> None:
        self._given = config, compile_range, deliver, options, dynamic, further
        self.deliver = deliver
        self.fresh: list[Report] = []
        merged = _options(config, compile_range, self.fresh.append, dict(options), further, settles=True)
        super().__init__(None, merged, dynamic)  # type: ignore[no-untyped-call]
        self.plain = torch._TorchCompileInductorWrapper(None, dict(options), dynamic)
        manager: PostGradPassManager = self.config[HOOK]
        self.region = region_of(
            manager.identity, *manager.named_groups, values_of(options), dynamic, identity_of(deliver.on_report)
        )
        self.floats = Floats(self.region)
        manager.on_canonical = self.floats.choose if config.chosen_policy.name != "off" else None

    def __call__(self, model_: fx.GraphModule, inputs_: Sequence[Any], **extra: Any) -> Any:
        manager: PostGradPassManager = self.config[HOOK]
        manager.may_restart = self.floats.meet(model_)
        options = {name: value for name, value in self.config.items() if name != HOOK}
        key = store.graph_key(model_, inputs_, manager.uuid(), options)
        compiled = self._compile(model_, inputs_, extra, cold=key is None)
        known = store.load(key) if key is not None and not self.fresh else None
        if known is not None:
            publish(known)
        elif not self.fresh and key is not None and (_has_peers() or not torch.is_grad_enabled()):
            # Another function became the same graph, and Inductor's cache had that. Only a cold compilation shows the
            # applied fusions, which the other ranks will ask for. It doesn't where the graph has no op, as Inductor
            # doesn't compile it and no rank asks; and with gradients the pass may report nothing.
            compiled = self._compile(model_, inputs_, extra, cold=True)
        constants = self.floats.settle()
        if known is None and not self.fresh:
            return compiled
        report = known or merged(self.fresh)
        if known is None and key is not None and all(graph.is_lasting for graph in report.graphs):
            store.save(key, report)
        self.deliver(report)
        if not groups_of(report):
            return compiled
        later = self._later(model_, inputs_, extra, constants)
        return AgreedGraph(
            compiled,
            lambda: later(self.plain),
            lambda why: later(self._apart(why)),
            lambda: self._settle(model_, report, digest_of(report)),
            lambda verdict: self.deliver(settled(report, verdict)),
        )

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any], extra: Mapping[str, Any], *, cold: bool) -> Any:
        """Inductor's compiled graph; `fresh` has the pass's reports, if it ran."""
        self.fresh.clear()
        try:
            with emptied(), no_caches() if cold else contextlib.nullcontext():
                return super().__call__(gm, inputs, **extra)  # type: ignore[no-untyped-call]
        except Exception as error:
            self.floats.restart()
            self.floats.settle()
            if self.fresh:
                self._settle(gm, merged(self.fresh), failed(error))
            raise

    def _later(
        self, gm: fx.GraphModule, inputs: Sequence[Any], extra: Mapping[str, Any], constants: frozenset[str]
    ) -> Callable[[Callable[..., Any]], Any]:
        """Lets a backend compile the graph later as it would be compiled now: the current context has Dynamo's facts
        about its sizes.
        """
        context = TracingContext.try_get()

        def compile_by(backend: Callable[..., Any]) -> Any:
            with tracing(context), constant(constants):
                return backend(gm, inputs, **extra)

        return compile_by

    def _apart(self, why: str) -> "_Backend":
        """A backend without fusions that need memory shared between ranks; all ranks settle on that plan again."""
        config, compile_range, deliver, options, dynamic, (passes, rules, providers, _) = self._given
        apart = _Further(passes, rules, providers, why)
        backend = _Backend(config, compile_range, deliver, options, dynamic, apart)
        backend.config[HOOK].on_canonical = None  # the frame can't be traced again: it runs
        return backend

    def _settle(self, gm: fx.GraphModule, report: Report, digest: str) -> Agreement:
        manager: PostGradPassManager = self.config[HOOK]
        rules = [rule for members in manager.rules.values() for rule in members]
        return settle(gm, report, digest, manager.config, rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Backend) and self.region is other.region

    def __hash__(self) -> int:
        return hash(self.region)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    config: PassConfig | None = None,
    device: DeviceProfile | str | None = None,
    passes: Sequence[object] = (),
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = (),
    **model_arguments: Any,
) -> Report:
    """What `compile(model, config=config)` would fuse in `model(*inputs, **model_arguments)`, and what not and why.

    The model is traced as `torch.compile` would, and run once; no code is generated. Its weights and inputs may be fake
    tensors, so it needs neither a GPU nor weights. Dynamo's caches are dropped: compiled functions are compiled again
    at their next call, and no other thread may compile or run compiled code meanwhile.

    Args:
        model: a module or function.
        *inputs: its positional arguments.
        config: flags, policy and compile ranges; with ranges, tracing treats sizes as dynamic.
        device: a profile, or its name, whose providers are assumed present and whose costs are modelled; None: this
            machine's GPU, or an H200 where there is none; "cpu" is then this machine.
        passes: other people's passes, which are refused here: compile with them, and read the report.
        rules: fusions beside the built-in ones.
        providers: beside the built-in ones.
        **model_arguments: its keyword arguments.

    Returns:
        One report over all graphs and compile ranges.

    Raises:
        WorkloadError: nothing could be traced.
        ConfigError: `model` can't be called or is a class, flags and policy contradict each other, or there are passes.
        CompatibilityError: this torch is too old, or private interfaces of its have moved.
    """
    if passes:
        raise ConfigError("explain takes no passes=; fuseplan.compile(..., passes=..., on_report=print) reports them")
    return explain_call(
        model, inputs, model_arguments, config=config, device=device, rules=rules, providers=providers
    )  # fmt: skip


@uncollected()
def explain_call(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    model_arguments: Mapping[str, Any],
    *,
    config: PassConfig | None = None,
    device: DeviceProfile | str | None = None,
    rules: Sequence[Rule] = (),
    providers: Sequence[Provider] = (),
) -> Report:
    """`explain` of a model whose arguments may have the names of `explain`'s own."""
    require_supported_torch()
    model, config, rules = instance("model", model), settings(config), instances("rules", rules, Rule)
    profile, providers = asked_profile(device), instances("providers", providers, Provider)
    traced = capture(model, inputs, dict(model_arguments), dynamic=bool(config.compile_ranges))
    everyone, everything = (*BUILT_IN_PROVIDERS, *providers), (*BUILT_IN_RULES, *rules)
    return Explanation(traced, config, profile, everyone, everything).report(config.chosen_policy)
