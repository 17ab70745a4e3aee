"""The numeric profile: which dtype holds what, and where a rounding happens.

Ops never name a dtype in passing; they read it here. The profile is what makes two backends comparable: a backend
declares the one it computes in, and the reference computes the same.

There are two modes, `exact` and `deployed`. Where a vendor's devices round elsewhere than the published code, the
package declares a profile of its own, as an entry point of the group `dsv4_hal.profiles` whose object is a `Numerics`
of that name: a mode like the two, for every backend, the reference included. Its dtypes and formats are those that have
names here, so that it can be told as data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch

from dsv4_hal.formats import FORMATS, Format

GROUP = "dsv4_hal.profiles"
MODES = ("exact", "deployed")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}


@dataclass(frozen=True)
class Numerics:
    """Where values are rounded, and to what.

    mode        name of the profile
    storage     dtype of every activation that passes from one op to another
    accumulate  dtype inside an op: sums, softmax, norms, mixing of streams, compressor state, logits
    q_norm      dtype that the per-head query norm rounds squares, mean and reciprocal root to
    score       dtype that indexer scores are rounded to at every step
    probs       dtype of attention probabilities in front of the product with the values
    activation  format an activation is quantised to in front of a quantised weight; None: not quantised
    kv          format of the non-rotary channels of a KV row; None: not quantised
    index       format of indexer queries and keys; None: not quantised
    hadamard    whether indexer queries and keys are rotated by a Hadamard matrix first
    hf32        whether `hc_pre` multiplies streams and weights in HF32: both cut to 10 bits of mantissa first
    """

    mode: str
    storage: torch.dtype
    accumulate: torch.dtype
    q_norm: torch.dtype
    score: torch.dtype
    probs: torch.dtype
    activation: Format | None = None
    kv: Format | None = None
    index: Format | None = None
    hadamard: bool = False
    hf32: bool = False

    def to_dict(self) -> dict[str, str | bool | None]:
        """As text: dtypes and formats by their names."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> Numerics:
        """The profile that `to_dict` tells, of dtypes in DTYPES and formats in FORMATS: data, from whoever it comes.
        ValueError names the key that is wrong."""
        if not isinstance(plain, Mapping) or plain.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"a numeric profile has {', '.join(field.name for field in fields(cls))}; got {plain!r}")
        return cls(**{field.name: _read(field.name, str(field.type), plain[field.name]) for field in fields(cls)})


def _plain(value: Any) -> str | bool | None:
    if isinstance(value, Format):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _read(name: str, kind: str, value: object) -> Any:
    """A field from text; annotations are text in this module."""
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "Format | None" and value is None:
        return None
    known: Mapping[str, Any] = {"torch.dtype": DTYPES, "Format | None": FORMATS}.get(kind, {})
    if isinstance(value, str) and (kind == "str" or value in known):
        return known.get(value, value)
    raise ValueError(f"a numeric profile's {name} must be {', '.join(known) or kind}, got {value!r}")


def exact(dtype: torch.dtype = torch.float32) -> Numerics:
    """No quantisation of activations or cache rows, no Hadamard; everything in `dtype`, sums in at least float32."""
    if dtype not in _FLOATS:
        raise ValueError(f"mode exact computes in float64, float32, bfloat16 or float16, not {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Numerics("exact", storage=dtype, accumulate=wide, q_norm=wide, score=wide, probs=wide)


def deployed(accumulate: torch.dtype = torch.float32) -> Numerics:
    """The rounding points of the published inference code: bf16 between ops, FP8 activations and KV rows, FP4 indexer.

    accumulate=float64 keeps every rounding point and only widens what lies between them: the run that tolerances of
    this mode are derived from.
    """
    bf16 = torch.bfloat16
    return Numerics(
        "deployed",
        storage=bf16,
        accumulate=accumulate,
        q_norm=bf16,
        score=bf16,
        probs=bf16,
        activation=FORMATS["e4m3_1x128"],
        kv=FORMATS["e4m3_1x64"],
        index=FORMATS["mxfp4"],
        hadamard=True,
    )


def numerics_for(mode: str, dtype: torch.dtype | None = None) -> Numerics:
    """The profile of a mode by name. `dtype` is the compute dtype of `exact`; every other mode fixes its own.

    ValueError names the nearest one for a mode that is not known, and says of a declared one why it does not load.
    """
    if mode in MODES and mode in _declared():
        raise ValueError(f"mode {mode} is this project's, and {_declared()[mode][0].value} declares one of that name")
    if mode == "exact":
        return exact(dtype or torch.float32)
    found = deployed() if mode == "deployed" else _load(mode)
    if dtype not in (None, found.storage):
        stored, given = (str(one).removeprefix("torch.") for one in (found.storage, dtype))
        raise ValueError(f"mode {mode} stores activations in {stored}; dtype {given} only goes with mode exact")
    return found


def mode_names() -> tuple[str, ...]:
    """exact, deployed, and the profiles that installed packages declare."""
    return (*MODES, *sorted(_declared().keys() - set(MODES)))


@cache
def _declared() -> dict[str, list[EntryPoint]]:
    """Entry points by name: several where packages claim the same one."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        if entry.value not in [other.value for other in found.setdefault(entry.name, [])]:
            found[entry.name].append(entry)
    return found


def _load(mode: str) -> Numerics:
    if mode not in _declared():
        near = get_close_matches(mode, mode_names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown mode {mode!r}: there are {', '.join(mode_names())}{hint}")
    entry, *others = _declared()[mode]
    if others:
        claims = ", ".join(one.value for one in (entry, *others))
        raise ValueError(f"mode {mode} is declared more than once: {claims}; uninstall all but one")
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:  # a vendor's package may fail in any way it likes
        raise ValueError(f"mode {mode}: {entry.value} does not load: {type(error).__name__}: {error}") from error
    if not isinstance(found, Numerics) or found.mode != mode:
        raise ValueError(f"mode {mode}: {entry.value} is {found!r}, not a profile of that name")
    try:
        if Numerics.from_dict(found.to_dict()) != found:
            raise ValueError("it has a format that is not that of its name")
    except ValueError as error:
        raise ValueError(f"mode {mode}: {entry.value}: {error}") from error
    return found
