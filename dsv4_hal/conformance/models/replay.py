"""A whole model run twice: freely, keeping what every part saw and made; and part by part, from what another run saw.

Run freely, two backends drift apart with depth, and a random model amplifies the last bit of a bf16 value: what comes
out says little. So each part is run from the inputs that a recorded run gave it (teacher-forced), with that run's picks
of experts and entries, through a cache of its own that is filled in the same way.

Names, in every step: `layers.0.in` (the embedded tokens, as streams), `layers.i.{attn,ffn}.in` (what the hyper-
connection reads from the streams), `layers.i.{attn,ffn}.out`, `layers.i.out` (the streams after the layer), `logits`,
and the picks `layers.i.attn.index_picks` and `layers.i.ffn.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_hal.backend import described
from dsv4_hal.conformance.models.probe import Probe
from dsv4_hal.dispatch import Resolved

if TYPE_CHECKING:
    from dsv4_hal.model.step import Step
    from dsv4_hal.model.transformer import Model

Seen = dict[str, Tensor]
PICKS = ("attn.index_picks", "ffn.experts")
KEPT = 16  # last tokens of each sequence in a step whose logits are kept: a row of logits is as wide as the vocabulary


@dataclass(frozen=True)
class Script:
    """What is run. prompts: tokens of each sequence; decode: steps of one token each after them; chunk: tokens of a
    sequence in one step."""

    prompts: tuple[tuple[int, ...], ...]
    decode: int = 8
    chunk: int = 128

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("a run needs prompts of at least one token each")
        if self.chunk < 1 or self.decode < 0:
            raise ValueError(f"chunk {self.chunk} must be at least 1 and decode {self.decode} not negative")

    @property
    def steps(self) -> list[list[int]]:
        """New tokens of each sequence in every step: chunks of the prompts side by side, then one token of each."""
        longest = max(len(prompt) for prompt in self.prompts)
        chunks = [
            [max(0, min(len(prompt) - start, self.chunk)) for prompt in self.prompts]
            for start in range(0, longest, self.chunk)
        ]
        return chunks + [[1] * len(self.prompts)] * self.decode

    @property
    def room(self) -> int:
        """Tokens that the longest sequence comes to."""
        return max(len(prompt) for prompt in self.prompts) + self.decode


def run_freely(
    model: Model, script: Script, decoded: Sequence[Tensor] | None = None, keep: bool = True
) -> Iterator[Seen]:
    """Every step of a script: its `tokens`, the `rows` of them that have `logits`, and what all parts saw and made.

    decoded  tokens [R] of each decoding step; None: the likeliest ones
    keep     False: only tokens, rows and logits
    """
    from dsv4_hal.model.step import Trace

    cache = model.new_cache(len(script.prompts), script.room, max_chunk=script.chunk)
    following = torch.zeros(len(script.prompts), dtype=torch.int64)
    for number, q_lens in enumerate(script.steps):
        at = number - (len(script.steps) - script.decode)
        if at < 0:
            start = number * script.chunk
            flat = [token for prompt in script.prompts for token in prompt[start : start + script.chunk]]
            tokens = torch.tensor(flat, dtype=torch.int64)
        else:
            tokens = following if decoded is None else decoded[at]
        rows, trace = kept_rows(q_lens), Trace(record=keep)
        logits = model.step(tokens, cache.batch(q_lens), cache, rows=rows, trace=trace).cpu()
        following = likeliest(q_lens, logits, following)
        yield {"tokens": tokens, "rows": rows, "logits": logits} | {k: _host(v) for k, v in trace.seen.items()}


def kept_rows(q_lens: Sequence[int]) -> Tensor:
    """Flat rows of the last KEPT tokens of each sequence."""
    lengths = torch.tensor(q_lens)
    ends = lengths.cumsum(0)
    return torch.cat([torch.arange(int(end - min(n, KEPT)), int(end)) for end, n in zip(ends, lengths, strict=True)])


def likeliest(q_lens: Sequence[int], logits: Tensor, before: Tensor) -> Tensor:
    """The token [R] that follows each sequence, of the logits of its kept rows; `before` where the step had none."""
    lengths = torch.tensor(q_lens)
    ends = lengths.clamp(max=KEPT).cumsum(0) - 1
    return torch.where(lengths > 0, logits.argmax(-1)[ends.clamp(min=0)], before)


@dataclass
class Replayed:
    """made: what the parts made in a step; errors: name of a part -> the exception it ended with."""

    made: Seen
    errors: dict[str, str]


def replay(
    model: Model, script: Script, recorded: Sequence[Seen], probe: Probe | None = None, only: str = ""
) -> Iterator[Replayed]:
    """Every part of every step, from what the recorded run gave it. One that raises is told, and the next goes on.

    probe  keeps every op's results: those of the plan, and of the part `only`, or of all
    """
    from dsv4_hal.model.step import Step, Trace

    assert isinstance(model.ops, Resolved)
    cache = model.new_cache(len(script.prompts), script.room, max_chunk=script.chunk)
    for q_lens, seen in zip(script.steps, recorded, strict=True):
        if probe is not None:
            probe.enter("plan")
        batch = model.plan(cache.batch(q_lens))
        if probe is not None:
            probe.place = ""
        cache.begin(batch)
        given = {name: value.to(model.ops.device) for name, value in seen.items()}
        picks = {name: value for name, value in given.items() if name.endswith(PICKS)}
        step = Step(given["tokens"], batch, cache, Trace(record=True, replay=picks))
        done = Replayed({}, {})
        for place, names, run in parts(model, step, given):
            if probe is not None:
                probe.enter(place if only in ("", place) else "")
            try:
                values = run()
                done.made |= {name: _host(value) for name, value in zip(names, values, strict=True)}
            except BaseException as error:  # no interrupt reaches this process: it is the backend's
                done.errors |= dict.fromkeys(names, described(error))
            if probe is not None:
                probe.place = ""
        done.made |= {name: _host(value) for name, value in step.trace.seen.items() if name.endswith(PICKS)}
        cache.commit(batch)
        yield done


def parts(
    model: Model, step: Step, given: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[str, ...], Callable[[], tuple[Tensor, ...]]]]:
    """(place, names of what it makes, the part itself) in the order of the forward pass."""

    def embed() -> tuple[Tensor]:
        return (model.ops.embedding(step.tokens, model.embed)[:, None].repeat(1, model.cfg.hc_mult, 1),)

    def streams(i: int) -> tuple[Tensor, ...]:
        read: list[Tensor] = []

        def recorded(out: str, x: Tensor) -> Tensor:
            read.append(x)
            return given[out]

        layer = model.layers[i]
        x = layer.around_attn(given[f"layers.{i}.in"], partial(recorded, f"layers.{i}.attn.out"))
        x = layer.around_ffn(x, partial(recorded, f"layers.{i}.ffn.out"))
        return *read, x

    def sublayer(i: int, name: str) -> tuple[Tensor]:
        return (getattr(model.layers[i], name)(given[f"layers.{i}.{name}.in"], step),)

    def head() -> tuple[Tensor]:
        return (model.head(given["head.in"][given["rows"]]),)

    yield "embed", ("layers.0.in",), embed
    for i in range(len(model.layers)):
        names = (f"layers.{i}.attn.in", f"layers.{i}.ffn.in", f"layers.{i}.out")
        yield f"layers.{i}.streams", names, partial(streams, i)
        for name in ("attn", "ffn"):
            yield f"layers.{i}.{name}", (f"layers.{i}.{name}.out",), partial(sublayer, i, name)
    yield "head", ("logits",), head


def _host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
