"""A pytest plugin: tests that fail when fusions regress, and say which, where and why.

pytest loads it wherever fuseplan is installed, so it imports torch and the rest only where they are used.
"""

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fuseplan.config import PassConfig
    from fuseplan.providers import DeviceProfile, Provider
    from fuseplan.record import Report
    from fuseplan.report import FusionLock, LockSettings, Verdict
    from fuseplan.rules import Rule

NAMES = ("fuseplan", __name__)
"""The names under which pytest may load this module: as an entry point, and by `-p` or `pytest_plugins`."""

UPDATE = "--update-fusion-lock"
MEANT = f"where that is meant: pytest {UPDATE}"
FOLDER = "fusion_locks"
WRITTEN = "fusion lock written"
"""The test property that passes the names of locks to the process that prints the summary."""
DEFAULT_DEVICE = "h200"
LONGEST_NAME = 100

Inputs = Sequence[Any] | Mapping[str, Any]


class _OtherName:
    """A placeholder for the second name of this module: pytest refuses to register one module twice."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Adds the option that writes locks."""
    for name in NAMES:
        if not pluginmanager.has_plugin(name):
            pluginmanager.register(_OtherName(), name)
    group = parser.getgroup("fuseplan")
    group.addoption(UPDATE, action="store_true", help="Write the fusion locks of the tests that run.")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names the locks that were written, by whichever process."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [each for report in reports for each in getattr(report, "user_properties", ())]
    written = sorted({text for name, text in properties if name == WRITTEN})
    if written:
        terminalreporter.section("fusion locks written")
        for text in written:
            terminalreporter.write_line(text)


def assert_fusions(
    model: Callable[..., Any],
    inputs: Inputs,
    expected: Mapping[str, int],
    *,
    config: "PassConfig | None" = None,
    device: "DeviceProfile | str" = DEFAULT_DEVICE,
    rules: "Sequence[Rule]" = (),
    providers: "Sequence[Provider]" = (),
    exact: bool = False,
) -> "Report":
    """Fails where `fuseplan.explain(model, *inputs)` counts other fusions than expected, at modelled costs.

    Args:
        model: a module or function.
        inputs: its arguments: a tuple or list, or a mapping by name.
        expected: fusions by rule, over all graphs and all of `config.compile_ranges`. Rules that aren't named aren't
            looked at.
        config: flags, policy and compile ranges.
        device: a profile, or its name.
        rules: fusions beside the built-in ones.
        providers: beside the built-in ones.
        exact: whether rules that aren't named must not be applied at all.

    Returns:
        The report.

    Raises:
        AssertionError: counts differ; the text says where the rule is and isn't applied, and why.
        ConfigError: an unknown rule, or an invalid argument.
    """
    __tracebackhide__ = True
    from fuseplan.errors import FuseplanError
    from fuseplan.report.expectation import unmet
    from fuseplan.report.paragraphs import plain

    try:
        wanted = _counts(expected, [rule.name for rule in rules], exact)
        report = _explained(model, inputs, config=config, device=device, rules=rules, providers=providers)
    except FuseplanError as error:
        raise error.with_traceback(None)  # noqa: B904 - the test's traceback has no lines of fuseplan
    _warn(report)
    paragraphs = unmet(report, {**dict.fromkeys(report.rules, 0), **wanted} if exact else wanted)
    if paragraphs:
        raise AssertionError(f"the fusions aren't as expected{_asked(config, device)}\n\n{plain(paragraphs)}")
    return report


@pytest.fixture(name="assert_fusions")
def _assert_fusions() -> Callable[..., "Report"]:
    """`assert_fusions(model, inputs, {"allreduce_rms": 2 * n_layers})`: see its docstring."""
    return assert_fusions


