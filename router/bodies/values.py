"""The types of a body's fields that need more than a bound: checked before pydantic looks at each element.

A list of a million wrong elements costs one pass and one message, not an error object for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from ...common.errors import RequestError
from ...models.tokenizer import MAX_BYTES_PER_TOKEN, Tokenizer
from ..state.errors import clip, shown
from .fields import take_only

MAX_STOPS = 64
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_PROMPTS = 256
MAX_INPUTS = 2048  # of one call for embeddings, as OpenAI's
MAX_DOCUMENTS = 256
MAX_TEMPLATE_KWARGS = 16
MAX_TEMPLATE_CHARS = 16_384
MAX_TEMPLATE_DEPTH = 8
MAX_TEMPLATE_INT = 1_000_000
WHOLE_CONTEXT = -1
NO_SEED = -1  # as with vLLM, whose clients send it where they ask for none
_PROMPTS_RULE = "must be a string, a list of strings, a list of token ids or a list of token-id lists, and not be empty"
TEMPLATE_KWARGS = frozenset(  # that clients send to models whose template does not look at them, too
    {
        "enable_thinking",
        "thinking",
        "thinking_budget",
        "reasoning_effort",
        "add_vision_id",
        "date_string",
    }
)


def _effort(value: object) -> object:
    return "xhigh" if value == "max" else value  # the most that there is, by another server's name


def _cut(value: object) -> object:
    if type(value) is not int or (value < 1 and value != WHOLE_CONTEXT):
        rule = f"must be a whole number of at least 1, or {WHOLE_CONTEXT} for the context"
        raise ValueError(f"{rule}, got {shown(value)}")
    return value


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop is a string of 1 to {MAX_STOP_CHARS} characters, got {shown(stop)}")
    return stops


def _prompt(value: object) -> object:
    """Check only the kinds of elements: a JSON array of a million ids has no pydantic error for each."""
    odd = _odd_one(value, MAX_PROMPTS, "prompts")
    if odd is not None:
        raise ValueError(f"{_PROMPTS_RULE}, got {odd[1]} at [{odd[0]}]")
    return value


def _inputs(value: object) -> object:
    """Check as `_prompt` does, and name what is wrong in a list by its index."""
    odd = _odd_one(value, MAX_INPUTS, "inputs")
    if odd is not None:
        where = f"input[{odd[0]}]"
        raise RequestError(f"'{where}': 'input' {_PROMPTS_RULE}, got {odd[1]}", param=where, code="invalid_value")
    return value


def _odd_one(value: object, most: int, what: str) -> tuple[int, str] | None:
    """Return the index of the first element that is not as it must be, and what it is; None: all are."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(_PROMPTS_RULE)
    kind = type(value[0])
    if kind is not int and len(value) > most:
        raise ValueError(f"at most {most} {what} in one call, got {len(value)}")
    if kind in (int, str) and set(map(type, value)) == {kind}:
        return None
    for index, one in enumerate(value):
        if type(one) is not kind or kind not in (int, str, list) or (kind is list and set(map(type, one)) != {int}):
            return index, shown(one)
    return None


def _ids(value: object) -> object:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("must be a list of token ids")
    return value


def _bad_words(value: object) -> object:
    if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
        raise ValueError(f"must be a list of at most {MAX_BAD_WORDS} words, got {shown(value)}")
    for word in value:
        if not isinstance(word, str) or not 1 <= len(word) <= MAX_BAD_WORD_CHARS or not word.strip():
            raise ValueError(f"a bad word has 1 to {MAX_BAD_WORD_CHARS} characters, not all spaces, got {shown(word)}")
    return value


