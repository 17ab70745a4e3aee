"""Between torch and JAX: tensors cross by DLPack, functions are compiled when first called, sizes come in few kinds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from dsv4_hal.ops import ContractError


class Lazy:
    """A module that is imported when something of it is needed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


jax, jnp, lax = Lazy("jax"), Lazy("jax.numpy"), Lazy("jax.lax")

ALIGNMENT = 64  # bytes; JAX reads a tensor that begins elsewhere too, from a copy
PART = 128  # channels that are added up in one go
LEAST = 8  # a product of 8 rows takes as long as one of 1: most of it is reading the weight

# JAX narrows 64 bit types without a word, and so none may cross. 8 bit floats cross as bytes, and `formats` says what
# they mean: not every torch and JAX exchange them.
CROSS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8})
BYTES = frozenset({torch.float8_e4m3fn, torch.float8_e8m0fnu})


def kernel(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of JAX arrays that is called with tensors and returns tensors. `static` names its keywords."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = cache(lambda: jax.jit(function, static_argnames=static))

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            # JAX returns before it has computed, and torch may overwrite an argument (a pool of rows) right away.
            results = jax.block_until_ready(compiled()(*jax.tree.map(to_jax, args), **options))
            return jax.tree.map(torch.from_dlpack, results)

        return call

    return wrap


def to_jax(value: Any) -> Any:
    """A tensor's own memory as a JAX array; a copy where it is not contiguous or not aligned. Numbers pass."""
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad and torch.is_grad_enabled():
        raise ContractError("backend xla computes no gradients: call it under torch.no_grad() or inference_mode()")
    value = value.detach().contiguous()
    value = value.view(torch.uint8) if value.dtype in BYTES else value
    if value.dtype not in CROSS:
        raise ContractError(f"backend xla does not read {value.dtype}")
    return jax.dlpack.from_dlpack(value)


def bucket(count: int) -> int:
    """A power of two, at least LEAST and `count`.

    Everything that grows while a sequence is decoded (tokens of a step, rows of packed keys, visible entries) is padded
    to a bucket: JAX compiles for shapes, and would otherwise do so at every step.
    """
    return max(LEAST, 1 << (count - 1).bit_length() if count else 0)


def padded(t: Tensor, rows: int, value: float = 0) -> Tensor:
    """t with further rows of `value` at its end."""
    if len(t) == rows:
        return t
    out = torch.full((rows, *t.shape[1:]), value, dtype=t.dtype, device=t.device)
    out[: len(t)] = t
    return out


def dtype(of: torch.dtype) -> Any:
    """The JAX dtype of the same name."""
    return jnp.dtype(str(of).removeprefix("torch."))


def rounded(x: Any, to: torch.dtype) -> Any:
    """x rounded to what `to` can hold, in its own dtype. Not by two casts: XLA may leave out a pair of them."""
    target = jnp.finfo(dtype(to))
    return lax.reduce_precision(x, target.nexp, target.nmant)


def einsum(subscripts: str, *arrays: Any) -> Any:
    """Exact products, sums in the dtype of the arrays: JAX's default may take bfloat16 or TF32 for float32."""
    return jnp.einsum(subscripts, *arrays, precision="highest")


def long_sum(subscripts: str, a: Any, b: Any) -> Any:
    """einsum over the last axis of both, in parts: on a CPU, XLA adds one product after the other, and what is lost
    grows with the length: over 7168 channels three times what torch loses."""
    parts = [slice(start, start + PART) for start in range(0, a.shape[-1], PART)]
    return sum(einsum(subscripts, a[..., part], b[..., part]) for part in parts)
