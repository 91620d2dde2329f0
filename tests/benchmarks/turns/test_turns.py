import pytest

from kvferry.benchmarks.turns.turns import Conversation, Turn, bars_of


def _turn(ttft_s: float, prefill: str, decode: str, cached: int = 0) -> Turn:
    return Turn(ttft_s, 2000, cached, prefill, decode)


def _conversation(prefill: str, decode: str) -> Conversation:
    return Conversation(_turn(1.0, "p-0", "d-0"), _turn(0.3, prefill, decode, 1800), _turn(1.1, "p-0", "d-0"))


@pytest.mark.parametrize(
    ("prefill", "decode", "place"),
    [
        ("-", "d-0", "where the first turn was decoded"),
        ("p-0", "d-0", "where the first turn was prefilled"),
        ("p-1", "d-0", "on another worker"),
        ("-", "d-1", "on another worker"),
    ],
)
def test_the_second_turn_is_placed_by_the_first_ones_workers(prefill: str, decode: str, place: str) -> None:
    assert _conversation(prefill, decode).place == place


def test_the_ratio_of_the_turns_is_held_to_the_bar() -> None:
    bars = {bar.what: bar for bar in bars_of("1+1", [_conversation("-", "d-0")] * 3)}
    ratio = bars["1+1: TTFT of the second turn / first, p50"]
    assert ratio.value == pytest.approx(0.3) and ratio.is_met
    assert bars["1+1: of the second prompt cached, p50"].value == 90.0
    assert bars["1+1: second prompts computed where the first turn was decoded"].value == 3
