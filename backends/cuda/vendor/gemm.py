"""Products with quantised weights by DeepGEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal import ops
from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.cuda.vendor import deep_gemm
from dsv4_hal.backends.cuda.vendor.common import Base, own_kernel
from dsv4_hal.backends.triton_kernels.runtime import emit, result
from dsv4_hal.formats import FORMATS, QTensor, Weight

GROUPED = ("m_grouped_fp8_fp4_gemm_nt_contiguous", "get_mk_alignment_for_contiguous_layout")


class Gemm(Base):
    # What is made of products that the library serves runs through them, and is not fused.
    output_proj = ops.Attention.output_proj

    def supports(self, op: str, facts: Facts) -> Verdict:
        verdict = super().supports(op, facts)
        if op in ("linear", "mlp", "output_proj"):
            return verdict and self._multiplies("fp8_fp4_gemm_nt") and self._widths(_matrices(facts))
        if op == "grouped_linear":
            return verdict and self._multiplies(*GROUPED) and self._widths(_experts(facts))
        return verdict

    def linear(
        self, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        coded = self._coded("linear", x, w, out_dtype)
        if coded is None:
            return super().linear(x, w, out_dtype, out=out)
        made = result((coded.shape[0], w.shape[0]), torch.bfloat16, coded.device, out)
        return emit(deep_gemm.linear(coded, w, self._scales(w), made, self.arch.name), out)

    def grouped_linear(
        self,
        rows: Tensor,
        w: Weight,
        offsets: Tensor,
        out_dtype: torch.dtype | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        coded = self._coded("grouped_linear", rows, w, out_dtype)
        if coded is None:
            return super().grouped_linear(rows, w, offsets, out_dtype, out=out)
        return emit(deep_gemm.grouped_linear(coded, w, self._scales(w), offsets, self.arch.name), out)

    def _multiplies(self, *functions: str) -> Verdict:
        """Whether the library computes what this profile says."""
        if (self.numerics.activation, self.numerics.storage) != (deep_gemm.ROWS, torch.bfloat16):
            return Verdict(False, f"DeepGEMM takes activations in {deep_gemm.ROWS.name}, and returns bfloat16")
        return deep_gemm.able(self.arch.name, *functions)

    def _widths(self, matrices: tuple[str, list[tuple[int, int]]]) -> Verdict:
        """Whether matrices of one format, of these rows and columns, can all be multiplied."""
        fmt, sizes = matrices
        if not fmt:
            return Verdict(False, "DeepGEMM multiplies quantised weights, and this model's are plain")
        found = [deep_gemm.gemm_verdict(self.arch.name, FORMATS[fmt], *size) for size in sizes]
        return next((verdict for verdict in found if not verdict), deep_gemm.YES)

    def _coded(self, op: str, x: Tensor | QTensor, w: Weight, out_dtype: torch.dtype | None) -> QTensor | None:
        """x as the library takes it; None where it does not serve the product. Plain weights are none of its."""
        if w.format.plain or not self._multiplies():
            return None
        verdict = deep_gemm.gemm_verdict(self.arch.name, w.format, w.shape[-2], w.shape[-1])
        if out_dtype not in (None, torch.bfloat16):
            verdict = Verdict(False, f"DeepGEMM returns bfloat16, not {out_dtype}")
        if w.layout != "checkpoint":
            verdict = Verdict(False, f"DeepGEMM reads weights in order, not arranged as {w.layout}")
        if isinstance(x, QTensor) and x.format != deep_gemm.ROWS:
            verdict = Verdict(False, f"DeepGEMM takes activations in {deep_gemm.ROWS.name}, not in {x.format.name}")
        if not verdict:
            own_kernel(op, verdict)
            return None
        return x if isinstance(x, QTensor) else self.quantize(x, deep_gemm.ROWS)

    def _scales(self, w: Weight) -> Tensor:
        assert w.scale is not None
        return self.once(w.scale, lambda: deep_gemm.weight_scales(w, self.arch.name))


def _matrices(facts: Facts) -> tuple[str, list[tuple[int, int]]]:
    """Format, and rows and columns, of a model's matrices; none of them where there are no facts."""
    if not facts:
        return "e4m3_128x128", []
    d, q, heads, dim = (facts[k] for k in ("hidden_size", "q_lora_rank", "num_attention_heads", "head_dim"))
    inner, low = facts["moe_intermediate_size"], facts["o_groups"] * facts["o_lora_rank"]
    index = facts["index_n_heads"] * facts["index_head_dim"]
    sizes = [(q, d), (dim, d), (heads * dim, q), (index, q), (d, low), (2 * inner, d), (d, inner)]
    return "e4m3_128x128" if facts["quantization_config"] is not None else "", sizes


def _experts(facts: Facts) -> tuple[str, list[tuple[int, int]]]:
    """The same of its experts."""
    if not facts:
        return "e4m3_128x128", []
    d, inner = facts["hidden_size"], facts["moe_intermediate_size"]
    fmt = {"fp4": "mxfp4", "fp8": "e4m3_128x128", None: ""}[facts["expert_dtype"]]
    return fmt, [(2 * inner, d), (d, inner)]
