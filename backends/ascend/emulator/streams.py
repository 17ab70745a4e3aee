"""The hyper-connections of Ascend 950: mhc_pre, mhc_sinkhorn, mhc_post. Read from documents, not run.

Formulas: ops-transformer, mhc/mhc_pre/README.md (commit 37b9e45d), mhc_sinkhorn/docs/aclnnMhcSinkhorn.md (2f8255ac),
mhc_post/README.md (37b9e45d). T tokens, n streams of D; x may be [T, n, D] or [B, S, n, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend.emulator.call import emulated, meta_differs
from dsv4_hal.backends.ascend.emulator.numbers import to_hf32

FP32 = torch.float32


@emulated(
    "npu::npu_mhc_pre",
    meta=meta_differs("with out_flag 0 it names three results that op-plugin does not return", results=(3, 4, 5)),
)
def npu_mhc_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    norm_eps: float,
    hc_eps: float,
    out_flag: int,
    inner_precise: int,
) -> tuple[Tensor | None, ...]:
    """h_in [T, D] of x's dtype, h_post [T, n], h_res [T, n, n] before Sinkhorn; then 1 / rms, mix, h_pre, or None.

    phi [n * n + 2 * n, n * D] maps the streams to mixing weights, alpha [3] and bias scale and move them: first those
    that read (sigmoid, plus hc_eps), then those that write (twice a sigmoid), then the n * n of h_res. inner_precise 1
    is HF32, of which the documents do not say how it rounds: here both factors are cut to 10 bits of mantissa.
    """
    n = x.shape[-2]
    wide = x.to(FP32)
    flat = wide.flatten(-2)
    inv_rms = (flat.square().mean(-1) + norm_eps).rsqrt()
    left = flat if gamma is None else flat * gamma.flatten()
    mix = (to_hf32(left) @ to_hf32(phi).mT) if inner_precise else left @ phi.mT
    pre, post, res = (mix * inv_rms.unsqueeze(-1)).split([n, n, n * n], -1)
    to_pre, to_post, to_res = bias.split([n, n, n * n])
    h_pre = (pre * alpha[0] + to_pre).sigmoid() + hc_eps
    h_post = 2 * (post * alpha[1] + to_post).sigmoid()
    h_res = (res * alpha[2] + to_res).unflatten(-1, (n, n))
    h_in = (h_pre.unsqueeze(-1) * wide).sum(-2).to(x.dtype)
    extra = (inv_rms, mix, h_pre) if out_flag else (None, None, None)
    return h_in, h_post, h_res, *extra


@emulated("npu::npu_mhc_sinkhorn")
def npu_mhc_sinkhorn(x: Tensor, eps: float, num_iters: int, out_flag: int) -> tuple[Tensor, None, None]:
    """Rows through a softmax, plus eps; columns divided by sum + eps; then num_iters - 1 times rows and columns."""
    m = x.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m, None, None


@emulated("npu::npu_mhc_post")
def npu_mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor) -> Tensor:
    """h_res transposed, times x, plus h_out times h_post of a stream: [T, n, D] of x's dtype, computed in float32."""
    mixed = x.to(FP32) if h_res is None else h_res.mT @ x.to(FP32)
    return (mixed + h_post.unsqueeze(-1) * h_out.to(FP32).unsqueeze(-2)).to(x.dtype)
