"""The key under which Inductor keeps what the pass did: whatever can change a plan changes it, nothing else does."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._logging._internal import warning_once
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore

import fuseplan
from fuseplan import ExternalPass
from fuseplan.caching import fingerprint
from fuseplan.caching.store import graph_key
from fuseplan.compilation.manager import PostGradPassManager
from fuseplan.config import CompileRange, Environment, PassConfig
from fuseplan.dialect import DialectOp, ops
from fuseplan.graph.ops import registry
from fuseplan.planner import Prices, Solver
from fuseplan.planner.costs import HARDWARE, CostModel, CostTable
from fuseplan.providers import BUILT_IN_PROVIDERS, Offer, Provider, device_profile
from fuseplan.record import Plan, SavedPlans, Selected
from fuseplan.rules import Bindings, Rule
from fuseplan.rules.families import BUILT_IN_RULES
from tests.caching.elsewhere import elsewhere
from tests.caching.test_content import versioned
from tests.forks import Forks
from tests.planner.posing import row

RANGE = CompileRange(start=1, end=8)
FEW = BUILT_IN_RULES[:5]
"""Each rule has its part of a key, which takes as long to find as there are rules."""


def key(config: PassConfig | None = None, **arguments: Any) -> str | None:
    rules = BUILT_IN_RULES if config is not None else FEW  # a configuration may name any
    return PostGradPassManager(config or PassConfig(), **{"rules": rules, **arguments}).uuid()


def table(time_ns: int = 5) -> CostTable:
    return CostTable(device="cpu", rows=(row(time_ns=time_ns, device="cpu"),))


def saved(name: str = "#0 a b c", graph: str = "graph_0", span: tuple[int, int] | None = None) -> SavedPlans:
    chosen = Selected(name=name, signature="s", source=None, saving_ns=5)
    plan = Plan(
        graph=graph, range=span, device="cpu", prices=(), sites=("s",), selected=(chosen,), rejected=(),
        objective_ns=5, bound_ns=5, unfused_ns=9, components=1, classes=1,
    )  # fmt: skip
    return SavedPlans(workload="w", tp=1, plans=(plan,))


CONFIGS: dict[str, Any] = {
    "verify": "always",
    "verify_timeout_s": 7.0,
    "agreement_timeout_s": 7.0,
    "policy": "ordered(act_padding)",
    "compile_ranges": (RANGE,),
    "max_fusions": 3,
    "force": ("act_padding",),
    "forbid": ("act_padding",),
    "costs": "modelled",
    "cost_table": "costs.json",
    "plan": "plan.json",
    "node_budget": 7,
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table().save(tmp_path / "costs.json")
    saved().save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def other_value(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """The field with another value; of one that isn't listed, e.g. a flag or a new one, by its type."""
    default = getattr(PassConfig(), field.name)
    return {field.name: CONFIGS.get(field.name, not default if default in (None, True, False) else f"other {default}")}


def test_every_setting_changes_the_key(files: Path) -> None:
    fields = dataclasses.fields(PassConfig)
    keys = {key(PassConfig()), *(key(PassConfig(**other_value(field))) for field in fields)}
    assert len(keys) == len(fields) + 1


def test_files_count_by_their_content(files: Path) -> None:
    priced, planned = PassConfig(cost_table="costs.json"), PassConfig(plan="plan.json")
    keys = {key(priced), key(planned)}
    table(6).save(files / "costs.json")
    keys.add(key(priced))
    for other in (saved("#0 a b d"), saved(graph="graph_1"), saved(span=(1, 8))):
        other.save(files / "plan.json")
        keys.add(key(planned))
    assert len(keys) == 6
    (files / "moved.json").write_text(json.dumps(json.loads((files / "costs.json").read_text())))
    assert key(PassConfig(cost_table="moved.json")) in keys


def test_the_environment_counts_where_it_decides(files: Path) -> None:
    environments = Environment(), Environment(enabled=False), Environment(cost_table=Path("costs.json"))
    assert len({key(environment=each) for each in environments}) == len(environments)
    # Without a switch that adds there is nothing to forbid it; where there is one, prices have the key.
    settings = {"debug_dir": files, "report_dir": files, "vllm": True, "multicast": False, "tune": files}
    for name, value in settings.items():
        assert key(environment=Environment(**{name: value})) == key()  # type: ignore[arg-type]
    assert {field.name for field in dataclasses.fields(Environment)} == {"enabled", "cost_table", *settings}


