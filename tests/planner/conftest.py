import pytest

from fuseplan.matching import candidates
from fuseplan.rules.families import sites


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written graphs may name a group of four ranks, where no process group is made."""
    for place in (sites, candidates):
        own = vars(place)["group_size"]
        monkeypatch.setattr(place, "group_size", lambda name, own=own: 4 if name == "g" else own(name))
