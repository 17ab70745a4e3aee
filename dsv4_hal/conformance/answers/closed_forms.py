"""What an op must return where the answer is known: arguments for which its formula comes to a line of arithmetic.

Each form calls one op of the reference in mode exact, and says what a calculation by hand gives. No number here comes
from the reference or from another oracle: these are for faults that both could share, since they read one contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.conformance.judging.budget import Budget, nmse, of_budget
from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.dispatch import Resolved
from dsv4_hal.formats import FORMATS, QTensor, Weight, quantize
from dsv4_hal.ops import KV
from dsv4_hal.registry import FALLBACK

NAME = "closed forms"
EPS = torch.finfo(torch.float32).eps
# A result is a dozen roundings away from its arguments at most: 6 eps if all fall to one side.
BUDGET = Budget(8 * EPS, 8 * EPS)


@dataclass(frozen=True)
class Form:
    """check(ops) -> what the op returned, and what it must return."""

    op: str
    says: str
    check: Callable[[Resolved], tuple[Tensor, Tensor]]

    @property
    def id(self) -> str:
        return f"{self.op}[form={self.check.__name__}]"


FORMS: list[Form] = []
Check = Callable[[Resolved], tuple[Tensor, Tensor]]


def form(op: str, says: str) -> Callable[[Check], Check]:
    """Declare a form; its name is the function's."""

    def declare(check: Check) -> Check:
        FORMS.append(Form(op, says, check))
        return check

    return declare


def chosen(ops: Sequence[str], pattern: str = "") -> list[Form]:
    """Forms of these ops whose id contains the pattern."""
    return [one for one in FORMS if one.op in ops and pattern in f"{one.id}@exact"]


def outcome(one: Form, ops: Resolved) -> Outcome:
    """What comes of a form on the reference's ops."""
    runs_as = next(r.runs_as for r in ops.resolutions if r.op == one.op)
    told = Outcome(FALLBACK, one.op, one.id, "exact", runs_as, "error", against=(NAME,))
    try:
        got, want = one.check(ops)
    except Exception as error:
        return replace(told, message=f"{type(error).__name__}: {error}")
    found = nmse(got, want.to(got.dtype), BUDGET)
    return replace(
        told,
        verdict="agrees" if found.ok else "disagrees",
        message="" if found.ok else f"{found.message}: {one.says}",
        of_budget=of_budget(found, BUDGET),
        metrics={"y": found.metrics},
    )


def whole(*shape: int) -> Tensor:
    """Small whole numbers: sums of their products are exact in float32, whatever the order."""
    return (torch.arange(math.prod(shape)) * 7 % 11 - 5).view(shape).float()


def plain(matrix: Tensor) -> Weight:
    return Weight(matrix, None, FORMATS["fp32"], "w")


def packed(ops: Resolved, *lengths: int, ratio: int = 4, overlap: bool = False) -> Batch:
    return ops.plan(Batch.packed(lengths), {ratio: overlap}, {})


def rows_of(ops: Resolved, rows: Tensor, batch: Batch, ratio: int = 1, window: int = 0) -> KV:
    layout = ops.row_layout("window" if ratio == 1 else "entries", rows.shape[1], 0, ratio, window)
    return ops.kv_store(rows, layout, batch)


# --- formats and products -------------------------------------------------------------------------------------------


