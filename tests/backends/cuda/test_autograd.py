"""Gradients of kernels, beside those that the contract's cases compare. Interpreted where there is no GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.cuda.autograd import CHOICES, differentiable
from dsv4_hal.backends.reference import Reference
from dsv4_hal.batch import Batch
from dsv4_hal.formats import Weight, plain_format, plain_rows
from dsv4_hal.numerics import exact
from dsv4_hal.ops import KV


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return Cuda(exact())


@pytest.fixture(scope="module")
def reference(cuda) -> Reference:
    return Reference(exact(), cuda.device)


def leaf(cuda, *shape):
    return torch.randn(shape).to(cuda.device).requires_grad_()


def test_without_need_of_gradients_kernels_leave_no_graph(cuda):
    x = leaf(cuda, 2, 8)
    with torch.no_grad():
        assert cuda.swiglu(x, None).grad_fn is None
    with torch.inference_mode():
        assert cuda.swiglu(x, None).grad_fn is None
    assert cuda.swiglu(x.detach(), None).grad_fn is None
    assert cuda.swiglu(x, None).grad_fn is not None


def test_wrapped_ops_are_the_backends_own():
    assert Cuda.origin("swiglu") == Cuda.origin("sample")
    assert Cuda.origin("swiglu").kind == "native"

    class Derived(Cuda):
        name = "derived"

        def swiglu(self, gate_up, limit, row_weight=None, *, out=None):
            return super().swiglu(gate_up, limit, row_weight, out=out)

    assert Derived.origin("swiglu").backend == "derived"
    assert (Derived.origin("rope").kind, Derived.origin("rope").backend) == ("inherited", "cuda")
    derived = Derived(exact())
    x = leaf(derived, 2, 8)
    assert torch.autograd.grad(derived.swiglu(x, None).sum(), x)[0].any()


def test_what_is_written_to_out_has_the_gradients_too(cuda):
    x, out = leaf(cuda, 3, 8), torch.empty(3, 4, device=cuda.device)
    assert cuda.swiglu(x, 1.0, out=out) is out
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(cuda.swiglu(x, 1.0).sum(), x)[0])


def test_gradients_come_twice_from_a_kept_graph_but_have_none_themselves(cuda):
    x = leaf(cuda, 3, 8)
    y = cuda.hadamard(x).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="hadamard: kernels have no second derivatives"):
        torch.autograd.grad(y, x, create_graph=True)


def test_an_argument_that_was_overwritten_is_noticed(cuda):
    x = leaf(cuda, 3, 8)
    y = cuda.hadamard(x)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_have_no_derivative_of_their_own_are_computed_again(cuda, reference):
    x, cos, sin = leaf(cuda, 3, 8), leaf(cuda, 3, 2), leaf(cuda, 3, 2)
    cotangent = torch.randn(3, 8).to(cuda.device)
    got, want = (torch.autograd.grad(ops.rope(x, (cos, sin)), [x, cos, sin], cotangent) for ops in (cuda, reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_a_norms_weight_sums_over_all_rows(cuda, reference):
    x, weight = leaf(cuda, 700, 96), leaf(cuda, 96)
    cotangent = torch.randn(96, 700).to(cuda.device).T
    got, want = (
        torch.autograd.grad(ops.rms_norm(x, weight, 1e-6), [x, weight], cotangent) for ops in (cuda, reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    alone = torch.autograd.grad(cuda.rms_norm(x[5:6], weight, 1e-6), x, cotangent[5:6])[0]
    assert torch.equal(alone[5], got[0][5])


def test_a_composite_is_differentiated_by_its_parts(cuda, reference):
    x, data = leaf(cuda, 3, 8), leaf(cuda, 16, 8)
    w13 = Weight(data, None, plain_format(torch.float32))
    w2 = Weight(leaf(cuda, 8, 8), None, plain_format(torch.float32))
    got, want = (torch.autograd.grad(ops.mlp(x, w13, w2, 1.0).sum(), [x, data, w2.data]) for ops in (cuda, reference))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_cached_step_has_no_gradients(cuda):
    batch = Batch(np.array([2]), np.array([0]), cuda.device, slots=np.array([0]))
    compress = differentiable("compress", lambda self, kv, **rest: kv * 2)
    kv = leaf(cuda, 2, 8)
    y = compress(cuda, kv, kv, leaf(cuda, 4, 8), batch, 4, True, torch.zeros(1, device=cuda.device))
    with pytest.raises(RuntimeError, match="compress: gradients are of packed steps"):
        y.sum().backward()


def test_scores_are_differentiated_at_the_picks_that_were_made(reference):
    batch = reference.plan(Batch.packed([9, 0, 6], reference.device, padding=2), {4: True}, {})
    keys = KV(torch.randn(3, 8).requires_grad_(), plain_rows(8, 0, 4, 0, torch.float32))
    q, weights = torch.randn(17, 2, 8), torch.rand(17, 2)
    q[15:], weights[15:] = float("nan"), float("nan")
    q, weights = q.requires_grad_(), weights.requires_grad_()
    picks, scores = reference.index_topk(q, weights, keys, batch, 2, with_scores=True)
    given = {"q": q, "weights": weights, "keys": keys, "batch": batch, "k": 2, "with_scores": True}
    swapped = CHOICES["index_topk"](reference, given, picks.flip(1))[1]
    torch.testing.assert_close(swapped, scores.flip(1))
    leaves = [q, weights, keys.data]
    got, want = (torch.autograd.grad(s[s.isfinite()].sum(), leaves) for s in (swapped, scores))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
