"""Misspelled names are reported at once, and help shows no types of typer's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fuseplan.cli import app, spelling
from fuseplan.devices import PROFILES
from fuseplan.errors import WorkloadError
from fuseplan.providers import BUILT_IN_PROVIDERS
from fuseplan.rules import by_name
from fuseplan.rules.families import BUILT_IN_RULES
from fuseplan.workloads import catalog

COMMANDS = ("explain", "try", "tune", "bench", "check", "rules", "providers", "devices", "diff")
TYPOS = (
    ("explian",),
    ("explain", "gpt-oss-120bb"),
    ("explain", "gpt-oss-120b", "--devise", "h200"),
    ("explain", "gpt-oss-120b", "--policy", "ordered(act_paddin)"),
    ("explain", "gpt-oss-120b", "--provider", "tritn"),
    ("tune", "gpt-oss-120bb"),
    ("bench", "gpt-oss-120b", "--policy", "planed"),
    ("check", "gpt-oss-120b", "--lock", "none.lock", "--device", "h20"),
    ("explain", "gpt-oss-120b", "--force", "act_paddin@layers.1.*"),
    ("check", "gpt-oss-120b", "--lock", "none.lock", "--forbid", "act_paddin#1"),
)
MISSING = (
    (("explain", "nowhere/config.json"), "'nowhere/config.json' can't be read: No such file or directory"),
    (("try", "no_such_package.module:factory"), "no module named 'no_such_package' here"),
    (("bench", "gpt-oss-120b", "--costs", "none.json"), "cost table 'none.json' can't be read: No such file"),
    (("explain", "gpt-oss-120b", "--plan", "none.json"), "plan file 'none.json' can't be read: No such file"),
    (("explain", "gpt-oss-120b", "--range", "9:1"), "compile range 9:1 is empty"),
    (("tune", "gpt-oss-120b", "--range", "1:9", "--range", "4:20"), "overlap"),
)


def test_names_are_those_that_there_are() -> None:
    assert list(spelling.WORKLOADS) == catalog.names()
    assert list(spelling.DEVICES) == sorted(PROFILES)
    assert list(spelling.RULES) == sorted(by_name(BUILT_IN_RULES))
    assert list(spelling.PROVIDERS) == sorted(each.name for each in BUILT_IN_PROVIDERS)


def without_torch(*arguments: str) -> str:
    """What a command that is wrong says on a machine that has no torch to import."""
    code = "import sys; sys.modules['torch'] = None; from fuseplan.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("arguments", TYPOS, ids=" ".join)
def test_a_typo_is_answered_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    assert re.search(r"(?i)did you mean|possible options: |allowed: ", without_torch(*arguments))


@pytest.mark.parametrize(("arguments", "expected"), MISSING, ids=lambda each: " ".join(each[:4]))
def test_what_is_missing_is_said_before_torch_is_imported(arguments: tuple[str, ...], expected: str) -> None:
    (line,) = without_torch(*arguments).splitlines()
    assert line.startswith("fuseplan: ")
    assert expected in line


def test_a_module_in_the_current_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkloadError, match="no module named 'only_here'"):
        spelling.check_spelling("only_here:factory")
    (tmp_path / "only_here.py").write_text("")
    spelling.check_spelling("only_here:factory")
    spelling.check_spelling("fuseplan.workloads:factory")


def test_the_list_of_commands_has_whole_sentences() -> None:
    shown = CliRunner().invoke(app, ["-h"]).stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in shown] == [*COMMANDS]
    assert all(line.endswith(".") and not line.endswith("...") for line in shown)


def test_help_and_typos_take_less_than_half_a_second_of_processor_time() -> None:
    for arguments in ((), ("--help",), ("explain", "-h"), *TYPOS[:2]):
        code = "import time; from fuseplan.cli import app; import sys\n"
        code += "try: app()\nfinally: print(f'{time.process_time():.3f}', file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert float(done.stderr.split()[-1]) < 0.5, arguments


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_arguments_as_its_texts_do(command: str, flag: str) -> None:
    result = CliRunner().invoke(app, [command, flag])
    assert result.exit_code == 0
    assert not re.search(r"[{}]|<\w|list\[", result.stdout), result.stdout


def test_versions() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"fuseplan \S+, torch \S+\n", result.stdout)
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


def test_own_modules_bring_names_of_their_own() -> None:
    spelling.check_spelling("fuseplan.workloads:factory", policies=["ordered(mine)"], providers=["mine"], own=True)
