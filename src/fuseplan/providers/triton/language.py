"""Triton, or what stands for it where it isn't installed: plans for other machines ask files with kernels what these
take, and import them for it.
"""

from typing import Any

__all__ = ["tl", "triton"]


class _Absent:
    """Has every attribute and takes every call, so that decorators and annotations go through."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> "_Absent":
        return self


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Absent()
