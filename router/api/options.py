"""A body's wishes for its answer: its grammar, its length, which of its text is shown, in which form."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from ...common.clock import wall_time_s
from ...common.errors import RequestError
from ...common.grammar import CheckedGrammar, Grammar, pack_mask, unpack_mask
from ..bodies.fields import not_supported
from ..bodies.grammars import AskedGrammar
from ..bodies.schemas import ChatBody, CompletionBody, GenerationBody
from ..catalogue.version import Version
from ..helpers.grammar_checker import GrammarChecker
from ..turns.definitions import ToolUse
from ..turns.forced import forced_grammar
from ..turns.lazy import Thinking, answering_grammar, free_grammar, keeps_schemas, thinking
from ..turns.values.json_text import dumps
from .answer import Answer, PromptText
from .chat_turns import TurnOptions
from .choice import TextOptions
from .form import FormContext, FormOptions
from .prompts import ChatPrompt

Prompts = TypeVar("Prompts")


async def beside_grammar(
    prompts: Awaitable[Prompts], version: Version, body: GenerationBody
) -> tuple[Prompts, CheckedGrammar | None]:
    """Return the prompts, and the grammar, which another process compiles while they are made."""
    if body.asked_grammar is None:
        return await prompts, None
    return await asyncio.gather(prompts, _checked_grammar(version, body.asked_grammar))


async def _checked_grammar(version: Version, asked: AskedGrammar) -> CheckedGrammar:
    """Return the grammar that the answers follow. Raises RequestError for one that cannot be kept."""
    if version.grammars is None:
        raise not_supported(asked.param)
    return await version.grammars.check(asked.grammar, asked.param)


async def forced_calls(version: Version, use: ToolUse) -> CheckedGrammar:
    """Return the grammar of calls that must come. Raises RequestError where it cannot be kept.

    A `response_format` beside it is that of text, of which there is none.
    """
    grammar = forced_grammar(use)
    assert grammar is not None
    if version.grammars is None:
        raise not_supported("tool_choice", ("auto", "none"))
    return await _checked_calls(version.grammars, grammar, use)


@dataclass(slots=True, frozen=True)
class ChatGrammar:
    """A chat's grammar, as far as it can be had."""

    grammar: CheckedGrammar | None  # None: any text
    is_free: bool = True  # the answer may begin with text, and so with reasoning
    ignored: tuple[str, ...] = ()  # wishes for it that cannot be kept


async def chat_grammar(
    version: Version, chat: ChatPrompt, asked: CheckedGrammar | None, budget: int | None
) -> ChatGrammar:
    """Return what a chat's answer follows; `asked`: what it follows where it does not call, behind its thoughts.

    `budget`: tokens that it may think; None: any number. Raises RequestError for tools whose schemas cannot be kept.
    """
    if asked is not None and asked.grammar.kind == "tokens":  # thoughts are of these, too
        return ChatGrammar(asked, ignored=() if budget is None else ("thinking_token_budget",))
    follows = await _answer_grammar(version, chat.use, asked)
    if follows.grammar is None and budget is None:
        return follows
    tokens, prompt = version.tokenizer, chat.prompt.text or ""
    may_think = follows.is_free or not (version.dialect.has_channels and chat.use.is_forced)
    way = thinking(version.dialect, prompt, chat.continued, tokens.mark_id, tokens.added_id) if may_think else None
    if budget is not None and not (way is not None and way.takes_budget and version.grammars is not None):
        unkept = ("thinking_token_budget",) if version.dialect.reasons else ()
        budget, follows = None, replace(follows, ignored=(*follows.ignored, *unkept))
    if way is None or (follows.grammar is None and budget is None):
        return follows
    assert version.grammars is not None
    if follows.grammar is None:
        assert budget is not None
        return replace(follows, grammar=await version.grammars.check(way.alone(budget), "thinking_token_budget"))
    if budget == 0 and way.may_be_left_out:
        return follows
    return ChatGrammar(await _behind_thoughts(version.grammars, follows.grammar, way, budget), True, follows.ignored)


async def _behind_thoughts(
    grammars: GrammarChecker, checked: CheckedGrammar, way: Thinking, budget: int | None
) -> CheckedGrammar:
    """Return the grammar behind thoughts. It is not compiled once more: its first tokens are known from its parts."""
    first_mask = (await grammars.check(way.first(budget), "thinking_token_budget")).first_mask
    if way.may_be_left_out:
        masks = unpack_mask(first_mask), unpack_mask(checked.first_mask)
        with_thoughts, without = (int.from_bytes(mask, "little") for mask in masks)
        first_mask = pack_mask((with_thoughts | without).to_bytes(len(masks[0]), "little"))
    return CheckedGrammar(msgspec.structs.replace(checked.grammar, thoughts=way.before(budget)), first_mask)


