"""Triton's interpreter, made to compute what a GPU does, and to refuse what a GPU would do silently.

`TRITON_INTERPRET=1` runs kernels in numpy, on the CPU. As shipped (3.9) it is wrong for narrow floats without a word:
bfloat16 is a uint16 to numpy, so that arithmetic and `tl.dot` work on bit patterns; a cast to bfloat16 truncates; one
to float8 rounds half up and loses carries. And an address beside a tensor is read, or ends the process. `install`
replaces these parts:

- arithmetic on bfloat16 and float8 is that of their values in float32, rounded once to nearest even;
- casts round to nearest even, and saturate for float8, as `cvt.rn.satfinite` does;
- `tl.dot` multiplies values, sums in float32, and rounds float32 operands where TF32 was asked for;
- a scalar condition is a mask like any other;
- a load or store whose address lies in none of the tensors that the kernel was given raises IndexError;
- Triton's language is taken over once, not again by every function that a kernel calls: that took most of the time.

What stays different from a GPU: the order of sums, exponentials in their last bits, and everything about time, memory
and races. Programs run one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle as Handle

VERIFIED = "3.9."  # versions of triton whose interpreter this was written for

# triton dtype -> torch dtype, of floats that numpy does not know
NARROW = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_TOP = {dtype: torch.finfo(known).max for dtype, known in NARROW.items() if known.itemsize == 1}
_VALUES = {dtype: torch.arange(256, dtype=torch.uint8).view(NARROW[dtype]).float().numpy() for dtype in _TOP}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def values(codes: NDArray[Any], dtype: tl.dtype) -> NDArray[Any]:
    """What numpy holds for a triton dtype -> numbers: float32 for narrow floats, unchanged for all others."""
    if dtype == tl.bfloat16:
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _VALUES[dtype][codes] if dtype in _VALUES else codes


def codes(numbers: NDArray[Any], dtype: tl.dtype, truncate: bool = False) -> NDArray[Any]:
    """Numbers -> what numpy holds for a triton dtype: to nearest even, float8 saturating. truncate: bfloat16 towards
    zero."""
    if dtype not in NARROW:
        return np.asarray(numbers).astype(interpreter._get_np_dtype(dtype))
    floats = np.asarray(numbers, dtype=np.float32, order="C")
    if dtype == tl.bfloat16:
        bits = floats.view(np.uint32)
        if not truncate:
            rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
            bits = np.where(np.isnan(floats), np.uint32(0x7FC00000), rounded)
        return (bits >> np.uint32(16)).astype(np.uint16)
    clamped = torch.from_numpy(floats).clamp(-_TOP[dtype], _TOP[dtype])  # NaN stays
    return clamped.to(NARROW[dtype]).view(torch.uint8).numpy()


def _binary(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def binary_op(self: Any, lhs: Handle, rhs: Handle, op: Callable[..., NDArray[Any]]) -> Handle:
        dtype = lhs.dtype.scalar
        if dtype in NARROW and op not in _BITWISE:
            result = op(values(lhs.data, dtype), values(rhs.data, rhs.dtype.scalar))
            return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(codes(result, dtype), dtype)
        made = original(self, lhs, rhs, op)
        return Handle(made.data, tl.int1) if made.data.dtype == np.bool_ else made  # as shipped it keeps lhs's dtype

    return binary_op


def _unary(self: Any, arg: Handle, op: Callable[[NDArray[Any]], NDArray[Any]]) -> Handle:
    dtype = arg.dtype.scalar
    return Handle(codes(op(values(arg.data, dtype)), dtype), dtype)


def _cast(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def cast_impl(self: Any, src: Handle, dst_type: tl.dtype) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in NARROW or target in NARROW:
            return Handle(codes(values(src.data, source), target), target)
        return original(self, src, dst_type)

    return cast_impl


def _convert(data: NDArray[Any], source: tl.dtype, target: tl.dtype, rounding: Any) -> NDArray[Any]:
    """Float to float; callers view the result, so it comes as unsigned integers of the target's width."""
    truncate = rounding is not None and rounding == interpreter._ir.ROUNDING_MODE.RTZ
    made = codes(values(data, source), target, truncate)
    return np.ascontiguousarray(made).view(getattr(np, f"uint{target.primitive_bitwidth}"))


