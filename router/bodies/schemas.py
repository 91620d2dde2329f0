"""The bodies of the API as pydantic models, strict (no "5" for 5), and what they ask of a worker.

A body is checked in three steps: which fields it has (`fields.py`), each field alone (the models here), and the
fields against the model served (`sampling`, the prompt's length in `prompts.py`). null always means "not given";
what the client does not give comes from the model's generation_config.json, then from OpenAI's defaults.
"""

from __future__ import annotations

import sys
from typing import Literal, TypeVar

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from ...common.errors import RequestError
from ...common.request import MAX_CHOICES, SamplingParams
from ..catalogue.defaults import SamplingDefaults
from .chat_messages import check_template_switches
from .fields import check_fields, invalid_field
from .grammars import FIELDS as GRAMMAR_FIELDS
from .grammars import AskedGrammar, asked_grammar
from .text_bodies import DetokenizeBody, EmbeddingBody, TokenizeBody
from .values import (
    NO_SEED,
    AnyIds,
    AskedEffort,
    BadWords,
    CutPrompts,
    Documents,
    LogitBias,
    Logprobs,
    Prompt,
    Seed,
    Stops,
    StreamOptions,
    TemplateKwargs,
    TokenIds,
)

DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = 2**63 - 1
_HOTTEST = 1e9  # logits divided by it differ by less than float32 tells: all tokens are as likely


class GenerationBody(CutPrompts):
    """The fields that /v1/completions and /v1/chat/completions share."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    seed: Seed | None = None
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=1)  # a chat gives the limit by this name
    temperature: float | None = Field(None, ge=0, le=sys.float_info.max)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    # vLLM's
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: TokenIds | None = None
    bad_words: BadWords | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    prompt_logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    user: object = None  # any; where there are no keys, a text says whose share of the service this is
    echo: bool | None = None
    # Forms in which to ask for a grammar, which grammars.py reads.
    response_format: object = None
    structured_outputs: object = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None
    allowed_token_ids: AnyIds | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def asked_max_tokens(self) -> int | None:
        """The limit by the name that it has, the newer one where it has both; None: it is left to the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_tokens(self) -> int | None:
        """The length that an answer may have where there is room for it; None: for any."""
        return self.asked_max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None: no logprobs at all."""
        raise NotImplementedError

    @property
    def computed_logprobs(self) -> int | None:
        """The same of what the workers compute: the client may not see it."""
        return self.num_logprobs

    _grammar: AskedGrammar | None = PrivateAttr(None)

    @property
    def asked_grammar(self) -> AskedGrammar | None:
        """Return the grammar that the answer is to follow; None: it may be any text."""
        return self._grammar

    def check(self, ignored: list[str] | None = None) -> None:
        """Check the rules between fields, and the fields of grammars. Unknown ones of these go to `ignored`."""
        self._grammar = asked_grammar({name: getattr(self, name) for name in GRAMMAR_FIELDS}, ignored)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only for stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not available with stream: true", param="prompt_logprobs")

    def check_least(self, max_tokens: int) -> None:
        """Raise for an answer that must be longer than it may become."""
        least = self.min_tokens or 0
        if least > max_tokens:
            asked = "max_tokens" if max_tokens == self.wanted_tokens else "what the prompt leaves room for:"
            raise RequestError(f"min_tokens {least} is more than {asked} {max_tokens}", param="min_tokens")

    def sampling(
        self,
        defaults: SamplingDefaults,
        *,
        seed: int,
        max_tokens: int,
        vocab_size: int,
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> SamplingParams:
        """Return what the workers are told. `max_tokens` is what fits; `seed` is used where the client gave none."""
        for name in ("logit_bias", "stop_token_ids"):  # `allowed_token_ids` are a grammar's, and checked with it
            if (ids := getattr(self, name)) and max(ids) >= vocab_size:
                raise RequestError(f"{name}: id {max(ids)} is not below the vocabulary's {vocab_size}", param=name)
        top_k = _given(self.top_k, defaults.top_k)
        return SamplingParams(
            temperature=min(_given(self.temperature, defaults.temperature), _HOTTEST),
            top_p=_given(self.top_p, defaults.top_p),
            top_k=max(top_k, 0),
            min_p=_given(self.min_p, defaults.min_p),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_given(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=self.logit_bias or {},
            max_tokens=max(max_tokens, 1),  # 0 (echo alone): one is computed and not delivered
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=bad_words,
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.computed_logprobs,
            prompt_logprobs=self.asked_prompt_logprobs,
            seed=_given(None if self.seed == NO_SEED else self.seed, seed) & _SEED_MASK,
        )

    @property
    def asked_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs


class CompletionBody(GenerationBody):
    prompt: Prompt
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: Logprobs | None = None
    suffix: str | None = None  # what stands behind the answer

    @property
    def num_choices(self) -> int:
        return self.best_of or self.n or 1

    @property
    def wanted_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.asked_max_tokens is None else self.asked_max_tokens

    @property
    def num_best(self) -> int | None:
        """The number of choices that the client sees, the best ones; None: all of them."""
        shown = self.n or 1
        return None if shown == self.num_choices else shown

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def computed_logprobs(self) -> int | None:
        return 0 if self.logprobs is None and self.num_best is not None else self.logprobs

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """echo with logprobs reports the prompt's tokens as well."""
        both = [k for k in (self.prompt_logprobs, self.logprobs if self.echo else None) if k is not None]
        return max(both, default=None)

    def check(self, ignored: list[str] | None = None) -> None:
        super().check(ignored)
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestError(f"best_of {self.best_of} is less than n ({self.n})", param="best_of")
        if self.num_best is not None and self.stream:
            raise RequestError("best_of above n is not available with stream: true", param="best_of")
        if self.suffix and self.echo:
            raise RequestError("echo is not available beside suffix", param="echo")
        if self.asked_max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1 (0 only with echo: true)", param="max_tokens")


class ChatBody(GenerationBody):
    messages: list[object]  # checked by chat_messages.py, which knows the parts of a message
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    documents: Documents | None = None  # that the template tells the model of
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: object = None  # checked by turns/definitions.py
    tool_choice: object = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: AskedEffort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    verbosity: Literal["low", "medium", "high"] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, ignored: list[str] | None = None) -> None:
        super().check(ignored)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.asked_max_tokens == 0:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        if self.allowed_token_ids and self.tools and self.tool_choice != "none":
            raise RequestError("allowed_token_ids is not available beside tools", param="allowed_token_ids")
        check_template_switches(self.add_generation_prompt, self.continue_final_message)


Body = TypeVar("Body", CompletionBody, ChatBody, EmbeddingBody, TokenizeBody, DetokenizeBody)
Value = TypeVar("Value", int, float)


def validate(kind: type[Body], raw: dict[str, object], ignored: list[str] | None = None) -> Body:
    """The body as `kind`, or a RequestError that names the first wrong field, the rule and what was seen.

    Unknown fields are refused too, unless there is a list that takes their names.
    """
    try:
        fields = check_fields(raw, frozenset(kind.model_fields), ignored)
        if isinstance(options := fields.get("stream_options"), dict):
            fields["stream_options"] = StreamOptions.known(options, ignored)
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_field(error.errors(include_url=False)[0]) from None
    body.check(ignored)
    return body


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value
