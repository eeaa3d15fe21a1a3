#!/usr/bin/env bash
# torch 2.13.0: with torch._inductor.config.freezing, Inductor folds a norm's constants into the convolution before
# it, into the first axis of its weight. In a transposed convolution that axis counts inputs. A ConvTranspose2d of as
# many inputs as outputs with a BatchNorm2d behind it, as in decoders of images, scales its inputs instead of its
# outputs: all numbers are wrong, silently. With other numbers of channels nothing is folded, and convolutions are
# right.
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
from torch import nn

torch.manual_seed(0)
x = torch.randn(1, 8, 6, 6)
for layer in (nn.ConvTranspose2d(8, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(8, 8, 3)):
    norm = nn.BatchNorm2d(layer.out_channels)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    model = nn.Sequential(layer, norm).eval().requires_grad_(False)
    for freezing in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
            right = torch.allclose(torch.compile(model)(x), model(x), atol=1e-4)
        kind = f"{type(layer).__name__}({layer.in_channels}, {layer.out_channels})"
        print(f"{kind} and BatchNorm2d, freezing={freezing}: right: {right}")
PYTHON
cat > expected <<'TEXT'
ConvTranspose2d(8, 8) and BatchNorm2d, freezing=False: right: True
ConvTranspose2d(8, 8) and BatchNorm2d, freezing=True: right: False
ConvTranspose2d(8, 4) and BatchNorm2d, freezing=False: right: True
ConvTranspose2d(8, 4) and BatchNorm2d, freezing=True: right: True
Conv2d(8, 8) and BatchNorm2d, freezing=False: right: True
Conv2d(8, 8) and BatchNorm2d, freezing=True: right: True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
