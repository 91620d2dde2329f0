"""A version of a model: everything that serves it in this router.

its requests   name, limits and defaults, tokenizer, chat template
both           the dispatcher, with its queue and its pools of workers
its workers    what each of them must be
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from ... import __version__
from ...common.errors import RequestError
from ...common.request import Pooling
from ...common.router_config import ReasoningParserName, SpecialTokens, ToolParserName
from ...models.chat_template import ChatTemplate
from ...models.pooling import EmbeddedTexts
from ...models.special_text import SpecialText
from ...models.tokenizer import Tokenizer
from ..dispatch.dispatcher import Dispatcher
from ..dispatch.worker_group import Expected, WorkerGroup
from ..helpers.chat_renderer import ChatRenderer, Renderer
from ..helpers.grammar_checker import GrammarChecker
from ..state.adapter_use import AdapterUse
from ..state.errors import clip
from ..turns.definitions import ToolUse
from ..turns.dialect import Dialect
from ..turns.lazy import is_guidable
from .defaults import SamplingDefaults


@dataclass(slots=True, frozen=True)
class ServedModel:
    """The model, as its clients know it."""

    name: str
    max_model_len: int
    vocab_size: int  # token ids below it are valid
    defaults: SamplingDefaults = SamplingDefaults()
    deterministic: bool = False
    special_tokens: SpecialTokens = "allow"  # that the text of a message spells
    chooses_tools: bool = True  # the model may decide whether it calls one
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"
    quantization: str = ""  # of its weights; empty: plain numbers
    generates: bool = True  # False: it embeds alone
    hidden_size: int = 0  # the length of its embeddings
    pooling: Pooling = Pooling.LAST  # of its embeddings
    embedded_texts: EmbeddedTexts = EmbeddedTexts()

    @property
    def max_embedded_tokens(self) -> int:
        """The tokens that one input may have whose embedding is asked for."""
        return min(self.max_model_len, self.embedded_texts.max_tokens or self.max_model_len)

    @property
    def fingerprint(self) -> str:
        """The fingerprint in answers: if equal and ending in `exact`, equal requests with a seed have equal answers."""
        return f"kvferry-{__version__}-{'exact' if self.deterministic else 'fast'}"


@dataclass(slots=True, frozen=True, eq=False)
class Version(WorkerGroup):
    """One version of one model. Requests and workers of different versions never meet."""

    model: ServedModel
    tokenizer: Tokenizer
    dialect: Dialect  # how its turns are written
    renderer: Renderer | None  # of the chat template; None: there is none
    special_text: SpecialText | None  # finds special tokens in messages; None: messages may spell them
    grammars: GrammarChecker | None  # None: answers follow none
    adapter: AdapterUse | None = None  # None: the model as it is
    parent: str = ""  # whose adapter it is; empty: nobody's

    @classmethod
    def create(
        cls,
        model: ServedModel,
        tokenizer: Tokenizer,
        dispatcher: Dispatcher,
        expected: Expected,
        renderer: Renderer | None = None,
        grammars: GrammarChecker | None = None,
    ) -> Version:
        """Make a version. Chats are rendered by `renderer`; without one, in processes of the version's own."""
        if renderer is None and tokenizer.chat_template is not None:
            renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens)
        special_text = tokenizer.special_text() if model.special_tokens != "allow" else None
        dialect = _dialect(model, tokenizer.chat_template)
        return cls(expected, dispatcher, model, tokenizer, dialect, renderer, special_text, grammars)

    @property
    def identity(self) -> str:
        """The name of what answers: equal for equal weights and vocabularies, as far as names tell, and adapters."""
        adapter = "" if self.adapter is None else self.adapter.digest
        return f"{self.model.name} {self.model.quantization} {self.model.vocab_size} {adapter}"

    def with_adapter(self, name: str, adapter: AdapterUse) -> Self:
        """Return it as requests for one of its adapters see it: all is shared but the name."""
        return replace(self, model=replace(self.model, name=name), adapter=adapter, parent=self.model.name)

    def check_ids(self, ids: Sequence[int], param: str, *, of_text: bool = False) -> None:
        """Refuse ids that the model has no row for: a worker would end by one. Raises RequestError (400).

        Text has such ids, too: fine-tunes add tokens, for padding most of all, and leave the embedding as it was.
        """
        size = self.model.vocab_size
        if not ids or (of_text and self.tokenizer.vocab_size <= size) or 0 <= min(ids) <= max(ids) < size:
            return
        bad = min(ids) if min(ids) < 0 else max(ids)
        what = f"token {clip(self.tokenizer.token_text(bad))} ({bad})" if of_text else f"token id {bad}"
        where = "" if param == "prompt" else f"{param}: "
        raise RequestError(f"{where}{what} is not in the vocabulary of {size} tokens", param=param)

    def guides_calls(self, *, is_free: bool) -> bool:
        """Tell whether a grammar can hold calls that the model chooses; `is_free`: what is no call is any text."""
        return self.grammars is not None and is_guidable(self.dialect, is_free=is_free)

    def kept_use(self, use: ToolUse, *, is_free: bool) -> ToolUse:
        """Return a use that can be kept: where no grammar forbids calls of a tool, the model is not told of it."""
        return use if use.is_forced or self.guides_calls(is_free=is_free) else use.narrowed

    @property
    def served_name(self) -> str:
        """Return the model's name, which its workers know."""
        return self.parent or self.model.name


def _dialect(model: ServedModel, template: ChatTemplate | None) -> Dialect:
    source, variables = (None, frozenset[str]()) if template is None else (template.source, template.variables)
    return Dialect.of_template(source, model.tool_parser, model.reasoning_parser, variables=variables)
