"""Matrix products: INT8 by token and channel on the 910s, MX on the 950, bfloat16 on both.

A row of activations is quantised in front of a quantised weight by an operator of its own, one for each profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_hal.backends.ascend import runtime
from dsv4_hal.backends.ascend.common import Base
from dsv4_hal.backends.ascend.providers import ALL, INT8, MX, Limit, Provider, documented
from dsv4_hal.backends.ascend.weights import Arranged, arranged
from dsv4_hal.backends.reference.gemm import emit
from dsv4_hal.formats import FORMATS, Format, QTensor, Weight

DYNAMIC, DYNAMIC_MX = "npu::npu_dynamic_quant", "npu::npu_dynamic_mx_quant"
MATMUL, GROUPED, BATCHED = "npu::npu_quant_matmul", "npu::npu_grouped_matmul", "npu::npu_transpose_batchmatmul"
MXFP8 = FORMATS["mxfp8"]

_BF16 = Limit(among=(torch.bfloat16,))
_V5 = "; hicann/ops-nn 8ac78fb1, matmul/quant_batch_matmul_v4/docs/aclnnQuantMatmulV5_en.md"
_GROUPED_V5 = "; hicann/ops-transformer 827a6040, gmm/grouped_matmul/docs/aclnnGroupedMatmulV5_en.md"
_BATCHED = "; hicann/ops-nn 305dad69, matmul/transpose_batch_mat_mul/README.md"
_MX_QUANT = "; hicann/ops-nn 0c8fd4c8, quant/dynamic_mx_quant/docs/aclnnDynamicMxQuantV3.md"
_W4A8 = "; vllm-ascend 182b75ea, vllm_ascend/quantization/methods/w4a8.py"
_W4A8_MX = "; vllm-ascend 182b75ea, vllm_ascend/quantization/methods/w4a8_mxfp4.py"


def _stored(*names: str) -> Limit:
    return Limit(among=names)


PROVIDERS = (
    Provider(
        "quantize",
        (DYNAMIC_MX,),
        MX,
        documented("npu_dynamic_mx_quant") + _MX_QUANT,
        note="mxfp8, scales rounded up",
        limits={"format": _stored("mxfp8")},
    ),
    Provider(
        "quantize",
        (DYNAMIC,),
        INT8,
        documented("npu_dynamic_quant"),
        refused="how it rounds, and what a row of zeros gives, is not said: it serves products, whose tolerance "
        "covers that, and not this op, whose bits are compared",
    ),
    Provider("linear", ("aten::linear",), ALL, "torch", limits={"format": _stored("bf16"), "result": _BF16}),
    Provider(
        "linear",
        (DYNAMIC, MATMUL),
        INT8,
        documented("npu_dynamic_quant, npu_quant_matmul") + _V5,
        limits={
            "format": _stored("int8_channel"),
            "activation": _stored("int8_channel"),
            "inputs": Limit(most=65535),
            "outputs": Limit(most=65535),
            "result": _BF16,
        },
    ),
    Provider(
        "linear",
        (DYNAMIC_MX, MATMUL),
        MX,
        documented("npu_dynamic_mx_quant, npu_quant_matmul") + _V5,
        limits={
            "format": _stored("mxfp8"),
            "activation": _stored("mxfp8"),
            "inputs": Limit(multiple=64),
            "result": _BF16,
        },
    ),
    Provider(
        "grouped_linear",
        (GROUPED,),
        ALL,
        documented("npu_grouped_matmul") + _GROUPED_V5,
        limits={"format": _stored("bf16"), "experts": Limit(most=1024), "result": _BF16},
    ),
    Provider(
        "grouped_linear",
        (DYNAMIC, GROUPED),
        INT8,
        documented("npu_dynamic_quant, npu_grouped_matmul") + _GROUPED_V5,
        note="int8_channel: sums in int32, scaled by torch; it would return bfloat16 only with scales rounded to it",
        limits={
            "format": _stored("int8_channel"),
            "experts": Limit(most=1024),
            "inputs": Limit(most=65535),
            "outputs": Limit(most=65535),
        },
    ),
    Provider(
        "grouped_linear",
        (DYNAMIC, GROUPED),
        INT8,
        documented("npu_dynamic_quant, npu_grouped_matmul") + _GROUPED_V5 + _W4A8,
        limits={
            "format": _stored("int4_channel"),
            "experts": Limit(most=1024),
            "inputs": Limit(most=18432),
            "outputs": Limit(multiple=8, most=65528),
            "result": _BF16,
        },
    ),
    Provider(
        "grouped_linear",
        (DYNAMIC_MX, GROUPED),
        MX,
        documented("npu_dynamic_mx_quant, npu_grouped_matmul") + _GROUPED_V5,
        limits={
            "format": _stored("mxfp8"),
            "experts": Limit(most=1024),
            "inputs": Limit(multiple=64, most=65535),
            "outputs": Limit(most=65535),
            "result": _BF16,
        },
    ),
    Provider(
        "grouped_linear",
        (DYNAMIC_MX, GROUPED),
        MX,
        documented("npu_dynamic_mx_quant, npu_grouped_matmul, npu_format_cast") + _W4A8_MX,
        limits={
            "format": _stored("mxfp4"),
            "experts": Limit(most=1024),
            "inputs": Limit(multiple=64, most=65535),
            "outputs": Limit(multiple=16, most=65535),
            "result": _BF16,
        },
    ),
    Provider("block_diagonal_linear", (BATCHED,), MX, documented("npu_transpose_batchmatmul") + _BATCHED),
    Provider(
        "block_diagonal_linear",
        (BATCHED,),
        INT8,
        documented("npu_transpose_batchmatmul") + _BATCHED,
        limits={"groups": Limit(most=65535), "flat_inputs": Limit(most=65535), "outputs": Limit(most=65535)},
    ),
)


class Gemm(Base):
    def repack(self, weight: Weight) -> Weight:
        return arranged(weight, self.soc, self.numerics.storage)

    def quantize(self, x: Tensor, fmt: Format) -> QTensor:
        """Float64, and float32 rows shorter than a block, are torch's own: the operator takes neither."""
        alien = x.dtype == torch.float64 or (x.dtype == torch.float32 and x.shape[-1] < 32)
        if alien or fmt.plain or not x.numel() or self.provider("quantize", format=fmt.name) is None:
            return super().quantize(x, fmt)
        return self._mx(x)

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if self._product("linear", x, w, out_dtype) is None:
            return super().linear(x, w, out_dtype, out=out)
        if w.format.plain:
            assert isinstance(x, Tensor)
            return emit(F.linear(x, w.data), out)
        assert w.scale is not None
        npu, weight = runtime.load(), w.data.mT
        if w.format.name == "int8_channel":
            codes, scale = self._int8(x)
            y = npu.npu_quant_matmul(
                codes, weight, w.scale.flatten(), pertoken_scale=scale, output_dtype=torch.bfloat16
            )
        else:
            codes, scale = _mx_operands(self._mx(x))
            y = npu.npu_quant_matmul(
                codes,
                weight,
                _pairs(w.scale).transpose(-3, -2),
                pertoken_scale=scale,
                scale_dtype=npu.float8_e8m0fnu,
                pertoken_scale_dtype=npu.float8_e8m0fnu,
                output_dtype=torch.bfloat16,
                group_sizes=[1, 1, 32],
            )
        return emit(y, out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        sizes = {"experts": w.data.shape[0]}
        if self._product("grouped_linear", rows, w, out_dtype, **sizes) is None:
            return super().grouped_linear(rows, w, offsets, out_dtype, out=out)
        return emit(_GROUPED_FORMS[w.format.name](self, rows, w, offsets).to(out_dtype or self.numerics.storage), out)

    def block_diagonal_linear(self, x: Tensor, w: Weight, *, out: Tensor | None = None) -> Tensor:
        groups, inputs = x.shape[1:]
        sizes = {"groups": groups, "inputs": inputs, "flat_inputs": groups * inputs, "outputs": w.shape[1]}
        if not x.numel() or self.provider("block_diagonal_linear", **sizes) is None:
            return super().block_diagonal_linear(x, w, out=out)
        values = self.dequantize(w.ordered(), self.numerics.storage)
        y = runtime.load().npu_transpose_batchmatmul(
            x.contiguous(), values.mT, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2]
        )
        return emit(y, out)

    def _product(
        self, op: str, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None, **sizes: int
    ) -> Provider | None:
        """What multiplies x and w; None: torch's own ops, for products that need no operator without a word."""
        result = out_dtype or self.numerics.storage
        if not x.shape[0] or (w.format.plain and (w.format.name, result, type(x)) != ("bf16", torch.bfloat16, Tensor)):
            return None
        activation = x.format if isinstance(x, QTensor) else self.numerics.activation
        assert activation is not None  # of both profiles
        sizes |= {"inputs": w.shape[-1], "outputs": w.shape[-2]}
        return self.provider(op, format=w.format.name, activation=activation.name, result=result, **sizes)

    def _int8(self, x: Tensor | QTensor) -> tuple[Tensor, Tensor]:
        """Codes [T, K] and one scale a token [T]."""
        if isinstance(x, QTensor):
            assert x.scale is not None
            return x.data, x.scale.flatten()
        codes, scale = runtime.load().npu_dynamic_quant(x)
        return codes, scale

    def _mx(self, x: Tensor | QTensor) -> QTensor:
        """In mxfp8, scales rounded up and from amax of at least the format's floor, as published."""
        if isinstance(x, QTensor):
            return x
        npu, blocks = runtime.load(), -(-x.shape[-1] // 32)
        codes, scales = npu.npu_dynamic_mx_quant(
            x.contiguous(), dst_type=npu.float8_e4m3fn, scale_alg=1, max_low_bound=MXFP8.floor
        )
        used = scales.flatten(-2)[..., :blocks].contiguous()  # it fills them up to an even number
        return QTensor(codes, used.view(torch.float8_e8m0fnu), MXFP8)


def _pairs(scale: Tensor) -> Tensor:
    """Scales [..., n] -> uint8 [..., n / 2, 2], as the operators count them."""
    return scale.view(torch.uint8).unflatten(-1, (-1, 2))


def _mx_operands(q: QTensor) -> tuple[Tensor, Tensor]:
    assert q.scale is not None
    return q.data, _pairs(q.scale)


def _grouped(x: Tensor, w: Tensor, offsets: Tensor, result: torch.dtype = torch.bfloat16, **more: Any) -> Tensor:
    """Rows x [M, K] of expert e times w[e] [K, N], for e in order: [M, N] in `result`."""
    made = runtime.load().npu_grouped_matmul(
        [x], [w], group_list=offsets[1:], group_list_type=0, group_type=0, split_item=2, output_dtype=result, **more
    )
    return made[0]


def _grouped_bf16(gemm: Gemm, rows: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    return _grouped(rows, w.data.mT, offsets)


def _grouped_int8(gemm: Gemm, rows: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    assert w.scale is not None
    codes, scale = gemm._int8(rows)
    sums = _grouped(codes, w.data.mT, offsets, torch.int32)
    scales = w.scale.squeeze(-1).repeat_interleave(offsets.diff(), 0, output_size=len(rows))
    return sums.to(gemm.numerics.accumulate) * scale[:, None] * scales


def _grouped_int4(gemm: Gemm, rows: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    assert isinstance(w, Arranged)
    (codes, scale), (packed, bits, bias) = gemm._int8(rows), w.operands
    made = runtime.load().npu_grouped_matmul(
        [codes],
        [packed],
        scale=[bits],
        bias=[bias],
        per_token_scale=[scale],
        group_list=offsets.diff(),  # counts are all that it takes
        group_list_type=1,
        group_type=0,
        split_item=2,
        output_dtype=torch.bfloat16,
    )
    return made[0]


def _grouped_mx(gemm: Gemm, rows: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    assert w.scale is not None
    (codes, scale), e8m0 = _mx_operands(gemm._mx(rows)), runtime.load().float8_e8m0fnu
    scales = {"scale": [_pairs(w.scale).transpose(-3, -2)], "scale_dtype": e8m0}
    return _grouped(codes, w.data.mT, offsets, per_token_scale=[scale], per_token_scale_dtype=e8m0, **scales)


def _grouped_mx_fp4(gemm: Gemm, rows: Tensor, w: Weight, offsets: Tensor) -> Tensor:
    assert isinstance(w, Arranged) and w.scale is not None
    (codes, scale), npu = _mx_operands(gemm._mx(rows)), runtime.load()
    return _grouped(
        codes,
        w.operands[0].mT,
        offsets,
        weight_dtype=npu.float4_e2m1fn_x2,
        antiquant_scale=[_pairs(w.scale).transpose(-3, -2)],
        per_token_scale=[scale],
        per_token_scale_dtype=npu.float8_e8m0fnu,
    )


_GROUPED_FORMS: Mapping[str, Callable[[Gemm, Tensor, Weight, Tensor], Tensor]] = MappingProxyType(
    {
        "bf16": _grouped_bf16,
        "int8_channel": _grouped_int8,
        "int4_channel": _grouped_int4,
        "mxfp8": _grouped_mx,
        "mxfp4": _grouped_mx_fp4,
    }
)
