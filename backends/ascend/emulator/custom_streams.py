"""vllm-ascend's operators around hyper-connections and rotary embedding, from its sources, commit 182b75ea.

Schemas: csrc/torch_binding.cpp. What `npu_hc_pre_v2` computes, its product in HF32 included, is said by the golden test
tests/e2e/nightly/single_node/ops/singlecard_ops/test_npu_hc_pre.py; the others by their callers in
vllm_ascend/models/deepseek_v4/model.py and vllm_ascend/attention/dsa_v1.py. None of it was compared with a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import NO_META, emulated
from dsv4_hal.backends.ascend.emulator.numbers import to_hf32
from dsv4_hal.backends.ascend.emulator.stream_rules import RULES


@emulated(
    "_C_ascend::npu_hc_pre_v2",
    schema="(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, int hc_sinkhorn_iters, "
    "float norm_eps, float hc_eps) -> (Tensor out0, Tensor out1, Tensor out2)",
    meta=NO_META,
    rules=RULES,
)
def npu_hc_pre_v2(
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., n, d] -> what the sub-layer reads [..., d], post [..., n], comb [..., n, n] after Sinkhorn."""
    n, wide = hc_mult, x.to(torch.float32)
    flat = wide.flatten(-2)
    inverse = 1 / torch.sqrt((flat * flat).mean(-1, keepdim=True) + norm_eps)
    mix = (to_hf32(flat) @ to_hf32(hc_fn).mT) * inverse
    pre = torch.sigmoid(mix[..., :n] * hc_scale[0] + hc_base[:n]) + hc_eps
    post = 2 * torch.sigmoid(mix[..., n : 2 * n] * hc_scale[1] + hc_base[n : 2 * n])
    comb = (mix[..., 2 * n :] * hc_scale[2] + hc_base[2 * n :]).unflatten(-1, (n, n))
    comb = torch.exp(comb - comb.amax(-1, keepdim=True))
    comb = comb / comb.sum(-1, keepdim=True) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    return (pre[..., None] * wide).sum(-2).to(x.dtype), post, comb


@emulated(
    "_C_ascend::npu_hc_post",
    schema="(Tensor x, Tensor residual, Tensor post, Tensor comb) -> (Tensor out)",
    meta=NO_META,
    rules=RULES,
)
def npu_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """out[b, s, k] = post[b, s, k] x[b, s] + sum over j of comb[b, s, j, k] residual[b, s, j], in residual's dtype."""
    wide = torch.float32
    mixed = torch.einsum("bsjk,bsjd->bskd", comb.to(wide), residual.to(wide))
    return (mixed + post.to(wide)[..., None] * x.to(wide)[..., None, :]).to(residual.dtype)


@emulated(
    "_C_ascend::inplace_partial_rotary_mul",
    schema="(Tensor(a!) x, Tensor r1, Tensor r2, str rotary_mode, int[] partial_slice) -> ()",
    meta=NO_META,
    rules=RULES,
)
def inplace_partial_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: list[int]) -> None:
    """Turns channels partial_slice[0] .. partial_slice[1] - 1 of x [B, S, N, D] in pairs (2i, 2i + 1): a pair (a, b)
    becomes (a r1 - b r2, b r1 + a r2). Mode "interleave", the one that is used, is the one that is emulated."""
    first, last = partial_slice
    part = x[..., first:last].to(torch.float32)
    swapped = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
    x[..., first:last] = (part * r1.to(torch.float32) + swapped * r2.to(torch.float32)).to(x.dtype)
