"""A run in a file: what a backend made of every case, to be judged on a machine that it never met.

A bundle is one file (see `container.py`). Its tensors are the bytes of the results ("case@mode/result"). Its header
names the backend, its numeric profiles, versions and machine; how each op ran; and of every result dtype, shape and
strides, or what went wrong where there is none. Inputs are not stored: they follow from the case's id, and a finger-
print shows that this machine draws the same. The code that judges a live run judges a bundle: verdicts are the same.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv4_hal.conformance import container
from dsv4_hal.conformance.container import BundleError
from dsv4_hal.conformance.runner import WHOLE, About, Extent, Job, Produced
from dsv4_hal.conformance.transport import Packed
from dsv4_hal.conformance.waivers import Waiver
from dsv4_hal.ops import OPS


@dataclass(frozen=True)
class Bundle:
    """A recorded run.

    about    what the backend said of itself
    made     the jobs in order, and what became of each
    waivers  those that lay beside the backend
    extent   size classes that were run
    """

    backend: str
    about: About
    made: tuple[tuple[Job, Produced], ...]
    waivers: tuple[Waiver, ...]
    extent: Extent = WHOLE


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
    tensors, cases = {}, []
    for job, produced in made:
        results = {}
        for name, packed in (produced.results or {}).items():
            tensors[f"{job.id}/{name}"] = torch.tensor(np.frombuffer(packed.data, np.uint8))
            kind = str(packed.dtype).removeprefix("torch.")
            results[name] = {"dtype": kind, "shape": packed.shape, "strides": packed.strides, "device": packed.device}
        told = asdict(job) | {
            field: getattr(produced, field) for field in ("runs_as", "device", "verdict", "message", "seconds")
        }
        cases.append(told | {"results": None if produced.results is None else results})
    header = {
        "backend": backend,
        "profiles": about.profiles,
        "environment": about.environment,
        "extent": asdict(extent),
        "contract": contract(),
        "inputs": inputs(),
        "waivers": [asdict(waiver) | {"date": waiver.date.isoformat()} for waiver in waivers],
        "cases": cases,
    }
    container.write(path, "ops", header, tensors)


def read_bundle(path: Path) -> Bundle:
    """A bundle that this version can judge. BundleError names the file and why it cannot be."""
    header, tensors = container.read(path, "ops")
    by = header["environment"]["packages"] | header["environment"]["program"]
    if header["contract"] != contract():
        raise BundleError(f"{path}: made by dsv4-hal {by['dsv4-hal']}, whose cases are others than those here")
    if header["inputs"] != inputs():
        raise BundleError(f"{path}: torch {by['torch']} drew other inputs there than {torch.__version__} does here")
    waivers = (Waiver(**{**w, "date": datetime.date.fromisoformat(w["date"])}) for w in header["waivers"])
    extent = Extent(**header["extent"])
    about = About("", header["profiles"], header["environment"], extent.affords)
    return Bundle(header["backend"], about, tuple(_made(header["cases"], tensors)), tuple(waivers), extent)


def _made(cases: Iterable[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[Job, Produced]]:
    for case in cases:
        job = Job(case["op"], case["case"], case["mode"], case["size"])
        results = None
        if case["results"] is not None:
            results = {
                name: Packed(
                    tensors[f"{job.id}/{name}"].numpy().tobytes(),
                    getattr(torch, about["dtype"]),
                    tuple(about["shape"]),
                    tuple(about["strides"]),
                    about["device"],
                )
                for name, about in case["results"].items()
            }
        yield (
            job,
            Produced(case["runs_as"], case["device"], results, case["verdict"], case["message"], case["seconds"]),
        )


def contract() -> str:
    """A fingerprint of the ops and their cases: a bundle is judged by the cases it was made of."""
    names = [case.id for spec in OPS.values() for case in spec.cases()]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


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
