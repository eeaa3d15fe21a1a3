"""What Triton passes to hooks on its compilations, as vLLM has while it serves."""

from typing import Any, Final

import triton
from torch.torch_version import TorchVersion
from triton.runtime.jit import JITFunction

FAIL_AT_FUNCTIONS: Final = TorchVersion(triton.__version__) < "3.7"
"""Whether a function among a kernel's constants fails the hooks, which are given constants as JSON."""

CALL_HOOK: Final = "_call_hook"
"""The method of a kernel that calls hooks, in the releases of Triton before 3.7, which won't change any more."""


def names_functions(kernel: Any) -> Any:
    """A kernel of Triton some of whose constants are functions, which hooks see by their names: Triton
    before 3.7 raises TypeError there, in the middle of a launch.
    """
    if not FAIL_AT_FUNCTIONS or not isinstance(kernel, JITFunction):
        return kernel
    call_hook = getattr(kernel, CALL_HOOK)

    def named(value: Any) -> Any:
        if isinstance(value, JITFunction):
            return f"{value.fn.__module__}:{value.fn.__qualname__}"
        return {key: named(each) for key, each in value.items()} if isinstance(value, dict) else value

    setattr(kernel, CALL_HOOK, lambda *arguments: call_hook(*map(named, arguments)))
    return kernel
