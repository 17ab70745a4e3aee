"""Choosing one implementation per op, and saying why."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dsv4_hal import dispatch
from dsv4_hal.backend import Backend, BackendError, Facts, Origin, Verdict
from dsv4_hal.backends.null import Null
from dsv4_hal.backends.reference import Reference
from dsv4_hal.dispatch import by_op, resolve, select
from dsv4_hal.formats import FORMATS, Weight
from dsv4_hal.numerics import deployed, exact
from dsv4_hal.ops import OPS, ContractError

PRIMITIVES = [name for name, spec in OPS.items() if not spec.composite]
COMPOSITES = [name for name, spec in OPS.items() if spec.composite]


class Vendor(Reference):
    """A new accelerator: works at once through the reference, overrides one primitive and one composite."""

    name = "vendor"

    def hadamard(self, x: Tensor) -> Tensor:
        return x + 1000

    def mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(7)


class Half(Backend):
    """Only norms; and these only for narrow models."""

    name = "half"

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, *, out: Tensor | None = None) -> Tensor:
        return x * 0

    def supports(self, op: str, facts: Facts) -> Verdict:
        wide = facts.get("width", 0) > 100
        return Verdict(not wide, "too wide" if wide else "fits")


REFERENCE, VENDOR, HALF = Reference(exact()), Vendor(exact()), Half(exact())


def test_origins() -> None:
    assert Reference.origin("linear") == Origin("native", "reference")
    assert Reference.origin("mlp") == Origin("composite")
    assert Vendor.origin("hadamard") == Origin("native", "vendor")
    assert Vendor.origin("mlp") == Origin("native", "vendor")
    assert Vendor.origin("linear") == Origin("inherited", "reference")
    assert Vendor.origin("moe_experts") == Origin("composite")
    assert Half.origin("linear") == Origin("missing")
    assert Half.origin("rms_norm") == Origin("native", "half")


@pytest.mark.parametrize("backend", [Reference, Null])
def test_complete_backends_miss_nothing(backend: type[Backend]) -> None:
    assert {backend.origin(op).kind for op in PRIMITIVES} == {"native"}
    assert {backend.origin(op).kind for op in COMPOSITES} == {"composite"}


def test_resolution_of_every_op_is_told() -> None:
    ops = resolve([VENDOR])
    kinds = {r.op: (r.kind, r.backend) for r in ops.resolutions}
    assert list(kinds) == list(OPS)
    assert kinds["hadamard"] == ("native", "vendor")
    assert kinds["linear"] == ("inherited", "reference")
    assert kinds["q_norm_rope"] == ("composite", "")


def test_what_was_chosen_runs() -> None:
    x = torch.ones(1, 2)
    assert resolve([REFERENCE]).hadamard(x).max() < 2
    assert resolve([VENDOR]).hadamard(x).max() > 900
    assert resolve([VENDOR]).mlp().shape == (7,)
    assert resolve([HALF, REFERENCE]).rms_norm(x, None, 1e-6).abs().max() == 0
    assert resolve([HALF, REFERENCE]).hadamard(x).max() < 2


def test_composites_run_on_what_their_parts_were_resolved_to() -> None:
    cos_sin = torch.ones(1, 1), torch.zeros(1, 1)
    q = torch.ones(1, 1, 2)
    assert resolve([REFERENCE]).q_norm_rope(q, 1e-6, cos_sin).abs().max() > 0
    assert resolve([HALF, REFERENCE]).q_norm_rope(q, 1e-6, cos_sin).abs().max() == 0


def test_the_first_backend_gives_profile_and_layouts() -> None:
    ops = resolve([VENDOR, REFERENCE])
    assert ops.numerics is VENDOR.numerics and ops.device == VENDOR.device
    assert ops.row_layout("window", 96, 32, 1, 8) == VENDOR.row_layout("window", 96, 32, 1, 8)


def test_preconditions_are_checked_for_every_primitive() -> None:
    with pytest.raises(ContractError, match=r"^hadamard: "):
        resolve([VENDOR]).hadamard(torch.ones(1, 3))


def test_refusal_is_told_with_its_reason() -> None:
    def kept(facts: Facts) -> dispatch.Resolution:
        return next(r for r in resolve([HALF, REFERENCE], facts).resolutions if r.op == "rms_norm")

    assert (kept({}).backend, kept({}).rejected) == ("half", ())
    refused = kept({"width": 512})
    assert (refused.backend, refused.rejected) == ("reference", (("half", "too wide"),))


def test_a_refused_composite_falls_back_on_its_definition() -> None:
    class Picky(Vendor):
        name = "picky"

        def supports(self, op: str, facts: Facts) -> Verdict:
            return Verdict(op != "mlp", "no mlp today")

        def mlp(self, *args: Any, **kwargs: Any) -> Tensor:
            raise AssertionError("refused, but called")

    resolution = next(r for r in resolve([Picky(exact())]).resolutions if r.op == "mlp")
    assert (resolution.kind, resolution.rejected) == ("composite", (("picky", "no mlp today"),))


def test_a_missing_primitive_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"no backend can run .*half: not implemented"):
        resolve([HALF])


def test_preference() -> None:
    ops = resolve([VENDOR, REFERENCE], prefer={"hadamard": ["reference", "vendor"]})
    assert ops.hadamard(torch.ones(1, 2)).max() < 2
    assert {r.op: r.backend for r in ops.resolutions}["linear"] == "reference"
    with pytest.raises(BackendError, match="no backend can run hadamard: half: not implemented"):
        resolve([REFERENCE, HALF], prefer={"hadamard": ["half"]})


@pytest.mark.parametrize("prefer", [{"hadamar": ["reference"]}, {"hadamard": ["vndor"]}])
def test_preference_for_something_unknown(prefer: dict[str, list[str]]) -> None:
    with pytest.raises(BackendError, match=r"hadamar|vndor"):
        resolve([REFERENCE], prefer=prefer)


def test_strict() -> None:
    resolve([REFERENCE], strict=True)
    with pytest.raises(BackendError, match=r"strict: .* would run on reference, not on vendor"):
        resolve([VENDOR], strict=True)
    with pytest.raises(BackendError, match=r"strict: .*half: not implemented"):
        resolve([HALF, REFERENCE], strict=True)


def test_strict_accepts_what_a_backend_adopts() -> None:
    class Adopting(Vendor):
        name = "adopting"
        adopts: ClassVar[dict[str, str]] = dict.fromkeys(set(OPS) - {"quantize"}, "a copy")

    with pytest.raises(BackendError, match=r"^strict: quantize would run on reference, not on adopting \([^)]*\)$"):
        resolve([Adopting(exact())], strict=True)
    Adopting.adopts = dict.fromkeys(OPS, "a copy")
    found = {r.op: r for r in resolve([Adopting(exact())], strict=True).resolutions}
    assert (found["quantize"].runs_as, found["quantize"].adopted) == ("reference", "a copy")
    assert (found["moe_experts"].runs_as, found["moe_experts"].adopted) == ("composite", "")


def test_strict_accepts_what_a_backend_leaves_to_others_on_purpose() -> None:
    """Its own code is refused here, and it says that another backend's should run instead."""

    class Leaving(Vendor):
        name = "leaving"
        adopts: ClassVar[dict[str, str]] = dict.fromkeys(OPS, "no operator of this device computes it")

        def supports(self, op: str, facts: Facts) -> Verdict:
            return Verdict(op != "hadamard", "it rounds elsewhere" if op == "hadamard" else "with its second operator")

    found = {r.op: r for r in resolve([Leaving(exact()), REFERENCE], strict=True).resolutions}
    assert (found["hadamard"].runs_as, found["hadamard"].rejected) == (
        "reference",
        (("leaving", "it rounds elsewhere"),),
    )
    assert found["hadamard"].adopted == "no operator of this device computes it"


