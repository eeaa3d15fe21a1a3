"""`--rules MODULE`: rules and providers of the user's own, beside the built-in ones."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import typer

Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--rules",
        metavar="MODULE",
        help="A module whose Rule and Provider objects join the built-in ones (runs it); may be repeated.",
    ),
]


class Own(NamedTuple):
    """The objects that the user's modules define."""

    rules: tuple[Any, ...]
    providers: tuple[Any, ...]


def find_own(modules: Sequence[str] | None) -> Own:
    """The rules and providers among the values of modules, and in lists and tuples among these; not the built-in ones.

    Args:
        modules: as Python imports them, also from the current directory.

    Raises:
        ConfigError: there is no such module, it can't be imported, it has no rule, or one of its rules is broken; or
            a rule or a provider has the name of a built-in one.
    """
    rules: dict[int, Any] = {}
    providers: dict[int, Any] = {}
    for module in modules or ():
        found = _defined_in(module)
        rules |= {id(rule): rule for rule in found.rules}
        providers |= {id(provider): provider for provider in found.providers}
    return Own(tuple(rules.values()), tuple(providers.values()))


def _defined_in(module: str) -> Own:
    from fuseplan.errors import ConfigError
    from fuseplan.providers import BUILT_IN_PROVIDERS, Provider
    from fuseplan.rules import Rule
    from fuseplan.rules.families import BUILT_IN_RULES

    values = _values_of(module)
    objects = list(_flat(values.values()))
    rules = [each for each in objects if isinstance(each, Rule) and each not in BUILT_IN_RULES]
    providers = [each for each in objects if isinstance(each, Provider) and each not in BUILT_IN_PROVIDERS]
    if not rules:
        classes = [each for each in values.values() if isinstance(each, type) and issubclass(each, Rule)]
        example = next((each.__name__ for each in classes if each.__module__ == module), "MyFusion")
        raise ConfigError(f"--rules {module}: the module has no Rule object; add a line: rules = [{example}()]")
    for rule in rules:
        _check(module, rule)
    for kind, own, built_in in (("rule", rules, BUILT_IN_RULES), ("provider", providers, BUILT_IN_PROVIDERS)):
        taken = sorted({each.name for each in own} & {each.name for each in built_in})
        if taken:
            raise ConfigError(f"--rules {module}: there is a built-in {kind} {taken[0]!r}; give it another name")
    return Own(tuple(rules), tuple(providers))


def _values_of(module: str) -> dict[str, Any]:
    """The values of a module by name. Its output goes to standard error."""
    from fuseplan.errors import ConfigError
    from fuseplan.record.text import one_line
    from fuseplan.workloads.catalog import import_module

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return dict(vars(import_module(module)))
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            why = "there is no such module here or installed; name it as Python imports it, e.g. package.module"
        else:
            why = f"importing it failed: {one_line(f'{type(error).__name__}: {error}')}"
        raise ConfigError(f"--rules {module}: {why}") from error


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _check(module: str, rule: Any) -> None:
    from fuseplan.config import PassConfig
    from fuseplan.errors import ConfigError, RuleError
    from fuseplan.record.text import one_line
    from fuseplan.rules import enabled_rules

    try:
        enabled_rules(PassConfig(), [rule])
    except RuleError as error:
        raise ConfigError(f"--rules {module}: {error}") from error
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(f"--rules {module}: rule {type(rule).__name__} is broken: {what}") from error
