"""What only a GPU can show: a decode step captured in a CUDA graph, and results that do not hang on how many tokens
come together. `ci/cuda.sh` runs it where there is one, with TRITON_INTERPRET=0."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

import dsv4_hal
from dsv4_hal import formats
from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.triton_kernels.runtime import INTERPRETED
from dsv4_hal.formats import FORMATS, Weight
from dsv4_hal.model.cache import Cache
from dsv4_hal.model.decode import Decoder
from dsv4_hal.model.transformer import Model
from dsv4_hal.numerics import deployed, exact

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU on this machine"),
    pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here: run it by ci/cuda.sh"),
]

PROMPTS = (126, 3, 61)  # the next steps complete entries of ratio 128 and of ratio 4, each sequence at its own time


@pytest.mark.parametrize("mode", ["exact", "deployed"])
def test_a_captured_step_computes_what_an_ordinary_one_does(tiny_dir: Path, mode: str) -> None:
    """To the bit where cosines are rounded on: a decoder's come from the host, and may differ in their last bit."""
    model = dsv4_hal.load_model(tiny_dir, "cuda", mode=mode)
    ordinary, captured = prefilled(model), prefilled(model)
    decoder, tokens, bound = Decoder(model, captured), torch.tensor([5, 6, 7]), 0.0 if mode == "deployed" else 1e-4
    for _ in range(8):
        with torch.inference_mode():
            want = model.step(tokens, ordinary.batch([1, 1, 1]), ordinary)
        got = decoder(tokens)
        torch.testing.assert_close(got, want, rtol=0, atol=bound)
        tokens = got.argmax(-1).cpu()
    assert captured.lengths == ordinary.lengths


def prefilled(model: Model) -> Cache:
    cache = model.new_cache(len(PROMPTS), 256, max_chunk=128)
    tokens = torch.randint(model.cfg.vocab_size, (sum(PROMPTS),), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model.step(tokens, cache.batch(PROMPTS), cache)
    return cache


@pytest.mark.parametrize("mode", ["exact", "deployed"])
def test_a_sequence_alone_and_among_others(tiny_dir: Path, mode: str) -> None:
    """Sequences of one batch, prefilled and decoded, and each by itself: the same logits."""
    model = dsv4_hal.load_model(tiny_dir, "cuda", mode=mode)
    lengths = (200, 1, 77, 128)
    tokens = [torch.randint(model.cfg.vocab_size, (length + 1,)) for length in lengths]
    together, rows = model.new_cache(len(lengths), 256), torch.tensor(lengths).cumsum(0) - 1
    with torch.inference_mode():
        first = model.step(torch.cat([t[:-1] for t in tokens]), together.batch(lengths), together)[rows.cuda()]
        second = model.step(torch.cat([t[-1:] for t in tokens]), together.batch([1] * len(lengths)), together)
        for i, (length, mine) in enumerate(zip(lengths, tokens, strict=True)):
            alone = model.new_cache(1, 256)
            assert torch.equal(model.step(mine[:-1], alone.batch([length]), alone)[-1], first[i])
            assert torch.equal(model.step(mine[-1:], alone.batch([1]), alone)[0], second[i])


@pytest.mark.parametrize("format", ["bf16", "e4m3_128x128", "mxfp4", "int8_channel", "fp32"])
def test_a_row_alone_and_among_many(format: str) -> None:
    """A product of real width: its splits of K are added by another kernel where rows are few."""
    ops = Cuda(exact() if format == "fp32" else deployed())
    w = torch.randn(1024, 4096, device="cuda") * 4096**-0.5
    weight = _stored(w, format)
    x = torch.randn(9000, 4096, device="cuda").to(ops.numerics.storage)
    many = ops.linear(x, weight)
    for rows in (1, 3, 64, 200):
        assert torch.equal(ops.linear(x[:rows], weight), many[:rows])


def _stored(w: Tensor, format: str) -> Weight:
    fmt = FORMATS[format]
    if fmt.plain:
        return Weight(w.to(fmt.storage), None, fmt, "w")
    q = formats.quantize(w, fmt)
    return Weight(q.data, q.scale, fmt, "w")


def test_experts_alone_and_among_many() -> None:
    ops = Cuda(deployed())
    w13, w2 = (
        Weight(q.data, q.scale, FORMATS["mxfp4"], "w")
        for q in (
            formats.quantize(torch.randn(8, n, k, device="cuda") * k**-0.5, FORMATS["mxfp4"])
            for n, k in ((1024, 1024), (1024, 512))
        )
    )
    x = torch.randn(3000, 1024, device="cuda").bfloat16()
    ids = torch.rand(3000, 8, device="cuda").topk(2).indices
    weights = torch.rand(3000, 2, device="cuda")
    many = ops.moe_experts(x, ids, weights, w13, w2, 10.0)
    for rows in (1, 5, 64):
        assert torch.equal(ops.moe_experts(x[:rows], ids[:rows], weights[:rows], w13, w2, 10.0), many[:rows])
