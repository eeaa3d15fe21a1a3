"""What another process finds, with other addresses, and other hashes of texts: started once for all tests."""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
from tests.caching.test_keys import *
print(key(rules=[own(), *BUILT_IN_RULES[::-1]], providers=[provider(), *BUILT_IN_PROVIDERS[::-1]],
    passes=[external(uuid='1'), pass_that_adds(1, uuid='1')], device=device_profile('h200')))
from tests.caching.test_content import *
for left, right in (*DIFFERENT.values(), *((one(), other()) for one, other in WITH.values())):
    print(content_of(left).key, content_of(right).key)
"""


@functools.cache
def elsewhere() -> list[str]:
    """The key of a manager, then keys of pairs of values, a line each."""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