def test_a_reason_to_accept_is_kept_where_it_says_something() -> None:
    class Telling(Vendor):
        name = "telling"

        def supports(self, op: str, facts: Facts) -> Verdict:
            return Verdict(True, "its second operator") if op == "hadamard" else super().supports(op, facts)

    found = {r.op: r.reason for r in resolve([Telling(exact())]).resolutions}
    assert (found["hadamard"], found["linear"]) == ("its second operator", "")


def test_preferences_by_family_and_by_op() -> None:
    found = by_op({"moe": ["vendor", "reference"], "swiglu": "reference"})
    assert found["swiglu"] == ("reference",)
    assert found["route"] == found["mlp"] == ("vendor", "reference")
    assert "linear" not in found
    with pytest.raises(BackendError, match="no op or family is called 'linaer'; did you mean linear"):
        select(["reference"], exact(), prefer={"linaer": ["reference"]})
    with pytest.raises(BackendError, match="must be a mapping"):
        by_op(["linear"])  # type: ignore[arg-type]


def raises(error: BaseException) -> Any:
    def hook(*_: Any) -> Any:
        raise error

    return hook


@pytest.mark.parametrize(
    ("hook", "answer", "message"),
    [
        ("origin", raises(KeyError("x")), r"backend odd: origin\(\) failed: KeyError: 'x'"),
        ("origin", lambda op: None, r"backend odd: origin\(\) returned None, not a Origin"),
        ("row_layout", raises(SystemExit(3)), r"backend odd: row_layout\(\) failed: SystemExit: 3"),
        ("repack", raises(KeyError("x")), r"backend odd: repack\(\) failed: KeyError: 'x'"),
        ("repack", lambda weight: None, r"backend odd: repack\(\) returned None, not a Weight"),
    ],
)
def test_a_backend_that_breaks_in_a_hook_is_named(hook: str, answer: Any, message: str) -> None:
    odd = type("Odd", (Reference,), {"name": "odd"})(exact())
    setattr(odd, hook, answer)
    with pytest.raises(BackendError, match=message):
        ops = resolve([odd])
        ops.row_layout("window", 96, 32, 1, 8)
        ops.repack(Weight(torch.zeros(2, 2), None, FORMATS["fp32"]))


