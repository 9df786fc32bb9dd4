"""Several processes that carry out one run: joining, reducing, agreeing, and ending together.

They are started by torchrun, one for each GPU (or, on a CPU, as many as wanted), and compute what one process would on
the batches of all, within rounding. What is said between them goes through this module; with a single process all of
it returns at once, and nothing else is computed than without it.

Tensors on a CUDA device travel by NCCL, those on the CPU by gloo.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastdfkd_cli import stopping
from fastdfkd_cli.acceleration import first_line
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.processes import Group, note_joined

#: How long a process waits for the others in each message. One that is dead is found out much earlier.
TIMEOUT = timedelta(minutes=30)
#: How long it waits for them to come.
JOIN_TIMEOUT = timedelta(minutes=5)
#: Seconds between two signs of life of a process.
BEAT = 1.0
#: Beats that a process may miss before the others end without it. Counted, not timed: where all of them are stopped
#: together for a while, as schedulers do, nobody has missed any.
PATIENCE = 60
#: Seconds for a process to leave on its own once another has failed; one that waits for its GPU cannot.
GRACE = 15.0

_FAILED = "failed"
#: Several groups, one after the other, do not read one another's texts.
_joins = itertools.count()


class Lost(FastDFKDError):
    """A message did not come through: another process of the run has failed, or the way to it."""


def device_name(group: Group, name: str) -> str:
    """What ``--device name`` means to this process: with several, ``auto`` and ``cuda`` are the GPU of its local rank.

    Raises:
        UsageError: there is no GPU for it, or one device was named for all.
    """
    if not group.several or name == "cpu":
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or (name == "cuda" and not torch.cuda.is_available()):
        return name  # without CUDA, "cuda" is refused where devices are resolved
    if name != "cuda":
        raise UsageError(
            f"--device {name} names one device for {group.world_size} processes: give --device cuda, and each takes "
            "its own, or --device cpu."
        )
    count = torch.cuda.device_count()
    if group.local_rank >= count:
        raise UsageError(
            f"Process {group.rank} has local rank {group.local_rank}, and this machine shows it {count} CUDA "
            f"device{'' if count == 1 else 's'}: start as many processes a machine as it has (--nproc-per-node)."
        )
    return f"cuda:{group.local_rank}"


# -- joining and leaving ----------------------------------------------------------------------------------------


@contextmanager
def joined(
    group: Group,
    device: torch.device,
    *,
    say: Callable[[str], None],
    timeout: timedelta = TIMEOUT,
    beat: float = BEAT,
    patience: int = PATIENCE,
    grace: float = GRACE,
) -> Iterator[None]:
    """Be one of the group while the block runs, and leave it with the others.

    Whatever ends one of them ends all: an exception in the block is noticed by the others in their next message, a
    process that was killed or hangs by the signs of life that it no longer gives. One of them says what happened; the
    others end silently, also where all of them meet the same error.

    Args:
        group: as the environment says it; with a single process nothing happens.
        device: where this process computes.
        say: takes the line of a process that cannot raise it, because it hangs in a call that does not return.
        timeout: for each message.
        beat, patience, grace: see :data:`BEAT`, :data:`PATIENCE`, :data:`GRACE`.

    Raises:
        FastDFKDError: the others cannot be reached, or one of them was lost.
        SystemExit: another process says why.
    """
    if not group.several:
        yield
        return
    if not dist.is_available():
        raise UsageError("This torch was built without torch.distributed: it cannot work in several processes.")
    store = PrefixStore(f"fastdfkd/{next(_joins)}", _table(group))
    lifeline = _Lifeline(group, store, say, beat, patience, grace)
    lifeline.start()
    failed = True
    try:
        try:
            _meet(group, store, device)
            _open(group, store, device, timeout)
            note_joined()
            yield
            _all_reduce(torch.zeros(1))  # nobody leaves, and takes a store or a connection along, before all are done
            failed = False
        except Lost as lost:
            lifeline.raise_cause(lost)
        except BaseException as error:
            lifeline.raise_once(error)
        finally:
            _leave(device, failed)
    finally:
        lifeline.stop(failed)


@functools.cache
def _table(group: Group) -> Store:
    """The short texts that all processes see and may write. torchrun serves them, or else rank 0 while it lives."""
    try:
        store, _, _ = next(rendezvous("env://", group.rank, group.world_size, timeout=JOIN_TIMEOUT))
    except (RuntimeError, OSError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise FastDFKDError(
            f"Process {group.rank} cannot reach the other {group.world_size - 1} through {where} ({first_line(error)})."
        ) from error
    return store


def _meet(group: Group, store: Store, device: torch.device) -> None:
    """Wait for all to come: all with GPUs, or all without, as otherwise they would send by different means."""
    keys = [f"kind/{rank}" for rank in range(group.world_size)]
    try:
        store.set(keys[group.rank], device.type)
        store.wait(keys, JOIN_TIMEOUT)
        kinds = [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        minutes = JOIN_TIMEOUT.total_seconds() / 60
        raise FastDFKDError(
            f"Not all of the {group.world_size} processes came within {minutes:.0f} minutes ({first_line(error)})."
        ) from error
    if len(set(kinds)) > 1:
        other = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
        raise UsageError(
            f"Process {other} has the device {kinds[other]} and process 0 {kinds[0]}: give --device cpu, or start only "
            "where there are GPUs."
        )


def _open(group: Group, store: Store, device: torch.device, timeout: timedelta) -> None:
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    with _messages():
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=group.rank,
            world_size=group.world_size,
            timeout=timeout,
            device_id=device if backend != "gloo" else None,
        )


def _leave(device: torch.device, failed: bool) -> None:
    """Close the connections, at which whoever waits for this process stops waiting."""
    if not dist.is_initialized():
        return
    # What is broken already may complain; there is nothing left to lose.
    with suppress(RuntimeError, ValueError):
        if failed and device.type == "cuda" and dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # NCCL would first wait for messages that never come
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group()


class _Lifeline:
    """Signs of life between the processes, given and watched in a thread of its own.

    Each watches the next. A process that gives none any more, or says that it failed, ends the others: those that
    wait for it in a message that is broken off leave by themselves; those that wait for their GPU, or for a message
    that nobody broke off, are ended from here.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        say: Callable[[str], None],
        beat: float,
        patience: int,
        grace: float,
    ) -> None:
        self.group = group
        self.store = store.clone()  # its own connection: a call on the other one may wait for long
        self.say = say
        self.beat = beat
        self.patience = patience
        self.grace = grace
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, failed: bool) -> None:
        """Stop watching."""
        self._leaving.set()
        self._thread.join(timeout=5 * self.beat)
        self._depart(failed)

    def _depart(self, failed: bool) -> None:
        """Go; rank 0, which may serve the table, after the others that still can."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.group.rank}", "")
            others = [f"left/{rank}" for rank in range(1, self.group.world_size)]
            for _ in range(50 if failed and self.group.leads else 0):
                if self.store.check(others):
                    break
                time.sleep(self.beat / 10)

    def raise_once(self, error: BaseException) -> NoReturn:
        """Raise what this process failed with, unless another one says just that.

        Raises:
            SystemExit: in its place, with its exit code.
        """
        first = self._first_to_say(f"{type(error).__name__}: {error}")
        if not first and isinstance(error, FastDFKDError):
            raise SystemExit(error.exit_code) from error
        if not first and isinstance(error, KeyboardInterrupt):
            raise SystemExit(128 + getattr(error, "signum", signal.SIGINT)) from error
        raise error

    def raise_cause(self, lost: Lost) -> NoReturn:
        """End with the reason for a message that did not come through, or silently where another process says it.

        Raises:
            FastDFKDError: the reason, in one process of all.
            SystemExit: in the others.
        """
        with stopping.held():  # torchrun stops the others when one has ended: what ended it is the better news
            cause = self._cause() or str(lost)
        if self._first_to_fail(cause):
            raise FastDFKDError(f"{cause} The others end with it.") from lost
        raise SystemExit(1) from lost

    def _first_to_say(self, text: str) -> bool:
        """Say why the run failed: whether nobody has said the same before."""
        rank, _, said = self._say(text).partition(" ")
        return rank == str(self.group.rank) or said != text

    def _first_to_fail(self, text: str) -> bool:
        """Say why the run failed: whether nobody has said anything before."""
        return self._say(text).partition(" ")[0] == str(self.group.rank)

    def _say(self, text: str) -> str:
        """What was said first, by whom: it stays."""
        mine = f"{self.group.rank} {text}"
        try:
            return self.store.compare_set(_FAILED, "", mine).decode()
        except RuntimeError:
            return mine  # the table went with the process that served it

    def _cause(self) -> str:
        """Wait for a process to say why it failed, or for the beats that are missing of one that cannot."""
        try:
            before = self._beats()
            for _ in range(4):
                if self.store.check([_FAILED]):
                    return ""
                time.sleep(self.beat)
            after = self._beats()
        except RuntimeError:
            return "" if self.group.leads else self._silent([0])
        return self._silent([rank for rank, beats in after.items() if beats == before.get(rank)])

    def _silent(self, ranks: Sequence[int]) -> str:
        if not ranks:
            return ""
        names = ", ".join(str(rank) for rank in ranks)
        return (
            f"Process{'' if len(ranks) == 1 else 'es'} {names} of {self.group.world_size} ended or stopped answering "
            "without a word (killed, or out of memory?)."
        )

    def _beats(self) -> dict[int, bytes]:
        """The latest sign of each other process that has given any."""
        others = [rank for rank in range(self.group.world_size) if rank != self.group.rank]
        return {rank: self.store.get(_beat(rank)) for rank in others if self.store.check([_beat(rank)])}

    def _watch(self) -> None:
        neighbour = (self.group.rank + 1) % self.group.world_size
        beats, missed, seen = 0, 0, b""
        while missed < self.patience:
            if self._leaving.wait(self.beat):
                return
            try:
                beats += 1
                self.store.set(_beat(self.group.rank), str(beats))
                if self.store.check([_FAILED]):
                    self._end("")
                    return
                latest = self.store.get(_beat(neighbour)) if self.store.check([_beat(neighbour)]) else b""
            except RuntimeError:
                self._end(self._silent([0]))  # the table went with the process that served it
                return
            missed = missed + 1 if latest and latest == seen else 0
            seen = latest
        self._end(self._silent([neighbour]))

    def _end(self, cause: str) -> None:
        """End this process, unless it leaves by itself within the grace."""
        speaks = bool(cause) and self._first_to_fail(cause)
        if self._leaving.wait(self.grace):
            return
        if speaks:
            self.say(f"{cause} The others end with it.")
        self._depart(failed=True)
        os._exit(1)


def _beat(rank: int) -> str:
    return f"beat/{rank}"


@contextmanager
def _messages() -> Iterator[None]:
    """What torch raises when a message does not come through, as :class:`Lost`."""
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise  # a message that cannot be recorded; whoever records has a way back
        raise Lost(f"A message between the processes did not come through ({first_line(error)}).") from error


# -- reductions -------------------------------------------------------------------------------------------------


def _all_reduce(tensor: Tensor) -> None:
    with _messages():
        dist.all_reduce(tensor)


def sum_(group: Group, tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes in the place of each tensor, by one message for all of them.

    Args:
        tensors: of the same shapes in all processes, on one device. Those of several precisions travel in the widest.
    """
    _reduce_(group, tensors, 1)


