"""Bodies: what is accepted, what is refused and how the refusal reads, what workers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from kvferry.common.errors import ConfigError, RequestError
from kvferry.router.bodies.chat_messages import parse_messages, without_cache_hints
from kvferry.router.bodies.fields import IGNORED, UNSUPPORTED
from kvferry.router.bodies.schemas import ChatBody, CompletionBody, validate
from kvferry.router.bodies.text_bodies import DetokenizeBody, TokenizeBody
from kvferry.router.catalogue.defaults import SamplingDefaults
from kvferry.router.responses.tools import ResponseTools
from kvferry.router.responses.translate import chat_body

MESSAGES = [{"role": "user", "content": "hi"}]


def _calling(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


def _completion(**fields: Any) -> CompletionBody:
    return validate(CompletionBody, {"prompt": "hi", **fields})


def _chat(**fields: Any) -> ChatBody:
    return validate(ChatBody, {"messages": MESSAGES, **fields})


def _refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _completion(**fields)
    return caught.value


def _chat_refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _chat(**fields)
    return caught.value


@pytest.mark.parametrize("prompt", ["a", "", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
def test_a_prompt_has_four_forms(prompt: object) -> None:
    assert _completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", [None, 1, [], [[]], [1, "a"], [[1], "a"], [[1.0]], [True], {}, [None], ["a"] * 257])
def test_other_prompts_are_refused(prompt: object) -> None:
    assert _refusal(prompt=prompt).param == "prompt"


def test_null_means_not_given_for_every_field() -> None:
    kinds: list[tuple[Any, dict[str, Any]]] = [(CompletionBody, {"prompt": "hi"}), (ChatBody, {"messages": MESSAGES})]
    for kind, required in kinds:
        names = [*kind.model_fields, *UNSUPPORTED, *IGNORED]
        body: dict[str, Any] = {name: None for name in names if name not in required}
        assert validate(kind, {**body, **required}) == validate(kind, dict(required))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 17), ("n", "2"), ("n", 1.5), ("n", True),
        ("stop", ""), ("stop", ["a"] * 65), ("stop", "x" * 257), ("stop", [1]), ("stop", 5),
        ("seed", 2**63), ("seed", "1"),
        ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", 0),
        ("temperature", -0.1), ("temperature", 1e400), ("temperature", "1"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.1),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("logit_bias", {"1": 101}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {str(i): 1 for i in range(301)}), ("logit_bias", [1]),
        ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", 21), ("prompt_logprobs", -1),
        ("top_k", -2), ("min_p", 1.1), ("repetition_penalty", 0), ("min_tokens", -1),
        ("stop_token_ids", [-1]), ("stop_token_ids", list(range(65))), ("stop_token_ids", ["1"]),
        ("bad_words", "a"), ("bad_words", [""]), ("bad_words", ["  "]), ("bad_words", [1]), ("bad_words", ["x" * 65]),
        ("bad_words", ["x"] * 129), ("allowed_token_ids", []), ("allowed_token_ids", "1"), ("allowed_token_ids", [-1]),
        ("ignore_eos", 1), ("stream", "true"), ("echo", "yes"), ("stream_options", {}),
        ("priority", 2**31), ("cache_salt", ""), ("cache_salt", "x" * 257),
        ("best_of", 0), ("best_of", 17), ("suffix", 1), ("model", 7),
    ],
)  # fmt: skip
def test_a_value_out_of_its_bounds_is_refused_by_name(field: str, value: object) -> None:
    error = _refusal(**{field: value})
    assert error.status == 400
    assert error.param is not None and error.param.split(".")[0] == field
    assert field in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 5), ("top_logprobs", 2), ("top_logprobs", 21), ("max_tokens", 0), ("max_completion_tokens", 0),
        ("chat_template_kwargs", ["x"]), ("chat_template_kwargs", {"thinking": [[[[[[[[[]]]]]]]]]}),
        ("chat_template_kwargs", {"thinking": "x" * 16_385}), ("chat_template_kwargs", {"a": {"b": [1_000_001]}}),
        ("chat_template_kwargs", {f"v{index}": 1 for index in range(17)}), ("add_generation_prompt", 1),
        ("documents", "x"), ("documents", ["x"]), ("documents", [{}] * 257),
    ],
)  # fmt: skip
def test_a_chats_own_fields_are_checked_too(field: str, value: object) -> None:
    error = _chat_refusal(**{field: value})
    assert error.param is not None and error.param.split(".")[0] == field


def test_a_refusal_says_the_rule_and_what_was_seen() -> None:
    assert str(_refusal(n=17)) == "'n' should be less than or equal to 16, got 17"
    assert str(_refusal(stop=["a"] * 65)) == "'stop': at most 64 stop strings, got 65"
    assert len(str(_refusal(temperature="x" * 10_000))) < 200


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="'prompt' is required") as caught:
        validate(CompletionBody, {})
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_required_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]), ("guided_whitespace_pattern", " "), ("audio", {}),
        ("modalities", ["audio"]), ("logits_processors", ["x"]), ("use_beam_search", True),
        ("kv_transfer_params", {}), ("length_penalty", 2.0),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    for error in (_refusal(**{field: value}), _chat_refusal(**{field: value})):
        assert (error.param, error.code) == (field, "unsupported_parameter")
        assert f"'{field}' is not supported" in str(error)


@pytest.mark.parametrize(("field", "value"), [("tools", [{"type": "function"}]), ("tool_choice", "auto")])
def test_completions_have_no_tools(field: str, value: object) -> None:
    error = _refusal(**{field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "text"}), ("tool_choice", "none"), ("tools", []), ("user", "me"),
        ("metadata", {"a": "b"}), ("store", True), ("service_tier", "flex"), ("use_beam_search", False),
        ("prediction", {"type": "content", "content": "x"}), ("guided_decoding_backend", "xgrammar"),
        ("spaces_between_special_tokens", False), ("parallel_tool_calls", True), ("length_penalty", 1),
        ("modalities", ["text"]), ("best_of", 1),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted(field: str, value: object) -> None:
    _completion(**{field: value})


@pytest.mark.parametrize(
    ("kind", "params"), [(ChatBody, CompletionCreateParamsNonStreaming), (CompletionBody, completion_create_params)]
)
def test_every_field_of_openais_is_known_here_or_refused_by_name(kind: Any, params: Any) -> None:
    params = getattr(params, "CompletionCreateParamsBase", params)
    names = set(params.__annotations__) | set(getattr(params, "__required_keys__", ())) | {"stream"}
    names |= set(getattr(params, "__optional_keys__", ()))
    assert not names - set(kind.model_fields) - set(UNSUPPORTED) - IGNORED


def test_every_field_of_responses_is_known_or_refused_by_name() -> None:
    names = {*ResponseCreateParamsBase.__required_keys__, *ResponseCreateParamsBase.__optional_keys__, "stream"}
    for name in names:
        try:
            chat_body({"input": "hi", name: "x"}, None, (), ResponseTools())
        except RequestError as error:
            assert error.code != "unknown_parameter", name


def test_what_is_ignored_or_unsupported_is_so_for_some_endpoint() -> None:
    assert not IGNORED & UNSUPPORTED.keys()
    both = set(ChatBody.model_fields) & set(CompletionBody.model_fields)
    assert not both & UNSUPPORTED.keys()
    assert both & IGNORED <= {"user"}  # it names whose share of the service this is


def test_unknown_fields_can_be_collected_instead() -> None:
    ignored: list[str] = []
    body = validate(ChatBody, {"messages": MESSAGES, "temprature": 1, "x": 0, "y": None, "user": "me"}, ignored)
    assert (body.temperature, ignored) == (None, ["temprature", "x"])
    with pytest.raises(RequestError, match="'suffix' is not supported"):
        validate(ChatBody, {"messages": MESSAGES, "suffix": "x"}, [])


@pytest.mark.parametrize(
    ("typo", "right"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("usr", "user")]
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(typo: str, right: str) -> None:
    error = _refusal(**{typo: 1})
    assert error.code == "unknown_parameter"
    assert str(error) == f"unknown field '{typo}'; did you mean '{right}'?"


def test_options_of_a_stream_are_fields_like_others() -> None:
    for padded in (True, False):
        assert _chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": padded}).stream_options
    wrong: list[dict[str, Any]] = [{"include_obfuscation": 5}, {"include_usge": True}]
    refusals = [_refusal(stream=True, stream_options=options) for options in wrong]
    assert [each.param for each in refusals] == ["stream_options.include_obfuscation", "stream_options.include_usge"]
    assert str(refusals[1]).endswith("did you mean 'include_usage'?")
    ignored: list[str] = []
    validate(CompletionBody, {"prompt": "hi", "stream": True, "stream_options": {"include_usge": True}}, ignored)
    assert ignored == ["stream_options.include_usge"]


def test_a_whole_number_may_be_written_as_a_float() -> None:
    body = _chat(max_tokens=5.0, top_k=40.0, n=1.0, seed=7.0, min_tokens=1e0, priority=-2.0, top_logprobs=0.0)
    whole = (body.max_tokens, body.top_k, body.n, body.seed, body.min_tokens, body.priority)
    assert whole == (5, 40, 1, 7, 1, -2) and all(type(number) is int for number in whole)
    assert (_chat(temperature=1.0, top_p=1.0).temperature, _completion(logprobs=2.0).logprobs) == (1, 2)
    assert str(_refusal(top_k=2.0**70)).startswith("'top_k' should")
    assert _refusal(n=True).param == _refusal(n="1.0").param == "n"


def test_more_than_xhigh_is_xhigh() -> None:
    assert _chat(reasoning_effort="max").reasoning_effort == "xhigh"
    assert _chat_refusal(reasoning_effort="most").param == "reasoning_effort"


def test_a_temperature_may_be_any() -> None:
    assert _sampling(_completion(temperature=5)).temperature == 5
    assert _sampling(_completion(temperature=1e300)).temperature == 1e9  # more would be infinite in float32


def test_hints_to_a_cache_are_no_part_of_a_message() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "hi", **hint}
    (message,) = parse_messages([{"role": "user", "id": "m-1", **hint, "content": [part]}])
    assert message == {"role": "user", "content": "hi"}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"cache_control": {}}}}
    tool = {"type": "function", "function": function}
    assert without_cache_hints([{**tool, **hint, "function": {**function, **hint}}, 5]) == [tool, 5]


def test_an_endless_field_name_does_not_come_back_whole() -> None:
    error = _refusal(**{"x" * 10_000 + "\r\n": 1})
    assert len(str(error)) < 200 and "\n" not in str(error)


def test_rules_between_fields() -> None:
    assert _refusal(stream_options={"include_usage": True}).param == "stream_options"
    assert _refusal(stream=True, prompt_logprobs=1).param == "prompt_logprobs"
    assert _refusal(n=3, best_of=2).param == "best_of"
    assert _refusal(n=2, best_of=3, stream=True).param == "best_of"
    assert _refusal(suffix="x", echo=True).param == "echo"
    assert _chat_refusal(suffix="x").code == "unsupported_parameter"
    assert _chat_refusal(top_logprobs=2, logprobs=False).param == "top_logprobs"
    assert _chat(top_logprobs=0).num_logprobs is None  # what OpenAI's clients send for none
    assert _chat_refusal(continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"
    assert _chat_refusal(max_tokens=0).param == _refusal(max_tokens=0).param == "max_tokens"
    _completion(max_tokens=0, echo=True)


def test_of_two_limits_the_newer_name_holds() -> None:
    for body in (_chat(max_tokens=2, max_completion_tokens=3), _completion(max_tokens=0, max_completion_tokens=3)):
        assert body.asked_max_tokens == body.wanted_tokens == 3


def _sampling(body: CompletionBody | ChatBody, defaults: SamplingDefaults | None = None) -> Any:
    return body.sampling(defaults or SamplingDefaults(), seed=7, max_tokens=20, vocab_size=1000)


def test_every_sampling_field_reaches_the_workers() -> None:
    body = _completion(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.1, logit_bias={"5": -100, "6": 2.5}, min_tokens=3, stop_token_ids=[9], ignore_eos=True,
        logprobs=2, prompt_logprobs=4, seed=-2,
    )  # fmt: skip
    sampling = _sampling(body)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.2, 0.3, 1.1)
    assert sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert (sampling.min_tokens, sampling.max_tokens, sampling.stop_token_ids) == (3, 20, (9,))
    assert (sampling.ignore_eos, sampling.logprobs, sampling.prompt_logprobs) == (True, 2, 4)
    assert sampling.seed == 2**63 - 2


def test_a_seed_of_minus_one_is_none() -> None:
    for body in (_completion(seed=-1), _chat(seed=-1), _completion(seed=None), _completion()):
        assert _sampling(body).seed == 7
    assert _sampling(_completion(seed=0)).seed == 0


def test_what_is_not_given_comes_from_the_models_defaults_then_from_openais() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05)
    assert _sampling(_completion(), defaults).temperature == 0.6
    assert _sampling(_completion(temperature=0), defaults).temperature == 0
    assert _sampling(_completion(top_k=-1), defaults).top_k == 0
    assert _sampling(_completion(), defaults).repetition_penalty == 1.05
    assert _sampling(_completion()).temperature == 1.0
    assert _sampling(_completion()).seed == 7


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    for fields in ({"logit_bias": {"1000": 1}}, {"stop_token_ids": [1000]}):
        with pytest.raises(RequestError, match="1000 is not below the vocabulary's 1000"):
            _sampling(_completion(**fields))


def test_min_tokens_may_not_pass_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens 21 is more than max_tokens 20"):
        _completion(min_tokens=21, max_tokens=20).check_least(20)
    for body in (_completion(min_tokens=21, max_tokens=40), _chat(min_tokens=21)):  # of which there is room for 20
        with pytest.raises(RequestError, match="min_tokens 21 is more than what the prompt leaves room for: 20"):
            body.check_least(20)
    _completion(min_tokens=20, max_tokens=20).check_least(20)


def test_logprobs_of_the_two_endpoints() -> None:
    assert _sampling(_completion(logprobs=0)).logprobs == 0
    assert _sampling(_completion(echo=True, logprobs=2)).prompt_logprobs == 2
    assert _sampling(_chat(logprobs=True)).logprobs == 0
    assert _sampling(_chat(logprobs=True, top_logprobs=3)).logprobs == 3
    assert _sampling(_chat(logprobs=False)).logprobs is None


def test_generation_config_gives_defaults(tmp_path: Path) -> None:
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2}))
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults(temperature=0.6, top_k=20)
    for wrong in ('{"temperature": "warm"}', '{"top_k": 1e999}', "[1]", "[" * 100_000):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            SamplingDefaults.from_dir(tmp_path)


# --- messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_text_parts_are_told_line_by_line_as_by_vllm_and_in_the_other_surfaces(role: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": role, "content": parts}]) == [{"role": role, "content": "a\nb"}]
    assert parse_messages([{"role": role, "content": parts[:1]}]) == [{"role": role, "content": "a"}]
    assert parse_messages([{"role": role, "content": []}]) == [{"role": role, "content": ""}]


def test_text_parts_of_an_answer_are_one_text_as_they_were_said() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_messages([{"role": "assistant", "content": parts}]) == [{"role": "assistant", "content": "ab"}]


def test_a_developer_message_is_a_system_message() -> None:
    assert parse_messages([{"role": "developer", "content": "a"}])[0]["role"] == "system"


def test_an_answer_dumped_by_the_client_can_be_sent_back() -> None:
    dumped = {
        "role": "assistant", "content": "a", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    assert parse_messages([dumped]) == [{"role": "assistant", "content": "a"}]


def test_a_refusal_of_another_server_is_what_the_assistant_said() -> None:
    parts = [{"type": "text", "text": "No: "}, {"type": "refusal", "refusal": "I may not."}]
    for message, said in (
        ({"content": None, "refusal": "I may not."}, "I may not."),
        ({"content": parts}, "No: I may not."),
    ):
        assert parse_messages([{"role": "assistant", **message}]) == [{"role": "assistant", "content": said}]


def test_calls_of_earlier_turns_are_the_templates_objects() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "c", "type": "function", "function": function}
    (parsed,) = parse_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert parsed["content"] == ""
    assert parsed["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}, "id": "c"}]
    written: list[tuple[object, object]] = [("", {}), (None, {}), ({"a": 1}, {"a": 1}), ("{x", "{x"), ("[1]", "[1]")]
    for arguments, taken in written:
        (parsed,) = parse_messages([_calling(name="f", arguments=arguments)])
        assert parsed["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": taken}}]


def test_reasoning_of_earlier_turns_has_one_name() -> None:
    for names in (("reasoning",), ("reasoning_content",), ("reasoning", "reasoning_content")):
        (parsed,) = parse_messages([{"role": "assistant", "content": "a", **dict.fromkeys(names, "hm")}])
        assert parsed == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_thoughts_may_be_parts_of_an_answer() -> None:
    thoughts = [{"type": "thinking", "thinking": "h", "signature": "s"}, {"type": "thinking", "thinking": "m"}]
    said = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (parsed,) = parse_messages([{"role": "assistant", "content": [*thoughts, *said]}])
    assert parsed == {"role": "assistant", "content": "ab", "reasoning_content": "hm"}
    (parsed,) = parse_messages([{"role": "assistant", "content": [*said, *thoughts], "reasoning": "hm"}])
    assert parsed == {"role": "assistant", "content": "ab", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"content": "hi"}, "messages[0].role"),
        ({"role": "robot", "content": "hi"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": ["hi"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "", "x": 1}]}, "messages[0].content[0].x"),
        ({"role": "user", "content": "hi", "nmae": "x"}, "messages[0].nmae"),
        ({"role": "user", "content": "hi", "name": "x" * 257}, "messages[0].name"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": {"id": "a"}}, "messages[0].tool_calls"),
        (_calling(name=""), "messages[0].tool_calls[0].function.name"),
        (_calling(name="f", arguments=[1]), "messages[0].tool_calls[0].function.arguments"),
        (_calling(name="f", argumnets="{}"), "messages[0].tool_calls[0].function.argumnets"),
        ({"role": "user", "content": "hi", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": "", "reasoning_content": 5}, "messages[0].reasoning_content"),
        ({"role": "assistant", "content": "", "refusal": 5}, "messages[0].refusal"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "a"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": [{"type": "thinking"}]}, "messages[0].content[0].thinking"),
    ],
)
def test_a_wrong_message_is_refused_at_its_place(message: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages([message])
    assert caught.value.param == param


def test_other_content_is_refused_by_its_type() -> None:
    with pytest.raises(RequestError, match="content of type 'input_audio' is not supported, only text"):
        parse_messages([{"role": "user", "content": [{"type": "input_audio"}]}])


def test_no_messages_at_all_are_refused() -> None:
    with pytest.raises(RequestError, match="must not be empty"):
        parse_messages([])


# --- tokenize ---------------------------------------------------------------------------------------------


def test_tokenize_takes_a_prompt_or_messages() -> None:
    assert validate(TokenizeBody, {"prompt": ""}).prompt == ""
    assert validate(TokenizeBody, {"messages": MESSAGES}).messages == MESSAGES
    for fields in ({}, {"prompt": "a", "messages": MESSAGES}):
        with pytest.raises(RequestError, match="either prompt or messages"):
            validate(TokenizeBody, dict(fields))


def test_detokenize_takes_ids() -> None:
    assert validate(DetokenizeBody, {"tokens": []}).tokens == []
    for tokens in ("a", [1.5], [True], None):
        with pytest.raises(RequestError):
            validate(DetokenizeBody, {"tokens": tokens})
