"""DeepGEMM: what it can do, as data, and its calls, from this project's tensors and back.

Every `*_verdict` is cheap and deterministic, and is asked at load with a model's facts and in front of every call with
its shapes. Signatures have changed between versions: calls pass by name what all of them know, and rely on no default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.backend import Verdict
from dsv4_hal.backends.cuda.vendor import layouts, probe
from dsv4_hal.formats import FORMATS, Format, QTensor, Weight

YES = Verdict(True, "within what DeepGEMM documents")
ROWS = FORMATS["e4m3_1x128"]  # activations
SCALE_ROWS = 128  # rows of an FP8 weight that share a scale


@dataclass(frozen=True)
class Able:
    """What the library does on one family of architectures.

    weights    formats of weights it multiplies with activations of e4m3_1x128
    index      formats of indexer keys that it scores
    heads      numbers of indexer heads; fewer are filled up
    mega_moe   whether it has the fused experts
    """

    weights: tuple[str, ...]
    index: tuple[str, ...]
    heads: tuple[int, ...]
    mega_moe: bool = False


_SM_100 = Able(("e4m3_128x128", "mxfp4"), ("e4m3_row_fp32", "mxfp4"), (8, 16, 32, 64), mega_moe=True)
ABLE: Mapping[str, Able] = MappingProxyType(
    {
        "sm_90": Able(("e4m3_128x128", "e4m3_128x128_fp32"), ("e4m3_row_fp32",), (32, 64)),
        "sm_100": _SM_100,
        "sm_103": _SM_100,
    }
)
INDEX_DIM, INDEX_ROWS = 128, (32, 64)  # channels of an indexer key; keys per block of a pool
HC_ROWS, HC_CHANNELS = 32, 64  # most rows of a hyper-connection's matrix in one call; its channels come in these
MEGA_ROWS = FORMATS["mxfp8"]  # activations of the fused experts


def able(arch: str, *functions: str) -> Verdict:
    """Whether the library is there, has these functions, and knows the architecture."""
    if arch not in ABLE:
        return Verdict(False, f"DeepGEMM is for {', '.join(ABLE)}, not for {arch}")
    return probe.offers("deep_gemm", *functions)


# Products with quantised weights


def gemm_verdict(arch: str, fmt: Format, rows: int, columns: int) -> Verdict:
    """Whether a weight [rows, columns] in this format can be multiplied."""
    if fmt.name not in ABLE[arch].weights:
        return Verdict(False, f"DeepGEMM multiplies {' and '.join(ABLE[arch].weights)} on {arch}, not {fmt.name}")
    if rows % 64 or columns % 128:
        return Verdict(False, f"DeepGEMM needs 64 n rows and 128 n columns, a weight has {rows} and {columns}")
    return YES


def row_scales(scales: Tensor, arch: str) -> Tensor:
    """Scales e8m0 [M, S] of activations, as the kernels read them: float32 on sm_90, four in a word elsewhere."""
    return layouts.mn_major(scales.to(torch.float32) if arch == "sm_90" else layouts.packed_e8m0(scales))


def weight_scales(w: Weight, arch: str) -> Tensor:
    """Scales of a weight [..., N, K], as the kernels read them: float32 per block on sm_90; elsewhere one for every
    row, four in a word."""
    assert w.scale is not None
    if arch == "sm_90":
        return w.scale.to(torch.float32).contiguous()
    each = w.scale if w.format.name == "mxfp4" else layouts.a_row_each(w.scale, w.shape[-2], SCALE_ROWS)
    return layouts.mn_major(layouts.packed_e8m0(each))


def _recipe(w: Weight, arch: str) -> dict[str, tuple[int, ...]]:
    """Rows and columns that share a scale."""
    if arch == "sm_90":
        return {"recipe": (1, SCALE_ROWS, 128)}
    return {"recipe_a": (1, 128), "recipe_b": (1, 32 if w.format.name == "mxfp4" else 128)}


def linear(x: QTensor, w: Weight, scales: Tensor, made: Tensor, arch: str) -> Tensor:
    """x [M, K] e4m3_1x128 times w [N, K] transposed into made [M, N] bfloat16; scales from `weight_scales`."""
    assert x.scale is not None
    if len(made):
        a, b = (x.data.contiguous(), row_scales(x.scale, arch)), (w.data.contiguous(), scales)
        probe.load("deep_gemm").fp8_fp4_gemm_nt(a, b, made, **_recipe(w, arch))
    return made


def grouped_linear(x: QTensor, w: Weight, scales: Tensor, offsets: Tensor, arch: str) -> Tensor:
    """Rows of group e times w[e] [N, K] transposed: x [M, K] e4m3_1x128, offsets [E + 1] -> [M, N] bfloat16."""
    assert x.scale is not None
    library, rows = probe.load("deep_gemm"), x.shape[0]
    if not rows:
        return torch.empty(0, w.shape[1], dtype=torch.bfloat16, device=x.device)
    groups = layouts.padded_groups(offsets, rows, int(library.get_mk_alignment_for_contiguous_layout()))
    codes = x.data.view(torch.uint8)[groups.source].view(x.data.dtype)
    spread = x.scale.view(torch.uint8)[groups.source].view(x.scale.dtype)
    made = torch.empty(len(codes), w.shape[1], dtype=torch.bfloat16, device=x.device)
    a, b = (codes, row_scales(spread, arch)), (w.data.contiguous(), scales)
    library.m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, made, groups.group, **_recipe(w, arch))
    return made[groups.place]


# Scores of the indexer


def index_verdict(arch: str, fmt: Format | None, heads: int, dim: int) -> Verdict:
    """Whether keys of this format can be scored."""
    name = "unrounded" if fmt is None else fmt.name
    if name not in ABLE[arch].index:
        return Verdict(False, f"DeepGEMM scores keys in {' and '.join(ABLE[arch].index)} on {arch}, not {name} ones")
    if heads > ABLE[arch].heads[-1] or dim != INDEX_DIM:
        return Verdict(
            False, f"DeepGEMM scores up to {ABLE[arch].heads[-1]} heads of {INDEX_DIM}, not {heads} of {dim}"
        )
    return YES


def _queries(q: QTensor, weights: Tensor, arch: str) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """q [T, H, D] and weights [T, H] -> what the library takes, with heads of zero to a number that it knows. MXFP4
    queries bring their scales, four in a word. A scale of an FP8 row is positive, and goes through the relu into the
    weights."""
    assert q.scale is not None
    codes, scales, wide = (
        layouts.more_heads(x, 1, ABLE[arch].heads) for x in (q.data, q.scale, weights.to(torch.float32))
    )
    if q.format.name == "mxfp4":
        return (codes.contiguous(), layouts.packed_e8m0(scales).squeeze(-1)), wide.contiguous()
    return (codes.contiguous(), None), wide * scales.squeeze(-1)


def schedule(lengths: Tensor, rows: int) -> Tensor:
    """How the library spreads the blocks of keys over the GPU; lengths int32 [T, 1]. The same in every layer."""
    library = probe.load("deep_gemm")
    return library.get_paged_mqa_logits_metadata(lengths, rows, library.get_num_sms())


def paged_scores(
    q: QTensor,
    weights: Tensor,
    pool: Tensor,
    rows: int,
    lengths: Tensor,
    table: Tensor,
    plan: Tensor,
    count: int,
    arch: str,
) -> Tensor:
    """Scores float32 [T, count]; those beyond a token's length are anything.

    q, weights      [T, H, D] in the format of the keys, [T, H]
    pool, rows      index_fp8 or index_fp4 rows, `rows` a block
    lengths, table  int32 [T, 1] and [T, blocks]: how many keys each token sees, and the blocks they lie in
    plan            from `schedule`
    """
    queries, scaled = _queries(q, weights, arch)
    codes, scales = queries
    queries = codes.unsqueeze(1), None if scales is None else scales.unsqueeze(1)
    cache = layouts.index_cache(pool, rows)
    return probe.load("deep_gemm").fp8_fp4_paged_mqa_logits(queries, cache, scaled, lengths, table, plan, count)


def packed_scores(q: QTensor, weights: Tensor, keys: QTensor, start: Tensor, stop: Tensor, arch: str) -> Tensor:
    """Scores float32 [T, N] of keys [N, D] in MXFP4, side by side; those outside start .. stop - 1 (int32 [T]) are
    anything."""
    assert keys.scale is not None
    queries, scaled = _queries(q, weights, arch)
    stored = keys.data.contiguous(), layouts.packed_e8m0(keys.scale).squeeze(-1)
    return probe.load("deep_gemm").fp8_fp4_mqa_logits(queries, stored, scaled, start, stop, max_seqlen_k=0)


# The projection of a hyper-connection


def hc_verdict(channels: int) -> Verdict:
    """Whether a matrix of that many channels can be multiplied."""
    if channels % HC_CHANNELS:
        return Verdict(False, f"DeepGEMM needs {HC_CHANNELS} n channels of all streams together, not {channels}")
    return YES


def hc_matrix(fn: Tensor) -> Tensor:
    """fn float32 [R, K] -> its three TF32 parts, one under the other, with rows of zeros to a multiple of 8."""
    parts = layouts.tf32_parts(fn.to(torch.float32).contiguous())
    made = parts.new_zeros(layouts.up(len(parts), 8), parts.shape[1])
    made[: len(parts)] = parts
    return made


def hc_project(x: Tensor, matrix: Tensor, rows: int) -> Tensor:
    """Sums that make the projection of x bfloat16 [T, K] by fn [rows, K], float32 [3, T, rows + 1]: products with the
    rows of fn, and squares behind them, as `triton_kernels.hyper_connection.project` has them.

    The library's units multiply TF32 values, which fn's are not; the three parts of it in `matrix` are. So the products
    are exact all the same, at the price of reading x once for every 32 rows.
    """
    x, products = x.contiguous(), []
    square = x.new_empty(len(x), dtype=torch.float32)
    for some in matrix.split(HC_ROWS):
        products.append(x.new_empty(len(x), len(some), dtype=torch.float32))
        if len(x):
            probe.load("deep_gemm").tf32_hc_prenorm_gemm(x, some, products[-1], square, num_splits=None)
    parts = square.new_zeros(3, len(x), rows + 1)
    parts[..., :rows] = torch.cat(products, 1)[:, : 3 * rows].unflatten(1, (3, rows)).transpose(0, 1)
    parts[0, :, rows] = square
    return parts


# The fused experts


def mega_verdict(arch: str, activation: Format | None, hidden: int, inner: int) -> Verdict:
    """Whether it has the fused experts for this profile and these widths. Its communication wants a process group
    even on one rank, and here it is used on one rank only."""
    if not ABLE[arch].mega_moe:
        return Verdict(False, f"DeepGEMM's fused experts are not for {arch}")
    if activation != MEGA_ROWS:
        name = "nothing" if activation is None else activation.name
        return Verdict(False, f"DeepGEMM's fused experts round inputs to {MEGA_ROWS.name}, this profile to {name}")
    if hidden % 128 or inner % 128:
        return Verdict(False, f"DeepGEMM's fused experts need widths of 128 n, not {hidden} and {inner}")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Verdict(
            False,
            "DeepGEMM's fused experts need a process group, of one rank at least",
            "torch.distributed.init_process_group before the model is loaded",
        )
    ranks = torch.distributed.get_world_size()
    return YES if ranks == 1 else Verdict(False, f"DeepGEMM's fused experts are used on one rank, not on {ranks}")


def mega_weights(w13: Weight, w2: Weight) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights in MXFP4 as the fused experts read them: gate and up rows of w13 in turns of eight, and scales in the
    order in which a tensor core copies them. A second copy of w13: the first stays what others read."""
    assert w13.scale is not None and w2.scale is not None
    first, second = layouts.packed_e8m0(layouts.interleaved(w13.scale)), layouts.packed_e8m0(w2.scale)
    return (
        (layouts.interleaved(w13.data), layouts.mn_major(layouts.utccp(first))),
        (w2.data.contiguous(), layouts.mn_major(layouts.utccp(second))),
    )


