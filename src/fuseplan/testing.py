"""For authors of fusions: `check_rule(rule, providers=[...])` says in one call whether a rule and its kernels are
correct.

It runs where pytest runs; with Triton's interpreter (`TRITON_INTERPRET=1`) also where there is no GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseplan.errors import FuseplanError, VerificationError
from fuseplan.graph.canonical import CanonicalGraph
from fuseplan.matching import find_matches
from fuseplan.providers import BUILT_IN_PROVIDERS, Provider
from fuseplan.record import Reason, Refusal
from fuseplan.record.text import one_line
from fuseplan.rules import Bindings, Rule
from fuseplan.verification.check import check, repeated
from fuseplan.verification.evaluate import fused
from fuseplan.verification.specs import Case, TensorSpec

ROWS = (1, 2, 7, 33, 257)
"""Numbers of rows, most of them odd, that every kernel is run at."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ADVICE = {
    "match": "write the pattern as canonical graphs are: dialect ops on variables, in the ops' order of arguments",
    "agreement": "compare pattern and replacement argument by argument; the references in fuseplan.dialect decide",
    "rows": "mask the last, partial tile, and let no size be a constant of the kernel",
    "dtype": "compute in float32, round where the reference rounds, or refuse the dtype in the rule's check",
    "layout": "read the strides of the arguments, or refuse them in the provider's `accepts`",
    "symbolic sizes": "compute shapes from the arguments' shapes; no int(), no branch on a size",
    "raised": "fix the error, or refuse these arguments in the rule's check or the provider's `accepts`",
    "determinism": "results must not depend on another block's writes: look for a missing barrier",
}


@dataclass(kw_only=True)
class Checked:
    """The result of `check_rule`.

    Attributes:
        cases: how many sets of arguments were run, by provider.
        refused: sets of arguments that the rule or a provider refuses, with the reason.
        failures: one line each.
    """

    cases: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def fail(self, provider: str, kind: str, what: str, why: str, advice: str | None = None) -> None:
        """Records a failure, with advice: by its kind, unless given."""
        self.failures.append(f"[{provider}] {kind}, {what}: {why}. What to do: {ADVICE[advice or kind]}")


