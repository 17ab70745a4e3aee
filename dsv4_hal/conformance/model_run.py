"""Runs of a whole model, each in a process of its own and kept in a file: on this machine, or carried to another.

`record` runs a model freely on a backend; `replayed` runs its parts again, on any backend, from what that run saw. Both
make a bundle of kind "model" (see `container.py`). Its tensors are "step/name", as `replay.py` names them, "step/free",
the logits of a free run on the same tokens, and "step/ops/call#result", what an op made.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsv4_hal.backend import BackendError
from dsv4_hal.conformance import container
from dsv4_hal.conformance.compare import widen
from dsv4_hal.conformance.probe import Probe
from dsv4_hal.conformance.replay import Script, Seen, replay, run_freely
from dsv4_hal.conformance.runner import end
from dsv4_hal.dispatch import Resolved, select
from dsv4_hal.environment import environment
from dsv4_hal.numerics import numerics_for

if TYPE_CHECKING:
    from dsv4_hal.model.transformer import Model

PROGRESS = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class ModelRun:
    """A run of a model, as its file has it.

    model     name, layers, ratios of the layers, and a fingerprint of configuration and weights
    profile   the numeric profile
    ops       how each op ran
    errors    "step/name" -> why it could not be made
    steps     what was seen or made in each step
    calls     results of ops in each step, in order; empty unless they were asked for
    """

    backend: str
    mode: str
    model: Mapping[str, Any]
    script: Script
    profile: Mapping[str, Any]
    environment: Mapping[str, Any]
    ops: Mapping[str, str]
    errors: Mapping[str, str]
    steps: Sequence[Seen]
    calls: Sequence[Seen]


def record(
    out: Path,
    directory: str,
    backend: str,
    mode: str,
    script: Script,
    ops: bool = False,
    progress: PROGRESS | None = None,
) -> None:
    """Run a model freely, and keep what its parts saw and made; with `ops`, what every op made as well."""
    _in_process(progress, _record, out, directory, backend, mode, script, ops)


def replayed(
    out: Path,
    recorded: Path,
    directory: str,
    backend: str,
    wide: bool = False,
    ops: str | None = None,
    progress: PROGRESS | None = None,
) -> None:
    """Run the parts of a recorded run on a backend, and a free run on the same tokens.

    wide  in the run's profile with float64 between its rounding points: what budgets are derived from
    ops   keep what every op of this part made ("": of every part), and leave out the free run
    ValueError where the model in `directory` is not the recorded one.
    """
    _in_process(progress, _replay, out, recorded, directory, backend, wide, ops)


def read(path: Path) -> ModelRun:
    """A run out of its file. BundleError says why it cannot be read."""
    header, tensors = container.read(path, "model")
    script = Script(
        tuple(tuple(p) for p in header["script"]["prompts"]), header["script"]["decode"], header["script"]["chunk"]
    )
    steps: list[Seen] = [{} for _ in script.steps]
    calls: list[Seen] = [{} for _ in script.steps]
    for name in header["order"]:
        number, _, rest = name.partition("/")
        kind, _, call = rest.partition("/")
        if kind == "ops":
            calls[int(number)][call] = tensors[name]
        else:
            steps[int(number)][rest] = tensors[name]
    for seen in steps:
        if "head.in" in seen:  # run freely: what a layer made is what the next one saw
            layers = header["model"]["layers"]
            seen |= {f"layers.{i - 1}.out": seen[f"layers.{i}.in"] for i in range(1, layers)}
            seen |= {f"layers.{layers - 1}.out": seen["head.in"], "free": seen["logits"]}
    about = {key: header[key] for key in ("backend", "mode", "model", "profile", "environment", "ops", "errors")}
    return ModelRun(**about, script=script, steps=steps, calls=calls)


def _record(report: PROGRESS, out: Path, directory: str, backend: str, mode: str, script: Script, ops: bool) -> None:
    container.refuse_existing(out)
    model = load(directory, backend, mode)
    _check_tokens(model, script)
    steps: list[Seen] = []
    total = len(script.steps) * (1 + ops)
    for seen in run_freely(model, script):
        steps.append(seen)
        report(len(steps), total)
    calls: list[Seen] = [{} for _ in steps]
    errors: dict[str, str] = {}
    if ops:
        probe = Probe(_resolved(model))
        for number, part in enumerate(replay(model, script, steps, probe)):
            calls[number], probe.seen = probe.seen, {}
            errors |= {f"{number}/{name}": why for name, why in part.errors.items()}
            report(len(steps) + number + 1, total)
    _write(out, model, directory, backend, mode, script, errors, steps, calls)


def _replay(
    report: PROGRESS, out: Path, recorded: Path, directory: str, backend: str, wide: bool, ops: str | None
) -> None:
    given = read(recorded)
    model = load(directory, backend, given.mode, wide)
    if fingerprint(directory) != given.model["fingerprint"]:
        raise ValueError(
            f"{directory} is not the model that {recorded.name} was recorded with: weights or config differ"
        )
    probe = None if ops is None else Probe(_resolved(model))
    steps, calls, errors = list[Seen](), list[Seen](), dict[str, str]()
    total = len(given.steps) * (2 if ops is None else 1)
    for number, part in enumerate(replay(model, given.script, given.steps, probe, ops or "")):
        steps.append(part.made)
        errors |= {f"{number}/{name}": why for name, why in part.errors.items()}
        if probe is not None:
            calls.append(probe.seen)
            probe.seen = {}
        report(len(steps), total)
    if ops is None:
        _free(report, model, given, steps, errors)
    _write(out, model, directory, backend, given.mode, given.script, errors, steps, calls or [{} for _ in steps])


def _free(report: PROGRESS, model: Model, given: ModelRun, steps: Sequence[Seen], errors: dict[str, str]) -> None:
    """Adds the logits of a free run on the recorded tokens to every step."""
    first = len(steps) - given.script.decode
    decoded = [seen["tokens"] for seen in given.steps[first:]]
    try:
        for number, seen in enumerate(run_freely(model, given.script, decoded, keep=False)):
            steps[number]["free"] = seen["logits"]
            report(len(steps) + number + 1, 2 * len(steps))
    except Exception as error:
        errors["free"] = f"{type(error).__name__}: {error}"


def load(directory: str, backend: str, mode: str, wide: bool = False) -> Model:
    """As `dsv4_hal.load_model` does, but perhaps in a widened profile."""
    from dsv4_hal.model.checkpoint import load_weights
    from dsv4_hal.model.config import find_config
    from dsv4_hal.model.transformer import Model

    cfg, path = find_config(directory)
    if path is None:
        raise ValueError(f"{directory} is a preset: it has shapes but no weights, and nothing to compare")
    numerics = numerics_for(mode)
    ops = select([backend], widen(numerics) if wide else numerics, vars(cfg))
    if ops.device.type == "meta":
        raise BackendError(f"backend {backend} computes shapes, not values: there is nothing to compare")
    return Model(cfg, ops, load_weights(path, cfg, place=ops.repack, device=ops.device))


def _check_tokens(model: Model, script: Script) -> None:
    longest, most = script.room, model.cfg.max_position_embeddings
    if longest > most:
        raise ValueError(f"{longest} tokens exceed the model's {most} positions")
    highest = max(max(prompt) for prompt in script.prompts)
    if highest >= model.cfg.vocab_size:
        raise ValueError(f"token {highest} is outside the vocabulary of {model.cfg.vocab_size}")


def _resolved(model: Model) -> Resolved:
    assert isinstance(model.ops, Resolved)
    return model.ops


def _write(
    out: Path,
    model: Model,
    directory: str,
    backend: str,
    mode: str,
    script: Script,
    errors: Mapping[str, str],
    steps: Sequence[Seen],
    calls: Sequence[Seen],
) -> None:
    named = {f"{n}/{name}": value for n, seen in enumerate(steps) for name, value in seen.items()}
    named |= {f"{n}/ops/{name}": value for n, seen in enumerate(calls) for name, value in seen.items()}
    ops = _resolved(model)
    header = {
        "backend": backend,
        "mode": mode,
        "model": {
            "name": Path(directory).resolve().name,
            "layers": len(model.layers),
            "ratios": list(model.cfg.layer_ratios),
            "fingerprint": fingerprint(directory),
        },
        "script": asdict(script),
        "profile": ops.numerics.to_dict(),
        "environment": environment([backend]),
        "ops": {r.op: r.runs_as for r in ops.resolutions},
        "errors": dict(errors),
        "order": list(named),
    }
    container.write(out, "model", header, {name: value.contiguous() for name, value in named.items()})


SAMPLES = 64  # places of a file that a fingerprint looks at
SAMPLE = 4096  # bytes at each


def fingerprint(directory: str | Path) -> str:
    """Of a checkpoint: its configuration, and of each file of weights its size and SAMPLES places. A change of a single
    weight elsewhere is not seen; another checkpoint is."""
    digest = hashlib.sha256((Path(directory) / "config.json").read_bytes())
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(size * place // SAMPLES)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _in_process(progress: PROGRESS | None, task: Callable[..., None], *args: Any) -> None:
    """Run a task where a backend may crash. Its errors are raised here; BackendError where the process is lost."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, task, *args))
    process.start()
    there.close()
    start = time.monotonic()
    try:
        while True:
            told = here.recv()
            if told is None:
                return
            if isinstance(told, Exception):
                raise told
            if progress is not None:
                progress(*told)
    except EOFError:
        process.join()
        after = time.monotonic() - start
        raise BackendError(
            f"the process of the run ended with exit code {process.exitcode} after {after:.0f} s"
        ) from None
    finally:
        end(process)
        here.close()


def _work(there: Connection, task: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(OSError):
        os.setsid()  # so that what it starts can be ended with it
    try:
        with torch.inference_mode():
            task(lambda done, total: there.send((done, total)), *args)
        there.send(None)
    except (BackendError, ValueError, OSError) as error:
        there.send(type(error)(str(error)) if isinstance(error, BackendError | OSError) else ValueError(str(error)))
    except Exception as error:
        there.send(BackendError(f"{type(error).__name__}: {error}"))
