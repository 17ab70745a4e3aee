"""Shared by all tests: the golden checkpoint, and small random models in memory."""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_hal import registry
from dsv4_hal.backends.reference import Reference
from dsv4_hal.dispatch import resolve
from dsv4_hal.formats import Weight, plain_format
from dsv4_hal.model.config import ModelConfig
from dsv4_hal.model.transformer import Model
from dsv4_hal.model.weights import weight_table
from dsv4_hal.numerics import exact

DATA = Path(__file__).parent / "data"

# Before anything imports triton: its kernels run on the CPU. What only a GPU can show, ci/cuda.sh runs.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Tensors here are small, and workers of pytest-xdist, and the processes that tests start, would fight over the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it

SMALL = {
    "model_type": "deepseek_v4",
    "torch_dtype": "float32",
    "vocab_size": 96,
    "hidden_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 20,
    "index_n_heads": 3,
    "index_head_dim": 32,
    "index_topk": 6,
    "sliding_window": 12,
    "compress_ratios": [0, 4, 128, 4, 0],
    "compress_rope_theta": 160000.0,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 4096,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 1.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 5,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
}


@pytest.fixture(autouse=True)
def the_same_numbers_every_time(request: pytest.FixtureRequest) -> None:
    """What a test draws hangs on its name alone."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def only_our_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that other packages register on this machine have no part in these tests, but for those they make."""
    every = registry.entry_points
    ours = ("dsv4-hal", "third-vendor")
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [e for e in every(group=group) if e.dist and e.dist.name in ours]
    )


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """The golden checkpoint in the official format, and what the published code computes on it."""
    return DATA / "tiny"


def small_config(**changes: object) -> ModelConfig:
    return ModelConfig.from_dict(SMALL | changes, "tests")


def random_weights(cfg: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Weight | Tensor]:
    """Plain weights of every entry of the table, large enough that every part of the model matters."""
    out: dict[str, Weight | Tensor] = {}
    for name, spec in weight_table(cfg).items():
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if spec.format == "int64":
            rows = torch.rand(spec.shape[0], cfg.n_routed_experts, generator=g)
            out[name] = rows.argsort(-1)[:, : spec.shape[1]].contiguous()
            continue
        value = torch.randn(spec.shape, generator=g, dtype=torch.float64)
        if spec.is_matrix:
            value = value * spec.shape[-1] ** -0.5
            out[name] = Weight(value.to(dtype), None, plain_format(dtype), name)
        elif name.endswith("norm"):
            out[name] = (1 + 0.1 * value).to(dtype)
        else:
            out[name] = (0.3 * value).to(dtype)
    return out


@pytest.fixture(scope="session")
def small_model() -> Callable[..., Model]:
    """small_model(dtype=..., seed=..., **config changes): a plain random model in `exact` mode."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Model:
        cfg = small_config(**changes)
        ops = resolve([Reference(exact(dtype))], vars(cfg))
        return Model(cfg, ops, random_weights(cfg, dtype, seed))

    return make
