"""Traffic of rotary embedding and writes into a cache: bytes, and the kernels that Inductor makes of them.

Without a fusion there are three kernels: one rotates the queries, one rotates the keys and writes them into their
cache, and one writes the values into theirs.
"""

from dataclasses import dataclass

from fuseplan.rules.parts.rotary import Rotation
from fuseplan.rules.parts.traffic import Clock, Kernel

EAGER_BYTES = 8
"""A kernel of an eager reference reads and writes float32."""


@dataclass(frozen=True, kw_only=True)
class CachedRegion:
    """The rotations and writes of one op, at one size.

    Attributes:
        tokens: tokens of all rows of the batch.
        q_heads: heads of the queries.
        heads: heads of keys and values.
        width: head dimension of queries and keys.
        value_width: head dimension of values.
        angles: number of cosines and sines of a token.
        itemsize: bytes of an element.
        cache_bytes: bytes of both caches.
    """

    tokens: int
    q_heads: int
    heads: int
    width: int
    value_width: int
    angles: int
    itemsize: int
    cache_bytes: int

    @property
    def _angle_bytes(self) -> int:
        return self.tokens * self.angles * self.itemsize

    def _bytes(self, heads: int, width: int) -> int:
        """Bytes read and written for this many heads."""
        return 2 * self.tokens * heads * width * self.itemsize

    def unfused(self, clock: Clock) -> tuple[Kernel, ...]:
        """The kernels of the unfused graph."""
        return (
            clock.local("rotary", self._bytes(self.q_heads, self.width) + self._angle_bytes),
            clock.local("rotary+cache_write", self._bytes(self.heads, self.width) + self._angle_bytes),
            clock.local("cache_write", self._bytes(self.heads, self.value_width)),
        )

    def fused(self, clock: Clock, *, eager: bool) -> tuple[Kernel, ...]:
        """One kernel for all, or the reference's kernels, op by op, with copies of the caches and copies back."""
        if eager:
            rotated = clock.local("eager", EAGER_BYTES * self.tokens * self.q_heads * self.width)
            return (rotated,) * Rotation.eager_kernels + (clock.local("copy", 2 * self.cache_bytes),) * 2
        moved = self._bytes(self.q_heads + self.heads, self.width) + self._bytes(self.heads, self.value_width)
        return (clock.local("rotary+cache_write", moved + self._angle_bytes),)
