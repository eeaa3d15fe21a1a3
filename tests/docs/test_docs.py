"""The documentation does what it says: every block of every page runs as written and prints what stands under it."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fuseplan
import fuseplan.errors
import fuseplan.record
from docs.blocks import PAGES, ROOT, Block, blocks_of, save_files
from docs.make_pictures import CHARTS, PICTURES, TERMINALS, lines_of
from docs.make_pictures import PAGES as SCREENSHOTS
from docs.measured import committed
from fuseplan.cli import app
from fuseplan.record import Nearness, Reason
from fuseplan.workloads import catalog
from tests.docs.commands import Command, Shell, commands_of, traced_once
from tests.examples.test_examples import FUSED, check
from tests.forks import Forks, Outcome
from tests.matching.test_obstacles import OBSTACLES

LANGUAGES = ("python", "sh", "text", "none")
"""Beside directives. `text` is output, which is compared; `none` is a diagram or a formula."""

PINNED = re.search(r"^TORCH +\?= torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
PRINTS_THE_SAME = PINNED is not None and torch.__version__.startswith(PINNED[1]) and not torch.cuda.is_available()
"""Output is shown as it is with the torch that the Makefile pins, on a machine without GPU."""

TIME = re.compile(r"\b\d+(\.\d+)?(?= (s|ms)\b)")
READING = ROOT / "docs/reading-a-report.md"
CODED = {"README", "other-passes"}
"""Pages whose Python blocks run by generated code by day too: the first one, and one that is about its cache."""
FULL_SIZE = [name for name in catalog.names() if "-tiny" not in name]
FULL_SIZE_TERMINALS = {name for name, made in TERMINALS.items() if not {*FULL_SIZE}.isdisjoint(made.command.split())}


def words(text: str) -> str:
    """Text without its line breaks and columns, times replaced."""
    return TIME.sub("T", " ".join(text.split()))


def shown(text: str) -> str:
    """A regular expression for what a page shows, where `...` stands for anything."""
    return re.escape(words(text)).replace(re.escape("..."), ".*").replace(r"\ ", r"\s*").replace(r"\s*.*\s*", ".*")


def by_day(command: Command, page: Path, *, is_compared: bool) -> Command | None:
    """What is run by day of a command, and all of it at night: one layer of full-size models and where a step is timed,
    if nothing that it prints is shown. None: ranks that torchrun starts, which `tests/real_models` has too, and what
    README times, on other pages.
    """
    if command.program == "torchrun" or (command.arguments[0] == "try" and page.name != "README.md"):
        return None
    is_large = not {*FULL_SIZE}.isdisjoint(command.arguments) or any("configs/" in word for word in command.arguments)
    is_timed = command.arguments[0] == "try"
    if is_compared or command.program != "fuseplan" or not (is_large or is_timed):
        return command
    arguments = [*command.arguments]
    if "--layers" in arguments:
        at = arguments.index("--layers")
        del arguments[at : at + 2]
    return replace(command, arguments=[*arguments, "--layers", "1", *["--repeats", "5"] * is_timed])


class Reader:
    """Follows a page from its top, as its reader would.

    Python blocks stand on their own, so that they run from the start, beside the commands.
    """

    def __init__(self, page: Path, forks: Forks, folder: Path, cache: Path) -> None:
        self.page, self.forks, self.folder, self.shell = page, forks, folder, Shell(forks, folder, cache)
        self.blocks = blocks_of(page)
        self.started: dict[Block, int] = {}
        self.printed: list[str] = []

    def start(self) -> None:
        """Has the Python blocks run."""
        save_files(self.page, self.folder)
        for block in (each for each in self.blocks if each.language == "python" and each not in self.started):
            path = self.folder / f"block_{block.line}.py"
            path.write_text(block.body, encoding="utf-8")
            self.started[block] = self.shell.start(path, has_code=self.shell.has_code or self.page.stem in CODED)

    def read(self) -> None:
        """Runs every block, and compares what is shown with what was printed."""
        self.start()
        for block, after in zip_longest(self.blocks, self.blocks[1:]):
            self._read(block, is_compared=after is not None and after.language == "text" and after.shows_output)

    def _read(self, block: Block, is_compared: bool) -> None:
        if block.language == "python":
            self.printed = [self._python(block)]
        elif block.language == "sh":
            commands = commands_of(block.body)
            chosen = [by_day(command, self.page, is_compared=is_compared) for command in commands]
            self.printed = [self._command(block, command) for command in chosen if command is not None]
        elif block.language == "text" and PRINTS_THE_SAME and self.printed:  # empty: it is run at night
            self._compare(block)

    def _python(self, block: Block) -> str:
        if block.file:
            (self.folder / block.file).write_text(block.body, encoding="utf-8")
        (outcome,) = self.forks.outcomes(self.started[block])
        assert outcome.status == 0, f"{block}\n{outcome.output}"
        return outcome.output

    def _command(self, block: Block, command: Command) -> str:
        outcome: Outcome = self.shell.run(command)
        assert outcome.status == command.status, f"{block}: {command}\n{outcome.output}"
        for example in FUSED.keys() & set(command.arguments):
            check(example, outcome.output)
        return outcome.output

    def _compare(self, block: Block) -> None:
        """Right under a block stands all that it or its last commands print; further down a part of it."""
        printed, expected = words("\n".join(self.printed)), shown(block.body)
        if not block.shows_output:
            expected = f".*{expected}.*"
        elif len(self.printed) > 1:
            expected = f".*{expected}"
        assert re.fullmatch(expected, printed), f"{block} shows\n\n{block.body}\nand printed was\n\n" + "\n".join(
            self.printed
        )


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def readers(
    request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, Reader]:
    """One for each page. Alone in its session, this module has the Python blocks of all pages run from the start."""
    cache = tmp_path_factory.mktemp("inductor")
    readers = {page: Reader(page, forks, tmp_path_factory.mktemp(page.stem), cache) for page in PAGES}
    if not hasattr(request.config, "workerinput"):
        wanted = [item.callspec.params.get("page") for item in request.session.items if hasattr(item, "callspec")]
        for page in (each for each in wanted if each in readers):
            readers[page].start()
    return readers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs_and_prints_what_it_shows(page: Path, readers: dict[Path, Reader]) -> None:
    for block in readers[page].blocks:
        assert block.language.startswith("{") or block.language in LANGUAGES, f"{block}: {block.language!r}"
    readers[page].read()


@pytest.mark.nightly
def test_what_is_shortened_by_day_runs_as_it_stands(readers: dict[Path, Reader]) -> None:
    shell = readers[ROOT / "README.md"].shell
    scripts = [(page, block.body) for page in PAGES for block in blocks_of(page) if block.language == "sh"]
    told = [
        command
        for page, script in scripts
        for command in commands_of(script)
        if by_day(command, page, is_compared=False) != command
    ]
    assert {"explain", "try"} <= {command.arguments[0] for command in told}
    assert [command.arguments[:2] for command in told if "--html" in command.arguments]
    for command in (each for each in told if each.program == "fuseplan"):  # other programs run by generated code, below
        outcome = shell.run(command)
        assert outcome.status == command.status, f"{command}\n{outcome.output}"


@pytest.mark.nightly
def test_programs_do_the_same_by_generated_code(readers: dict[Path, Reader]) -> None:
    """By day graphs are interpreted."""
    ran = set()
    for reader in readers.values():
        reader.shell.has_code = True
        reader.started.clear()
        reader.start()
        for block in reader.blocks:
            if block.language == "python":
                reader._python(block)
                continue
            if block.language != "sh":
                continue
            for command in commands_of(block.body):
                if command.program in ("python", "torchrun"):
                    reader._command(block, command)
                    ran |= FUSED.keys() & set(command.arguments)
        reader.shell.has_code = False
    assert ran == FUSED.keys()


def test_what_is_shown_is_compared() -> None:
    printed = words("saves 2.0 us instead of 5.9 us\ntime  build 2.4 s, pricing 13 ms")
    assert re.fullmatch(shown("saves 2.0 us\n   instead of 5.9 us\ntime  build 0.1 s, pricing 2 ms"), printed)
    assert re.fullmatch(shown("saves 2.0 us ...\ntime ..."), printed)
    assert not re.fullmatch(shown("saves 2.1 us ..."), printed)
    assert not re.fullmatch(shown("saves 2.0 us"), printed)


def test_commands_are_read_as_a_shell_reads_them() -> None:
    script = 'A=1 B_C="x y" .venv/bin/fuseplan diff \\\n  a.json b.json  # exit status 1\n\n# a remark\nmake demo\n'
    assert [*commands_of(script)] == [
        Command({"A": "1", "B_C": "x y"}, "fuseplan", ["diff", "a.json", "b.json"], 1),
        Command({}, "make", ["demo"], 0),
    ]


# What pages list is all there is.


def rows_under(heading: str, page: Path = READING) -> list[list[str]]:
    """The cells of the first table that follows a text."""
    lines = page.read_text(encoding="utf-8").partition(heading)[2].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("heading", "kind"), [("Its `Nearness` says\nhow near it is", Nearness), ("Its `Reason` is", Reason)]
)
def test_tables_of_near_misses_are_complete(heading: str, kind: type[Nearness] | type[Reason]) -> None:
    assert [name for row in rows_under(heading) for name in names(row[0])] == [member.value for member in kind]


def test_the_table_of_obstacles_is_the_one_that_is_planted() -> None:
    rows = {row[0]: names(row[1]) for row in rows_under("plants these twelve obstacles")}
    assert rows == {name: [obstacle.reason.value] for name, obstacle in OBSTACLES.items()}


def test_tables_of_hugging_face_models_are_what_was_measured() -> None:
    page, measured = ROOT / "docs/huggingface.md", committed("huggingface")
    models = measured["explain"]
    rules = sorted(models["gpt-oss-120b"]["sites"])
    assert_fusions_are_listed(
        page,
        ["model", "layers", "norms", "all-reduces", *(f"`{rule}`" for rule in rules), "s", "CPU s", "MiB"],
        [
            [f"`{name}`", row["layers"], sum(row["norms"].values()), row["all_reduces"],
             *(row["sites"][rule] for rule in rules), row["s"], row["cpu_s"], row["peak_mib"]]
            for name, row in models.items()
        ],
    )  # fmt: skip
    documented = [[names(row[0])[0], *row[1:]] for row in rows_under("## What compiling costs", page)]
    assert documented == [
        [kind, str(row["plain_cpu_s"]["median"]), *compile_costs(row["planned"]), *compile_costs(row["fused"])]
        for kind, row in measured["compile"].items()
    ]
    added = [row[policy]["added_share"] for row in measured["compile"].values() for policy in ("planned", "fused")]
    assert f"At most {100 * max(share['q3'] for share in added):.1f} % is added" in page.read_text(encoding="utf-8")


def assert_fusions_are_listed(page: Path, columns: list[str], rows: list[list[object]]) -> None:
    """A page's table of what each rule finds in models."""
    assert f"| {' | '.join(columns)} |" in page.read_text(encoding="utf-8").splitlines()
    assert rows_under("## What there is to fuse", page) == [[str(cell) for cell in row] for row in rows]


