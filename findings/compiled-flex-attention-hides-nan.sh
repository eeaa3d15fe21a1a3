#!/usr/bin/env bash
# torch 2.13.0, CPU: with a NaN in one key, flex_attention is NaN for every query in eager mode, and so is
# scaled_dot_product_attention. Compiled, it is 0 for every query, also from the other keys, and with a NaN in one
# query 0 for that query, as if everything was masked. A NaN in a value is kept. So a model that overflowed goes on
# with zeros, and no check for NaN notices.
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
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

runs = {"sdpa": scaled_dot_product_attention, "eager": flex_attention, "compiled": torch.compile(flex_attention)}
for place, name in enumerate(("query", "key", "value")):
    torch.manual_seed(0)
    given = [torch.randn(1, 1, 64, 32) for _ in range(3)]
    given[place][0, 0, 5, 0] = torch.nan
    for run, attend in runs.items():
        with torch.no_grad():
            found = attend(*given)[0, 0]
        nan, zeros = int(found.isnan().any(-1).sum()), int((found == 0).all(-1).sum())
        print(f"NaN in one {name}, {run}: of 64 rows {nan} have NaN, {zeros} are 0")
PYTHON
cat > expected <<'TEXT'
NaN in one query, sdpa: of 64 rows 1 have NaN, 0 are 0
NaN in one query, eager: of 64 rows 1 have NaN, 0 are 0
NaN in one query, compiled: of 64 rows 0 have NaN, 1 are 0
NaN in one key, sdpa: of 64 rows 64 have NaN, 0 are 0
NaN in one key, eager: of 64 rows 64 have NaN, 0 are 0
NaN in one key, compiled: of 64 rows 0 have NaN, 64 are 0
NaN in one value, sdpa: of 64 rows 64 have NaN, 0 are 0
NaN in one value, eager: of 64 rows 64 have NaN, 0 are 0
NaN in one value, compiled: of 64 rows 64 have NaN, 0 are 0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
