"""What every op of a forward pass made, in order and by place: how `bisect` finds the first one that is wrong.

A call is named by where it stands, "layers.2.attn/3:sparse_attention"; one that a composite's definition makes stands
behind its composite, "layers.2.attn/9:output_proj/0:rope". Two backends are compared where both have a call: a fused
kernel has none inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor

from dsv4_hal.batch import Batch
from dsv4_hal.dispatch import Resolved
from dsv4_hal.formats import QTensor
from dsv4_hal.ops import KV, OPS
from dsv4_hal.ops.cases.inputs import held

CHOOSING = ("route", "index_topk")  # ops whose first result is what they chose


class Probe:
    """Keeps, from now on, the floating results, and picks, of every op called on `ops` while `place` is set.

    place  name of the part of the model that runs; "" for none
    seen   "place/call#result" -> values on the CPU, whatever form they had: quantised ones are read back; a plan's are
           its tables of angles; of cache rows they are all that the step's sequences hold, under "kv_..." or
           "index_..." after what they are rounded to
    """

    def __init__(self, ops: Resolved) -> None:
        self.ops, self.place, self.seen = ops, "", dict[str, Tensor]()
        self._calls: list[list[Any]] = []  # of the place, and of every composite around: its name, calls so far
        for op, spec in OPS.items():
            setattr(ops, op, self._probed(op, inspect.signature(spec.definition), getattr(ops, op)))

    def enter(self, place: str) -> None:
        """What follows belongs to `place`, whose calls are counted from 0 if it is another one."""
        if not self._calls or self._calls[0][0] != place:
            self._calls = [[place, 0]]
        self.place = place

    def _probed(self, op: str, signature: inspect.Signature, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.place:
                return run(*args, **kwargs)
            around = self._calls[-1]
            name = f"{around[0]}/{around[1]}:{op}"
            around[1] += 1
            self._calls.append([name, 0])
            try:
                result = run(*args, **kwargs)
            finally:
                self._calls.pop()
            place, self.place = self.place, ""  # reading results calls ops, too
            try:
                given = signature.bind(None, *args, **kwargs).arguments
                for kind, value in self._values(op, result, given.get("batch")):
                    self.seen[f"{name}#{kind}"] = value.detach().to("cpu", copy=True)
            finally:
                self.place = place
            return result

        return call

    def _values(self, op: str, result: Any, batch: Any) -> Iterator[tuple[str, Tensor]]:
        parts = result if isinstance(result, tuple) else (result,)
        if isinstance(result, Batch):
            tables = result.require_plan().rope
            parts = tuple(table for key in sorted(tables) for table in tables[key])
        if op in CHOOSING:
            yield "picks", parts[0]
        for number, part in enumerate(parts):
            if isinstance(part, KV):
                kind = "index" if part.layout.rounding == self.ops.numerics.index else "kv"
                yield from held(self.ops, kind, part, batch).items()
            elif isinstance(part, QTensor):
                yield f"y{number}", self.ops.dequantize(part, self.ops.numerics.accumulate)
            elif isinstance(part, Tensor) and part.is_floating_point():
                yield f"y{number}", part