class FusionLockFixture:
    """The type of the fixture `fusion_lock`."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._used: set[Path] = set()

    def __call__(
        self,
        model: Callable[..., Any],
        inputs: Inputs,
        *,
        config: "PassConfig | None" = None,
        device: "DeviceProfile | str" = DEFAULT_DEVICE,
        rules: "Sequence[Rule]" = (),
        providers: "Sequence[Provider]" = (),
        name: str | None = None,
    ) -> "Report":
        """Fails where the fusions of a model differ from those of the test's lock file.

        The file lies beside the test's: `fusion_locks/<test file>/<test>.lock`, or `<test>+<name>.lock`.

        Args:
            model: a module or function.
            inputs: its arguments: a tuple or list, or a mapping by name.
            config: flags, policy and compile ranges.
            device: a profile, or its name.
            rules: fusions beside the built-in ones.
            providers: beside the built-in ones.
            name: follows the test's in the name of the file; needed where a test calls it twice.

        Returns:
            The report.

        Raises:
            AssertionError: fusions or settings differ, or there is no lock yet; the text says what to do.
            LockError: the file is broken, or can't be written.
            ConfigError: something that a lock can't pin.
        """
        __tracebackhide__ = True
        from fuseplan.errors import FuseplanError

        asked = {"config": config, "device": device, "rules": rules, "providers": providers}
        try:
            report, verdict = self._compared(model, inputs, name, asked)
        except FuseplanError as error:
            raise error.with_traceback(None)  # noqa: B904 - the test's traceback has no lines of fuseplan
        _warn(report)
        if verdict is not None and not verdict.passed:
            raise AssertionError(verdict.text)
        return report

    def _compared(
        self, model: Callable[..., Any], inputs: Inputs, name: str | None, asked: Mapping[str, Any]
    ) -> "tuple[Report, Verdict | None]":
        """The report, and the verdict on a lock; None where the lock is written. `asked` has the other arguments."""
        __tracebackhide__ = True
        from fuseplan.config import PassConfig
        from fuseplan.errors import ConfigError, LockError
        from fuseplan.integrations.locks import settings_of
        from fuseplan.report import FusionLock, Verdict
        from fuseplan.report.drift import drifts

        request = self._request
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"name={name!r}: give a text")
        path = lock_path(request.node.path, request.node.nodeid, name)
        if path in self._used:
            raise LockError(
                f"fusion_lock has compared {path.name} in this test already; give each call a name of its own"
            )
        self._used.add(path)
        shown = _shown(path, request.config.rootpath)
        settings = settings_of(asked["config"] or PassConfig(), workload=path.stem, device=_name(asked["device"]))
        lock = None if request.config.getoption(UPDATE) else _read(path, shown, settings)
        report = _explained(model, inputs, **asked)
        found = FusionLock.of(settings, report)
        if lock is None:
            if _write(path, found):
                request.node.user_properties.append((WRITTEN, shown))
            return report, None
        differing, breaks = drifts(lock, report), tuple(map(str, report.breaks))
        return report, Verdict(path=shown, lock=lock, found=found, drifts=differing, breaks=breaks, fix=MEANT)


@pytest.fixture
def fusion_lock(request: pytest.FixtureRequest) -> FusionLockFixture:
    """`fusion_lock(model, inputs)` compares fusions with a file beside the test; see `FusionLockFixture`."""
    return FusionLockFixture(request)


def lock_path(test_file: Path, nodeid: str, name: str | None = None) -> Path:
    """Where the lock of a test lies: a file of its own for each function, class and set of parameters.

    Args:
        test_file: the file with the test.
        nodeid: pytest's id of the test.
        name: of one of several locks of the test; prefixed by the test's name, so that it is unique.
    """
    test, bracket, parameters = nodeid.partition("::")[2].partition("[")
    own = f"{test.replace('::', '.')}{'-' if bracket else ''}{parameters.removesuffix(']')}"
    # Names of tests and parameters lose their plus signs, so none is mistaken for one with a lock's name.
    full, plain = ("+".join(map(change, (own, *([name] if name else [])))) for change in (str, _plain))
    plain = plain.lstrip(".")
    if plain != full or len(plain) > LONGEST_NAME:
        plain = f"{plain[:LONGEST_NAME]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"
    return test_file.parent / FOLDER / test_file.stem / f"{plain}.lock"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.\-]", "_", text, flags=re.ASCII)


def _write(path: Path, lock: "FusionLock") -> bool:
    """Writes a lock, unless it is there already; whether it was written."""
    from fuseplan.errors import LockError
    from fuseplan.record.files import writing

    with writing("lock file", path, LockError):
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == lock.text():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
    lock.save(path)
    return True


def _read(path: Path, shown: str, settings: "LockSettings") -> "FusionLock":
    """The lock, if it is there and has the same settings."""
    __tracebackhide__ = True
    from fuseplan.errors import LockError
    from fuseplan.report import FusionLock
    from fuseplan.report.lock import contradiction

    try:
        lock = FusionLock.load(path)
    except LockError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise LockError(f"{error}; fix it, or write it anew with pytest {UPDATE}") from None
        missing = f"there is no fusion lock {shown}; write it with pytest {UPDATE}, and commit it"
        raise AssertionError(missing) from None
    changes = lock.settings.changes(settings)
    if changes:
        raise AssertionError(f"{shown} {contradiction(changes, 'the test')}; {MEANT}")
    return lock


def _explained(model: Callable[..., Any], inputs: Inputs, *, config: "PassConfig | None", **asked: Any) -> "Report":
    """The report of `fuseplan.explain` at modelled costs."""
    __tracebackhide__ = True
    from fuseplan.compatibility import require_supported_torch

    require_supported_torch()
    from fuseplan.config import PassConfig
    from fuseplan.errors import ConfigError
    from fuseplan.frontend import explain_call
    from fuseplan.integrations.locks import pinned

    config = pinned(config or PassConfig())
    _name(asked["device"])
    if not callable(model):
        raise ConfigError(f"the model is of type {type(model).__name__}; give a module or a function")
    if not isinstance(inputs, (tuple, list, Mapping)):
        kind = type(inputs).__name__
        raise ConfigError(f"inputs are a {kind}; give a tuple or list of arguments, e.g. (x,), or a mapping by name")
    by_position, by_name = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with _quiet_traces():
        return explain_call(model, by_position, by_name, config=config, **asked)


def _warn(report: "Report") -> None:
    """Shows the warnings of a report at the test's line that called the caller of this."""
    from fuseplan.errors import FuseplanWarning
    from fuseplan.report.text import warnings_of

    for warning in warnings_of(report):
        text = "; ".join(filter(None, (warning.detail, warning.fix)))
        warnings.warn(text, FuseplanWarning, stacklevel=3)


