"""Another number format for a checkpoint's weights: file by file, resumable, with the error of every tensor.

A converted file is written beside its name and renamed when it is whole; a journal in the output folder says which are
done, and of which source. `config.json` and the index come last: until then the folder is no checkpoint, and the same
command goes on where it was stopped. At any time one converted file is in memory, and one tensor in a few copies of
float32.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4_hal.formats import FORMATS, Format, QTensor, dequantize, quantize
from dsv4_hal.model.checkpoint import (
    INDEX,
    SINGLE,
    CheckpointError,
    Stored,
    checked_table,
    finish_file,
    format_in,
    read_metadata,
)
from dsv4_hal.model.config import ModelConfig, load_config, stored_as
from dsv4_hal.model.weights import WeightSpec, scale_name, weight_table

# Name of a target -> how its weights are stored, a key of `config.STORED_AS`.
TARGETS: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16", "ascend-a3-w8a8": "w8a8", "ascend-a3-w4a8": "w4a8"})
JOURNAL, REPORT, TABLE = "conversion.jsonl", "conversion.json", "conversion.md"
WORK = "conversion.partial"  # folder of the file that is being written: safetensors leaves more than its name there
SHRINK = tuple(1 - 0.03 * step for step in range(11))  # of the scale of an INT4 row, to find the one of least error


@dataclass(frozen=True)
class Change:
    """What became of one tensor, against its values in the source.

    max_error      largest error over the largest value
    rms_error      root of the mean square error over the mean square
    worst_channel  output channel with the largest root mean square error over its own mean square
    worst_error    that error
    """

    name: str
    source: str
    target: str
    max_error: float
    rms_error: float
    worst_channel: int
    worst_error: float


@dataclass(frozen=True)
class Conversion:
    """What was done. nbytes: of the data files, before and after."""

    changes: tuple[Change, ...]
    kept: int
    nbytes: tuple[int, int]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the checkpoint `source` into the folder `target`, its weights stored as `to`, a key of TARGETS.

    What is stored so already is copied, bytes only; quantised weights are dequantised in float32 and rounded once. INT4
    rows take the scale of least square error among SHRINK times their largest value. Other files of the source
    (tokenizer, generation settings) are copied too, folders in it are not. The folder also gets the report, REPORT and,
    to read, TABLE.

    progress  called with (bytes read, bytes in all)

    A folder that a conversion of the same source to the same format was stopped in is gone on with. CheckpointError:
    it holds anything else, or another process writes it, the source is not sound or is `to` already, a tensor that is
    converted holds NaN or infinity, the disk refuses.
    """
    if to not in TARGETS:
        raise ValueError(f"no target is called {to!r}; there are {', '.join(TARGETS)}")
    source, target = Path(source).absolute(), Path(target).absolute()
    cfg = load_config(source)
    wanted = stored_as(cfg, TARGETS[to])
    if wanted == cfg:
        raise CheckpointError(f"{source}: is stored as {to} already")
    table, found = checked_table(source, cfg)
    formats = {name: spec.format for name, spec in weight_table(wanted).items() if name in table}
    try:
        journal = _Journal.open(target, {"source": _fingerprint(source, found), "to": to})
        return _convert(source, target, wanted, table, found, formats, journal, progress or (lambda done, total: None))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: conversion of {source} stopped: {error}") from error


def _convert(
    source: Path,
    target: Path,
    wanted: ModelConfig,
    table: Mapping[str, WeightSpec],
    found: Mapping[str, Stored],
    formats: Mapping[str, str],
    journal: _Journal,
    progress: Callable[[int, int], None],
) -> Conversion:
    metadata = read_metadata(source)
    plan = _by_file(table, found)
    total, read = sum(stored.nbytes for stored in found.values()), 0
    for file, tensors in plan.items():
        if file not in journal.done:
            held: dict[str, Tensor] = {}
            changes: list[Change] = []
            with _reader(found) as read_tensor:
                for name, spec in tensors:
                    made, change = _tensor(name, spec, formats[spec.name], found, read_tensor)
                    held |= made
                    changes += change
            _save(held, target / file, metadata)
            journal.add(target / file, {name: t.nbytes for name, t in held.items()}, changes)
        read += sum(found[n].nbytes for name, _ in tensors for n in (name, scale_name(name)) if n in found)
        progress(read, total)
    for other in sorted(source.iterdir()):
        if other.is_file() and other.suffix != ".safetensors" and other.name not in (INDEX, "config.json", JOURNAL):
            shutil.copyfile(other, target / other.name)
    return journal.finish(wanted, sum(path.stat().st_size for path in {stored.file for stored in found.values()}))