def test_hugging_face_models_are_measured_within_their_limits() -> None:
    """A minute and 4 GiB for a command, and a twentieth of a compilation."""
    measured = committed("huggingface")
    for name, row in measured["explain"].items():
        assert row["cpu_s"] < 60, name
        assert row["peak_mib"] < 4 * 1024, name
        assert row["graph_breaks"] == 0, name
    for kind, row in measured["compile"].items():
        assert max(row[policy]["added_share"]["q3"] for policy in ("planned", "fused")) < 0.05, kind


def test_the_table_of_models_under_vllm_is_what_was_measured() -> None:
    models = committed("vllm_sites")["models"]
    rules = sorted(models["llama TP=1"]["sites"])
    assert_fusions_are_listed(
        ROOT / "docs/vllm.md",
        ["model", "norms", "all-reduces", *(f"`{rule}`" for rule in rules)],
        [
            [f"`{name}`", *(sum(count for op, count in row["recognised"].items() if what in op)
                            for what in ("norm", "all_reduce")), *(row["sites"][rule] for rule in rules)]
            for name, row in models.items()
        ],
    )  # fmt: skip


def compile_costs(row: dict[str, Any]) -> list[str]:
    ratio = row["cpu_ratio"]
    return [f"{100 * row['added_share']['median']:.1f} %", f"{ratio['median']} ({ratio['q1']} to {ratio['q3']})"]


