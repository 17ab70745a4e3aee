"""Hyper-connections: sums in parts, any number of streams, and no token that hangs on its neighbours. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.triton_kernels import hyper_connection as kernels


def mixing(n: int, d: int, rows: int, scales: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(rows, n * d) * (n * d) ** -0.5, torch.randn(rows), torch.randn(scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_hang_on_its_neighbours(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "TOKENS", 16)
    n, d, last = 2, 72, 16
    streams, weight = torch.randn(last + 1, n, d).to(dtype), torch.randn(d)
    given = (*mixing(n, d, 2 * n + n * n, 3), 1e-6, 1e-6, 2, weight)
    together = kernels.join(streams, *given)
    back = kernels.spread(together[0][last:], streams[last:], *(m[last:] for m in together[1:]))
    alone = kernels.join(streams[last:], *given)
    for one, every in zip(alone, together, strict=True):
        assert torch.equal(one[0], every[last])
    assert torch.equal(kernels.spread(alone[0], streams[last:], *alone[1:]), back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_projection_is_exact_but_for_its_sum(dtype):
    """More than one part, whose last is not full; a stream of one token is far larger than the others."""
    n, d = 2, kernels.CHUNK + 100
    streams = torch.randn(2, n, d).to(dtype)
    streams[0, 1] *= 256
    fn, base, scale = mixing(n, d, n, 1)
    got, _, _ = kernels.join(streams, fn, base, scale, 1e-6, 1e-6)
    u = streams.double().flatten(1)
    mix = (u @ fn.double().T) * (u.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    share = torch.sigmoid(mix * scale.double() + base.double()) + 1e-6
    want = (share[..., None] * streams.double()).sum(1)
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_any_number_of_streams(n):
    d = 24
    streams = torch.randn(3, n, d)
    fn, base, scale = mixing(n, d, 2 * n + n * n, 3)
    x, post, comb = kernels.join(streams, fn, base, 10 * scale, 1e-6, 1e-6, 60)
    assert x.shape == (3, d)
    assert ((post > 0) & (post <= 2)).all()
    torch.testing.assert_close(comb.sum(1), torch.ones(3, n), rtol=1e-3, atol=1e-3)
    out = kernels.spread(x, streams, post, comb)
    want = post[..., None] * x[:, None] + comb.transpose(1, 2) @ streams
    torch.testing.assert_close(out, want)
