"""Do what a walk-through says, and check that it says what happens.

    python ci/docs.py docs/extending.md

A block whose first line is a comment with a path is that file of the reader's package: it is written. Where the path
begins with `examples/` it is an excerpt of that file of this repository, `# ...` standing for what is left out: it is
compared. A block of `sh` is run, a command a line; `# exits N` behind a command says how it ends, where not with 0. A
block of `text` behind it is what they print: lines in order, `...` for what varies (in a line, or whole lines), runs of
blanks and of rules of a table taken as one. Days move with the calendar: the first that the page names is today.

Every section begins with the files of those before it, in a folder of its own, and sections run side by side; only the
first, which installs the package, comes before the others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds that a command may take
AT_ONCE = 2

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"# ([\w./-]+\.\w+)$")
_DAY = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_EXITS = re.compile(r"\s+# exits (\d+)$")


@dataclass(frozen=True)
class Step:
    """kind: file, excerpt or commands. name: path of the file. shown: what the commands print; None if not shown."""

    kind: str
    text: str
    line: int
    name: str = ""
    shown: str | None = None


@dataclass
class Section:
    title: str
    files: dict[str, str]
    steps: list[Step] = field(default_factory=list)


def current(text: str, today: date) -> str:
    """The page as if its first day were today: what expires must not have, whenever it is followed."""
    found = sorted(_DAY.findall(text))
    moved = today - date.fromisoformat(found[0]) if found else timedelta()
    return _DAY.sub(lambda day: str(date.fromisoformat(day[0]) + moved), text)


def sections(text: str) -> list[Section]:
    """Sections with steps, in order. ValueError for a block that would not be checked."""
    found: list[Section] = []
    files: dict[str, str] = {}
    heads = [(m.start(), m[1]) for m in re.finditer(r"^## (.+)$", text, re.MULTILINE)]
    after_commands = False
    for block in _BLOCK.finditer(text):
        language, content, line = block[1], block[2], text.count("\n", 0, block.start()) + 1
        title = next((title for start, title in reversed(heads) if start < block.start()), "")
        if not found or found[-1].title != title:
            found.append(Section(title, dict(files)))
            after_commands = False
        steps, path = found[-1].steps, _PATH.match(content.partition("\n")[0])
        if language == "text" and after_commands:
            last = steps.pop()
            steps.append(Step(last.kind, last.text, last.line, shown=content))
        elif language == "sh":
            steps.append(Step("commands", content, line))
        elif path and path[1].startswith("examples/"):
            steps.append(Step("excerpt", content.partition("\n")[2], line, path[1]))
        elif path:
            steps.append(Step("file", content, line, path[1]))
            files[path[1]] = content
        else:
            raise ValueError(f"line {line}: a block of {language} that is no file, no command and no output")
        after_commands = language == "sh"
    return found


def commands(text: str) -> Iterator[tuple[str, int]]:
    """Each command of a block, and the exit code that it must have."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            exits = _EXITS.search(line)
            yield _EXITS.sub("", line), int(exits[1]) if exits else 0


def missing(shown: str, printed: str) -> str | None:
    """The first line that is shown and was not printed where it should have been; None if all were."""
    lines, place, near = [_plain(line) for line in printed.splitlines()], 0, False
    for line in shown.splitlines():
        if line.strip() == "...":
            near = False
            continue
        pattern = ".*".join(re.escape(part) for part in _plain(line).split("..."))
        fits = (i for i in range(place, len(lines)) if re.fullmatch(pattern, lines[i]))
        found = next(fits, None)
        if found is None or (near and found != place):
            return line
        place, near = found + 1, True
    return None


def absent(excerpt: str, source: str) -> str | None:
    """The first part of an excerpt that its source does not have, in order; None if it has all."""
    place = 0
    for part in re.split(r"^\s*# \.\.\.\n", excerpt, flags=re.MULTILINE):
        place = source.find(part, place)
        if place < 0:
            return part
        place += len(part)
    return None


def walk(section: Section, folder: Path) -> list[str]:
    """Do what a section says; what is wrong with it."""
    for name, content in section.files.items():
        _write(folder / name, content)
    wrong = []
    for step in section.steps:
        where = f"line {step.line}"
        if step.kind == "file":
            _write(folder / step.name, step.text)
        elif step.kind == "excerpt":
            if (part := absent(step.text, (ROOT / step.name).read_text(encoding="utf-8"))) is not None:
                wrong.append(f"{where}: {step.name} does not have\n{part}")
        else:
            printed = ""
            for command, exits in commands(step.text):
                done = _run(command, folder)
                printed += done.stdout
                if done.returncode != exits:
                    wrong.append(f"{where}: `{command}` exits {done.returncode}, not {exits}:\n{done.stdout}")
            if step.shown is not None and (line := missing(step.shown, printed)) is not None:
                wrong.append(f"{where}: does not print\n{line}\nbut\n{printed}")
    return wrong


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # The package is installed once, from the first section's folder: PYTHONPATH comes before that. Sections run side by
    # side, and the threads of one would fight those of another.
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _plain(line: str) -> str:
    return re.sub(r"([━─])\1+", r"\1", " ".join(line.split()))


def main(arguments: Sequence[str]) -> int:
    wrong = []
    for name in arguments:
        first, *others = sections(current(Path(name).read_text(encoding="utf-8"), date.today()))
        with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(AT_ONCE) as pool:
            folders = [Path(work) / str(number) for number in range(1 + len(others))]
            for folder in folders:
                folder.mkdir()
            found = walk(first, folders[0])
            for more in pool.map(walk, others, folders[1:]):
                found += more
        wrong += [f"{name}: {told}" for told in found]
        print(f"{name}: {1 + len(others)} sections, {len(found)} wrong")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
