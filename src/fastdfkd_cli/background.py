"""Writing beside the computation: one job at a time in a thread, and tensors that it may read while theirs go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import torch
from torch import Tensor


class Background:
    """Carries out one job at a time in a thread of its own.

    A caller that is faster than the thread waits at :meth:`start`, so no more than one job is ever open. A job that
    failed is the last one: what it raised is raised again by :meth:`start`, :meth:`check` and :meth:`wait`, however
    often they are called.
    """

    def __init__(self) -> None:
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin ``job`` as soon as the one before has ended."""
        self.wait()
        future: Future[None] = Future()
        try:
            self._job = future
            Thread(target=_carry_out, args=(future, job), name="fastdfkd-writer").start()
        except BaseException:
            # There is no thread to be had, or Ctrl-C came in between: a job that has not begun never will, and one
            # that has is waited for like any other.
            if future.cancel():
                self._job = None
            raise

    def check(self) -> None:
        """Raise what the last job raised, if it has ended."""
        if self._job is not None and self._job.done():
            self._job.result()

    def wait(self) -> None:
        """Wait for the last job's end, and raise what it raised."""
        if self._job is not None:
            self._job.result()

    def failure(self) -> BaseException | None:
        """Wait for the last job's end, and return what it raised."""
        return None if self._job is None else self._job.exception()

    def afterwards(self, function: Callable[[], object]) -> None:
        """Call ``function`` when the last job has ended: now, or in its thread."""
        if self._job is None:
            function()
        else:
            self._job.add_done_callback(lambda _: function())


def _carry_out(future: Future[None], job: Callable[[], None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        job()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


class HostCopy:
    """Copies of tensors on the CPU, contiguous. From a CUDA device they are on their way while the caller goes on.

    Whatever the caller queues or does afterwards, changes of the originals in place among it, leaves the copies as
    they were. They may be read once :meth:`wait` has returned them, in any thread.
    """

    def __init__(self, tensors: Sequence[Tensor], arrived: torch.cuda.Event | None = None) -> None:
        self._tensors = tuple(tensors)
        self._arrived = arrived

    @classmethod
    def of(cls, *tensors: Tensor) -> HostCopy:
        """Copy ``tensors``; those on CUDA on one device, in its current stream."""
        copies = []
        device: torch.device | None = None
        for tensor in tensors:
            source = tensor.detach()
            on_cuda = source.device.type == "cuda"
            # To page-locked memory a CUDA device copies by itself. The stream keeps the order: what it computes next
            # comes after the copy.
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_cuda)
            copies.append(copy.copy_(source, non_blocking=on_cuda))
            if on_cuda:
                device = source.device
        if device is None:
            return cls(copies)
        arrived = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        arrived.record(torch.cuda.current_stream(device))
        return cls(copies, arrived)

    def __len__(self) -> int:
        return len(self._tensors[0])

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(tensor.dtype for tensor in self._tensors)

    def behind(self, start: int) -> HostCopy:
        """The rows from ``start`` on of each tensor: views."""
        return HostCopy([tensor[start:] for tensor in self._tensors], self._arrived)

    def wait(self) -> tuple[Tensor, ...]:
        """Return the copies as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


__all__ = ["Background", "HostCopy"]
