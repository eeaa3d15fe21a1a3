#!/usr/bin/env bash
# torch 2.13.0: attention written out, with a bias of one number a key, (q @ k.mT / 4 + bias).softmax(-1) @ v with a
# bias of shape [keys], broadcasts in eager mode. Compiled it ends in an IndexError: Inductor makes
# scaled_dot_product_attention of it, and hands on the bias as a mask that must have two dimensions. With a bias of [1,
# keys] it compiles. One of -inf everywhere gives NaN in eager mode and zeros compiled.
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


def attend(q, k, v, bias):
    return ((q @ k.mT).div(4.0) + bias).softmax(-1) @ v


torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 8, 16) for _ in range(3))
bias = torch.randn(8)
for given in (bias, bias[None], torch.full((1, 8), -torch.inf)):
    torch._dynamo.reset()
    eager = attend(q, k, v, given)
    try:
        with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
            compiled = torch.compile(attend)(q, k, v, given)
        same = torch.allclose(compiled, eager, atol=1e-4)
        print(list(given.shape), "same:", same, "eager:", eager.isnan().sum().item(), end=" ")
        print("compiled:", compiled.isnan().sum().item(), "numbers are NaN")
    except IndexError as error:
        print(list(given.shape), "IndexError:", str(error).splitlines()[0])
PYTHON
cat > expected <<'TEXT'
[8] IndexError: Dimension out of range (expected to be in range of [-1, 0], but got -2)
[1, 8] same: True eager: 0 compiled: 0 numbers are NaN
[1, 8] same: False eager: 1024 compiled: 0 numbers are NaN
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
