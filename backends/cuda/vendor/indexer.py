"""The indexer's scores by DeepGEMM, and the best of them.

Products and their weighted terms stay in float32: a profile that rounds scores on the way is refused. Mode `deepgemm`
is the published profile without that rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_hal.backend import Facts, Verdict
from dsv4_hal.backends.cuda.vendor import deep_gemm
from dsv4_hal.backends.cuda.vendor.common import Base, once_a_step, own_kernel, visible
from dsv4_hal.backends.triton_kernels.quantize import encode
from dsv4_hal.batch import Batch
from dsv4_hal.formats import FORMATS, Format, RowLayout, index_fp8_rows
from dsv4_hal.ops import KV

FUNCTIONS = ("fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "get_paged_mqa_logits_metadata", "get_num_sms")
SCRATCH = 1 << 28  # scores that are held at once
MOST_TOKENS = 1 << 15  # that the library's schedule has room for


class Indexer(Base):
    def supports(self, op: str, facts: Facts) -> Verdict:
        verdict = super().supports(op, facts)
        if op != "index_topk":
            return verdict
        heads = facts.get("index_n_heads", 1)
        dim = facts.get("index_head_dim", deep_gemm.INDEX_DIM)
        verdict = verdict and self._scores(self.numerics.index, heads, dim)
        if verdict and self.numerics.score != self.numerics.accumulate:
            kept, named = self.numerics.accumulate, self.numerics.mode
            return Verdict(False, f"DeepGEMM keeps scores in {kept}, mode {named} rounds them: mode deepgemm does not")
        return verdict

    def row_layout(self, kind: str, dim: int, rope: int, ratio: int, window: int = 0) -> RowLayout:
        if kind == "index" and self.numerics.index == FORMATS["e4m3_row_fp32"]:
            return index_fp8_rows(ratio, dim)
        return super().row_layout(kind, dim, rope, ratio, window)

    def _scores(self, fmt: Format | None, heads: int, dim: int) -> Verdict:
        """Whether the library scores that many heads over keys of this format."""
        arch = self.arch.name
        return deep_gemm.able(arch, *FUNCTIONS) and deep_gemm.index_verdict(arch, fmt, heads, dim)

    def _scores_keys(self, keys: KV, heads: int) -> Verdict:
        """The same, for keys that lie there."""
        if keys.paged and (keys.layout.plain or keys.rows not in deep_gemm.INDEX_ROWS):
            return Verdict(False, f"DeepGEMM reads pools of {deep_gemm.INDEX_ROWS} coded keys a block, not this one")
        if not keys.paged and keys.layout.rounding != FORMATS["mxfp4"]:  # rounding FP8 rows again would change them
            return Verdict(False, "DeepGEMM scores keys that lie side by side in MXFP4 only")
        return self._scores(keys.layout.rounding, heads, keys.layout.dim)

    def index_topk(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, k: int, *, with_scores: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        verdict = self._scores_keys(keys, q.shape[1])
        if not verdict:
            own_kernel("index_topk", verdict)
            return super().index_topk(q, weights, keys, batch, k, with_scores=with_scores)
        wide, ratio = self.numerics.accumulate, keys.layout.ratio
        picks = torch.full((len(q), k), -1, dtype=torch.int64, device=q.device)
        scores = torch.full((len(q), k), float("-inf"), dtype=wide, device=q.device)
        count = int(batch.reach.max(initial=0)) // ratio
        entry, every = torch.arange(count, device=q.device), visible(batch, ratio)
        score = self._paged if keys.paged else self._packed
        step = max(1, min(MOST_TOKENS, SCRATCH // max(1, count if keys.paged else len(keys.data))))
        for start in range(0, len(q) if count else 0, step):
            some = slice(start, start + step)
            lengths = every[some]
            found = score(q[some], weights[some], keys, batch, some, lengths, count)
            found = found.to(wide).masked_fill(entry >= lengths[:, None], float("-inf"))
            best, pick = found.sort(dim=-1, descending=True, stable=True)
            best, pick = best[:, :k], pick[:, :k]
            picks[some, : pick.shape[1]] = pick.masked_fill(best == float("-inf"), -1)
            scores[some, : pick.shape[1]] = best
        return picks, scores if with_scores else None

    def _paged(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, some: slice, lengths: Tensor, count: int
    ) -> Tensor:
        """Scores [T, count] of entries in a pool. Lengths, tables and schedule are the same in every layer."""
        assert keys.layout.rounding is not None
        ratio = keys.layout.ratio

        def make() -> tuple[Tensor, Tensor, Tensor]:
            blocks = batch.require_plan().tables[ratio][:, : -(-count // keys.rows)]
            table = blocks[batch.seq[some].clamp(min=0)].to(torch.int32).contiguous()
            seen = lengths.to(torch.int32)[:, None].contiguous()
            return seen, table, deep_gemm.schedule(seen, keys.rows)

        seen, table, schedule = once_a_step(batch, ("deep_gemm", ratio, keys.rows, some.start, some.stop), make)
        coded = encode(q, keys.layout.rounding)
        return deep_gemm.paged_scores(
            coded, weights, keys.data, keys.rows, seen, table, schedule, count, self.arch.name
        )

    def _packed(
        self, q: Tensor, weights: Tensor, keys: KV, batch: Batch, some: slice, lengths: Tensor, count: int
    ) -> Tensor:
        """Scores [T, count] of entries that lie side by side, those of every sequence after one another."""
        assert keys.layout.rounding is not None
        start = batch.require_plan().base[keys.layout.ratio][batch.seq[some].clamp(min=0)]
        bounds = start.to(torch.int32), (start + lengths).to(torch.int32)
        coded = encode(keys.data, keys.layout.rounding)  # loses nothing: they are rounded
        found = deep_gemm.packed_scores(encode(q, keys.layout.rounding), weights, coded, *bounds, self.arch.name)
        column = start[:, None] + torch.arange(count, device=q.device)
        return found.gather(1, column.clamp(max=len(keys.data) - 1))
