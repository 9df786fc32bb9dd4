"""What can go wrong, and the exit code that says so.

::

    FastDFKDError            1   failed at run time
    ├── UsageError           2   the command line, a recipe or a config does not make sense
    ├── UnavailableError     3   a model, a data set or the Hub cannot be had
    └── ThresholdError       4   a stated threshold (--min-top1) was missed

A run that Ctrl-C or SIGTERM stopped exits with 130 or 143, after cleaning up.

Every one of them carries a message of one line that says what is wrong and what to do. Anything else that is
raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastDFKDError(Exception):
    """Root of all errors a user can cause or meet."""

    exit_code = 1


class UsageError(FastDFKDError):
    """The request itself cannot be carried out as written."""

    exit_code = 2


class UnavailableError(FastDFKDError):
    """A model, a data set or the Hub is not there, not readable or not what it was said to be."""

    exit_code = 3


class ThresholdError(FastDFKDError):
    """A measured figure stayed below what was asked for."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean a, b?"`` for the known words nearest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)
    return f" Did you mean {', '.join(close)}?" if close else ""


#: How torch's allocator on the CPU says it, in a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left."""
    # torch's own error by its name: torch may not have been imported, and must not be for this.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )


__all__ = [
    "FastDFKDError",
    "ThresholdError",
    "UnavailableError",
    "UsageError",
    "did_you_mean",
    "is_out_of_memory",
]