def check_rule(
    rule: Rule,
    *,
    providers: Sequence[Provider] = BUILT_IN_PROVIDERS,
    samples: Sequence[Mapping[str, Any]] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Checked:
    """Raises unless the two sides of a rule agree for every available provider that has its fused op.

    The rule has to match its own pattern once. Then, for every sample, number of rows, dtype and layout that neither
    the rule's `check` nor the provider's `accepts` refuses: the results are those of the unfused ops (against float64,
    in poisoned memory), dtypes, shapes and strides are those of the fake implementation, sizes stay symbolic, no
    argument is written to, no result shares memory, and further runs give the same bits.

    Args:
        rule: the fusion.
        providers: run it; unavailable ones, or ones without its op, are left out.
        samples: arguments by variable: tensors, whose values don't matter, and plain values; None: the samples of the
            fused op, whose arguments must then be the rule's variables.
        device: where to run.
        seed: of the random values.

    Returns:
        The cases that were run and refused.

    Raises:
        RuleError: pattern and replacement don't fit each other.
        VerificationError: a check fails, and a line for each failure says what to do; or nothing could be run.
    """
    rule.validate()
    here = [each for each in providers if each.unavailable() is None and rule.op.name in each.offers()]
    if not here:
        names = ", ".join(each.name for each in providers) or "none"
        raise VerificationError(
            f"{rule.name}: no provider that is available here implements {rule.op.name}; given: {names}; hand one over "
            "as providers=[provider_of(...)]"
        )
    target = torch.device(device)
    cases = [_specs(sample, target) for sample in samples] if samples is not None else _own_samples(rule, target)
    checked = Checked(cases=dict.fromkeys((each.name for each in here), 0))
    for provider in here:
        _check_match(rule, provider, cases[0], checked)
        for kind, what, arguments in _variations(cases):
            _check_one(rule, provider, kind, what, arguments, checked, seed)
        if not checked.cases[provider.name] and not checked.failures:
            checked.failures.append(f"[{provider.name}] nothing could be run: {'; '.join(checked.refused[:3])}")
    if checked.failures:
        count = len(checked.failures)
        heading = f"{rule.name} ({rule.op.name}): {count} check{'s' if count > 1 else ''} failed"
        raise VerificationError("\n".join([heading, *checked.failures]))
    return checked


def _own_samples(rule: Rule, device: torch.device) -> list[dict[str, Any]]:
    names = rule.op.arguments
    if sorted(names) != sorted(rule.variables):
        raise VerificationError(
            f"{rule.name}: its variables ({', '.join(rule.variables)}) aren't the arguments of {rule.op.name} "
            f"({', '.join(names)}), so its samples say nothing of them; hand over samples=[{{variable: value}}]"
        )
    generator = torch.Generator().manual_seed(0)
    made = [each.make(torch.device("cpu"), generator) for each in rule.op.samples]
    if not made:
        raise VerificationError(f"{rule.name}: {rule.op.name} has no samples; hand over samples=[{{variable: value}}]")
    return [_specs(dict(zip(names, values, strict=True)), device) for values in made]


def _specs(sample: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: _spec(value, device) if isinstance(value, Tensor) else value for name, value in sample.items()}


def _spec(value: Tensor, device: torch.device) -> TensorSpec:
    return _dense(TensorSpec(dtype=value.dtype, shape=tuple(value.shape), stride=(), misalignment=0, device=device))


def _dense(spec: TensorSpec) -> TensorSpec:
    steps = [1]
    for size in reversed(spec.shape[1:]):
        steps.insert(0, steps[0] * max(1, size))
    return replace(spec, stride=tuple(steps[-len(spec.shape) :]) if spec.shape else ())


def _variations(cases: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kind, a name for a person, arguments): the samples, then the first of them with other rows, dtypes, layouts."""
    for case in cases:
        yield "agreement", _described(case), case
    first = cases[0]
    for rows in ROWS:
        yield "rows", f"{rows} rows", _with_rows(first, rows)
    narrow = {spec.dtype for spec in first.values() if isinstance(spec, TensorSpec) and len(spec.shape) > 1}
    for dtype in DTYPES:
        yield "dtype", str(dtype).removeprefix("torch."), _each(
            first, lambda spec, dtype=dtype: replace(spec, dtype=dtype) if spec.dtype in narrow else spec
        )  # fmt: skip
    seven = _with_rows(first, 7)
    for what, change in _LAYOUTS.items():
        yield "layout", what, _each(seven, lambda spec, change=change: change(spec) if len(spec.shape) > 1 else spec)


def _each(arguments: Mapping[str, Any], change: Callable[..., TensorSpec]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, TensorSpec) else value for name, value in arguments.items()}


def _with_rows(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Arguments with so many rows of every tensor but weights, which are recognised by name."""

    def change(spec: TensorSpec) -> TensorSpec:
        return _dense(replace(spec, shape=(rows, *(1 for _ in spec.shape[1:-1]), spec.shape[-1])))

    return {
        name: change(value)
        if isinstance(value, TensorSpec) and len(value.shape) > 1 and not name.startswith("weight")
        else value
        for name, value in arguments.items()
    }


def _wide_rows(spec: TensorSpec) -> TensorSpec:
    return replace(spec, stride=tuple(step * 2 for step in spec.stride[:-1]) + spec.stride[-1:])


def _transposed(spec: TensorSpec) -> TensorSpec:
    return replace(spec, stride=(*(1 for _ in spec.shape[:-1]), spec.shape[0]))


_LAYOUTS: dict[str, Callable[[TensorSpec], TensorSpec]] = {
    "rows that lie apart": _wide_rows,
    "one row expanded": lambda spec: replace(spec, stride=(0,) * (len(spec.shape) - 1) + spec.stride[-1:]),
    "transposed": _transposed,
    "a misaligned first element": lambda spec: replace(spec, misalignment=spec.dtype.itemsize),
}


def _described(arguments: Mapping[str, Any]) -> str:
    parts = [
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, TensorSpec) else f"{value}"
        for value in arguments.values()
    ]
    return " ".join(parts)


def _refused(rule: Rule, provider: Provider, arguments: Mapping[str, Any]) -> Refusal | None:
    """Why the rule or the provider doesn't take the arguments, given as fake tensors."""
    with FakeTensorMode():
        fakes = {name: _empty(value) if isinstance(value, TensorSpec) else value for name, value in arguments.items()}
    offer = provider.offers()[rule.op.name]
    refusal = rule.check(Bindings(rule.name, fakes)) or offer.accepts(Bindings(rule.name, fakes))
    rounding = arguments.get("rounding")
    if refusal is None and offer.roundings is not None and rounding not in offer.roundings:
        return Refusal(reason=Reason.ROUNDING, detail=f"{provider.name} doesn't round as {rounding}")
    return refusal


