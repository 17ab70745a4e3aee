"""Watching a backend while it runs: what it must not change, it must not change.

Its inputs stay as they were, the batch and its plan included; memory around `out` too. Of a pool of cache rows only the
blocks of the batch's own sequences may change, of a compressor's state only their slots. What the call before was
given, and the op's own call before, stays too. And a result is new, and stays as it is: the last results of every op
are kept, so that one that lies in the memory of an earlier one is found, and one that changes later. State of the whole
process, as torch's default dtype, is nobody's to change.

A result may lie in the memory of the call's own arguments. An argument that an op may write to may be an earlier
result, which is not expected to stay from then on. No case writes to a result itself.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial, wraps
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import Resolved
from dsv4_hal.ops import KV, OPS

# Parameters that an op may write to: its result, rows of a pool, a compressor's state. And attributes that it may set:
# what a backend keeps in a plan.
WRITES = frozenset({"out", "pool", "state"})
KEPT = frozenset({"vendor", "owner"})

RESULTS = 64  # are kept of every op
# Bytes of results that are kept in all, and of the copies they are compared with. 64 results of a small case are 4 MiB,
# so that these are all kept; what longer steps return pushes out the oldest, or a process would hold gigabytes.
HELD = 64 << 20
LOOKED = 1 << 20  # bytes of earlier cases' results that are looked at after each case: well below a millisecond

Array: TypeAlias = NDArray[Any]
Place: TypeAlias = tuple[int, int]  # address of the first byte, and of the one after the last
Look: TypeAlias = tuple[str, Callable[[], list[bytes]]]  # what is wrong if it changes, and a function that reads it


class Misconduct(Exception):
    """A backend wrote where it must not. The message names the op and the argument."""


@dataclass(eq=False)
class _Kept:
    """A tensor of a result, held so that nobody else can be given its memory.

    call        number of the call that returned it
    start, end  its place
    bits        its bytes when it was returned; None once somebody may have written to it
    """

    op: str
    call: int
    tensor: Tensor
    start: int
    end: int
    bits: bytes | None

    @property
    def size(self) -> int:
        return self.end - self.start


class Guard:
    """What is remembered of the calls on one backend."""

    def __init__(self) -> None:
        self._calls = count()
        self._depth = 0  # calls that are being made
        self._last = ""  # op that was called last
        self._given: dict[str, list[weakref.ref[Tensor]]] = {}  # op -> what its last call was given
        self._results: dict[str, deque[list[_Kept]]] = {}  # op -> what its last calls returned, the oldest first
        self._places: list[_Kept] = []  # all of these by address; none overlaps another
        self._size = 0
        self._seen = 0  # how far the round over `_places` has come

    def watch(self, ops: Resolved) -> None:
        """From now on every op called on `ops` raises Misconduct where it changed what it must not."""
        for op, spec in OPS.items():
            setattr(ops, op, self._watched(op, inspect.signature(spec.definition), getattr(ops, op)))

    @contextmanager
    def case(self) -> Iterator[None]:
        """The calls of a case: at its end all their results are looked at again, and some of the cases before."""
        first = next(self._calls)
        try:
            yield
            for results in self._results.values():
                for result in reversed(results):
                    if result[0].call < first:
                        break
                    _look(result, "a call")
            left = LOOKED
            for _ in self._places:
                self._seen = (self._seen + 1) % len(self._places)
                left -= self._places[self._seen].size
                if left < 0:
                    break
                _look([self._places[self._seen]], "a call")
        except Misconduct:
            self._results, self._places, self._size = {}, [], 0  # it is said once
            raise

    @contextmanager
    def lent(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """While this lasts the caller writes to these tensors, earlier results perhaps; then it has restored them."""
        lent = {kept: kept.bits for t in tensors for kept in self._overlapping(place(t))}
        for kept in lent:
            kept.bits = None
        try:
            yield
        finally:
            for kept, bits in lent.items():
                kept.bits = bits

    def _watched(self, op: str, signature: inspect.Signature, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(None, *args, **kwargs).arguments
            planning = op == "plan"
            # Of the ops that a composite calls, it is the one to answer for the batch.
            looked = [name for name in given if name != "batch" or planning or not self._depth]
            arguments = {name: contents(given[name], planning) for name in looked}
            inputs = {name: _bits(tensors) for name, tensors in arguments.items() if name not in WRITES}
            data = [t for name, tensors in arguments.items() if name != "batch" or planning for t in tensors]
            own, written = [place(t) for t in data], [place(t) for t in writable(given)]
            for kept in [kept for where in written for kept in self._overlapping(where)]:
                kept.bits = None
            looks = [*_looks(op, given), *self._past_looks(op, data, written)]
            before = [(told, look, look()) for told, look in looks]
            recent = [self._results[name][-1] for name in {op, self._last} if self._results.get(name)]
            number = next(self._calls)
            self._depth += 1
            try:
                result = run(*args, **kwargs)
            finally:
                self._depth -= 1
            for name, was in inputs.items():
                if _bits(contents(given[name], planning)) != was:
                    raise Misconduct(f"{op} changed its input {name}")
            for told, look, was in before:
                if look() != was:
                    raise Misconduct(f"{op} {told}")
            for returned in recent:
                _look(returned, op)
            self._keep(op, number, result, own)
            self._given[op] = [weakref.ref(t) for t in data if isinstance(t, Tensor)]
            self._last = op
            return result

        return call

    def _past_looks(self, op: str, given: Iterable[Tensor | Array], written: Sequence[Place]) -> Iterator[Look]:
        """The same for what earlier calls were given, but for what this one is given too, or may write to."""
        known = {id(t) for t in given}
        for name in {op, self._last} & self._given.keys():
            earlier = [t for t in (ref() for ref in self._given[name]) if t is not None and id(t) not in known]
            kept = [t for t in earlier if not overlapping(place(t), written)]
            if kept:
                yield f"changed what an earlier call of {name} was given", partial(_bits, kept)

    def _keep(self, op: str, number: int, result: Any, own: Sequence[Place]) -> None:
        """Keep what is new of a result. Misconduct where it lies in the memory of an earlier one, unless an op that
        this one has called returned that."""
        kept: list[_Kept] = []
        for t in new(result, own):
            if there := self._overlapping(place(t)):
                if any(earlier.call < number for earlier in there):
                    raise Misconduct(f"{op} returned the memory of an earlier result")
                continue
            kept.append(_Kept(op, number, t, *place(t), bits(t)))
            self._places.insert(self._index(kept[-1].start), kept[-1])
            self._size += kept[-1].size
        if kept:
            self._results.setdefault(op, deque()).append(kept)
            if len(self._results[op]) > RESULTS:
                self._let_go(op)
            while self._size > HELD and len(self._places) > len(kept):
                oldest = min((results[0][0].call, name) for name, results in self._results.items() if results)
                self._let_go(oldest[1])

    def _let_go(self, op: str) -> None:
        """Of the oldest result of an op, after a last look."""
        result = self._results[op].popleft()
        for kept in result:
            del self._places[self._index(kept.start)]
            self._size -= kept.size
        _look(result, "a call")

    def _index(self, address: int) -> int:
        return bisect_left(self._places, address, key=lambda kept: kept.start)

    def _overlapping(self, where: Place) -> list[_Kept]:
        first = last = self._index(where[0])
        if first and self._places[first - 1].end > where[0]:
            first -= 1
        while last < len(self._places) and self._places[last].start < where[1]:
            last += 1
        return self._places[first:last]


def _look(result: Iterable[_Kept], culprit: str) -> None:
    """Misconduct where it is no longer what was returned; culprit: who has been at work since."""
    for kept in result:
        if kept.bits is not None and bits(kept.tensor) != kept.bits:
            raise Misconduct(f"{culprit} changed what an earlier call of {kept.op} returned")


def new(result: Any, own: Sequence[Place]) -> Iterator[Tensor]:
    """The tensors of a result that have memory of their own; own: that of the call's arguments."""
    for t in contents(result):
        if isinstance(t, Tensor) and t.numel() and not overlapping(place(t), own):
            yield t