def _by_file(table: Mapping[str, WeightSpec], found: Mapping[str, Stored]) -> dict[str, list[tuple[str, WeightSpec]]]:
    """File -> the tensors of it that have values of their own (no scales), with the row of the table they belong to."""
    plan: dict[str, list[tuple[str, WeightSpec]]] = {}
    for spec in table.values():
        for name in (name for parts in spec.sources for name in parts):
            plan.setdefault(found[name].file.name, []).append((name, spec))
    return dict(sorted(plan.items()))


@contextlib.contextmanager
def _reader(found: Mapping[str, Stored]) -> Iterator[Callable[[str], Tensor]]:
    """Reads stored tensors by name; each of their files is opened once."""
    opened: dict[Path, Any] = {}
    with contextlib.ExitStack() as stack:

        def read(name: str) -> Tensor:
            path = found[name].file
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, "pt"))
            tensor: Tensor = opened[path].get_tensor(name)
            return tensor

        yield read


def _tensor(
    name: str, spec: WeightSpec, wanted: str, found: Mapping[str, Stored], read: Callable[[str], Tensor]
) -> tuple[dict[str, Tensor], list[Change]]:
    """One tensor in its new format, with its scales, and what that changed, if anything."""
    data, scales = read(name), scale_name(name)
    scale = read(scales) if scales in found else None
    have = (
        wanted
        if wanted == "int64"
        else format_in(found[name].dtype, None if scale is None else found[scales].dtype, spec)
    )
    if have == wanted:
        return {name: data} | ({} if scale is None else {scales: scale}), []
    values = dequantize(QTensor(data, scale, FORMATS[have]), torch.float32)
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{found[name].file}: tensor {name} holds NaN or infinity")
    stored = to_format(values, FORMATS[wanted]) if values.dim() > 1 else quantize(values, FORMATS[wanted])
    again = dequantize(stored, torch.float32)
    if not bool(again.isfinite().all()):
        raise CheckpointError(f"{found[name].file}: tensor {name} holds values too large for {wanted}")
    made = {name: stored.data} | ({} if stored.scale is None else {scales: stored.scale})
    return made, [_change(name, have, wanted, values, again)]


def to_format(values: Tensor, fmt: Format) -> QTensor:
    """Values [out, in] in `fmt`; INT4 rows with the scale of SHRINK that leaves the least square error."""
    if fmt.element != "int4":
        return quantize(values, fmt)
    largest = values.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, float("inf"))
    top = largest
    for factor in SHRINK:
        scale = (largest * factor).clamp(min=fmt.floor) / fmt.top
        rounded = (values / scale).round_().clamp_(-fmt.top, fmt.top).mul_(scale)
        error = rounded.sub_(values).square_().sum(-1, keepdim=True)
        top, best = torch.where(error < best, largest * factor, top), torch.minimum(best, error)
    return quantize(torch.clamp(values, -top, top), fmt)  # a row's largest value decides its scale


def _change(name: str, have: str, wanted: str, values: Tensor, made: Tensor) -> Change:
    rows, error = (t.reshape(-1, t.shape[-1]) for t in (values, made - values))
    wrong, size = (t.square().sum(-1, dtype=torch.float64) for t in (error, rows))
    channels = (wrong / size).nan_to_num(0.0)  # a row of zeros stays one
    worst = int(channels.argmax())
    largest, square = float(rows.abs().max()), float(size.sum())
    return Change(
        name,
        have,
        wanted,
        float(error.abs().max()) / largest if largest else 0.0,
        (float(wrong.sum()) / square) ** 0.5 if square else 0.0,
        worst,
        float(channels[worst]) ** 0.5,
    )


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """The file is whole under its name, or not there: on the disk too, before a journal says that it is done."""
    partial = path.parent / WORK / path.name
    partial.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, {"format": "pt", **metadata})
    finish_file(partial)
    os.replace(partial, path)