def pass_that_adds(number: int, uuid: Any = None) -> Callable[[fx.Graph], None]:
    def add(graph: fx.Graph) -> None:
        graph.number = number  # type: ignore[attr-defined]

    add.uuid = uuid  # type: ignore[attr-defined]
    return add


def external(scale: float = 2.0, name: str = "mine", saving_us: float | None = None, uuid: Any = None) -> ExternalPass:
    """add -> relu  =>  something of `scale`."""

    def pattern(x: Tensor, y: Tensor) -> Any:
        return torch.ops.aten.relu.default(torch.ops.aten.add.Tensor(x, y))

    def replacement(x: Tensor, y: Tensor) -> Any:
        return torch.ops.aten.mul.Tensor(torch.ops.aten.add.Tensor(x, y), scale)

    matcher = PatternMatcherPass()
    inputs = [torch.empty(4, 4), torch.empty(4, 4)]
    register_replacement(pattern, replacement, inputs, fwd_only, matcher)
    return ExternalPass(matcher=matcher, name=name, saving_us=saving_us, uuid=uuid)


ARGUMENTS: dict[str, list[Callable[[], Any]]] = {
    "compile_range": [lambda: RANGE, lambda: CompileRange(start=1, end=9), lambda: CompileRange(start=2, end=8)],
    "previous": [
        lambda: [pass_that_adds(1, uuid="1")], lambda: [pass_that_adds(1, uuid="2")],
        lambda: [pass_that_adds(1, uuid="1"), pass_that_adds(1, uuid="2")],
    ],
    "rules": [lambda: BUILT_IN_RULES, lambda: FEW[1:]],
    "providers": [lambda: BUILT_IN_PROVIDERS[:1]],
    "device": [lambda: device_profile("h200"), lambda: device_profile("h100"),
               lambda: dataclasses.replace(device_profile("h200"), vendor="amd")],
    "environment": [lambda: Environment(enabled=False)],
    "prices": [
        lambda: Prices(model=CostModel(HARDWARE["h100"])),
        lambda: Prices(model=CostModel(HARDWARE["cpu"], pad="eager")),
        lambda: Prices(model=CostModel(HARDWARE["cpu"]), table=table()),
        lambda: Prices(model=CostModel(HARDWARE["cpu"]), table=table(), source="measured"),
        lambda: Prices(model=CostModel(dataclasses.replace(HARDWARE["cpu"], cache=HARDWARE["h100"].cache))),
    ],
    "passes": [
        lambda: [pass_that_adds(1, uuid="1"), pass_that_adds(1, uuid="2")],
        lambda: [pass_that_adds(1, uuid="2"), pass_that_adds(1, uuid="1")],
        lambda: [external(uuid="1")],
        lambda: [external(uuid=lambda: b"2")],
        lambda: [external(uuid="1", name="other")],
        lambda: [external(uuid="1", saving_us=1.0)],
    ],
    "engine_groups": [lambda: {"tp:0": "1"}.copy, lambda: {"tp:0": "2"}.copy, lambda: {7: "2"}.copy],
    "settles": [lambda: True],
}  # fmt: skip
OF_NO_CONSEQUENCE = {
    "config": "its own test",
    "on_report": "who gets the report",
    "solver": "remembers answers, which are the same anew",
}


def test_every_argument_changes_the_key() -> None:
    names = set(inspect.signature(PostGradPassManager.__init__).parameters) - {"self"}
    assert names == {*ARGUMENTS, *OF_NO_CONSEQUENCE}

    def with_two_providers(**arguments: Any) -> str | None:
        return key(**{"providers": BUILT_IN_PROVIDERS[:2], **arguments})

    def anew() -> list[str | None]:
        return [with_two_providers(**{name: make()}) for name, makes in ARGUMENTS.items() for make in makes]

    keys = [with_two_providers(), *anew()]
    assert len(set(keys)) == len(keys)
    assert key(on_report=print) == key(solver=Solver(PassConfig().node_budget)) == key()
    assert keys[1:] == anew()


