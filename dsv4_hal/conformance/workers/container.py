"""The file that carries a recording from one machine to another: tensors and a JSON header, checksummed.

It is a safetensors file whose metadata holds the header and a sum over all of it. `kind` says what was recorded, and a
file of another kind, of another version, or with one changed byte is refused with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4_hal.conformance.workers.files import whole
from dsv4_hal.conformance.workers.transport import octets

FORMAT = "4"
KINDS = {"ops": "cases of the contract (`record`)", "model": "a whole model (`record --model`)"}


class BundleError(ValueError):
    """A file that is no bundle, is damaged, or does not fit what is here; the message names it and says why."""


def write(path: Path, kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The file appears whole or not at all; FileExistsError if there is one already."""
    refuse_existing(path)
    text = json.dumps({"format": FORMAT, "kind": kind, **header})
    with whole(path) as partial:
        try:
            save_file(dict(tensors), partial, {"dsv4_hal": text, "sum": checksum(text, tensors)})
        except SafetensorError as error:  # of a full disk, too
            raise BundleError(f"{path}: cannot be written: {error}") from error


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"{path} exists, and a bundle is not written over it")


def read(path: Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors. kind: refuse any other. BundleError names the file and why it cannot be read."""
    header = read_header(path)
    if kind is not None and header["kind"] != kind:
        raise BundleError(f"{path}: holds {KINDS[header['kind']]}, and needed is one of {KINDS[kind]}")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: damaged: {error}") from error
    if checksum(metadata["dsv4_hal"], tensors) != metadata.get("sum"):
        raise BundleError(f"{path}: damaged: its checksum does not fit its contents")
    return header, tensors


def read_header(path: Path) -> dict[str, Any]:
    """The header alone, its sum unchecked."""
    if path.exists() and not path.is_file():
        raise BundleError(f"{path}: not a regular file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise BundleError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: damaged, or no bundle: {error}") from error
    if "dsv4_hal" not in metadata:
        raise BundleError(f"{path}: a safetensors file, but no bundle")
    try:
        header = json.loads(metadata["dsv4_hal"])
        known = header["format"] == FORMAT
    except RecursionError as error:
        raise BundleError(f"{path}: damaged: its header is nested too deeply") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: damaged: its header cannot be read") from error
    if not known:
        raise BundleError(f"{path}: of format {header['format']}; this version reads format {FORMAT}")
    if header.get("kind") not in KINDS:
        raise BundleError(f"{path}: holds {header.get('kind')!r}, which this version does not know")
    return header


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the header and of every tensor: name, dtype, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        digest.update(octets(t).numpy().data)
    return digest.hexdigest()
