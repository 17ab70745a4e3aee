"""A view of the weight table below a prefix, so that a layer names its weights without knowing its number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dsv4_hal.formats import Weight


@dataclass(frozen=True)
class Scope:
    """Weights whose names start with `prefix`."""

    table: Mapping[str, Weight | Tensor]
    prefix: str = ""

    def below(self, name: str) -> Scope:
        return Scope(self.table, f"{self.prefix}{name}.")

    def matrix(self, name: str) -> Weight:
        """A matrix or stack of matrices, in its stored format."""
        found = self.table[self.prefix + name]
        if not isinstance(found, Weight):
            raise TypeError(f"{self.prefix}{name} is a plain tensor, not a Weight")
        return found

    def vector(self, name: str) -> Tensor:
        """A tensor that no matrix product reads: norm weights, sinks, biases, mixing coefficients, hash tables."""
        found = self.table[self.prefix + name]
        if isinstance(found, Weight):
            raise TypeError(f"{self.prefix}{name} is a Weight, not a plain tensor")
        return found

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.table
