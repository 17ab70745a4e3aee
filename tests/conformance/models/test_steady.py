"""A step that waits for its device, or that is other work than the one before, is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsv4_hal.conformance.models.steady import NotSteady, Steady
from dsv4_hal.model.decode import Decoder
from dsv4_hal.model.transformer import Model

X = torch.arange(6.0)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (lambda: X[0].item(), r"item\(\) waits for the device: aten._local_scalar_dense"),
        (lambda: bool(X[0] > 0), r"item\(\) waits"),
        (lambda: X[X > 2], r"booleans waits .*aten.index"),
        (lambda: X.clone().index_put_((X > 2,), torch.zeros(())), "booleans waits"),
        (lambda: torch.nonzero(X), "nonzero"),
        (lambda: torch.equal(X, X), "equal"),
    ],
)
def test_what_waits_for_the_device(step: Callable[[], object], told: str) -> None:
    with pytest.raises(NotSteady, match=told), Steady():
        step()


def test_a_number_that_changes_would_be_frozen() -> None:
    seen = []
    for number in (2, 2, 3):
        with Steady() as steady:
            X * number
        seen.append(steady)
    seen[1].require(seen[0])
    with pytest.raises(NotSteady, match=r"operation 0 is aten.mul.Tensor\(.*3.*was aten.mul.Tensor\(.*2"):
        seen[2].require(seen[1])


def test_a_shape_that_changes() -> None:
    with Steady() as one:
        X[:2] + 1
    with Steady() as other:
        X[:3] + 1
    with pytest.raises(NotSteady, match="operation 0"):
        other.require(one)
    with Steady() as less:
        pass
    with pytest.raises(NotSteady, match="0 operations, and 2 in the step before"):
        less.require(one)


def test_the_reference_cannot_be_captured(small_model: Callable[..., Model]) -> None:
    """Its products are cut by expert on the host."""
    model = small_model()
    decoder = Decoder(model, model.new_cache(1, 8))
    decoder(torch.tensor([1]))
    with pytest.raises(NotSteady), Steady() as first:
        decoder(torch.tensor([1]))
        with Steady() as second:
            decoder(torch.tensor([1]))
        second.require(first)
