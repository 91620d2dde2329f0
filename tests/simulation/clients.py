"""One client: it asks, reads what comes, compares it with the oracle, and may leave or stop a choice on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry.common.errors import CapacityError, KVFerryError
from kvferry.router.dispatch.deadlines import HELD_LIMIT_S
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import ChoiceUpdate, TokenStream

from .breach import Breach
from .kernel import Kernel
from .oracle import Oracle, sampled

if TYPE_CHECKING:
    from .routers import Router


@dataclass(slots=True, frozen=True)
class Manners:
    """How the client behaves."""

    leaves_after_s: float | None = None
    leaves_at_token: int | None = None  # counted over all choices
    stop_tokens: frozenset[int] = frozenset()  # its stop strings, one token each
    reads_every_s: float = 0.0  # 0: at once


class Call:
    """A request from its submission to its end, as its client sees it."""

    def __init__(
        self, kernel: Kernel, router: Router, request: RouterRequest, oracle: Oracle, manners: Manners
    ) -> None:
        self.request = request
        self.router = router
        self.oracle = oracle
        self.refusal: KVFerryError | None = None
        self.error_code = ""
        self.num_ends = 0  # terminal states that were told
        self.is_cut_off = False  # its router died
        self._kernel = kernel
        self._manners = manners
        self._stream: TokenStream | None = None
        self._sent = [0] * request.n
        self._finish: list[str | None] = [None] * request.n
        self._has_left = False
        self._reads_later = False

    def come_back(self, router: Router, request: RouterRequest) -> Call:
        """The same client by another connection: its request goes on from what it has read."""
        again = Call(self._kernel, router, request, self.oracle, self._manners)
        for choice, answer in enumerate(self.oracle.answers):
            finish = self._finish[choice]
            tokens = [sampled(token_id) for token_id in answer.output[: self._sent[choice]]]
            request.choices[choice].restore(tokens, "stop" if finish == "client" else finish)
        again._sent, again._finish = [*self._sent], [*self._finish]
        return again

    @property
    def is_over(self) -> bool:
        return self.refusal is not None or self.is_cut_off or self.num_ends > 0

    def on_refused(self, error: CapacityError | KVFerryError) -> None:
        self.refusal = error

    def on_accepted(self, stream: TokenStream, note: Callable[[Call], None]) -> None:
        self._stream = stream
        stream.listen(lambda: note(self))
        if self._manners.leaves_after_s is not None:
            self.router.process.after(self._manners.leaves_after_s, self.leave)
        note(self)

    def leave(self) -> None:
        """The client closes its connection. Whatever state the request is in."""
        if self._stream is not None and not self._has_left:
            self._has_left = True
            self._stream.abort()

    def on_news(self) -> None:
        if not self._manners.reads_every_s:
            self._read()
        elif not self._reads_later:
            self._reads_later = True
            self.router.process.after(self._manners.reads_every_s, self._read)

    def _read(self) -> None:
        self._reads_later = False
        stream = self._stream
        assert stream is not None
        while (update := stream.next_nowait()) is not None:
            self._take(update)

    def _take(self, update: ChoiceUpdate) -> None:
        choice, sent = update.choice, self._sent[update.choice]
        answer = self.oracle.answers[choice]
        name = f"{self.request.request_id}/{choice}"
        if self._finish[choice] is not None:
            raise Breach("I6", f"{name} yields {update} after its end")
        first = answer.num_prompt_tokens + sent
        ids = [token.token_id for token in update.tokens]
        if ids != answer.tokens[first : first + len(ids)]:
            expected = answer.tokens[first : first + len(ids)]
            raise Breach("I6", f"{name} yields {ids} at index {sent}, not {expected}")
        self._sent[choice] += len(ids)
        self._kernel.fold(len(ids) + 64 * choice)
        if update.finish is not None:
            self._on_finish(choice, update.finish)
        stop = next((i for i, token_id in enumerate(ids) if token_id in self._manners.stop_tokens), None)
        if stop is not None and self._finish[choice] is None:
            self._finish[choice] = "client"
            assert self._stream is not None
            self._stream.finish_choice(choice)
        if self._manners.leaves_at_token is not None and sum(self._sent) >= self._manners.leaves_at_token:
            self.leave()

    def _on_finish(self, choice: int, finish: str) -> None:
        answer = self.oracle.answers[choice]
        self._finish[choice] = finish
        if self.request.pooling is not None:
            self._check_embedding()
            return
        if finish != answer.finish or self._sent[choice] != len(answer.output):
            name = f"{self.request.request_id}/{choice}"
            raise Breach("I6", f"{name} ends with {finish} after {self._sent[choice]} tokens, not with {answer.finish}")

    def _check_embedding(self) -> None:
        """I22: a prompt's embedding is that of its tokens, wherever and in however many pieces it was computed."""
        request, wanted = self.request, self.oracle.embedding
        if request.embedding != wanted or self._sent[0]:
            text = f"{request.embedding.hex()} and {self._sent[0]} tokens, not {wanted.hex()}"
            raise Breach("I22", f"{request.request_id} is embedded as {text}")
        seen = self.router._seen
        seen["embedded prompts"] += 1
        seen["embedded after a retry"] += request.attempt_number > 0

    # --- the end --------------------------------------------------------------------------------------------

    def on_terminal(self) -> None:
        self.num_ends += 1
        name, status = self.request.request_id, self.request.status
        if self.num_ends > 1:
            raise Breach("I8", f"{name} ends {self.num_ends} times, now {status.value}")
        self._kernel.say(f"{self.router.place}: {name} {status.value}")
        if status is RequestStatus.ABORTED and not self._has_left:
            raise Breach("I8", f"{name} is aborted and its client is there")

    def check_end(self) -> None:
        """After everything: the whole answer came, or there is a reason."""
        request, status = self.request, self.request.status
        if self.refusal is not None or self.is_cut_off:
            return
        if self.num_ends != 1 or not request.is_finished:
            raise Breach("I8", f"{request.request_id} is {status.value} at the end")
        self._read()
        self._check_prompt_logprobs()
        if status is RequestStatus.FINISHED:
            for choice, finish in enumerate(self._finish):
                if finish is None:
                    raise Breach("I6", f"{request.request_id}/{choice} never ended, and the request did")
            if "client" not in self._finish and sum(self._sent) != request.num_output_tokens:
                text = f"{request.request_id}: {request.num_output_tokens} tokens counted, {sum(self._sent)} delivered"
                raise Breach("I9", text)
        elif status is RequestStatus.FAILED:
            assert self._stream is not None and self._stream._error is not None
            self.error_code = self._stream._error.code
            self.router.rules.check_failure(self)

    def _check_prompt_logprobs(self) -> None:
        """I21: what came is the beginning of the list, and of an answer that is whole, all of it."""
        request, wanted = self.request, self.oracle.answers[0].prompt_logprobs
        if request.sampling.prompt_logprobs is None:
            wanted = ()
        known = tuple(request.prompt_logprobs)
        if known != wanted[: len(known)]:
            raise Breach("I21", f"{request.request_id}: {known} instead of {wanted}")
        stamps = request.timestamps
        is_whole = request.status is RequestStatus.FINISHED and "client" not in self._finish
        if is_whole and len(known) < len(wanted) and stamps["finished"] - stamps["first_token"] < HELD_LIMIT_S:
            raise Breach("I21", f"{request.request_id}: {len(known)} of {len(wanted)}")
