"""What can go wrong, and the exit code that says so.

::

    FastDFKDError            1   failed at run time
    ├── UsageError           2   the command line, a recipe or a config does not make sense
    ├── UnavailableError     3   a model, a data set or the Hub cannot be had
    └── ThresholdError       4   a stated threshold (--min-top1) was missed

A run that Ctrl-C or SIGTERM stopped exits with 130 or 143, after cleaning up.

Every one of them carries a message of one line that says what is wrong and what to do. Anything else that is
raised is a bug and keeps its traceback. Messages quote names from files and from the Hub: none of them can act on the
terminal that shows it (:func:`printable`).
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

#: What a terminal acts on instead of showing it: control characters, ends of lines, changes of direction. And halves
#: of characters, which stand for the bytes of a file name that is not UTF-8, and which no stream can write.
_ACTIVE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def printable(text: object) -> str:
    r"""Return ``text`` with everything that a terminal would act on written as an escape (``\x1b``)."""
    return _ACTIVE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def brief(value: object) -> str:
    """Return ``repr(value)``, cut short: a value from a file may be a billion values when it is written out."""
    return _BRIEF.repr(value)


class FastDFKDError(Exception):
    """Root of all errors a user can cause or meet."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        line = printable(" ".join(str(message).split()))
        # What is quoted from a file may be of any length; what to do about it stands at the end.
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}")


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
    "brief",
    "did_you_mean",
    "is_out_of_memory",
    "printable",
]
