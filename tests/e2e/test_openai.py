"""What users ask of the API, with the unmodified `openai` client against one prefill and one decode worker.

`both` puts the same question whole and streamed and gives the answer only if the two say the same.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from kvferry.common.config import API_KEY_VARIABLE

from ..checkpoints import write_checkpoint
from .cluster import Cluster, serve, wait_until

MODEL = "tiny"
VOCAB_SIZE = 416  # as many as the tokenizer has: each id has bytes of its own
MAX_MODEL_LEN = 2048
BLOCK_SIZE = 16
EOS = 1
FLAGS = ("--served-model-name", MODEL, "--dtype", "float32", "--kv-cache-memory-bytes", "32MiB")
PROMPT = "The router places each request"
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where do blocks cross?"},
    {"role": "assistant", "content": "Between workers."},
    {"role": "user", "content": [{"type": "text", "text": "And when?"}]},
]
RANDOM: dict[str, Any] = {"temperature": 1.5, "seed": 11, "max_tokens": 16}


@dataclass
class Said:
    """One choice, put together from a whole answer or from chunks. Of logprobs: (token, logprob, its alternatives)."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    stop_reason: object = None
    logprobs: list[tuple[str, float | None, dict[str, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, choice: Any) -> None:
        """A choice of any of the four kinds that the client knows."""
        if hasattr(choice, "text"):
            self.text += choice.text
        else:
            self.text += (choice.delta if hasattr(choice, "delta") else choice.message).content or ""
        self.token_ids += getattr(choice, "token_ids", None) or []
        self.finish = choice.finish_reason or self.finish
        self.stop_reason = self.stop_reason or getattr(choice, "stop_reason", None)
        if choice.logprobs is not None:
            self._add_logprobs(choice.logprobs)

    def _add_logprobs(self, logprobs: Any) -> None:
        if hasattr(logprobs, "content"):
            for entry in logprobs.content:
                assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
                top = {bytes(other.bytes).hex(): other.logprob for other in entry.top_logprobs}
                self.logprobs.append((bytes(entry.bytes).hex(), entry.logprob, top))
            return
        self.offsets += logprobs.text_offset
        tops = [top or {} for top in logprobs.top_logprobs]
        self.logprobs += zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True)


def both(create: Any, **body: Any) -> list[Said]:
    """The choices of the same call made whole and streamed, which must agree in everything, usage included."""
    body = {"model": MODEL, "max_tokens": 12, "temperature": 0, **body}
    body["extra_body"] = {"return_token_ids": True, **body.get("extra_body", {})}
    whole = create(**body)
    told: dict[int, Said] = {}
    for choice in whole.choices:
        told.setdefault(choice.index, Said()).add(choice)
    chunks = list(create(**body, stream=True, stream_options={"include_usage": True}))
    streamed: dict[int, Said] = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None and len(chunk.choices) == 1
        assert chunk.id == chunks[0].id and chunk.model == MODEL
        streamed.setdefault(chunk.choices[0].index, Said()).add(chunk.choices[0])
    usage = chunks[-1].usage
    assert not chunks[-1].choices
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.prompt_tokens + whole.usage.completion_tokens,
    )
    assert list(told) == sorted(streamed)
    for index, said in told.items():
        _assert_same(streamed[index], said)
    assert whole.usage.completion_tokens == sum(len(said.token_ids) for said in told.values())
    return list(told.values())


