"""Tables of the page's data: repeated values are stored once and referred to by index."""

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
            key: equal for equal rows.
            row: the stored value; the key itself where None.
        """
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.rows)
            self.rows.append(key if row is None else row)
        return found
