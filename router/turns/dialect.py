"""A model's turns are written in its dialect: which form its calls have, whether it reasons in tags or channels.

An operator may say so; what he leaves open is read off the chat template, which teaches the model the same form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from ...common.router_config import ReasoningParserName, ToolParserName
from . import channels
from .call_reader import CallReader
from .deepseek import DEEPSEEK, HUNYUAN, DeepSeekSyntax
from .definitions import ToolUse
from .gemma import BEGIN_CALL, GemmaSyntax
from .json_syntaxes import (
    COMMAND_TAGS,
    GRANITE_TAGS,
    LLAMA_TAGS,
    NEMOTRON_TAGS,
    BareJsonSyntax,
    EitherSyntax,
    HermesSyntax,
    MistralSyntax,
)
from .paired import GLM, MINIMAX, PairedSyntax
from .pythonic import PythonicSyntax
from .qwen_coder import SEED, QwenCoderSyntax
from .reasoning import (
    ANSWER,
    BRACKETS,
    COMMAND_RESPONSE,
    COMMAND_THINK,
    GEMMA_CHANNEL,
    GEMMA_THINK,
    RESPONSE,
    SEED_THINK,
    THINK,
    AnswerTags,
    DraftReader,
    ReasoningCount,
    ReasoningCounter,
    ReasoningReader,
)
from .syntax import Syntax, Tags
from .told import THINKS_NOT
from .turn import TaggedReader, TurnReader

# vLLM's names for what is the same form, of calls and of reasoning.
_CALL_ALIASES: Mapping[str, str] = {
    "deepseek_v31": "deepseek_v3",
    "glm45": "glm",
    "glm47": "glm",
    "granite4": "hermes",
    "llama4_json": "llama3_json",
    "openai": "channels",
    "llama4_pythonic": "pythonic",
    "olmo3": "pythonic",
    "phi4_mini_json": "granite",
    "qwen3_xml": "qwen3_coder",
}
_REASONING_ALIASES: Mapping[str, str] = {
    "glm45": "think",
    "hunyuan_a13b": "think",
    "minimax_m2": "think",
    "nemotron_v3": "think",
    "openai_gptoss": "channels",
    "qwen3": "think",
}
_CHANNEL_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}  # what gpt-oss was not taught, by the nearest
_SETTINGS = "[MODEL_SETTINGS]"  # of Mistral Small 4 and its like: a template that knows two efforts, none and high
# What a template of each family has in it; the first that is found names the form.
_SIGNS = (
    (re.compile(re.escape(channels.CHANNEL)), "channels"),
    (re.compile(DEEPSEEK.begin_calls), "deepseek_v3"),
    (re.compile(r"<\|START_ACTION\|>"), "cohere_command3"),
    (re.compile(re.escape(NEMOTRON_TAGS.begin)), "nemotron_json"),
    (re.compile(r"<tool_calls>"), "hunyuan_a13b"),
    (re.compile(r"<function_calls>|\[func_name1\("), "pythonic"),
    (re.compile(r"<\|tool_(?:list|call)_start\|>|List of tools: "), "lfm2"),
    (re.compile(r"<seed:tool_call>"), "seed_oss"),
    (re.compile(r"<function="), "qwen3_coder"),
    (re.compile(r"<arg_key>"), "glm"),
    (re.compile(r"<minimax:tool_call>"), "minimax_m2"),
    (re.compile(re.escape(BEGIN_CALL)), "gemma4"),
    (re.compile(r"<\|tool_call\|>|functools\["), "granite"),
    (re.compile(r"<tool_call>"), "hermes"),
    (re.compile(r"\[TOOL_CALLS\]"), "mistral"),
    (re.compile(r"<\|python_tag\|>|<\|(?:start_header_id|header_start)\|>"), "llama3_json"),  # Llama 3's, and 4's
)
_TAGS = (  # what a template of each form of reasoning has in it
    (channels.CHANNEL, "channels"),
    (BRACKETS.begin, "mistral"),
    (SEED_THINK.begin, "seed_oss"),
    (COMMAND_THINK.begin, "cohere_command3"),
    (GEMMA_THINK.begin, "gemma4"),
    (THINK.begin, "think"),  # OLMo 3's has this one alone
    (THINK.end, "think"),
)
_TAGS_OF: Mapping[str, Tags] = {
    "mistral": BRACKETS,
    "seed_oss": SEED_THINK,
    "cohere_command3": COMMAND_THINK,
    "gemma4": GEMMA_THINK,
}
_TOKENS_OF = {"gemma4": frozenset({GEMMA_CHANNEL, GEMMA_THINK.end})}  # of tags that are not one token each
_ANSWER_TAGS = (  # what a template has in it whose model's answers stand in tags
    (RESPONSE.begin, RESPONSE),
    (COMMAND_RESPONSE.begin, COMMAND_RESPONSE),
    ("<|extra_0|>", ANSWER),  # Hunyuan's ends of turns: templates tell of no answers in tags
    ("<｜hy_Assistant", ANSWER),
)
_SWITCHES = frozenset({"reasoning_effort", "enable_thinking", "thinking"})


@dataclass(slots=True, frozen=True)
class Dialect:
    """The dialect of one model, as far as answers are read by it."""

    tool_parser: str = "hermes"
    # think; mistral, seed_oss, cohere_command3, gemma4: their tags; deepseek_r1: the answer begins inside, tag or not;
    # channels: gpt-oss's
    reasoning_parser: str = "none"
    answer_tags: AnswerTags | None = None  # around its answers
    takes_tools: bool = False  # the template tells the model of tools itself
    has_two_forms: bool = False  # calls may have told.py's form, which the model was told of, or its own
    tells_calls: bool = True  # the template tells the model of its earlier calls, too
    has_responses: bool = False  # results are a field of the message with the calls (gemma_history.py)
    variables: frozenset[str] = frozenset()  # that the template looks at
    switches: frozenset[str] = frozenset()  # those by which it lets the model reason
    has_two_efforts: bool = False  # of reasoning: none and high
    has_switch_words: bool = False  # the template has no such switch, and looks for THINKS_NOT in messages

    @classmethod
    def of_template(
        cls,
        source: str | None,
        tool_parser: ToolParserName = "auto",
        reasoning_parser: ReasoningParserName = "auto",
        *,
        variables: Set[str] = frozenset(),
    ) -> Dialect:
        """Read a dialect off a chat template and the variables that it has; names other than `auto` go before it."""
        source = source or ""
        takes_tools = "tools" in variables  # Phi-4-mini's has `message['tools']`, which clients do not send
        by_sign = (name for sign, name in _SIGNS if sign.search(source) is not None)
        by_tag = (name for tag, name in _TAGS if tag in source)
        found = cls(
            tool_parser=next(by_sign, "json") if takes_tools else "hermes",  # told.py's form where it takes none
            reasoning_parser=next(by_tag, "none"),
            answer_tags=next((tags for sign, tags in _ANSWER_TAGS if sign in source), None),
            takes_tools=takes_tools,
            tells_calls="tool_calls" in source,
            has_responses="tool_responses" in source and "tool_call_id" not in source,
            variables=frozenset(variables),
            switches=_SWITCHES & variables,
            has_two_efforts=_SETTINGS in source,
            has_switch_words=THINKS_NOT in source and not _SWITCHES & variables,
        )
        if tool_parser != "auto":
            own = _CALL_ALIASES.get(tool_parser, tool_parser)
            has_two_forms = not takes_tools and own not in ("hermes", "channels")
            found = replace(found, tool_parser=own, has_two_forms=has_two_forms)
        if reasoning_parser != "auto":
            found = replace(found, reasoning_parser=_REASONING_ALIASES.get(reasoning_parser, reasoning_parser))
        elif found.tool_parser == "channels":  # calls are messages among the others
            found = replace(found, reasoning_parser="channels")
        return found

    @property
    def has_switch(self) -> bool:
        """Tell whether the template lets the model reason or not, as it is asked to."""
        return self.has_switch_words or bool(self.switches)

    @property
    def has_channels(self) -> bool:
        """Tell whether answers are messages in channels, calls among them."""
        return self.reasoning_parser == "channels"

    @property
    def calls_in_content(self) -> bool:
        """Tell whether earlier calls are told as content: Granite 3's and LFM2's templates have no place for them."""
        return self.tool_parser in ("granite", "lfm2") and self.takes_tools and not self.tells_calls

    @property
    def grammar_opening(self) -> str:
        """Return what the prompt of an answer ends with that is calls from its first token on."""
        return channels.OPENING if self.has_channels else ""

    def effort(self, asked: str) -> str:
        """Return an effort of reasoning as the template is told it."""
        if self.has_two_efforts:
            return "none" if asked in ("none", "minimal") else "high"
        return _CHANNEL_EFFORTS.get(asked, asked) if self.has_channels else asked

    def syntax(self, use: ToolUse) -> Syntax:
        if use.is_forced:  # forced.py's form, whatever the model's
            return BareJsonSyntax(frozenset(tool.name for tool in use.callable))
        own = self._own_syntax(use)
        # To a grammar of calls the other form is a text.
        return EitherSyntax(own) if self.has_two_forms and not use.is_bound else own

    def _own_syntax(self, use: ToolUse) -> Syntax:
        names = frozenset(tool.name for tool in use.tools)
        match self.tool_parser:
            case "mistral":
                return MistralSyntax()
            case "deepseek_v3":
                return DeepSeekSyntax()
            case "pythonic" | "lfm2":
                return PythonicSyntax(use.schemas)
            case "qwen3_coder":
                return QwenCoderSyntax(use.schemas)
            case "seed_oss":
                return QwenCoderSyntax(use.schemas, SEED)
            case "glm":
                return PairedSyntax(GLM, use.schemas)
            case "minimax_m2":
                return PairedSyntax(MINIMAX, use.schemas)
            case "llama3_json":
                return BareJsonSyntax(names, LLAMA_TAGS)
            case "granite":
                return BareJsonSyntax(names, GRANITE_TAGS)
            case "cohere_command3":
                return BareJsonSyntax(names, COMMAND_TAGS)
            case "hunyuan_a13b":
                return DeepSeekSyntax(HUNYUAN)
            case "gemma4":
                return GemmaSyntax(use.schemas)
            case "nemotron_json":
                return HermesSyntax(NEMOTRON_TAGS)
            case "json":
                return BareJsonSyntax(names)
        return HermesSyntax()

    @property
    def reasons(self) -> bool:
        return self.reasoning_parser != "none"

    @property
    def tags(self) -> Tags:
        """Return what stands around thoughts, where there are no channels."""
        return _TAGS_OF.get(self.reasoning_parser, THINK)

    @property
    def without_reasoning(self) -> Dialect:
        """The dialect of an answer that follows a grammar from its first token on."""
        return replace(self, reasoning_parser="none")

    def shown_marks(self, use: ToolUse) -> frozenset[str]:
        """Return the tokens that must be in an answer's text, special or not."""
        if self.has_channels:
            return channels.MARKS
        tags = _TOKENS_OF.get(self.reasoning_parser, frozenset(self.tags)) if self.reasons else frozenset()
        return (self.syntax(use).marks if use.tools else frozenset()) | tags

    def begins_inside(self, prompt: str, continued: str = "") -> bool:
        """Return whether an answer to this prompt begins in the middle of reasoning; `continued`: what it goes on."""
        if self.has_channels:
            return False
        begin, end = self.tags
        if continued:
            return continued.rfind(begin) > continued.rfind(end)
        ending = prompt[-64:].rstrip()
        return ending.endswith(begin) or (self.reasoning_parser == "deepseek_r1" and not ending.endswith(end))

    def reader(self, use: ToolUse, *, begins_inside: bool) -> TurnReader:
        """Make what reads one choice of an answer."""
        if self.has_channels:
            names = frozenset(tool.name for tool in use.tools)
            return channels.ChannelReader(names, has_one_call=not use.is_parallel)
        reasoning = (
            ReasoningReader(self.tags, begins_inside=begins_inside, answer_tags=self.answer_tags)
            if self.reasons
            else None
        )
        syntax = self.syntax(use) if use.tools else None
        calls = CallReader(syntax) if syntax is not None else None
        drafts = DraftReader(syntax) if syntax is not None and reasoning is not None and syntax.marks else None
        return TaggedReader(reasoning, calls, drafts, has_one_call=not use.is_parallel, has_calls_alone=use.is_forced)

    def count(self, *, begins_inside: bool) -> ReasoningCounter:
        """Make what counts one choice's tokens of reasoning, where the model reasons."""
        return channels.ChannelCount() if self.has_channels else ReasoningCount(self.tags, begins_inside=begins_inside)

    @property
    def has_short_ids(self) -> bool:
        return self.tool_parser == "mistral"
