"""JSON from outside: plain values in bounds or a ValueError of one line, in time that grows with its bytes."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuseplan.record.parsing import MOST_DEPTH, MOST_DIGITS, parse_json, parse_object

LIMIT = 2**20


def parse(content: bytes, **options: Any) -> Any:
    return parse_json(content, most_bytes=LIMIT, **options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" " * (LIMIT + 1), f"it has more than {LIMIT} bytes"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"it is nested more than {MOST_DEPTH} deep"),
        (b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1), "deep"),
        (b'["\\"", ' + b"[" * MOST_DEPTH, "deep"),
        (b"", "it isn't JSON: Expecting value"),
        (b"[1] 2", "it isn't JSON: Extra data"),
        (b'"\xff"', "it isn't UTF-8"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is there twice in one object"),
        (b"[NaN]", "NaN isn't a number of JSON"),
        (b"[-Infinity]", "-Infinity isn't a number of JSON"),
        (b"1e999", "the number 1e999 is larger than any float"),
        (b"1" * (MOST_DIGITS + 1), f"has more than {MOST_DIGITS} digits"),
    ],
)
def test_refused_with_the_reason(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse(content)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"\xef\xbb\xbf[1]", [1]),
        (b'"' + b"[" * 1000 + b'"', "[" * 1000),
        (b'"\\\\"', "\\"),
        (b'"\\"[[["', '"[[['),
        (b'"\\ud800"', "\ud800"),
        (b"1" * MOST_DIGITS, int("1" * MOST_DIGITS)),
        (b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, None),
    ],
)
def test_taken_as_it_is(content: bytes, value: Any) -> None:
    assert value is None or parse(content) == value
    parse(content)


def test_infinities_where_they_are_asked_for() -> None:
    assert parse(b"[0.0, Infinity]", finite=False) == [0.0, float("inf")]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(VALUES, st.booleans())
def test_what_python_writes_is_read_back(value: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary() | st.text(alphabet='[]{}",:\\ 1eE-.nulNaN\n').map(str.encode))
def test_whatever_the_bytes_are_it_is_json_or_a_value_error(content: bytes) -> None:
    try:
        value = parse(content)
    except ValueError as error:
        assert len(str(error)) < 300  # noqa: PT017 - or no error at all
    else:
        assert value == json.loads(content.decode("utf-8-sig"))


LONG = [b'{"' + piece * ((LIMIT - 2) // len(piece)) for piece in (b'\\"', b'"', b"\\", b'"a":1,', b'"[', b"[]", b"{")]
TWICE_AT_LAST = json.dumps({str(index): 0 for index in range(60_000)})[:-1].encode() + b', "59999": 1}'


@pytest.mark.parametrize("content", [*LONG, TWICE_AT_LAST], ids="abcdefgh")
def test_time_grows_with_the_bytes_alone(content: bytes) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"."):
        parse(content)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[]", "it isn't a JSON object"),
        (b"{}", "it has schema None; this version reads 1"),
        (b'{"schema": 1.0}', "it has schema 1.0; this version reads 1"),
        (b'{"schema": 2}', "it has schema 2; this version reads 1"),
    ],
)
def test_objects_of_another_schema_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_object(content, most_bytes=LIMIT, schema=1)
    assert parse_object(b'{"schema": 1}', most_bytes=LIMIT, schema=1) == {"schema": 1}