def mean_(group: Group, tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in the place of each tensor, as :func:`sum_` does the sum."""
    _reduce_(group, tensors, group.world_size)


@torch.no_grad()
def _reduce_(group: Group, tensors: Sequence[Tensor], divisor: int) -> None:
    if not group.several or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _all_reduce(flat)
    _spread(flat if divisor == 1 else flat.div_(divisor), tensors)


@torch.no_grad()
def broadcast_(group: Group, tensors: Iterable[Tensor]) -> None:
    """Put rank 0's values in the place of each tensor, by one message for each type of numbers among them."""
    if not group.several:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        with _messages():
            dist.broadcast(flat, src=0)
        _spread(flat, alike)


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


def merged_moments(group: Group, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` of the numbers of all processes, from those of each, of as many numbers.

    The variance between the processes is a difference of squares. It is formed in float64, where nothing is lost: one
    message then does, and no guess at the mean is needed.
    """
    if not group.several:
        return mean, var
    wide = mean.double()
    message = torch.cat([wide, var.double() + wide * wide])
    _all_reduce(message)
    wide, square = message.div_(group.world_size).chunk(2)
    return wide.to(mean.dtype), (square - wide * wide).clamp_min_(0).to(var.dtype)


# -- agreeing ---------------------------------------------------------------------------------------------------


def require_same(group: Group, what: str, value: str) -> None:
    """Make sure that all processes have the same ``value`` (settings, say).

    Raises:
        UsageError: in all of them, where one differs.
    """
    if not group.several:
        return
    mine = torch.frombuffer(bytearray(hashlib.sha256(value.encode()).digest()), dtype=torch.uint8)
    others = [torch.empty_like(mine) for _ in range(group.world_size)]
    with _messages():
        dist.all_gather(others, mine)
    different = [str(rank) for rank, other in enumerate(others) if not torch.equal(other, others[0])]
    if different:
        several = len(different) > 1
        raise UsageError(
            f"Process{'es' if several else ''} {', '.join(different)} {'have' if several else 'has'} another {what} "
            "than process 0: start all of them alike."
        )


def largest(group: Group, *values: float) -> list[float]:
    """The largest of each value over all processes: what all of them can do with, where each has a need of its own."""
    if not group.several:
        return list(values)
    message = torch.tensor(values, dtype=torch.float64)
    with _messages():
        dist.all_reduce(message, dist.ReduceOp.MAX)
    return message.tolist()


def of_leader(group: Group, *values: float) -> list[float]:
    """Rank 0's values: seconds that it measured, say, by which all of them then decide alike."""
    if not group.several:
        return list(values)
    message = torch.tensor(values, dtype=torch.float64)
    with _messages():
        dist.broadcast(message, src=0)
    return message.tolist()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A text that two lists of tensors have in common if they agree bit for bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def wait_for_all(group: Group) -> None:
    """Go on when all processes have come here."""
    if group.several:
        _all_reduce(torch.zeros(1))


@contextmanager
def first_of_machine(group: Group) -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others: what it downloads, they find."""
    if group.local_rank > 0:
        wait_for_all(group)
    yield
    if group.local_rank == 0:
        wait_for_all(group)


# -- what one has and another needs -----------------------------------------------------------------------------


def text_of_leader(group: Group, text: str) -> str:
    """Rank 0's text."""
    if not group.several:
        return text
    message = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
    (length,) = of_leader(group, message.numel())
    if not group.leads:
        message = torch.empty(int(length), dtype=torch.uint8)
    with _messages():
        dist.broadcast(message, src=0)
    return bytes(message.numpy()).decode()


def tensors_of_leader(group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors, on the CPU; what the others give is not looked at."""
    if not group.several:
        return dict(tensors)
    found = _blank(text_of_leader(group, _described(tensors) if group.leads else ""))
    for name, target in found.items():
        if group.leads:
            target.copy_(tensors[name])
        with _messages():
            dist.broadcast(_bytes(target), src=0)
    return found


def gathered(group: Group, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """In rank 0: its own tensors, as they are, and those of each other process, on the CPU. Elsewhere: nothing."""
    if not group.leads:
        _send(tensors, 0)
        return []
    return [dict(tensors), *(_receive(rank) for rank in range(1, group.world_size))]


def dealt(group: Group, shares: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """This process's share, on the CPU, of what rank 0 has for each.

    Args:
        shares: in rank 0: one for each process, in order; each is made when the one before was sent. Elsewhere it is
            not looked at.
    """
    if not group.leads:
        return _receive(0)
    mine: dict[str, Tensor] = {}
    for rank, share in enumerate(shares):
        if rank == 0:
            mine = dict(share)
        else:
            _send(share, rank)
    return mine


def _described(tensors: Mapping[str, Tensor]) -> str:
    """Names, types and shapes, as :func:`_blank` reads them."""
    return json.dumps({name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()})


def _blank(description: str) -> dict[str, Tensor]:
    facts = json.loads(description).items()
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in facts}


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor on the CPU: gloo does not know all types."""
    return tensor.view(-1).view(torch.uint8)


def _send(tensors: Mapping[str, Tensor], to: int) -> None:
    description = bytearray(_described(tensors).encode())
    with _messages():
        dist.send(torch.tensor([len(description)]), to)
        dist.send(torch.frombuffer(description, dtype=torch.uint8), to)
        for tensor in tensors.values():
            if tensor.numel():
                dist.send(_bytes(tensor.detach().cpu().contiguous()), to)


def _receive(source: int) -> dict[str, Tensor]:
    length = torch.zeros(1, dtype=torch.int64)
    with _messages():
        dist.recv(length, source)
        description = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(description, source)
        found = _blank(bytes(description.numpy()).decode())
        for tensor in found.values():
            if tensor.numel():
                dist.recv(_bytes(tensor), source)
    return found


class Agreement:
    """What all processes have to decide alike, though each has its own clock and gets its own signals.

    Called once a step by all of them; answers alike in all of them. They talk about it a few times a second, after a
    number of steps that rank 0 chooses: a message at every step would be felt where steps are short. A request has to
    be repeated until it is answered.

    Args:
        group: whose.
        every: seconds between two messages, about.
    """

    #: Most steps without a message.
    MOST = 64

    def __init__(self, group: Group, every: float = 0.25) -> None:
        self.group = group
        self.every = every
        self._until = 0
        self._steps = 0
        self._started = self._last = time.perf_counter()
        self._request = 0
        self._seconds = 0.0

    def __call__(self, request: int) -> tuple[int, float]:
        """The largest request of any process (0: none), and seconds on rank 0's clock since the start.

        With a single process both are its own, of this moment. Otherwise they are those of the last message.

        Args:
            request: the number of a signal that asks this process to stop, say; 0 or more.
        """
        if not self.group.several:
            return request, time.perf_counter() - self._started
        if self._until > 0:
            self._until -= 1
            return self._request, self._seconds
        now = time.perf_counter()
        per_step = (now - self._last) / max(self._steps, 1)
        next_steps = min(max(int(self.every / max(per_step, 1e-9)), 1), self.MOST)
        leader = [now - self._started, next_steps] if self.group.leads else [0.0, 0.0]
        message = torch.tensor([float(request), *leader], dtype=torch.float64)
        with _messages():
            dist.all_reduce(message, dist.ReduceOp.MAX)
        asked, self._seconds, steps = message.tolist()
        self._request, self._steps = int(asked), int(steps)
        self._until = self._steps - 1
        self._last = now
        return self._request, self._seconds


__all__ = [
    "TIMEOUT",
    "Agreement",
    "Lost",
    "broadcast_",
    "dealt",
    "device_name",
    "fingerprint",
    "first_of_machine",
    "gathered",
    "joined",
    "largest",
    "mean_",
    "merged_moments",
    "of_leader",
    "require_same",
    "sum_",
    "tensors_of_leader",
    "text_of_leader",
    "wait_for_all",
]
