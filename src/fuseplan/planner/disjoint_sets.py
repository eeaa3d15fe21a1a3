"""Union-find."""

from collections.abc import Iterable


class DisjointSets:
    """Union-find over 0 .. size - 1; the representative of a set is its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """The representative of an item's set."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, items: Iterable[int]) -> None:
        """Makes the sets of all items one."""
        roots = {self.find(item) for item in items}
        smallest = min(roots)
        for root in roots:
            self._parent[root] = smallest

    def sets(self) -> list[tuple[int, ...]]:
        """All sets, each in ascending order, by smallest member."""
        members: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            members.setdefault(self.find(item), []).append(item)
        return [tuple(each) for each in members.values()]
