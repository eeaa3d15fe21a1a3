import pytest

from fuseplan.compilation import manager
from tests.contents import READ_ANEW


@pytest.fixture(autouse=True)
def _read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are what is tested: elsewhere, what fuseplan ships is read for them once."""
    for name, read in READ_ANEW.items():
        monkeypatch.setattr(manager, name, read)