def state() -> dict[str, Any]:
    """State of the process that no op may change, and every other code in it reads."""
    return {name: read() for name, (read, _) in _STATE.items()} | {_VARIABLES: dict(os.environ)}


def restored(before: Mapping[str, Any]) -> list[str]:
    """Puts back what has changed since, and names it."""
    changed = [name for name, (read, _) in _STATE.items() if read() != before[name]]
    for name in changed:
        _STATE[name][1](before[name])
    # New ones are none of it: libraries set variables of their own where they are first used.
    if not before[_VARIABLES].items() <= os.environ.items():
        os.environ.update(before[_VARIABLES])
        changed.append(_VARIABLES)
    return changed


def _device() -> torch.device | None:
    device = torch.get_default_device()
    return None if device.type == "cpu" else device  # None is how it is reset


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _change_directory(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


_VARIABLES = "variables of the environment"
_STATE: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (_device, torch.set_default_device),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "whether algorithms are deterministic": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "the working directory": (_directory, _change_directory),
}


def _looks(op: str, given: Mapping[str, Any]) -> Iterator[Look]:
    """What must stay of the arguments that the op may write to."""
    out, batch = given.get("out"), given.get("batch")
    if isinstance(out, Tensor) and not out.is_meta:
        yield "wrote outside of out", lambda: [_around(out)]
    pool, state = given.get("pool"), given.get("state")
    if isinstance(pool, KV) and isinstance(batch, Batch) and not pool.data.is_meta:
        table = batch.window_table if pool.layout.ratio == 1 else batch.token_table
        others = np.setdiff1d(np.arange(len(pool.data)), () if table is None else table)
        yield "changed blocks of the pool that belong to other sequences", lambda: [bits(pool.data[others])]
    if isinstance(state, Tensor) and not state.is_meta:
        mine = (given["target"],) if op == "state_copy" else (given["slot"],) if op == "state_reset" else ()
        slots = batch.slots if isinstance(batch, Batch) and batch.slots is not None else mine
        rest = np.setdiff1d(np.arange(len(state)), slots)
        yield "changed the state of other sequences", lambda: [bits(state[rest])]