def _assert_same(one: Said, other: Said) -> None:
    """The second call may have found the prompt in a cache: its log-probabilities are rounded otherwise."""
    assert (one.text, one.token_ids, one.finish, one.stop_reason) == (
        other.text,
        other.token_ids,
        other.finish,
        other.stop_reason,
    )
    assert one.offsets == other.offsets
    for (token, logprob, top), (other_token, other_logprob, other_top) in zip(
        one.logprobs, other.logprobs, strict=True
    ):
        assert token == other_token
        assert logprob == pytest.approx(other_logprob, abs=1e-4)
        assert top == pytest.approx(other_top, abs=1e-4)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / MODEL
    return write_checkpoint(path, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def cluster(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with serve(model_dir, tmp_path_factory.mktemp("logs") / "log", *FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.base_url}/v1", api_key="any", max_retries=0, timeout=240.0) as client:
        yield client


def _tokenize(cluster: Cluster, text: str) -> list[int]:
    tokens = cluster.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert isinstance(tokens, list)
    return tokens


def _text_of(cluster: Cluster, token_ids: Sequence[int]) -> str:
    return str(cluster.post("/detokenize", {"tokens": list(token_ids)})["prompt"])


def _ids(first: int, count: int) -> list[int]:
    """Prompts that share no block with those of other tests."""
    return [(first + 3 * i * i + i) % 400 + 4 for i in range(count)]


# --- models, prompts, echo --------------------------------------------------------------------------------


def test_the_model_is_listed_and_no_other(client: OpenAI) -> None:
    [model] = client.models.list()
    assert model.id == MODEL and model.object == "model"
    assert client.models.retrieve(MODEL).to_dict()["max_model_len"] == MAX_MODEL_LEN
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.completions.create(model="other", prompt=PROMPT),
        lambda: client.chat.completions.create(model="other", messages=MESSAGES),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found" and "other" in caught.value.message


def test_a_prompt_in_each_of_its_forms_gives_the_same_answer(client: OpenAI, cluster: Cluster) -> None:
    create = client.completions.create
    texts = [PROMPT, "Blocks of the cache", "Zwölf Boxkämpfer"]
    ids = [_tokenize(cluster, text) for text in texts]
    alone = [both(create, prompt=text)[0] for text in texts]
    assert len({said.text for said in alone}) == 3
    assert [both(create, prompt=prompt)[0] for prompt in ids] == alone
    assert both(create, prompt=texts) == alone
    assert both(create, prompt=ids) == alone
    for said in alone:
        assert said.finish == "length" and len(said.token_ids) == 12


def test_of_a_batch_each_prompt_has_its_n_choices_in_order(client: OpenAI) -> None:
    prompts = [PROMPT, "Blocks of the cache"]
    said = both(client.completions.create, prompt=prompts, n=2, **RANDOM)
    alone = [both(client.completions.create, prompt=prompt, n=2, **RANDOM) for prompt in prompts]
    assert said == [*alone[0], *alone[1]]
    assert len({choice.text for choice in said}) == 4


def test_echo_puts_the_prompt_before_the_answer(client: OpenAI, cluster: Cluster) -> None:
    [plain] = both(client.completions.create, prompt=PROMPT)
    for prompt in (PROMPT, _tokenize(cluster, PROMPT)):
        [said] = both(client.completions.create, prompt=prompt, echo=True)
        assert said.text == PROMPT + plain.text and said.token_ids == plain.token_ids
    only = client.completions.create(model=MODEL, prompt=PROMPT, echo=True, max_tokens=0)
    assert only.choices[0].text == PROMPT and only.choices[0].finish_reason == "length"
    assert only.usage is not None and only.usage.completion_tokens == 0


# --- log-probabilities ------------------------------------------------------------------------------------


def test_logprobs_of_prompt_and_answer_are_those_of_the_reference(
    client: OpenAI, cluster: Cluster, model_dir: Path
) -> None:
    prompt = _tokenize(cluster, PROMPT)
    [said] = both(client.completions.create, prompt=prompt, echo=True, logprobs=3)
    tokens = prompt + said.token_ids
    expected = _reference_logprobs(model_dir, tokens)
    assert len(said.logprobs) == len(tokens)
    assert said.logprobs[0][1] is None
    for position, (token, logprob, top) in enumerate(said.logprobs[1:], 1):
        assert logprob == pytest.approx(float(expected[position - 1, tokens[position]]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(expected[position - 1].max()), abs=1e-4)
        assert next(iter(top)) == token, "the chosen one comes first, and the best behind it"
        assert all(better >= worse for better, worse in pairwise(list(top.values())[1:]))
    scored = client.completions.create(model=MODEL, prompt=tokens, echo=True, logprobs=3, max_tokens=0).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs == pytest.approx([logprob for _, logprob, _ in said.logprobs], abs=1e-4)


def test_prompts_are_scored_in_a_batch_as_alone(client: OpenAI) -> None:
    """As evaluation harnesses ask: echo, with one token that nobody wants."""
    score: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1}
    prompts = [_ids(number, 5 + 40 * number) for number in range(3)]
    batch = both(client.completions.create, prompt=prompts, **score)
    for prompt, said in zip(prompts, batch, strict=True):
        assert len(said.logprobs) == len(prompt) + 1
        _assert_same(both(client.completions.create, prompt=prompt, **score)[0], said)
        assert all(logprob == top[token] for token, logprob, top in said.logprobs[1:] if "\ufffd" not in token)


@torch.inference_mode()
def _reference_logprobs(model_dir: Path, tokens: list[int]) -> torch.Tensor:
    """By `transformers`; row i is about what follows the tokens up to the i-th. [tokens, vocab]"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def test_logprobs_say_where_each_token_stands_in_the_text(client: OpenAI) -> None:
    for echo in (False, True):
        [said] = both(client.completions.create, prompt=PROMPT, logprobs=1, max_tokens=24, echo=echo)
        assert said.offsets[0] == 0 and said.offsets == sorted(said.offsets)
        for (token, _, _), start in zip(said.logprobs, said.offsets, strict=True):
            assert said.text.startswith(token, start) or "\ufffd" in token


def test_chat_logprobs_have_as_many_alternatives_as_asked_for(client: OpenAI) -> None:
    for count in (0, 1, 5, 20):
        [said] = both(client.chat.completions.create, messages=MESSAGES, logprobs=True, top_logprobs=count)
        assert len(said.logprobs) == len(said.token_ids) == 12
        for token, logprob, top in said.logprobs:
            assert len(top) == count
            assert list(top.values()) == sorted(top.values(), reverse=True)
            if count:  # greedy
                assert next(iter(top.items())) == (token, logprob)
    assert both(client.chat.completions.create, messages=MESSAGES)[0].logprobs == []


def test_prompt_logprobs_in_the_form_of_vllm(client: OpenAI, cluster: Cluster) -> None:
    prompt = _tokenize(cluster, PROMPT)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body={"prompt_logprobs": 2})
    entries: Any = answer.choices[0].to_dict()["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(prompt)
    for token_id, entry in zip(prompt[1:], entries[1:], strict=True):
        ranks = sorted(candidate["rank"] for candidate in entry.values())
        assert next(iter(entry)) == str(token_id), "its own comes first, whatever its rank"
        assert ranks[:2] == [1, 2] and ranks[2:] == [each for each in ranks if each > 2]


# --- sampling ---------------------------------------------------------------------------------------------


def test_a_seed_fixes_each_of_n_choices_whatever_else_is_running(client: OpenAI) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "n": 4, **RANDOM}
    choices = both(client.completions.create, **body)
    assert len({said.text for said in choices}) == 4
    assert both(client.completions.create, **body | {"n": 1}) == choices[:1]
    assert both(client.completions.create, **body | {"seed": 12})[0] != choices[0]

    async def among_others() -> list[str]:
        url = str(client.base_url)
        async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=240.0) as loaded:
            others = [
                loaded.completions.create(model=MODEL, prompt=_ids(number, 40), max_tokens=40, temperature=1.0)
                for number in range(12)
            ]
            mine = loaded.completions.create(model=MODEL, **body)
            answer, *_ = await asyncio.gather(mine, *others)
            return [choice.text for choice in answer.choices]

    assert asyncio.run(among_others()) == [said.text for said in choices]


def test_without_a_seed_answers_differ(client: OpenAI) -> None:
    answers = [client.completions.create(model=MODEL, prompt=PROMPT, temperature=1.5).choices[0].text for _ in range(3)]
    assert len(set(answers)) == 3


def test_a_colocated_cluster_with_a_key_draws_the_same_tokens(client: OpenAI, model_dir: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "n": 3, "logprobs": 2, **RANDOM}
    greedy = both(client.completions.create, prompt=PROMPT)
    drawn = both(client.completions.create, **body)
    with serve(model_dir, tmp_path / "log", *FLAGS, "--prefill", "0", env={API_KEY_VARIABLE: "secret"}) as colocated:
        with OpenAI(base_url=f"{colocated.base_url}/v1", api_key="secret", max_retries=0) as keyed:
            assert both(keyed.completions.create, prompt=PROMPT) == greedy
            for here, there in zip(both(keyed.completions.create, **body), drawn, strict=True):
                _assert_same(here, there)
            with pytest.raises(openai.AuthenticationError):
                keyed.with_options(api_key="wrong").completions.create(model=MODEL, prompt=PROMPT)


@pytest.mark.parametrize("narrow", [{"extra_body": {"top_k": 1}}, {"top_p": 0.001}, {"extra_body": {"min_p": 1.0}}])
def test_sampling_narrowed_to_the_best_token_is_greedy(client: OpenAI, narrow: dict[str, Any]) -> None:
    greedy = both(client.completions.create, prompt=PROMPT)
    assert both(client.completions.create, prompt=PROMPT, temperature=2.0, seed=1, **narrow) == greedy
    assert both(client.completions.create, prompt=PROMPT, temperature=2.0, seed=1) != greedy


def test_penalties_move_each_choice_by_as_much_as_they_say(client: OpenAI, cluster: Cluster) -> None:
    ask: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20, "max_tokens": 48}
    favoured = {letter: _tokenize(cluster, letter)[0] for letter in "HZ"}  # something to repeat
    bias = {letter.encode().hex(): 6.0 for letter in favoured}
    ask["logit_bias"] = {str(token_id): 6 for token_id in favoured.values()}
    [plain] = both(client.chat.completions.create, **ask)
    for presence, frequency in ((1.5, 0.0), (0.0, 1.0), (-1.0, -0.5)):
        [said] = both(client.chat.completions.create, **ask, presence_penalty=presence, frequency_penalty=frequency)
        assert said.token_ids != plain.token_ids
        counts: dict[str, int] = {}
        for token, logprob, top in said.logprobs:
            assert logprob is not None
            values = {other: value + bias.get(other, 0) for other, value in {**top, token: logprob}.items()}
            for other in values.keys() & counts.keys():
                values[other] -= presence + frequency * counts[other]
            assert token == max(values, key=values.__getitem__)
            counts[token] = counts.get(token, 0) + 1
    [said] = both(client.chat.completions.create, **ask, extra_body={"repetition_penalty": 10.0})
    assert len(set(said.token_ids)) == len(said.token_ids) and len(set(plain.token_ids)) < len(plain.token_ids)


def test_a_logit_bias_forces_and_forbids_tokens(client: OpenAI) -> None:
    [plain] = both(client.completions.create, prompt=PROMPT)
    wanted = 100
    assert wanted not in plain.token_ids
    [forced] = both(client.completions.create, prompt=PROMPT, logit_bias={str(wanted): 100})
    assert forced.token_ids == [wanted] * 12
    [forbidden] = both(client.completions.create, prompt=PROMPT, logit_bias={str(plain.token_ids[0]): -100})
    assert plain.token_ids[0] not in forbidden.token_ids and len(forbidden.token_ids) == 12


# --- where an answer ends ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A greedy answer in plain letters, and a stop string that begins in one of its tokens and ends in another."""

    prompt: list[int]
    said: Said
    stop: str
    before: str  # the text before the stop string's first place
    num_tokens: int  # until it is complete


@pytest.fixture(scope="module")
def known(client: OpenAI, cluster: Cluster) -> Known:
    for number in range(40):
        prompt = _ids(number, 20)
        [said] = both(client.completions.create, prompt=prompt, max_tokens=32)
        texts = [_text_of(cluster, [token_id]) for token_id in said.token_ids]
        for index in range(4, 32):
            pair = texts[index - 1], texts[index]
            if all(len(text) > 1 and text.isascii() for text in pair):
                stop = pair[0][-1] + pair[1][0]
                before, _, _ = said.text.partition(stop)
                if len(before) == len(_text_of(cluster, said.token_ids[: index - 1])) + len(pair[0]) - 1:
                    return Known(prompt, said, stop, before, index + 1)
    raise AssertionError("no answer has two tokens of two letters in a row")


def test_a_stop_string_across_tokens_ends_the_answer(client: OpenAI, known: Known) -> None:
    create = client.completions.create
    for stop in (known.stop, [known.stop, "never said"], [known.stop, known.said.text[-3:]]):
        [said] = both(create, prompt=known.prompt, max_tokens=32, stop=stop)
        assert (said.text, said.finish, said.stop_reason) == (known.before, "stop", known.stop)
        assert said.token_ids == known.said.token_ids[: known.num_tokens]  # usage counts these: see `both`
    [said] = both(
        create, prompt=known.prompt, max_tokens=32, stop=known.stop, extra_body={"include_stop_str_in_output": True}
    )
    assert said.text == known.before + known.stop
    [said] = both(create, prompt=known.prompt, max_tokens=32, stop=["never said", known.stop + "\x00"])
    assert (said.text, said.finish) == (known.said.text, "length")


def test_a_stop_string_ends_one_choice_and_not_the_others(client: OpenAI) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "n": 3, **RANDOM}
    free = both(client.completions.create, **body)
    stop = next(letter for letter in free[1].text[2:] if letter not in free[0].text + free[2].text)
    first, second, third = both(client.completions.create, **body, stop=stop)
    assert (first, third) == (free[0], free[2])
    assert second.text == free[1].text.partition(stop)[0] and second.finish == "stop"


def test_a_stop_token_ends_the_answer_and_is_counted_but_not_shown(client: OpenAI, known: Known) -> None:
    token_ids = known.said.token_ids
    stop = token_ids[6]
    end = token_ids.index(stop) + 1
    ask: dict[str, Any] = {"prompt": known.prompt, "max_tokens": 32}
    [said] = both(client.completions.create, **ask, extra_body={"stop_token_ids": [stop]})
    assert (said.token_ids, said.finish, said.stop_reason) == (token_ids[:end], "stop", stop)
    [longer] = both(
        client.completions.create, **ask, extra_body={"stop_token_ids": [stop], "include_stop_str_in_output": True}
    )
    assert longer.token_ids == said.token_ids
    assert longer.text.startswith(said.text) and known.said.text.startswith(longer.text.rstrip("\ufffd"))


def test_the_end_token_ends_unless_ignored_or_too_early(client: OpenAI) -> None:
    create = client.completions.create
    ask: dict[str, Any] = {"prompt": PROMPT, "logit_bias": {str(EOS): 100}}
    [said] = both(create, **ask)
    assert (said.text, said.token_ids, said.finish, said.stop_reason) == ("", [EOS], "stop", None)
    [said] = both(create, **ask, extra_body={"min_tokens": 5})
    assert len(said.token_ids) == 6 and said.token_ids.index(EOS) == 5 and said.finish == "stop"
    [said] = both(create, **ask, extra_body={"ignore_eos": True})
    assert (said.text, said.token_ids, said.finish) == ("", [EOS] * 12, "length")
    [said] = both(create, **ask, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert said.text == "<|eos|>" * 12


def test_the_most_tokens_by_default_and_by_either_name(client: OpenAI) -> None:
    [said] = both(client.completions.create, prompt=PROMPT, max_tokens=None, extra_body={"ignore_eos": True})
    assert (len(said.token_ids), said.finish) == (16, "length")
    for limit in ({"max_tokens": 5}, {"max_tokens": None, "max_completion_tokens": 5}):
        [said] = both(client.chat.completions.create, messages=MESSAGES, **limit)
        assert (len(said.token_ids), said.finish) == (5, "length")
    long = "long " * 400
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": long}], extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


# --- chat, tokens, usage ----------------------------------------------------------------------------------


def test_a_chat_is_the_completion_of_its_rendered_prompt(client: OpenAI, cluster: Cluster) -> None:
    [said] = both(client.chat.completions.create, messages=MESSAGES)
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].message.role == "assistant"
    prompt = answer.to_dict()["prompt_token_ids"]
    assert cluster.post("/tokenize", {"messages": MESSAGES})["tokens"] == prompt
    assert isinstance(prompt, list) and _text_of(cluster, prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhere do blocks cross?<|im_end|>\n"
        "<|im_start|>assistant\nBetween workers.<|im_end|>\n"
        "<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    [completed] = both(client.completions.create, prompt=prompt)
    assert (completed.text, completed.token_ids) == (said.text, said.token_ids)


def test_an_answer_can_be_continued(client: OpenAI) -> None:
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    [whole] = both(client.chat.completions.create, messages=MESSAGES)
    cut = next(n for n in range(1, 12) if "\ufffd" not in whole.text[:n])
    begun = [*MESSAGES, {"role": "assistant", "content": whole.text[:cut]}]
    [rest] = both(client.chat.completions.create, messages=begun, extra_body=extra)
    [echoed] = both(client.chat.completions.create, messages=begun, extra_body={**extra, "echo": True})
    assert rest.text and echoed.text == whole.text[:cut] + rest.text


def test_labels_of_the_caller_and_a_priority_leave_the_answer_as_it_is(client: OpenAI) -> None:
    labels: dict[str, Any] = {"user": "me", "metadata": {"run": "1"}, "store": False, "service_tier": "auto"}
    labels["extra_body"] = {"priority": -3, "request_id": "mine"}
    plain = both(client.chat.completions.create, messages=MESSAGES)
    assert both(client.chat.completions.create, messages=MESSAGES, **labels) == plain


def test_the_cached_part_of_a_repeated_prompt_is_in_the_usage(client: OpenAI) -> None:
    prompt = _ids(77, 100)

    def cached(**extra: object) -> int:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, extra_body=extra)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens == 100
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() == 100 // BLOCK_SIZE * BLOCK_SIZE
    assert cached(cache_salt="another tenant") == 0


def test_text_survives_tokenizing_and_back(cluster: Cluster) -> None:
    for text in (PROMPT, "Zwölf Boxkämpfer\n\t<|eos|> 日本語 🚢", ""):
        body = cluster.post("/tokenize", {"prompt": text, "return_token_strs": True})
        tokens, strings = body["tokens"], body["token_strs"]
        assert isinstance(tokens, list) and isinstance(strings, list)
        assert body["count"] == len(tokens) == len(strings) and body["max_model_len"] == MAX_MODEL_LEN
        assert len(set(strings)) == len(set(tokens)), "no two tokens are spelt alike"
        assert _text_of(cluster, tokens) == text


# --- refusals ---------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", TOOL),
        ("tool_choice", "sometimes"),
        ("response_format", "json"),
        ("functions", [TOOL["function"]]),
        ("reasoning_effort", "most"),
        ("modalities", ["text", "audio"]),
        ("structured_outputs", {}),
        ("no_such_field", 1),
        ("temperature", -1),
        ("top_p", 0),
        ("n", 0),
        ("logit_bias", {"99999": 1}),
        ("top_logprobs", 3),
        ("seed", "1"),
    ],
)
def test_what_is_not_supported_or_wrong_is_refused_by_name(client: OpenAI, name: str, value: object) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream, extra_body={name: value})
        assert caught.value.param == name and name in caught.value.message
        assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("best_of", 0), ("prompt", []), ("logprobs", 21)])