def bad_word_runs(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of words that must not come, with a space before each and without, as vLLM has them."""
    texts = [before + word.lstrip() for word in words for before in ("", " ")]
    try:
        encoded = tokenizer.encode_all(texts, add_special_tokens=False) if texts else []
    except RequestError as error:
        raise RequestError(f"'bad_words': {error}", param="bad_words", code="invalid_value") from None
    return tuple(dict.fromkeys(tuple(ids) for ids in encoded if ids))


def _documents(value: object) -> object:
    if not isinstance(value, list) or len(value) > MAX_DOCUMENTS or set(map(type, value)) - {dict}:
        raise ValueError(f"must be a list of at most {MAX_DOCUMENTS} objects, got {shown(value)}")
    return value


def _logit_bias(value: object) -> object:
    if isinstance(value, dict):
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
        bad = [key for key in value if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)]
        if bad:
            raise ValueError(f"keys are token ids, got {clip(bad[0])}")
        return {int(key): bias for key, bias in value.items()}
    return value


def _template_kwargs(value: object) -> object:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
        raise ValueError(f"must be an object of at most {MAX_TEMPLATE_KWARGS} variables, got {shown(value)}")
    for key, item in value.items():
        if _is_large(item):
            raise ValueError(
                f"the value of {clip(key)} must be JSON with ints of at most {MAX_TEMPLATE_INT}, "
                f"strings of at most {MAX_TEMPLATE_CHARS} characters and {MAX_TEMPLATE_DEPTH} levels"
            )
    return value


def _is_large(item: object, room: int = MAX_TEMPLATE_DEPTH) -> bool:
    if isinstance(item, str):
        return len(item) > MAX_TEMPLATE_CHARS
    if isinstance(item, dict | list):
        parts = item if isinstance(item, list) else [*item, *item.values()]
        return room == 0 or any(_is_large(part, room - 1) for part in parts)
    return isinstance(item, int) and abs(item) > MAX_TEMPLATE_INT


Stops = Annotated[list[str], BeforeValidator(_stops)]
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
Inputs = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_inputs)]
BadWords = Annotated[list[str], PlainValidator(_bad_words)]
Documents = Annotated[list[dict[str, object]], PlainValidator(_documents)]
AnyIds = Annotated[list[int], PlainValidator(_ids)]
LogitBias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_logit_bias)]
TemplateKwargs = Annotated[dict[str, object], PlainValidator(_template_kwargs)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
AskedEffort = Annotated[Effort, BeforeValidator(_effort)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # no chunk is padded: it is so that nobody reads lengths off the wire
    continuous_usage_stats: bool | None = None

    @classmethod
    def known(cls, options: dict[str, object], ignored: list[str] | None) -> dict[str, object]:
        """Return the fields that there are. Others are refused, unless a list takes their names."""
        names = frozenset(cls.model_fields)
        take_only(options, names, "stream_options", ignored)
        return {name: options[name] for name in options.keys() & names}


# --- prompts that are too long ----------------------------------------------------------------------------

Side = Literal["left", "right"]  # where a prompt is cut
_SLACK_TOKENS = 256  # so that nothing is kept of the word in which a text without end is cut


@dataclass(slots=True, frozen=True)
class Cut:
    """A cut leaves at most `num_tokens` of a prompt."""

    num_tokens: int
    side: Side

    def ids(self, ids: list[int]) -> list[int]:
        """Return what is kept of token ids."""
        if len(ids) <= self.num_tokens:
            return ids
        return ids[-self.num_tokens :] if self.side == "left" else ids[: self.num_tokens]

    def encode_all(self, tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return what is kept of each text's ids.

        What the model puts around a text (a BOS token, an end token) stays and counts, as with `transformers`: a vector
        may be the end token's. Of a text without end only what could be kept is tokenized.
        """
        around = _around(tokenizer) if add_special_tokens else ([], [])
        num_own = self.num_tokens - (0 if around is None else len(around[0]) + len(around[1]))
        if around is None or num_own < 1:
            return list(map(self.ids, tokenizer.encode_all(list(map(self._begun, texts)), add_special_tokens)))
        own = Cut(num_own, self.side)
        encoded = tokenizer.encode_all(list(map(own._begun, texts)), False)
        return [[*around[0], *own.ids(ids), *around[1]] for ids in encoded]

    def _begun(self, text: str) -> str:
        """Return what could be kept of a text, and some more."""
        most = MAX_BYTES_PER_TOKEN * (self.num_tokens + _SLACK_TOKENS)
        if len(text) <= most:
            return text
        return text[-most:] if self.side == "left" else text[:most]


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the ids that stand before and behind those of every text; None: this tokenizer adds others."""
    bare, all_ids = tokenizer.encode("a", False), tokenizer.encode("a")
    for start in range(len(all_ids) - len(bare) + 1):
        if all_ids[start : start + len(bare)] == bare:
            return all_ids[:start], all_ids[start + len(bare) :]
    return None


class CutPrompts(BaseModel):
    """The body says how prompts that are too long are cut, in vLLM's words."""

    model_config = ConfigDict(extra="forbid", strict=True)

    truncate_prompt_tokens: Annotated[int, PlainValidator(_cut)] | None = None
    truncation_side: Side | None = None

    def cut(self, max_model_len: int, num_asked: int = 0, side: Side = "left") -> Cut | None:
        """Return how prompts are cut; None: not at all. Raises RequestError for more than the context.

        `num_asked`: tokens of an answer, for which the context has to have room. `side`: the usual one.
        """
        most = self.truncate_prompt_tokens
        if most is None:
            return None
        if most > max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens {most} is more than the context of {max_model_len} tokens",
                param="truncate_prompt_tokens",
                code="invalid_value",
            )
        if most == WHOLE_CONTEXT:
            most = max_model_len - num_asked
        if most < 1:
            raise RequestError(
                f"This model's maximum context length is {max_model_len} tokens, and max_tokens asks for {num_asked}: "
                f"truncate_prompt_tokens {WHOLE_CONTEXT} would leave nothing of the prompt",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return Cut(most, self.truncation_side or side)
