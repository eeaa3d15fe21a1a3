"""The interface of a fusion rule, and the rules that a configuration leaves on."""

from collections.abc import Mapping, Sequence

from fuseplan.config import PassConfig, unknown
from fuseplan.errors import ConfigError
from fuseplan.rules.base import Bindings, DefaultOn, Rule


def by_name(rules: Sequence[Rule]) -> dict[str, tuple[Rule, ...]]:
    """The members of each rule, in an order that doesn't depend on the order of `rules`."""
    names = sorted({rule.name for rule in rules})
    return {name: tuple(sorted((rule for rule in rules if rule.name == name), key=_content)) for name in names}


def _content(rule: Rule) -> tuple[str, str]:
    """A sort key that tells the members of a rule apart."""
    return rule.op.name, rule.describe()


def enabled_rules(config: PassConfig, rules: Sequence[Rule]) -> Mapping[str, tuple[Rule, ...]]:
    """The rules that a configuration leaves on, by name.

    Under `ordered(...)` those are the rules it lists; under `off` every rule whose flags aren't False, for the report.

    Raises:
        RuleError: the two sides of a rule disagree.
        ConfigError: the policy lists an unknown rule, lists one whose flag is False, or leaves out one whose flag is
        True.
    """
    for rule in rules:
        rule.validate()
    known = by_name(rules)
    policy = config.chosen_policy
    for name in policy.order:
        if name not in known:
            raise unknown("rule", name, known)
    enabled = {}
    for name, members in known.items():
        flags = {flag: getattr(config, flag) for member in members for flag in member.flags}
        off = [flag for flag, value in flags.items() if value is False]
        listed = name in policy.order
        if off and listed and config.policy_is_given:
            raise ConfigError(
                f"{off[0]}=False contradicts policy {policy}: switch the flag on or take {name} off the list"
            )
        if policy.name == "ordered" and not listed and [*flags.values()] == [True]:
            raise ConfigError(f"{' and '.join(flags)}=True contradicts policy {policy}: add {name} to the list")
        asked = listed or all(getattr(config, flag) for flag in _asked_for_by(members, rules))
        if not off and asked and (listed or policy.name != "ordered"):
            enabled[name] = members
    return enabled


def _asked_for_by(members: Sequence[Rule], rules: Sequence[Rule]) -> set[str]:
    """The flags that must be True for the members of a rule to be on: their own opt-in flags, and the opt-in flags of
    other rules that the members cover.
    """
    opt_ins = {rule.opt_in for rule in rules}
    return {flag for member in members if member.opt_in for flag in member.flags if flag in opt_ins}


class EnabledRules:
    """The rules that a configuration leaves on, in all graphs and in small ones.

    Attributes:
        always: the rules that are on in every graph, by name.
        disabled_by: the first flag that switches a rule off, by the rule's name.
        disabled: the rules that a flag switches off, by name.
        overruled: for an opt-in flag that is True, a rule that another flag switches off, and that flag.
        names: names of the rules that were on in a graph so far.
        every: the rules that may be on in some graph.

    Raises:
        RuleError, ConfigError: see `enabled_rules`.
    """

    def __init__(self, config: PassConfig, rules: Sequence[Rule], *, device: str) -> None:
        known = by_name(rules)
        self.always = enabled_rules(config, rules)
        self.disabled_by = disabled_rules(config, rules)
        self.disabled = {name: known[name] for name in self.disabled_by}
        self.overruled = _overruled(config, self.disabled, self.disabled_by)
        self.names = set(self.always)
        sizes = {name: _default_tokens(config, members, rules, device) for name, members in known.items()}
        self._by_size = {name: (most, known[name]) for name, most in sizes.items() if most}
        groups = (*self.always.values(), *(members for _, members in self._by_size.values()))
        self.every = tuple(rule for members in groups for rule in members)

    def of(self, tokens: float) -> Mapping[str, tuple[Rule, ...]]:
        """The rules that are on in a graph of so many tokens at most, by name, in their order."""
        further = {name: members for name, (most, members) in self._by_size.items() if tokens <= most}
        self.names |= further.keys()
        return dict(sorted({**self.always, **further}.items()))


def _default_tokens(config: PassConfig, members: Sequence[Rule], rules: Sequence[Rule], device: str) -> int:
    """The most tokens of a graph in which an opt-in rule is on by default; 0: it is off by default. It is on only under
    a policy that lists no rules, where its opt-in flag isn't set and none of its other flags is False.
    """
    places = [rule.default_on for rule in members if rule.default_on is not None and device in rule.default_on.devices]
    given = {flag: getattr(config, flag) for rule in members for flag in rule.flags}
    is_given = all(given[flag] is not None for flag in _asked_for_by(members, rules)) or False in given.values()
    if is_given or config.chosen_policy.name == "ordered" or len(places) < len(members):
        return 0
    return min(place.most_tokens for place in places)


def _overruled(
    config: PassConfig, disabled: Mapping[str, Sequence[Rule]], disabled_by: Mapping[str, str]
) -> Mapping[str, tuple[str, str]]:
    found = dict[str, tuple[str, str]]()
    for name, members in disabled.items():
        flag = members[0].opt_in
        if flag is not None and getattr(config, flag) is True:
            found.setdefault(flag, (name, disabled_by[name]))
    return found


def disabled_rules(config: PassConfig, rules: Sequence[Rule]) -> Mapping[str, str]:
    """The rules that a flag of the configuration switches off, by name, with the first such flag."""
    off = {name: [f for member in members for f in member.flags if getattr(config, f) is False]
           for name, members in by_name(rules).items()}  # fmt: skip
    return {name: flags[0] for name, flags in off.items() if flags}


__all__ = [
    "Bindings",
    "DefaultOn",
    "EnabledRules",
    "Rule",
    "by_name",
    "disabled_rules",
    "enabled_rules",
]