@pytest.mark.parametrize(
    ("supports", "reason"),
    [
        (raises(SystemExit(7)), "supports() failed: SystemExit: 7"),
        (lambda *_: True, "supports() returned True, no Verdict"),
        (lambda *_: Verdict(1, ""), "supports() returned Verdict(ok=1, reason='', remedy=''), no Verdict"),
    ],
)
def test_a_question_that_breaks_is_a_refusal(supports: Any, reason: str) -> None:
    odd = type("Odd", (Vendor,), {"name": "odd"})(exact())
    odd.supports = supports
    found = {r.op: r for r in resolve([odd, REFERENCE]).resolutions}
    assert found["linear"].rejected == (("odd", reason),) and found["linear"].backend == "reference"


def test_what_cannot_be_called_is_not_an_op() -> None:
    odd = type("Odd", (Reference,), {"name": "odd", "linear": 5})(exact())
    found = {r.op: r for r in resolve([odd, REFERENCE]).resolutions}
    assert found["linear"].rejected == (("odd", "linear is 5, which cannot be called"),)


def test_backends_that_compute_differently_are_not_mixed() -> None:
    with pytest.raises(BackendError, match="reference has another numeric profile or device than half"):
        resolve([Half(deployed()), Reference(exact())])


def test_nothing_to_choose_from() -> None:
    with pytest.raises(BackendError, match="none given"):
        resolve([])
    with pytest.raises(BackendError, match="preference is empty"):
        resolve([REFERENCE], prefer={"mlp": []})
