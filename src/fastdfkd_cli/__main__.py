"""``python -m fastdfkd_cli``, the ``fastdfkd`` command, and where errors and signals become one line and an exit code.

Exit codes: 0 done; those of :mod:`fastdfkd_cli.errors`; 1 also for a full disk, a refused file and a closed pipe.
Whatever else is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from fastdfkd_cli import stopping
from fastdfkd_cli.cli import app
from fastdfkd_cli.console import print_error
from fastdfkd_cli.errors import FastDFKDError, is_out_of_memory
from fastdfkd_cli.processes import leads, speaks_first
from fastdfkd_cli.stopping import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What the system refused, and what to do about it.
_DISK_ERRORS = {
    errno.ENOSPC: ("No space is left", "make room or choose another folder"),
    errno.EDQUOT: ("The disk quota is used up", "make room or choose another folder"),
    errno.EROFS: ("The file system is read-only", "choose another folder"),
    errno.EACCES: ("Permission was refused", "choose what you may read and write, or change its permissions"),
    errno.ENAMETOOLONG: ("The name is too long", "choose a shorter one"),
    errno.EIO: ("Reading or writing failed", "check the disk or choose another folder"),
}
# Typer brings its own copy of Click in newer versions and imports Click in older ones; either way its errors share
# the base class under this name, which Typer itself does not export.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


#: Seconds that the other processes of a run leave to rank 0 to say what they most likely all have to say.
_DEFERENCE = 5.0


def _print_error(text: str, *, kind: str = "error") -> None:
    """Print the line that ends this process; where it is one of several that end alike, rank 0 does so.

    torchrun ends the others as soon as one has failed. Whoever is still there after some seconds is alone with it.
    """
    if not speaks_first():
        if kind == "interrupted":
            return
        time.sleep(_DEFERENCE)
    print_error(text, kind=kind)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let Ctrl-C or SIGTERM unwind the run, so that it cleans up; one more ends it at once.

    A loop that can save itself finishes its step first, unless it is asked a second time. Left alone, SIGTERM would
    kill the process with its staged output half-written.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopping.ask(signum):
            if leads():  # not each of several processes
                # Not print: the handler may have interrupted one.
                os.write(2, b"fastdfkd: finishing the step and saving; once more to stop at once\n")
            return
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(signum)

    # A signal that the parent told us to ignore (nohup, a job in the background) stays ignored.
    previous = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN}
    for each in previous:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _run(arguments: Sequence[str]) -> int:
    # Not app(): Typer's own boundary prints boxes of several lines, and turns SIGTERM's exception into code 130.
    command = typer.main.get_command(app)
    try:
        with command.make_context("fastdfkd", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _ClickException as error:
        context_of_error = getattr(error, "ctx", None)
        where = "fastdfkd" if context_of_error is None else context_of_error.command_path
        message = error.format_message()  # type: ignore[attr-defined]
        end = "" if message.endswith((".", "?")) else "."
        _print_error(f"{message}{end} `{where} --help` lists the options.")
        return 2
    sys.stdout.flush()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after the command's name; default: ``sys.argv[1:]``.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        # gloo remarks on each connection that ends; read when torch is loaded.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _signals_raise():
            return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        left = " ".join(getattr(error, "__notes__", ())) or "nothing unfinished was kept"
        _print_error(f"stopped by {stopping.name_of(signum)}; {left}.", kind="interrupted")
        return 128 + signum
    except FastDFKDError as error:
        _print_error(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python flushes stdout once more at exit: give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" for {error.filename}" if error.filename else ""
        what, hint = _DISK_ERRORS[error.errno]
        _print_error(f"{what}{where}; {hint}.")
        return 1
    except (MemoryError, RuntimeError) as error:
        if "does not have a deterministic implementation" in str(error):
            operator = str(error).partition(" does not have")[0]
            _print_error(
                f"--deterministic: {operator} cannot be repeated on this device; leave it out, or --device cpu."
            )
            return 2
        if not is_out_of_memory(error):
            raise
        _print_error(
            "The device is out of memory; lower the batch sizes (--set synthesis.batch_size=... --set "
            "distillation.batch_size=..., or -b) or choose another --device."
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