@contextlib.contextmanager
def _quiet_traces() -> Iterator[None]:
    """Keeps torch's trace of a compilation, hundreds of lines, out of pytest's output for a failure."""
    logger = logging.getLogger("torch.__trace")
    handlers = [handler for handler in logger.handlers if type(handler).__module__.startswith("_pytest.")]
    for handler in handlers:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.addHandler(handler)


def _counts(expected: object, further: Sequence[str], exact: bool) -> dict[str, int]:
    """The expected counts, if they are valid.

    Raises:
        ConfigError: an unknown rule, something that is no count, or nothing at all.
    """
    __tracebackhide__ = True
    from fuseplan.config import unknown
    from fuseplan.errors import ConfigError
    from fuseplan.rules import by_name
    from fuseplan.rules.families import BUILT_IN_RULES

    if not isinstance(expected, Mapping):
        kind = type(expected).__name__
        raise ConfigError(f"expected is a {kind}; give a mapping of rules to counts, e.g. {{'act_padding': 2}}")
    known = {*by_name(BUILT_IN_RULES), *further}
    for rule, count in expected.items():
        if rule not in known:
            raise unknown("rule", str(rule), known)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"expected {rule!r}: {count!r}; give a number of fusions of at least 0")
    if not expected and not exact:
        raise ConfigError("nothing is expected; name rules with their counts, or set exact=True for none at all")
    return dict(expected)


def _asked(config: "PassConfig | None", device: "DeviceProfile | str") -> str:
    policy = str(config.policy) if config is not None else "planned"
    return f" ({policy} for {_name(device)}, modelled costs)"


def _name(device: "DeviceProfile | str") -> str:
    """The name of a profile.

    Raises:
        ConfigError: it is none, e.g. a `torch.device`.
    """
    from fuseplan.errors import ConfigError
    from fuseplan.providers import PROFILES, DeviceProfile

    if isinstance(device, DeviceProfile):
        return device.name
    if not isinstance(device, str):
        raise ConfigError(f"device={device!r}: give a profile or the name of one: {', '.join(sorted(PROFILES))}")
    return device


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
