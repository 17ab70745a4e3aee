"""Cases from their ids."""

from __future__ import annotations

import pytest

from dsv4_hal.conformance.judging.named import named, split, try_out
from dsv4_hal.ops import OPS


def test_every_listed_case_is_found_by_its_id_and_has_the_form_of_one() -> None:
    for op, spec in OPS.items():
        for case in spec.cases():
            assert named(case.id) is not None and split(case.id) is not None
            assert named(case.id).size == case.size and named(case.id).grad == case.grad, op


def test_any_other_case_of_the_same_functions() -> None:
    case = named("rms_norm[weighted=True,tokens=2,width=48,scale=0.5]")
    assert case.id == "rms_norm[weighted=True,tokens=2,width=48,scale=0.5]"
    try_out(case)
    try_out(named("sparse_attention[ragged=1at127.2at0.p3,entries=picks,window=3]"))


@pytest.mark.parametrize(
    ("id", "told"),
    [
        ("rms_norm", "is no id of a case"),
        ("rms_nrm[weighted=True,tokens=2,width=48]", "is no id of a case"),
        ("rms_norm[weighted=1,tokens=2,width=48]", "weighted=...]: 1 is no bool"),
        ("rms_norm[weighted=True,tokens=two,width=48]", "tokens=...]: two is no int up to"),
        ("rms_norm[weighted=True,tokens=99999999,width=48]", "99999999 is no int up to"),
        ("rms_norm[weighted=True,tokens=2,depth=48]", "no case of rms_norm has just the parameters"),
        ("rms_norm[weighted=True,tokens=02,width=48]", "is written rms_norm[weighted=True,tokens=2,width=48]"),
        ("sparse_attention[ragged=1at99999999,entries=none]", "ragged=...]: 1at99999999 has a number above"),
        ("sparse_attention[ragged=1at,entries=none]", "'1at' is no ragged step"),
    ],
)
def test_what_is_no_case(id: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        named(id)
    assert told in str(caught.value)


def test_what_cannot_run_is_said_before_it_does() -> None:
    with pytest.raises(ValueError, match="cannot be run: ContractError: hadamard: width must be a power of two"):
        try_out(named("hadamard[tokens=3,heads=1,width=3]"))
