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
from functools import partial
from typing import TYPE_CHECKING, Any

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


STRIDES = ("", "one", "row", "permuted", "expanded", "offset")


def case(op: str, run: Callable[..., Results], size: str = "tiny", /, **parameters: Any) -> Case:
    """A case that calls run(ops, generator, **parameters), named after its parameters.

    One parameter goes with every function, and is not passed on:
    strides  how the tensors that the op only reads, and `out`, lie in memory; values stay what they are, but for
             "expanded". Between them, where there is room, lies what nobody may read: NaN, and ids that are none.
             "one"       a gap of one element between rows: nothing is aligned
             "row"       a gap of a row between rows: a slice of a fused projection
             "permuted"  the last axis is the slowest: a transposed tensor
             "expanded"  floating tensors repeat their first row with stride 0
             "offset"    contiguous, and begins one element into its memory
    """
    listed = ",".join(f"{name}={value}" for name, value in parameters.items())
    passed = {name: value for name, value in parameters.items() if name != "strides"}
    called = partial(run, **passed)
    if strides := parameters.get("strides"):
        if strides not in STRIDES:
            raise ValueError(f"strides={strides}: there are {', '.join(STRIDES[1:])}")
        called = partial(_loose, op, strides, called)
    return Case(f"{op}[{listed}]", called, size, function=run, parameters=parameters)


def _loose(op: str, strides: str, run: Callable[..., Results], ops: Resolved, generator: torch.Generator) -> Results:
    """`run`, with an op that is called with tensors that lie otherwise in memory."""
    called, signature = getattr(ops, op), inspect.signature(OPS[op].definition)

    def call(*args: object, **kwargs: object) -> object:
        bound = signature.bind(None, *args, **kwargs)
        out = bound.arguments.get("out")
        for name, value in bound.arguments.items():
            if name != "state":
                bound.arguments[name] = _loosened(value, "row" if name == "out" and strides == "expanded" else strides)
        result = called(*bound.args[1:], **bound.kwargs)
        if not isinstance(out, Tensor):
            return result
        loose = bound.arguments["out"]
        out.copy_(loose)
        parts = result if isinstance(result, tuple) else (result,)
        handed = tuple(out if part is loose else part for part in parts)
        return handed if isinstance(result, tuple) else handed[0]

    setattr(ops, op, call)
    try:
        return run(ops, generator)
    finally:
        setattr(ops, op, called)


def _loosened(value: Any, strides: str) -> Any:
    if type(value) is tuple:  # tables of cosines and sines
        return tuple(_loosened(part, strides) for part in value)
    if type(value) is QTensor and value.scale is not None:  # an activation; a Weight lies as its backend wants it
        if strides == "expanded":
            return value
        return replace(value, data=_loosened(value.data, strides), scale=_loosened(value.scale, strides))
    from dsv4_hal.ops.cache import KV

    if isinstance(value, KV) and not value.paged:
        return replace(value, data=_loosened(value.data, "" if strides == "expanded" else strides))
    if not strides or not isinstance(value, Tensor) or not value.dim() or not value.numel():
        return value
    if strides == "expanded":
        return value[:1].expand_as(value) if value.is_floating_point() else value
    if strides == "permuted" and value.dim() > 1:
        axes = tuple(range(value.dim() - 1, -1, -1))
        return value.permute(axes).contiguous().permute(axes)
    if strides == "offset":
        memory = _nothing(value, (value.numel() + 1,))
        memory[1:] = value.reshape(-1)
        return memory[1:].view(value.shape)
    gap = value.shape[-1] if strides == "row" else 1
    if value.dim() == 1:  # its elements are the rows
        memory = torch.stack([value, _nothing(value, value.shape)], -1)
        return memory[:, 0]
    memory = torch.cat([value, _nothing(value, (*value.shape[:-1], gap))], -1)
    return memory[..., : value.shape[-1]]