class Own(Rule):
    """rms_norm -> relu, with everything that a rule has."""

    name, flags, op, core = "own", ("fuse_act_padding",), ops.rms_norm_pad, ops.rms_norm
    uuid: Any = "own 1"

    def pattern(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return torch.ops.aten.relu.default(ops.rms_norm(x, weight, eps, rounding))

    def replacement(self, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
        return ops.rms_norm_pad(x, weight, eps, rounding, 8)

    def check(self, m: Bindings) -> None:
        return None


def _other_pattern(self: Any, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
    return torch.ops.aten.sigmoid.default(ops.rms_norm(x, weight, eps, rounding))


def _padded(self: Any, x: Any, weight: Any, eps: Any, rounding: Any) -> Any:
    return ops.pad(ops.rms_norm(x, weight, eps, rounding), 8)


def own(**members: Any) -> Rule:
    return type("Own", (Own,), {"__module__": __name__, **members})()  # type: ignore[no-any-return]


RULES: dict[str, Callable[[], Rule]] = {
    "as it is": own,
    "uuid": lambda: own(uuid="own 2"),
    "what uuid returns": lambda: own(uuid=lambda self: "own 3"),
    "pattern": lambda: own(pattern=_other_pattern),
    "requires": lambda: own(requires=("act_padding",)),
    "together": lambda: own(together=True),
    "flags": lambda: own(flags=("fuse_norm_quant",)),
    "name": lambda: own(name="other"),
    "pattern of two ops": lambda: own(pattern=_padded),
    "core": lambda: own(pattern=_padded, core=ops.pad),
}


def test_every_part_of_a_rule_changes_the_key() -> None:
    keys = {name: key(rules=[*FEW, make()]) for name, make in RULES.items()}
    assert len({*keys.values(), key()}) == len(keys) + 1
    assert keys == {name: key(rules=[make(), *FEW]) for name, make in RULES.items()}


NO_KEYS: dict[str, Callable[[], dict[str, Any]]] = {
    "pass": lambda: {"passes": [pass_that_adds(1)]},
    "pass in the hook": lambda: {"previous": [pass_that_adds(1)]},
    "patterns": lambda: {"passes": [external()]},
    "patterns as they are": lambda: {"passes": [external().matcher]},
    "rule": lambda: {"rules": [own(uuid=None)]},
    "accepts": lambda: {"providers": [provider(accepts=_accepts())]},
    "accepts for a provider of fuseplan's": lambda: {"providers": [
        dataclasses.replace(BUILT_IN_PROVIDERS[0], implements={"rms_norm_pad": Offer(accepts=_accepts())})
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_KEYS)
def test_what_a_user_wrote_has_no_key_without_a_uuid(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warning_once.cache_clear()
    arguments = NO_KEYS[name]()
    manager, same = (PostGradPassManager(PassConfig(), **arguments) for _ in range(2))
    assert manager.uuid() is manager.uuid() is None
    (record,) = caplog.records
    assert "uuid()" in record.message
    assert manager == same
    assert hash(manager) == hash(same)
    assert manager != PostGradPassManager(PassConfig(), **NO_KEYS[name]())
    assert manager != PostGradPassManager(PassConfig())


def test_the_log_names_what_has_no_uuid(caplog: pytest.LogCaptureFixture) -> None:
    warning_once.cache_clear()
    assert key(passes=[pass_that_adds(1)], previous=[pass_that_adds(2, uuid=lambda: "")]) is None
    start = "graphs are compiled anew at every start, since tests.caching.test_keys.pass_that_adds.<locals>.add may do"
    end = "Give it a uuid() that changes with what it does: a hash of its source file, or a version (add.uuid = '1')"
    assert [record.message for record in caplog.records] == [
        f"{start} something else each time: {missing}. {end}" for missing in ("its uuid() is ''", "it has no uuid()")
    ]


def test_what_is_given_up_is_another_key_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    keys, manager = [key(PassConfig())], PostGradPassManager(PassConfig())
    for _ in range(2):
        manager.give_up_key()
        keys.append(manager.uuid())
        assert key(PassConfig()) == keys[-1]
    assert len(set(keys)) == 3
    assert manager == PostGradPassManager(PassConfig())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    assert manager.uuid() == keys[0]


@pytest.mark.parametrize("content", [b"", b"x" * 2**20, b"\xff\0"])
def test_a_broken_note_of_a_key_is_none_or_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    manager = PostGradPassManager(PassConfig())
    manager.give_up_key()
    (note,) = (tmp_path / "fuseplan/renewed").iterdir()
    note.write_bytes(content)
    assert manager.uuid() == manager.uuid() is not None


def test_rules_of_one_name_and_op_have_no_order() -> None:
    rules = [own(), own(pattern=_other_pattern)]
    assert key(rules=rules) == key(rules=rules[::-1]) != key(rules=rules[:1])


def _accepts(uuid: Any = None) -> Callable[..., Any]:
    return versioned(lambda m: None, uuid)


def provider(**changes: Any) -> Provider:
    fields: dict[str, Any] = {"accepts": _accepts("1"), "roundings": None, "cost": None}
    offer = Offer(**{name: changes.pop(name, value) for name, value in fields.items()})
    op: DialectOp = changes.pop("op", ops.rms_norm_pad)
    given: dict[str, Any] = {
        "name": "mine", "description": "", "vendors": frozenset({"cpu", "nvidia"}), "package": None, "install": "",
        "implements": {op.name: offer},
    }  # fmt: skip
    return Provider(**{**given, **changes})


PROVIDERS: dict[str, Callable[[], Provider]] = {
    "as it is": provider,
    "name": lambda: provider(name="other"),
    "uuid": lambda: provider(uuid="1"),
    "uuid for all": lambda: provider(uuid=lambda: b"2", accepts=_accepts()),
    "accepts": lambda: provider(accepts=_accepts("2")),
    "roundings": lambda: provider(roundings=frozenset({"llama"})),
    "op": lambda: provider(op=ops.rms_norm),
    "availability": lambda: provider(vendors=frozenset({"amd"})),
    "uuid and data": lambda: provider(uuid="1", cost=2.0),
    "missing": lambda: provider(package="a_package_that_nobody_has"),
    "version": lambda: provider(package="pytest"),
    "version of another": lambda: provider(package="hypothesis"),
}


def test_every_part_of_a_provider_changes_the_key() -> None:
    keys = {name: key(providers=[*BUILT_IN_PROVIDERS, make()]) for name, make in PROVIDERS.items()}
    assert len({*keys.values(), key()}) == len(keys) + 1
    assert keys == {name: key(providers=[make(), *BUILT_IN_PROVIDERS]) for name, make in PROVIDERS.items()}


def test_the_kernel_behind_a_name_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is registered a process, for good; another process may have another."""
    keys = [key(providers=[provider()])]
    for factor in (1.0, 2.0):
        monkeypatch.setitem(registry._KERNELS, "rms_norm_pad.mine", versioned(lambda x, *rest: x, factor))
        keys.append(key(providers=[provider()]))
        assert key(providers=[provider(name="other")]) not in keys
    assert len(set(keys)) == 3
    monkeypatch.setitem(registry._KERNELS, "rms_norm_pad.mine", versioned(lambda x, *rest: x, 1.0))
    assert key(providers=[provider()]) == keys[1]
    monkeypatch.setitem(registry._KERNELS, "rms_norm_pad.mine", lambda *arguments: arguments[0])
    assert key(providers=[provider()]) is None
    assert key(providers=[provider(uuid="1")]) is not None


def test_what_a_provider_only_prices_counts_for_other_devices() -> None:
    priced = [dataclasses.replace(each, prices={"of_the_future": Offer()}) for each in BUILT_IN_PROVIDERS]
    assert key(providers=priced) == key()
    assert key(providers=priced, device=device_profile("h200")) != key(device=device_profile("h200"))


def test_source_torch_and_devices_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key()}
    for owner, name, value in (
        (fingerprint, "source_digest", lambda: "other"), (fingerprint, "_local_devices", lambda: ["another GPU"]),
        (torch, "__version__", "2.12.0"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.add(key())
    assert len(keys) == 4


def test_every_source_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "planner/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "caching/fingerprint.py"))
    digest, other = fingerprint.source_digest.__wrapped__, tmp_path / "planner/b.py"
    digests = {digest()}
    other.write_text("2")
    digests.add(digest())
    other.rename(tmp_path / "planner/c.py")
    assert len({*digests, digest()}) == 3


@pytest.fixture
def world() -> Iterator[Callable[[int], None]]:
    """Starts worlds of several ranks that this process is the first of."""

    def start(ranks: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def test_ranks_and_groups_change_the_key(world: Callable[[int], None]) -> None:
    """A graph has the name of a group alone, and a kernel serves some sizes."""
    manager = PostGradPassManager(PassConfig())
    keys = [manager.uuid()]
    for ranks, groups in ((2, ()), (4, ()), (4, ([0, 1],)), (4, ([0, 1, 2],)), (4, ([0, 1], [0, 1]))):
        world(ranks)
        for group in groups:
            dist.new_group(group)
        keys.append(manager.uuid())
        assert PostGradPassManager(PassConfig()).uuid() == keys[-1]
    assert len(set(keys)) == len(keys)
    assert hash(manager) == hash(PostGradPassManager(PassConfig()))


def test_enabled_attention_kernels_change_the_key() -> None:
    keys = {key()}
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            keys.add(key())
    assert len(keys) == 3


def test_attention_runs_by_the_kernel_that_is_asked_for_though_the_cache_is_warm() -> None:
    """torch.compile runs the one that it compiled first."""
    q, k, v = (torch.randn(1, 2, 16, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    with fresh_cache(), torch.inference_mode():
        for kernel, is_flash in ((SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)):
            torch._dynamo.reset()
            with sdpa_kernel(kernel):
                compiled = fuseplan.compile(torch.nn.functional.scaled_dot_product_attention)
                _, codes = run_and_get_code(compiled, q, k, v)
            assert any("flash_attention_for_cpu" in code for code in codes) == is_flash


def test_position_changes_nothing() -> None:
    assert key(rules=BUILT_IN_RULES) == key(rules=BUILT_IN_RULES[::-1], providers=BUILT_IN_PROVIDERS[::-1])
    one, other = PassConfig(forbid=("act_padding", "norm_quant")), PassConfig(forbid=("norm_quant", "act_padding"))
    assert key(one) == key(other)
    one, other = PassConfig(force=("act_padding", "norm_quant")), PassConfig(force=("norm_quant", "act_padding"))
    assert key(one) == key(other)


def test_another_process_has_the_same_key(forks: Forks) -> None:
    here = key(
        rules=[*BUILT_IN_RULES, own()], providers=[*BUILT_IN_PROVIDERS, provider()],
        passes=[external(uuid="1"), pass_that_adds(1, uuid="1")], device=device_profile("h200"),
    )  # fmt: skip
    assert elsewhere(forks)[0] == here


class Quantised(Tensor):
    """A weight as torchao has it, which looks like the one that it stands for."""

    codes: Tensor
    bound: float

    def __new__(cls, codes: Tensor, bound: float) -> "Quantised":
        own: Any = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        own.codes, own.bound = codes, bound
        return own  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, float]]:
        return ["codes"], {"bound": self.bound}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


class Other(Quantised):
    """One of another type, which is made of the same."""


def key_of(weight: Tensor) -> str | None:
    """Of a graph's report, which tells apart what Inductor compiles anew."""
    return graph_key(fx.symbolic_trace(lambda x, w: x @ w), [torch.ones(2, 4), weight], "manager", {})


def test_tensors_of_subclasses_count_by_type_and_by_what_they_are_made_of() -> None:
    wide, narrow = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.int8)
    weights = [wide, Quantised(wide, 1.0), Quantised(narrow, 1.0), Quantised(narrow, 2.0), Other(narrow, 1.0)]
    assert len({key_of(weight) for weight in weights}) == len(weights)
    assert key_of(Quantised(narrow, 1.0)) == key_of(Quantised(narrow.clone(), 1.0))
