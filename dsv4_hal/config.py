"""The run configuration: what to run, on which backends, with which settings, and where each value came from.

Values come from four places; the first that has one wins: the command line (flags and `--set key=value`), environment
variables (`DSV4_HAL_BACKEND`, `DSV4_HAL_GENERATE__TOP_P`: the key in capitals, two underscores for a dot), a YAML file,
the defaults below. Keys are dotted: `generate.temperature`, `ops.sparse_attention`. An unknown key is an error that
names the nearest one; every error names the key and the place.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from dsv4_hal.numerics import mode_names
from dsv4_hal.ops import FAMILIES, OPS

PREFIX = "DSV4_HAL_"


class RunError(ValueError):
    """A run configuration that cannot be used; the message names key and place."""


def _names(value: Any) -> Any:
    """One name, several with commas between them, or a list of names -> a tuple of names."""
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    if value is None or (isinstance(value, list | tuple) and None in value):
        raise ValueError("YAML reads null as nothing; write 'null', in quotes, for the backend of that name")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a name or a list of names")
    names = tuple(name.strip() for name in value)
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError("must name at least one backend, and each once")
    return names


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Generate(Section):
    """How tokens are drawn."""

    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0: the likeliest token
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # keep the likeliest tokens up to this probability
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0


class Chat(Section):
    """How a conversation is held."""

    think: Literal["none", "high", "max"] = "high"  # none: answer at once; max: with the prompt for greatest effort
    context: Annotated[int, Field(ge=1, le=2**31 - 1)] = 8192  # tokens that a conversation may hold
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1024  # longest answer
    system: str | None = None  # system message
    protocol_tokens: Literal["refuse", "escape"] = "refuse"  # what happens to protocol tokens inside a message


class Run(Section):
    """One run. Fields are the keys of the YAML file."""

    model: str | None = None  # checkpoint directory, or a preset (shapes only)
    backend: Names = ("auto",)  # a registered backend, or several in order of preference; auto: the first usable one
    ops: dict[str, Names] = {}  # op or family of ops -> backends in order of preference
    device: str | None = None  # torch device; default the first backend's
    assume: str | None = None  # architecture that a backend shall choose kernels for, such as sm_90, without having it
    emulate: bool = False  # compute operators of a backend's devices on the CPU, where it can: to check them
    mode: str = "deployed"  # exact, deployed, or a numeric profile that a backend's package declares
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None  # compute dtype of mode exact
    strict: bool = False  # refuse to run an op on another backend than the one asked for
    shared_expert_clamp: bool = True  # swiglu_limit also in the shared expert
    generate: Generate = Generate()
    chat: Chat = Chat()

    @field_validator("mode")
    @classmethod
    def _mode_exists(cls, value: str) -> str:
        if value not in (names := mode_names()):
            raise ValueError(f"must be {', '.join(names[:-1])} or {names[-1]}{_nearest(value, names)}")
        return value

    @field_validator("backend")
    @classmethod
    def _auto_stands_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "auto" in value and len(value) > 1:
            raise ValueError("auto stands alone: it already ends in the reference")
        return value

    @field_validator("ops")
    @classmethod
    def _ops_exist(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, backends in value.items():
            if name not in OPS and name not in FAMILIES:
                raise ValueError(f"no op or family is called {name!r}{_nearest(name, [*OPS, *FAMILIES])}")
            if "auto" in backends:
                raise ValueError(f"{name}: auto is not a backend; leave the op out")
        return value


@dataclass(frozen=True)
class Setting:
    """One value and where it came from. `place` is empty for a default."""

    key: str
    value: Any
    place: str = ""


@dataclass(frozen=True)
class Loaded:
    """A run configuration and the places of the values that are not defaults."""

    run: Run
    places: Mapping[str, str]

    def settings(self) -> list[Setting]:
        """Every value, in the order of the fields."""
        return [Setting(key, value, self.places.get(key, "")) for key, value in flatten(self.run.model_dump())]


def load_run(
    file: str | os.PathLike[str] | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """The run configuration out of all places.

    file     YAML file, or the name of one that comes with the package (`run_names`)
    sets     "key=value" of `--set`
    options  flag -> (key, value) of the command line; a value of None was not given
    environ  default os.environ
    RunError lists everything that is wrong.
    """
    found: dict[str, Setting] = {}
    for setting in (
        *([] if file is None else _from_file(file)),
        *_from_environment(os.environ if environ is None else environ),
        *map(_from_set, sets),
        *(Setting(key, value, flag) for flag, (key, value) in (options or {}).items() if value is not None),
    ):
        found[setting.key] = setting
    return Loaded(_validate(found), {key: setting.place for key, setting in found.items()})


def run_names() -> list[str]:
    """Names of the run configurations that come with the package."""
    return sorted(e.name.removesuffix(".yaml") for e in _runs().iterdir() if e.name.endswith(".yaml"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings, an empty one as it is."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- places ---------------------------------------------------------------------------------------------------------


def _from_file(file: str | os.PathLike[str]) -> Iterator[Setting]:
    path = Path(file)
    if not path.exists() and str(file) in run_names():
        text, name = _runs().joinpath(f"{file}.yaml").read_text(encoding="utf-8"), f"configs/runs/{file}.yaml"
    else:
        name = str(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise RunError(f"{name}: no such file; with the package come {', '.join(run_names())}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{name}: cannot be read: {error}") from error
    return _from_yaml(text, name)


def _from_yaml(text: str, name: str) -> Iterator[Setting]:
    """The leaves of a YAML document. RunError, with line and column, for what is not a plain tree of keys."""
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 20:
                raise RunError(f"{_place(name, event.start_mark)}: nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise RunError(f"{_place(name, event.start_mark)}: aliases (*{event.anchor}) are not read here")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")):
            return  # an empty file sets nothing
        if not isinstance(node, yaml.MappingNode):
            raise RunError(f"{_place(name, node.start_mark)}: must be a mapping of keys to values")
        yield from _leaves(loader, node, name, "", set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RunError(f"{_place(name, mark)}: not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RunError(f"{name}:{line}:{column}: not YAML: character #x{error.character:04x}: {error.reason}") from None


def _leaves(
    loader: yaml.SafeLoader, node: yaml.MappingNode, name: str, prefix: str, seen: set[str]
) -> Iterator[Setting]:
    for key_node, value_node in node.value:
        place = _place(name, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise RunError(f"{place}: a key must be text, got {shown!r} in {prefix or 'the file'}")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise RunError(f"{place}: {key} stands twice")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            if not value_node.value and key not in SECTIONS:
                raise RunError(f"{place}: {key} is an empty mapping")
            yield from _leaves(loader, value_node, name, f"{key}.", seen)
        else:
            try:
                value = loader.construct_document(value_node)
            except _BAD_VALUE as error:
                why = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
                raise RunError(f"{place}: {key}: cannot be read: {why}") from None
            if key in SECTIONS and value is None:
                continue  # a section whose every key is commented out
            yield Setting(key, value, place)


def _from_environment(environ: Mapping[str, str]) -> Iterator[Setting]:
    for variable in sorted(environ):
        if variable.startswith(PREFIX):
            if variable != variable.upper():
                raise RunError(f"environment {variable}: write {variable.upper()}")
            key = variable.removeprefix(PREFIX).lower().replace("__", ".")
            yield Setting(key, _typed(key, environ[variable]), f"environment {variable}")


def _from_set(text: str) -> Setting:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RunError(f"--set {text}: write key=value")
    return Setting(key.strip(), _typed(key.strip(), value), f"--set {text}")


def _typed(key: str, text: str) -> Any:
    """A value given as text: as it stands where the key holds text or names, else the number or truth value it is.

    What is neither stays text, and validation says what it should have been.
    """
    kind = _LEAVES.get(key, str)
    with contextlib.suppress(ValueError):
        if kind in (int, float):
            return kind(text)
    if kind is bool:
        return _TRUTH.get(text.lower(), text)
    return text


# --- validation -----------------------------------------------------------------------------------------------------


def _validate(found: Mapping[str, Setting]) -> Run:
    nested: dict[str, Any] = {}
    problems: list[str] = []
    for setting in found.values():
        *sections, last = setting.key.split(".")
        at = nested
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                break
        if not isinstance(at, dict) or isinstance(at.get(last), dict):
            problems.append(f"{setting.place}: {setting.key}: a key cannot be both a value and a section")
        else:
            at[last] = setting.value
    if not problems:
        try:
            return Run.model_validate(nested)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            problems = [_problem(dict(e), found) for e in errors[:_SHOWN]]
            problems += [f"and {len(errors) - _SHOWN} more"] * (len(errors) > _SHOWN)
    raise RunError(problems[0] if len(problems) == 1 else "\n  ".join(["several problems", *problems]))


def _problem(error: Mapping[str, Any], found: Mapping[str, Setting]) -> str:
    """One line of a pydantic error: place, key, what is wrong."""
    path = [str(part) for part in error["loc"]]
    keys = [".".join(path[:n]) for n in range(len(path), 0, -1)]
    key = next((k for k in keys if k in found), keys[0])
    below = [s for s in found.values() if s.key.startswith(f"{key}.")]
    named = next((s for s in below if repr(s.key.rpartition(".")[2]) in str(error["msg"])), None)
    setting = found.get(key) or named or (below[0] if below else None)
    place = setting.place if setting else "defaults"
    if error["type"] == "extra_forbidden":
        shown = setting.key if setting else key
        return f"{place}: unknown key {shown}{_nearest_key(key, shown)}"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "must be")
    if error["type"] in ("dict_type", "model_type"):
        message = "must be a mapping of keys to values"
    got = "" if setting is None or setting.key != key else f", got {_shown(setting.value)}{_number_hint(setting)}"
    return f"{place}: {setting.key if setting else key}: {message}{got}"


def _number_hint(setting: Setting) -> str:
    """YAML 1.1 reads 1e-1 as text."""
    with contextlib.suppress(ValueError):
        if _LEAVES.get(setting.key) in (int, float) and isinstance(setting.value, str):
            return f"; YAML reads that as text, write {float(setting.value)}"
    return ""


def _nearest_key(key: str, shown: str) -> str:
    """The key that was probably meant: one of the same section, or one of that name in another."""
    elsewhere = [k for k in _LEAVES if k.rpartition(".")[2] == shown.rpartition(".")[2]]
    elsewhere += [k for k in _LEAVES if k.replace(".", "_") == shown]  # one underscore where a dot needs two
    section = key.rpartition(".")[0]
    beside = [k for k in [*_LEAVES, *SECTIONS] if k.rpartition(".")[0] == section]
    near = elsewhere or difflib.get_close_matches(key, beside, 1) or difflib.get_close_matches(key, [*_LEAVES], 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(beside or SECTIONS)}"


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        elif name != "ops":
            yield f"{prefix}{name}", kind


_LEAVES = dict(_keys(Run))
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_SHOWN = 10  # problems listed at most
_BAD_VALUE = (
    yaml.YAMLError,
    ValueError,
    OverflowError,
    LookupError,
    AttributeError,
    TypeError,
)  # PyYAML's own, of tags
SECTIONS = (*(name for name, f in Run.model_fields.items() if f.annotation in (Generate, Chat)), "ops")


def _place(name: str, mark: Any) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _runs() -> Any:
    return files("dsv4_hal") / "configs" / "runs"
