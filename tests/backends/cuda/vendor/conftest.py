"""Stand-ins for DeepGEMM and FlashMLA: modules that check what the libraries' hosts check, and compute what they
document, slowly, from the layouts they document. Nothing here is shared with what is tested. What a library leaves
unwritten is NaN.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backend import Verdict
from dsv4_hal.numerics import deployed

NAN = float("nan")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
GROUP_ALIGN = 16  # rows; the real one is larger, and asked for


def up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def power(exponent: Tensor) -> Tensor:
    """Stored exponents 0..255 -> powers of two."""
    return torch.exp2(exponent.double() - 127)


def operand(codes: Tensor) -> Tensor:
    """e4m3, or packed e2m1 with the even column in the low nibble -> values."""
    assert codes.is_contiguous()
    if codes.dtype == torch.float8_e4m3fn:
        return codes.double()
    assert codes.dtype == torch.int8
    out = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=torch.float64)
    out[..., 0::2], out[..., 1::2] = E2M1[(codes & 15).int()], E2M1[((codes >> 4) & 15).int()]
    return out


def word_bytes(words: Tensor) -> Tensor:
    """int32 [..., S] -> the four bytes of each, lowest first, [..., 4 S]."""
    return torch.stack([(words >> (8 * j)) & 255 for j in range(4)], -1).flatten(-2)


def scaled(values: Tensor, sf: Tensor, rows: int, columns: int, words: bool) -> Tensor:
    """values [..., MN, K] times their scales, one per `rows` x `columns`."""
    mn, k = values.shape[-2:]
    if words:
        assert sf.dtype == torch.int32 and rows == 1 and sf.shape[-2:] == (mn, -(-k // (4 * columns)))
        check_mn_major(sf)
        scale = power(word_bytes(sf))
    else:
        assert sf.dtype == torch.float32 and sf.shape[-2:] == (-(-mn // rows), -(-k // columns))
        if rows == 1:
            check_mn_major(sf)
        else:
            assert sf.is_contiguous()
        scale = sf.double()
    at_row, at_column = torch.arange(mn) // rows, torch.arange(k) // columns
    return values * scale[..., at_row, :][..., at_column]


def check_mn_major(sf: Tensor) -> None:
    aligned = up(sf.shape[-2], 4)
    assert sf.stride(-2) == 1 or sf.shape[-2] == 1
    assert sf.stride(-1) == aligned
    assert sf.dim() == 2 or sf.stride(0) == aligned * sf.shape[-1]


def recipes(recipe: Any, recipe_a: Any, recipe_b: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    assert (recipe is None) != (recipe_a is None)
    if recipe is not None:
        return (recipe[0], recipe[2]), (recipe[1], recipe[2])
    return recipe_a, recipe_b


def deep_gemm(arch: str) -> types.ModuleType:
    module: Any = types.ModuleType("deep_gemm")
    module.__version__, module.calls, words = "0.0 (a stand-in)", [], arch != "sm_90"

    def product(a: Any, b: Any, d: Tensor, ra: Any, rb: Any) -> tuple[Tensor, Tensor]:
        assert words or b[0].dtype == torch.float8_e4m3fn, "FP4 is for sm_100"
        assert d.dtype == torch.bfloat16 and d.stride(-1) == 1
        assert b[0].shape[-2] % 64 == 0 and a[0].shape[-1] % 128 == 0
        return scaled(operand(a[0]), a[1], *ra, words), scaled(operand(b[0]), b[1], *rb, words)

    def fp8_fp4_gemm_nt(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk"):  # type: ignore[no-untyped-def]
        module.calls.append("fp8_fp4_gemm_nt")
        x, w = product(a, b, d, *recipes(recipe, recipe_a, recipe_b))
        d.copy_(x @ w.T)

    def m_grouped_fp8_fp4_gemm_nt_contiguous(  # type: ignore[no-untyped-def]
        a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk"
    ):
        module.calls.append("m_grouped_fp8_fp4_gemm_nt_contiguous")
        x, w = product(a, b, d, *recipes(recipe, recipe_a, recipe_b))
        assert grouped_layout.dtype == torch.int32 and grouped_layout.shape == (len(x),)
        assert len(x) % GROUP_ALIGN == 0
        d.fill_(NAN)
        for start in range(0, len(x), GROUP_ALIGN):  # a tile reads its group from its first row
            tile = grouped_layout[start : start + GROUP_ALIGN].tolist()
            assert set(tile) <= {tile[0], -1} and tile == sorted(tile, reverse=True)
            if tile[0] >= 0:
                count = sum(g >= 0 for g in tile)
                d[start : start + count] = (x[start : start + count] @ w[tile[0]].T).to(d.dtype)

    def scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """q [H, D], k [N, D], weights [H] -> [N]."""
        return ((q @ k.T).relu() * weights.double()[:, None]).sum(0)

    def queries(q: Any, weights: Tensor, heads_at: int) -> Tensor:
        codes, sf = q
        assert weights.dtype == torch.float32 and weights.stride(1) == 1
        assert codes.shape[heads_at] in ((8, 16, 32, 64) if words else (32, 64))
        values = operand(codes)
        assert values.shape[-1] == 128
        if sf is None:
            assert codes.dtype == torch.float8_e4m3fn
            return values
        assert words and sf.dtype == torch.int32 and sf.shape == codes.shape[:-1] and sf.is_contiguous()
        return values * power(word_bytes(sf[..., None])).repeat_interleave(32, -1)

    def fp8_fp4_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k):  # type: ignore[no-untyped-def]
        module.calls.append("fp8_fp4_mqa_logits")
        assert max_seqlen_k == 0 and cu_seq_len_k_start.dtype == cu_seq_len_k_end.dtype == torch.int32
        values, (codes, sf) = queries(q, weights, 1), kv
        assert sf.shape == codes.shape[:1]
        scale = sf.double()[:, None] if q[1] is None else power(word_bytes(sf[:, None])).repeat_interleave(32, -1)
        keys, out = operand(codes) * scale, torch.full((len(values), len(codes)), NAN)
        for t, (start, stop) in enumerate(zip(cu_seq_len_k_start.tolist(), cu_seq_len_k_end.tolist(), strict=True)):
            out[t, start:stop] = scores(values[t], keys[start:stop], weights[t]).float()
        return out

    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):  # type: ignore[no-untyped-def]
        assert context_lens.dtype == torch.int32 and context_lens.dim() == 2 and context_lens.is_contiguous()
        assert block_kv in (32, 64)
        return torch.zeros(num_sms + 1, 2, dtype=torch.int32)

    def fp8_fp4_paged_mqa_logits(  # type: ignore[no-untyped-def]
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len
    ):
        module.calls.append("fp8_fp4_paged_mqa_logits")
        values = queries(q, weights, 2)
        _, rows, one, width = kv_cache.shape
        code_bytes = 128 if q[1] is None else 64
        assert one == 1 and width == code_bytes + 4 and kv_cache.dtype == torch.uint8
        assert kv_cache.stride(1) == width and kv_cache.stride(0) % 16 == 0
        assert block_table.dtype == torch.int32 and schedule_meta.shape == (133, 2)
        out = torch.full((len(values), max_context_len), NAN)
        for t in range(len(values)):
            keys = []
            for s in range(int(context_lens[t, 0])):
                block = kv_cache[int(block_table[t, s // rows])].flatten()  # codes of all rows, then scales of all rows
                row = s % rows
                codes = block[row * code_bytes : (row + 1) * code_bytes]
                at = rows * code_bytes + row * 4
                if q[1] is None:
                    scale = block[at : at + 4].view(torch.float32).double()
                    keys.append(codes.view(torch.float8_e4m3fn).double() * scale)
                else:
                    keys.append(operand(codes.view(torch.int8)) * power(block[at : at + 4]).repeat_interleave(32))
            if keys:
                out[t, : len(keys)] = scores(values[t, 0], torch.stack(keys), weights[t]).float()
        return out

    def tf32_hc_prenorm_gemm(a, b, d, sqr_sum, num_splits=None):  # type: ignore[no-untyped-def]
        module.calls.append("tf32_hc_prenorm_gemm")
        (m, k), (n, _) = a.shape, b.shape
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()
        assert n <= 32 and n % 8 == 0 and k % 64 == 0
        assert d.shape == (m, n) and d.is_contiguous() and sqr_sum.shape == (m,) and num_splits is None
        rounded = (b.view(torch.int32) & ~0x1FFF).view(torch.float32)
        d.copy_(a.float() @ rounded.T)
        sqr_sum.copy_(a.float().square().sum(1))

    def get_symm_buffer_for_mega_moe(  # type: ignore[no-untyped-def]
        group, num_experts, num_max_tokens_per_rank, num_topk, hidden, intermediate_hidden
    ):
        module.calls.append("get_symm_buffer_for_mega_moe")
        most = num_max_tokens_per_rank
        return types.SimpleNamespace(
            x=torch.zeros(most, hidden, dtype=torch.float8_e4m3fn),
            x_sf=torch.zeros(most, hidden // 128, dtype=torch.int32),
            topk_idx=torch.zeros(most, num_topk, dtype=torch.int64),
            topk_weights=torch.zeros(most, num_topk),
        )

    def mega_matrix(codes: Tensor, sf: Tensor) -> Tensor:
        """[E, N, K] with scales of 32 columns, whose rows are stored transposed in every 128."""
        experts, n, k = codes.shape[0], codes.shape[1], 2 * codes.shape[2]
        assert codes.is_contiguous() and sf.shape == (experts, n, k // 128) and n % 128 == 0
        check_mn_major(sf)
        stored = torch.tensor([m // 128 * 128 + m % 32 * 4 + m % 128 // 32 for m in range(n)])
        return operand(codes) * power(word_bytes(sf[:, stored])).repeat_interleave(32, -1)

    def fp8_fp4_mega_moe(  # type: ignore[no-untyped-def]
        y, l1_weights, l2_weights, sym_buffer, activation="swiglu", activation_clamp=None, fast_math=True
    ):
        module.calls.append("fp8_fp4_mega_moe")
        assert words and y.dtype == torch.bfloat16
        first, second, tokens = mega_matrix(*l1_weights), mega_matrix(*l2_weights), len(y)
        half = first.shape[1] // 2
        gate_at = torch.tensor([i // 8 * 16 + i % 8 for i in range(half)])
        x = sym_buffer.x[:tokens].double() * power(word_bytes(sym_buffer.x_sf[:tokens])).repeat_interleave(32, -1)
        total = torch.zeros(tokens, second.shape[1])
        for t in range(tokens):
            for expert, weight in zip(sym_buffer.topk_idx[t].tolist(), sym_buffer.topk_weights[t], strict=True):
                both = (first[expert] @ x[t]).bfloat16().float()
                gate, other = both[gate_at], both[gate_at + 8]
                if activation_clamp is not None:
                    gate, other = gate.clamp(max=activation_clamp), other.clamp(-activation_clamp, activation_clamp)
                hidden = (gate * gate.sigmoid() * other * weight).view(-1, 32)
                scale = torch.exp2((hidden.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448).log2().ceil())
                coded = (hidden / scale).to(torch.float8_e4m3fn).float() * scale
                total[t] += (second[expert] @ coded.flatten().double()).bfloat16().float()
        y.copy_(total)

    module.get_num_sms = lambda: 132
    module.get_mk_alignment_for_contiguous_layout = lambda: GROUP_ALIGN
    for function in (
        fp8_fp4_gemm_nt,
        m_grouped_fp8_fp4_gemm_nt_contiguous,
        fp8_fp4_mqa_logits,
        get_paged_mqa_logits_metadata,
        fp8_fp4_paged_mqa_logits,
        tf32_hc_prenorm_gemm,
        get_symm_buffer_for_mega_moe,
        fp8_fp4_mega_moe,
    ):
        setattr(module, function.__name__, function)
    return module


def flash_mla(legacy: bool = False) -> types.ModuleType:
    """legacy: SGLang's, which keeps the kernels for these rows as an option."""
    module: Any = types.ModuleType("flash_mla")
    module.__version__, module.calls = "0.0 (a stand-in)", []

    def attend(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [H, D], rows [N, D] -> [H, D] and lse [H]. Probabilities meet the values in bfloat16, relative to the
        largest score; the real kernels' are relative to the largest one so far."""
        if not len(rows):
            return torch.zeros(q.shape), torch.full(q.shape[:1], float("inf"))
        score = q.float() @ rows.float().T * scale
        peak, lse = score.amax(1, keepdim=True), score.logsumexp(1)
        p = (score - peak).exp()
        return p.bfloat16().float() @ rows.float() / (p.sum(1) + (sink - peak[:, 0]).exp())[:, None], lse

    def checked(q: Tensor, sink: Tensor, index: Tensor, step: int) -> None:
        assert q.dtype == torch.bfloat16 and q.stride(-1) == 1 and q.shape[-1] == 512 and q.shape[-2] in (64, 128)
        assert sink.dtype == torch.float32 and sink.shape == q.shape[-2:-1] and sink.is_contiguous()
        assert index.dtype == torch.int32 and index.stride(-1) == 1
        assert index.shape[-1] % step == 0 and index.shape[-1] > 0

    def cache_row(cache: Tensor, place: int) -> Tensor:
        """The row at block * rows + row, from its bytes."""
        rows = cache.shape[1]
        block, row = cache[place // rows].flatten(), place % rows
        data = block[576 * row : 576 * row + 576]
        scale = power(block[576 * rows + 8 * row : 576 * rows + 8 * row + 7])
        values = data[:448].view(torch.float8_e4m3fn).double() * scale.repeat_interleave(64)
        return torch.cat([values.bfloat16(), data[448:].view(torch.bfloat16)])

    def check_cache(cache: Tensor) -> None:
        assert cache.dtype == torch.uint8 and cache.shape[2:] == (1, 584)
        assert cache.stride(3) == 1 and cache.stride(1) == 584 and cache.stride(0) % 576 == 0

    def flash_mla_with_kvcache(  # type: ignore[no-untyped-def]
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        softmax_scale=None,
        causal=False,
        is_fp8_kvcache=None,
        indices=None,
        attn_sink=None,
        extra_k_cache=None,
        extra_indices_in_kvcache=None,
    ):
        module.calls.append("flash_mla_with_kvcache")
        assert head_dim_v == 512 and not causal and is_fp8_kvcache
        checked(q, attn_sink, indices, 64)
        shape = (q.shape, indices.shape, None if extra_k_cache is None else extra_indices_in_kvcache.shape)
        assert tile_scheduler_metadata.setdefault("shape", shape) == shape
        scopes = [(k_cache, indices)]
        if extra_k_cache is not None:
            checked(q, attn_sink, extra_indices_in_kvcache, 64)
            scopes.append((extra_k_cache, extra_indices_in_kvcache))
        batch, tokens, heads, dim = q.shape
        out, lse = torch.empty(batch, tokens, heads, dim), torch.empty(batch, heads, tokens)
        for b in range(batch):
            for t in range(tokens):
                found = []
                for cache, index in scopes:
                    check_cache(cache)
                    found += [cache_row(cache, place) for place in index[b, t].tolist() if place != -1]
                rows = torch.stack(found) if found else torch.empty(0, dim)
                out[b, t], lse[b, :, t] = attend(q[b, t], rows, attn_sink, softmax_scale)
        return out.bfloat16(), lse

    def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None):  # type: ignore[no-untyped-def]
        module.calls.append("flash_mla_sparse_fwd")
        assert kv.dtype == torch.bfloat16 and kv.shape[1:] == (1, 512) and kv.is_contiguous() and d_v == 512
        checked(q, attn_sink, indices, 128)
        made = [
            attend(q[t], kv[[i for i in indices[t, 0].tolist() if 0 <= i < len(kv)], 0], attn_sink, sm_scale)
            for t in range(len(q))
        ]
        out, lse = (torch.stack(parts) for parts in zip(*made, strict=True))
        return out.bfloat16(), lse, lse

    module.get_mla_metadata = lambda *args, **kwargs: ({}, None)
    module.flash_mla_with_kvcache, module.flash_mla_sparse_fwd = flash_mla_with_kvcache, flash_mla_sparse_fwd
    if legacy:

        def with_kvcache(  # type: ignore[no-untyped-def]
            *args, extra_k_cache=None, enable_batch_invariant=False, use_legacy=False, **kwargs
        ):
            assert use_legacy and not enable_batch_invariant
            return flash_mla_with_kvcache(*args, extra_k_cache=extra_k_cache, **kwargs)

        def sparse_fwd(*args, use_legacy=False, **kwargs):  # type: ignore[no-untyped-def]
            assert use_legacy
            return flash_mla_sparse_fwd(*args, **kwargs)

        module.flash_mla_with_kvcache, module.flash_mla_sparse_fwd = with_kvcache, sparse_fwd
        module.has_legacy = lambda: True
    return module


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    from dsv4_hal.backends.cuda.vendor import probe

    probe.verdict.cache_clear()
    yield
    probe.verdict.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of the device finds one."""
    from dsv4_hal.backends.cuda.vendor import probe

    monkeypatch.setattr(probe, "device", lambda: Verdict(True, "a stand-in"))


@pytest.fixture
def vendor(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """vendor(arch, numerics=deployed(), **modules): the backend on an architecture, with stand-ins, or other modules
    (None: absent)."""

    def make(arch: str = "sm_100", numerics: Any = None, **modules: Any) -> Any:
        from dsv4_hal.backends.cuda.vendor import probe
        from dsv4_hal.backends.cuda.vendor.backend import CudaVendor

        given = {"deep_gemm": deep_gemm(arch), "flash_mla": flash_mla()} | modules
        for name, module in given.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv("DSV4_HAL_ASSUME", arch)
        probe.verdict.cache_clear()
        return CudaVendor(numerics or deployed(), "cpu")

    return make


@pytest.fixture
def stand_ins() -> types.SimpleNamespace:
    """The makers of stand-ins."""
    return types.SimpleNamespace(deep_gemm=deep_gemm, flash_mla=flash_mla)
