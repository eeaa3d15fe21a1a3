#!/usr/bin/env bash
# flash-linear-attention (fla-core) 0.6.0: fused_recurrent_comba takes q, k, p, v, and chunk_comba takes q, k, v, p. The
# example in the documentation of fused_recurrent_comba passes q, k, v, p. All are tensors of one shape where keys and
# values have the same size, so that values and keys are swapped without a word: decoding that way, after chunk_comba
# for the prompt, gives other numbers. The references of the rule, naive_recurrent_comba and naive_chunk_comba, don't
# agree either: the first takes beta before g, and decays the state before p reads it, the second after. The kernel
# does as the second. Seen on a CPU, kernels by TRITON_INTERPRET=1.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install triton==3.7.1 fla-core==0.6.0 packaging==26.0
cd "$folder"
cat > finding.py <<'PYTHON'
import inspect

import torch
from fla.ops.comba import chunk_comba, fused_recurrent_comba
from fla.ops.comba.naive import naive_chunk_comba, naive_recurrent_comba

for function in (chunk_comba, fused_recurrent_comba, naive_chunk_comba, naive_recurrent_comba):
    print(function.__name__, list(inspect.signature(function).parameters)[:6])
documentation = " ".join(fused_recurrent_comba.__doc__.split())
print("the example passes q, k, v, p:", "fused_recurrent_comba( q, k, v, p, g, beta," in documentation)


def numbers(result):
    return [round(number, 3) for number in result[0].flatten().tolist()]


def vector(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


q, k, v, p = vector(1.0, 1.0), vector(1.0, 0.0), vector(1.0, 2.0), vector(0.5, 0.0)
g, beta = torch.full((1, 1, 1), 0.5).log(), torch.full((1, 1, 1), 0.25)
state = torch.full((1, 1, 2, 2), 4.0)
names = {"q": q, "k": k, "v": v, "p": p, "g": g, "beta": beta, "scale": 1.0, "initial_state": state}
# By hand: 4 is read by p as 0.5 * 4 = 2, decayed to 2, and 0.25 * (v - 2) is added to the first row; q adds two rows.
print("by hand", [2 + 0.25 * (number - 2) + 2 for number in (1.0, 2.0)])
print("fused_recurrent_comba by names", numbers(fused_recurrent_comba(**names)))
print("fused_recurrent_comba(q, k, v, p, ...)", numbers(fused_recurrent_comba(q, k, v, p, g, beta, 1.0, state)))
print("naive_chunk_comba by names", numbers(naive_chunk_comba(**names)))
print("naive_recurrent_comba by names", numbers(naive_recurrent_comba(**names)))
PYTHON
cat > expected <<'TEXT'
chunk_comba ['q', 'k', 'v', 'p', 'g', 'beta']
fused_recurrent_comba ['q', 'k', 'p', 'v', 'g', 'beta']
naive_chunk_comba ['q', 'k', 'v', 'p', 'g', 'beta']
naive_recurrent_comba ['q', 'k', 'v', 'p', 'beta', 'g']
the example passes q, k, v, p: True
by hand [3.75, 4.0]
fused_recurrent_comba by names [3.75, 4.0]
fused_recurrent_comba(q, k, v, p, ...) [1.125, 1.0]
naive_chunk_comba by names [3.75, 4.0]
naive_recurrent_comba by names [4.0, 4.25]
TEXT
seen=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
