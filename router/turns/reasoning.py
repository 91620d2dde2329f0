"""A model's reasoning, told apart from its answer: what stands between `<think>` and `</think>`, or tags like them.

A template may open the tag itself, in the prompt: the text then begins inside, and a tag that the model writes first
all the same is none of its thoughts. Some models put the answer behind their thoughts in tags, too. White space around
the tags belongs to the form and is left out. What comes out does not depend on how the text is cut.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from .call_reader import CallReader
from .syntax import Syntax, Tags
from .values.json_text import ends_with_part_of

THINK = Tags("<think>", "</think>")
SEED_THINK = Tags("<seed:think>", "</seed:think>")  # Seed-OSS's
BRACKETS = Tags("[THINK]", "[/THINK]")  # Magistral's
GEMMA_CHANNEL = "<|channel>"
GEMMA_THINK = Tags(f"{GEMMA_CHANNEL}thought", "<channel|>")  # Gemma 4's: the first is a token and a word
COMMAND_THINK = Tags("<|START_THINKING|>", "<|END_THINKING|>")  # of Command R7B and A


class AnswerTags(NamedTuple):
    """Tags stand around a model's answer."""

    begin: str
    end: str
    needs_thoughts: bool  # they are the model's form behind its thoughts alone


RESPONSE = AnswerTags("<response>", "</response>", needs_thoughts=True)  # of Granite 3.3 and ERNIE 4.5
ANSWER = AnswerTags("<answer>", "</answer>", needs_thoughts=False)  # of Hunyuan
COMMAND_RESPONSE = AnswerTags("<|START_RESPONSE|>", "<|END_RESPONSE|>", needs_thoughts=False)


class ReasoningCounter(Protocol):
    """A counter is told the text of each of a choice's tokens."""

    num_tokens: int  # that are reasoning

    def push(self, text: str, num_tokens: int) -> None:
        """Take the text of one more token; `num_tokens`: the choice's, with it."""
        ...


class ReasoningCount:
    """A count of one choice's tokens that are reasoning, its tags among them."""

    def __init__(self, tags: Tags, *, begins_inside: bool) -> None:
        self._reader: ReasoningReader | None = ReasoningReader(tags, begins_inside=begins_inside)
        self.num_tokens = 0

    def push(self, text: str, num_tokens: int) -> None:
        """Take the text of one more token; `num_tokens`: the choice's, with it."""
        if self._reader is None:
            return
        self._reader.push(text)
        if self._reader.has_begun:
            self.num_tokens = num_tokens
        if self._reader.is_outside:
            self._reader = None


