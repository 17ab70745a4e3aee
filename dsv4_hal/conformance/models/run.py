"""Runs of a whole model, each in a process of its own and kept in a file: on this machine, or carried to another.

`record` runs a model freely on a backend; `replayed` runs its parts again, on any backend, from what that run saw. Both
make a bundle of kind "model" (see `container.py`). Its tensors are "step/name", as `replay.py` names them, "step/free",
the logits of a free run on the same tokens, and "step/ops/call#result", what an op made.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsv4_hal.backend import BackendError, described
from dsv4_hal.conformance.judging.compare import widen
from dsv4_hal.conformance.judging.profiles import agreed
from dsv4_hal.conformance.models.probe import Probe
from dsv4_hal.conformance.models.replay import Script, Seen, replay, run_freely
from dsv4_hal.conformance.workers import container
from dsv4_hal.conformance.workers.process import STARTING, Child, Line, Lost, in_words
from dsv4_hal.conformance.workers.transport import Foreign
from dsv4_hal.dispatch import Resolved, select
from dsv4_hal.environment import environment
from dsv4_hal.formats import Weight
from dsv4_hal.numerics import Numerics
from dsv4_hal.ops import OPS

if TYPE_CHECKING:
    from dsv4_hal.model.config import ModelConfig
    from dsv4_hal.model.transformer import Model

PROGRESS = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""
LIMIT = 600.0  # seconds that a step of a model may take
ALIVE = 1.0  # seconds between signs of life while weights are loaded
FILES = -1  # told as steps done where files are read or written, which may take longer than a step


@dataclass(frozen=True)
class ModelRun:
    """A run of a model, as its file has it.

    model     name, layers, ratios of the layers, and a fingerprint of configuration and weights
    profile   the numeric profile
    ops       how each op ran
    refused   op -> why the backend's own code for it did not run, of those where it did not
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
    refused: Mapping[str, str]
    errors: Mapping[str, str]
    steps: Sequence[Seen]
    calls: Sequence[Seen]

    @property
    def numerics(self) -> Numerics:
        return agreed(self.mode, self.profile)

    @property
    def judged(self) -> bool:
        """Whether an op ran as the backend has it: not where it refused all, and the reference ran in its place."""
        return any(kind != "composite" and op not in self.refused for op, kind in self.ops.items())


def record(
    out: Path,
    directory: str,
    backend: str,
    numerics: Numerics,
    script: Script,
    ops: bool = False,
    progress: PROGRESS | None = None,
    limit: float = LIMIT,
) -> None:
    """Run a model freely, and keep what its parts saw and made; with `ops`, what every op made as well.

    numerics  the profile: as data, since the process of the reference must not import who declares one
    limit  seconds without progress after which a backend is taken to hang
    BackendError names the backend where it raises, hangs, or kills its process; ValueError where the input is wrong.
    """
    _in_process(backend, limit, progress, _record, out, directory, backend, numerics, script, ops)


def replayed(
    out: Path,
    recorded: Path,
    directory: str,
    backend: str,
    wide: bool = False,
    ops: str | None = None,
    progress: PROGRESS | None = None,
    limit: float = LIMIT,
) -> None:
    """Run the parts of a recorded run on a backend, and a free run on the same tokens.

    wide  in the run's profile with float64 between its rounding points: what budgets are derived from
    ops   keep what every op of this part made ("": of every part), and leave out the free run
    limit and errors as in `record`; ValueError also where the model in `directory` is not the recorded one.
    """
    _in_process(backend, limit, progress, _replay, out, recorded, directory, backend, wide, ops)


def check_usable(directory: str, backend: str, numerics: Numerics) -> None:
    """BackendError where a backend cannot be used for a model: found before any weight is read."""
    _in_process(backend, STARTING, None, _check_usable, directory, backend, numerics)


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
    told = ("backend", "mode", "model", "profile", "environment", "ops", "refused", "errors")
    found = ModelRun(**{key: header[key] for key in told}, script=script, steps=steps, calls=calls)
    try:
        agreed(found.mode, found.profile)
    except ValueError as error:
        raise container.BundleError(f"{path}: profile: {error}") from error
    return found


def _record(
    report: PROGRESS, out: Path, directory: str, backend: str, numerics: Numerics, script: Script, ops: bool
) -> None:
    container.refuse_existing(out)
    total = len(script.steps) * (1 + ops)
    model = load(directory, backend, numerics, alive=lambda: report(FILES, total))
    _check_tokens(model, script)
    report(0, total)
    steps: list[Seen] = []
    calls: list[Seen] = [{} for _ in script.steps]
    errors: dict[str, str] = {}
    with _blaming(backend):
        for seen in run_freely(model, script):
            steps.append(seen)
            report(len(steps), total)
        if ops:
            probe = Probe(_resolved(model))
            for number, part in enumerate(replay(model, script, steps, probe)):
                calls[number], probe.seen = probe.seen, {}
                errors |= {f"{number}/{name}": why for name, why in part.errors.items()}
                report(len(steps) + number + 1, total)
    report(FILES, total)
    _write(out, model, directory, backend, script, errors, steps, calls)


