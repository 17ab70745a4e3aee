"""Deliberately wrong backends, one file per family of ops, and the hunt for what catches each."""

from dsv4_hal.conformance.mutants import (
    attention,
    cache,
    gemm,
    gradients,
    hyper_connection,
    moe,
    norm_rope,
    sampling,
    state,
)
from dsv4_hal.conformance.mutants.hunt import ENOUGH, Catch, Mutant, backend_of, hunt, mutant, mutants

__all__ = [
    "ENOUGH",
    "Catch",
    "Mutant",
    "attention",
    "backend_of",
    "cache",
    "gemm",
    "gradients",
    "hunt",
    "hyper_connection",
    "moe",
    "mutant",
    "mutants",
    "norm_rope",
    "sampling",
    "state",
]
