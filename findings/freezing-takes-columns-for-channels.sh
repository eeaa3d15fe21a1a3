#!/usr/bin/env bash
# torch 2.13.0: with torch._inductor.config.freezing, a parameter of shape [1, columns] that multiplies the result of
# a 2-D convolution, or is added to it, is folded into the convolution where there are as many columns as channels. It
# is taken for one number a channel, and should be one a column: [1, 16] aligns with the last two of [1, 16, 5, 16],
# in eager mode and with other widths.
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


class Weighted(nn.Module):
    """A convolution whose columns are weighted."""

    def __init__(self, columns):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.weights = nn.Parameter(torch.randn(1, columns))

    def forward(self, x):
        return self.conv(x) * self.weights


torch.manual_seed(0)
for columns in (12, 16):
    model, x = Weighted(columns).eval(), torch.randn(1, 3, 5, columns)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model)(x)
        print(f"16 channels, {columns} columns: right: {torch.allclose(compiled, model(x), atol=1e-4)}")
by_channels = model.conv(x) * model.weights.view(16, 1, 1)
print(f"a number a channel: {torch.allclose(compiled, by_channels, atol=1e-4)}")
PYTHON
cat > expected <<'TEXT'
16 channels, 12 columns: right: True
16 channels, 16 columns: right: False
a number a channel: True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
