"""Watching a backend while it runs: what it must not change, it must not change.

Its inputs stay as they were, the batch and its plan included; memory around `out` too. Of a pool of cache rows only the
blocks of the batch's own sequences may change, of a compressor's state only their slots. What the call before was
given and returned, and the op's own call before, stays too. And a result is new: one that lies in the memory of an
earlier result changes that one. State of the whole process, as torch's default dtype, is nobody's to change.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import Resolved
from dsv4_hal.ops import KV, OPS

# Parameters that an op may write to, and attributes that it may set: its result, rows of a pool, a compressor's state;
# the plan that `plan` makes, and what a backend keeps in one.
WRITES = frozenset({"out", "pool", "state"})
KEPT = frozenset({"plan", "vendor", "owner"})


class Misconduct(Exception):
    """A backend wrote where it must not. The message names the op and the argument."""


@dataclass(frozen=True)
class _Call:
    """A call that was made.

    given     what else can still see of its arguments
    returned  kept, so that nobody else can be given this memory
    """

    op: str
    given: list[weakref.ref[Tensor]]
    returned: list[Tensor]


_LAST = ""  # among the earlier calls: the last one, of whatever op


def watch(ops: Resolved) -> None:
    """From now on every op called on `ops` raises Misconduct where it changed what it must not."""
    earlier: dict[str, _Call] = {}
    for op, spec in OPS.items():
        setattr(ops, op, _watched(op, inspect.signature(spec.definition), getattr(ops, op), earlier))


def _watched(
    op: str, signature: inspect.Signature, run: Callable[..., Any], earlier: dict[str, _Call]
) -> Callable[..., Any]:
    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(None, *args, **kwargs).arguments
        past = [earlier[name] for name in dict.fromkeys((op, _LAST)) if name in earlier]
        before = [(name, look, look()) for name, look in (*_looks(op, given), *_past_looks(past, given))]
        result = run(*args, **kwargs)
        for name, look, was in before:
            if look() != was:
                raise Misconduct(f"{op} {name}")
        arguments = [t for value in given.values() for t in _tensors(value)]
        own = {_memory(t) for t in arguments}
        new = [t for t in _tensors(result) if t.numel() and _memory(t) not in own]
        if op in earlier and {_memory(t) for t in new} & {_memory(t) for t in earlier[op].returned}:
            raise Misconduct(f"{op} returned the memory of an earlier result")
        earlier[op] = earlier[_LAST] = _Call(op, [weakref.ref(t) for t in arguments], new)
        return result

    return call


def _past_looks(past: Iterable[_Call], given: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], list[bytes]]]]:
    """The same for what earlier calls were given and returned, but for what this one may write to."""
    written = {_memory(t) for name, value in given.items() if name in WRITES for t in _tensors(value)}
    for call in {id(call): call for call in past}.values():
        was_given = [t for t in (ref() for ref in call.given) if t is not None]
        for told, tensors in (("returned", call.returned), ("was given", was_given)):
            kept = tuple(t for t in tensors if t.numel() and _memory(t) not in written)
            yield f"changed what an earlier call of {call.op} {told}", partial(_contents, kept, False)


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


def _looks(op: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], list[bytes]]]]:
    """(what is wrong if it changes, a function that reads it) for everything that must stay."""
    for name, value in given.items():
        if name not in WRITES:
            yield f"changed its input {name}", partial(_contents, value, op == "plan")
    out, batch = given.get("out"), given.get("batch")
    if isinstance(out, Tensor) and not out.is_meta:
        yield "wrote outside of out", lambda: [_around(out)]
    pool, state = given.get("pool"), given.get("state")
    if isinstance(pool, KV) and isinstance(batch, Batch) and not pool.data.is_meta:
        table = batch.window_table if pool.layout.ratio == 1 else batch.token_table
        others = np.setdiff1d(np.arange(len(pool.data)), () if table is None else table)
        yield "changed blocks of the pool that belong to other sequences", lambda: [_bytes(pool.data[others])]
    if isinstance(state, Tensor) and not state.is_meta:
        mine = (given["target"],) if op == "state_copy" else (given["slot"],) if op == "state_reset" else ()
        slots = batch.slots if isinstance(batch, Batch) and batch.slots is not None else mine
        rest = np.setdiff1d(np.arange(len(state)), slots)
        yield "changed the state of other sequences", lambda: [_bytes(state[rest])]


def _contents(value: Any, planning: bool) -> list[bytes]:
    return [_bytes(t) for t in _tensors(value, planning)]


def _tensors(value: Any, planning: bool = False) -> Iterator[Tensor]:
    """Tensors with memory, inside an argument or a result. planning: the batch's plan is being made."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, np.ndarray):
        if value.dtype != object:
            yield torch.from_numpy(np.ascontiguousarray(value))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.name not in KEPT or (field.name == "plan" and not planning):
                yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _memory(t: Tensor) -> int:
    """Where the storage of `t` begins: the same for all its views."""
    return t.untyped_storage().data_ptr()


def _bytes(t: Tensor) -> bytes:
    t = t.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)  # one element may have any stride
    return t.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _around(out: Tensor) -> bytes:
    """The bytes of `out`'s storage that are not its own."""
    whole = torch.empty(0, dtype=torch.uint8, device=out.device).set_(out.untyped_storage()).clone()
    own = torch.empty(0, dtype=out.dtype, device=out.device).set_(whole.untyped_storage())
    own.as_strided(out.shape, out.stride(), out.storage_offset()).zero_()
    return _bytes(whole)
