"""Oracles of the reference: each finds a reference that is wrong, and they are asked for what is chosen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_hal.backends.reference import Reference
from dsv4_hal.conformance.answers import closed_forms, golden
from dsv4_hal.conformance.answers.known import answers
from dsv4_hal.conformance.judging import verdict
from dsv4_hal.conformance.judging.budget import nmse
from dsv4_hal.conformance.judging.results import Job, Outcome
from dsv4_hal.conformance.judging.verdict import judge
from dsv4_hal.conformance.judging.worker import produce
from dsv4_hal.conformance.mutants import Mutant, mutants
from dsv4_hal.conformance.oracles import transformers as transformers_oracle
from dsv4_hal.dispatch import resolve
from dsv4_hal.model.moe import MoE
from dsv4_hal.numerics import exact
from dsv4_hal.ops import OPS

RIGHT = Reference(exact())


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def wrong(mutant: Mutant) -> Reference:
    def method(self: Reference, *args: object, **kwargs: object) -> object:
        return mutant.wrong(Reference, self, *args, **kwargs)

    cls = type("Wrong", (Reference,), {mutant.op: method})
    made: Reference = cls(exact())
    return made


# Closed forms.


@pytest.mark.parametrize("form", closed_forms.FORMS, ids=lambda f: f.id)
def test_a_closed_form_holds(form: closed_forms.Form) -> None:
    outcome = closed_forms.outcome(form, resolve([RIGHT]))
    assert outcome.verdict == "agrees", outcome.message
    assert outcome.against == ("closed forms",)


def test_closed_forms_are_about_values() -> None:
    """A form whose answer is what was returned, whatever it is, would hold for anything."""

    for form in closed_forms.FORMS:
        got, want = form.check(resolve([RIGHT]))
        assert got.shape == want.shape and want.isfinite().all(), form.id
        assert not nmse(got + 0.01, want.to(got.dtype), closed_forms.BUDGET).ok, form.id


def test_closed_forms_catch_many_mutants_alone() -> None:
    """Of the faults that show in mode exact."""
    caught = set[str]()
    for mutant in mutants():
        ops = resolve([wrong(mutant)])
        chosen = closed_forms.chosen([mutant.op])
        if not mutant.backward and any(not closed_forms.outcome(form, ops).ok for form in chosen):
            caught.add(mutant.name)
    assert "comb_transposed" in caught
    assert len(caught) >= 20, sorted(caught)


def test_a_form_that_raises_is_an_error() -> None:
    class Broken(Reference):
        def hadamard(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    (form,) = closed_forms.chosen(["hadamard"])
    outcome = closed_forms.outcome(form, resolve([Broken(exact())]))
    assert outcome.verdict == "error" and outcome.message == "RuntimeError: out of memory"


# HF transformers.

needs_transformers = pytest.mark.skipif(
    bool(transformers_oracle.missing()), reason=transformers_oracle.missing() or "transformers is here"
)
CASES = {
    "block_diagonal_linear": "block_diagonal_linear[format=fp32,tokens=5,groups=3,inputs=128,outputs=128]",
    "rms_norm": "rms_norm[weighted=True,tokens=3,width=128,scale=0.0001]",
    "rope": "rope[tokens=3,heads=2,width=33,channels=18,inverse=True]",
    "index_topk": "index_topk[ragged=few,k=8]",
    "sparse_attention": "sparse_attention[ragged=few,entries=picks,small=True]",
    "route": "route[tokens=5,experts=8,k=8,bias=True]",
    "swiglu": "swiglu[tokens=5,width=96,limit=0.5,weighted=False]",
    "moe_experts": "moe_experts[format=bf16,tokens=5,experts=8,k=3]",
    "mlp": "mlp[format=bf16,tokens=5,limit=2.0]",
    "hc_pre": "hc_pre[tokens=5,streams=4,width=128,iters=3,spread=12.0]",
    "hc_head": "hc_head[tokens=3,streams=2,width=64,spread=12.0]",
}


def test_every_op_of_transformers_is_tested() -> None:
    assert tuple(CASES) == transformers_oracle.OPS


@needs_transformers
@pytest.mark.parametrize("op", CASES)
def test_transformers_is_asked_and_would_object(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an oracle that says the reference's own words, only transformers is left to object."""
    job = Job(op, CASES[op], "exact")
    made = produce(Reference, job)
    asked = judge("reference", job, made, exact())
    assert asked.verdict == "agrees" and asked.against == (verdict.NAIVE, transformers_oracle.version())

    class Off(transformers_oracle.Transformers):
        pass

    def off(self: Off, *args: object, **kwargs: object) -> object:
        result = getattr(transformers_oracle.Transformers, op)(self, *args, **kwargs)
        first, *rest = result if isinstance(result, tuple) else (result,)
        spoiled = first.flip(-1) if op == "index_topk" else first * 1.001 if first.is_floating_point() else first
        if op == "route":
            rest = [rest[0] * 1.001]
        return (spoiled, *rest) if isinstance(result, tuple) else spoiled

    setattr(Off, op, off)
    monkeypatch.setattr(verdict, "_transformers", lambda: resolve([Off(exact())]))
    told = judge("reference", job, made, exact())
    assert told.verdict == "disagrees" and "by transformers" in told.message, told


