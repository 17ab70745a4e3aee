"""What the interpreter computes with narrow floats, against torch; and that it refuses addresses beside a tensor."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import triton
import triton.language as tl

from dsv4_hal.backends.triton_kernels.runtime import DTYPES, INTERPRETED, launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here: TRITON_INTERPRET is not set")

FLOAT8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}
NARROW = {torch.bfloat16: tl.bfloat16, **FLOAT8}
CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def cast(source, target, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(DTYPE))


def casted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=dtype)
    launch(cast, (len(x) // 256,), x, out, DTYPE={**DTYPES, **NARROW}[dtype], COUNT=256)
    return out


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def close_to_every_tie() -> torch.Tensor:
    """Every bfloat16 value as float32, its upper half way to the next, and what lies just beside that."""
    low = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = torch.cat([low, low + 0x7FFF, low + 0x8000, low + 0x8001]).view(torch.float32)
    return torch.where(values.isnan(), torch.zeros(()), values)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_code_is_widened_exactly(dtype):
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16) if dtype.itemsize == 2 else CODES
    narrow = codes.view(dtype)
    torch.testing.assert_close(casted(narrow, torch.float32), narrow.float(), rtol=0, atol=0, equal_nan=True)


def test_float32_is_rounded_to_bfloat16():
    x = close_to_every_tie()
    assert torch.equal(bits(casted(x, torch.bfloat16)), bits(x.to(torch.bfloat16)))
    assert casted(torch.full((256,), torch.nan), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_float8_is_rounded_once_and_saturates(dtype, source):
    x, top = close_to_every_tie().to(source), torch.finfo(dtype).max
    want = x.float().clamp(-top, top).to(dtype)
    assert torch.equal(bits(casted(x, dtype)), bits(want))
    assert casted(torch.full((256,), torch.nan), dtype).isnan().all()


@triton.jit
def arithmetic(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + N + at, x * y)
    tl.store(out + 2 * N + at, x - y)
    tl.store(out + 3 * N + at, -x)
    tl.store(out + 4 * N + at, tl.where(x > y, x, y))
    tl.store(out + 5 * N + at, tl.fma(x, y, x))
    tl.store(out + 6 * N, tl.sum(x, 0))
    tl.store(out + 6 * N + 1, tl.max(x, 0))
    tl.store(out + 6 * N + 2, tl.min(x, 0))


def test_bfloat16_arithmetic_is_that_of_values():
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(6 * 64 + 3, dtype=torch.bfloat16)
    launch(arithmetic, (1,), a, b, out, N=64)
    fused = (a.double() * b.double() + a.double()).bfloat16()
    want = [a + b, a * b, a - b, -a, torch.maximum(a, b), fused]
    assert torch.equal(out[: 6 * 64], torch.cat(want))
    assert torch.equal(out[6 * 64 :], torch.stack([a.float().sum().bfloat16(), a.max(), a.min()]))


@triton.jit
def product(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None]
    made = tl.dot(tl.load(a + row * N + column), tl.load(b + row * N + column), input_precision=PRECISION)
    tl.store(out + row * N + column, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dot_multiplies_values(dtype):
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.zeros(32, 32)
    launch(product, (1,), a, b, out, N=32, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_dot_rounds_to_tf32_where_that_is_asked_for():
    a, b = torch.full((32, 32), 1 + 2.0**-12), torch.eye(32)
    out = torch.zeros(32, 32)
    launch(product, (1,), a, b, out, N=32, PRECISION="tf32")
    assert torch.equal(out, torch.ones(32, 32))


@triton.jit
def masked(flag, source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    chosen = (tl.load(flag) > 0) & (at < N - 1)
    tl.store(target + at, tl.load(source + at, mask=chosen, other=-1.0), mask=tl.program_id(0) < 1)


def test_a_scalar_condition_is_a_mask():
    source, target = torch.arange(8.0), torch.zeros(8)
    launch(masked, (1,), torch.tensor([1]), source, target, N=8)
    assert target.tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    launch(masked, (1,), torch.tensor([0]), source, target, N=8)
    assert target.tolist() == [-1] * 8


@triton.jit
def copy(source, target, first, N: tl.constexpr, CHECK: tl.constexpr):
    at = first + tl.arange(0, N)
    there = (at >= 0) & (at < N) if CHECK else at == at
    tl.store(target + tl.arange(0, N), tl.load(source + at, mask=there, other=0.0))


@pytest.mark.parametrize("first", [-1, 1])
def test_an_address_beside_a_tensor_is_refused(first):
    whole = torch.arange(16.0)  # what lies beside is readable memory: a GPU would read it without a word
    source, target = whole[4:12], torch.zeros(8)
    launch(copy, (1,), source, target, first, N=8, CHECK=True)
    assert target.sum() == (source.sum() - source[0] if first > 0 else source.sum() - source[-1])
    with pytest.raises(Exception, match="1 of 8 addresses to load lie in no tensor of the kernel"):
        launch(copy, (1,), source, target, first, N=8, CHECK=False)
    with pytest.raises(Exception, match="addresses to store"):
        launch(copy, (1,), whole[:8], target[:4], 0, N=8, CHECK=True)


def test_nothing_runs_on_an_empty_grid_or_on_the_meta_device():
    launch(copy, (0,), torch.zeros(8), torch.zeros(8), 10**9, N=8, CHECK=False)
    with pytest.raises(RuntimeError, match="meta device"):
        launch(copy, (1,), torch.zeros(8, device="meta"), torch.zeros(8, device="meta"), 0, N=8, CHECK=True)