def test_fields_of_json_are_all_told() -> None:
    arguments = ["explain", "gpt-oss-120b-tiny", "--tp", "2", "--layers", "2", "--range", "1:64", "--json"]
    data: dict[str, Any] = json.loads(CliRunner().invoke(app, [*arguments, "--forbid", "act_quant"]).stdout)
    documented = [name for row in rows_under("versioned by `schema`") for name in names(row[0])]
    assert documented == [*data]
    documented = [name for row in rows_under("A row of `policies`") for name in names(row[0])]
    assert set(documented) - {"force"} == {name for policy in data["policies"] for name in policy}


@pytest.mark.parametrize("package", [fuseplan, fuseplan.record, fuseplan.errors])
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: fuseplan\.(?:record\.)?(\w+)$", pages, re.MULTILINE))
    assert ".. automodule:: fuseplan.errors\n   :members:" in pages
    named = getattr(package, "__all__", [name for name in vars(fuseplan.errors) if name.endswith("Error")])
    assert set(named) - documented <= {name for name in vars(fuseplan.errors) if name.endswith("Error")}


# Pictures.


def referenced() -> dict[str, str]:
    """The page of each picture that pages show."""
    return {
        name: page.relative_to(ROOT).as_posix()
        for page in PAGES
        for name in re.findall(r"\((?:\.\./|docs/)?pictures/([\w.-]+)\)", page.read_text(encoding="utf-8"))
    }


