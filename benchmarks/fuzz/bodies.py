"""HTTP bodies against the real router: every one is answered, none with a 5xx, and its memory does not grow.

A body is a sound one with fields changed, added, doubled or of another type, or its bytes bent; now and then it is
sound. Memory is read at every tenth; growth counts from the first tenth on, when every path has run.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvferry.benchmarks.fuzz.frames import FuzzResult
from kvferry.benchmarks.fuzz.raw_http import NoAnswer, RawClient, post
from kvferry.benchmarks.fuzz.target import MODEL, Target, router

NUM_CLIENTS = 8
_CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
_SOUND: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"model": MODEL, "prompt": "hello", "max_tokens": 4},
        {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [5, 6, 7], "logprobs": 3, "echo": True, "seed": 7, "stop": ["x", "yz"], "temperature": 0.5},
        {"prompt": [[5], [6, 7]], "prompt_logprobs": 2, "logit_bias": {"5": -1}, "stop_token_ids": [3]},
    ],
    "/v1/chat/completions": [
        {"model": MODEL, "messages": _CHAT, "max_tokens": 4},
        {"messages": _CHAT, "stream": True, "logprobs": True, "top_logprobs": 5, "n": 3, "top_k": 5, "min_p": 0.1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_completion_tokens": 2},
        {"messages": _CHAT, "chat_template_kwargs": {"enable_thinking": True}, "cache_salt": "s", "priority": 3},
        {"messages": _CHAT, "bad_words": ["a", "b c"], "allowed_token_ids": [5, 6, 7], "documents": []},
    ],
    "/v1/embeddings": [
        {"model": MODEL, "input": "hello", "encoding_format": "base64", "user": "u"},
        {"input": ["a", "b"], "dimensions": 4, "encoding_format": "float", "priority": 3},
        {"input": [5, 6, 7], "cache_salt": "s"},
        {"input": [[5], [6, 7]], "add_special_tokens": False},
    ],
    "/tokenize": [{"prompt": "hello"}, {"messages": _CHAT, "return_token_strs": True}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}
_STRANGE_FIELDS = (
    "kv_transfer_params", "image_url", "tools", "response_format", "guided_json", "best_of", "suffix", "user",
    "metadata", "do_remote_prefill", "__class__", "constructor", "\u0000", "priority", "allowed_token_ids", "audio",
)  # fmt: skip
_STRANGE_TEXTS = (
    "", " ", "\u0000", "\r\nX-Evil: 1", "\x1b[31m", "\ufffe", "a" * 5000, "{{ 7 * 7 }}", "<|im_end|>", "../../x",
    "http://169.254.169.254/", "' OR 1=1", "\U0001f600" * 50, "e\u0301" * 100, "NaN",
)  # fmt: skip
_RAW = (b"", b"null", b"[]", b'"text"', b"{", b"{}", b'{"prompt":', b'{"prompt": "\\ud800"}', b'{"prompt": NaN}',
        b'{"prompt": "a", "prompt": "b"}', b'{"n": 1e999, "prompt": "a"}', b'{"prompt": "\xff"}', b"\xef\xbb\xbf{}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}")  # fmt: skip


class BodySource:
    """(path, body) without end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ways: list[Callable[[dict[str, Any]], bytes]] = [
            *[self._changed] * 6, self._bent, self._bent, self._renamed, self._doubled, self._sound,
        ]  # fmt: skip

    def next(self) -> tuple[str, bytes]:
        path = self._random.choice(list(_SOUND))
        if self._random.random() < 0.05:
            return path, self._random.choice(_RAW)
        body = self._random.choice(_SOUND[path])
        return path, self._random.choice(self._ways)(body)

    def _sound(self, body: dict[str, Any]) -> bytes:
        return json.dumps(body).encode()

    def _changed(self, body: dict[str, Any]) -> bytes:
        value = json.loads(json.dumps(body))
        for _ in range(self._random.randint(1, 3)):
            parent, key = self._place(value)
            parent[key] = self._value(0)
        if self._random.random() < 0.2:
            value[self._random.choice(_STRANGE_FIELDS)] = self._value(0)
        return json.dumps(value, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")

    def _renamed(self, body: dict[str, Any]) -> bytes:
        value = dict(body)
        key = self._random.choice(list(value))
        value[key + self._random.choice(("s", "_", " "))] = value.pop(key)
        return json.dumps(value).encode()

    def _doubled(self, body: dict[str, Any]) -> bytes:
        text = json.dumps(body)
        key = self._random.choice(list(body))
        return f'{text[:-1]}, "{key}": {json.dumps(self._value(0))}}}'.encode()

    def _bent(self, body: dict[str, Any]) -> bytes:
        data = bytearray(json.dumps(body).encode())
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(data))
            match self._random.randrange(3):
                case 0:
                    data[at] = self._random.randrange(256)
                case 1:
                    del data[at : at + self._random.randint(1, 5)]
                case _:
                    data[at:at] = self._random.choice((b'"', b"{", b"]", b",", b"\\u", b"\x00", b"-", b"1e9"))
            if not data:
                break
        return bytes(data)

    def _place(self, value: Any) -> tuple[Any, Any]:
        while True:
            key = self._random.choice(list(value) if isinstance(value, dict) else range(len(value)))
            child = value[key]
            if not isinstance(child, (dict, list)) or not child or self._random.random() < 0.4:
                return value, key
            value = child

    def _value(self, depth: int) -> object:
        kinds: tuple[Callable[[], object], ...] = (
            lambda: None,
            lambda: self._random.random() < 0.5,
            lambda: self._random.choice((0, 1, -1, 2, 15, 16, 17, 255, 2**31, 2**53, 2**63, -(2**63), 10**30)),
            lambda: self._random.choice((0.0, -0.0, 0.5, 1.0, 2.0, 2.0001, 1e-30, 1e30)),
            lambda: self._random.choice(_STRANGE_TEXTS),
            lambda: [self._value(depth + 1) for _ in range(self._random.randint(0, 5))],
            lambda: {self._random.choice(_STRANGE_FIELDS): self._value(depth + 1)},
            lambda: [self._random.randrange(300) for _ in range(self._random.randint(1, 30))],
        )
        return self._random.choice(kinds[:5] if depth > 3 else kinds)()


