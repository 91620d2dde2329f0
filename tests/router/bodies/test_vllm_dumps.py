"""Clients that write down vLLM's own request objects send every field that they have, as null or as its default.

These are what `model_dump` makes of plain requests, of vLLM 0.32: their fields, and the names of those that are null.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel

from ..fakes import MODEL, VOCAB_SIZE, serve

DUMPS: list[tuple[str, dict[str, Any], str]] = [
    (
        "/v1/completions",
        {
            "model": MODEL,
            "prompt": "hi",
            "echo": False,
            "max_tokens": 3,
            "n": 1,
            "stop": [],
            "stream": False,
            "use_beam_search": False,
            "length_penalty": 1.0,
            "stop_token_ids": [],
            "include_stop_str_in_output": False,
            "ignore_eos": False,
            "min_tokens": 0,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "bad_words": [],
            "add_special_tokens": True,
            "priority": 0,
            "request_id": "r-1",
            "routed_experts_prompt_start": 0,
            "return_token_offsets": False,
            "mm_payload": "tensors",
        },
        "frequency_penalty logit_bias logprobs presence_penalty seed stream_options suffix temperature "
        "top_p user top_k min_p repetition_penalty watermarking truncate_prompt_tokens truncation_side "
        "allowed_token_ids prompt_logprobs logprob_token_ids prompt_embeds response_format "
        "structured_outputs session_id return_tokens_as_token_ids return_token_ids return_mm_kwargs "
        "cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection "
        "thinking_token_budget stream_interval",
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"content": "hi", "role": "user"}],
            "model": MODEL,
            "logprobs": False,
            "top_logprobs": 0,
            "max_tokens": 3,
            "n": 1,
            "stop": [],
            "stream": False,
            "tool_choice": "none",
            "include_reasoning": True,
            "parallel_tool_calls": True,
            "use_beam_search": False,
            "length_penalty": 1.0,
            "stop_token_ids": [],
            "include_stop_str_in_output": False,
            "ignore_eos": False,
            "min_tokens": 0,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "bad_words": [],
            "echo": False,
            "add_generation_prompt": True,
            "continue_final_message": False,
            "add_special_tokens": False,
            "priority": 0,
            "request_id": "r-1",
            "routed_experts_prompt_start": 0,
            "return_token_offsets": False,
            "mm_payload": "tensors",
        },
        "frequency_penalty logit_bias max_completion_tokens presence_penalty response_format seed "
        "stream_options temperature top_p tools reasoning_effort thinking_token_budget user top_k min_p "
        "repetition_penalty watermarking truncate_prompt_tokens truncation_side prompt_logprobs "
        "logprob_token_ids allowed_token_ids documents chat_template chat_template_kwargs "
        "media_io_kwargs mm_processor_kwargs structured_outputs session_id return_tokens_as_token_ids "
        "return_token_ids return_prompt_text return_mm_kwargs cache_salt kv_transfer_params "
        "ec_transfer_params vllm_xargs repetition_detection stream_interval",
    ),
    (
        "/v1/responses",
        {
            "background": False,
            "input": "hi",
            "max_output_tokens": 16,
            "model": MODEL,
            "parallel_tool_calls": True,
            "include_reasoning": True,
            "service_tier": "auto",
            "store": True,
            "stream": False,
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": 0,
            "truncation": "disabled",
            "skip_special_tokens": True,
            "include_stop_str_in_output": False,
            "request_id": "r-1",
            "priority": 0,
            "mm_payload": "tensors",
            "enable_response_messages": False,
            "stop": [],
            "stop_token_ids": [],
            "ignore_eos": False,
        },
        "include instructions max_tool_calls metadata logit_bias previous_response_id prompt reasoning "
        "temperature text top_p top_k min_p user presence_penalty frequency_penalty prompt_cache_key "
        "watermarking session_id media_io_kwargs mm_processor_kwargs return_mm_kwargs cache_salt "
        "previous_input_messages structured_outputs repetition_penalty seed vllm_xargs "
        "kv_transfer_params ec_transfer_params chat_template_kwargs",
    ),
    (
        "/v1/messages",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
            "stream": False,
            "mm_payload": "tensors",
        },
        "metadata output_config thinking stop_sequences system temperature tool_choice tools top_k top_p "
        "return_mm_kwargs cache_salt watermarking kv_transfer_params ec_transfer_params vllm_xargs "
        "chat_template_kwargs",
    ),
    (
        "/tokenize",
        {"model": MODEL, "prompt": "hi", "add_special_tokens": True, "return_token_strs": False},
        "",
    ),
    (
        "/tokenize",
        {
            "model": MODEL,
            "messages": [{"content": "hi", "role": "user"}],
            "add_generation_prompt": True,
            "return_token_strs": False,
            "continue_final_message": False,
            "add_special_tokens": False,
        },
        "chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools",
    ),
    (
        "/detokenize",
        {"model": MODEL, "tokens": [3]},
        "",
    ),
    (
        "/v1/embeddings",
        {
            "add_special_tokens": True,
            "encoding_format": "float",
            "embed_dtype": "float32",
            "endianness": "native",
            "input": "hi",
            "model": MODEL,
            "request_id": "r-1",
            "priority": 0,
        },
        "padding dimensions use_activation user truncate_prompt_tokens truncation_side mm_processor_kwargs cache_salt",
    ),
]


@pytest.mark.parametrize(("path", "fields", "nulls"), DUMPS)
async def test_a_whole_request_of_vllms_is_taken(path: str, fields: dict[str, Any], nulls: str) -> None:
    body = {**fields, **dict.fromkeys(nulls.split())}
    async with serve().client() as client:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert "x-kvferry-ignored" not in response.headers
        refused = await client.post(path, json={**body, "temprature": 1})
        assert (refused.status_code, "temprature" in refused.text) == (400, True)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "id": None}], "audio": None}],
                "tools": [{"type": "function", "function": {"name": "f", "description": None, "x": None}, "y": None}],
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": False, "x": None},
                "response_format": {"type": "text", "json_schema": None},
            },
        ),
        (
            "/v1/responses",
            {
                "input": "hi",
                "tools": [{"type": "function", "name": "f", "allowed_callers": None, "output_schema": None}],
                "text": {"format": {"type": "text"}, "verbosity": None, "x": None},
                "reasoning": {"effort": "low", "context": None, "x": None},
            },
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 3,
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "source": None}], "id": None}],
                "thinking": {"type": "disabled", "budget_tokens": None, "x": None},
            },
        ),
    ],
)
async def test_what_is_null_inside_of_a_field_is_not_there_either(path: str, fields: dict[str, Any]) -> None:
    async with serve(model=ServedModel(MODEL, 4096, VOCAB_SIZE)).client() as client:
        response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *(
            (path, field, value)
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
            for field, value in (("mm_payload", "x"), ("watermarking", True), ("kv_transfer_params", {"a": 1}))
        ),
        ("/v1/chat/completions", "repetition_detection", {"max_pattern_size": 3}),
        ("/v1/chat/completions", "return_token_offsets", True),
        ("/v1/completions", "stream_interval", 5),
        ("/v1/responses", "enable_response_messages", True),
        ("/v1/embeddings", "embed_dtype", "float16"),
        ("/v1/embeddings", "use_activation", False),
    ],
)
async def test_what_they_ask_for_in_earnest_is_refused_by_name(path: str, field: str, value: object) -> None:
    fields = next(fields for known, fields, _ in DUMPS if known == path)
    async with serve().client() as client:
        response = await client.post(path, json={**fields, field: value})
    assert response.status_code == 400 and field in response.json()["error"]["message"]
