"""Checkpoints in the official format: check, load, save, and make one of random weights.

Loading reads every header first, so that whatever is wrong with the files is said before any data is touched.
Tensors that are used as they lie in the file stay views of the memory-mapped file; parts that belong in one matrix
(w1 and w3, the experts of a layer) are copied, bytes only, and the pages they came from are released layer by layer.
Files are safetensors only; nothing here unpickles. Format: huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4_hal.formats.quantize import quantize
from dsv4_hal.formats.types import FORMATS, Weight
from dsv4_hal.model.config import ModelConfig, listing, stored_as
from dsv4_hal.model.weights import FileTensor, WeightSpec, checkpoint_tensors, scale_name, weight_table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RANDOM_KEY = "dsv4_hal.weights"  # key of the files' metadata that says where the weights come from

log = logging.getLogger("dsv4_hal")


class CheckpointError(ValueError):
    """Checkpoint files that cannot be used or written; the message names the files and tensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a file's header declares it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0


# safetensors' names of the dtypes that official files use.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I8": torch.int8,
        "I64": torch.int64,
    }
)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Format of a matrix by the dtypes that its codes and scales have in the file, where the table leaves it open.
_FORMAT_OF: Mapping[tuple[str, str | None], str] = MappingProxyType(
    {
        ("F32", None): "fp32",
        ("BF16", None): "bf16",
        ("F8_E4M3", "F8_E8M0"): "e4m3_128x128",
        ("F8_E4M3", "F32"): "e4m3_128x128_fp32",
    }
)


# --- loading --------------------------------------------------------------------------------------------------------


def load_weights(
    directory: str | os.PathLike[str],
    cfg: ModelConfig,
    *,
    place: Callable[[Weight], Weight] = lambda weight: weight,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Weight | Tensor]:
    """The weights of the checkpoint in `directory`, by the names of `weight_table(cfg)` and in its order.

    Every value is in its stored form: a matrix or stack is a Weight with layout "checkpoint" and the format that the
    file holds, anything else a Tensor of the file's dtype. On the CPU, what is one tensor in the file is a view of the
    mapped file, and peak resident memory is at most the stored bytes plus one layer's experts.

    place     called on each Weight (a backend's `repack`); what it returns is kept
    device    where the weights go, before `place`
    progress  called with (bytes done, bytes in all) after each weight

    A checkpoint whose config has `dspark_*` keys may hold tensors under `mtp.` that this project does not know: they
    are skipped with one warning, and where they replace the known MTP stage the result has no `mtp.0.` entries.
    CheckpointError lists what is missing, unexpected, of another shape or dtype, truncated, or in conflict with the
    index.
    """
    table, found = checked_table(directory, cfg)
    total, done = sum(stored.nbytes for stored in found.values()), 0
    on_cpu = torch.device(device).type == "cpu"
    loaded: dict[str, Weight | Tensor] = {}
    with contextlib.ExitStack() as stack:
        kept = _Files(stack)  # mapped for as long as tensors of them live
        for _, layer in groupby(table.values(), _layer):
            with contextlib.ExitStack() as short:
                passing = _Files(short)  # mapped for this layer: closing gives back the pages that were copied from
                for spec in layer:
                    files = kept if on_cpu and not _is_joined(spec) else passing
                    value = _read(spec, files, found, cfg)
                    done += value.nbytes
                    loaded[spec.name] = place(value.to(device)) if isinstance(value, Weight) else value.to(device)
                    if progress is not None:
                        progress(done, total)
    return loaded


def checked_table(
    directory: str | os.PathLike[str], cfg: ModelConfig
) -> tuple[dict[str, WeightSpec], dict[str, Stored]]:
    """The table of what the checkpoint in `directory` holds, and every tensor of its files by name, whose headers were
    held against it. CheckpointError as in `load_weights`."""
    where, found = _headers(Path(directory))
    table = weight_table(cfg)
    if cfg.dspark:
        table, found = _without_unknown_mtp(table, cfg, where, found)
    if problems := [*_differences(table, cfg, where, found).values()]:
        raise CheckpointError(listing(directory, problems))
    return table, found


