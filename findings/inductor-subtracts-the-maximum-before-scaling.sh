#!/usr/bin/env bash
# torch 2.13.0: Inductor replaces scaled - scaled.amax(dims, keepdim=True), scaled = x * weight, by (x - x.amax(...))
# * weight, where the weight doesn't vary along dims. With dims=(), which means all dimensions, the check finds
# nothing that varies: a weight for each element is taken for one number, and the result is off by more than 1.
# dims=(0, 1), the same written out, is right.
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
x, weight = torch.randn(4, 8), torch.randn(4, 8)
for dims in ((0, 1), (), (-1,)):

    def below_largest(x, weight, dims=dims):
        scaled = x * weight
        return scaled - scaled.amax(dim=dims, keepdim=True)

    torch._dynamo.reset()
    error = (torch.compile(below_largest)(x, weight) - below_largest(x, weight)).abs().max()
    print(f"dim={dims}: right: {bool(error < 1e-5)}, off by more than 1: {bool(error > 1)}")
same = torch.equal(x.amax(dim=(), keepdim=True), x.amax(dim=(0, 1), keepdim=True))
print("eager: dim=() is all dimensions:", same)
PYTHON
cat > expected <<'TEXT'
dim=(0, 1): right: True, off by more than 1: False
dim=(): right: False, off by more than 1: True
dim=(-1,): right: True, off by more than 1: False
eager: dim=() is all dimensions: True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
