"""Watching a backend while it runs: it must not change its inputs, nor write beside the tensor it was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.dispatch import Resolved
from dsv4_hal.formats import QTensor
from dsv4_hal.ops import KV, OPS

# What an op may write, by parameter name: the tensor it is given for its result, rows of a pool, a compressor's state.
WRITES = frozenset({"out", "pool", "state"})


class Misconduct(Exception):
    """A backend wrote where it must not. The message names the op and the argument."""


def watch(ops: Resolved) -> None:
    """From now on every op called on `ops` raises Misconduct where it changed an input, or memory around its `out`."""
    for op, spec in OPS.items():
        setattr(ops, op, _watched(op, inspect.signature(spec.definition), getattr(ops, op)))


def _watched(op: str, signature: inspect.Signature, run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(None, *args, **kwargs).arguments
        inputs = [
            (name, t, _bytes(t).clone()) for name, value in given.items() if name not in WRITES for t in _tensors(value)
        ]
        out: Tensor | None = given.get("out")
        around = None if out is None or out.is_meta else _around(out)
        result = run(*args, **kwargs)
        for name, now, before in inputs:
            if not torch.equal(_bytes(now), before):
                raise Misconduct(f"{op} changed its input {name}")
        if out is not None and around is not None and not torch.equal(_around(out), around):
            raise Misconduct(f"{op} wrote outside of out")
        return result

    return call


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors on a device with memory, inside an argument."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, QTensor):
        yield from _tensors((value.data, value.scale))
    elif isinstance(value, KV):
        yield from _tensors(value.data)
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def _around(out: Tensor) -> Tensor:
    """A copy of the bytes of `out`'s storage that are not its own."""
    whole = torch.empty(0, dtype=torch.uint8, device=out.device).set_(out.untyped_storage())
    first, last = out.storage_offset() * out.itemsize, (out.storage_offset() + out.numel()) * out.itemsize
    return torch.cat([whole[:first], whole[last:]])
