"""Formats in kernels, against `dsv4_hal.formats` bit for bit: what the contract's cases do not ask. Interpreted."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'dsv4-hal[cuda]'")

from dsv4_hal import formats
from dsv4_hal.backends.triton_kernels import quantize
from dsv4_hal.formats import FORMATS, QTensor

BLOCKS = [fmt for fmt in FORMATS.values() if not fmt.plain]


def same(got: QTensor, want: QTensor) -> bool:
    return torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(
        got.scale.view(torch.uint8), want.scale.view(torch.uint8)
    )


@pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
def test_stacks_and_single_rows(fmt):
    stack = torch.randn(2, 3, 68, dtype=torch.bfloat16).transpose(0, 1)
    cases = [stack] if fmt.block[0] > 1 else [stack, stack[0, 0]]
    for x in cases:
        got, want = quantize.encode(x, fmt), formats.encode(x, fmt)
        assert same(got, want)
        assert torch.equal(quantize.decode(got, torch.float16), formats.dequantize(want, torch.float16))


@pytest.mark.parametrize("name", ["e4m3_1x128", "e4m3_row_fp32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinity_spoil_their_block_and_no_other(name, bad):
    x = torch.randn(3, 256)
    x[1, 5] = bad
    got = quantize.decode(quantize.encode(x, FORMATS[name]), torch.float32)
    want = formats.dequantize(formats.encode(x, FORMATS[name]))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
def test_what_cannot_be_stored_is_refused_as_ever(fmt):
    for x in (torch.randn(3, 5), torch.randn(4), torch.randn(3, 0)):
        try:
            formats.encode(x, fmt)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)[:20]):
                quantize.encode(x, fmt)


def test_a_row_is_rounded_alike_alone_and_in_a_batch():
    x = torch.randn(9, 320)
    for name in ("e4m3_1x128", "mxfp4", "int8_channel"):
        whole, alone = quantize.encode(x, FORMATS[name]), quantize.encode(x[7:8], FORMATS[name])
        assert same(alone, QTensor(whole.data[7:8], whole.scale[7:8], whole.format))
