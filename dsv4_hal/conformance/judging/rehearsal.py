"""More calls than a case makes: with other contents before its own, and the same ones again after it.

Layers call an op again and again on one plan with other data, weights change in place, and buffers are used again. A
backend that keeps what it has read, by object, by address or in the plan, then computes from what is no longer there.
So a call is rehearsed: it is made on the very same objects, with other contents in the same memory; every byte is put
back; and the case's own call follows. What was kept of the rehearsal makes its result wrong.
What changes: the values of floating tensors, rows that are packed or in a pool, a weight's codes and scales, and whole
numbers that have another legal order. What does not: the batch and its plan, arguments that are no tensors, what the op
may write to (it does, and that is put back), and a weight arranged so that there is no way back to the checkpoint's.
Then the call is made again as the case makes it, and returns the same, to the bit.

Nothing is rehearsed on the meta device, which has no contents, nor where gradients are taken: a tensor that autograd
has recorded must not change in place.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, cycle
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dsv4_hal import formats
from dsv4_hal.batch import Batch
from dsv4_hal.conformance.judging.backward import Arguments, intercepted
from dsv4_hal.conformance.judging.compare import bitwise
from dsv4_hal.conformance.judging.guard import RESULTS, WRITES, Guard, contents, new, overlapping, place, writable
from dsv4_hal.conformance.judging.named import listed
from dsv4_hal.conformance.judging.results import GRAD, Job, up_to
from dsv4_hal.conformance.workers.transport import Packed, pack, unpack
from dsv4_hal.dispatch import Resolved
from dsv4_hal.formats import QTensor, Weight
from dsv4_hal.ops import KV, OPS, SIZES

LARGEST = 32 << 20  # bytes that a call may read and write and still be rehearsed
EVERY = 3  # case of an op is rehearsed for a backend that affords no more than FEW, to which each call is dear
FEW = "interpreted"
# An op's first result that is SMALL (bytes) and new is asked for as often as results are kept: who hands out one of a
# few buffers in turn comes round to the first while it is held, also if each shape has its own.
ROUND, SMALL = RESULTS, 256 << 10
SHORT = 10  # the same for FEW
PAUSE = 5e-4  # seconds that a thread beside waits between two of its own operations: others must get on

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Run = Callable[[Arguments], Any]
Q = TypeVar("Q", bound=QTensor)


class Unsteady(Exception):
    """A call that was repeated did not return the same. The message names the op, the call and the first element."""


def due(job: Job, affords: str) -> bool:
    """Whether the calls of a case are rehearsed, for a backend that affords cases up to a size class."""
    if job.mode == GRAD or job.size == SIZES[-1]:
        return False
    if affords not in up_to(FEW):
        return True
    known = [id for id, case in listed(job.op).items() if case.size in up_to(affords)]
    return (known.index(job.case) if job.case in known else zlib.crc32(job.case.encode())) % EVERY == 0


@contextmanager
def rehearsed(ops: Resolved, op: str, guard: Guard, rounds: set[str], turns: int) -> Iterator[None]:
    """While this lasts, calls of `op` are rehearsed, and repeated to the bit; Unsteady where they are not the same.

    rounds  ops whose results have come round, `turns` of them; `op` joins them
    """

    def call(run: Run, given: Arguments) -> Any:
        changing = _changing(given)
        touched = [*changing, *writable(given)]
        if sum(t.nbytes for t in touched) > LARGEST:
            return run(given)
        put_back = _remembered(op, given, touched, ops.device)
        with guard.lent(touched):
            try:
                _change(ops, op, given)
                run(given)
            finally:
                put_back()
        own = [place(t) for value in given.values() for t in contents(value)]

        def numbers(result: Any) -> Iterable[int]:
            size = sum(t.nbytes for t in new(result, own))
            if op in rounds or not 0 < size <= SMALL:
                return (2,)
            rounds.add(op)
            return range(2, turns + 2)

        return _repeated(op, run, given, ops.device, numbers)

    with intercepted(ops, op, call):
        yield


@contextmanager
def repeated(ops: Resolved, op: str, first: int, calls: int) -> Iterator[None]:
    """While this lasts, every call of `op` is made so often, with threads beside it; Unsteady where they are not the
    same. The calls are numbered from `first`."""
    number = count(first)

    def call(run: Run, given: Arguments) -> Any:
        next(number)
        return _repeated(op, run, given, ops.device, lambda _: (next(number) for _ in range(calls - 1)))

    with _beside(ops.device), intercepted(ops, op, call):
        yield


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """While this lasts, other threads compute, and allocate and free memory on which they have left NaN."""
    over = threading.Event()

    def compute() -> None:
        a = torch.eye(64, device=device)
        while not over.wait(PAUSE):
            a = a @ a

    def allocate() -> None:
        for size in cycle((1 << 8, 1 << 12, 1 << 16, 1 << 20)):
            if over.wait(PAUSE):
                return
            blocks = [torch.full((size // 4,), math.nan, device=device) for _ in range(8)]
            del blocks

    threads = [threading.Thread(target=torch.inference_mode()(task), daemon=True) for task in (compute, allocate)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _repeated(
    op: str, run: Run, given: Arguments, device: torch.device, numbers: Callable[[Any], Iterable[int]]
) -> Any:
    """The result of a call, which is made again for every one of the numbers that follow from it."""
    put_back = _remembered(op, given, writable(given), device)
    result = run(given)
    was = _returned(op, given, result)
    for number in numbers(result):
        put_back()
        now = _returned(op, given, run(given))
        if now != was:
            raise Unsteady(f"repeated call differs: call {number:,} of {op}: {difference(now, was)}")
    return result


def _returned(op: str, given: Arguments, result: Any) -> dict[str, Packed]:
    """What a call has returned and written, as far as that is defined."""
    batch = given.get("batch")
    room = op in ("compress", "compressor") and isinstance(batch, Batch) and batch.fixed
    if op == "state_new" or room:  # only its backend knows what a state is; and entries there is only room for
        return {}
    told = {f"result {i}": t for i, t in enumerate(contents(result))}
    told |= {name: t for name in ("out", "pool") for t in contents(given.get(name))}
    return pack({name: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for name, t in told.items()})


def difference(now: Mapping[str, Packed], was: Mapping[str, Packed]) -> str:
    """How results differ that should be the same to the bit."""
    if now.keys() != was.keys():
        return f"{len(now)} tensors, expected {len(was)}"
    name = next(name for name in was if now[name] != was[name])
    got, want = (unpack({name: packed[name]})[name] for packed in (now, was))
    return f"{name}: {bitwise(got, want).message}"


def _remembered(op: str, given: Arguments, tensors: Iterable[Tensor], device: torch.device) -> Callable[[], None]:
    """A function that puts back what these tensors hold now, and where generators stand."""
    held = [(words, words.clone()) for words in map(_words, tensors)]
    generators = [_generator(given, device)] if "generator" in OPS[op].definition.__annotations__ else []
    states = [(generator, generator.get_state()) for generator in generators]
    batch = given.get("batch")
    plan = batch.plan if isinstance(batch, Batch) else None

    def put_back() -> None:
        for words, before in held:
            words.copy_(before)
        for generator, state in states:
            generator.set_state(state)
        if op == "plan":
            given["batch"].plan = plan

    return put_back


def _generator(given: Arguments, device: torch.device) -> torch.Generator:
    """The one that a call draws from."""
    if isinstance(given.get("generator"), torch.Generator):
        return given["generator"]
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]


def _words(t: Tensor) -> Tensor:
    """Its memory as whole numbers; of axes that are expanded, the one element that is there."""
    for axis, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[axis] > 1:
            t = t.narrow(axis, 0, 1)
    return t.detach().view(_WORDS[t.itemsize])


def _changing(given: Arguments) -> list[Tensor]:
    """The tensors that a rehearsal changes."""
    return [t for value in _changeable(given).values() for t in contents(value) if isinstance(t, Tensor)]


def _changeable(given: Arguments) -> Arguments:
    """The arguments that a rehearsal changes: none that lies in the memory of the batch, as tables of its plan do."""
    fixed = [place(t) for t in contents(given.get("batch"))]
    return {
        name: value
        for name, value in given.items()
        if name not in WRITES | {"batch"} and not any(overlapping(place(t), fixed) for t in contents(value))
    }


def _change(ops: Resolved, op: str, given: Arguments) -> None:
    for name, value in _changeable(given).items():
        _change_value(ops, f"{op}.{name}", value)


def _change_value(ops: Resolved, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            _write(value, _other_values)
        elif name in _ORDERS:
            _write(value, _ORDERS[name])
    elif isinstance(value, Weight):
        _change_weight(ops, value)
    elif isinstance(value, QTensor):
        _copy(value, _other_codes(value))
    elif isinstance(value, KV):
        _change_rows(value)
    elif isinstance(value, tuple | list):
        for part in value:
            _change_value(ops, name, part)
    elif isinstance(value, Mapping):
        _change_value(ops, name, tuple(value.values()))


def _write(t: Tensor, other: Callable[[Tensor], Tensor]) -> None:
    words = _words(t)
    words.copy_(other(words.view(t.dtype)).view(words.dtype))


def _other_values(t: Tensor) -> Tensor:
    """The neighbours' values, negated and halved. What is not finite stays, and stays where it is."""
    axes = tuple({0, t.dim() - 1}) if t.dim() else ()
    moved = t.roll((1,) * len(axes), axes) if axes else t
    return torch.where(t.isfinite(), torch.where(moved.isfinite(), moved, t) * -0.5, t)


