"""A stand-in for a CUDA graph that a CPU can run, with a graph's rules.

While it records, it notes every operation that reaches the device, undoes what they changed (a graph computes nothing
while it is captured), and refuses what a graph refuses: to ask for a number, or for a shape that depends on values.
Replaying runs the noted operations again, on the same tensors, into the same tensors; no Python code is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

T = TypeVar("T")
#: What makes the host wait for the device, or needs its answer to go on.
REFUSED = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique2", "_unique2"}


class TapedRecording:
    """Has the interface of :class:`fastdfkd_cli.acceleration.Recording`."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, list[Tensor], list[Tensor]]] = []
        self.replays = 0

    def aside(self, function: Callable[[], T]) -> T:
        return function()

    def record(self, function: Callable[[], T]) -> T:
        mode = _Tape(self.tape)
        with mode:
            result = function()
        mode.undo()
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for operation, arguments, keywords, given, written in self.tape:
                results = operation(*arguments, **keywords)
                fresh = [each for each in tree_flatten(results)[0] if isinstance(each, Tensor)]
                for target, source in zip(given, fresh, strict=True):
                    # An operation's own results; what it wrote into its arguments is there already.
                    if not any(target is each for each in written) and not _same_memory(target, source):
                        target.copy_(source)


class _Tape(TorchDispatchMode):
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()
        self.tape = tape
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        bound = [*args, *kwargs.values()]
        names = [argument.name for argument in func._schema.arguments]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        written = []
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in values:
                written += [each for each in tree_flatten(values[argument.name])[0] if isinstance(each, Tensor)]
        if name == "native_batch_norm":  # it writes its running statistics, and its schema does not say so
            written += [each for each in args[3:5] if each is not None]
        for each in written:
            self.before.setdefault(each.untyped_storage().data_ptr(), (each, _whole(each).clone()))
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in bound[1]):
            raise RuntimeError("operation not permitted when stream is capturing: an index by a mask")
        result = func(*args, **kwargs)
        given = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        # Plain tensors without autograd's history, as the device sees them.
        arguments = tree_map_only(Tensor, lambda t: t.detach() if t.requires_grad else t, args)
        self.tape.append((func, arguments, kwargs, given, written))
        return result

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, before in self.before.values():
                _whole(tensor).copy_(before)


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory behind a tensor."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
