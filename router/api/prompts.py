"""A body becomes token ids that fit the model: template, tokenizer, length.

Long bodies are checked and tokenized on threads (the tokenizer releases the GIL), so that the streams under way do not
wait for them; for short ones the hop would cost more than the work. Chats are rendered in another process.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from ...common.errors import RequestError
from ...models.special_text import SpecialText
from ...models.tokenizer import check_num_bytes, check_text_size
from ..bodies.chat_messages import parse_messages, without_cache_hints
from ..bodies.schemas import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody
from ..bodies.text_bodies import TokenizeBody
from ..bodies.values import Cut
from ..catalogue.infill import InfillForm
from ..catalogue.version import Version
from ..helpers.chat_renderer import Renderer
from ..helpers.wire import Chat
from ..state.errors import clip
from ..turns.channel_history import channel_messages, described_tools
from ..turns.definitions import ToolUse, parse_tool_use
from ..turns.gemma_history import with_responses
from ..turns.rendering import Render, rendered
from ..turns.told import told_in_content, told_in_text, told_to_think
from .answer import PromptText
from .template_variables import asked_effort, template_variables, without_effect

INLINE_CHARS = 4096  # about half a millisecond of tokenizing
NUM_THREADS = 2

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, frozen=True)
class ChatPrompt:
    """A chat and the prompt that it makes."""

    messages: list[dict[str, object]]
    use: ToolUse
    prompt: PromptText
    continued: str = ""  # text of the last message, where the answer goes on with it
    ignored: Sequence[str] = ()  # fields that have no effect


class PromptReader:
    """Reads prompts for any version. It is stateless but for its threads; `close` ends them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # `size` is about how many characters there are to work on.

    async def completion(self, version: Version, body: CompletionBody, size: int) -> list[PromptText]:
        return await self.run(size, _completion, version, body)

    async def chat(
        self, version: Version, body: ChatBody | TokenizeBody, size: int, *, refuses_unknown: bool
    ) -> ChatPrompt:
        """The messages as checked, and the prompt that they make."""
        if version.renderer is None:
            raise RequestError(
                "this model has no chat template; the server needs --chat-template FILE to answer chats, "
                "or use /v1/completions",
                code="chat_template_missing",
            )
        ignored: list[str] | None = None if refuses_unknown else []
        messages, use, chat, hidden = await self.run(size, _chat, version, body, ignored)
        text = await rendered(_render_in(version.renderer, chat), chat.messages, messages[0]["role"] == "system")
        continued = ""
        if chat.continue_final_message:
            continued = _continued(str(messages[-1]["content"]), _shown(version, text, hidden))
        if chat.add_generation_prompt and use.is_forced:
            text += version.dialect.grammar_opening
        # The template writes the special tokens itself.
        prompt = await self.run(len(text), _encode_chat, version, text, hidden, body)
        return ChatPrompt(messages, use, prompt, continued, [*(ignored or ()), *without_effect(version, body)])

    async def tokenize(
        self, version: Version, body: TokenizeBody, size: int, *, refuses_unknown: bool
    ) -> tuple[list[int], Sequence[str]]:
        """The tokens, and the names of ignored fields."""
        if body.messages is not None:
            chat = await self.chat(version, body, size, refuses_unknown=refuses_unknown)
            return chat.prompt.token_ids, chat.ignored
        add_special_tokens = body.add_special_tokens is not False
        cut = body.cut(version.model.max_model_len)
        prompts = await self.run(size, _encode, version, [body.prompt or ""], add_special_tokens, cut)
        return prompts[0].token_ids, ()

    async def names(self, version: Version, token_ids: list[int]) -> list[str]:
        """Each token as the vocabulary spells it: several of them may be one character."""
        spelling = version.tokenizer.spelling
        return await self.run(len(token_ids), lambda: [spelling(token_id) or "" for token_id in token_ids])

    async def decode(self, version: Version, token_ids: list[int]) -> str:
        return await self.run(len(token_ids), _decode, version, token_ids)

    async def run(self, size: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the work on a thread, unless it is little."""
        if size <= INLINE_CHARS:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args, **kwargs))


def _completion(version: Version, body: CompletionBody) -> list[PromptText]:
    add_special_tokens = body.add_special_tokens is not False
    prompts = _infilled(version, body) if body.suffix else _completion_prompts(version, body, add_special_tokens)
    for prompt in prompts:
        if not prompt.token_ids:
            raise RequestError("the prompt is empty: it has no tokens", param="prompt")
        version.check_ids(prompt.token_ids, "prompt", of_text=True)
    return prompts


def _infilled(version: Version, body: CompletionBody) -> list[PromptText]:
    """Return prompts for what stands between each prompt and the suffix, and make its end tokens stop tokens."""
    form, tokenizer = InfillForm.of(version.tokenizer), version.tokenizer
    if form is None:
        raise RequestError(
            f"'suffix' is not supported: the model '{version.model.name}' has no tokens for filling in a middle",
            param="suffix",
            code="unsupported_parameter",
        )
    if body.truncate_prompt_tokens is not None:
        name = "truncate_prompt_tokens"
        raise RequestError(f"{name} is not available beside suffix", param=name)
    begin = tokenizer.encode("", body.add_special_tokens is not False)
    [suffix] = _encode(version, [body.suffix or ""], add_special_tokens=False)
    prefixes = _completion_prompts(version, body, False)
    body.stop_token_ids = [*dict.fromkeys([*(body.stop_token_ids or ()), *form.ends])]
    return [PromptText(form.prompt(begin, each.token_ids, suffix.token_ids), each.text) for each in prefixes]


def _completion_prompts(version: Version, body: CompletionBody, add_special_tokens: bool) -> list[PromptText]:
    prompt = body.prompt
    asked = body.asked_max_tokens
    cut = body.cut(version.model.max_model_len, max(1, DEFAULT_COMPLETION_TOKENS if asked is None else asked))
    if isinstance(prompt, str):
        return _encode(version, [prompt], add_special_tokens, cut)
    if isinstance(prompt[0], str):
        return _encode(version, [text for text in prompt if isinstance(text, str)], add_special_tokens, cut)
    if isinstance(prompt[0], int):
        prompt = [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [_checked(version, ids if cut is None else cut.ids(ids)) for ids in prompt if isinstance(ids, list)]


def _chat(
    version: Version, body: ChatBody | TokenizeBody, ignored: list[str] | None
) -> tuple[list[dict[str, object]], ToolUse, Chat, dict[str, str] | None]:
    """The messages and tools as checked, what is to be rendered, and which special tokens are hidden in it.

    None: a client's text spells none.
    """
    messages = parse_messages(body.messages or [], ignored)
    use = _tool_use(version, body, ignored)
    check_num_bytes(sum(len(str(message["content"])) for message in messages), version.model.max_model_len)
    continues = bool(body.continue_final_message)
    if continues and messages[-1]["role"] != "assistant":
        raise RequestError(
            "continue_final_message needs an assistant message at the end", param="continue_final_message"
        )
    kwargs = template_variables(version, body, ignored)
    is_free = not isinstance(body, ChatBody) or body.asked_grammar is None
    asked, use = use, version.kept_use(use, is_free=is_free)
    tools = use.told()
    shown, hidden = messages, None
    special = version.special_text
    if special is not None and _spells_special(version, special, messages, asked.told(), kwargs):
        (*both, kwargs), hidden = special.hide([*messages, *tools, kwargs])
        shown, tools = both[: len(messages)], both[len(messages) :]
    if not version.dialect.takes_tools:
        shown, tools = told_in_text(shown, tools), []
    if version.dialect.calls_in_content:
        shown = told_in_content(shown, as_python=version.dialect.tool_parser == "lfm2")
    if version.dialect.has_channels:
        shown, tools = channel_messages(shown), described_tools(tools)
    if version.dialect.has_responses:
        shown = with_responses(shown)
    if version.dialect.has_switch_words and (effort := asked_effort(body)) is not None:
        shown = told_to_think(shown, thinks=effort != "none")
    prompted = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    return messages, use, Chat(shown, kwargs, prompted, continues, tools), hidden


def _render_in(renderer: Renderer, chat: Chat) -> Render:
    """Return what renders the chat with other messages."""
    return lambda messages: renderer.render(replace(chat, messages=messages))


def _tool_use(version: Version, body: ChatBody | TokenizeBody, ignored: list[str] | None) -> ToolUse:
    tools = without_cache_hints(body.tools)
    if isinstance(body, TokenizeBody):
        return parse_tool_use(tools, None, None, ignored)
    use = parse_tool_use(tools, body.tool_choice, body.parallel_tool_calls, ignored)
    if use.choice == "auto" and not version.model.chooses_tools:
        message = "tool_choice 'auto' is switched off on this server (enable_auto_tool_choice)"
        raise RequestError(message, param="tool_choice", code="unsupported_value")
    return use


def _spells_special(
    version: Version,
    special: SpecialText,
    messages: list[dict[str, object]],
    tools: list[dict[str, object]],
    kwargs: dict[str, object],
) -> bool:
    """Return whether a client's text has a special token. Raises RequestError where it must not."""
    named = [
        (f"messages[{index}].{name}", value) for index, each in enumerate(messages) for name, value in each.items()
    ]
    named += [(f"tools[{index}]", each) for index, each in enumerate(tools)]
    named += [(f"chat_template_kwargs.{name}", value) for name, value in kwargs.items()]
    for name, value in named:
        if (token := special.find_in(value)) is not None:
            if version.model.special_tokens == "refuse":
                message = f"{name} has the special token {clip(token)}, which this server does not take in messages"
                raise RequestError(message, param=name, code="special_token")
            return True
    return False


def _continued(content: str, prompt: str) -> str:
    """Return what is at the prompt's end of the message that is continued: a template may trim it."""
    ways = (content, content.rstrip(), content.lstrip(), content.strip())
    return next((kept for kept in ways if prompt.endswith(kept)), content)


def _shown(version: Version, text: str, hidden: dict[str, str] | None) -> str:
    """Return a rendered text as its client has written it."""
    return text if version.special_text is None else version.special_text.shown(text, hidden or {})


def _encode_chat(
    version: Version, text: str, hidden: dict[str, str] | None, body: ChatBody | TokenizeBody
) -> PromptText:
    adds = bool(body.add_special_tokens)
    if hidden is not None:
        assert version.special_text is not None
        shown = _shown(version, text, hidden)
        check_text_size(shown, version.model.max_model_len)
        prompt = PromptText(version.special_text.encode(text, hidden, adds), shown)
    else:
        [prompt] = _encode(version, [text], adds)
    prompt = _cut_chat(version, body, prompt)
    version.check_ids(prompt.token_ids, "messages", of_text=True)
    return prompt


def _cut_chat(version: Version, body: ChatBody | TokenizeBody, prompt: PromptText) -> PromptText:
    asked = body.asked_max_tokens or 1 if isinstance(body, ChatBody) else 0
    cut = body.cut(version.model.max_model_len, asked)
    if cut is None or len(kept := cut.ids(prompt.token_ids)) == len(prompt.token_ids):
        return prompt
    return PromptText(kept, version.tokenizer.decode(kept, False))


def _encode(
    version: Version, texts: Sequence[str], add_special_tokens: bool, cut: Cut | None = None
) -> list[PromptText]:
    """Return the prompts. One that is cut has no text but what its tokens say."""
    if cut is not None:
        return list(map(PromptText, cut.encode_all(version.tokenizer, texts, add_special_tokens)))
    ids = version.tokenizer.encode_all(texts, add_special_tokens, max_tokens=version.model.max_model_len)
    return list(map(PromptText, ids, texts))


def _decode(version: Version, token_ids: list[int]) -> str:
    _checked(version, token_ids, "tokens")
    return version.tokenizer.decode(token_ids, False)


def _checked(version: Version, ids: list[int], param: str = "prompt") -> PromptText:
    if len(ids) > (limit := version.model.max_model_len):
        raise RequestError(
            f"This model's maximum context length is {limit} tokens; these are {len(ids)} token ids",
            param=param,
            code="context_length_exceeded",
        )
    version.check_ids(ids, param)
    return PromptText(ids)
