"""A request's contents, read by its token ids."""

from __future__ import annotations

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.kvcache.blocks import hash_blocks, prefix_salt
from kvferry.kvcache.contents import TokenContents

SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")
PROMPT = list(range(10))


def _spec(salt: bytes = b"") -> RequestSpec:
    return RequestSpec(
        request_id="a", attempt=1, prompt=pack_ids(PROMPT), sampling=SamplingParams(), choices=(0, 3), cache_salt=salt
    )


def test_a_prompts_hashes_are_of_its_full_blocks_and_of_its_tenant() -> None:
    contents = TokenContents(SPEC)
    assert contents.prompt_hashes(_spec()) == hash_blocks(PROMPT, 4, prefix_salt(SPEC, b""))
    assert len(contents.prompt_hashes(_spec())) == 2
    assert not set(contents.prompt_hashes(_spec())) & set(contents.prompt_hashes(_spec(b"other")))


def test_a_sequence_begins_with_what_is_known() -> None:
    contents = TokenContents(SPEC)
    hashes = contents.prompt_hashes(_spec())
    seq = contents.sequence(_spec(), 3, [7, 8], hashes)
    assert (seq.request_id, seq.attempt, seq.choice) == ("a", 1, 3)
    assert seq.token_ids[:] == [*PROMPT, 7, 8] and seq.output_token_ids == [7, 8]
    assert seq.block_hashes == hashes and seq.block_hashes is not hashes
    assert not seq.block_table
