"""The requests of a run: what a trace says of each, and the same as routers and workers see it.

No text and no token ids exist here: a prompt is a count, and its block hashes are known in advance. Everything that a
scheduler asks of tokens is how many there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

from ..common.batch import BatchRow, RowOutput, Run, verified_output
from ..common.request import Pooling, RequestId, RequestSpec, SampledToken, SamplingParams
from ..common.request import Sequence as TokenSequence
from ..router.state.adapter_use import AdapterUse
from ..router.state.choice_state import ChoiceState
from ..router.state.request import RouterRequest
from ..tools.load.traces import TraceRow

if TYPE_CHECKING:
    from .scenario import Drafts

TOKEN = SampledToken(0)
END = SampledToken(1)  # the last token of an answer
END_IDS = frozenset({END.token_id})
_WRONG = 2  # a token that no answer has
_STATE = array("f", [1.0]).tobytes()  # a hidden state


@dataclass(slots=True, eq=False)
class Job:
    """One request of the run."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int  # 0: the prompt's embedding is wanted
    block_hashes: list[bytes]  # of the prompt's and the answer's full blocks
    adapter: AdapterUse | None = None
    is_cut: bool = False  # the model's context ends before the answer that the trace has

    request_id: str = field(init=False)
    num_tokens: int = field(init=False)  # of the prompt and the answer

    def __post_init__(self) -> None:
        self.request_id = str(self.number)
        self.num_tokens = self.num_prompt_tokens + self.num_output_tokens


def next_tokens(job: Job, num_known: int, count: int) -> Run:
    """Return so many tokens of the answer behind the tokens that are known, prompt included."""
    return (TOKEN,) * count if num_known + count < job.num_tokens else (TOKEN,) * (count - 1) + (END,)


def yielded(row: BatchRow, job: Job, num_steps: int) -> RowOutput:
    """Return what so many equal steps yield in a row of the job; of a draft what is right and the token behind it."""
    if not row.samples:
        return RowOutput((), pooled=_STATE if row.pooled_tokens else b"")
    num_known = len(row.seq.token_ids)
    if not row.draft:
        return RowOutput((next_tokens(job, num_known, num_steps),))
    coming = next_tokens(job, num_known, min(1 + len(row.draft), job.num_tokens - num_known))
    return verified_output(row, ((token,) for token in coming))


class SimDrafts:
    """A `SimDrafts` drafts the tokens of one sequence, as many as it may. Implements `decode.ngrams.Proposer`.

    Which tokens a draft gets right is drawn once for each answer, whatever worker and steps they are drafted in.
    """

    def __init__(self, drafts: Drafts, job: Job, seq: TokenSequence, seed: int) -> None:
        self._acceptance = drafts.acceptance
        self._job = job
        self._random = Random(f"drafts {seed} {job.number} {seq.choice}")
        self._answer: list[int] = []  # what a draft says of each token so far, were it asked

    def propose(self, tokens: TokenIds[int], num_tokens: int) -> tuple[int, ...]:
        first = len(tokens) - self._job.num_prompt_tokens
        last = min(first + num_tokens, self._job.num_output_tokens)
        while len(self._answer) < last:
            token = END if len(self._answer) == self._job.num_output_tokens - 1 else TOKEN
            self._answer.append(token.token_id if self._random.random() < self._acceptance else _WRONG)
        return tuple(self._answer[first:last])


class JobContents:
    """Implements `kvcache.contents.Contents` by what is known of the run's requests."""

    def __init__(self, jobs: Mapping[str, Job], block_tokens: int) -> None:
        self._jobs = jobs
        self._block_tokens = block_tokens

    def prompt_hashes(self, spec: RequestSpec) -> list[bytes]:
        return self._jobs[spec.request_id].block_hashes[: spec.num_prompt_tokens // self._block_tokens]

    def sequence(
        self, spec: RequestSpec, choice: int, outputs: Iterable[int] = (), hashes: Iterable[bytes] = ()
    ) -> TokenSequence:
        job = self._jobs[spec.request_id]
        return TokenSequence(
            request_id=RequestId(spec.request_id),
            attempt=spec.attempt,
            choice=choice,
            token_ids=array("i", bytes(4 * (job.num_prompt_tokens + len(list(outputs))))),
            num_prompt_tokens=job.num_prompt_tokens,
            sampling=spec.sampling,
            priority=spec.priority,
            arrival=spec.arrival,
            adapter=spec.adapter,
            block_hashes=job.block_hashes,  # the answer's among them
        )


def make_job(
    number: int, row: TraceRow, arrival_s: float, block_tokens: int, *, hashed: bool, adapter: AdapterUse | None = None
) -> Job:
    """`hashed`: some prefix may be found again."""
    num_blocks = (row.num_prompt_tokens + row.num_output_tokens) // block_tokens
    salt = "" if adapter is None else adapter.digest  # no adapter finds another's blocks
    hashes = _hashes(number, row, block_tokens, num_blocks, salt) if hashed else [b""] * num_blocks  # nobody looks
    return Job(number, arrival_s, row.num_prompt_tokens, row.num_output_tokens, hashes, adapter)


def _hashes(number: int, row: TraceRow, block_tokens: int, num_blocks: int, salt: str) -> list[bytes]:
    """Return a hash for each block. The trace's block in which one of the prompt's ends tells all that is before it."""
    parts = -(-row.block_tokens // block_tokens)
    shared = min(row.num_prompt_tokens, len(row.block_ids) * row.block_tokens) // block_tokens
    lasts = [((place + 1) * block_tokens - 1) // row.block_tokens for place in range(shared)]
    hashes = [_hash(salt, row.block_ids[last], place % parts) for place, last in enumerate(lasts)]
    hashes += [_hash(number, place) for place in range(len(hashes), num_blocks)]  # of this request alone
    return hashes


def _hash(*named: int | str) -> bytes:
    """Return the hash of a block that has this name, whatever numbers a trace gives to its own.

    Other names have other first halves, too, as far as real hashes do: a prefix index looks at no more.
    """
    return blake2b(repr(named).encode(), digest_size=16).digest()


@dataclass(slots=True, eq=False)
class SimRequest(RouterRequest):
    """A router's request without its tokens."""

    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choices = [ChoiceState(self.sampling.max_tokens)]
        self._prompt = bytes(4 * len(self.prompt_token_ids))


def make_request(job: Job, max_tokens: int, block_tokens: int) -> SimRequest:
    """`max_tokens`: what the client allows, which says little about where the answer ends."""
    request = SimRequest(
        request_id=job.request_id,
        prompt_token_ids=range(job.num_prompt_tokens),
        sampling=_sampling(max(max_tokens, job.num_output_tokens)),
        adapter=job.adapter,
        pooling=None if job.num_output_tokens else Pooling.LAST,
    )
    request.block_hashes = job.block_hashes[: job.num_prompt_tokens // block_tokens]
    return request


@cache
def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def any_repeats(rows: Iterable[TraceRow]) -> bool:
    """Say whether some prefix comes twice."""
    seen: set[int] = set()
    for row in rows:
        if not seen.isdisjoint(row.block_ids):
            return True
        seen.update(row.block_ids)
    return False
