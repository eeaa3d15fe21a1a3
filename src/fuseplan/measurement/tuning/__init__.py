"""Measuring alternatives in context on a device, alone or in lock step."""

from fuseplan.measurement.tuning.clock import LEAST_REPEATS, Subject, Times, busy, interleaved, subject_of
from fuseplan.measurement.tuning.device import measure_device
from fuseplan.measurement.tuning.lock_step import LockStep, Ranks
from fuseplan.measurement.tuning.merge import merge_into, table_in
from fuseplan.measurement.tuning.tuner import Origin, Step, Tuner, Unclear
from fuseplan.measurement.tuning.work import Skipped, Work, work_of