@form("dequantize", "an e2m1 code is its sign times 0, 0.5, 1, 1.5, 2, 3, 4 or 6, the first value in the low nibble")
def fp4_table(ops: Resolved) -> tuple[Tensor, Tensor]:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    low, high = codes[0::2], codes[1::2]
    scale = torch.tensor([[127 + 3]], dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 2^3
    data = (high << 4 | low).view(1, -1).view(FORMATS["mxfp4"].storage)
    return ops.dequantize(QTensor(data, scale, FORMATS["mxfp4"]), torch.float32), 8 * torch.cat(
        [values, -values]
    ).repeat(2)[None]


@form("quantize", "a block whose largest value is 448 * 2^n has the scale 2^n, and multiples of 2^n are kept")
def fp8_scale(ops: Resolved) -> tuple[Tensor, Tensor]:
    x = torch.tensor([448.0, -256.0, 16.0, 1.0]).repeat(2, 32) * torch.tensor([[2.0**-9], [2.0**5]])
    kept = ops.quantize(x, FORMATS["e4m3_1x128"])
    assert kept.scale is not None
    return torch.cat([kept.scale.float(), ops.dequantize(kept, torch.float32)], 1), torch.cat(
        [torch.tensor([[2.0**-9], [2.0**5]]), x], 1
    )


@form("linear", "a product of whole numbers is exact: y[t, n] is the sum over k of x[t, k] w[n, k]")
def whole_product(ops: Resolved) -> tuple[Tensor, Tensor]:
    x, w = whole(5, 64), whole(7, 64) + 1
    return ops.linear(x, plain(w)), (x.long()[:, None] * w.long()[None]).sum(-1)


@form("linear", "of an FP8 weight with one scale, that scale comes out of the product")
def fp8_product(ops: Resolved) -> tuple[Tensor, Tensor]:
    x, w = whole(3, 128), whole(128, 128)
    w[0, 0] = 448  # so that the scale is 1, and every whole number up to 16 is kept
    q = quantize(w / 8, FORMATS["e4m3_128x128"])
    return ops.linear(x, ops.repack(Weight(q.data, q.scale, q.format, "w"))), (x.long() @ w.long().T).double() / 8


@form("grouped_linear", "row r is multiplied by the matrix of its expert, here e + 1 times the identity")
def scaled_identities(ops: Resolved) -> tuple[Tensor, Tensor]:
    rows, eye = whole(6, 16), torch.eye(16)
    w = plain(torch.stack([eye, 2 * eye, 3 * eye]))
    got = ops.grouped_linear(rows, w, torch.tensor([0, 2, 2, 6]))
    return got, rows * torch.tensor([1.0, 1, 3, 3, 3, 3])[:, None]


@form("block_diagonal_linear", "group g sees its own channels alone")
def own_group(ops: Resolved) -> tuple[Tensor, Tensor]:
    x, eye = whole(4, 3, 16), torch.eye(16)
    w = plain(torch.stack([eye, -eye, eye.flip(0)]))
    return ops.block_diagonal_linear(x, w), torch.stack([x[:, 0], -x[:, 1], x[:, 2].flip(-1)], 1)


@form("embedding", "token i has row i")
def row_of_token(ops: Resolved) -> tuple[Tensor, Tensor]:
    table = whole(9, 16)
    return ops.embedding(torch.tensor([8, 0, 3]), plain(table)), torch.stack([table[8], table[0], table[3]])


# --- norm and rotation ----------------------------------------------------------------------------------------------


@form("rms_norm", "a row of one value c becomes c / sqrt(c^2 + eps), times the weight")
def constant_row(ops: Resolved) -> tuple[Tensor, Tensor]:
    c, weight, eps = torch.tensor([[3.0], [-1e-3], [0.0]]), whole(64), 1e-6
    return ops.rms_norm(c.expand(-1, 64), weight, eps), c.double() / (c.double() ** 2 + eps).sqrt() * weight


@form("rms_norm", "without a weight, a row with one value c among n has the root n at its place")
def lone_value(ops: Resolved) -> tuple[Tensor, Tensor]:
    x = torch.zeros(1, 64)
    x[0, 5] = 100.0
    return ops.rms_norm(x, None, 1e-12), (x != 0).double() * 8


@form("rope", "channels 2 i and 2 i + 1 are a point that is turned by its angle, and the first channels stay")
def turned_points(ops: Resolved) -> tuple[Tensor, Tensor]:
    angle = torch.tensor([[0.0, math.pi / 6], [math.pi / 2, math.pi]], dtype=torch.float64)
    x = torch.tensor([[[9.0, 1, 0, 0, 1]]]).expand(2, 1, 5)
    y = ops.rope(x, (angle.cos().float(), angle.sin().float()))
    half, root = 0.5, math.sqrt(3) / 2
    return y, torch.tensor([[[9.0, 1, 0, -half, root]], [[9.0, 0, 1, 0, -1]]], dtype=torch.float64)


@form("rope", "the inverse turns back")
def turned_back(ops: Resolved) -> tuple[Tensor, Tensor]:
    angle = whole(3, 8)
    x, tables = whole(3, 2, 24), (angle.cos(), angle.sin())
    return ops.rope(ops.rope(x, tables), tables, inverse=True), x


@form("hadamard", "entry i, j of the matrix is -1 to the number of ones that i and j share, over the root of the width")
def signs(ops: Resolved) -> tuple[Tensor, Tensor]:
    shared = torch.tensor([[(i & j).bit_count() for j in range(16)] for i in range(16)])
    return ops.hadamard(torch.eye(16)), (1 - 2 * (shared % 2)).double() / 4


# --- attention ------------------------------------------------------------------------------------------------------


@form("sparse_attention", "where all scores are equal, n keys weigh 1 / (n + exp(sink)) each")
def equal_keys(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, rows = packed(ops, 6), whole(6, 32)
    kv, sink = rows_of(ops, rows, batch, window=4), torch.tensor([0.0, math.log(2)])
    y, _ = ops.sparse_attention(torch.zeros(6, 2, 32), kv, sink, 1.0, batch)
    seen = [rows[max(0, t - 3) : t + 1].double() for t in range(6)]
    return y, torch.stack([torch.stack([r.sum(0) / (len(r) + s) for s in (1, 2)]) for r in seen])


@form("sparse_attention", "a key that scores s against a sink of s gets half of the weight")
def key_against_sink(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, row = packed(ops, 1), whole(1, 32)
    q = row[:, None] * 2
    score = 2 * float(row.square().sum()) / 8
    y, _ = ops.sparse_attention(q, rows_of(ops, row, batch, window=4), torch.tensor([score]), 1 / 8, batch)
    return y, row[:, None] / 2


@form("sparse_attention", "a picked entry counts as one more key")
def picked_entry(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, rows, entries = packed(ops, 8), whole(8, 32), whole(2, 32) + 100
    kv, more = rows_of(ops, rows, batch, window=1), rows_of(ops, entries, batch, ratio=4)
    picks = torch.tensor([[-1]] * 3 + [[0]] * 4 + [[1]])
    y, _ = ops.sparse_attention(torch.zeros(8, 1, 32), kv, torch.zeros(1), 1.0, batch, more, picks)
    want = [rows[t] / 2 if e < 0 else (rows[t] + entries[e]) / 3 for t, (e,) in enumerate(picks.tolist())]
    return y, torch.stack(want)[:, None]


@form("index_topk", "with one head of weight 1 the scores are relu(q k); the best come first, equal ones by number")
def best_first(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch = packed(ops, 20)
    keys = torch.zeros(5, 32)
    keys[:, 0] = torch.tensor([2.0, 5.0, -1.0, 5.0, 3.0])
    q = torch.zeros(20, 1, 32)
    q[:, 0, 0] = 1.0
    picks, _ = ops.index_topk(q, torch.ones(20, 1), rows_of(ops, keys, batch, ratio=4), batch, 4)
    seen = [(), (0,), (1, 0), (1, 0, 2), (1, 3, 0, 2), (1, 3, 4, 0)]
    want = [[*seen[(t + 1) // 4], -1, -1, -1, -1][:4] for t in range(20)]
    return picks.double(), torch.tensor(want).double()


@form("compress", "where gates are equal, an entry is the mean of its block")
def mean_of_block(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, kv = packed(ops, 9, ratio=4), whole(9, 16)
    got = ops.compress(kv, torch.full((9, 16), 3.0), torch.zeros(4, 16), batch, 4, False)
    return got, torch.stack([kv[:4].double().mean(0), kv[4:8].double().mean(0)])


@form("compress", "with overlap the second entry is the mean of four first halves before and its own four second ones")
def mean_with_overlap(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, kv = packed(ops, 8, overlap=True), whole(8, 32)
    got = ops.compress(kv, torch.zeros(8, 32), torch.zeros(4, 32), batch, 4, True)
    first, second = kv.double().chunk(2, 1)
    return got, torch.stack([second[:4].mean(0), (first[:4].sum(0) + second[4:].sum(0)) / 8])


@form("compress", "a position whose bias is far above the others' is the entry")
def bias_of_position(ops: Resolved) -> tuple[Tensor, Tensor]:
    batch, kv, ape = packed(ops, 8), whole(8, 16), torch.zeros(4, 16)
    ape[2] = 200.0
    return ops.compress(kv, whole(8, 16), ape, batch, 4, False), kv[[2, 6]]


# --- mixture of experts ---------------------------------------------------------------------------------------------


@form("route", "equal logits give the first k experts the weight scale / k each, whatever the bias")
def equal_experts(ops: Resolved) -> tuple[Tensor, Tensor]:
    ids, weights = ops.route(torch.full((2, 8), 0.7), 3, 2.5, torch.full((8,), 4.0))
    return torch.cat([ids.double(), weights.double()], 1), torch.tensor([0.0, 1, 2] + [2.5 / 3] * 3).expand(2, 6)


@form("route", "scores are the root of log(1 + e^x): 1 and 2 for x = log(e - 1) and log(e^4 - 1)")
def known_scores(ops: Resolved) -> tuple[Tensor, Tensor]:
    logits = torch.tensor([[math.log(math.e - 1), -50.0, math.log(math.e**4 - 1)]])
    ids, weights = ops.route(logits, 2, 1.5)
    return torch.cat([ids.double(), weights.double()], 1), torch.tensor([[2.0, 0, 1.0, 0.5]])


@form("route", "a bias chooses, and is not in the weights")
def bias_chooses(ops: Resolved) -> tuple[Tensor, Tensor]:
    ids, weights = ops.route(torch.zeros(1, 4), 1, 1.5, torch.tensor([0.0, 0, 9, 0]))
    return torch.cat([ids.double(), weights.double()], 1), torch.tensor([[2.0, 1.5]])


@form("permute", "rows are sorted by expert, then by token")
def sorted_rows(ops: Resolved) -> tuple[Tensor, Tensor]:
    x = whole(3, 16)
    rows, offsets, order = ops.permute(x, torch.tensor([[2, 0], [0, 2], [2, 1]]), 4)
    want = x[[0, 1, 2, 0, 1, 2]], torch.tensor([0.0, 2, 3, 6, 6]), torch.tensor([1.0, 2, 5, 0, 3, 4])
    return torch.cat([t.flatten().float() for t in (rows, offsets, order)]), torch.cat([t.flatten() for t in want])


@form("unpermute", "a token is the sum of its rows")
def summed_rows(ops: Resolved) -> tuple[Tensor, Tensor]:
    rows = whole(4, 16)
    return ops.unpermute(rows, torch.tensor([3, 0, 2, 1]), (2, 2)), torch.stack([rows[1] + rows[3], rows[0] + rows[2]])


@form("swiglu", "beyond the limit, gate is cut from above and up from both sides: silu(limit) times -limit .. limit")
def clamped(ops: Resolved) -> tuple[Tensor, Tensor]:
    gate, up = torch.tensor([50.0, 50, 50, -50]), torch.tensor([70.0, -70, 1, 70])
    silu = 2 / (1 + math.exp(-2))
    low = -50 / (1 + math.exp(50))
    want = torch.tensor([[2 * silu, -2 * silu, silu, 2 * low]], dtype=torch.float64) * 0.5
    return ops.swiglu(torch.cat([gate, up])[None], 2.0, torch.tensor([0.5])), want


# --- hyper-connections and sampling ---------------------------------------------------------------------------------


@form("hc_pre", "with no projection the streams are summed by 1/2 + eps, post is 1, and all mix alike")
def uniform_mixing(ops: Resolved) -> tuple[Tensor, Tensor]:
    streams, rows = whole(2, 4, 16), 2 * 4 + 16
    x, post, comb = ops.hc_pre(streams, torch.zeros(rows, 64), torch.zeros(rows), torch.ones(3), 20, 1e-6, 1e-6)
    got = torch.cat([x.flatten(), post.flatten(), comb.flatten()])
    # A column of n entries c has the sum n c, and the next is c / (n c + eps): close to (1 - eps) / n.
    entry = torch.full((2, 4, 4), (1 - 1e-6) / 4, dtype=torch.float64)
    want = streams.double().sum(1) * (0.5 + 1e-6), torch.ones(2, 4, dtype=torch.float64), entry
    return got, torch.cat([t.flatten() for t in want])


@form("hc_pre", "after many iterations the rows and columns of a mix sum to 1, which the report's Sinkhorn is for")
def doubly_stochastic(ops: Resolved) -> tuple[Tensor, Tensor]:
    base = torch.cat([torch.zeros(8), whole(16) / 8])
    _, _, comb = ops.hc_pre(torch.ones(1, 4, 16), torch.zeros(24, 64), base, torch.ones(3), 100, 1e-6, 1e-12)
    return torch.cat([comb.sum(1), comb.sum(2)]), torch.ones(2, 4)


@form("hc_post", "stream k takes post[k] y and, by comb[j, k], what stream j was")
def moved_streams(ops: Resolved) -> tuple[Tensor, Tensor]:
    y, streams = whole(1, 16) + 1, whole(1, 3, 16)
    comb = torch.zeros(1, 3, 3)
    comb[0, 0, 2], comb[0, 1, 0], comb[0, 2, 1] = 1.0, 2.0, 3.0  # the first moves to the last place, and so on
    got = ops.hc_post(y, streams, torch.tensor([[0.0, 1.0, 2.0]]), comb)
    return got[0], torch.stack([2 * streams[0, 1], y[0] + 3 * streams[0, 2], 2 * y[0] + streams[0, 0]])


@form("hc_head", "with no projection the streams are summed by 1/2 + eps")
def uniform_head(ops: Resolved) -> tuple[Tensor, Tensor]:
    streams = whole(2, 4, 16)
    got = ops.hc_head(streams, torch.zeros(4, 64), torch.zeros(4), torch.ones(1), 1e-6, 1e-6)
    return got, streams.double().sum(1) * (0.5 + 1e-6)


@form("sample", "without temperature it is the likeliest token, the first of equals")
def greedy(ops: Resolved) -> tuple[Tensor, Tensor]:
    tokens = ops.sample(torch.tensor([[0.0, 3, 3, 1], [5, 0, 0, 5]]), 0.0)
    return tokens.float(), torch.tensor([1.0, 0.0])


@form("sample", "a token with all of the probability is drawn")
def certain(ops: Resolved) -> tuple[Tensor, Tensor]:
    logits = torch.full((50, 9), -1e4)
    logits[:, 6] = 0.0
    return ops.sample(logits, 1.0, 0.9, torch.Generator().manual_seed(0)).float(), torch.full((50,), 6.0)
