"""`fuseplan rules`, `providers`, `devices`: lists, with availability here or the reason why not."""

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from fuseplan.cli.console import Debug, Json, one_line_errors, show, table_of

ALL_PATTERNS = "all patterns of one rule: fuseplan rules NAME"


def rules(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One rule; default: all.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the fusions: each one's pattern and the op that replaces it; for one of them, all of its patterns."""
    with one_line_errors(debug):
        from fuseplan.config import unknown
        from fuseplan.rules import by_name
        from fuseplan.rules.families import BUILT_IN_RULES

        known = by_name(BUILT_IN_RULES)
        if name is not None and name not in known:
            raise unknown("rule", name, known)
        rows: list[dict[str, Any]] = [
            {"rule": rule, "flags": list(members[0].flags), "fusions": [member.describe() for member in members]}
            for rule, members in known.items()
            if name in (None, rule)
        ]
        if as_json:
            return show({"schema": 1, "rules": rows}, as_json=True)
        if name is None:
            table = table_of("rule", "flag", "patterns", "the shortest: pattern  =>  fused op")
            for row in rows:
                shortest = min(row["fusions"], key=len)
                table.add_row(row["rule"], " and ".join(row["flags"]), str(len(row["fusions"])), shortest)
            return show(Group(table, Text(), Text(ALL_PATTERNS)), as_json=False)
        table = table_of("rule", "flag", "pattern  =>  fused op")
        for row in rows:
            for index, fusion in enumerate(row["fusions"]):
                table.add_row(*(("", "") if index else (str(row["rule"]), " and ".join(row["flags"]))), fusion)
        return show(table, as_json=False)


def providers(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One provider, with its fused ops; default: all.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the providers of fused ops: available here, or why not; for one provider, the arguments that its kernels
    take.
    """
    with one_line_errors(debug):
        from fuseplan.config import unknown
        from fuseplan.providers import BUILT_IN_PROVIDERS, ENGINE_PROVIDERS

        every = (*BUILT_IN_PROVIDERS, *ENGINE_PROVIDERS)
        known = {each.name: each for each in sorted(every, key=lambda each: each.name)}
        if name is not None and name not in known:
            raise unknown("provider", name, known)
        rows: list[dict[str, Any]] = []
        for provider in (each for each in known.values() if name in (None, each.name)):
            refusal = provider.unavailable()
            rows.append(
                {
                    "provider": provider.name,
                    "description": provider.description,
                    "available": refusal is None,
                    "why_not": refusal.detail if refusal else None,
                    "mend": refusal.fix if refusal else None,
                    "version": provider.version(),
                    "implements": sorted(provider.implements),
                    "prices": sorted(provider.prices),
                    "untested": provider.untested,
                    "kernels": [
                        {
                            "op": op,
                            "rounds": sorted(offer.roundings) if offer.roundings is not None else None,
                            "takes": list(offer.limits()),
                        }
                        for op, offer in sorted(provider.implements.items())
                    ],
                }
            )
        if as_json:
            return show({"schema": 1, "providers": rows}, as_json=True)
        table = table_of("provider", "available", "fused ops", "")
        for row in rows:
            available = Text("yes", style="green") if row["available"] else Text("no", style="red")
            why = "; ".join(str(text) for text in (row["why_not"], row["mend"]) if text)
            notes = (row["description"], f"not here: {why}" if why else None, row["untested"])
            table.add_row(row["provider"], available, str(len(row["implements"])), "\n".join(filter(None, notes)))
        show(table, as_json=False)
        if name is not None:
            show("", as_json=False)
            kernels = table_of("fused op", "rounds as", "takes")
            for each in rows[0]["kernels"]:
                rounds = ", ".join(each["rounds"]) if each["rounds"] is not None else "asked"
                kernels.add_row(each["op"], rounds, "; ".join(each["takes"]) or "whatever the op takes")
            show(kernels, as_json=False)
        return None


def devices(as_json: Json = False, debug: Debug = False) -> None:
    """List the device profiles, and the constants of their cost model with their sources."""
    with one_line_errors(debug):
        from fuseplan.compatibility import require_supported_torch

        require_supported_torch()
        from fuseplan.devices import VENDOR_NAMES
        from fuseplan.planner.costs import hardware_of
        from fuseplan.providers import BUILT_IN_PROVIDERS, PROFILES, local_profile

        everywhere = sorted(each.name for each in BUILT_IN_PROVIDERS if each.vendors >= VENDOR_NAMES.keys())
        here = local_profile()
        local = here.name
        rows: list[dict[str, Any]] = [
            {
                "device": name,
                "description": profile.description,
                "here": name == local,
                "providers": sorted(p.name for p in BUILT_IN_PROVIDERS if p.unavailable(profile) is None),
                "constants": [
                    {"name": each, "value": constant.value, "unit": constant.unit, "source": constant.source}
                    for each, constant in hardware_of(profile, here=name == local).constants()
                ],
            }
            for name, profile in {**PROFILES, local: here}.items()
        ]
        if as_json:
            return show({"schema": 1, "devices": rows}, as_json=True)
        table = table_of("device", "", "here", "providers", "memory", "measured constants")
        for row in rows:
            constants = {each["name"]: each for each in row["constants"]}
            table.add_row(
                row["device"],
                row["description"],
                Text("yes", style="green") if row["here"] else "",
                "\n".join(name for name in row["providers"] if name not in everywhere),
                f"{constants['memory_bandwidth']['value']:.0f} GB/s",
                _measured(row["constants"]),
            )
        show(table, as_json=False)
        note = f"{', '.join(everywhere)} are everywhere; --json prints every constant with its source"
        return show(Text(note, style="dim"), as_json=False)


def _measured(constants: list[dict[str, Any]]) -> str:
    derived = ("H200's", "MI355X's", "AITER's", "assumed", "datasheet", "nominal", "not measured", "torch reports")
    known = [each for each in constants if not any(mark in each["source"] for mark in derived)]
    return f"{len(known)} of {len(constants)}"
