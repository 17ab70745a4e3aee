"""What the reference is compared with beside its oracles' own runs: answers that are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_hal.conformance.answers import closed_forms, golden
from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.conformance.judging.verdict import oracles
from dsv4_hal.conformance.oracles import transformers as transformers_oracle
from dsv4_hal.numerics import MODES, exact
from dsv4_hal.ops import OPS

LIVE = (f"closed forms and {golden.NAME}: a bundle holds the cases of the contract, and these are asked of a live run",)


@dataclass(frozen=True)
class Answers:
    """forms     closed forms of single ops
    folder    of golden vectors of a whole model
    vectors   mode -> names of those that are chosen
    unasked   oracles of the reference that cannot be asked, and why
    """

    forms: Sequence[closed_forms.Form] = ()
    folder: Path = golden.SOURCES
    vectors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unasked: Sequence[str] = ()

    @property
    def ids(self) -> list[str]:
        vectors = [golden.case_id(name) for names in self.vectors.values() for name in names]
        return [form.id for form in self.forms] + vectors

    def outcomes(self) -> Iterator[Outcome]:
        """What comes of them."""
        for form in self.forms:
            yield closed_forms.outcome(form, oracles(exact())[0])
        yield from golden.outcomes(self.folder, self.vectors)


def answers(ops: Sequence[str], pattern: str, modes: Sequence[str] = MODES, folder: Path | None = None) -> Answers:
    """The answers of these ops, and where they are all ops of the whole model, whose id contains the pattern.

    folder  of golden vectors; None: those of the sources, where they are. ValueError where it has none, or where they
            are not asked, since they are of no single op.
    """
    if folder is not None and len(ops) != len(OPS):
        raise ValueError("golden vectors are of a whole model: --golden does not go with -o")
    asks = "exact" in modes and not set(transformers_oracle.OPS).isdisjoint(ops)  # else it need not even be loaded
    unasked = [f"transformers: {why}"] if asks and (why := transformers_oracle.missing()) else []
    vectors: Mapping[str, Sequence[str]] = {}
    if why := golden.missing(folder or golden.SOURCES):
        if folder is not None:
            raise ValueError(why)
        unasked.append(f"{golden.NAME}: {why}")
    elif len(ops) == len(OPS):
        vectors = golden.chosen(folder or golden.SOURCES, pattern, modes)
    forms = closed_forms.chosen(ops, pattern) if "exact" in modes else []
    return Answers(forms, folder or golden.SOURCES, vectors, unasked)