def test_without_transformers_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_oracle, "missing", lambda: "it is not installed")
    found = answers(list(OPS), "")
    assert list(found.unasked) == ["transformers: it is not installed"]
    job = Job("rms_norm", CASES["rms_norm"], "exact")
    assert judge("reference", job, produce(Reference, job), exact()).against == (verdict.NAIVE,)


# Golden vectors.


@pytest.mark.full
def test_golden_vectors_agree(tiny_dir: Path) -> None:
    found = list(golden.outcomes(tiny_dir, golden.chosen(tiny_dir)))
    assert [o.verdict for o in found] == ["agrees"] * 13, [o for o in found if not o.ok]
    assert {o.op for o in found} == {"model"} and {o.against for o in found} == {("golden vectors",)}
    assert max(o.of_budget or 0 for o in found) > 0.05  # the budgets are no wide cloak


def test_golden_vectors_object_to_a_wrong_model(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Reference.swiglu
    monkeypatch.setattr(Reference, "swiglu", lambda self, x, limit, *more, **out: right(self, x, None, *more, **out))
    found = list(golden.outcomes(tiny_dir, golden.chosen(tiny_dir, "ffn", ["deployed"])))
    assert any(o.verdict == "disagrees" and (o.of_budget or 0) > 10 for o in found), found


def test_golden_vectors_of_which_one_cannot_be_computed(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before is kept."""
    right, calls = MoE.__call__, count()

    def breaks(self: MoE, *args: Any) -> Any:
        if next(calls) == 4:  # each block twice: the second one in float64
            raise ZeroDivisionError("no experts")
        return right(self, *args)

    monkeypatch.setattr(MoE, "__call__", breaks)
    found = list(golden.outcomes(tiny_dir, golden.chosen(tiny_dir, "ffn", ["deployed"])))
    assert [o.verdict for o in found] == 2 * ["agrees"] + 3 * ["error"]
    assert {o.message for o in found[2:]} == {"ZeroDivisionError: no experts"} and found[4].case.endswith("4.ffn]")


def test_which_answers_are_chosen(tmp_path: Path, tiny_dir: Path) -> None:
    every = list(OPS)
    assert {mode: len(names) for mode, names in answers(every, "").vectors.items()} == {"exact": 3, "deployed": 10}
    assert answers(["rope"], "").ids == ["rope[form=turned_points]", "rope[form=turned_back]"]
    assert answers(every, "rope[form=turned_b").ids == ["rope[form=turned_back]"]
    assert answers(every, "layers.3.attn]@deployed").ids == ["model[golden=layers.3.attn]"]
    for nothing in (answers(every, "model[golden=layers.9"), answers(["rope"], "", ["deployed"])):
        assert not nothing.ids and not list(nothing.outcomes())
    with pytest.raises(ValueError, match=r"has no expected\.safetensors: --golden DIR names a folder that has"):
        answers(every, "", folder=tmp_path)
    shutil.copy(tiny_dir / "expected.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"has no expected_exact\.safetensors"):
        answers(every, "", folder=tmp_path)
    (tmp_path / "expected_exact.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"/expected_exact\.safetensors: .*deserializing header"):
        answers(every, "", folder=tmp_path)


def test_an_installed_package_says_that_it_has_no_golden_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "SOURCES", tmp_path / "none")
    found = answers(list(OPS), "")
    assert not found.vectors and "golden vectors: " in found.unasked[-1]
    assert {outcome.against for outcome in found.outcomes()} == {("closed forms",)}


def test_outcomes_keep_their_oracles(tiny_dir: Path) -> None:
    (one,) = golden.outcomes(tiny_dir, golden.chosen(tiny_dir, "model[golden=layers.0.ffn]@deployed"))
    assert isinstance(one, Outcome) and one.to_dict()["against"] == ("golden vectors",)
