"""Cases from their ids: those that the contract lists, and any other of the same functions with other parameters.

An id is `op[name=value,...]` and says all there is to say about a case: which function of the op's runs follows from
the names, the values are read as that function's signature says, and the seed comes from the id itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from dsv4_hal.conformance.judging.compare import run_case
from dsv4_hal.dispatch import resolve
from dsv4_hal.numerics import numerics_for
from dsv4_hal.ops import OPS, Case
from dsv4_hal.ops.cases.inputs import case, ragged_of
from dsv4_hal.registry import backend_class

LARGEST = 1 << 20  # what a whole number in an id may be: a slip of the finger must not ask for terabytes


def split(id: str) -> tuple[str, dict[str, str]] | None:
    """Op and parameters of an id, as text; None where it has not the form of one."""
    found = re.fullmatch(r"(\w+)\[(\w+=[^=,\[\]]+(?:,\w+=[^=,\[\]]+)*)\]", id)
    if not found:
        return None
    return found[1], dict(cast(tuple[str, str], tuple(part.split("="))) for part in found[2].split(","))


def named(id: str) -> Case:
    """The case of an id. ValueError says why there is none."""
    parts = split(id)
    if parts is None or parts[0] not in OPS:
        raise ValueError(f"{id!r} is no id of a case: op[name=value,...], of an op of the contract")
    op, text = parts
    if id in listed(op):
        return listed(op)[id]
    for run, parameters in functions(op).items():
        required = {name for name, p in parameters.items() if p.default is p.empty}
        if required <= text.keys() <= parameters.keys():
            values = {name: _value(f"{op}[{name}=...]", t, parameters[name].annotation) for name, t in text.items()}
            made = case(op, run, **values)
            if made.id != id:
                raise ValueError(f"{id} is written {made.id}")
            return made
    known = " or ".join("[" + ", ".join(parameters) + "]" for parameters in functions(op).values())
    raise ValueError(f"no case of {op} has just the parameters {', '.join(text)}; there are {known}")


def try_out(case: Case) -> None:
    """ValueError where the case cannot be run at all: nonsense among its parameters, found without a backend."""
    try:
        run_case(case, resolve([backend_class("null")(numerics_for("exact"))]))
    except Exception as error:
        raise ValueError(f"{case.id} cannot be run: {type(error).__name__}: {error}") from error


@cache
def listed(op: str) -> dict[str, Case]:
    """The cases of an op that the contract lists, by id."""
    return {case.id: case for case in OPS[op].cases()}


@cache
def functions(op: str) -> dict[Callable[..., Any], dict[str, inspect.Parameter]]:
    """The functions that run an op's cases, and what they take beside ops and generator."""
    runs = dict.fromkeys(cast(Callable[..., Any], case.function) for case in OPS[op].cases())
    strides = inspect.Parameter("strides", inspect.Parameter.KEYWORD_ONLY, default="", annotation="str")
    return {run: {p.name: p for p in [*list(inspect.signature(run).parameters.values())[2:], strides]} for run in runs}


def _value(name: str, text: str, annotation: str) -> Any:
    """A parameter's value; annotations are text in these modules."""
    if text == "None" and annotation.endswith("| None"):
        return None
    kind = annotation.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"True": True, "False": False}[text]
        if kind == "float":
            return float(text)
        if kind == "int":
            number = int(text)
            if abs(number) > LARGEST:
                raise ValueError
            return number
    except (ValueError, KeyError):
        raise ValueError(f"{name}: {text} is no {kind}" + (f" up to {LARGEST}" if kind == "int" else "")) from None
    if any(int(number) > LARGEST for number in re.findall(r"\d+", text)):
        raise ValueError(f"{name}: {text} has a number above {LARGEST}")
    if name.endswith("[ragged=...]"):
        ragged_of(text)
    return text
