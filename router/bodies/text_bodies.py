"""The bodies that ask for no new tokens: texts to be embedded, to be made tokens of, or of tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ...common.errors import RequestError
from .chat_messages import check_template_switches
from .values import AnyIds, CutPrompts, Inputs, TemplateKwargs


class EmbeddingBody(CutPrompts):
    model: str | None = None
    input: Inputs
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] | None = None
    user: object = None  # any, as in GenerationBody
    input_type: object = None  # a label here: templates of queries and documents are the client's
    # vLLM's
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    add_special_tokens: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    # Forms of a vector, of which there is one.
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little"] | None = None
    use_activation: Literal[True] | None = None
    padding: Literal["do_not_pad"] | None = None

    @property
    def num_choices(self) -> int:
        return 1

    def check(self, ignored: list[str] | None = None) -> None:
        return None


class TokenizeBody(CutPrompts):
    """vLLM's two forms in one: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[object] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: object = None

    def check(self, ignored: list[str] | None = None) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        check_template_switches(self.add_generation_prompt, self.continue_final_message)


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: AnyIds

    def check(self, ignored: list[str] | None = None) -> None:
        return None
