"""fuseplan as a plugin of vLLM: the entry point `vllm.general_plugins`, inert until it is asked for."""


def register() -> None:
    """Called by vLLM in each of its processes. Whatever is wrong with fuseplan, an engine that didn't ask for it
    starts.
    """
    from fuseplan.integrations.vllm.plugin import hook_into_vllm

    hook_into_vllm()


__all__ = ["register"]
