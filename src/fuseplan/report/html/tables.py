"""Tables of the page's data: what occurs often is stored once and named by its index."""

from collections.abc import Hashable
from typing import Any


class Table:
    """Rows in order of first use, each once."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._index: dict[Hashable, int] = {}

    def add(self, key: Hashable, row: Any = None) -> int:
        """The index of a row.

        Args:
            key: what makes it the same row.
            row: what is stored for it; the key itself where None.
        """
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.rows)
            self.rows.append(key if row is None else row)
        return found