def fuzz_bodies(num_bodies: int, seed: int, model_dir: Path, log_dir: Path, max_model_len: int = 2048) -> FuzzResult:
    result = FuzzResult("router")
    with router(model_dir, log_dir, max_model_len=max_model_len) as target:
        asyncio.run(_attack(target, num_bodies, seed, result))
        for line in target.complaints():
            result.fail(f"its log: {line}")
        if not target.is_alive:
            result.fail(f"it ended: {target.process.log_tail()}")
    return result


async def _attack(target: Target, num_bodies: int, seed: int, result: FuzzResult) -> None:
    clients = [_client(target, seed + index, num_bodies, result) for index in range(NUM_CLIENTS)]
    await asyncio.gather(*clients)
    result.rss_after_bytes = target.rss_bytes
    result.rss_samples_bytes.append(result.rss_after_bytes)


async def _client(target: Target, seed: int, num_bodies: int, result: FuzzResult) -> None:
    source, client = BodySource(seed), RawClient(target.address)
    try:
        while result.num_sent < num_bodies:
            result.num_sent += 1
            if result.num_sent * 10 // num_bodies > len(result.rss_samples_bytes):
                result.rss_samples_bytes.append(target.rss_bytes)
                result.rss_before_bytes = result.rss_samples_bytes[0]
            path, body = source.next()
            try:
                answer = await client.ask(post(path, body))
            except NoAnswer as error:
                result.fail(f"no answer ({error}) to {path} {body[:200]!r}")
                if not target.is_alive:
                    return
                continue
            result.outcomes[str(answer.status)] += 1
            result.num_accepted += answer.status == 200
            if (fault := answer.fault) is not None:
                result.fail(f"{fault} to {path} {body[:300]!r}")
    finally:
        client.close()
