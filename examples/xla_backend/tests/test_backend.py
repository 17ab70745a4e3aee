"""What the contract's cases do not ask: where the backend can be used, what it refuses, how often it compiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import dsv4_hal_xla
import pytest
import torch
from dsv4_hal_xla import XLA
from dsv4_hal_xla.bridge import ALIGNMENT, bucket

from dsv4_hal.backend import BackendError
from dsv4_hal.formats import FORMATS, Weight
from dsv4_hal.numerics import Numerics, deployed, exact
from dsv4_hal.ops import OPS, ContractError

NATIVE = {
    "linear",
    "grouped_linear",
    "rms_norm",
    "rope",
    "sparse_attention",
    "index_topk",
    "swiglu",
    "hc_pre",
    "hc_post",
}


def plain(values: torch.Tensor, name: str = "fp32") -> Weight:
    return Weight(values, None, FORMATS[name], "w")


def test_what_is_its_own() -> None:
    assert {op for op in OPS if XLA.origin(op).kind == "native"} == NATIVE
    assert not [op for op in OPS if XLA.origin(op).kind == "missing"]


def test_importing_it_does_not_import_jax() -> None:
    code = "import sys, dsv4_hal_xla; assert dsv4_hal_xla.XLA.available(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4_hal_xla, "find_spec", lambda name: None)
    verdict = XLA.available()
    assert not verdict and (verdict.reason, verdict.remedy) == ("jax is not installed", "pip install jax")


def test_with_a_broken_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv4_hal_xla, "find_spec", lambda name: name)  # it is there
    monkeypatch.setitem(sys.modules, "jax", None)  # and cannot be imported
    with pytest.raises(BackendError, match="jax does not work: ModuleNotFoundError"):
        XLA(exact())


@pytest.mark.parametrize("numerics", [exact(torch.float64), deployed(torch.float64)], ids=["exact", "deployed"])
def test_float64_is_refused_and_not_narrowed(numerics: Numerics) -> None:
    backend = XLA(numerics)
    assert {op for op in OPS if not backend.supports(op, {})} == NATIVE
    assert "float64" in backend.supports("linear", {}).reason
    with pytest.raises(ContractError, match=r"does not read torch\.float64"):
        XLA(exact()).linear(torch.ones(1, 4), plain(torch.ones(2, 4, dtype=torch.float64), "fp64"))


def test_gradients_are_refused_and_not_lost() -> None:
    x, w = torch.ones(1, 4, requires_grad=True), plain(torch.ones(2, 4))
    with pytest.raises(ContractError, match="computes no gradients"):
        XLA(exact()).linear(x, w)
    with torch.no_grad():
        assert XLA(exact()).linear(x, w).tolist() == [[4.0, 4.0]]


def test_repack_puts_codes_where_jax_reads_them_in_place() -> None:
    memory = torch.arange(64 + 16, dtype=torch.int8)
    offset = (1 - memory.data_ptr()) % ALIGNMENT  # one byte behind a multiple
    off = Weight(memory[offset % 16 :][:64].view(1, 64), torch.ones(1, 1), FORMATS["int8_channel"], "w")
    packed = XLA(exact()).repack(off)
    assert packed.data.data_ptr() % ALIGNMENT == 0 and torch.equal(packed.data, off.data)
    assert XLA(exact()).repack(packed) is packed


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows by one with everything that JAX compiles."""
    import jax

    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_counts_in_one_bucket_are_compiled_once(compiled: list[str]) -> None:
    backend, w = XLA(exact()), plain(torch.randn(24, 40))
    for count in range(bucket(1) + 1):
        assert backend.linear(torch.randn(count, 40), w).shape == (count, 24)
    assert len(compiled) == 1
    backend.linear(torch.randn(bucket(1) + 1, 40), w)
    assert len(compiled) == 2
