"""The reference against golden vectors: what the published DeepSeek-V4 code computed on a small checkpoint, recorded.

A folder of golden vectors is a checkpoint with two more files, of logits and of the inputs and outputs of every block:
  expected_exact.safetensors  prefill.logits, decode.logits, prefill.mtp_logits: run without any quantisation
  expected.safetensors        tokens; {prefill,decode}.layers.{i}.{attn,ffn}.{in,out}: run as deployed
In mode deployed every block runs from its recorded input, since random weights amplify the last bit of bf16. Budgets
are as everywhere: eight times what the reference differs by from itself in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsv4_hal.backend import described
from dsv4_hal.batch import Batch
from dsv4_hal.conformance.judging.budget import derive, nmse, of_budget
from dsv4_hal.conformance.judging.compare import widen
from dsv4_hal.conformance.judging.results import Outcome
from dsv4_hal.conformance.models.drift import FACTOR, raised
from dsv4_hal.conformance.models.run import load
from dsv4_hal.model.step import Step
from dsv4_hal.model.transformer import Model
from dsv4_hal.numerics import MODES, numerics_for
from dsv4_hal.registry import FALLBACK

NAME = "golden vectors"
FILES = {"exact": "expected_exact.safetensors", "deployed": "expected.safetensors"}
_NAMES = {"exact": re.compile(r"(.*logits)"), "deployed": re.compile(r"prefill\.(layers\.\d+\.(?:attn|ffn))\.in")}
SOURCES = Path(__file__).parents[3] / "tests" / "data" / "tiny"  # where the sources are


def missing(directory: Path) -> str:
    """Why the folder has no golden vectors; "" if it has."""
    absent = [name for name in sorted(FILES.values()) if not (directory / name).is_file()]
    return f"{directory} has no {absent[0]}: --golden DIR names a folder that has" if absent else ""


def chosen(directory: Path, pattern: str = "", modes: Sequence[str] = MODES) -> dict[str, list[str]]:
    """Mode -> names of what is compared, logits or blocks, whose id contains the pattern.

    ValueError for a damaged file.
    """
    found: dict[str, list[str]] = {}
    for mode in [mode for mode in modes if mode in FILES]:  # nobody published values in another profile
        try:
            with safe_open(directory / FILES[mode], framework="pt") as file:
                names = [name[1] for key in file.keys() if (name := _NAMES[mode].fullmatch(key))]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{directory / FILES[mode]}: {error}") from error
        if mine := [name for name in names if pattern in f"{case_id(name)}@{mode}"]:
            found[mode] = mine
    return found


def outcomes(directory: Path, names: Mapping[str, Sequence[str]]) -> Iterator[Outcome]:
    """Of these comparisons; names as `chosen` returns them. What raises ends those of its mode, as errors."""
    for mode in names:
        done = 0
        try:
            for outcome in _compared(directory, mode, names[mode]):
                yield outcome
                done += 1
        except Exception as error:
            for name in names[mode][done:]:
                yield replace(_about(name, mode), message=described(error))


def case_id(name: str) -> str:
    return f"model[golden={name}]"


def _about(name: str, mode: str) -> Outcome:
    return Outcome(FALLBACK, "model", case_id(name), mode, "reference", "error", size="quick", against=(NAME,))


def _compared(directory: Path, mode: str, names: Sequence[str]) -> Iterator[Outcome]:
    tokens = load_file(directory / FILES["deployed"])["tokens"]
    numerics = numerics_for(mode)
    narrow, wide = (load(str(directory), FALLBACK, n) for n in (numerics, widen(numerics)))
    compare = _logits if mode == "exact" else _blocks
    return compare(names, load_file(directory / FILES[mode]), tokens, narrow, wide)


def _logits(
    names: Sequence[str], want: Mapping[str, Tensor], tokens: Tensor, narrow: Model, wide: Model
) -> Iterator[Outcome]:
    """Of prefill, of decode token by token through the cache, and of MTP."""
    split = want["prefill.logits"].shape[1]
    cache, drafted = narrow.new_cache(len(tokens), tokens.shape[1]), (tokens[:, :split], tokens[:, 1 : split + 1])
    got = {
        "prefill.logits": narrow(tokens[:, :split], cache),
        "decode.logits": torch.cat([narrow(t, cache) for t in tokens[:, split:].split(1, dim=1)], 1),
        "prefill.mtp_logits": narrow.mtp_logits(*drafted),
    }
    at_once = wide(tokens)  # without a cache: the same numbers in this mode
    exactly = {
        "prefill.logits": at_once[:, :split],
        "decode.logits": at_once[:, split:],
        "prefill.mtp_logits": wide.mtp_logits(*drafted),
    }
    for name in names:
        yield _outcome(name, "exact", got[name], want[name], exactly[name])


def _blocks(
    names: Sequence[str], want: Mapping[str, Tensor], tokens: Tensor, narrow: Model, wide: Model
) -> Iterator[Outcome]:
    """Of blocks: the tokens of prefill and of decode in one step."""
    steps = [
        Step(tokens.flatten(), model.plan(Batch.packed([tokens.shape[1]] * len(tokens)))) for model in (narrow, wide)
    ]
    for name in names:
        _, layer, part = name.split(".")
        given, expected = (
            torch.cat([want[f"{phase}.{name}.{end}"] for phase in ("prefill", "decode")], 1).flatten(0, 1)
            for end in ("in", "out")
        )
        got, exactly = (
            getattr(model.layers[int(layer)], part)(given, step)
            for model, step in zip((narrow, wide), steps, strict=True)
        )
        yield _outcome(name, "deployed", got, expected, exactly)


def _outcome(name: str, mode: str, got: Tensor, want: Tensor, exactly: Tensor) -> Outcome:
    budget = derive(got, exactly, FACTOR)
    if name.endswith("attn"):
        budget = raised(budget, numerics_for(mode))
    found = nmse(got, want, budget)
    return replace(
        _about(name, mode),
        verdict="agrees" if found.ok else "disagrees",
        message=found.message,
        of_budget=of_budget(found, budget),
        metrics={"y": found.metrics},
    )
