"""The requests of a run: what a trace says of each, and the same as routers and workers see it.

No text and no token ids exist here: a prompt is a count, and its block hashes are known in advance. Everything that a
scheduler asks of tokens is how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from ..common.request import RequestId, RequestSpec, SampledToken, SamplingParams
from ..common.request import Sequence as TokenSequence
from ..router.state.choice_state import ChoiceState
from ..router.state.request import RouterRequest
from ..tools.load.traces import TraceRow

TOKEN = SampledToken(0)
_ZEROS = memoryview(bytes(4 << 20))  # a prompt of up to a million tokens is a slice of it


class TokenCount:
    """Stands for a list of token ids of which only the length matters."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> list[int]:
        return [0] * len(range(*part.indices(self.count)))

    def append(self, _: int) -> None:
        self.count += 1


@dataclass(slots=True, eq=False)
class Job:
    """One request of the run."""

    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: list[bytes]  # of the prompt's and the answer's full blocks

    @property
    def request_id(self) -> str:
        return str(self.number)

    def sequence(self, spec: RequestSpec, num_known_outputs: int = 0) -> TokenSequence:
        """The token state that a worker keeps."""
        tokens = TokenCount(self.num_prompt_tokens + num_known_outputs)
        return TokenSequence(
            request_id=RequestId(spec.request_id),
            attempt=spec.attempt,
            choice=0,
            token_ids=cast("list[int]", tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=spec.sampling,
            priority=spec.priority,
            arrival=spec.arrival,
            block_hashes=self.block_hashes,
        )


def make_job(number: int, row: TraceRow, arrival_s: float, block_tokens: int, *, hashed: bool) -> Job:
    """`hashed`: some prefix may be found again. A trace's block is one or more of ours."""
    num_blocks = (row.num_prompt_tokens + row.num_output_tokens) // block_tokens
    hashes = _hashes(number, row, block_tokens, num_blocks) if hashed else [b""] * num_blocks  # nobody looks for them
    return Job(number, arrival_s, row.num_prompt_tokens, row.num_output_tokens, hashes)


def _hashes(number: int, row: TraceRow, block_tokens: int, num_blocks: int) -> list[bytes]:
    parts = row.block_tokens // block_tokens
    shared = min(row.num_prompt_tokens // block_tokens, len(row.block_ids) * parts)
    hashes = [
        _hash(block_id * parts + part) for block_id in row.block_ids[: -(-shared // parts)] for part in range(parts)
    ][:shared]
    own = (1 << 63) + (number << 20)  # of this request alone
    hashes += [_hash(own + place) for place in range(len(hashes), num_blocks)]
    return hashes


def _hash(number: int) -> bytes:
    """Other numbers have other first halves, as real hashes do: a prefix index looks at no more."""
    return number.to_bytes(8, "little") * 2


@dataclass(slots=True, eq=False)
class SimRequest(RouterRequest):
    """A router's request without its tokens."""

    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.choices = [ChoiceState(self.sampling.max_tokens)]
        self._prompt = cast("bytes", _ZEROS[: 4 * len(self.prompt_token_ids)])


def make_request(job: Job, max_tokens: int, block_tokens: int) -> SimRequest:
    """`max_tokens`: what the client allows, which says little about where the answer ends."""
    request = SimRequest(
        request_id=job.request_id,
        prompt_token_ids=cast("list[int]", range(job.num_prompt_tokens)),
        sampling=_sampling(max(max_tokens, job.num_output_tokens)),
    )
    request.block_hashes = job.block_hashes[: job.num_prompt_tokens // block_tokens]
    return request


_SAMPLINGS: dict[int, SamplingParams] = {}


def _sampling(max_tokens: int) -> SamplingParams:
    known = _SAMPLINGS.get(max_tokens)
    if known is None:
        known = _SAMPLINGS[max_tokens] = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return known


def any_repeats(rows: Iterable[TraceRow]) -> bool:
    """Say whether some prefix comes twice."""
    seen: set[int] = set()
    for row in rows:
        if not seen.isdisjoint(row.block_ids):
            return True
        seen.update(row.block_ids)
    return False


def mean_tokens(jobs: Sequence[Job]) -> tuple[float, float]:
    """Return the mean lengths of prompts and of answers (tokens)."""
    count = max(1, len(jobs))
    return sum(job.num_prompt_tokens for job in jobs) / count, sum(job.num_output_tokens for job in jobs) / count
