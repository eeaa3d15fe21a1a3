#!/usr/bin/env bash
# torch 2.13.0: of a dynamic size, Python's arithmetic becomes an expression of sympy, which multiplies the constants
# first: size * 0.29 * 100 is size * (0.29 * 100). Rounded the other way, a new size is another one: of 5 rows, int(5
# * 0.29 * 100) are 145 in Python and with static sizes, and compiled for dynamic ones the result has 144. The backend
# "eager" is right, Inductor isn't; nothing is warned, and a consumer that knows the size in Python fails.
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


def by_percent(x):
    return x.new_ones(int(x.shape[0] * 0.29 * 100))


def by_tenths(x):
    return x.new_ones(int(x.shape[0] * 0.7 * 10))


for function, rows in ((by_percent, 5), (by_tenths, 23), (by_tenths, 100)):
    x, found = torch.empty(rows), {}
    for name, options in (
        ("static", {"dynamic": False}),
        ("dynamic, backend eager", {"dynamic": True, "backend": "eager"}),
        ("dynamic", {"dynamic": True}),
    ):
        torch._dynamo.reset()
        found[name] = len(torch.compile(function, fullgraph=True, **options)(x))
    print(f"{function.__name__} of {rows} rows: Python {len(function(x))}, compiled {found}")
PYTHON
cat > expected <<'TEXT'
by_percent of 5 rows: Python 145, compiled {'static': 145, 'dynamic, backend eager': 145, 'dynamic': 144}
by_tenths of 23 rows: Python 160, compiled {'static': 160, 'dynamic, backend eager': 160, 'dynamic': 161}
by_tenths of 100 rows: Python 700, compiled {'static': 700, 'dynamic, backend eager': 700, 'dynamic': 700}
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
