import argparse

import pytest

from kvferry.benchmarks.shared.pools import Pools, parse_pools, pool_flags


def test_pools_are_prefill_and_decode_workers() -> None:
    assert parse_pools("2+1") == Pools(2, 1)
    assert str(Pools(0, 3)) == "0+3"
    assert pool_flags(Pools(2, 1)) == ("--prefill", "2", "--decode", "1")


@pytest.mark.parametrize("text", ["2", "2+0", "a+b", "1+1+1"])
def test_what_is_no_pair_with_a_decode_worker_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_pools(text)