class ReasoningReader:
    """The state of one choice."""

    def __init__(self, tags: Tags = THINK, *, begins_inside: bool, answer_tags: AnswerTags | None = None) -> None:
        """`answer_tags` may stand around an answer."""
        self._begin_tag, self._end_tag = tags
        self._answer_tags = answer_tags
        self._answer_state: Literal["start", "tagged", "plain"] = "plain" if answer_tags is None else "start"
        self._state: Literal["start", "inside", "outside"] = "start"
        self._rest = ""  # held back: a part of a tag, or white space beside one
        self._is_blank = True  # nothing of the present part was told
        self.has_begun = begins_inside

    @property
    def is_outside(self) -> bool:
        """All that comes is the answer."""
        return self._state == "outside"

    @property
    def is_inside(self) -> bool:
        """Tell whether what came last is reasoning, a tag, or the white space that the form has around it."""
        return self._is_blank if self.is_outside else self.has_begun

    @property
    def is_unclear(self) -> bool:
        """Tell whether what came last may be the beginning of a tag, or of the answer."""
        is_start = self._answer_state == "start" if self.is_outside else self._state == "start" and not self.has_begun
        return is_start and bool(self._rest)

    def push(self, text: str, *, is_final: bool = False) -> tuple[str, str]:
        """Take what comes next; return (reasoning, answer) as far as they grow by it. The last text is final."""
        self._rest += text
        reasoning = answer = ""
        if self._state == "start":
            self._begin(is_final=is_final)
        if self._state == "inside":
            reasoning = self._reasoning(is_final=is_final)
        if self._state == "outside":
            answer = self._answer(is_final=is_final)
        return reasoning, answer

    def _begin(self, *, is_final: bool) -> None:
        text = self._rest.lstrip()
        if text.startswith(self._begin_tag):
            self._state, self._rest, self.has_begun = "inside", text[len(self._begin_tag) :], True
        elif is_final or not self._begin_tag.startswith(text):
            self._state, self._is_blank = ("inside", True) if self.has_begun else ("outside", False)
            if not self.has_begun and (self._answer_tags is None or self._answer_tags.needs_thoughts):
                self._answer_state = "plain"

    def _reasoning(self, *, is_final: bool) -> str:
        found = self._rest.find(self._end_tag)
        if found >= 0:
            text, self._rest = self._rest[:found].rstrip(), self._rest[found + len(self._end_tag) :]
        elif is_final:
            text, self._rest = self._rest, ""
        else:
            size = ends_with_part_of(self._rest, self._end_tag)
            text = self._rest[: len(self._rest) - size].rstrip()
            self._rest = self._rest[len(text) :]
        if self._is_blank:
            shorter = text.lstrip()
            self._is_blank = not shorter
            text = shorter
        if found >= 0:
            self._state, self._is_blank = "outside", True
        return text

    def _answer(self, *, is_final: bool) -> str:
        text = self._rest.lstrip() if self._is_blank else self._rest
        self._rest = ""
        if self._answer_tags is not None and self._answer_state != "plain":
            text = self._untagged(text, self._answer_tags, is_final=is_final)
        self._is_blank = self._is_blank and not text
        return text

    def _untagged(self, text: str, tags: AnswerTags, *, is_final: bool) -> str:
        """Return the answer's text without its tags, as far as it is clear which text is none of them."""
        if self._answer_state == "start":
            if not is_final and tags.begin.startswith(text):
                self._rest = text
                return ""
            has_begin = text.startswith(tags.begin)  # the prompt may have it
            self._answer_state = "plain" if tags.needs_thoughts and not has_begin else "tagged"
            if has_begin:
                self._is_blank, text = True, text.removeprefix(tags.begin).lstrip()
        if self._answer_state == "plain":
            return text
        stripped = text.rstrip()
        has_end = stripped.endswith(tags.end)
        if is_final:
            return stripped.removesuffix(tags.end).rstrip() if has_end else text
        at = len(stripped) - len(tags.end) if has_end else len(text) - ends_with_part_of(text, tags.end)
        shown = text[:at].rstrip()
        self._rest = text[len(shown) :]
        return shown


class DraftReader:
    """Reads the thoughts of one choice, where it may call: calls among them are drafts, or its answer.

        <think> ... <tool_call>...</tool_call> so I will ... </think>   a draft: all of it is thought
        <think> ... <tool_call>...</tool_call>                          the thoughts ended before the call

    Models of several families forget the end of their thoughts, in long conversations most of all. What may be such an
    answer waits until something else follows it, so thoughts without calls come as they are written.
    """

    def __init__(self, syntax: Syntax) -> None:
        self._reader = CallReader(syntax)
        self._waiting = ""  # thoughts that are not told
        self._num_told = 0  # characters before it

    def push(self, text: str) -> str:
        """Take more thoughts; return those that are told by it."""
        self._waiting += text
        self._reader.push(text)
        return self._tell(len(self._waiting[: self._reader.num_clear - self._num_told].rstrip()))

    def end(self) -> tuple[str, str]:
        """Return the rest of thoughts that are at their end, and the answer that they end with."""
        self._reader.push("", is_final=True)
        if self._reader.calls_at is None:
            return self.release(), ""
        thoughts = self._tell(self._reader.calls_at - self._num_told)
        return thoughts.rstrip(), self.release()

    def release(self) -> str:
        """Return what waits: it is thought."""
        return self._tell(len(self._waiting))

    def _tell(self, size: int) -> str:
        told, self._waiting = self._waiting[:size], self._waiting[size:]
        self._num_told += size
        return told
