"""Libraries in the place of CANN's, so that the installed torch_npu loads on a machine without an NPU.

They hold `stub.c`, and for every other function that torch_npu's libraries link a body that returns 0. gcc and nm make
them, once for a wheel and a stub, in the environment that torch_npu is installed in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

STUB = Path(__file__).with_name("stub.c")
LIBRARIES = ("ascendcl", "acl_op_compiler", "hccl", "ge_runner", "graph", "acl_tdt_channel")  # in the order of loading
CANN = re.compile(r"(acl|rt[A-Z]|Msprof|Hccl)\w*")  # how the names of CANN's functions begin
FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror", "-fPIC")


class BuildError(RuntimeError):
    """The stub libraries cannot be made here; the message says what is missing."""


def build(folder: Path | None = None) -> Path:
    """The folder with the stub libraries of the installed torch_npu, made unless it is there.

    folder  where versions of it lie; default <environment>/share/dsv4-hal/cann-stub
    BuildError if torch_npu, gcc or nm is missing, or the compiler fails.
    """
    folder = folder or Path(sys.prefix) / "share" / "dsv4-hal" / "cann-stub"
    wheel = _wheel()
    made = folder / _digest([STUB, Path(__file__), *wheel])
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="making-", dir=folder))
    try:
        _compile(work, _linked(wheel))
        work.rename(made)
    except OSError:
        if not made.exists():  # else another process was first, with the same
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return made


def _wheel() -> list[Path]:
    """torch_npu's own libraries, found without importing it."""
    spec = find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise BuildError("torch_npu is not installed: pip install --no-deps torch_npu of the version of your torch")
    root = Path(spec.origin).parent
    return sorted([*root.glob("_C*.so"), *root.glob("lib/*.so")])


def _digest(files: Iterable[Path]) -> str:
    """By content where a file is short, by name, size and time where it is a library of 100 MB."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(
            file.read_bytes() if stat.st_size < 1 << 16 else f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()
        )
    return digest.hexdigest()[:16]


def _linked(wheel: Iterable[Path]) -> set[str]:
    """CANN's functions that the wheel leaves undefined."""
    lines = _run("nm", "-D", "--undefined-only", *wheel).splitlines()
    names = {line.split()[-1] for line in lines if " U " in line}
    return {name for name in names if CANN.fullmatch(name)}


def _compile(folder: Path, linked: set[str]) -> None:
    written = folder / "stub.o"
    _run("gcc", *FLAGS, "-c", "-o", written, STUB)
    own = {line.split()[-1] for line in _run("nm", "--defined-only", written).splitlines()}
    rest = folder / "rest.c"
    rest.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(linked - own)), encoding="utf-8")
    returning = folder / "rest.o"
    _run("gcc", *FLAGS, "-c", "-o", returning, rest)
    for library in LIBRARIES:
        # Some functions are looked up in one library by its name: all of them have all.
        target = f"lib{library}.so"
        _run("gcc", "-shared", f"-Wl,-soname,{target}", "-o", folder / target, written, returning)


def _run(tool: str, *arguments: str | os.PathLike[str]) -> str:
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        package = {"gcc": "gcc libc6-dev", "nm": "binutils"}[tool]
        raise BuildError(f"{tool} is needed to make CANN's stubs: apt-get install {package}") from error
    if done.returncode:
        raise BuildError(f"{tool} failed while it made CANN's stubs:\n{done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    print(build())
