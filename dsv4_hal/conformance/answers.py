"""What the reference is compared with beside its oracles' own runs: answers that are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_hal.conformance import closed_forms, golden, transformers_oracle
from dsv4_hal.conformance.runner import MODES, Outcome, oracles
from dsv4_hal.ops import OPS


@dataclass(frozen=True)
class Answers:
    """forms    closed forms of single ops
    vectors  folder of golden vectors of a whole model; None: they are not asked
    pattern, modes  which of the golden vectors
    unasked  oracles of the reference that cannot be asked, and why
    """

    forms: Sequence[closed_forms.Form]
    vectors: Path | None
    pattern: str
    modes: Sequence[str]
    unasked: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.forms) or self.vectors is not None

    def __iter__(self) -> Iterator[Outcome]:
        """What comes of them."""
        for form in self.forms:
            yield closed_forms.outcome(form, oracles("exact")[0])
        if self.vectors is not None:
            yield from golden.outcomes(self.vectors, self.pattern, self.modes)


def answers(ops: Sequence[str], pattern: str, modes: Sequence[str] = MODES, vectors: Path | None = None) -> Answers:
    """The answers of these ops, and where they are all ops of the whole model, whose id contains the pattern.

    vectors  folder of golden vectors; None: those of the sources, where they are. ValueError where it has none.
    """
    unasked = [f"transformers: {why}"] if (why := transformers_oracle.missing()) else []
    folder: Path | None = None
    if vectors is not None or (len(ops) == len(OPS) and (not pattern or pattern.startswith("model["))):
        folder = vectors or golden.SOURCES
        if why := golden.missing(folder):
            if vectors is not None:
                raise ValueError(why)
            unasked.append(f"{golden.NAME}: {why}")
            folder = None
    forms = closed_forms.chosen(ops, pattern) if "exact" in modes else []
    return Answers(forms, folder, pattern, modes, unasked)


NOTHING = Answers((), None, "", (), ())
