"""Measuring alternatives in context on a device, alone or in lock step."""

from fuseplan.tuning.clock import LEAST_REPEATS, Subject, Times, busy, interleaved, subject_of
from fuseplan.tuning.device import measure_device
from fuseplan.tuning.lock_step import LockStep, Ranks
from fuseplan.tuning.merge import merge_into, table_in
from fuseplan.tuning.tuner import Origin, Step, Tuner, Unclear
from fuseplan.tuning.work import Skipped, Work, work_of

__all__ = [
    "LEAST_REPEATS",
    "LockStep",
    "Origin",
    "Ranks",
    "Skipped",
    "Step",
    "Subject",
    "Times",
    "Tuner",
    "Unclear",
    "Work",
    "busy",
    "interleaved",
    "measure_device",
    "merge_into",
    "subject_of",
    "table_in",
    "work_of",
]
