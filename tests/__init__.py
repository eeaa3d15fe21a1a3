"""Tests, and what the processes that they start run."""

import gc

# Compiling makes many objects that live long. Looking for garbage as often as Python does by itself takes a fifth of
# the time, here and in the processes that tests start.
gc.set_threshold(100_000, 20, 20)