def _bits(tensors: Iterable[Tensor | Array]) -> list[bytes]:
    return [bits(t) for t in tensors]


def writable(given: Mapping[str, Any]) -> list[Tensor]:
    """Of a call's arguments, the tensors that it may write to."""
    return [t for name, value in given.items() if name in WRITES for t in contents(value) if isinstance(t, Tensor)]


def contents(value: Any, planning: bool = False) -> list[Tensor | Array]:
    """Tensors with memory, and arrays of numbers, inside an argument or a result. planning: the batch's plan is being
    made."""
    found: list[Tensor | Array] = []
    _collect(value, planning, found)
    return found


_NOTHING = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})  # kinds of values without contents


def _collect(value: Any, planning: bool, found: list[Tensor | Array]) -> None:
    kind: object = type(value)
    if kind in _NOTHING:
        return
    if isinstance(value, Tensor):
        if not value.is_meta:
            found.append(value)
    elif isinstance(value, np.ndarray):
        if value.dtype != object:
            found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, planning, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, planning, found)
    else:
        for name in _fields(kind):
            if name != "plan" or not planning:
                _collect(getattr(value, name), planning, found)


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    """Attributes of a dataclass that an op may not set."""
    return tuple(f.name for f in fields(kind) if f.name not in KEPT) if is_dataclass(kind) else ()


def place(t: Tensor | Array) -> Place:
    """The bytes from its first element to its last; no byte where it has no element."""
    if isinstance(t, np.ndarray):
        return t.ctypes.data, t.ctypes.data + t.nbytes
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.nbytes
    last = sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.itemsize if t.numel() else start


def overlapping(where: Place, others: Iterable[Place]) -> bool:
    return any(start < where[1] and where[0] < end for start, end in others)


def bits(t: Tensor | Array) -> bytes:
    """Its elements in order, as bytes."""
    if isinstance(t, np.ndarray):
        return t.tobytes()
    if not t.is_cpu:
        t = t.detach().cpu()
    if not t.is_contiguous():
        t = t.detach().contiguous()
    return ctypes.string_at(t.data_ptr(), t.nbytes) if t.numel() else b""


def _around(out: Tensor) -> bytes:
    """The bytes of `out`'s storage that are not its own, gaps between its elements included."""
    whole = torch.empty(0, dtype=torch.uint8, device=out.device).set_(out.untyped_storage()).clone()
    own = torch.empty(0, dtype=out.dtype, device=out.device).set_(whole.untyped_storage())
    own.as_strided(out.shape, out.stride(), out.storage_offset()).zero_()
    return bits(whole)
