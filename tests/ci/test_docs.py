"""The check of the walk-through finds what is wrong with one."""

from __future__ import annotations

import importlib.util
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOC = """
## One

```toml
# pack/a.toml
x = 1
```

```sh
cat pack/a.toml
exit 3  # exits 3
```

```text
x = 1
```

## Two

```python
# pack/b.py
print(1)
```

```sh
echo a; \\
  cat pack/a.toml pack/b.py
```

```text
a
...
x = 1
```
"""


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_docs", ROOT / "ci" / "docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_docs"] = module
    spec.loader.exec_module(module)
    return module


def test_a_section_has_the_files_of_those_before_it(docs: ModuleType, tmp_path: Path) -> None:
    one, two = docs.sections(DOC)
    assert (one.files, list(two.files)) == ({}, ["pack/a.toml"])
    assert docs.walk(two, tmp_path) == []
    assert (tmp_path / "pack" / "b.py").read_text() == "# pack/b.py\nprint(1)\n"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("  # exits 3", "  # exits 4"), "`exit 3` exits 3, not 4"),
        (("  # exits 3", ""), "`exit 3` exits 3, not 0"),
        (("\nx = 1\n```\n\n## Two", "\nx = 2\n```\n\n## Two"), "does not print\nx = 2\nbut\n# pack/a.toml\nx = 1"),
        (("# pack/a.toml\nx = 1", "# examples/xla_backend/README.md\n# dsv4-hal on\n"), "README.md does not have"),
    ],
)
def test_what_is_wrong_is_told(docs: ModuleType, tmp_path: Path, change: tuple[str, str], told: str) -> None:
    wrong = docs.walk(docs.sections(DOC.replace(*change))[0], tmp_path)
    assert any(told in line for line in wrong), wrong


def test_days_move_with_the_calendar(docs: ModuleType) -> None:
    text = "date: 2026-11-25\nexpires: 2027-05-25\nof 2026-11-25: 12026-11-25"
    moved = "date: 2030-01-31\nexpires: 2030-07-31\nof 2030-01-31: 12026-11-25"
    assert docs.current(text, date(2030, 1, 31)) == moved
    assert docs.current("no day", date(2030, 1, 31)) == "no day"


def test_a_block_that_would_not_be_checked_is_refused(docs: ModuleType) -> None:
    with pytest.raises(ValueError, match="line 2: a block of text that is no file, no command and no output"):
        docs.sections("\n```text\nshown by nothing\n```\n")


PRINTED = "┏━━━━━┓\n│ op    │  3.94 │\n│ other │ 1.00  │\nfirst\nsecond\nthird\n"


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("┏━━┓\n│ op │ 3... │\n", None),
        ("first\n...\nthird\n", None),
        ("fir...\nsecond\n", None),
        ("first\nthird\n", "third"),  # shown side by side, and printed apart
        ("third\n...\nfirst\n", "first"),  # in another order
        ("│ op │ 2... │\n", "│ op │ 2... │"),
        ("irst\n", "irst"),
        ("first\n...\nfirst\n", "first"),  # printed once
    ],
)
def test_what_is_shown_must_be_printed(docs: ModuleType, shown: str, missing: str | None) -> None:
    assert docs.missing(shown, PRINTED) == missing


@pytest.mark.parametrize(
    ("excerpt", "absent"),
    [
        ("a = 1\nb = 2\n", None),
        ("a = 1\n    # ...\nc = 3\n", None),
        ("a = 1\nc = 3\n", "a = 1\nc = 3\n"),
        ("c = 3\n# ...\na = 1\n", "a = 1\n"),
    ],
)
def test_an_excerpt_stands_in_its_source(docs: ModuleType, excerpt: str, absent: str | None) -> None:
    assert docs.absent(excerpt, "a = 1\nb = 2\nc = 3\n") == absent
