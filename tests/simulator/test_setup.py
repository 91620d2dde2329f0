"""What a simulated worker says of itself."""

from __future__ import annotations

import pytest

from kvferry.simulator.setup import core_config, hello_of, worker_spec

from .runs import azure


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(32, 32), (2048, 256)])
def test_a_worker_tells_its_router_of_no_more_rows_than_a_step_has_tokens(num_tokens: int, num_rows: int) -> None:
    spec = worker_spec(azure(decode_tokens=num_tokens, max_num_seqs=256), 16, hashed=True)
    hello = hello_of(spec, core_config(spec, "d", 1, "decode", "d:1"), ())
    assert (hello.max_num_seqs, hello.max_num_batched_tokens) == (num_rows, num_tokens)
