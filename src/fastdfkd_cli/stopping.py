"""A signal that asks a run to stop: at once, or where what it has can be kept.

Most of a command can be left at any point. A loop that can save itself says so for as long as it lasts
(:func:`patiently`): the first Ctrl-C or SIGTERM then waits until it asks (:func:`raise_if_asked`), the second does not.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(KeyboardInterrupt):
    """A signal asked for an end; its notes say what is kept. No ``except Exception`` on the way out holds it up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass
class _Request:
    #: Loops that will ask.
    patient: int = 0
    signum: int | None = None


_REQUEST = _Request()


@contextmanager
def patiently() -> Iterator[None]:
    """Have the first signal wait for :func:`raise_if_asked` while this lasts, and no longer than that."""
    _REQUEST.patient += 1
    try:
        yield
        if _REQUEST.patient == 1:
            raise_if_asked()
    finally:
        _REQUEST.patient -= 1
        if not _REQUEST.patient:
            _REQUEST.signum = None


@contextmanager
def held() -> Iterator[None]:
    """Have the first signal do nothing while this lasts: the program is ending, and about to say why."""
    _REQUEST.patient += 1
    try:
        yield
    finally:
        _REQUEST.patient -= 1
        if not _REQUEST.patient:
            _REQUEST.signum = None


def ask(signum: int) -> bool:
    """A signal's handler asks for an end. Whether somebody will see to it; otherwise the handler has to."""
    if not _REQUEST.patient or _REQUEST.signum is not None:
        return False
    _REQUEST.signum = signum
    return True


def asked() -> bool:
    """Whether a signal waits."""
    return _REQUEST.signum is not None


def request() -> int:
    """The signal that waits; 0: none."""
    return _REQUEST.signum or 0


def raise_if_asked(*notes: str) -> None:
    """Raise :class:`Stopped` with ``notes`` if a signal waits."""
    if _REQUEST.signum is None:
        return
    stopped = Stopped(_REQUEST.signum)
    for note in notes:
        stopped.add_note(note)
    raise stopped


def name_of(signum: int) -> str:
    """What a user calls a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


__all__ = ["Stopped", "ask", "asked", "held", "name_of", "patiently", "raise_if_asked", "request"]
