"""Steps of one shape: one token for each of the same sequences, again and again.

Everything that such a step reads beside weights and pools (tokens, positions, tables, rows to write) lies in one buffer
on the device, at the same addresses in every step; the host works it out and sends it in one copy. No shape hangs on
how far a sequence is. So the step can be captured once in a CUDA graph and run again: that is done on a CUDA device;
elsewhere the same step runs as it is. Cosines come from the host, and may differ in their last bit from an ordinary
step's. `dsv4_hal.conformance.models.steady` checks that a backend's ops keep to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.step import Step
from dsv4_hal.model.transformer import Model

ALIGNMENT = 16  # bytes: what kernels may count on


class Decoder:
    """Appends one token to each of `sequences` of a cache at every call (default: to all, in order).

    batch  the step's, on the device: made by the first call, filled anew by every other one
    """

    batch: Batch

    def __init__(self, model: Model, cache: Cache, sequences: Sequence[int] | None = None) -> None:
        self.model, self.cache = model, cache
        self.sequences = list(range(cache.batch_size)) if sequences is None else list(sequences)
        self._ropes = {name: frequency.cpu() for name, frequency in model.ropes.items()}
        self._buffer: Buffer | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [R] int64, one for each sequence -> logits [R, V] in numerics.accumulate, overwritten by the next
        call on a CUDA device. ValueError where a sequence is full, as `Cache.batch` says."""
        model = self.model
        step = model.begin(tokens.cpu(), self._planned(), self.cache)
        parts = list(tensors([step.tokens, step.batch, step.batch.plan]))
        if self._buffer is None:
            self._buffer = Buffer(parts, model.ops.device)
            twins = iter(self._buffer.twins)
            self._tokens = next(twins)
            self.batch = on_device(step.batch, twins, model.ops.device)
        else:
            take_over(self.batch, step.batch)
        self._buffer.send(parts)
        logits = self._run()
        self.cache.commit(step.batch)
        return logits

    def _planned(self) -> Batch:
        """The next step, planned on the host."""
        made = self.cache.batch([1] * len(self.sequences), self.sequences, fixed=True)
        batch = replace(made, device=torch.device("cpu"))
        self.model.ops.plan(batch, self.model.ratios, self._ropes).require_plan().owner = self.model
        return batch

    def _run(self) -> Tensor:
        if self.model.ops.device.type != "cuda":
            return self.forward()
        if self._graph is None:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self.forward()  # compiles what is not compiled; writes what the captured step will write again
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self.forward()
        self._graph.replay()
        return self._logits

    def forward(self) -> Tensor:
        """What is captured: the step on the device, from the buffer and the cache."""
        step = Step(self._tokens, self.batch, self.cache)
        return self.model.head(self.model.streams(step))


class Buffer:
    """Tensors of the host and their twins on a device, all in one piece.

    twins  uninitialised until the first `send`, and at the same addresses ever after
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        ends, end = [], 0
        for tensor in tensors:
            end = -(-end // ALIGNMENT) * ALIGNMENT + tensor.nbytes
            ends.append(end)
        self._there = torch.empty(end, dtype=torch.uint8, device=device)
        self._here = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._places = [self._view(self._here, tensor, stop) for tensor, stop in zip(tensors, ends, strict=True)]
        self.twins = [self._view(self._there, tensor, stop) for tensor, stop in zip(tensors, ends, strict=True)]

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values of these tensors, which have the shapes of the first ones, to the twins."""
        if self._sent is not None:
            self._sent.synchronize()  # until the copy before this one has left the host
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor)
        self._there.copy_(self._here, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    @staticmethod
    def _view(buffer: Tensor, like: Tensor, end: int) -> Tensor:
        return buffer[end - like.nbytes : end].view(like.dtype).view(like.shape)


def tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors in a batch, a plan, or a collection of them, in a fixed order."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors(value)
    elif isinstance(thing, Batch):
        yield from (thing.seq, thing.positions)
    elif is_dataclass(thing):
        for field in fields(thing):
            if field.name not in ("owner", "vendor"):
                yield from tensors(getattr(thing, field.name))


def rebuilt(thing: Any, twin: Callable[[], Tensor]) -> Any:
    """A copy of a plan, or of a part of one, with other tensors, asked for in the order of `tensors`."""
    if isinstance(thing, Tensor):
        return twin()
    if isinstance(thing, dict):
        return {key: rebuilt(value, twin) for key, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(rebuilt(value, twin) for value in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        kept = ("owner", "vendor")
        return replace(
            thing, **{f.name: rebuilt(getattr(thing, f.name), twin) for f in fields(thing) if f.name not in kept}
        )
    return thing


def on_device(host: Batch, twins: Iterator[Tensor], device: torch.device) -> Batch:
    """The batch and its plan with their twins on the device."""
    batch = replace(host, device=device, plan=None)
    batch.seq, batch.positions = next(twins), next(twins)
    batch.plan = rebuilt(host.require_plan(), lambda: next(twins))
    return batch


def take_over(batch: Batch, host: Batch) -> None:
    """What the batch says on the host becomes that of another step of the same shape."""
    for name in ("context", "seq_host", "positions_host"):
        setattr(batch, name, getattr(host, name))
    batch.require_plan().tiles = host.require_plan().tiles
