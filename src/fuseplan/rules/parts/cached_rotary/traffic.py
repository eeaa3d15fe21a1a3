"""What rotary embedding and writing into a cache cost: bytes, and the kernels that Inductor makes of it.

Without a fusion that is one kernel which rotates the queries, one which rotates the keys and writes them into their
cache, and one which writes the values into theirs.
"""

from dataclasses import dataclass

from fuseplan.rules.parts.rotary import Rotation
from fuseplan.rules.parts.traffic import Clock, Kernel

EAGER_BYTES = 8
"""A kernel of an eager reference reads and writes float32."""


@dataclass(frozen=True, kw_only=True)
class CachedRegion:
    """What is rotated and written, at one size.

    Attributes:
        tokens: of all rows of the batch.
        q_heads: heads of the queries.
        heads: of keys and values.
        width: of a head of queries and keys.
        value_width: of a head of values.
        angles: cosines and sines a token.
        itemsize: bytes of an element.
        cache_bytes: of both caches.
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
        """What reading and writing so many heads moves."""
        return 2 * self.tokens * heads * width * self.itemsize

    def unfused(self, clock: Clock) -> tuple[Kernel, ...]:
        """As Inductor leaves it."""
        return (
            clock.local("rotary", self._bytes(self.q_heads, self.width) + self._angle_bytes),
            clock.local("rotary+cache_write", self._bytes(self.heads, self.width) + self._angle_bytes),
            clock.local("cache_write", self._bytes(self.heads, self.value_width)),
        )

    def fused(self, clock: Clock, *, eager: bool) -> tuple[Kernel, ...]:
        """All of it as one kernel, or by the reference, op by op, which copies the caches and copies them back."""
        if eager:
            rotated = clock.local("eager", EAGER_BYTES * self.tokens * self.q_heads * self.width)
            return (rotated,) * Rotation.eager_kernels + (clock.local("copy", 2 * self.cache_bytes),) * 2
        moved = self._bytes(self.q_heads + self.heads, self.width) + self._bytes(self.heads, self.value_width)
        return (clock.local("rotary+cache_write", moved + self._angle_bytes),)