def test_of_a_completion_too(client: OpenAI, name: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, extra_body={name: value})
    assert caught.value.param == name and name in caught.value.message


def test_content_that_is_not_text_is_refused(client: OpenAI) -> None:
    image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [image]}])
    assert caught.value.code == "unsupported_content" and "image_url" in caught.value.message


def test_what_does_not_fit_into_the_context_is_refused_with_the_numbers(client: OpenAI) -> None:
    for prompt, max_tokens in ((_ids(1, MAX_MODEL_LEN), 1), (_ids(1, 9), MAX_MODEL_LEN + 1), ("x" * 200_000, 1)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens)
        assert caught.value.code == "context_length_exceeded" and str(MAX_MODEL_LEN) in caught.value.message


def test_an_answer_that_may_be_longer_than_the_context_ends_with_it(client: OpenAI) -> None:
    ignores: Any = {"extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model=MODEL, prompt=_ids(1, 2000), max_tokens=MAX_MODEL_LEN, **ignores)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == MAX_MODEL_LEN


# --- clients that leave -----------------------------------------------------------------------------------


def _assert_nothing_is_held(cluster: Cluster) -> None:
    def is_idle() -> bool:
        held = sum(cluster.metric("kvferry_blocks", f'state="{state}"') for state in ("active", "granted"))
        return held == 0 == cluster.metric("kvferry_in_flight_requests") + cluster.metric("kvferry_queued_requests")

    wait_until(is_idle, "idleness")
    # On a machine that is too busy to renew a lease a block may have to wait for its writer's end.
    wait_until(lambda: cluster.metric("kvferry_blocks", 'state="quarantined"') == 0, "no block in quarantine")


def _num_left(cluster: Cluster) -> float:
    """Calls whose clients did not wait for the end."""
    text = cluster.client.get("/metrics").text
    counts = [line.split()[1] for line in text.splitlines() if line.startswith('kvferry_requests_total{code="499"}')]
    return float(counts[0]) if counts else 0.0


ENDLESS: dict[str, Any] = {"model": MODEL, "max_tokens": 1900, "n": 2, "extra_body": {"ignore_eos": True}}


def test_a_stream_that_its_client_closes_gives_everything_back(client: OpenAI, cluster: Cluster) -> None:
    before = _num_left(cluster)
    with client.completions.create(prompt=[_ids(5, 100), _ids(6, 30)], stream=True, **ENDLESS) as stream:
        for _ in stream:  # long enough for a heartbeat that shows the blocks
            if cluster.metric("kvferry_blocks", 'state="active"') > 0:
                break
        assert cluster.metric("kvferry_in_flight_requests") == 1
    wait_until(lambda: _num_left(cluster) == before + 1, "the client that left")
    _assert_nothing_is_held(cluster)


async def test_whole_answers_whose_clients_leave_give_everything_back(cluster: Cluster) -> None:
    """Most while their prompts wait, are computed or handed over; one while it decodes."""
    async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="any", max_retries=0, timeout=240.0) as client:
        before = _num_left(cluster)
        tasks = [
            asyncio.create_task(client.completions.create(prompt=_ids(number, 140), **ENDLESS)) for number in range(6)
        ]

        async def until(sample: str) -> None:
            while not re.search(sample, await client.get(f"{cluster.base_url}/metrics", cast_to=str)):
                assert not tasks[0].done()

        await until("kvferry_in_flight_requests 6.0")
        for task in tasks[1:]:
            task.cancel()
        await until("kvferry_in_flight_requests 1.0")
        await until('kvferry_blocks{pool="decode",state="active",.*} [1-9]')
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await asyncio.to_thread(_assert_nothing_is_held, cluster)
    assert _num_left(cluster) == before + 6


