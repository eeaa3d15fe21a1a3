"""Where output goes, and that what users name, quote and print arrives as it is."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fuseplan import cli
from fuseplan.explanation.capture import STAGES

FACTORIES = """
import torch

class Prints(torch.nn.Module):
    def forward(self, x):
        y = x.sin()
        print("from the model")
        return y.cos()

class Odd(torch.nn.Module):
    def forward(self, x):
        y = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
        return torch.nn.functional.pad(y * 2, (0, 8))  # größe → klein

def odd(tp): return Odd(), (torch.randn(4, 8),)
def prints(tp):
    print("from the factory")
    return Prints(), (torch.randn(4, 8),)
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, [*arguments])


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "printing_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    for name in ("x[/b]/config.json", ":smile:/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{")
        result = run("explain", name)
        assert result.exit_code == 2
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert f"building {name}" in result.stderr


def test_progress_shows_each_stage_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("explain", "gpt-oss-120b-tiny", "--layers", "1", "--device", "h200", "--range", "4")
    assert run(*arguments).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", run(*arguments).stderr)
    stages = [f"{stage} 1 layer of gpt-oss-120b-tiny" for stage in (*STAGES, "planning")]
    for stage in ("importing torch", "building gpt-oss-120b-tiny", *stages):
        assert re.search(rf"{re.escape(stage)} 0:00:\d\d", shown), stage


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(encoding: str, factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(*arguments: str) -> tuple[object, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "argv", ["fuseplan", *arguments])
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        return caught.value.code, out, err

    code, out, _ = main("explain", "printing_factories:odd", "--policy", "planned", "--range", "1:8")
    assert code == 0
    assert "(0, 8)) # größe → klein".encode(encoding, "backslashreplace").decode(encoding) in " ".join(out.split())
    code, _, err = main("explain", "wörk→load")
    assert code == 2
    assert "wörk→load".encode(encoding, "backslashreplace").decode(encoding) in err


@pytest.mark.parametrize("command", [["explain"], ["check", "--update", "--lock"]])
def test_what_the_users_code_prints_goes_beside_the_json(command: list[str], factories: Path) -> None:
    lock = [str(factories / "fusions.lock")] if "--lock" in command else []
    result = run(*command, *lock, "printing_factories:prints", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == 1
    assert result.stderr.splitlines() == ["from the factory", "from the model"]
