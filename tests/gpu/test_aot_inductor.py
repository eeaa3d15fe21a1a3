"""Packages of AOTInductor with attention by torch's kernels. Skipped without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fuseplan
from tests.integrations.test_aot_inductor import Attending

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_package_computes_what_the_model_does(tmp_path: Path) -> None:
    """In a process of its own, which the package may end."""
    if (plain := run(tmp_path, "plain")).returncode < 0:
        pytest.skip(f"torch's own packages can't be loaded here: signal {-plain.returncode}")
    assert plain.returncode == 0, plain.stderr.decode()
    done = run(tmp_path, "fuseplan")
    assert done.returncode == 0, done.stderr.decode()


def run(folder: Path, how: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tests.gpu.test_aot_inductor", str(folder / how), how]
    return subprocess.run(command, check=False, capture_output=True, timeout=300, cwd=ROOT)


def main(folder: str, how: str) -> None:
    """Compares a package's results with the model's."""
    heads = [(3, 8, 5, 16), (3, 2, 32, 16), (3, 2, 32, 16)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in heads]
    reports: list[fuseplan.Report] = []
    with torch.no_grad():
        program = torch.export.export(Attending(), tuple(inputs))
        options = fuseplan.inductor_options(on_report=reports.append) if how == "fuseplan" else {}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs=options
        )
        assert [report.fused["grouped_attention"] for report in reports[-1:]] == [1] * (how == "fuseplan")
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(*inputs), Attending()(*inputs), rtol=0.02, atol=0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