def _nothing(like: Tensor, shape: Sequence[int]) -> Tensor:
    """What nobody may read: NaN, or a number far beyond every table."""
    if like.is_floating_point():
        return torch.full(tuple(shape), NAN, device=like.device).to(like.dtype)
    if like.dtype.itemsize == 1:
        return torch.full(tuple(shape), 0x7F, dtype=torch.uint8, device=like.device).view(like.dtype)
    return like.new_full(tuple(shape), torch.iinfo(like.dtype).max // 2)


def differentiated(case: Case) -> Case:
    """The case, as one for gradients as well."""
    return replace(case, grad=True)


def _by_row(x: Tensor, generator: torch.Generator, spread: float) -> Tensor:
    """Every row by a power of two of its own."""
    size = (torch.rand(x.shape[:-1], generator=generator) * 2 - 1) * spread
    return x * torch.exp2(size.round())[..., None]


def _by_group(x: Tensor, generator: torch.Generator, spread: float) -> Tensor:
    """Every 32 columns of a row by a power of two of their own."""
    groups = -(-x.shape[-1] // 32)
    size = (torch.rand(*x.shape[:-1], groups, generator=generator) * 2 - 1) * spread
    return x * torch.exp2(size.round()).repeat_interleave(32, -1)[..., : x.shape[-1]]


def _zeros(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every third row is zero, every second group of 32 of the others, and some zeros have a sign."""
    kept = torch.rand(*x.shape[:-1], -(-x.shape[-1] // 32), generator=generator) < 0.5
    x = x * kept.repeat_interleave(32, -1)[..., : x.shape[-1]]
    rows = x.reshape(-1, x.shape[-1]).clone() if x.numel() else x
    rows[::3] *= 0  # of negative numbers: -0
    return rows.view(x.shape)


def _outlier(x: Tensor, generator: torch.Generator) -> Tensor:
    """One value of every 128 columns is 1,024 times as large as the others."""
    x = x.clone()
    for first in range(0, x.shape[-1], 128):
        width = min(128, x.shape[-1] - first)
        x[..., first + int(torch.randint(width, (), generator=generator))] *= 1024
    return x


def _equal(x: Tensor, generator: torch.Generator) -> Tensor:
    """All of 32 columns are one value."""
    return x[..., ::32].repeat_interleave(32, -1)[..., : x.shape[-1]].clone()


def _codes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Only the largest codes of e4m3 and e2m1, and their neighbours."""
    top = torch.tensor([448.0, 416.0, 6.0, 4.0, 0.0])
    chosen = top[torch.randint(len(top), x.shape, generator=generator)]
    return torch.where(x < 0, -chosen, chosen)


# Other values than N(0, 1): name -> what becomes of normal values [..., columns].
DRAWN: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "normal": lambda x, generator: x,
    "zeros": _zeros,
    "outlier": _outlier,
    "rows": lambda x, generator: _by_row(x, generator, 10.0),
    "groups": lambda x, generator: _by_group(x, generator, 10.0),
    "equal": _equal,
    "codes": _codes,
    "tiny": lambda x, generator: x * 2.0**-100,
    "subnormal": lambda x, generator: x * 2.0**-127,
}
VALUES = tuple(DRAWN)


def drawn(generator: torch.Generator, shape: Sequence[int], values: str = "normal") -> Tensor:
    """Values of a kind of DRAWN, float32 on the CPU. The same on every machine: uniform numbers are, and the rest is
    float64 arithmetic, whose last bit is lost in float32."""
    u = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    x = (torch.erfinv((2 * u - 1).clamp(-1 + 2.0**-53, 1 - 2.0**-53)) * math.sqrt(2)).float()
    return DRAWN[values](x, generator)


def normal(
    ops: Resolved,
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    values: str = "normal",
) -> Tensor:
    """Values of a kind of DRAWN times `scale`, in numerics.storage by default."""
    return place(ops, drawn(generator, shape, values) * scale, dtype)


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
    values = drawn(generator, shape)
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


def token_rows(
    ops: Resolved,
    generator: torch.Generator,
    batch: Batch,
    *shape: int,
    scale: float = 1.0,
    values: str = "normal",
) -> Tensor:
    """Values for every token, as of `normal`; NaN for padding tokens, which no sequence may notice."""
    rows = drawn(generator, (batch.tokens, *shape), values) * scale
    rows[batch.seq_host < 0] = NAN
    return place(ops, rows)


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