def _empty(spec: TensorSpec) -> Tensor:
    shift = spec.misalignment // spec.dtype.itemsize
    flat = torch.empty(shift + spec.extent, dtype=spec.dtype, device=spec.device)
    return flat.as_strided(spec.shape, spec.stride, shift)


def _check_match(rule: Rule, provider: Provider, arguments: Mapping[str, Any], checked: Checked) -> None:
    """The rule matches its own pattern as a whole graph."""
    graph = fx.Graph()
    with FakeTensorMode():
        fakes = {name: _empty(value) if isinstance(value, TensorSpec) else value for name, value in arguments.items()}
        nodes = {name: graph.placeholder(name) for name, value in fakes.items() if isinstance(value, Tensor)}
        for name, node in nodes.items():
            node.meta["val"] = fakes[name]
        mapping = {node: nodes.get(name, fakes[name]) for name, node in rule.traced_pattern.inputs.items()}
        for node in rule.traced_pattern.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: mapping[source])
                made = graph.call_function(node.target, args, kwargs)
                values = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
                made.meta["val"] = node.target(*values[0], **values[1])
                mapping[node] = made
    graph.output(tuple(mapping[node] for node in rule.traced_pattern.outputs))
    found = find_matches(CanonicalGraph.copy_of(graph), {rule.name: (rule,)}, [provider])
    if len(found.candidates) != 1 and not found.misses:
        checked.fail(
            provider.name, "match", _described(arguments), f"it matches its own pattern {len(found.candidates)} times"
        )


def _check_one(
    rule: Rule, provider: Provider, kind: str, what: str, arguments: Mapping[str, Any], checked: Checked, seed: int
) -> None:
    refusal = _refused(rule, provider, arguments)
    if refusal is not None:
        checked.refused.append(f"[{provider.name}] {what}: {refusal.detail}")
        return
    checked.cases[provider.name] += 1
    case = Case(tokens=0, arguments=arguments)
    try:
        finding = check(rule, provider.name, case, seed=seed)
        if finding.wrong is not None:
            checked.fail(provider.name, kind, what, finding.wrong)
            return
        if not repeated(rule, provider.name, case, seed=seed):
            checked.fail(provider.name, "determinism", what, "equal arguments give different bits")
        _check_symbolic(rule, provider, what, arguments, checked)
    except FuseplanError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a failed check
        checked.fail(provider.name, kind, what, f"{type(error).__name__}: {one_line(error)}", advice="raised")


def _check_symbolic(rule: Rule, provider: Provider, what: str, arguments: Mapping[str, Any], checked: Checked) -> None:
    """The number of rows stays a symbol through the fake implementation, and nothing is assumed of it."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    symbolic = {n: _symbolic(mode, v) if isinstance(v, TensorSpec) else v for n, v in arguments.items()}
    given = [value for value in symbolic.values() if isinstance(value, Tensor) and value.dim() > 1]
    with mode:
        results = fused(rule, symbolic, rule.op.fake)
    if not given or not _rows_are_symbolic(given[0]):
        return
    for index, result in enumerate(results):
        if result.dim() > 1 and not _rows_are_symbolic(result):
            why = f"result {index} has {result.shape[0]} rows whatever the arguments have"
            checked.fail(provider.name, "symbolic sizes", what, why)
    if environment.guards:
        why = f"the fake implementation assumes {environment.guards[0].expr}"
        checked.fail(provider.name, "symbolic sizes", what, why)


def _rows_are_symbolic(tensor: Tensor) -> bool:
    rows: object = tensor.shape[0]
    return isinstance(rows, torch.SymInt)


def _symbolic(mode: FakeTensorMode, spec: TensorSpec) -> Tensor:
    if len(spec.shape) < 2 or spec.shape[0] < 2:
        return mode.from_tensor(_empty(spec))
    dynamic = [DimDynamic.DUCK, *([DimDynamic.STATIC] * (len(spec.shape) - 1))]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    return mode.from_tensor(_empty(spec), symbolic_context=context)
