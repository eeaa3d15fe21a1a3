"""fuseplan's entry points on a torch whose private interfaces have moved: those that work without fusions do, with a
warning, and the others raise. Nothing here depends on a private interface.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch

from fuseplan.compatibility import incompatibility, require_torch_version
from fuseplan.errors import CompatibilityError, FuseplanWarning

T = TypeVar("T", bound=Callable[..., Any])

OWN_ARGUMENTS = frozenset({"config", "on_report", "passes", "rules", "providers"})
"""The arguments of `fuseplan.compile` that `torch.compile` doesn't have."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExternalPass:
    """Takes the arguments of `fuseplan.ExternalPass`, so that programs that make one go on; it is ignored."""

    matcher: Any
    name: str = ""
    saving_us: float | None = None
    uuid: Any = None


class PostGradPassManager:
    """Can't be made.

    Raises:
        CompatibilityError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse()


def compile(model: T, **arguments: Any) -> T:
    """`torch.compile(model)`, with the arguments of `fuseplan.compile` that are torch's.

    Raises:
        CompatibilityError: this torch is too old.
    """
    require_torch_version()
    passed_on = {name: value for name, value in arguments.items() if name not in OWN_ARGUMENTS}
    left_out = ""
    if passed_on.get("mode") and passed_on.get("options"):
        # fuseplan.compile takes both, torch.compile doesn't.
        expanded = _expanded(passed_on["mode"], passed_on.get("dynamic"))
        left_out = "" if expanded is not None else f" and without mode={passed_on['mode']!r}"
        del passed_on["mode"]
        passed_on["options"] = {**(expanded or {}), **passed_on["options"]}
    _warn(f"the model is compiled by torch.compile, without fuseplan's fusions{left_out}")
    return cast(T, torch.compile(model, **passed_on))


def inductor_options(*args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """`options` as they are.

    Raises:
        CompatibilityError: this torch is too old.
    """
    require_torch_version()
    _warn("these options are without fuseplan's fusions")
    return dict(options or {})


def explain(*args: Any, **kwargs: Any) -> NoReturn:
    """Can't be served.

    Raises:
        CompatibilityError: always.
    """
    _refuse()


def _expanded(mode: str, dynamic: bool | None) -> dict[str, Any] | None:
    """A mode as options; None where torch doesn't list them."""
    try:
        return {} if mode == "default" else dict(torch._inductor.list_mode_options(mode, dynamic))
    except (AttributeError, TypeError):
        return None


def _warn(consequence: str) -> None:
    warnings.warn(f"{incompatibility()}; {consequence}", FuseplanWarning, stacklevel=3)


def _refuse() -> NoReturn:
    require_torch_version()
    raise CompatibilityError(incompatibility())
