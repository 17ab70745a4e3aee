"""What cases are made of: random tensors, weights in any format, and ragged steps with a history in the cache.

Everything is drawn on the CPU in float32 and converted afterwards: a seed means the same numbers in every profile and
on every device, and nothing is ever read back from one.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dsv4_hal.batch import Array, Batch, CosSin, cos_sin
from dsv4_hal.formats import FORMATS, QTensor, RowLayout, Weight, new_pool, quantize
from dsv4_hal.ops.spec import OPS, Case

if TYPE_CHECKING:
    from dsv4_hal.dispatch import Resolved
    from dsv4_hal.ops.cache import KV

Results = dict[str, Tensor]

TOKENS = (0, 1, 5)
PLAIN_FORMATS = ("fp32", "fp16", "bf16")
WEIGHT_FORMATS = (*PLAIN_FORMATS, "e4m3_128x128", "e4m3_128x128_fp32", "mxfp8", "mxfp4", "int8_channel", "int4_channel")
RATIOS = {4: True, 128: False}  # ratio -> overlap, as in the published models
POISON = 0xFF  # NaN in every format a pool may hold
NAN = float("nan")
MARGIN = 64  # elements in front of and behind a tensor to write to


def case(op: str, run: Callable[..., Results], size: str = "tiny", /, **parameters: object) -> Case:
    """A case that calls run(ops, generator, **parameters), named after its parameters."""
    listed = ",".join(f"{name}={value}" for name, value in parameters.items())
    return Case(f"{op}[{listed}]", partial(run, **parameters), size)


def strided(op: str, run: Callable[..., Results]) -> Callable[..., Results]:
    """`run`, with one more parameter, `strides`: what the op is called with is no longer contiguous.

    Every floating tensor that it only reads has its values in place, and NaN between its rows: gaps of one element
    ("one": nothing is aligned, and no row), or of a row ("row": a slice of a fused projection).
    """

    @wraps(run)
    def loose(ops: Resolved, generator: torch.Generator, strides: str, **parameters: object) -> Results:
        called, signature = getattr(ops, op), inspect.signature(OPS[op].definition)

        def call(*args: object, **kwargs: object) -> object:
            bound = signature.bind(None, *args, **kwargs)
            for name, value in bound.arguments.items():
                if name not in ("out", "state"):
                    bound.arguments[name] = _loosened(value, strides)
            return called(*bound.args[1:], **bound.kwargs)

        setattr(ops, op, call)
        try:
            return run(ops, generator, **parameters)
        finally:
            setattr(ops, op, called)

    plain = inspect.signature(run)
    more = inspect.Parameter("strides", inspect.Parameter.KEYWORD_ONLY, annotation="str")
    loose.__signature__ = plain.replace(parameters=[*plain.parameters.values(), more])  # type: ignore[attr-defined]
    return loose


def _loosened(value: object, strides: str) -> object:
    if isinstance(value, tuple) and type(value) is tuple:  # tables of cosines and sines
        return tuple(_loosened(part, strides) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return value
    gap = {"one": 1, "row": value.shape[-1]}[strides]
    return torch.cat([value, value.new_full((*value.shape[:-1], gap), NAN)], -1)[..., : value.shape[-1]]


def differentiated(case: Case) -> Case:
    """The case, as one for gradients as well."""
    return replace(case, grad=True)


def normal(
    ops: Resolved, generator: torch.Generator, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """Normal values with standard deviation `scale`, in numerics.storage by default."""
    return place(ops, torch.randn(shape, generator=generator) * scale, dtype)


def whole(
    ops: Resolved, generator: torch.Generator, low: int, high: int, *shape: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Whole numbers low .. high, exact in every dtype, in numerics.storage by default."""
    return place(ops, torch.randint(low, high + 1, shape, generator=generator).float(), dtype)


