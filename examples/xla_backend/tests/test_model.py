"""A whole model on XLA beside the reference: a checkpoint of random weights, prefill and greedy decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv4_hal
from dsv4_hal.model.checkpoint import init_checkpoint
from dsv4_hal.model.config import preset

STEPS = 6


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "v4-tiny"
    init_checkpoint(preset("v4-tiny"), out, dtype="fp8-fp4", seed=0)
    return out


@torch.inference_mode()
def logits(checkpoint: Path, backend: str, mode: str, given: torch.Tensor | None = None) -> torch.Tensor:
    """[2, 1 + STEPS, V] behind a prompt and each token after it: the most likely ones, or those `given`."""
    model = dsv4_hal.load_model(checkpoint, backend, mode)
    tokens = torch.randint(1000, (2, 130), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(batch_size=2, max_seq_len=256)
    out = [model(tokens, cache)[:, -1:]]
    for step in range(STEPS):
        chosen = out[-1] if given is None else given[:, step : step + 1]
        out.append(model(chosen.argmax(-1), cache))
    return torch.cat(out, 1)


def test_exact_logits(checkpoint: Path) -> None:
    want = logits(checkpoint, "reference", "exact")
    got = logits(checkpoint, "xla", "exact")
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())  # measured: 7e-7


def test_deployed_logits(checkpoint: Path) -> None:
    """Roundings that fall to the other side grow from layer to layer: a cosine, not a tolerance (measured: 0.9994)."""
    want = logits(checkpoint, "reference", "deployed")
    got = logits(checkpoint, "xla", "deployed", given=want)
    assert float(torch.cosine_similarity(got.flatten(), want.flatten(), 0)) > 0.99
