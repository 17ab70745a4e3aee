"""A run in a file: what a backend made of every case, to be judged on a machine that it never met.

A bundle is one file (see `container.py`). Its tensors are the bytes of the results ("case@mode/result"). Its header
names the backend, its numeric profiles, versions and machine; how each op ran; and of every result dtype, shape and
strides, or what went wrong where there is none. Inputs are not stored: they follow from the case's id, and a finger-
print shows that this machine draws the same. The code that judges a live run judges a bundle: verdicts are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from dsv4_hal.conformance.judging.named import named
from dsv4_hal.conformance.judging.profiles import known
from dsv4_hal.conformance.judging.results import WHOLE, About, Extent, Job, Produced, Suite, claims, suite
from dsv4_hal.conformance.judging.waivers import Waiver, check
from dsv4_hal.conformance.workers import container
from dsv4_hal.conformance.workers.container import BundleError
from dsv4_hal.conformance.workers.transport import Packed, octets
from dsv4_hal.ops import OPS, SIZES, cases


@dataclass(frozen=True)
class Bundle:
    """A recorded run.

    about    what the backend said of itself
    made     the jobs in order, and what became of each
    waivers  those that lay beside the backend
    extent   size classes that were run
    suite    how many cases there are, and which are not there
    """

    backend: str
    about: About
    made: tuple[tuple[Job, Produced], ...]
    waivers: tuple[Waiver, ...]
    extent: Extent
    suite: Suite


@dataclass(frozen=True)
class _Result:
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class _Case:
    op: str
    case: str
    mode: str
    size: str
    runs_as: str
    device: str
    verdict: str
    message: str
    seconds: float
    refused: str
    trace: str
    results: Mapping[str, _Result] | None


@dataclass(frozen=True)
class _Header:
    backend: str
    profiles: Mapping[str, Mapping[str, object]]
    environment: Mapping[str, Mapping[str, str]]
    extent: Extent
    contract: str
    inputs: str
    waivers: Sequence[Waiver]
    suite: Suite
    remarks: Sequence[str]
    cases: Sequence[_Case]


_HEADER = TypeAdapter(_Header)
_TOLD = ("runs_as", "device", "verdict", "message", "seconds", "refused", "trace")
NEEDED = (("program", "dsv4-hal"), ("packages", "torch"), ("machine", "python"), ("machine", "system"))


def write_bundle(
    path: Path,
    backend: str,
    about: About,
    made: Iterable[tuple[Job, Produced]],
    waivers: Iterable[Waiver] = (),
    extent: Extent = WHOLE,
) -> None:
    """Write what a backend made. The file appears whole or not at all; FileExistsError if there is one already."""
    container.refuse_existing(path)
    tensors, cases, made = {}, [], list(made)
    for job, produced in made:
        results = {}
        for name, packed in (produced.results or {}).items():
            tensors[f"{job.id}/{name}"] = torch.tensor(np.frombuffer(packed.data, np.uint8))
            kind = str(packed.dtype).removeprefix("torch.")
            results[name] = {"dtype": kind, "shape": packed.shape, "strides": packed.strides, "device": packed.device}
        told = asdict(job) | {field: getattr(produced, field) for field in _TOLD}
        cases.append(told | {"results": None if produced.results is None else results})
    header = {
        "backend": backend,
        "profiles": about.profiles,
        "environment": about.environment,
        "remarks": list(about.remarks),
        "extent": asdict(extent),
        "suite": asdict(suite((job for job, _ in made), extent)),
        "contract": contract(),
        "inputs": inputs(),
        "waivers": [waiver.to_dict() for waiver in waivers],
        "cases": cases,
    }
    container.write(path, "ops", header, tensors)


def read_bundle(path: Path) -> Bundle:
    """A bundle that this version can judge. BundleError names the file and why it cannot be."""
    plain, tensors = container.read(path, "ops")
    try:
        header = _HEADER.validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BundleError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for section, name in NEEDED:
        if name not in header.environment.get(section, {}):
            raise BundleError(f"{path}: environment.{section}.{name}: Field required")
    by, torch_there = header.environment["program"]["dsv4-hal"], header.environment["packages"]["torch"]
    if header.contract != contract():
        raise BundleError(f"{path}: made by dsv4-hal {by}, whose cases are others than those here")
    if header.inputs != inputs():
        raise BundleError(f"{path}: torch {torch_there} drew other inputs there than {torch.__version__} does here")
    if not {header.extent.size, header.extent.affords} <= set(SIZES):
        raise BundleError(f"{path}: extent: a size class must be one of {', '.join(SIZES)}")
    for mode, profile in header.profiles.items():
        try:
            known(mode.removesuffix(".grad"), profile)
        except ValueError as error:
            raise BundleError(f"{path}: profiles.{mode}: {error}") from error
    for number, waiver in enumerate(header.waivers):
        try:
            check(waiver)
        except ValueError as error:
            raise BundleError(f"{path}: waivers.{number}: {error}") from error
    made = tuple(_made(path, header, tensors))
    if not made:
        raise BundleError(f"{path}: cases: there are none")
    found = suite((job for job, _ in made), header.extent)
    if (header.suite.cases, set(header.suite.missing)) != (found.cases, set(found.missing)):
        raise BundleError(f"{path}: suite: it says {header.suite}, and it has {found}")
    about = About("", header.profiles, header.environment, header.extent.affords, header.remarks)
    return Bundle(header.backend, about, made, tuple(header.waivers), header.extent, found)


def _made(path: Path, header: _Header, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[Job, Produced]]:
    """BundleError names the case that is wrong."""
    seen = set[str]()
    for case in header.cases:
        job = Job(case.op, case.case, case.mode, case.size)
        if wrong := "it is there twice" if job.id in seen else _wrong(case, header.profiles.keys()):
            raise BundleError(f"{path}: {job.id}: {wrong}")
        seen.add(job.id)
        results = None
        if case.results is not None:
            results = {name: _packed(path, f"{job.id}/{name}", told, tensors) for name, told in case.results.items()}
        told = {field: getattr(case, field) for field in _TOLD}
        yield job, Produced(**told, results=results)


def _wrong(case: _Case, modes: Collection[str]) -> str:
    """What is wrong with what a bundle says of a case; "" if nothing. modes: those that it has a profile of."""
    try:
        named(case.case)
    except ValueError as error:
        return str(error)
    if case.case.partition("[")[0] != case.op:
        return f"it is no case of {case.op}"
    if case.mode not in modes:
        return f"{case.mode!r} is no mode that the bundle has a profile of"
    if case.size not in SIZES:
        return f"{case.size!r} is no size class"
    return claims(case.verdict, case.results is not None)


def _packed(path: Path, name: str, told: _Result, tensors: Mapping[str, torch.Tensor]) -> Packed:
    """A result, which must fit its dtype, shape and strides."""
    dtype = getattr(torch, told.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise BundleError(f"{path}: {name}: {told.dtype!r} is no dtype")
    if len(told.shape) != len(told.strides) or min((*told.shape, *told.strides), default=0) < 0:
        raise BundleError(f"{path}: {name}: strides {told.strides} do not fit shape {told.shape}")
    if name not in tensors:
        raise BundleError(f"{path}: {name}: its bytes are missing")
    data = octets(tensors[name]).numpy().tobytes()
    size = 0 if told.device == "meta" else math.prod(told.shape) * dtype.itemsize
    if len(data) != size:
        raise BundleError(f"{path}: {name}: {len(data)} bytes, and {told.dtype} of shape {told.shape} takes {size}")
    return Packed(data, dtype, told.shape, told.strides, told.device)


@cache
def contract() -> str:
    """A fingerprint of the ops, their cases, and what makes these: a bundle is judged by the cases it was made of."""
    digest = hashlib.sha256("\n".join(case.id for spec in OPS.values() for case in spec.cases()).encode())
    for file in sorted(Path(cases.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def inputs() -> str:
    """A fingerprint of what this machine's generator draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.randn(1000, generator=generator),
        torch.rand(1000, generator=generator),
        torch.randint(1 << 31, (1000,), generator=generator),
        torch.randperm(1000, generator=generator),
    )
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in drawn)).hexdigest()
