"""Every kernel of the CUDA backend, compiled for GPUs that are not here, checked, and written to a table.

    python benchmarks/kernels.py --targets sm_90,sm_100 --check docs/kernels.md
    python benchmarks/kernels.py --targets all --write docs/kernels.md

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODELS = ("v4-flash", "v4-pro")
MODES = {"deployed": MODELS, "exact": MODELS[:1]}  # exact has other dtypes: one model shows what they compile to
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
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


def compile_task(task: Task, steps: Sequence[str]) -> dict[str, Any]:
    """In a process where triton is not interpreted: kernels by key, failed calls, and calls with what they cost."""
    os.environ["DSV4_HAL_ASSUME"] = task.target
    import kernel_calls
    from kernel_costs import cost

    from dsv4_hal.backends.triton_kernels.ahead import compile_only
    from dsv4_hal.numerics import numerics_for

    start = time.perf_counter()
    with compile_only(task.target) as compiled:
        made = kernel_calls.calls(task.model, task.mode, compiled, steps)
    compiling = time.perf_counter() - start
    kernels: dict[str, Kernel] = {}
    errors, calls = [], []
    numerics = numerics_for(task.mode)
    for call in made:
        user = (task.model, task.mode, call.step, call.op)
        if call.error:
            errors.append(f"{' '.join(user)} on {task.target}: {call.error}")
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
                "shape": kernel_calls.label(call),
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
        "seconds": {"compile": compiling, "read": time.perf_counter() - start - compiling},
    }


def _add_use(kernel: Kernel, grid: Sequence[int], users: Iterable[Sequence[str]]) -> None:
    longest = max(len(grid), len(kernel.grid))
    padded = [tuple(g) + (1,) * (longest - len(g)) for g in (grid, kernel.grid)]
    kernel.grid = tuple(max(axis) for axis in zip(*padded, strict=True))
    kernel.used += [(*user,) for user in users if (*user,) not in kernel.used]  # type: ignore[misc]


def run(tasks: Sequence[Task], steps: Sequence[str], workers: int) -> Iterator[dict[str, Any]]:
    """Results of tasks as they come, from processes of their own."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_task, task, steps) for task in tasks]):
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


def main(arguments: Sequence[str] | None = None) -> int:
    import kernel_calls
    import kernel_table

    from dsv4_hal.backends.cuda.checks import problems

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", default="sm_90,sm_100", help=f"all, or some of {','.join(TARGETS)}")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modes", default="deployed", help=",".join(MODES))
    parser.add_argument("--steps", default=",".join(kernel_calls.STEPS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--slowest", type=int, default=0, help="print as many of the slowest compilations")
    parser.add_argument("--out", type=Path, help="results, a line of JSON for each task")
    parser.add_argument("--write", type=Path, help="write the table")
    parser.add_argument("--check", type=Path, help="compare the table with what was compiled")
    args = parser.parse_args(arguments)
    targets = TARGETS if args.targets == "all" else args.targets.split(",")
    models, modes, steps = args.models.split(","), args.modes.split(","), args.steps.split(",")
    tasks = [Task(t, m, mode) for mode in modes for m in models for t in targets if m in MODES[mode]]
    whole = set(models) == set(MODELS) and set(modes) == set(MODES) and set(steps) == set(kernel_calls.STEPS)
    start, results, wrong = time.perf_counter(), [], []
    for result in run(tasks, steps, args.workers):
        results.append(result)
        spent = result["seconds"]
        counted = f"{len(result['kernels']):4} kernels, {len(result['calls']):4} calls, {len(result['errors'])} failed"
        times = f"{spent['compile']:.0f} s to compile, {spent['read']:.0f} s to read"
        print(f"{' '.join(result['task'].values()):25} {counted}; {times}", flush=True)
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
    print(
        f"{len(kernels)} kernels for {len(targets)} targets in {time.perf_counter() - start:.0f} s: {len(wrong)} wrong"
    )
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
