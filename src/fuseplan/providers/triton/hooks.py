"""Arguments that Triton passes to hooks on compilation, such as those that vLLM sets while it serves."""

from typing import Any, Final

import triton
from torch.torch_version import TorchVersion
from triton.runtime.jit import JITFunction

FAIL_AT_FUNCTIONS: Final = TorchVersion(triton.__version__) < "3.7"
"""Whether a function among a kernel's constants breaks the hooks, which get constants as JSON."""

CALL_HOOK: Final = "_call_hook"
"""The method of a kernel that calls hooks in Triton before 3.7, releases that are final."""


def names_functions(kernel: Any) -> Any:
    """Lets hooks see the functions among a Triton kernel's constants by their names: without that, Triton before 3.7
    raises TypeError in the middle of a launch.
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
