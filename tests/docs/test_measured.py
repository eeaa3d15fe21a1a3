"""README and the pages say what was measured: table, chart and facts are those of the committed results."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from typer.main import get_command

from benchmarks import crossover
from docs import measured
from docs.blocks import ROOT
from docs.make_pictures import CHARTS, PICTURES
from fuseplan.cli import app

TEXT = measured.README.read_text(encoding="utf-8")
FIRST_SCREEN = TEXT.partition("\n## ")[0]


def test_readme_has_the_table_of_the_committed_results() -> None:
    assert measured.with_table(TEXT) == TEXT, "make pictures"
    linked = re.findall(r"\[JSON\]\((\S+)\)", measured.table())
    assert linked
    assert [path for path in linked if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_shows_the_committed_results(name: str) -> None:
    drawn = (PICTURES / name).read_text(encoding="utf-8")
    assert CHARTS[name]() == drawn, "make pictures"
    ElementTree.fromstring(drawn)


def test_crossovers_are_those_of_the_model_as_it_is() -> None:
    found = measured.committed("crossover")
    assert list(crossover.measured_rows()) == found["rows"], "python benchmarks/crossover.py --write"
    assert list(crossover.modelled_rows()) == found["shapes"]
    assert {row["fastest"]["measured"] for row in found["rows"]} == {crossover.OURS}
    assert found["regret"] == 0
    assert {name for shape in found["shapes"] for name in shape["fastest"]} == {crossover.OURS}


def test_bars_are_as_long_as_the_steps_that_were_timed() -> None:
    (row,) = [each for each in measured.decode_steps(measured.committed("decode_one_gpu_h200"))
              if (each["model"], each["batch"]) == ("llama-3.1-8b", 32)]  # fmt: skip
    times = row["torch.compile"][0] / row["fuseplan"][0]
    group = next(each for each in measured.groups() if each.title.startswith("Llama-3.1-8B, Hugging Face, one"))
    (gain,) = [each for each in group.gains if each.label == "batch 32"]
    assert gain.times == pytest.approx(times, abs=1e-3)
    assert f">{gain.times:.2f}" in measured.gains()


def test_quartiles_that_overlap_are_called_unclear() -> None:
    for row in measured.committed("vllm_turns_h200")["rows"]:
        name = measured.NAMES[row["model"]]
        where = "one " if row["tp"] == 1 else f"{row['tp']} "
        title = re.compile(rf"{re.escape(name)}, vLLM [0-9.]+, {where}")
        (group,) = [each for each in measured.groups() if title.match(each.title)]
        for gain, count in zip(group.gains, ("1", "32"), strict=True):
            stock, planned = row["stock"]["tpot"][count], row["fuseplan"]["tpot"][count]
            assert gain.is_clear == (stock[1] > planned[2] or planned[1] > stock[2])


def test_readme_states_what_was_run() -> None:
    words = " ".join(TEXT.split())
    run = f"Kernels were run on {measured.gpus_run()} only, all-reduces with {measured.ranks_run()} ranks"
    assert run in words
    assert f"models of {measured.layers_run()} layers" in words
    assert measured.in_short() in words


def test_pages_state_ranks_gpus_and_engines_by_the_results_alone() -> None:
    texts = {
        name: (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("index", "is-it-for-me", "providers")
    }
    for name, text in texts.items():
        assert "{{ gpus_run }}" in text, name
        assert "{{ ranks_run }}" in text, name
    assert "{{ in_short }}" in texts["is-it-for-me"]
    (row,) = [line for line in texts["is-it-for-me"].splitlines() if line.startswith("| vLLM |")]
    assert "{{ engines_run }}" in row
    assert "several GPUs" not in row
    assert measured.engines_run().split(" and ")[-1] in measured.table()


def test_no_page_installs_from_where_it_is_not_published() -> None:
    for page in (measured.README, *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"pip install \W*fuseplan\b", page.read_text(encoding="utf-8")), page


def test_every_command_has_its_help_on_a_page() -> None:
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [*commands]
    assert re.findall(r"^\{\{ help_(\w+) \}\}$", page, re.MULTILINE) == [*commands]


def test_readme_is_read_in_a_few_minutes() -> None:
    prose = re.sub(r"(?ms)^```.*?^```|^\|.*?$|!\[.*?\]\(.*?\)|<!--.*?-->|\]\(.*?\)", " ", TEXT)
    assert len(prose.split()) <= 900


def test_the_first_screen_has_a_picture_how_to_install_and_the_one_line() -> None:
    assert len(FIRST_SCREEN.splitlines()) <= 35
    for shown in ("docs/pictures/", "pip install", "make demo", "make test", "model = fuseplan.compile(model)"):
        assert shown in FIRST_SCREEN