def _rolled(t: Tensor) -> Tensor:
    return t.roll(1, 0)


def _turned(offsets: Tensor) -> Tensor:
    """Offsets of groups of the same sizes, in reverse order."""
    return offsets[-1] - offsets.flip(0)


def _thinned(picks: Tensor) -> Tensor:
    """Every second pick is none."""
    return torch.where(torch.arange(picks.shape[-1], device=picks.device) % 2 == 0, -1, picks)


# Parameters that are whole numbers, and another legal order of them.
_ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "embedding.ids": _rolled,
    "permute.ids": _rolled,
    "moe_experts.ids": _rolled,
    "route.picks": _rolled,
    "unpermute.order": _rolled,
    "grouped_linear.offsets": _turned,
    "sparse_attention.picks": _thinned,
}


def _change_weight(ops: Resolved, w: Weight) -> None:
    try:
        other = ops.repack(_other_codes(w.ordered()))
    except ValueError:  # as `ordered` says: it knows no way back
        return
    _copy(w, other)


def _other_codes(q: Q) -> Q:
    """The neighbours' codes and scales: codes of another row and column, as legal as they were."""
    if q.format.plain:
        return replace(q, data=_other_values(q.data))
    data, scale = (t if t is None else _words(t).roll((1, 1), (-2, -1)).view(t.dtype) for t in (q.data, q.scale))
    assert data is not None
    return replace(q, data=data, scale=scale)


def _copy(to: QTensor, other: QTensor) -> None:
    """Codes and scales of a tensor of the same kind."""
    for old, changed in zip(contents(to), contents(other), strict=True):
        assert isinstance(old, Tensor) and isinstance(changed, Tensor)
        _words(old).copy_(_words(changed))


def _change_rows(kv: KV) -> None:
    """Other values in the same rows; what no row was written to stays NaN where it can."""
    if not kv.paged:
        _write(kv.data, _other_values)
        return
    rounding = kv.layout.rounding
    signs = 0x88 if rounding is not None and rounding.pack == 2 else 0x80  # of the elements in a byte
    for name, field in formats.views(kv.data, kv.layout, kv.rows).items():
        if name == "codes":
            field.view(torch.uint8).bitwise_xor_(signs)
        elif name != "scales":
            field.mul_(-0.5)