async def _answer_grammar(version: Version, use: ToolUse, asked: CheckedGrammar | None) -> ChatGrammar:
    """Return what an answer with these tools follows, without its thoughts."""
    if use.is_forced:
        return ChatGrammar(await forced_calls(version, use), is_free=False)
    if not use.tools or (asked is None and not use.is_bound):
        return ChatGrammar(asked, is_free=asked is None)
    grammar: Grammar | None = None
    if version.guides_calls(is_free=asked is None):
        mark_id = version.tokenizer.mark_id
        if asked is None:
            grammar = free_grammar(use, version.dialect, mark_id)
        else:
            grammar = answering_grammar(use, version.dialect, mark_id, asked.grammar)
    if grammar is None:
        return ChatGrammar(asked, asked is None, ("tools.strict",) if asked is None else ("tools",))
    assert version.grammars is not None
    unkept = () if keeps_schemas(use, version.dialect) else ("tools.strict",)
    return ChatGrammar(await _checked_calls(version.grammars, grammar, use), asked is None, unkept)


async def _checked_calls(grammars: GrammarChecker, grammar: Grammar, use: ToolUse) -> CheckedGrammar:
    """Return the grammar. Raises RequestError where calls cannot follow it, about the tool whose schema is why."""
    try:
        return await grammars.check(grammar, "tools")
    except RequestError:
        called = use.callable
        for index, tool in enumerate(use.tools):
            if tool in called and (use.is_forced or tool.is_strict):
                own = Grammar("json_schema", dumps(tool.parameters).encode("utf-8", "replace"))
                await grammars.check(own, f"tools[{index}].function.parameters")
        raise


def turn_options(version: Version, body: ChatBody, chat: ChatPrompt, *, is_free: bool) -> TurnOptions:
    """`is_free`: the answer may begin with text, and so with reasoning."""
    dialect = version.dialect if is_free else version.dialect.without_reasoning
    begins_inside = dialect.reasons and dialect.begins_inside(chat.prompt.text or "", chat.continued)
    return TurnOptions(dialect, chat.use, begins_inside, shows_reasoning=body.include_reasoning is not False)


def text_options(body: GenerationBody, max_tokens: int, turns: TurnOptions | None) -> TextOptions:
    has_one_call = turns is not None and not turns.use.is_parallel
    is_call = turns is not None and turns.use.is_forced  # and nothing else, from the first letter to the last
    reads_calls = turns is not None and (has_one_call or (bool(body.stop) and turns.has_marks))
    return TextOptions(
        stops=() if is_call else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        min_tokens=body.min_tokens or 0,
        max_tokens=max_tokens,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_tokens=body.computed_logprobs is not None or bool(body.return_token_ids),
        shown_tokens=frozenset() if turns is None else turns.shown_tokens,
        reasoning=turns.count if turns is not None and turns.dialect.reasons else None,
        calls=turns.reader if turns is not None and reads_calls else None,
        has_one_call=has_one_call,
    )


def form_context(prefix: str, request_id: str, version: Version, body: GenerationBody, answer: Answer) -> FormContext:
    """Name the answer after its request, or as it was named when it was told before."""
    streamed = body.stream_options
    continuous = streamed is not None and bool(streamed.continuous_usage_stats)
    options = FormOptions(
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
        echo=bool(body.echo),
        skip_special_tokens=body.skip_special_tokens is not False,
        return_token_ids=bool(body.return_token_ids),
        names_tokens_by_id=bool(body.return_tokens_as_token_ids),
        include_usage=streamed is not None and bool(streamed.include_usage),
        continuous_usage=continuous,
        num_best=body.num_best if isinstance(body, CompletionBody) else None,
    )
    name, created_s = request_id, wall_time_s()
    if answer.kept is not None:
        name, created_s = answer.kept.begun.answer_id, answer.kept.begun.created_s
    model = version.model
    return FormContext(prefix + name, created_s, model.name, model.fingerprint, answer, version.tokenizer, options)


def max_new_tokens(body: GenerationBody, prompt: PromptText, version: Version) -> int:
    """Return what is wanted, as far as the prompt leaves room for it in the context, and a worker holds it.

    Raises RequestError where there is no room at all.
    """
    rest = _rest(prompt, body.asked_max_tokens, version.model.max_model_len)
    wanted = rest if body.wanted_tokens is None else min(body.wanted_tokens, rest)
    return version.dispatcher.longest_answer(len(prompt.token_ids), body.num_choices, wanted)


def thinking_budget(body: ChatBody) -> int | None:
    """Return how many tokens may be thoughts; None: as many as come, or as the whole answer may have."""
    budget, limit = body.thinking_token_budget, body.asked_max_tokens
    return None if budget is None or (limit is not None and budget >= limit) else budget


def _rest(prompt: PromptText, asked: int | None, max_model_len: int) -> int:
    """Return the room after the prompt. Raises where there is none, or no prompt would leave what is asked for."""
    num_prompt = len(prompt.token_ids)
    asks_too_much = asked is not None and asked > max_model_len
    if num_prompt >= max_model_len or asks_too_much:
        more = f"and max_tokens asks for {asked} more" if asks_too_much else "and leaves no room for an answer"
        raise RequestError(  # it begins as OpenAI's, by which clients know it
            f"This model's maximum context length is {max_model_len} tokens; the prompt has {num_prompt} {more}. "
            "Shorten the prompt, ask for fewer tokens, or start the server with a larger --max-model-len",
            code="context_length_exceeded",
        )
    return max_model_len - num_prompt
