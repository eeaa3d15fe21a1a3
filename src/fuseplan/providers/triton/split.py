"""The split of attention's keys among programs."""

from dataclasses import dataclass, replace

from fuseplan.providers.triton.language import triton
from fuseplan.providers.triton.tuned import (
    SPLIT_KEYS,
    SPLIT_PROGRAMS,
    SPLIT_STAGES,
    SPLIT_WARPS,
    WHOLE_KEYS,
    WHOLE_STAGES,
    WHOLE_WARPS,
)

MOST_SPLITS = 64
"""The most parts that the second kernel combines."""

MOST_ROWS = 64
"""The most rows of a tile; where a head has more queries, several programs read its keys."""

LEAST_SIDE = 16
"""The least rows of a tile that tensor cores multiply."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split of keys.

    Attributes:
        count: programs that share the keys of a head.
        block: keys of a tile.
        warps: warps of a program.
        stages: tiles in flight to a program.
    """

    count: int
    block: int
    warps: int
    stages: int

    @classmethod
    def of(cls, keys: int, key_bytes: int, places: int, processors: int) -> "Split":
        """The split by sizes that are known before the lengths of sequences.

        Args:
            keys: the most keys that the cache holds.
            key_bytes: bytes of a key of one head, padded.
            places: heads of all batches, times tiles of rows.
            processors: multiprocessors of the device.
        """
        block, warps, stages = SPLIT_KEYS.at(key_bytes), SPLIT_WARPS.value, SPLIT_STAGES.value
        count = min(triton.cdiv(keys, block), SPLIT_PROGRAMS.value * processors // places, MOST_SPLITS)
        if count <= 1:
            count, stages = 1, WHOLE_STAGES.at(key_bytes)
            block, warps = WHOLE_KEYS.at(key_bytes), WHOLE_WARPS.at(key_bytes)
        return cls(count=count, block=block, warps=warps, stages=stages)

    def fitting(self, shared: int, rows: int, key_bytes: int, itemsize: int) -> "Split":
        """The split with fewer tiles in flight, and smaller tiles, where a program lacks the shared memory for them.

        Args:
            shared: the most bytes of a program.
            rows: rows of a tile of queries.
            key_bytes: bytes of a key of one head, padded.
            itemsize: bytes of an element.
        """
        # Triton 3.6 and 3.7 use memory for one tile less than stages, except in products of 64 rows from sm_90 on.
        tiles = max(1, self.stages - (rows < MOST_ROWS))
        if tiles * 2 * self.block * key_bytes + rows * (key_bytes + self.block * itemsize) <= shared:
            return self
        if self.stages > 2:
            return replace(self, stages=self.stages - 1).fitting(shared, rows, key_bytes, itemsize)
        if self.block > LEAST_SIDE:
            return replace(self, block=self.block // 2).fitting(shared, rows, key_bytes, itemsize)
        return replace(self, stages=1)
