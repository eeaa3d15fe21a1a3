"""Running other people's code with a deadline."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from fuseplan.record.text import one_line

T = TypeVar("T")


class AttemptError(Exception):
    """The attempt failed; the text says why, with a kernel as subject."""


class DeadlineError(AttemptError):
    """The attempt took too long."""


def attempt(seconds: float, function: Callable[[], T], device: torch.device) -> T:
    """`within`, with errors as one clause.

    Raises:
        AttemptError: `function` failed.
    """
    try:
        return within(seconds, function, device)
    except DeadlineError:
        raise
    except Exception as error:
        raise AttemptError(_clause(error)) from error
    except SystemExit as error:
        raise AttemptError(f"the kernel calls sys.exit({error.code!r})") from error


def _clause(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return f"the kernel needs more memory than there is: {text}"
    return f"the kernel raises {type(error).__name__}: {text}"


def within(seconds: float, function: Callable[[], T], device: torch.device) -> T:
    """`function()`, in a separate thread, which has none of the modes and contexts of a compilation, and in which the
    device of its tensors is current.

    A thread can't be stopped: a late one is left running, and ends with the process. One that never releases the
    interpreter's lock blocks everything.

    Raises:
        DeadlineError: it took longer than `seconds`.
        Exception: any error of `function`, even if it isn't an `Exception`, such as SystemExit.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if device.type != "cuda":
                results.append(function())
            else:
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                    results.append(function())
                    torch.cuda.current_stream().synchronize()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            failures.append(error)

    thread = threading.Thread(target=run, name="fuseplan-verification", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadlineError(f"the kernel did not end within {seconds:g} s")
    if failures:
        raise failures.pop()
    return results.pop()
