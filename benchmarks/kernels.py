"""Every kernel of the CUDA backend, compiled for GPUs that are not here, checked, and written to a table.

    python benchmarks/kernels.py --check docs/kernels.md
    python benchmarks/kernels.py --part full --write docs/kernels.md

Whatever DeepSeek-V4 calls at its published sizes is called through the backend's own host code (`kernel_calls.py`), and
each launch is compiled for the target; `backends/cuda/checks.py` says what must hold. Nothing runs on a GPU, and times
are bounds that follow from published figures of the devices. Exit code 1 where something does not hold, or where the
table is not what was compiled. TRITON_CACHE_DIR keeps compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_USUAL = ("decode", "prefill", "alone")
_SHARE = [("v4-flash", "deployed", _USUAL), ("v4-pro", "deployed", _USUAL)]

# Part -> targets, and (model, mode, steps) for each of them. Other steps than the usual, and other dtypes, differ in
# how arguments are aligned: one model shows what they compile to.
PARTS: Mapping[str, tuple[Sequence[str], Sequence[tuple[str, str, Sequence[str]]]]] = {
    "quick": (("sm_90", "sm_100"), _SHARE),
    "full": (
        ("sm_90", "sm_100", "sm_80", "sm_120", "gfx942", "gfx950"),
        [*_SHARE, ("v4-flash", "deployed", ("single", "draft", "mixed", "packed")), ("v4-flash", "exact", _USUAL)],
    ),
}
DECODE = ("decode", "single", "draft")


@dataclass
class Kernel:
    """Machine code for one target: what it takes, and who launches it.

    grid     largest of each axis
    seconds  that it took to compile
    used     (model, mode, step, op) of calls that launch it
    """

    kernel: str
    target: str
    key: str
    constants: dict[str, str]
    types: dict[str, str]
    warps: int
    stages: int
    shared: int
    tensor: int
    registers: int
    spilled: int
    stack: int
    dots: bool
    matrix: Sequence[str]
    grid: Sequence[int]
    seconds: float
    used: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def decode(self) -> bool:
        return any(step in DECODE for _, _, step, _ in self.used)


@dataclass(frozen=True)
class Task:
    target: str
    model: str
    mode: str
    steps: Sequence[str]


def compile_task(task: Task) -> dict[str, Any]:
    """In a process where triton is not interpreted: kernels by key, failed calls, and calls with what they cost."""
    os.environ["DSV4_HAL_ASSUME"] = task.target
    import kernel_calls
    from kernel_costs import cost

    from dsv4_hal.backends.triton_kernels.ahead import compile_only
    from dsv4_hal.numerics import numerics_for

    start, worked = time.perf_counter(), sum(os.times()[:4])
    with compile_only(task.target) as compiled:
        made = kernel_calls.calls(task.model, task.mode, compiled, task.steps)
    kernels: dict[str, Kernel] = {}
    errors, calls = [], []
    numerics = numerics_for(task.mode)
    for call in made:
        user = (task.model, task.mode, call.step, call.op)
        if call.error:
            errors.append(f"{call.op} of {task.model} in mode {task.mode} on {task.target}: {call.error}")
        names = []
        for launch in call.launches:
            names.append(launch.kernel)
            if launch.key not in kernels:
                own = {f.name: getattr(launch, f.name) for f in fields(launch) if f.name != "binary"}
                kernels[launch.key] = Kernel(**own, **asdict(launch.resources))
            _add_use(kernels[launch.key], launch.grid, [user])
        spent = cost(call.op, call.inputs, call.result, numerics)
        calls.append(
            {
                "model": task.model,
                "mode": task.mode,
                "step": call.step,
                "op": call.op,
                "part": call.part,
                "count": call.count,
                "shape": kernel_calls.label(call.inputs),
                "kernels": list(dict.fromkeys(names)),
                "flops": dict(spent.flops),
                "bytes": spent.moved,
            }
        )
    return {
        "task": asdict(task),
        "kernels": [asdict(k) for k in kernels.values()],
        "errors": list(dict.fromkeys(errors)),
        "calls": calls,
        "seconds": {"wall": time.perf_counter() - start, "processors": sum(os.times()[:4]) - worked},
    }


def _add_use(kernel: Kernel, grid: Sequence[int], users: Iterable[Sequence[str]]) -> None:
    longest = max(len(grid), len(kernel.grid))
    padded = [tuple(g) + (1,) * (longest - len(g)) for g in (grid, kernel.grid)]
    kernel.grid = tuple(max(axis) for axis in zip(*padded, strict=True))
    kernel.used += [(*user,) for user in users if (*user,) not in kernel.used]  # type: ignore[misc]


def run(tasks: Sequence[Task], workers: int) -> Iterator[dict[str, Any]]:
    """Results of tasks as they come, from processes of their own."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_task, task) for task in tasks]):
            yield done.result()