def unstack(weights: Mapping[str, Weight | Tensor], table: Mapping[str, WeightSpec]) -> Iterator[tuple[str, Tensor]]:
    """(file tensor's name, tensor) of each file tensor that `weights` is made of: views, nothing is copied.

    The inverse of loading. CheckpointError for a Weight that a backend has rearranged.
    """
    for name, value in weights.items():
        spec = table[name]
        if not isinstance(value, Weight):
            yield spec.sources[0][0], value
            continue
        if value.layout != "checkpoint":
            raise CheckpointError(f"{name}: layout {value.layout!r} cannot be saved, only 'checkpoint'")
        for e, parts in enumerate(spec.sources):
            one = value[e] if spec.is_stack else value
            scales = [None] * len(parts) if one.scale is None else one.scale.chunk(len(parts))
            for source, data, scale in zip(parts, one.data.chunk(len(parts)), scales, strict=True):
                yield source, data
                if scale is not None:
                    yield scale_name(source), scale


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, str]:
    """The text in the header of the checkpoint's first file. CheckpointError where it cannot be read."""
    _, files = _listed(Path(directory))
    first = Path(directory) / min(files)
    try:
        with safe_open(first, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{first}: {_why_unreadable(first, error)}") from error


def weights_are_random(directory: str | os.PathLike[str]) -> bool:
    """Whether `init_checkpoint` made the checkpoint in `directory`."""
    return read_metadata(directory).get(RANDOM_KEY, "").startswith("random")


class _Files:
    """Open files by path, closed with `stack`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.opened: dict[Path, Any] = {}

    def tensor(self, name: str, found: Mapping[str, Stored]) -> Tensor:
        """The tensor `name`, a view of its mapped file."""
        path = found[name].file
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(safe_open(path, "pt"))
        return self.opened[path].get_tensor(name)


def _layer(spec: WeightSpec) -> str:
    """ "layers.3", "mtp.0", or "" for what belongs to no layer."""
    first, second, *_ = [*spec.name.split("."), ""]
    return f"{first}.{second}" if second.isdecimal() else ""


def _is_joined(spec: WeightSpec) -> bool:
    """Made of several file tensors, and so copied."""
    return len(spec.sources) > 1 or len(spec.sources[0]) > 1


def _read(spec: WeightSpec, files: _Files, found: Mapping[str, Stored], cfg: ModelConfig) -> Weight | Tensor:
    """One entry of the table, in its stored form."""
    first = spec.sources[0][0]
    data = _join(spec, spec.sources, files, found)
    if not spec.is_matrix:
        if data.dtype == torch.int64 and not (int(data.min()) >= 0 and int(data.max()) < cfg.n_routed_experts):
            raise CheckpointError(
                f"{found[first].file}: tensor {first} names experts {int(data.min())}..{int(data.max())}, "
                f"n_routed_experts is {cfg.n_routed_experts}"
            )
        if data.dim() == 1 and not bool(data.isfinite().all()):  # one NaN here spoils choices, not only values
            raise CheckpointError(f"{found[first].file}: tensor {first} holds NaN or infinity")
        return data
    scale, scale_dtype = None, None
    if scale_name(first) in found:
        scale_dtype = found[scale_name(first)].dtype
        scale = _join(spec, [[scale_name(source) for source in parts] for parts in spec.sources], files, found)
    fmt = FORMATS[format_in(found[first].dtype, scale_dtype, spec)]
    return Weight(data, scale, fmt, spec.name, op=spec.read_by)


def format_in(dtype: str, scale_dtype: str | None, spec: WeightSpec) -> str:
    """Format of a matrix whose codes and scales have these dtypes in the file."""
    return _FORMAT_OF.get((dtype, scale_dtype), spec.format)


def _join(spec: WeightSpec, sources: Iterable[Iterable[str]], files: _Files, found: Mapping[str, Stored]) -> Tensor:
    """The tensors `sources` as one: the tensor itself where it is one, else a copy [E, parts * rows, columns]."""
    names = [list(parts) for parts in sources]
    first = files.tensor(names[0][0], found)
    if not _is_joined(spec):
        return first
    out = torch.empty((len(names), len(names[0]), *first.shape), dtype=first.dtype)
    for e, parts in enumerate(names):
        for p, name in enumerate(parts):  # as bytes: no conversion can creep in
            out[e, p].view(torch.uint8).copy_(files.tensor(name, found).view(torch.uint8))
    return out.flatten(1, 2) if spec.is_stack else out.flatten(0, 2)


# --- checking -------------------------------------------------------------------------------------------------------


def _listed(directory: Path) -> tuple[Path, dict[str, list[str]]]:
    """The file that says where tensors are, and the tensors that it places in each data file, by file name.

    Without an index, a single model.safetensors is taken for what it holds: nothing is placed. With both, the index
    must name that file and no other; anything else is a contradiction, and an error.
    """
    single, index = directory / SINGLE, directory / INDEX
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not index.is_file():
        if single.is_file():
            return single, {SINGLE: []}
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".bin", ".pt"))
        hint = f" (but {', '.join(others[:3])}; pickled files are never read)" if others else ""
        raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {INDEX}{hint}")
    files: dict[str, list[str]] = defaultdict(list)
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"tensor {name} must be in a file of this directory, got {file!r}")
            files[file].append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index with a weight_map: {error!r}") from error
    if not files:
        raise CheckpointError(f"{index}: its weight_map is empty")
    if single.is_file() and list(files) != [SINGLE]:
        raise CheckpointError(f"{single}: contradicts {INDEX}, which names {min(files)}: remove one of the two")
    return index, dict(files)


def _headers(directory: Path) -> tuple[Path, dict[str, Stored]]:
    """The file that says where tensors are, and every tensor of the files by name; CheckpointError lists conflicts."""
    where, files = _listed(directory)
    placed = {name for names in files.values() for name in names}
    found: dict[str, Stored] = {}
    problems = []
    for file, names in sorted(files.items()):
        if not (directory / file).is_file():
            problems.append(f"{file}: no such file, but {INDEX} places {names[0]} and {len(names) - 1} others in it")
            continue
        try:
            header = _header(directory / file)
        except (OSError, SafetensorError) as error:
            problems.append(f"{file}: {_why_unreadable(directory / file, error)}")
            continue
        for name in names:
            if name not in header:
                problems.append(f"{file}: tensor {name} is not there, but {INDEX} places it there")
        for name in header:
            if name in found:
                problems.append(f"{file}: tensor {name} is also in {found[name].file.name}")
            elif where.name == INDEX and name not in placed:
                problems.append(f"{file}: tensor {name} is not in {INDEX}")
        found |= header
    if problems:
        raise CheckpointError(listing(directory, problems))
    return where, found


def _header(path: Path) -> dict[str, Stored]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        return {name: Stored(path, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses, as far as a look at its header tells."""
    plain = f"not a readable safetensors file: {error}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):  # a zip or a bare pickle, as torch.save writes them
                return "looks like a pickle (torch.save), which is never opened; convert it to safetensors"
            length = int.from_bytes(start, "little")
            if not 0 < length <= 100_000_000:  # the format's own limit
                return plain
            if 8 + length > size:
                return f"truncated: {size} bytes, the header alone takes {8 + length}"
            header = json.loads(file.read(length))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return plain
    cut = sorted((end, name) for name, end in ends.items() if 8 + length + end > size)
    if not cut:
        return plain
    return (
        f"truncated: {size} bytes, should be {8 + length + cut[-1][0]}; "
        f"{len(cut)} tensors are cut off, the first is {cut[0][1]}"
    )


def _fault(want: FileTensor | None, have: Stored) -> str | None:
    """What is wrong with the file tensor `have`, to follow its name; None where nothing is."""
    if want is None:
        return f"is unexpected ({have})"
    if have.shape != want.shape or have.dtype not in want.dtypes:
        return f"is {have}, expected {_expected(want)}"
    return None


def _expected(want: FileTensor) -> str:
    return f"{' or '.join(want.dtypes)} {list(want.shape)}"


def _differences(
    table: Mapping[str, WeightSpec], cfg: ModelConfig, where: Path, found: Mapping[str, Stored]
) -> dict[str, str]:
    """What is missing, unexpected or of another kind than the table says: a message by file tensor's name."""
    expected = checkpoint_tensors(table, cfg)
    wrong = {}
    for name, want in expected.items():
        if name not in found:
            wrong[name] = f"{where.name}: tensor {name} is missing (expected {_expected(want)})"
    leaders: dict[tuple[str, bool], str] = {}  # what is joined into one weight must be of one dtype
    for name, have in found.items():
        fault = _fault(expected.get(name), have)
        if fault is None:
            leader = leaders.setdefault((expected[name].spec, name.endswith(".scale")), name)
            if found[leader].dtype != have.dtype:
                fault = f"is {have.dtype}, but {leader}, part of the same weight, is {found[leader].dtype}"
        if fault is not None:
            wrong[name] = f"{have.file.name}: tensor {name} {fault}"
    return wrong


def _without_unknown_mtp(
    table: dict[str, WeightSpec], cfg: ModelConfig, where: Path, found: dict[str, Stored]
) -> tuple[dict[str, WeightSpec], dict[str, Stored]]:
    """Table and file tensors of a `dspark_*` checkpoint without what is unknown under `mtp.`, which is logged.

    Its draft stages are not V4's. Should stage 0 be V4's MTP stage all the same, whole and in shape, it is kept.
    """
    expected = checkpoint_tensors(table, cfg)
    wrong = _differences(table, cfg, where, found)
    if any(name.startswith("mtp.") and name in expected for name in wrong):
        table = {name: spec for name, spec in table.items() if not name.startswith("mtp.")}
        expected = checkpoint_tensors(table, cfg)
    skipped = {name for name in found if name.startswith("mtp.") and name not in expected}
    if skipped:
        nbytes = sum(found[name].nbytes for name in skipped)
        stage = "loaded" if any(name.startswith("mtp.") for name in table) else "not loaded"
        log.warning(
            "%s: skipped %d tensors (%.3f GB) under mtp. that are not part of V4's MTP stage, which is %s",
            where,
            len(skipped),
            nbytes / 1e9,
            stage,
        )
    return table, {name: stored for name, stored in found.items() if name not in skipped}


# --- saving ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    directory: str | os.PathLike[str],
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config.json and the file tensors `tensors` (name, tensor) as a checkpoint in the official format.

    Everything is written beside `directory` under another name and renamed at the end: under its own name the
    checkpoint is whole or absent. Tensors are taken one by one and held until their file is full.

    tensors          every tensor of `checkpoint_tensors`, as `unstack` yields them
    max_shard_bytes  size above which a new file is begun; what fits into one becomes model.safetensors, without index
    metadata         text kept in the header of each file

    CheckpointError: `directory` exists and is not empty, a tensor is unexpected, missing or of another kind than the
    table says, or the disk refuses.
    """
    target = Path(directory).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not an empty directory; nothing is overwritten")
    if target.is_symlink() or os.path.ismount(target) or target == Path.cwd():
        raise CheckpointError(
            f"{target}: is a link, a mount point or the current directory; name a new directory in it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.partial-", dir=target.parent))
        try:
            _write(partial, target, cfg, tensors, max_shard_bytes, {"format": "pt", **(metadata or {})})
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error


def _write(
    folder: Path,
    target: Path,
    cfg: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    metadata: dict[str, str],
) -> None:
    """All files of a checkpoint into `folder`; `target` is its name in errors."""
    expected = checkpoint_tensors(weight_table(cfg), cfg)
    shards: list[list[str]] = []  # names in each file written
    held: dict[str, Tensor] = {}
    total = held_bytes = 0

    def flush() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        stored = Stored(target, _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        fault = _fault(expected.pop(name, None), stored)
        if fault is not None:
            raise CheckpointError(f"{target}: tensor {name} {fault}")
        if held and held_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.detach().cpu().contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    missing = [name for name in expected if not (cfg.dspark and name.startswith("mtp."))]
    if missing:
        raise CheckpointError(listing(target, [f"tensor {name} was not given" for name in missing]))
    flush()

    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names if len(shards) > 1 else [SINGLE]):
        (folder / f"{i}.safetensors").rename(folder / name)
    if len(shards) > 1:
        placed = {tensor: name for name, held_names in zip(names, shards, strict=True) for tensor in held_names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))})
    _write_json(folder / "config.json", cfg.to_dict())
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        finish_file(path)
    _sync(folder)


def finish_file(path: Path) -> None:
    """Give a file that safetensors wrote, for its owner only, the usual permissions, and wait until it is on the
    disk."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    _sync(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- random weights -------------------------------------------------------------------------------------------------

# Ending of a file tensor's name -> mean and standard deviation; all others: 0 and cfg.initializer_range.
_RANDOM: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "norm.weight": (1.0, 0.02),
        "_scale": (0.1, 0.02),  # of hyper-connections: "small values", says the report
        "_base": (0.0, 0.1),
        "attn_sink": (0.0, 0.1),
        "gate.bias": (0.0, 0.01),
    }
)