def place(ops: Resolved, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.to(dtype or ops.numerics.storage).to(ops.device)


def nans(ops: Resolved, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor to write to: whoever forgets a place leaves a NaN. Memory lies around it, for who writes beside it."""
    size = math.prod(shape)
    return place(ops, torch.full((size + 2 * MARGIN,), NAN), dtype)[MARGIN : MARGIN + size].view(shape)


def yes(ops: Resolved, fact: bool) -> Tensor:
    """A fact about the call as a result: reference and backend must agree on it."""
    return torch.tensor(fact, device=ops.device)


def ids(ops: Resolved, generator: torch.Generator, tokens: int, k: int, count: int) -> Tensor:
    """k distinct numbers below `count` for each token."""
    return torch.rand(tokens, count, generator=generator).argsort(-1)[:, :k].contiguous().to(ops.device)


def quantised(ops: Resolved, generator: torch.Generator, format: str, *shape: int, spread: float = 3.0) -> QTensor:
    """Values in a format. Magnitudes differ from column to column by powers of two, so that no two scales are alike."""
    values = torch.randn(shape, generator=generator)
    values *= torch.exp2((torch.rand(shape[-1], generator=generator) * spread).floor() - spread)
    q = quantize(values, FORMATS[format])
    return QTensor(q.data.to(ops.device), None if q.scale is None else q.scale.to(ops.device), q.format)


def weight(ops: Resolved, generator: torch.Generator, format: str, *shape: int) -> Weight:
    """A weight [..., out, in] as the backend's own ops read it."""
    q = quantised(ops, generator, format, *shape)
    return ops.repack(Weight(q.data, q.scale, q.format, "w"))


def angles(ops: Resolved, positions: Tensor, channels: int) -> CosSin:
    """RoPE tables of `channels` rotary channels."""
    frequency = 10000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    return cos_sin(positions.to(ops.device), frequency.to(ops.device), ops.numerics.accumulate)


@dataclass(frozen=True)
class Ragged:
    """Lengths of a step: new tokens and context of each sequence, padding tokens; packed or with a cache."""

    q_lens: Sequence[int]
    context: Sequence[int] = ()
    padding: int = 0

    @property
    def packed(self) -> bool:
        return not self.context

    @property
    def small(self) -> bool:
        """Whether it lies within the bounds of the smaller size classes, its history too."""
        return sum(self.q_lens) + self.padding <= 8 and sum(self.context) <= 256


# Lengths lie around multiples of 4 and 128; contexts of "chunked" cut blocks of both ratios.
RAGGED = {
    "packed": Ragged((5, 1, 130)),
    "packed_padded": Ragged((9, 0, 4), padding=3),
    "packed_none": Ragged(()),
    "decode": Ragged((1, 1, 1, 1), (3, 0, 127, 255)),
    "prefill": Ragged((129, 3, 64), (0, 0, 0)),
    "chunked": Ragged((9, 70, 5), (6, 63, 254)),
    "mixed": Ragged((1, 20, 1, 3), (130, 0, 7, 125)),
    "empty": Ragged((0, 2, 0), (12, 2, 0)),
    "padded": Ragged((1, 6), (31, 2), padding=5),
    "none": Ragged((0, 0), (9, 0)),
    "edges": Ragged((64, 4, 1, 65), (64, 124, 127, 191)),  # all end with a block of 128, and a chunk of 64
    "few": Ragged((1, 3, 2), (7, 0, 126), padding=1),
    "few_packed": Ragged((5, 0, 2), padding=1),
}


def ragged_of(text: str) -> Ragged:
    """A step by its name in RAGGED, or written out: tokens of each sequence, with a cache also where they begin, and
    padding: "5.0.130.p2", "1at127.20at0.p2". ValueError for anything else."""
    if text in RAGGED:
        return RAGGED[text]
    found = re.fullmatch(r"((?:\d+\.)*\d+)(?:\.p(\d+))?|((?:\d+at\d+\.)*\d+at\d+)(?:\.p(\d+))?", text)
    if not found:
        raise ValueError(f"{text!r} is no ragged step: one of {', '.join(RAGGED)}, or 5.0.130.p2, or 1at127.20at0.p2")
    packed, padding, cached, more = found.groups()
    if packed:
        return Ragged([int(n) for n in packed.split(".")], padding=int(padding or 0))
    pairs = [one.split("at") for one in cached.split(".")]
    return Ragged([int(n) for n, _ in pairs], [int(at) for _, at in pairs], int(more or 0))


def size_of(ragged: str, real: bool = False) -> str:
    """Size class of a case whose step is `ragged`; real: of rows as wide as the published models'."""
    if not ragged_of(ragged).small:
        return "quick"
    return "interpreted" if real else "tiny"


def steps(
    ops: Resolved,
    generator: torch.Generator,
    ragged: str,
    window: int = 8,
    ropes: dict[str, Tensor] | None = None,
    block_tokens: int = 256,
    fixed: bool = False,
) -> list[Batch]:
    """Planned batches that bring every sequence to its context, and then the step itself, of a fixed shape or not.

    Blocks and slots are dealt out in random order, some are left over, and the window ring is shorter than the longest
    sequences.
    """
    lengths, ropes = ragged_of(ragged), ropes or {}
    if lengths.packed:
        if fixed:
            raise ValueError(f"a packed step has no fixed shape: {ragged}")
        return [ops.plan(Batch.packed(lengths.q_lens, ops.device, lengths.padding), RATIOS, ropes)]
    q, context = np.array(lengths.q_lens), np.array(lengths.context)
    chunk, count = max(64, int(q.max())), len(q)
    token_table = shuffled(generator, count, int((context + q).max()) // block_tokens + 1)
    window_table = shuffled(generator, count, -(-(window - 1 + chunk) // 16))
    slots = shuffled(generator, count, 1)[:, 0]
    batches, done = [], np.zeros(count, np.int64)
    while True:
        last = not (done < context).any()
        now = q if last else np.minimum(chunk, context - done)
        batches.append(
            ops.plan(
                Batch(
                    now,
                    done.copy(),
                    ops.device,
                    lengths.padding if last else 0,
                    slots,
                    token_table,
                    window_table,
                    block_tokens,
                    fixed=fixed and last,
                ),
                RATIOS,
                ropes,
            )
        )
        if last:
            return batches
        done += now


def shuffled(generator: torch.Generator, rows: int, columns: int) -> Array:
    """[rows, columns] distinct ids, three of them unused."""
    return torch.randperm(rows * columns + 3, generator=generator)[: rows * columns].view(rows, columns).numpy()


def pool_for(ops: Resolved, layout: RowLayout, batch: Batch) -> KV | None:
    """A poisoned pool that holds every block of the batch's tables; None for a packed batch."""
    from dsv4_hal.ops.cache import KV

    table = batch.window_table if layout.ratio == 1 else batch.token_table
    if table is None:
        return None
    rows = batch.window_block if layout.ratio == 1 else batch.block_tokens // layout.ratio
    return KV(new_pool(layout, table.size + 3, rows, ops.device).fill_(POISON), layout, rows)


def count_rows(batch: Batch, ratio: int) -> int:
    """Rows that `kv_store` takes."""
    return batch.tokens if ratio == 1 else batch.require_plan().entries[ratio].count


def token_rows(ops: Resolved, generator: torch.Generator, batch: Batch, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values for every token; NaN for padding tokens, which no sequence may notice."""
    values = torch.randn(batch.tokens, *shape, generator=generator) * scale
    values[batch.seq_host < 0] = NAN
    return place(ops, values)


def used_pool(ops: Resolved, generator: torch.Generator, layout: RowLayout, batch: Batch) -> KV | None:
    """A pool like `pool_for`'s, whose blocks held other sequences, as long as there is room: their rows are still there
    and look like any other. None for a packed batch."""
    kv = pool_for(ops, layout, batch)
    table = batch.window_table if layout.ratio == 1 else batch.token_table
    if kv is None or table is None:
        return kv
    room = table.shape[1] * (batch.window_block if layout.ratio == 1 else batch.block_tokens)
    length = np.full(len(table), room - max(0, layout.window - 1))
    before = replace(batch, q_lens=length, context=np.zeros_like(length), padding=0, plan=None)
    ops.plan(before, RATIOS, {})
    return ops.kv_store(normal(ops, generator, count_rows(before, layout.ratio), layout.dim), layout, before, kv)


def filled(
    ops: Resolved, generator: torch.Generator, layout: RowLayout, batches: list[Batch], reused: bool = False
) -> KV:
    """Random rows stored by every step in turn. reused: into blocks that held other sequences."""
    kv = used_pool(ops, generator, layout, batches[0]) if reused else pool_for(ops, layout, batches[0])
    for batch in batches:
        if layout.ratio == 1:
            rows = token_rows(ops, generator, batch, layout.dim)
        else:
            rows = normal(ops, generator, count_rows(batch, layout.ratio), layout.dim)
        kv = ops.kv_store(rows, layout, batch, kv)
    assert kv is not None
    return kv


def held(ops: Resolved, name: str, kv: KV, batch: Batch) -> Results:
    """All rows of every sequence that can be loaded."""
    lengths = batch.lengths // kv.layout.ratio
    lost = np.zeros_like(lengths)  # rows that a window ring no longer holds
    if kv.layout.ratio == 1 and batch.window_table is not None:
        lost = np.maximum(lengths - batch.window_table.shape[1] * batch.window_block, 0)
    return {
        f"{name}_{sequence}": ops.kv_load(kv, batch, sequence, int(first), int(length))
        for sequence, (first, length) in enumerate(zip(lost, lengths, strict=True))
    }


def device_generator(ops: Resolved, generator: torch.Generator) -> torch.Generator | None:
    """A generator on the op's device, seeded from the case's; None for a device that has none."""
    seed = int(torch.randint(1 << 31, (), generator=generator))
    return None if ops.device.type == "meta" else torch.Generator(ops.device).manual_seed(seed)
