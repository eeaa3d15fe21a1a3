"""What libraries keep for process groups, apart from any library."""

import subprocess
import sys

import torch.distributed as dist

from fuseplan.providers.workspaces import Workspaces
from tests.providers.stand_ins import ranks


def test_the_least_that_holds_the_rows_is_taken() -> None:
    made: list[int] = []
    released: list[int] = []
    spaces: Workspaces[int] = Workspaces("a library", released.append)

    def get(group: str, rows: int, capacity: int, key: str = "k") -> int:
        def make(_: dist.ProcessGroup) -> int:
            made.append(capacity)
            return capacity

        return spaces.get(group, key, rows, capacity, make)

    with ranks(2) as group:
        asked = ((3, 4), (9, 16), (4, 8), (5, 8), (16, 99))
        assert [get(group, *each) for each in asked] == [4, 16, 4, 16, 16]
        assert get(group, 1, 2, key="other") == 2
    assert made == [4, 16, 2]
    spaces.release()
    assert sorted(released) == [2, 4, 16]
    spaces.release()
    assert len(released) == 3


def test_one_that_can_not_be_made_is_asked_for_again() -> None:
    spaces: Workspaces[int] = Workspaces("a library", lambda workspace: None)
    tries: list[int] = []

    def make(_: dist.ProcessGroup) -> int:
        tries.append(1)
        if len(tries) == 1:
            raise MemoryError
        return 7

    with ranks(2) as group:
        try:
            spaces.get(group, "k", 1, 1, make)
        except MemoryError:
            assert spaces.get(group, "k", 1, 1, make) == 7
    assert len(tries) == 2


def test_they_are_given_back_when_the_process_ends() -> None:
    code = (
        "from fuseplan.providers.workspaces import Workspaces\n"
        "from tests.providers.stand_ins import ranks\n"
        "spaces = Workspaces('a library', lambda workspace: print('released', workspace))\n"
        "with ranks(2) as group:\n"
        "    spaces.get(group, 'k', 1, 1, lambda group: 'it')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "released it\n"
