"""Have a Python that cannot install find this project's backends: what pip would have written of it, in a folder that
PYTHONPATH names.

    python ci/registered.py FOLDER

Exit code 2, with their names, where packages are missing that it needs.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main(folder: str) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in project["dependencies"]]
    if missing := [name for name in needed if not installed(name)]:
        print(f"{sys.executable} lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    if not installed(project["name"]):
        facts = Path(folder) / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        facts.mkdir(parents=True)
        about = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
        lines = [f"{key}: {value}" for key, value in about.items()]
        lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
        (facts / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        groups = project["entry-points"].items()
        text = "".join(f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in found.items()) for group, found in groups)
        (facts / "entry_points.txt").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