def _replay(
    report: PROGRESS, out: Path, recorded: Path, directory: str, backend: str, wide: bool, ops: str | None
) -> None:
    given = read(recorded)
    total = len(given.steps) * (2 if ops is None else 1)
    numerics = widen(given.numerics) if wide else given.numerics
    model = load(directory, backend, numerics, alive=lambda: report(FILES, total))
    if fingerprint(directory) != given.model["fingerprint"]:
        raise ValueError(
            f"{directory} is not the model that {recorded.name} was recorded with: weights or config differ"
        )
    probe = None if ops is None else Probe(_resolved(model))
    steps, calls, errors = list[Seen](), list[Seen](), dict[str, str]()
    report(0, total)
    with _blaming(backend):
        for number, part in enumerate(replay(model, given.script, given.steps, probe, ops or "")):
            steps.append(part.made)
            errors |= {f"{number}/{name}": why for name, why in part.errors.items()}
            if probe is not None:
                calls.append(probe.seen)
                probe.seen = {}
            report(len(steps), total)
    if ops is None:
        _free(report, model, given, steps, errors)
    report(FILES, total)
    _write(out, model, directory, backend, given.script, errors, steps, calls or [{} for _ in steps])


def _free(report: PROGRESS, model: Model, given: ModelRun, steps: Sequence[Seen], errors: dict[str, str]) -> None:
    """Adds the logits of a free run on the recorded tokens to every step."""
    first = len(steps) - given.script.decode
    decoded = [seen["tokens"] for seen in given.steps[first:]]
    try:
        for number, seen in enumerate(run_freely(model, given.script, decoded, keep=False)):
            steps[number]["free"] = seen["logits"]
            report(len(steps) + number + 1, 2 * len(steps))
    except BaseException as error:  # no interrupt reaches this process: it is the backend's
        errors["free"] = described(error)


def load(directory: str, backend: str, numerics: Numerics, alive: Callable[[], None] = lambda: None) -> Model:
    """As `dsv4_hal.load_model` does, but in any profile. alive: called now and then."""
    from dsv4_hal.model.checkpoint import load_weights
    from dsv4_hal.model.transformer import Model

    cfg, path = _config(directory)
    ops = _ops(cfg, backend, numerics)
    told = time.monotonic()

    def repack(weight: Weight) -> Weight:
        with _blaming(backend):
            return ops.repack(weight)

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > ALIVE:
            told = time.monotonic()
            alive()

    weights = load_weights(path, cfg, place=repack, device=ops.device, progress=progress)
    with _blaming(backend):
        return Model(cfg, ops, weights)


def _check_usable(report: PROGRESS, directory: str, backend: str, numerics: Numerics) -> None:
    _ops(_config(directory)[0], backend, numerics)


def _config(directory: str) -> tuple[ModelConfig, Path]:
    from dsv4_hal.model.config import find_config

    cfg, path = find_config(directory)
    if path is None:
        raise ValueError(f"{directory} is a preset: it has shapes but no weights, and nothing to compare")
    return cfg, path


def _ops(cfg: ModelConfig, backend: str, numerics: Numerics) -> Resolved:
    ops = select([backend], numerics, vars(cfg))
    if ops.device.type == "meta":
        raise BackendError(f"backend {backend} computes shapes, not values: there is nothing to compare")
    return ops


@contextlib.contextmanager
def _blaming(backend: str) -> Iterator[None]:
    """Whatever is raised here is that backend's: BackendError names it, and its op."""
    try:
        yield
    except BackendError:
        raise
    except BaseException as error:  # no interrupt reaches this process
        ways_in = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        place = next((f", {name}" for name in ways_in if name in OPS or name in ("row_layout", "repack")), "")
        raise BackendError(f"backend {backend}{place}: {described(error)}") from error


def check_room(tokens: int, cfg: ModelConfig) -> None:
    """ValueError if a sequence is longer than the model's."""
    if tokens > cfg.max_position_embeddings:
        raise ValueError(f"{tokens} tokens exceed the model's {cfg.max_position_embeddings} positions")


def _check_tokens(model: Model, script: Script) -> None:
    check_room(script.room, model.cfg)
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
        "mode": ops.numerics.mode,
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
        "refused": {r.op: why for r in ops.resolutions for name, why in r.rejected if name == backend},
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


def _in_process(backend: str, limit: float, progress: PROGRESS | None, task: Callable[..., None], *args: Any) -> None:
    """Run a task where a backend may crash or hang. Its errors are raised here; BackendError where the process is lost.

    limit  seconds that a step may take
    """
    start, steps, patience = time.monotonic(), 0, STARTING
    child = Child(_work, backend, task, *args)
    try:
        while True:
            told = child.receive(patience)
            if told is None:
                return
            if isinstance(told, Exception):
                raise told
            done, total = told
            patience = STARTING if done == FILES else limit
            if done != FILES:
                steps = done
                if progress is not None:
                    progress(done, total)
    except Foreign as error:
        raise BackendError(f"backend {backend}: {error}") from None
    except Lost as lost:
        if lost.code is None:
            why = f"no progress for {in_words(lost.seconds)}, after {steps} step{'' if steps == 1 else 's'}"
            raise BackendError(f"backend {backend}: {why}") from None
        after = in_words(time.monotonic() - start)
        raise BackendError(f"the process of backend {backend} ended with exit code {lost.code} after {after}") from None
    finally:
        child.end()


def _work(line: Line, backend: str, task: Callable[..., None], *args: Any) -> None:
    try:
        with torch.inference_mode():
            task(lambda done, total: line.send((done, total)), *args)
        line.send(None)
    except (BackendError, ValueError, OSError) as error:
        kinds = (kind for kind in (BackendError, ValueError) if isinstance(error, kind))
        line.send(next(kinds, type(error))(str(error)))  # those of files as they are, and anything else plainly
    except BaseException as error:
        line.send(BackendError(f"backend {backend}: {described(error)}"))
