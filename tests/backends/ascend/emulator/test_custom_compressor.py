"""The emulated compressor, against float64; and why the backend cannot use it."""

from __future__ import annotations

from types import ModuleType

import custom_calls as calls
import pytest
import torch
from torch import Tensor

SHAPES = [(128, 2, 4, (9, 6)), (512, 2, 4, (9, 6)), (512, 1, 128, (130, 257))]


def pooled(made: calls.Made, before: dict[int, Tensor] | None = None) -> list[list[Tensor]]:
    """Entries [width] float64 that each sequence completes, before norm and RoPE; before: tokens of earlier steps."""
    given, out = made.arguments, []
    ratio, coff = given["cmp_ratio"], given["coff"]
    width, bounds = given["norm_weight"].shape[0], given["cu_seqlens"].tolist()
    for sequence in range(len(bounds) - 1):
        x = given["x"][bounds[sequence] : bounds[sequence + 1]].double()
        if before is not None:
            x = torch.cat([before[sequence], x])
        kv, gate = x @ given["wkv"].double().T, x @ given["wgate"].double().T
        gate = gate + given["ape"].double()[torch.arange(len(x)) % ratio]
        first, entries = int(given["start_pos"][sequence]), []
        for entry in range(first // ratio, len(x) // ratio):
            values, scores = [], []
            for token in range((entry + 1 - coff) * ratio, (entry + 1) * ratio):
                if token >= 0:
                    half = slice(0, width) if coff == 2 and token < entry * ratio else slice(kv.shape[1] - width, None)
                    values.append(kv[token, half])
                    scores.append(gate[token, half])
            entries.append((torch.stack(values) * torch.stack(scores).softmax(0)).sum(0))
        out.append(entries)
    return out


def finished(made: calls.Made, entries: list[Tensor]) -> Tensor:
    given = made.arguments
    rows = torch.stack(entries)
    rows = rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * given["norm_weight"].double()
    angle = torch.complex(given["rope_cos"].double(), given["rope_sin"].double())[: len(rows), ::2]
    turned = torch.view_as_complex(rows[:, -64:].reshape(len(rows), 32, 2).contiguous()) * angle
    return torch.cat([rows[:, :-64], torch.view_as_real(turned).flatten(1)], 1)


def run(made: calls.Made) -> Tensor:
    found: Tensor = torch.ops._C_ascend.compressor(**made.arguments)
    return found


@pytest.mark.parametrize(("width", "coff", "ratio", "tokens"), SHAPES)
def test_compressor(torch_npu: ModuleType, width: int, coff: int, ratio: int, tokens: tuple[int, int]) -> None:
    made = calls.compressor(width, coff, ratio, tokens=tokens)
    y = run(made)
    entries = [entry for sequence in pooled(made) for entry in sequence]
    assert y.shape == (min(sum(tokens), sum(tokens) // ratio + 2), width) and y.dtype == torch.bfloat16
    torch.testing.assert_close(y[: len(entries)].double(), finished(made, entries), rtol=2**-8, atol=1e-4)
    assert y[len(entries) :].isnan().all()


@pytest.mark.parametrize(("width", "coff", "ratio", "tokens"), SHAPES)
def test_a_sequence_goes_on(torch_npu: ModuleType, width: int, coff: int, ratio: int, tokens: tuple[int, int]) -> None:
    first, then = (calls.compressor(width, coff, ratio, s, t) for s, t in (((0, 0), tokens), (tokens, (ratio, 1))))
    then.arguments |= {name: first.arguments[name] for name in ("wkv", "wgate", "ape", "norm_weight", "state_cache")}
    run(first)
    y = run(then)
    x, bound = first.arguments["x"].double(), tokens[0]
    entries = [e for s in pooled(then, {0: x[:bound], 1: x[bound:]}) for e in s]
    assert entries
    torch.testing.assert_close(y[: len(entries)].double(), finished(then, entries), rtol=2**-8, atol=1e-4)


def test_block_0_is_no_place(torch_npu: ModuleType) -> None:
    made = calls.compressor()
    made.arguments["state_block_table"][0] = 0
    run(made)
    state = made.arguments["state_cache"]
    assert state[0].isnan().all() and state[18, :6].isfinite().all() and state[18, 6:].isnan().all()


def test_it_does_not_round_in_front_of_the_norm(torch_npu: ModuleType) -> None:
    """The contract does: that is why the backend cannot use it."""
    made = calls.compressor(512, 1, 128, tokens=(130, 257))
    entries = [e for s in pooled(made) for e in s]
    rounded = finished(made, [e.bfloat16().double() for e in entries]).bfloat16()
    share = float((run(made)[: len(entries)] != rounded).double().mean())
    assert share > 0.1
