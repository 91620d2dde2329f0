"""A plain answer's middle pours out by itself; its beginning, its end and all that is not plain goes to who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvferry.common.request import SamplingParams
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.api.answer import Answer, PromptText
from kvferry.router.api.choice import ChoiceText, TextOptions
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.results import ChoiceTokens

from ..fakes import ids_of, token, write_model_dir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_model_dir(tmp_path_factory.mktemp("toy") / "model"))


class Gaps:
    def __init__(self) -> None:
        self.num = 0

    def on_token_gap(self, gap_s: float) -> None:
        self.num += 1


@dataclass
class FakeFastWriter:
    """A fast writer that a test looks at. The turn ends when the test says so."""

    is_full: bool = False
    texts: list[str] = field(default_factory=list)
    calls: list[Callable[[], None]] = field(default_factory=list)

    def before_end(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def write(self, text: str) -> None:
        self.texts.append(text)

    def end_turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Scene:
    """One request whose tokens a test sends, and whoever reads its answer."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions | None = None, n: int = 1) -> None:
        self.request = RouterRequest("r-0", ids_of("hi"), SamplingParams(max_tokens=100), n=n)
        self.stream = TokenStream(self.request, lambda: None, lambda choice: None)
        self.gaps = Gaps()
        self.answer = Answer(
            [self.stream],
            [PromptText(ids_of("hi"))],
            options if options is not None else TextOptions(max_tokens=100),
            tokenizer,
            clock=FakeClock(),
            observer=self.gaps,
        )
        self.fast_writer = FakeFastWriter()
        self.told: list[str] = []

    def send(self, text: str | bytes, finish: str | None = None, choice: int = 0) -> None:
        state = self.request.choices[choice]
        ids = list(text if isinstance(text, bytes) else text.encode())
        state.accept(ChoiceTokens(choice, len(state.tokens), tuple(token(one) for one in ids), finish))
        self.stream.wake()

    async def read(self) -> None:
        while pieces := await self.answer.next():
            self.told += [piece.text for _, piece in pieces]
            self.answer.write_to(self.fast_writer)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def begun(scene: Scene) -> asyncio.Task[None]:
    """Its first piece was told, and the reader waits."""
    task = asyncio.create_task(scene.read())
    await turns()
    scene.send("a")
    await turns()
    assert scene.told == ["a"]
    return task


async def test_the_middle_of_a_plain_answer_pours_once_a_turn_and_wakes_nobody(tokenizer: Tokenizer) -> None:
    scene = Scene(tokenizer)
    reader = await begun(scene)
    scene.send("b")
    scene.send("c")
    await turns()
    assert (scene.told, scene.fast_writer.texts, len(scene.fast_writer.calls)) == (["a"], [], 1)
    scene.fast_writer.end_turn()
    scene.send("d")
    scene.fast_writer.end_turn()
    assert scene.fast_writer.texts == ["bc", "d"]
    scene.send("e", "length")
    scene.fast_writer.end_turn()
    await reader
    assert scene.told == ["a", "e"]
    assert scene.answer.choices[0].num_tokens == 5 and scene.gaps.num == 3


async def test_half_a_character_waits_for_its_rest(tokenizer: Tokenizer) -> None:
    scene = Scene(tokenizer)
    reader = await begun(scene)
    for part in (b"\xe2", b"\x82", b"\xac"):
        scene.send(part)
        scene.fast_writer.end_turn()
    assert scene.fast_writer.texts == ["\u20ac"]
    scene.send("", "length")
    scene.fast_writer.end_turn()
    await reader
    assert scene.told == ["a", ""]


async def test_a_full_connection_is_left_to_who_waits_for_it(tokenizer: Tokenizer) -> None:
    scene = Scene(tokenizer)
    reader = await begun(scene)
    scene.fast_writer.is_full = True
    scene.send("b")
    scene.fast_writer.end_turn()
    await turns()
    assert (scene.told, scene.fast_writer.texts) == (["a", "b"], [])
    scene.fast_writer.is_full = False
    scene.send("c")
    scene.fast_writer.end_turn()
    assert scene.fast_writer.texts == ["c"]
    reader.cancel()


async def test_a_failure_comes_after_what_was_there_before_it(tokenizer: Tokenizer) -> None:
    scene = Scene(tokenizer)
    reader = await begun(scene)
    scene.send("b")
    scene.stream.fail(StreamError("lost", "worker_lost", 503))
    scene.fast_writer.end_turn()
    with pytest.raises(StreamError, match="lost"):
        await reader
    assert (scene.told, scene.fast_writer.texts) == (["a", "b"], [])


async def test_what_cannot_be_shown_fails_its_reader_and_not_the_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tokenizer)
    reader = await begun(scene)

    def broken(*_: object) -> None:
        raise LookupError("no such token")

    monkeypatch.setattr(ChoiceText, "push", broken)
    scene.send("b")
    scene.fast_writer.end_turn()
    with pytest.raises(LookupError):
        await reader


@pytest.mark.parametrize(
    ("options", "n"),
    [(TextOptions(stops=("zz",), max_tokens=9), 1), (TextOptions(keep_tokens=True, max_tokens=9), 1), (None, 2)],
    ids=["stop strings", "logprobs", "two choices"],
)
async def test_an_answer_that_is_not_plain_never_pours(
    tokenizer: Tokenizer, options: TextOptions | None, n: int
) -> None:
    scene = Scene(tokenizer, options, n)
    reader = await begun(scene)
    scene.send("b")
    await turns()
    assert (scene.told, scene.fast_writer.calls) == (["a", "b"], [])
    reader.cancel()


async def test_others_have_their_turn_while_what_has_piled_up_is_told(tokenizer: Tokenizer) -> None:
    scene, told, num_turns = Scene(tokenizer), list[tuple[int, int]](), 0

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(take_turns())
    scene.send("x" * 100, "length")
    async with asyncio.timeout(30):
        while pieces := await scene.answer.next():
            told.append((sum(len(piece.text) for _, piece in pieces), num_turns))
    other.cancel()
    assert told == [(64, 0), (36, 1)]
