"""Where a backend leaves another one on its way through a model: part by part, call by call, and at the end.

A part is judged by the rule of `compare.py`: its budget is eight times the difference that the same part of the
reference makes between its profile and that profile widened to float64, from the same inputs, with the same floors.
Picks may differ in eight times the share that they differ in there, or in one of 64. The logits of free runs are judged
in mode exact only, where they agree to 1e-4 of the largest; in mode deployed they are loose by nature and only shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_hal.conformance.judging.budget import FLIPPED, UNIT, Budget, derive, nmse, of_budget, row_format
from dsv4_hal.conformance.judging.compare import bitwise, measure
from dsv4_hal.conformance.models.replay import PICKS, Seen, likeliest
from dsv4_hal.conformance.models.run import ModelRun
from dsv4_hal.numerics import Numerics

FACTOR = 8.0
NOT_FINITE = "not finite on the reference either: an earlier part is to blame"
FREE = 1e-4  # of the largest logit, in mode exact


@dataclass(frozen=True)
class Part:
    """One part of a layer, over all steps.

    layer, ratio  None for the embedding and the head
    part          embed, streams (mixing, and reading the sub-layers' inputs), attn, ffn, head
    rms, largest  root of the mean square error over the mean square; largest error over largest value
    median_token, worst_token  relative error of a token's vector
    of_budget     the worse of both errors as a multiple of its budget
    """

    backend: str
    layer: int | None
    ratio: int | None
    part: str
    rms: float | None = None
    largest: float | None = None
    median_token: float | None = None
    worst_token: float | None = None
    budget_rms: float | None = None
    budget_largest: float | None = None
    of_budget: float | None = None
    verdict: str = "agrees"
    message: str = ""

    @property
    def name(self) -> str:
        return self.part if self.layer is None else f"layers.{self.layer}.{self.part}"


@dataclass(frozen=True)
class Picks:
    """agreement: share of a layer's picks of experts or entries that both made, each from the same inputs."""

    backend: str
    layer: int
    picks: str
    agreement: float
    allowed: float
    verdict: str

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.picks}"

    @property
    def message(self) -> str:
        return differing(1 - self.agreement, 1 - self.allowed)


def differing(share: float, allowed: float) -> str:
    return f"{share:.3g} of the picks differ, over {allowed:.3g}"


@dataclass(frozen=True)
class Free:
    """Both models run freely on the same tokens.

    top1      share of positions with the same likeliest token; kl: mean divergence of the distributions, in nats
    diverges  number of the first token that greedy decoding would make otherwise; None: not within greedy_tokens
    """

    backend: str
    positions: int = 0
    top1: float | None = None
    kl: float | None = None
    cosine: float | None = None
    max_logit_error: float | None = None
    diverges: int | None = None
    greedy_tokens: int = 0
    verdict: str = "shown"
    message: str = ""
    free: bool = True
    name: str = "free run"


Row = Part | Picks | Free
GOOD = ("agrees", "shown")


