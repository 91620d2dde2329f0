"""`best_of` and `suffix` of /v1/completions over a scripted dispatcher."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.request import SampledToken
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.catalogue.infill import InfillForm
from kvferry.router.state.request import RouterRequest

from . import fakes
from .fakes import MODEL, Script, Served, ids_of, serve

LOGPROBS = {"0": -3.0, "1": -1.0, "2": -2.0}  # of the last character of each choice; -0.5 of all others


@pytest.fixture(autouse=True)
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fakes.token

    def token(token_id: int, num_top: int | None = None) -> SampledToken:
        found = plain(token_id, num_top)
        logprob = LOGPROBS.get(chr(token_id)) if token_id < 128 else None
        return found if num_top is None or logprob is None else SampledToken(token_id, logprob, found.top)

    monkeypatch.setattr(fakes, "token", token)


async def complete(served: Served, **body: Any) -> dict[str, Any]:
    async with served.client() as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "p", "max_tokens": 40, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


async def test_the_likeliest_by_the_token_are_shown_and_all_are_counted() -> None:
    served = serve(Script("x", numbered=True))
    answer = await complete(served, best_of=3)
    assert served.request.n == 3 and served.request.sampling.logprobs == 0
    assert [(each["index"], each["text"], each["logprobs"]) for each in answer["choices"]] == [(0, "x1", None)]
    assert "token_ids" not in answer["choices"][0]
    assert answer["usage"]["completion_tokens"] == 9
    answer = await complete(served, best_of=3, n=2, logprobs=1, prompt=["p", "q"])
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [(0, "x1"), (1, "x2"), (2, "x1"), (3, "x2")]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [-0.5, -2.0, -0.5]


async def test_as_many_as_are_shown_keep_their_order() -> None:
    served = serve(Script("x", numbered=True))
    answer = await complete(served, best_of=3, n=3)
    assert [each["text"] for each in answer["choices"]] == ["x0", "x1", "x2"]
    assert served.request.sampling.logprobs is None


async def test_a_suffix_makes_a_prompt_of_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    form = InfillForm(250, 251, 252, (250, 251, 252, 253))
    requests: list[RouterRequest] = []
    served = serve(Script("mid"))
    with monkeypatch.context() as patch:
        patch.setattr(
            InfillForm, "of", classmethod(lambda cls, tokenizer: form if isinstance(tokenizer, Tokenizer) else None)
        )
        answer = await complete(served, suffix="end", stop_token_ids=[7])
        requests.append(served.request)
        answer_of_ids = await complete(served, prompt=[[1, 2], [3]], suffix="end")
    assert list(requests[0].prompt_token_ids) == [250, *ids_of("p"), 251, *ids_of("end"), 252]
    assert requests[0].sampling.stop_token_ids == (7, 250, 251, 252, 253)
    assert answer["choices"][0]["text"] == "mid" and len(answer_of_ids["choices"]) == 2
    assert [list(each.prompt_token_ids)[1:-5] for each in served.dispatcher.requests[1:]] == [[1, 2], [3]]


async def test_a_model_without_such_tokens_says_so() -> None:
    async with serve().client() as client:
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "p", "suffix": "x"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
        assert "the model 'toy' has no tokens for filling in a middle" in error["message"]
        same = await client.post("/v1/completions", json={"model": MODEL, "prompt": "p", "suffix": ""})
        assert same.status_code == 200
