"""Of a product of parameters, by day each value is tried, and at night all that is left."""

import pytest

TESTS = """
import pytest

@pytest.mark.sampled
@pytest.mark.parametrize("c", ["x", pytest.param("y", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("b", [False, True])
@pytest.mark.parametrize(("a", "d"), [(1, "p"), (2, "p"), (3, "q")])
def test_sampled(a, b, c, d):
    pass

@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", [1, 2])
def test_whole(a, b):
    pass
"""


def test_each_value_is_tried_by_day_and_the_rest_at_night(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    nightly: left to the night\n    sampled: each value by day\n")
    pytester.makepyfile(TESTS)
    named = list[set[str]]()
    for when in ("not nightly", "nightly"):
        passed, _, failed = pytester.inline_run(
            "-m", when, "-p", "tests.sampled", "-p", "no:cacheprovider"
        ).listoutcomes()
        assert not failed
        named.append({each.nodeid.partition("::")[2] for each in passed})
    by_day, at_night = named
    assert by_day == {
        "test_sampled[1-p-False-x]", "test_sampled[3-q-True-x]", "test_sampled[2-p-False-x]",
        *(f"test_whole[{b}-{a}]" for a in (1, 2) for b in (1, 2)),
    }  # fmt: skip
    assert by_day.isdisjoint(at_night)
    assert len(by_day | at_night) == 3 * 2 * 2 + 4