def mega_buffer(experts: int, tokens: int, k: int, hidden: int, inner: int) -> Any:
    """Room for at least `tokens` tokens of input and everything in between; a power of two, so that few are made."""
    most = 1 << max(7, math.ceil(math.log2(max(1, tokens))))
    group = torch.distributed.group.WORLD
    return probe.load("deep_gemm").get_symm_buffer_for_mega_moe(group, experts, most, k, hidden, inner)


def mega_moe(
    x: QTensor,
    ids: Tensor,
    weights: Tensor,
    prepared: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    limit: float | None,
    buffer: Any,
) -> Tensor:
    """x [T, d] mxfp8, ids and weights [T, k] -> [T, d] bfloat16; `prepared` from `mega_weights`."""
    assert x.scale is not None
    tokens, made = x.shape[0], torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    buffer.x[:tokens].view(torch.uint8).copy_(x.data.view(torch.uint8))
    buffer.x_sf[:tokens].copy_(layouts.packed_e8m0(x.scale))
    buffer.topk_idx[:tokens].copy_(ids)
    buffer.topk_weights[:tokens].copy_(weights)
    probe.load("deep_gemm").fp8_fp4_mega_moe(
        made, *prepared, buffer, activation="swiglu", activation_clamp=limit, fast_math=False
    )
    return made