def _fingerprint(source: Path, found: Mapping[str, Stored]) -> str:
    """Of configuration, headers, and the size and time of every file: a source that changed is another one."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for path in sorted({stored.file for stored in found.values()}):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update("".join(f"{name} {stored}\n" for name, stored in sorted(found.items())).encode())
    return digest.hexdigest()


class _Journal:
    """What is done, a line of JSON for each file, in the output folder.

    done     file -> its line
    file     the journal, open and locked: two conversions never write one folder
    """

    def __init__(self, folder: Path, done: dict[str, dict[str, Any]], file: IO[str]) -> None:
        self.folder, self.done, self.file = folder, done, file

    @classmethod
    def open(cls, folder: Path, about: Mapping[str, str]) -> _Journal:
        """Of a folder that is new or empty, or that a conversion like this was stopped in."""
        path = folder / JOURNAL
        if folder.exists() and not path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: exists and is not an empty directory; nothing is overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another conversion is writing to it") from None
        try:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            begun, *entries = map(json.loads, whole or [json.dumps(about)])
            done = {line["file"]: line for line in entries if _is_whole(folder / line["file"], line["nbytes"])}
            to = begun["to"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is no journal of a conversion: {error!r}") from error
        if begun != about:
            other = f"to {to}" if to != about["to"] else "of another source"
            raise CheckpointError(f"{folder}: holds a conversion {other}, begun and not ended; remove it first")
        if not whole:  # new, or stopped before anything was done
            if any(found != path for found in folder.iterdir()):
                raise CheckpointError(f"{folder}: exists and is not an empty directory; nothing is overwritten")
            os.truncate(path, 0)
            _append(file, about)
        else:  # without a last line that was cut off; in place, which a full disk allows
            os.truncate(path, len("".join(whole).encode()))
            shutil.rmtree(folder / WORK, ignore_errors=True)
        return cls(folder, done, file)

    def add(self, path: Path, tensors: Mapping[str, int], changes: list[Change]) -> None:
        file, told = path.name, [asdict(change) for change in changes]
        line = {"file": file, "nbytes": path.stat().st_size, "tensors": tensors, "changes": told}
        _append(self.file, line)
        self.done[file] = line

    def finish(self, cfg: ModelConfig, before: int) -> Conversion:
        """Index, configuration and report; the journal is removed last."""
        placed = {name: file for file, line in self.done.items() for name in line["tensors"]}
        if list(self.done) != [SINGLE]:
            total = sum(n for line in self.done.values() for n in line["tensors"].values())
            self._write(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
        changes = tuple(Change(**change) for line in self.done.values() for change in line["changes"])
        after = sum((self.folder / file).stat().st_size for file in self.done)
        made = Conversion(changes, sum(not name.endswith(".scale") for name in placed) - len(changes), (before, after))
        self._write(REPORT, asdict(made))
        (self.folder / TABLE).write_text(table(made), encoding="utf-8")
        self._write("config.json", cfg.to_dict())
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        (self.folder / JOURNAL).unlink()
        self.file.close()
        return made

    def _write(self, name: str, content: Any) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / name)


def _append(file: IO[str], line: Any) -> None:
    """Write a line of JSON, and wait until it is on the disk."""
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _is_whole(path: Path, nbytes: int) -> bool:
    """Whether the file is there, and as long as it was written: not so where the machine went down with it."""
    return path.is_file() and path.stat().st_size == nbytes


def table(made: Conversion) -> str:
    """The report to read, in Markdown: the tensors with the largest errors first."""
    before, after = made.nbytes
    lines = [
        "# Conversion",
        "",
        f"{len(made.changes)} tensors converted, {made.kept} kept as they were; {before} bytes before, {after} after.",
        "",
        "Errors are against the values of the source: largest error over largest value; root mean square error over",
        "root mean square; and the output channel where the latter is worst.",
        "",
        "| tensor | from | to | largest | rms | worst channel | its rms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in sorted(made.changes, key=lambda c: -c.rms_error):
        errors = f"{c.max_error:.3e} | {c.rms_error:.3e} | {c.worst_channel} | {c.worst_error:.3e}"
        lines.append(f"| {c.name} | {c.source} | {c.target} | {errors} |")
    return "\n".join(lines) + "\n"


def by_kind(made: Conversion) -> Iterator[tuple[str, str, int, float, float, Change]]:
    """Of all tensors of a kind: from, to, how many, average rms error, the largest one, the tensor that has it."""
    kinds: dict[tuple[str, str], list[Change]] = {}
    for change in made.changes:
        kinds.setdefault((change.source, change.target), []).append(change)
    for (source, target), changes in kinds.items():
        worst = max(changes, key=lambda c: c.rms_error)
        yield source, target, len(changes), sum(c.rms_error for c in changes) / len(changes), worst.rms_error, worst
