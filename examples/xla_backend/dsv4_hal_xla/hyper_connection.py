"""Manifold-constrained hyper-connections."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.numerics import Numerics
from dsv4_hal_xla.bridge import bucket, dtype, einsum, jax, jnp, kernel, lax, long_sum, padded


@kernel("iters", "numerics")
def before(
    streams: Any, fn: Any, base: Any, scale: Any, norm_eps: float, eps: float, *, iters: int, numerics: Numerics
) -> Any:
    wide, n = dtype(numerics.accumulate), streams.shape[1]
    x, fn, base, scale = (a.astype(wide) for a in (streams, fn, base, scale))
    u = x.reshape(len(x), -1)
    mix = long_sum("tu,mu->tm", u, fn) * lax.rsqrt(jnp.square(u).mean(-1, keepdims=True) + norm_eps)
    pre, post, comb = (
        m * s + b for m, b, s in zip(*(jnp.split(a, [n, 2 * n], -1) for a in (mix, base)), scale, strict=True)
    )
    mixed = einsum("tn,tnd->td", jax.nn.sigmoid(pre) + eps, x).astype(dtype(numerics.storage))
    return mixed, 2 * jax.nn.sigmoid(post), sinkhorn(comb.reshape(-1, n, n), iters, eps)


def sinkhorn(logits: Any, iters: int, eps: float) -> Any:
    """Rows, then columns, `iters` times; the first row step is a softmax."""

    def divide(c: Any, axis: int) -> Any:
        return c / (c.sum(axis, keepdims=True) + eps)

    c = divide(jax.nn.softmax(logits, -1) + eps, 1)
    return lax.fori_loop(1, iters, lambda _, c: divide(divide(c, 2), 1), c)


@kernel("numerics")
def after(y: Any, streams: Any, post: Any, comb: Any, *, numerics: Numerics) -> Any:
    wide = dtype(numerics.accumulate)
    written = post[..., None] * y.astype(wide)[:, None]
    return (written + einsum("tjk,tjd->tkd", comb, streams.astype(wide))).astype(dtype(numerics.storage))


class HyperConnection(ops.HyperConnection):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(streams)
        rows = padded(streams, bucket(count))
        x, post, comb = before(rows, fn, base, scale, norm_eps, eps, iters=iters, numerics=self.numerics)
        return x[:count], post[:count], comb[:count]

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        rows = bucket(len(y))
        mixed = after(*(padded(t, rows) for t in (y, streams, post, comb)), numerics=self.numerics)
        return mixed[: len(y)]