@dataclass(frozen=True)
class Call:
    """A call of an op, in one step. name: as `probe.py` names it; message: what is wrong, "" if nothing."""

    backend: str
    step: int
    name: str
    of_budget: float
    message: str

    @property
    def op(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def ok(self) -> bool:
        return not self.message


def rows(backend: str, got: ModelRun, want: ModelRun, narrow: ModelRun, wide: ModelRun) -> Iterator[Row]:
    """Every part in the order of the forward pass, then picks, then the free run.

    backend        whose results are judged
    got, want      of the recorded run and the replayed one, that of `backend` first
    narrow, wide   the reference on the same inputs, in its profile and in the widened one
    """
    layers, ratios = want.model["layers"], want.model["ratios"]
    yield _embed(backend, got, want)
    for i in range(layers):
        about = Part(backend, i, ratios[i], "")
        mixed = [f"layers.{i}.{name}" for name in ("attn.in", "ffn.in", "out")]
        for part, names in (
            ("streams", mixed),
            ("attn", [f"layers.{i}.attn.out"]),
            ("ffn", [f"layers.{i}.ffn.out"]),
        ):
            found = [_part(replace(about, part=part), name, got, want, narrow, wide) for name in names]
            yield max(found, key=lambda p: math.inf if p.of_budget is None else p.of_budget)
    yield _part(Part(backend, None, None, "head"), "logits", got, want, narrow, wide)
    for i in range(layers):
        for kind in PICKS:
            if f"layers.{i}.{kind}" in want.steps[0]:
                yield _picks(backend, i, kind, got, want, narrow, wide)
    yield _free(backend, got, want)


def calls(backend: str, got: ModelRun, want: ModelRun, narrow: ModelRun, wide: ModelRun) -> Iterator[Call]:
    """Every call of an op that all four runs have, in the order of the forward pass, step by step."""
    numerics = narrow.numerics
    for number in range(len(want.calls)):
        seen = [run.calls[number] for run in (got, want, narrow, wide)]
        for name in _calls(seen):
            found = [
                _call_share([s[result] for s in seen], result.rpartition("#")[2], numerics)
                for result in seen[1]
                if result.startswith(f"{name}#")
            ]
            share, wrong = max(found, key=lambda f: (bool(f[1]), f[0]))
            yield Call(backend, number, name, share, wrong)
        raised = [why for name, why in got.errors.items() if name.startswith(f"{number}/")]
        missing = [name for name in _names(seen[1]) if not any(r.startswith(f"{name}#") for r in seen[0])]
        if raised and missing:
            yield Call(backend, number, missing[0], math.inf, raised[0])


def _calls(seen: Sequence[Seen]) -> list[str]:
    """Names of the calls that all have with all results, in the order they ended."""
    shared = set(seen[1]).intersection(*seen)
    return [call for call in _names(seen[1]) if all(r in shared for r in seen[1] if r.startswith(f"{call}#"))]


def _names(seen: Seen) -> list[str]:
    return list(dict.fromkeys(result.rpartition("#")[0] for result in seen))


def _call_share(values: Sequence[Tensor], kind: str, numerics: Numerics) -> tuple[float, str]:
    """The error of (got, want, narrow, wide) as a multiple of its budget, and what is wrong."""
    got, want, narrow, wide = values
    if not want.numel():
        return 0.0, ""
    if kind == "picks":
        differ, allowed = 1 - _alike(got, want), 1 - _least(narrow, wide)
        return differ / allowed, differing(differ, allowed) if differ > allowed else ""
    try:
        budget = derive(narrow, wide, FACTOR, row_format(kind, numerics))
    except ValueError:
        return math.inf, NOT_FINITE
    found = nmse(got, want, budget)
    return of_budget(found, budget) or 0.0, found.message


def _embed(backend: str, got: ModelRun, want: ModelRun) -> Part:
    about = Part(backend, None, None, "embed")
    if wrong := _missing("layers.0.in", got, want):
        return replace(about, verdict="error", message=wrong)
    a, b = (_joined(run, "layers.0.in") for run in (got, want))
    found = bitwise(a, b)
    return about if found.ok else replace(about, of_budget=math.inf, verdict="disagrees", message=found.message)


def _part(about: Part, name: str, got: ModelRun, want: ModelRun, narrow: ModelRun, wide: ModelRun) -> Part:
    if wrong := _missing(name, got, want, narrow, wide):
        return replace(about, verdict="error", message=wrong)
    a, b, c, d = (_joined(run, name) for run in (got, want, narrow, wide))
    if not all(t.isfinite().all() for t in (b, c, d)):
        return replace(about, verdict="error", message=f"{name}: {NOT_FINITE}")
    numerics = narrow.numerics
    # logits are sums over a row that was rounded to the storage, of which a value may be off by one unit
    budget = derive(c, d, FACTOR, rounded=numerics.storage if about.part == "head" else None)
    if about.part == "attn":
        budget = raised(budget, numerics)
    found = nmse(a, b, budget)
    if not found.metrics:
        return replace(about, of_budget=math.inf, verdict="disagrees", message=f"{name}: {found.message}")
    error, size = ((t.double().flatten(1).norm(dim=1)) for t in (a.double() - b.double(), b))
    token = torch.where(error == 0, 0.0, error / size)
    return replace(
        about,
        rms=math.sqrt(found.metrics["nmse"]),
        largest=found.metrics["max_rel"],
        median_token=float(token.median()),
        worst_token=float(token.max()),
        budget_rms=budget.rms,
        budget_largest=budget.largest,
        of_budget=of_budget(found, budget),
        verdict="agrees" if found.ok else "disagrees",
        message=f"{name}: {found.message}" if found.message else "",
    )


def raised(budget: Budget, numerics: Numerics) -> Budget:
    """An attention's budget where cache rows are rounded to few bits.

    Of the values that are rounded one in 64 may be off by one unit eps of the storage. That carries it over the edge
    of the coarse rounding, whose unit is u, in eps / u of the cases, and then it is off by u. The root mean square of
    that is u sqrt(FLIPPED eps / u), 3.9e-3 for bf16 and e4m3; a rounding that is left out is 1e-2. A few hundred tokens
    may show none of these flips while the budget is measured.
    """
    if numerics.kv is None:
        return budget
    unit, eps = UNIT[numerics.kv.element], torch.finfo(numerics.storage).eps
    return replace(budget, rms=max(budget.rms, math.sqrt(unit * eps * FLIPPED)))


def _picks(
    backend: str, layer: int, kind: str, got: ModelRun, want: ModelRun, narrow: ModelRun, wide: ModelRun
) -> Picks:
    name, short = f"layers.{layer}.{kind}", kind.partition(".")[2]
    if _missing(name, got, want, narrow, wide):
        return Picks(backend, layer, short, 0.0, 1.0, "error")
    agreement = _alike(_joined(got, name), _joined(want, name))
    allowed = _least(_joined(narrow, name), _joined(wide, name))
    return Picks(backend, layer, short, agreement, allowed, "agrees" if agreement >= allowed else "disagrees")


def _least(narrow: Tensor, wide: Tensor) -> float:
    """Share of picks that must agree."""
    return 1 - max(FACTOR * (1 - _alike(narrow, wide)), FLIPPED)


def _alike(a: Tensor, b: Tensor) -> float:
    """Share of picks [T, k] (-1: none) that are in both, in any order."""
    found, _ = b.sort(-1)
    place = torch.searchsorted(found, a).clamp(max=found.shape[-1] - 1)
    both = ((found.gather(-1, place) == a) & (a >= 0)).sum()
    most = torch.maximum((a >= 0).sum(-1), (b >= 0).sum(-1)).sum()
    return float(both / most) if most else 1.0


def _free(backend: str, got: ModelRun, want: ModelRun) -> Free:
    if wrong := next((run.errors["free"] for run in (got, want) if "free" in run.errors), ""):
        return Free(backend, verdict="error", message=wrong)
    a, b = (_joined(run, "free").double() for run in (got, want))
    found = measure(a, b)
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    diverges, tokens = _divergence(got, want)
    verdict, message = "shown", ""
    if not bool(a.isfinite().all()) and bool(b.isfinite().all()):
        verdict, message = "disagrees", "logits are not finite"
    elif want.mode == "exact":
        verdict = "agrees" if found["max_rel"] <= FREE else "disagrees"
        message = (
            "" if verdict == "agrees" else f"largest error {found['max_rel']:.3g} of the largest logit, over {FREE:g}"
        )
    return Free(
        backend,
        positions=len(a),
        top1=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        kl=float((log_b.exp() * (log_b - log_a)).sum(-1).mean()),
        cosine=found["cosine"],
        max_logit_error=found["max_rel"],
        diverges=diverges,
        greedy_tokens=tokens,
        verdict=verdict,
        message=message,
    )


def _divergence(got: ModelRun, want: ModelRun) -> tuple[int | None, int]:
    """The number of the first greedy token that differs in any sequence, and how many were looked at. Up to there both
    have read the same tokens, so what follows on the shared tokens is what each would have decoded by itself."""
    a, b = (_greedy(run) for run in (got, want))
    differ = (a != b).any(1).nonzero()
    return (int(differ[0]) if len(differ) else None), len(a)


def _greedy(run: ModelRun) -> Tensor:
    """[decode + 1, R] tokens that follow the prompts, and each decoded token."""
    found = [torch.zeros(len(run.script.prompts), dtype=torch.int64)]
    for q_lens, seen in zip(run.script.steps, run.steps, strict=True):
        found.append(likeliest(q_lens, seen["free"], found[-1]))
    return torch.stack(found[-run.script.decode - 1 :])


def _missing(name: str, *runs: ModelRun) -> str:
    """Which run does not have a result, and why; "" if all have it, in every step."""
    for run in runs:
        for number, seen in enumerate(run.steps):
            if name not in seen:
                why = run.errors.get(f"{number}/{name}", "was not made")
                return f"{name}, step {number}, on {run.backend}: {why}"
    return ""


def _joined(run: ModelRun, name: str) -> Tensor:
    """A result of all steps, token after token."""
    return torch.cat([seen[name] for seen in run.steps])
