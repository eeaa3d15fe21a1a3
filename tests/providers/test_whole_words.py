"""What ranks whose kernels are interpreted send each other comes whole."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.forks import Forks, Request

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_a_word_is_never_half_of_one_number_and_half_of_another(interpreting_forks: Forks, tmp_path: Path) -> None:
    """By the interpreter's own accesses a few of a million words are."""
    file = tmp_path / "words"
    file.write_bytes(bytes(8 * 1000))
    roles: list[tuple[list[str], dict[str, str]]] = [([role, str(file)], {}) for role in ("writes", "reads")]
    request = Request(module="tests.providers.run_whole_words", processes=roles)
    writer, reader = interpreting_forks.outcomes(interpreting_forks.start(request))
    assert (writer.status, reader.status) == (0, 0), writer.output + reader.output
    assert int(reader.output) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float16, np.int32, np.float32, np.int64])
def test_accesses_are_the_interpreters_own(dtype: type[np.generic]) -> None:
    """Of any pointers, masked or not."""
    from triton.runtime.interpreter import _interpreter

    from tests.providers import whole_words

    values = np.arange(24).astype(dtype)
    rng = np.random.default_rng(0)
    pointers = np.uint64(values.ctypes.data) + rng.permutation(24).reshape(4, 6).astype(np.uint64) * values.itemsize
    other, sent = np.full((4, 6), 77).astype(dtype), rng.integers(100, size=(4, 6)).astype(dtype)
    for mask in (rng.random((4, 6)) < 0.5, np.ones((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)):
        wanted = _interpreter.load(pointers, mask, other, np.dtype(dtype))
        got = whole_words.load(pointers, mask, other, np.dtype(dtype))
        assert got.dtype == wanted.dtype
        assert np.array_equal(got, wanted)
        before = values.copy()
        whole_words.store(pointers, sent, mask)
        after = values.copy()
        values[:] = before
        _interpreter.store(pointers, sent, mask)
        assert np.array_equal(values, after)
