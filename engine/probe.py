"""A probe shows how far two workers' models are from one another: what each thinks of the same few tokens.

Workers of one checkpoint whose weights are rounded differently may share a deployment (`mixed_quantization`). Each
tells its probe with its hello, and the router compares them; and keeps it for the doctor (`models/probes.py`).
"""

from __future__ import annotations

from ..common.batch import Batch, BatchRow
from ..common.request import RequestId, SamplingParams, Sequence
from ..kvcache.blocks import BlockPool
from ..models.probes import keep_probe
from .engine import Engine

_NUM_TOKENS = 65  # their log-probabilities, but for the first one's, are what a hello has room for


def probe(engine: Engine, pool: BlockPool) -> tuple[float, ...]:
    """Return the log-probabilities of fixed tokens, in blocks that are borrowed; none where there is no room."""
    room = min(engine.max_model_len - 1, engine.config.max_num_batched_tokens, pool.num_blocks * pool.block_size // 2)
    count = min(_NUM_TOKENS, room)
    if count < 2:
        return ()
    ids = [(31 * index * index + 17 * index) % engine.model_config.vocab_size for index in range(count)]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    seq = Sequence(RequestId("probe"), 0, 0, ids, count, sampling)
    seq.block_table = pool.allocate(engine.spec.num_blocks_for(count))
    [row] = engine.step(Batch([BatchRow(seq, count)])).rows
    pool.free(seq.block_table)
    found = tuple(token.logprob for token in row.prompt_logprobs if token.logprob is not None)
    keep_probe(engine.config.model_dir, engine.model_config.weights_form, found)
    return found
