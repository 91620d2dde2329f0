"""Many tokens at once change a memory, and read of it, as they do one after another."""

from __future__ import annotations

import pytest
import torch

from kvferry.engine.nn.delta_net import _by_chunks, _by_token, _Heads, _solved_chunks

NUM_HEADS, KEY_DIM, VALUE_DIM = 3, 8, 16


def drawn(count: int) -> tuple[_Heads, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(count, NUM_HEADS, KEY_DIM), dim=-1) for _ in "qk")
    decays, strengths = -normal(count, NUM_HEADS).exp(), normal(count, NUM_HEADS).sigmoid()
    heads = _Heads(q, k, normal(count, NUM_HEADS, VALUE_DIM), decays, strengths)
    return heads, normal(NUM_HEADS, KEY_DIM, VALUE_DIM)


@pytest.mark.parametrize("take", [_by_chunks, _solved_chunks])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 200])
def test_chunks_do_what_tokens_do_one_by_one(take: object, count: int) -> None:
    heads, memory = drawn(count)
    expected, one_by_one = [], memory.clone().unsqueeze(0)
    for token in range(count):
        expected.append(_by_token(heads.part(slice(token, token + 1)), one_by_one)[0])
    found = take(heads, memory)  # type: ignore[operator]
    by_token = found if take is _by_chunks else found.transpose(0, 1)
    torch.testing.assert_close(by_token, torch.stack(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(memory, one_by_one[0], rtol=1e-9, atol=1e-9)
