"""Files that appear whole or not at all: what goes wrong on the way leaves the earlier ones as they were."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """`with` gives where to write what is `path` in the end. OSError names `path`."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # of another file
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write(files: Mapping[Path, str]) -> None:
    """All of these texts, or none where one of them cannot be written."""
    with contextlib.ExitStack() as stack:
        for path, text in files.items():
            stack.enter_context(whole(path)).write_text(text, encoding="utf-8", errors="backslashreplace")
