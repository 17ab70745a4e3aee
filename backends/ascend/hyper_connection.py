"""Hyper-connections: torch_npu's three operators on the 950, vllm-ascend's two on the 910s, whose product is HF32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, MX, VLLM_ASCEND, Limit, Provider, documented

CUSTOM_PRE, CUSTOM_POST = "_C_ascend::npu_hc_pre_v2", "_C_ascend::npu_hc_post"

PROVIDERS = (
    Provider(
        "hc_pre",
        ("npu::npu_mhc_pre", "npu::npu_mhc_sinkhorn"),
        MX,
        documented("npu_mhc_pre, npu_mhc_sinkhorn")
        + "; hicann/ops-transformer 37b9e45d, mhc/mhc_pre/README.md and 2f8255ac, mhc/mhc_sinkhorn",
        note="product in float32",
        limits={
            "streams": Limit(among=(4, 6, 8)),
            "width": Limit(multiple=16, most=16384),
            "iterations": Limit(most=100),
        },
    ),
    Provider(
        "hc_pre",
        (CUSTOM_PRE,),
        ALL,
        VLLM_ASCEND + ", tests/e2e/nightly/single_node/ops/singlecard_ops/test_npu_hc_pre.py",
        note="product in HF32, as the profile says",
        alien={"a5": "its product is in HF32, the profile's in float32"},
        limits={"streams": Limit(among=(4,)), "width": Limit(among=(4096, 7168))},
    ),
    Provider(
        "hc_post",
        ("npu::npu_mhc_post",),
        MX,
        documented("npu_mhc_post") + "; hicann/ops-transformer 37b9e45d, mhc/mhc_post/README.md",
        limits={"streams": Limit(among=(4, 6, 8)), "width": Limit(multiple=16, most=16384)},
    ),
    Provider(
        "hc_post",
        (CUSTOM_POST,),
        ALL,
        VLLM_ASCEND,
        limits={"streams": Limit(among=(4,)), "width": Limit(multiple=128, most=100000)},
    ),
    Provider(
        "hc_head",
        ("npu::npu_mhc_pre",),
        MX,
        "hicann/ops-transformer 37b9e45d, mhc/mhc_pre/README.md",
        refused="it mixes with scales for two or three groups of weights, the head has one",
    ),
)


class HyperConnection(Base):
    def hc_pre(
        self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, norm_eps: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"streams": streams.shape[1], "width": streams.shape[2], "iterations": iters}
        provider = self.provider("hc_pre", **sizes) if len(streams) else None
        if provider is None:
            return super().hc_pre(streams, fn, base, scale, iters, norm_eps, eps)
        if CUSTOM_PRE in provider.calls:
            x, post, comb = torch.ops._C_ascend.npu_hc_pre_v2(
                streams.contiguous(), fn, scale, base, streams.shape[1], iters, norm_eps, eps
            )
            return x, post, comb
        npu = runtime.load()
        x, post, logits, *_ = npu.npu_mhc_pre(streams, fn, scale, base, norm_eps=norm_eps, hc_eps=eps, inner_precise=0)
        comb, *_ = npu.npu_mhc_sinkhorn(logits, eps=eps, num_iters=iters)
        return x, post, comb

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        sizes = {"streams": streams.shape[1], "width": streams.shape[2]}
        provider = self.provider("hc_post", **sizes) if len(streams) else None
        if provider is None:
            return super().hc_post(y, streams, post, comb)
        if CUSTOM_POST in provider.calls:  # one sequence: [1, T, ...]
            return torch.ops._C_ascend.npu_hc_post(*(t.contiguous()[None] for t in (y, streams, post, comb)))[0]
        return runtime.load().npu_mhc_post(streams, comb, y, post)
