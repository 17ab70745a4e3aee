"""The account of rounding: the reference in float64, and what errors of narrower arithmetic may make of its results.

A `Run` watches the torch operations below an op of the contract, in a profile widened to float64:
- it keeps, beside every result that is rounded to a narrower dtype, what stood there before the rounding (`exactly`);
- it may put an error into the result of every operation, as large as float32 may make it in any order of the sums, with
  signs from a seed (`noise`);
- it writes down every decision of a rounding point inside the op, and of every sort, and may take those of another run
  (`decided`): the errors then move what lies between two rounding points, and flip no decision;
- it may turn round some of these decisions (`flips`).

The error that is put in, in units of 2^-24 of the result (half the last place of float32), and none where float32 holds
the result exactly, as it does sums of small whole numbers:
    1                                       one operation: a sum, product, quotient, square root
    4 + 2 |argument of an exponential|      a function: two units in the last place, and its argument rounded
    2 sqrt(K) max(norm, |sum|)              a sum of K terms, norm = root of the sum of their squares: the largest of
                                            many such sums when all K are added in one chain
Uniform on both sides, it is the largest error that a device makes whose arithmetic is float32; nothing in it hangs on
the machine that judges, whose own errors, of 2^-53, are lost beside it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dsv4_hal.dispatch import Resolved
from dsv4_hal.ops import OPS

HALF_ULP = 2.0**-24
SMALLEST = 2.0**-150  # half of float32's smallest number
_ATEN = torch.ops.aten

_ONE = {"add", "sub", "rsub", "mul", "div", "sqrt", "square", "pow", "addcmul", "addcdiv", "lerp", "reciprocal"}
_FUNCTIONS = {
    "exp", "exp2", "expm1", "log", "log2", "log1p", "rsqrt", "sigmoid", "silu", "softplus", "tanh", "sin", "cos", "erf",
    "logaddexp", "logsumexp", "_log_softmax", "sigmoid_backward", "silu_backward", "softplus_backward",
    "_softmax_backward_data", "tanh_backward",
}  # fmt: skip
_EXPONENTIALS = ("aten::exp", "aten::sigmoid", "aten::silu", "aten::softplus")
_SUMS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "sum", "mean", "cumsum", "_softmax"}
_SCATTERED = {"index_add", "scatter_add", "embedding_dense_backward", "_index_put_impl"}
_MOVES = {
    "view", "_unsafe_view", "reshape", "slice", "select", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "alias", "detach", "unfold", "as_strided", "cat", "stack", "index", "index_select", "gather", "clone", "flip",
    "index_put", "scatter", "index_copy", "masked_fill", "where", "roll", "repeat", "split", "split_with_sizes",
    "unbind", "copy", "zero", "fill", "constant_pad_nd", "select_scatter", "slice_scatter", "neg", "contiguous",
    "view_as", "expand_as", "masked_scatter",
}  # fmt: skip
_NEW = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "full_like"}
_NEW |= {"empty_like", "empty_strided", "ones_like"}


@cache
def _kind(func: Any) -> str:
    """What an operation does to roundings; "" for one that rounds nothing and moves nothing that is kept."""
    name = func._schema.name.removeprefix("aten::")
    plain = name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
    if name == "_to_copy":
        return "cast"
    if plain in ("sort", "topk"):
        return "sort"
    if plain in ("view",) and func._overloadname == "dtype":
        return ""
    kinds = {"one": _ONE, "function": _FUNCTIONS, "sum": _SUMS, "scattered": _SCATTERED, "move": _MOVES, "new": _NEW}
    return next((kind for kind, names in kinds.items() if plain in names), "")


class Run(TorchDispatchMode):
    """One run of a case: `with_ops` gives the ops to run it on.

    noise    multiple of the errors above that is put in; 0: none
    seed     of their signs
    decided  decisions of another run of the same case, to be taken as they were; None: this run makes its own
    flips    in which decisions, by their number, two elements are turned round
    tape     the decisions of this run
    inside   whether something was rounded to less than float32, and read again: such a decision may fall otherwise
    """

    def __init__(
        self, noise: float = 0.0, seed: int = 0, decided: Sequence[Tensor] | None = None, flips: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.noise, self.decided, self.flips = noise, decided, frozenset(flips)
        self.tape: list[Tensor] = []
        self.shapes: dict[tuple[torch.dtype, int], list[int]] = {}  # kinds of rounding, and which decisions are of each
        self.inside = False
        self._signs = torch.Generator().manual_seed(seed)
        self._exact = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap every operation for its compiler, which nobody uses here, and import that: seconds."""
        return False

    def with_ops(self, ops: Resolved) -> Resolved:
        """The same ops, watched from the outermost call on."""
        watched = copy.copy(ops)
        watched.watch = self
        for op in OPS:
            setattr(watched, op, self._watched(getattr(ops, op)))
        return watched

    def _watched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        return call

    def exactly(self, t: Tensor) -> Tensor:
        """A result in float64, before its last rounding where that is known."""
        kept = self._exact.get(t)
        return t.double() if kept is None else kept

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, kind = kwargs or {}, _kind(func)
        if kind == "move":
            return self._move(func, args, kwargs)
        if kind == "cast":
            return self._cast(func, args, kwargs)
        if kind == "sort":
            return self._sort(func, args, kwargs)
        for t in _tensors((args, kwargs)):
            self._read(t)
        result = func(*args, **kwargs)
        if func._schema.name.endswith("_") and _narrow(args[0]) and args[0] in self._exact:
            self._exact[args[0]].copy_(args[0].double())  # reckoned in the narrow dtype itself; views see it, too
        if kind == "new" and _narrow(result):
            self._exact[result] = result.double()
        elif kind and kind != "new" and self.noise and isinstance(result, Tensor) and result.dtype == torch.float64:
            self._disturb(kind, func, args, kwargs, result)
        return result

    def _read(self, t: Tensor) -> None:
        """A tensor's values take part in arithmetic: a rounding that they have behind them was one inside the op."""
        if not self.inside and t.is_floating_point() and t.itemsize < 4:
            kept = self._exact.get(t)
            self.inside = kept is not None and not torch.equal(kept.nan_to_num(), t.double().nan_to_num())

    def _cast(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x, result = args[0], func(*args, **kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or not result.is_floating_point():
            return result
        if x.dtype != torch.float64:
            self._read(x)
            return result
        if not _narrow(result):
            return result
        if result.itemsize < 4 and result.numel():
            number = len(self.tape)
            if self.decided is not None:
                result = self.decided[number].clone()
            if not torch.equal(result.double().nan_to_num(), x.nan_to_num()):
                self.shapes.setdefault((result.dtype, result.shape[-1] if result.dim() else 1), []).append(number)
            self.tape.append(result.clone())
            if number in self.flips:
                _turn(x, result)
        self._exact[result] = x
        return result

    def _sort(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        x = args[0]
        self._read(x)
        values, order = func(*args, **kwargs)
        if self.decided is not None and order.numel():
            order = self.decided[len(self.tape)].clone()
            dim = kwargs.get("dim", args[1] if len(args) > 1 and not isinstance(args[1], bool) else -1)
            values = x.gather(dim if isinstance(dim, int) else -1, order)
        if order.numel():
            self.tape.append(order.clone())
        return values, order

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        moved = any(_narrow(t) and t in self._exact for t in _tensors((args, kwargs)))
        inplace = func._schema.name.endswith("_") and isinstance(args[0], Tensor) and _narrow(args[0])
        if inplace and moved and args[0] not in self._exact:
            self._exact[args[0]] = args[0].double()
        shadows = (_mapped(args, self._shadow), _mapped(kwargs, self._shadow)) if moved else None
        result = func(*args, **kwargs)
        if inplace and moved and shadows is not None:
            func(*shadows[0], **shadows[1])
            return result
        if shadows is not None:
            for made, kept in zip(_tensors(result), _tensors(func(*shadows[0], **shadows[1])), strict=True):
                if _narrow(made):
                    self._exact[made] = kept
        return result

    def _shadow(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        kept = self._exact.get(t)
        return t.double() if kept is None else kept

    def _disturb(self, kind: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Put the error of an operation into its result."""
        size = result.abs()
        if kind == "one":
            amount = size + SMALLEST / HALF_ULP
        elif kind == "function":
            amount = 4 * size + SMALLEST / HALF_ULP
            if func._schema.name.startswith(_EXPONENTIALS):
                x = args[0] if func._schema.name.startswith("aten::exp") else args[0].clamp(max=0)
                amount += 2 * x.abs().nan_to_num(0, 0, 0) * size
        elif kind == "scattered":
            amount = 8 * func(*_mapped(args, lambda t: t.abs() if t.is_floating_point() else t), **kwargs)
        else:
            amount = _of_sum(func, args, kwargs, result)
        amount = amount.masked_fill_(_exact(result, kind) | ~result.isfinite(), 0)
        signs = torch.randint(0, 2, result.shape, generator=self._signs).mul_(2).sub_(1)
        result.add_(amount.mul_(signs).mul_(self.noise * HALF_ULP))


def _exact(result: Tensor, kind: str) -> Tensor:
    """Where float32 makes no error: it holds the result. A sum may come out so by chance, while what it was added up
    from did not; that has few bits only where all of it had (by chance in one of 2^13 sums of 16 terms)."""
    held = result.float()
    if kind in ("sum", "scattered"):
        held = (held.view(torch.int32) & -64).view(torch.float32)
    return held.double() == result


def _of_sum(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Tensor:
    """The error of a sum, or of many."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name == "_softmax":
        return result * (4 + 2 * result.log().abs().nan_to_num(0, 0, 0) + 2 * args[0].shape[args[1]] ** 0.5)
    if name in ("sum", "mean", "cumsum"):
        x = args[0].double()
        terms = x.shape[args[1]] if name == "cumsum" else x.numel() // max(1, result.numel())
        norm = func(x.square(), *args[1:], **kwargs).sqrt_()
        if name == "mean":
            norm = norm.div_(max(1, terms) ** 0.5)
    else:
        *start, a, b = args[:3] if name in ("addmm", "baddbmm") else args[:2]
        terms = a.shape[-1] + len(start)
        square = func(*(t.square() for t in (*start, a, b)))
        norm = square.sqrt_()
    if terms <= 1:
        return result.abs()
    return torch.maximum(norm, result.abs()).mul_(2 * math.sqrt(terms))


def _turn(exact: Tensor, rounded: Tensor) -> None:
    """The decision that was the closest falls otherwise, and that of the largest value: these elements become their
    other neighbours."""
    value = rounded.double()
    error = (exact - value).nan_to_num(0, 0, 0)
    bits = {2: torch.int16, 1: torch.int8}[rounded.itemsize]
    step = torch.where((error > 0) == (value > 0), 1, -1).to(bits)
    other = (rounded.view(bits) + step).view(rounded.dtype).double()
    close = (error.abs() / (other - value).abs()).nan_to_num(0, 0, 0)
    close = torch.where(other.isfinite() & (value != 0), close, 0)
    for weight in (close, value.abs().where(close > 0, 0)):
        place = torch.unravel_index(weight.argmax(), weight.shape)
        if float(weight[place]) > 0:
            rounded[place] = other[place].to(rounded.dtype)


def _narrow(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.itemsize < 8


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {name: _mapped(one, change) for name, one in value.items()}
    return value


@contextmanager
def no_inference() -> Iterator[None]:
    """Operations reach a dispatch mode taken apart only outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
