"""The providers that fuseplan brings, a file each."""

from collections.abc import Sequence

from fuseplan.providers import aiter, attention, flashinfer, reference, triton, vllm_c
from fuseplan.providers.provider import Provider

BUILT_IN_PROVIDERS: Sequence[Provider] = (
    reference.PROVIDER,
    *attention.PROVIDERS,
    triton.PROVIDER,
    flashinfer.PROVIDER,
    aiter.PROVIDER,
)

ENGINE_PROVIDERS: Sequence[Provider] = (vllm_c.PROVIDER,)
"""Providers whose kernels exist only in an engine's process; the engine's integration adds them."""
