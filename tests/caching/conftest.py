from collections.abc import Iterator
from unittest import mock

import pytest

from fuseplan.compilation import manager
from tests.contents import READ_ANEW


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    """Keys are what is tested: elsewhere, what fuseplan ships is read for them once."""
    with mock.patch.multiple(manager, **READ_ANEW):
        yield