# --- the stream itself ------------------------------------------------------------------------------------


async def test_many_streams_at_once_are_each_whole(client: OpenAI, cluster: Cluster) -> None:
    prompts = [_ids(number, 10 + 7 * number) for number in range(24)]
    alone = client.completions.create(model=MODEL, prompt=prompts, max_tokens=24, temperature=0)
    async with AsyncOpenAI(base_url=f"{cluster.base_url}/v1", api_key="any", max_retries=0, timeout=240.0) as loaded:

        async def read(prompt: list[int]) -> str:
            stream = await loaded.completions.create(
                model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(read, prompts))
    assert list(texts) == [choice.text for choice in alone.choices]


def test_usage_can_come_with_every_chunk(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 8


def test_the_client_sees_request_ids_and_timings(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert {"queue", "prefill", "ttft", "total"} <= {
        entry.split(";")[0].strip() for entry in raw.headers["server-timing"].split(",")
    }
    assert json.loads(raw.text)["id"].startswith("cmpl-")


# --- tools, and the other surfaces of a chat ----------------------------------------------------------------


def test_a_chat_with_tools_says_the_same_whole_and_streamed(client: OpenAI) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "left"}'}}
    history = [*MESSAGES, {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "tool_call_id": "call_1"}]
    history[-1]["content"] = "a wall"
    (bare,) = both(client.chat.completions.create, messages=history)
    (told,) = both(client.chat.completions.create, messages=history, extra_body={"tools": [TOOL]})
    (not_told,) = both(
        client.chat.completions.create, messages=history, extra_body={"tools": [TOOL], "tool_choice": "none"}
    )
    assert not_told.token_ids == bare.token_ids
    assert told.token_ids != bare.token_ids  # the model was told of them


def test_a_call_that_must_come_follows_its_schema(client: OpenAI) -> None:
    sides = {"type": "string", "enum": ["left", "right"]}
    parameters = {
        "type": "object",
        "properties": {"where": sides},
        "required": ["where"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    named = {"type": "function", "function": {"name": "look"}}
    for choice in ("required", named):
        asked: Any = {**RANDOM, "model": MODEL, "messages": MESSAGES, "max_tokens": 400, "tools": tools}
        asked |= {"tool_choice": choice, "parallel_tool_calls": False}
        whole = client.chat.completions.create(**asked).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        (call,) = whole.message.tool_calls
        assert call.function.name == "look" and json.loads(call.function.arguments)["where"] in sides["enum"]
        with client.chat.completions.stream(**asked) as stream:
            streamed: Any = stream.get_final_completion().choices[0].message
        (other,) = streamed.tool_calls
        assert (other.id, other.function.arguments) == (call.id, call.function.arguments)


def test_responses_and_messages_are_chats(client: OpenAI, cluster: Cluster) -> None:
    asked: Any = {"model": MODEL, "temperature": 0}
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(messages=messages, max_tokens=12, **asked)
    text, usage = chat.choices[0].message.content, chat.usage
    assert usage is not None

    response = client.responses.create(input=PROMPT, max_output_tokens=12, **asked)
    assert (response.output_text, response.status) == (text, "incomplete")
    assert response.usage is not None and response.usage.input_tokens == usage.prompt_tokens
    with client.responses.stream(input=PROMPT, max_output_tokens=12, **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text
    more = client.responses.create(input="And then?", previous_response_id=response.id, max_output_tokens=12, **asked)
    said = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
    again = client.chat.completions.create(messages=said, max_tokens=12, **asked)
    assert more.output_text == again.choices[0].message.content

    body = {**asked, "messages": messages, "max_tokens": 12}
    message: Any = cluster.post("/v1/messages", body)
    assert message["content"] == [{"type": "text", "text": text}] and message["stop_reason"] == "max_tokens"
    assert sum(message["usage"].values()) == usage.total_tokens
    streamed = cluster.client.post("/v1/messages", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert "".join(event["delta"].get("text", "") for event in events if "delta" in event) == text
    assert events[-1] == {"type": "message_stop"}
    counted = cluster.post("/v1/messages/count_tokens", {"model": MODEL, "messages": messages})
    assert counted == {"input_tokens": usage.prompt_tokens}