def merged(results: Iterable[dict[str, Any]]) -> list[Kernel]:
    """Kernels of several tasks: the same code once."""
    found: dict[tuple[str, str], Kernel] = {}
    for result in results:
        for figures in result["kernels"]:
            kernel = Kernel(**figures)
            users, kernel.used = kernel.used, []
            _add_use(found.setdefault((kernel.target, kernel.key), kernel), kernel.grid, users)
    return sorted(found.values(), key=lambda k: (k.target, k.kernel, sorted(k.constants.items()), k.key))


def chosen(args: argparse.Namespace) -> Iterator[Task]:
    """Tasks of the part that was asked for, or of some of it."""

    def some(names: str | None, every: Iterable[str]) -> list[str]:
        return [name for name in every if names is None or name in names.split(",")]

    targets, rows = PARTS[args.part]
    for model, mode, steps in rows:
        for target in some(args.targets, targets):
            of_row = some(args.steps, steps)
            if of_row and some(args.models, [model]) and some(args.modes, [mode]):
                yield Task(target, model, mode, of_row)


def main(arguments: Sequence[str] | None = None) -> int:
    import kernel_table

    from dsv4_hal.backends.cuda.checks import problems

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="quick")
    parser.add_argument("--targets", help="some of the part's, separated by commas")
    parser.add_argument("--models", help="some of the part's")
    parser.add_argument("--modes", help="some of the part's")
    parser.add_argument("--steps", help="some of the part's")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--slowest", type=int, default=0, help="print as many of the slowest compilations")
    parser.add_argument("--out", type=Path, help="results, a line of JSON for each task")
    parser.add_argument("--write", type=Path, help="write the table")
    parser.add_argument("--check", type=Path, help="compare the table with what was compiled")
    args = parser.parse_args(arguments)
    tasks = list(chosen(args))
    whole = args.part == "full" and not (args.models or args.modes or args.steps)
    start, results, wrong = time.perf_counter(), [], []
    for result in run(tasks, args.workers):
        results.append(result)
        spent = result["seconds"]
        counted = f"{len(result['kernels']):4} kernels, {len(result['calls']):4} calls, {len(result['errors'])} failed"
        times = f"{spent['wall']:.0f} s, of processors {spent['processors']:.0f} s"
        task = Task(**result["task"])
        print(f"{task.target:7} {task.model:8} {task.mode:8} {','.join(task.steps):26} {counted}; {times}", flush=True)
        wrong += result["errors"]
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    kernels = merged(results)
    for k in sorted(kernels, key=lambda k: -k.seconds)[: args.slowest]:
        print(f"{k.seconds:5.1f} s  {k.kernel} {k.target} {k.constants}")
    wrong += problems(kernels, whole)
    if args.write:
        args.write.write_text(kernel_table.page(kernels, results), encoding="utf-8")
    if args.check:
        wrong += kernel_table.differences(args.check.read_text(encoding="utf-8"), kernels, results)
    print(f"{len(kernels)} kernels in {time.perf_counter() - start:.0f} s: {len(wrong)} wrong")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