def _fma(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        dtype = z.dtype.scalar
        if dtype not in NARROW:
            return original(self, x, y, z)
        product = values(x.data, dtype).astype(np.float64) * values(y.data, dtype)
        return Handle(codes(product + values(z.data, dtype), dtype), dtype)

    return create_fma


def _dot(self: Any, a: Handle, b: Handle, d: Handle, precision: Any, imprecise: int) -> Handle:
    operand, total = a.dtype.scalar, d.dtype.scalar
    left, right = values(a.data, operand), values(b.data, b.dtype.scalar)
    if not operand.is_floating():
        # numpy multiplies integers slowly; products and sums of int8 are exact in float64
        made = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return Handle(made.astype(d.data.dtype) + d.data, total)
    if operand == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
        left, right = interpreter._round_f32_to_tf32(left), interpreter._round_f32_to_tf32(right)
    wide = np.float64 if operand == tl.float64 else np.float32
    made = np.matmul(left.astype(wide), right.astype(wide)) + values(d.data, total)
    return Handle(codes(made, total), total)


def _sum(self: Any, given: tl.tensor) -> tl.tensor:
    made = np.sum(values(given.handle.data, given.dtype), axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(codes(np.asarray(made), given.dtype), given.dtype)


def _min_max(original: Callable[..., Any]) -> Callable[..., Any]:
    def min_max(self: Any, given: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        given = given[0] if isinstance(given, tuple) else given
        if given.dtype not in NARROW:
            return original(self, given, val_reduce_op, idx_reduce_op)
        numbers, found = values(given.handle.data, given.dtype), []
        for op in (val_reduce_op, idx_reduce_op):
            if op is not None:
                made = np.asarray(op(numbers, axis=self.axis, keepdims=self.keep_dims))
                narrow = op is val_reduce_op
                found.append(
                    self.to_tensor(codes(made, given.dtype) if narrow else made, given.dtype if narrow else tl.int32)
                )
        return found[0] if len(found) == 1 else tuple(found)

    return min_max


_EXTENTS: list[tuple[int, int]] = []  # first byte, byte behind the last, of every tensor of the running kernel


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.itemsize if tensor.numel() else start


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a kernel's arguments; those that belong together may come in a tuple."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def _check(pointers: Handle, mask: NDArray[Any], what: str) -> None:
    """IndexError where an active address lies in no tensor that the kernel was given."""
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    active = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
    inside = np.zeros(active.shape, dtype=bool)
    for start, stop in _EXTENTS:
        inside |= (active >= start) & (active + width <= stop)
    if not inside.all():
        near = min((int(a) - s for a in active[~inside][:1] for s, _ in _EXTENTS), key=abs, default=0)
        raise IndexError(
            f"{int((~inside).sum())} of {active.size} addresses to {what} lie in no tensor of the kernel; "
            f"the first lies {near} bytes from the start of the nearest"
        )


def _load(original: Callable[..., Handle]) -> Callable[..., Handle]:
    def create_masked_load(self: Any, ptrs: Handle, mask: Handle, *rest: Any) -> Handle:
        _check(ptrs, mask.data, "load")
        return original(self, ptrs, mask, *rest)

    return create_masked_load


def _store(original: Callable[..., None]) -> Callable[..., None]:
    def create_masked_store(self: Any, ptrs: Handle, value: Handle, mask: Handle, *rest: Any) -> None:
        _check(ptrs, mask.data, "store")
        return original(self, ptrs, value, mask, *rest)

    return create_masked_store


def _launch(original: Callable[..., None]) -> Callable[..., None]:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        _EXTENTS[:] = [_extent(t) for t in _tensors((*args, *kwargs.values()))]
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a GPU makes NaN and infinity without a word
            original(self, *args, **kwargs)

    return call


class _Kept:
    """A replacement of Triton's language that stays: this process interprets, and compiles nothing."""

    def restore(self) -> None:
        pass


def _once(original: Callable[[Any], Any]) -> Callable[[Any], _Kept]:
    done: list[Any] = []

    def patch_lang(fn: Any) -> _Kept:
        if not done:
            done.append(original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        return _Kept()

    return patch_lang


def _block_type(self: Any, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
    """As shipped, but for what it works out again for every value of a kernel."""
    self.element_ty = element_ty
    self.shape = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
    if not self.shape:
        raise TypeError("a block has at least one axis")
    self.numel, self.name = _validated(self.shape), f"<{self.shape}, {element_ty}>"


def _scaled_shape(
    self: Any, rows: int, columns: int, inner: int, left: tl.tensor | None, right: tl.tensor | None, block: int
) -> None:
    """As shipped, for shapes that are tuples of Python."""
    for scale, count in ((left, rows), (right, columns)):
        if scale is not None and scale.type.shape[-2:] != (count, inner // block):
            raise TypeError(f"block scales of {scale.type.shape}, need {(count, inner // block)}")


def _numpy(original: Callable[[tl.dtype], np.dtype[Any]]) -> Callable[[tl.dtype], np.dtype[Any]]:
    known: dict[str, np.dtype[Any]] = {}

    def get_np_dtype(dtype: tl.dtype) -> np.dtype[Any]:
        one = dtype.scalar
        if one.name not in known:
            known[one.name] = original(one)
        return known[one.name]

    return get_np_dtype


@cache
def _validated(shape: tuple[int, ...]) -> int:
    return int(tl.core.validate_block_shape(shape))


def install() -> None:
    """Replace the parts named above, once, in this process. RuntimeError for a triton it was not written for."""
    if not triton.__version__.startswith(VERIFIED):
        raise RuntimeError(
            f"the corrections of triton's interpreter are for version {VERIFIED}x, this is {triton.__version__}"
        )
    builder, reduce, executor = interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.GridExecutor
    if builder.create_dot is _dot:
        return
    interpreter._convert_float = _convert
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _numpy(interpreter._get_np_dtype)
    replaced: Sequence[tuple[type, str, Callable[..., Any]]] = (
        (builder, "binary_op", _binary(builder.binary_op)),
        (builder, "unary_op", _unary),
        (builder, "cast_impl", _cast(builder.cast_impl)),
        (builder, "create_fma", _fma(builder.create_fma)),
        (builder, "create_dot", _dot),
        (builder, "create_masked_load", _load(builder.create_masked_load)),
        (builder, "create_masked_store", _store(builder.create_masked_store)),
        (reduce, "sum", _sum),
        (reduce, "min_max", _min_max(reduce.min_max)),
        (executor, "__call__", _launch(executor.__call__)),
        (tl.block_type, "__init__", _block_type),
        (TritonSemantic, "verify_scaled_shape", _scaled_shape),
    )
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