def init_checkpoint(
    cfg: ModelConfig,
    directory: str | os.PathLike[str],
    dtype: str = "fp8-fp4",
    seed: int = 0,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> ModelConfig:
    """Write a checkpoint of random weights and return its configuration: `cfg` with weights stored as `dtype`.

    dtype is a key of `config.STORED_AS`. A tensor depends on the seed, its name and shape alone, so another number of
    layers or shards leaves it as it is. The files say that they are random (`weights_are_random`).
    """
    written = stored_as(cfg, dtype)
    metadata = {RANDOM_KEY: f"random, seed {seed}"}
    save_checkpoint(
        directory, written, _random_tensors(written, seed), max_shard_bytes=max_shard_bytes, metadata=metadata
    )
    return written


def _random_tensors(cfg: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    for spec in weight_table(cfg).values():
        for source in (source for parts in spec.sources for source in parts):
            digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            if spec.format == "int64":  # the highest of random scores: ids that differ within a row
                tokens, count = spec.shape
                yield source, torch.rand(tokens, cfg.n_routed_experts, generator=generator).topk(count).indices
                continue
            mean, deviation = next(
                (moments for ending, moments in _RANDOM.items() if source.endswith(ending)),
                (0.0, cfg.initializer_range),
            )
            values = torch.randn(spec.part_shape, generator=generator) * deviation + mean
            fmt = FORMATS[spec.format]
            if fmt.plain:
                yield source, values.to(fmt.storage)
                continue
            stored = quantize(values, fmt)
            yield source, stored.data
            if stored.scale is not None:
                yield scale_name(source), stored.scale
