"""fuseplan as a plugin of vLLM: the entry point `vllm.general_plugins`, inert until requested."""


def register() -> None:
    """Called by vLLM in each of its processes. An engine that didn't ask for fuseplan starts even if fuseplan is
    broken.
    """
    from fuseplan.integrations.vllm.plugin import hook_into_vllm

    hook_into_vllm()


__all__ = ["register"]
