"""A fetch has as much time as what it spares is worth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvferry.router.dispatch.prefix_fetch import fetch_from

BLOCK = 16
TOKEN_S = 0.001  # to compute


def _worker(name: str, number: int) -> Any:
    hello = SimpleNamespace(kv_address=f"{name}:1", tp_size=1, transport="tcp", spec=SimpleNamespace(block_size=BLOCK))
    return SimpleNamespace(worker_id=name, link=SimpleNamespace(number=number), hello=hello)


@pytest.mark.parametrize(
    ("num_held", "num_lent", "within_s"),
    [(0, 10, 2.0), (0, 1000, 8.0), (500, 1000, 4.0), (1000, 1000, None), (0, 0, None)],
)
def test_a_long_prefix_has_half_the_time_that_computing_it_takes(
    num_held: int, num_lent: int, within_s: float | None
) -> None:
    source, reader = _worker("lender", 1), _worker("reader", 2)
    pools = SimpleNamespace(
        named={"lender": source}.get,
        prefix_index=SimpleNamespace(match=lambda hashes: {1: num_lent, 2: num_held}),
        predictor=SimpleNamespace(prefill_s=lambda session, tokens, context: tokens * TOKEN_S if session == 2 else 0.0),
    )
    request = SimpleNamespace(block_hashes=[b""])
    found = fetch_from(cast("Any", pools), cast("Any", request), "lender", reader)
    assert (None if found is None else found.within_s) == within_s
    assert found is None or found.num_tokens == num_lent * BLOCK
