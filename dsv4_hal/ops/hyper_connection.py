"""Manifold-constrained hyper-connections (mHC): n residual streams, mixed around every sub-layer."""

from __future__ import annotations

from torch import Tensor

from dsv4_hal.ops.cases import hyper_connection as cases
from dsv4_hal.ops.norm_rope import NormRope
from dsv4_hal.ops.spec import Compare, ContractError, Tolerance, composite, primitive

_MIX = Tolerance(Compare.NMSE, 4.0, "the order of the long projection's sum and the exponentials are free")


class HyperConnection(NormRope):
    @primitive(_MIX, cases.hc_pre, grad=("streams", "fn", "base", "scale"))
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a sub-layer reads, and how its result will be mixed back.

        streams  [T, n, d] in storage
        fn       [2 n + n^2, n d], base [2 n + n^2], scale [3], all float32 in the checkpoint
        returns  x [T, d] in storage; post [T, n] and comb [T, n, n] in numerics.accumulate

        u = streams flattened stream-major; mix = (u fn^T) * rsqrt(mean(u^2) + norm_eps)
        pre  = sigmoid(mix[:n] scale[0] + base[:n]) + eps;   x = sum_j pre[j] streams[j], rounded once
        post = 2 sigmoid(mix[n:2n] scale[1] + base[n:2n])
        comb = Sinkhorn(mix[2n:] scale[2] + base[2n:], as [n, n] row-major): softmax over the last axis, + eps, columns
        divided by (sum + eps), then iters - 1 times rows, columns likewise.
        Everything else in numerics.accumulate; where numerics.hf32, u and fn are cut to 10 bits of mantissa in front of
        their product. Source: DeepSeek-V4 report, section 2.2; published inference code.
        """
        n = streams.shape[1] if streams.dim() == 3 else 0
        rows = 2 * n + n * n
        if n == 0 or fn.shape != (rows, n * streams.shape[2]) or base.shape != (rows,) or scale.shape != (3,):
            raise ContractError(
                f"hc_pre: streams {tuple(streams.shape)}, fn {tuple(fn.shape)}, base {tuple(base.shape)}, "
                f"scale {tuple(scale.shape)}"
            )
        if iters < 1:
            raise ContractError(f"hc_pre: {iters} Sinkhorn iterations, need at least 1")

    @primitive(_MIX, cases.hc_post, grad=("y", "streams", "post", "comb"))
    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Mix a sub-layer's result y [T, d] back: out[k] = post[k] y + sum_j comb[j, k] streams[j] -> [T, n, d].

        comb is summed over its FIRST index. In numerics.accumulate, rounded once to storage.
        """
        t, n, d = streams.shape if streams.dim() == 3 else (0, 0, 0)
        if n == 0 or y.shape != (t, d) or post.shape != (t, n) or comb.shape != (t, n, n):
            raise ContractError(
                f"hc_post: y {tuple(y.shape)}, streams {(t, n, d)}, post {tuple(post.shape)}, comb {tuple(comb.shape)}"
            )

    @primitive(_MIX, cases.hc_head, grad=("streams", "fn", "base", "scale"))
    def hc_head(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float) -> Tensor:
        """Join the streams [T, n, d] in front of the output head -> [T, d] in storage.

        pre = sigmoid((u fn^T) rsqrt(mean(u^2) + norm_eps) scale[0] + base) + eps;  sum_j pre[j] streams[j].
        fn [n, n d], base [n], scale [1].
        """
        n = streams.shape[1] if streams.dim() == 3 else 0
        if n == 0 or fn.shape != (n, n * streams.shape[2]) or base.shape != (n,) or scale.shape != (1,):
            raise ContractError(
                f"hc_head: streams {tuple(streams.shape)}, fn {tuple(fn.shape)}, base {tuple(base.shape)}, "
                f"scale {tuple(scale.shape)}"
            )

    @composite(_MIX, cases.hc_pre_norm, grad=("streams", "fn", "base", "scale", "weight"))
    def hc_pre_norm(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iters: int,
        norm_eps: float,
        eps: float,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`hc_pre`, then the sub-layer's RMS norm of x with weight [d]."""
        x, post, comb = self.hc_pre(streams, fn, base, scale, iters, norm_eps, eps)
        return self.rms_norm(x, weight, norm_eps), post, comb
