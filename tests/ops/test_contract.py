"""The contract is complete: every op says what it is, how it is compared and why, and what to try."""

import inspect
import re
from collections import Counter

import pytest

from dsv4_hal.backend import Backend
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.reference import Reference
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS, Compare, Ops, OpSpec

SPECS = list(OPS.values())
WITHOUT_SHAPES = {"state_copy", "state_reset", "state_new", "plan"}  # what they take has a shape of its own
FAMILIES = {"gemm", "norm_rope", "cache", "attention", "moe", "hyper_connection", "sampling"}


def test_every_family_is_there() -> None:
    assert {spec.family for spec in SPECS} == FAMILIES


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_an_op_is_documented(spec: OpSpec) -> None:
    assert len(spec.doc) > 20
    assert spec.name in WITHOUT_SHAPES or re.search(r"\[([A-Z]|\.\.\.|stop)[^\]]*\]", documented(spec))
    assert getattr(Ops, spec.name) is spec.definition


def documented(spec: OpSpec) -> str:
    """A composite may leave shapes to the op that it begins with, which it names."""
    named = re.findall(r"`(\w+)`", spec.doc) if spec.composite else []
    return " ".join([spec.doc, *(OPS[name].doc for name in named if name in OPS)])


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_tolerance_has_a_reason(spec: OpSpec) -> None:
    assert len(spec.tolerance.why.split()) >= 2
    assert (spec.tolerance.factor == 0) == (spec.tolerance.compare is Compare.BITWISE)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_cases_can_be_named(spec: OpSpec) -> None:
    names = [case.id for case in spec.cases()]
    assert len(names) >= 3
    assert [n for n, count in Counter(names).items() if count > 1] == []
    for name in names:  # nothing that a shell, a file name or a comma-separated list of ids would trip over
        assert re.fullmatch(rf"{spec.name}\[[\w.]+=[\w.\-]+(,[\w.]+=[\w.\-]+)*\]", name)


@pytest.mark.parametrize("backend", [Reference, Null])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_backend_keeps_the_signature(spec: OpSpec, backend: type[Backend]) -> None:
    assert inspect.signature(getattr(backend, spec.name)) == inspect.signature(spec.definition)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.composite], ids=lambda s: s.name)
def test_a_primitive_has_no_arithmetic(spec: OpSpec) -> None:
    """Its body only refuses: it returns nothing."""
    source = inspect.getsource(spec.definition)
    assert not re.search(r"return [^\n]", source.split('"""')[2])


def test_layouts_of_every_kind() -> None:
    for backend in (Reference(exact()), Null(exact())):
        assert backend.row_layout("window", 512, 64, 1, 128).window == 128
        assert backend.row_layout("entries", 512, 64, 4).ratio == 4
        assert backend.row_layout("index", 128, 64, 4).dim == 128
        with pytest.raises(ValueError, match="unknown kind of cache row 'values'"):
            backend.row_layout("values", 512, 64, 1)
