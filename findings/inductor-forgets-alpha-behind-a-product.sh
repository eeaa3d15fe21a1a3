#!/usr/bin/env bash
# torch 2.13.0 (2.11.0 and 2.12.0 likewise): Inductor makes one addmm of a matrix product and what is added to it, also
# where torch.add has an alpha, which it forgets. x @ weight + 0.5 * other, written as torch.add(x @ weight, other,
# alpha=0.5), compiles to x @ weight + other: off by 2 in float32, without a word. A subtraction is right.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch

torch.manual_seed(0)
x, weight, other = torch.randn(3, 256), torch.randn(256, 128) / 16, torch.randn(3, 128)


def scaled(x, weight, other):
    return torch.add(x @ weight, other, alpha=0.5)


def subtracted(x, weight, other):
    return x @ weight - other


compiled = [torch.compile(each, fullgraph=True)(x, weight, other) for each in (scaled, subtracted)]
eager = [each(x, weight, other) for each in (scaled, subtracted)]
print(f"x @ weight + 0.5 * other: off by {(compiled[0] - eager[0]).abs().max():.2f}")
print(f"and from x @ weight + other by {(compiled[0] - (x @ weight + other)).abs().max():.1g}")
print(f"x @ weight - other: off by {(compiled[1] - eager[1]).abs().max():.1g}")
assert torch.allclose(compiled[0], x @ weight + other, atol=1e-4), "changed: it isn't the sum without alpha"
assert not torch.allclose(compiled[0], eager[0], atol=0.1), "changed: the compiled sum is right"
assert torch.allclose(compiled[1], eager[1], atol=1e-4)
PYTHON
"$folder/venv/bin/python" finding.py
