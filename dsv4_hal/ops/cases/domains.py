"""What the parameters of a case may be, said once: listed cases cover it pairwise, `conform --generate` draws of it.

    DOMAIN = Domain("hadamard", _hadamard, {"tokens": (3, 0, 1, 129), "width": (64, 1, 128), "values": VALUES})

Any two values of two parameters meet in some case, unless `legal` says that they cannot. That is far fewer cases than
all combinations, and finds what hangs on two things at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4_hal.ops.cases.inputs import Results, case
from dsv4_hal.ops.spec import Case

DOMAINS: dict[str, list[Domain]] = {}  # op -> what its cases are drawn of


def tiny(_: Mapping[str, Any]) -> str:
    return "tiny"


def everything(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Domain:
    """The legal parameters of a function that runs an op's cases.

    values    parameter -> what it may be, the plainest first; "strides" may be one of them (see `inputs.case`)
    legal     whether parameters go together; asked with some of them as well, those before it in `values`
    size      size class of a case with these parameters, of `dsv4_hal.ops.SIZES`
    declared  whether it is one of DOMAINS: what `--generate` draws of
    """

    op: str
    run: Callable[..., Results]
    values: Mapping[str, Sequence[Any]]
    legal: Callable[[Mapping[str, Any]], bool] = everything
    size: Callable[[Mapping[str, Any]], str] = tiny
    declared: bool = True

    def __post_init__(self) -> None:
        if self.declared:
            DOMAINS.setdefault(self.op, []).append(self)

    def case(self, parameters: Mapping[str, Any]) -> Case:
        """The case with these parameters; its id leaves out those that have the function's own default."""
        defaults = {name: p.default for name, p in inspect.signature(self.run).parameters.items()} | {"strides": ""}
        told = {n: v for n, v in parameters.items() if not (type(v) is type(defaults[n]) and v == defaults[n])}
        return case(self.op, self.run, self.size(parameters), **told)

    def covering(self) -> Iterator[Case]:
        """Cases in which any two values of two parameters meet."""
        from allpairspy import AllPairs  # only who runs cases needs it

        names = list(self.values)

        def legal(row: Sequence[Any]) -> bool:
            return self.legal(dict(zip(names, row, strict=False)))

        if len(names) == 1:
            yield from (self.case({names[0]: value}) for value in self.values[names[0]] if legal([value]))
            return
        for row in AllPairs([list(of) for of in self.values.values()], filter_func=legal):
            yield self.case(dict(zip(names, row, strict=True)))
