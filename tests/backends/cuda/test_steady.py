"""A step of a fixed shape on the CUDA backend, interpreted: the same launches every time, no wait for the device."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal.backends.cuda import Cuda
from dsv4_hal.backends.triton_kernels.runtime import watching
from dsv4_hal.conformance.models.steady import NotSteady, Steady
from dsv4_hal.dispatch import resolve
from dsv4_hal.model.decode import Decoder
from dsv4_hal.model.transformer import Model
from dsv4_hal.numerics import exact


class Watched(Decoder):
    """seen: what each step consisted of."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def forward(self):
        with Steady() as steady, watching(steady.seen.append):
            logits = super().forward()
        self.seen.append(steady)
        return logits


def decoder_behind(model, lengths):
    """Sequences of these lengths, of which the cache holds nothing but zeros."""
    cache = model.new_cache(len(lengths), 256, max_chunk=128)
    before = cache.batch(lengths)
    cache.begin(before)
    cache.commit(before)
    return Watched(model, cache)


def test_every_step_is_the_same_work(small_model):
    like = small_model()
    model = Model(like.cfg, resolve([Cuda(exact())]), like.weights)
    decoder = decoder_behind(model, [126, 3])
    for _ in range(3):  # the first step completes an entry of ratio 4; the second one of ratio 128; the third none
        assert decoder(torch.tensor([1, 2])).isfinite().all()
    _, second, third = decoder.seen  # the first also uploads what a plan keeps: a capture is of a later one
    third.require(second)
    launches = [told for told in second.seen if told.startswith("_")]
    assert any(told.startswith("_attend") for told in launches) and len(launches) > 10 * len(model.layers)
    third.seen[third.seen.index(launches[0])] = launches[0].replace("(", "(1", 1)
    with pytest.raises(NotSteady, match="was _"):
        third.require(second)
