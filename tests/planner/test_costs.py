"""The cost model decides the contests that were measured, and broken cost tables are refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.calibrate_reduces import REGIONS, overall, regions
from benchmarks.contest import Contest
from benchmarks.published import score
from fuseplan.errors import ConfigError
from fuseplan.planner.costs import HARDWARE, CostTable, Region
from fuseplan.providers import PROFILES
from tests.planner.parts import NORM, Padding

ROOT = Path(__file__).parents[2]


def site(tokens: int, ranks: int = 2) -> Region:
    return Region(
        core=NORM, tokens=tokens, width=2880, reduce=True, residual=True, tail=Padding(padded=3072), ranks=ranks
    )


def alternatives(device: str, provider: str, tokens: int, ranks: int = 2) -> dict[str, int]:
    model, whole = Contest(HARDWARE[device]), site(tokens, ranks)
    return {
        "unfused": model.unfused_ns(whole),
        "act_padding": model.alternative_ns(whole, whole.without_reduce(), provider),
        "allreduce_rms": model.alternative_ns(whole, whole.without_tail(), provider),
        "allreduce_rms_padding": model.alternative_ns(whole, whole, provider),
    }


def test_there_is_a_model_of_every_device_and_every_constant_has_a_source() -> None:
    assert set(HARDWARE) == set(PROFILES)
    for name, hardware in HARDWARE.items():
        constants = dict(hardware.constants())
        assert {"launch", "memory_bandwidth", "cache"} <= set(constants), name
        for constant in constants.values():
            assert constant.source.strip()
            assert constant.value >= 0
            assert constant.unit in ("ns", "GB/s", "GFLOP/s", "bytes", "times")


@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_pad_first_wins_on_mi355x_with_aiter(tokens: int) -> None:
    times = alternatives("mi355x", "aiter", tokens)
    assert times["act_padding"] < times["allreduce_rms"] < times["unfused"]


@pytest.mark.parametrize(("name", "device", "ranks"), [(name, *where) for name, where in REGIONS.items()])
def test_the_best_fusion_of_a_region_is_the_one_that_was_measured(name: str, device: str, ranks: int) -> None:
    columns = {"act_padding": "pad_nccl", "allreduce_rms": "reduce_then_pad", "allreduce_rms_padding": "all"}
    for row in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]:
        modelled = alternatives(device, "triton", row["tokens"], ranks=ranks)
        measured = {alternative: row[column][0] for alternative, column in columns.items()}
        assert sorted(columns, key=modelled.__getitem__) == sorted(columns, key=measured.__getitem__), row["tokens"]


def test_regions_take_what_was_measured() -> None:
    found = overall(regions())
    assert found["rows"] > 200
    assert found["median"] <= 0.08
    assert found["within_20"] >= 0.95
    assert found == json.loads((ROOT / "benchmarks/results/reduces.json").read_text())["ours"]


def test_the_constants_are_those_that_were_fitted() -> None:
    local = json.loads((ROOT / "benchmarks/results/cost_model_h200.json").read_text())["constants"]
    kept = ("launch", "generated_norm", "cache_bandwidth", "strided_copy")
    exchanges = json.loads((ROOT / "benchmarks/results/reduces.json").read_text())["constants"]
    fitted = {**exchanges, "h200": {**exchanges["h200"], **{name: local[name] for name in kept}}}
    for device, constants in fitted.items():
        committed = {name: constant.value for name, constant in HARDWARE[device].constants()}
        for name, each in constants.items():
            assert committed[name] == pytest.approx(each["value"], rel=5e-3), (device, name)


def test_published_times_are_near_those_of_the_model() -> None:
    """No constant was fitted on these rows. They print how far the model is from machines that nobody measured."""
    found = score()
    assert found["signs_right"] >= 0.94, found["wrong"]
    assert found["median_error"] <= 0.2
    assert sum(row["factor"] <= 2 for row in found["crossovers"]) >= 2, found["crossovers"]
    published = json.loads((ROOT / "benchmarks/results/published.json").read_text())
    for name in ("signs_right", "median_error", "times"):
        assert found[name] == published[name]
    held_out = [f"#{number}" for number in ("1290", "37756", "44079", "53318", "773")]
    for hardware in HARDWARE.values():
        for name, constant in hardware.constants():
            assert not any(number in constant.source for number in held_out), (hardware.name, name)


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(HARDWARE)), st.integers(1, 8192), st.integers(2, 8),
    st.sampled_from(["torch", "triton", "flashinfer", "aiter", "somebody"]),
)  # fmt: skip
def test_prices_are_positive_integers_and_grow_with_tokens(device: str, tokens: int, ranks: int, provider: str) -> None:
    model = Contest(HARDWARE[device])
    for region in (site(tokens, ranks), site(tokens, ranks).without_reduce(), site(tokens, ranks).without_tail()):
        for price in (model.unfused_ns(region), model.fused_ns(region, provider)):
            assert isinstance(price, int)
            assert price > 0
        assert model.unfused_ns(replace(region, tokens=2 * tokens)) >= model.unfused_ns(region)


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        CostTable(device="h200").save(tmp_path / "file" / "costs.json")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