def test_every_picture_is_shown_and_can_be_made_again() -> None:
    assert {path.name for path in PICTURES.iterdir()} == {*TERMINALS, *CHARTS, *SCREENSHOTS} == {*referenced()}


@pytest.mark.parametrize("name", [*TERMINALS, *SCREENSHOTS])
def test_a_picture_stands_by_the_command_it_is_made_of(name: str) -> None:
    picture = TERMINALS.get(name) or SCREENSHOTS[name]
    (made,) = commands_of(picture.command)
    page = ROOT / referenced()[name]
    scripts = [block.body for block in blocks_of(page) if block.language == "sh"]
    assert made in [command for script in scripts for command in commands_of(script)]


@pytest.mark.skipif(not PRINTS_THE_SAME, reason="prints otherwise")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in FULL_SIZE_TERMINALS)) for name in TERMINALS]
)
def test_a_terminal_shows_what_is_printed_today(name: str) -> None:
    content = (PICTURES / name).read_text(encoding="utf-8")
    drawn = [html.unescape(re.sub(r"<[^>]+>", "", text)) for text in re.findall(r"<text .*</text>", content)]
    printed = ["".join(segment.text for segment in line) for line in lines_of(TERMINALS[name])]
    assert words("\n".join(drawn)).endswith(words("\n".join(printed)))
    assert re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)", content) is None
