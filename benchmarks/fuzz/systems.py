"""Extreme bodies against whole systems: launcher, router, prefill and decode workers, with a tiny model.

A body that the schema takes is answered, whole and in time, whatever stands in it; no worker ends of it, and in the end
every block is free. What breaks that is told with the bodies that were under way:

    ended       a worker or a router that the launcher started again
    answer      5xx, an error event, a stream or a choice without a finish reason, no JSON (NaN is none), none in time
    blocks      held by nobody who is there, when all have their answers

The systems differ in what a request passes through: a handoff or not, torch or native code, a pool that is too small
for all. `program` is the `kvferry serve` that is tried: another checkout's shows whether this would find what it has.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kvferry.benchmarks.fuzz.extremes import ExtremeBodies
from kvferry.benchmarks.fuzz.frames import FuzzResult
from kvferry.benchmarks.fuzz.raw_http import Answer, NoAnswer, RawClient, post
from kvferry.models.config import ModelConfig
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.chaos.system import settle
from kvferry.tools.load.tiny_model import write_tiny_model
from kvferry.wire.address import Address

NUM_CLIENTS = 6
MAX_MODEL_LEN = 1024
LIMIT_S = 20.0  # of an answer
_SETTLED_WITHIN_S = 15.0  # a quarantine that nobody needs may last ten seconds
_FINISH_REASONS = frozenset({"stop", "length"})
_ENDED = "; starting again"  # so the launcher says
_COMMON = ("--max-model-len", str(MAX_MODEL_LEN), "--num-threads", "1")


class Setup(NamedTuple):
    name: str
    num_workers: int
    flags: tuple[str, ...]


SETUPS = (
    Setup(
        "handoffs, torch",
        3,
        ("--prefill", "1", "--decode", "2", "--dtype", "float32", "--policy", "round_robin",
         "--no-local-prefill", "--kv-cache-memory-bytes", "2MiB"),
    ),
    Setup(
        "any way, native",
        3,
        ("--prefill", "1", "--decode", "2", "--dtype", "bfloat16", "--policy", "slo", "--deterministic",
         "--kv-cache-memory-bytes", "2MiB"),
    ),
    Setup(
        "a pool too small",
        1,
        ("--prefill", "0", "--decode", "1", "--dtype", "bfloat16", "--kv-cache-memory-bytes", "300KiB",
         "--max-num-seqs", "8"),
    ),
)  # fmt: skip


def fuzz_systems(
    num_bodies: int, seed: int, log_dir: Path, *, setups: Sequence[Setup] = SETUPS, program: Sequence[str] = ()
) -> list[FuzzResult]:
    """One result for each system, up to the first that fails; the bodies are shared out among them."""
    model_dir = write_tiny_model(log_dir / "tiny", max_model_len=2 * MAX_MODEL_LEN)
    shares = [num_bodies // len(setups) + (index < num_bodies % len(setups)) for index in range(len(setups))]
    results: list[FuzzResult] = []
    for index, (setup, share) in enumerate(zip(setups, shares, strict=True)):
        results.append(_fuzz_system(setup, share, seed + index, model_dir, log_dir, program))
        if results[-1].failures:
            break
    return results


def _fuzz_system(
    setup: Setup, num_bodies: int, seed: int, model_dir: Path, log_dir: Path, program: Sequence[str]
) -> FuzzResult:
    result = FuzzResult(f"system: {setup.name}")
    vocab_size = ModelConfig.from_dir(model_dir).vocab_size
    bodies = ExtremeBodies(seed, vocab_size=vocab_size, max_model_len=MAX_MODEL_LEN)
    other = {"program": program} if program else {}
    name = f"system-{SETUPS.index(setup) if setup in SETUPS else setup.name}"
    with serving(name, model_dir, (*setup.flags, *_COMMON), log_dir, **other) as system:
        asyncio.run(_Run(system, setup, result, iter(bodies), num_bodies).run())
    return result


class _Run:
    """Bodies against one system, until enough are sent or something has broken for good."""

    def __init__(
        self, system: System, setup: Setup, result: FuzzResult, bodies: Iterator[tuple[str, bytes]], num_bodies: int
    ) -> None:
        self._system = system
        self._setup = setup
        self._result = result
        self._bodies = bodies
        self._num_bodies = num_bodies
        self._under_way: dict[int, bytes] = {}
        self._log_offset = 0
        self._slowest_s = 0.0

    async def run(self) -> None:
        before, _ = await settle(self._system, self._setup.num_workers, _SETTLED_WITHIN_S)
        await asyncio.gather(*(self._client(index) for index in range(NUM_CLIENTS)))
        self._read_log()
        after, seconds = await settle(self._system, self._setup.num_workers, _SETTLED_WITHIN_S)
        if not after.is_quiet or after.num_blocks != before.num_blocks:
            self._result.fail(f"blocks: {before} before, {after} {seconds:.0f} s after the last answer")
        self._result.outcomes["slowest answer, ms"] = round(1e3 * self._slowest_s)
        self._result.outcomes["blocks held"] = after.num_held

    async def _client(self, index: int) -> None:
        client = RawClient(Address.parse(self._system.base_url.removeprefix("http://")))
        try:
            while self._result.num_sent < self._num_bodies and not self._result.failures:
                self._result.num_sent += 1
                path, body = next(self._bodies)
                self._under_way[index] = body
                await self._ask(client, path, body)
                del self._under_way[index]
                self._read_log()
        finally:
            client.close()

    async def _ask(self, client: RawClient, path: str, body: bytes) -> None:
        began_s = time.perf_counter()
        try:
            async with asyncio.timeout(LIMIT_S):
                answer = await client.ask(post(path, body))
        except (NoAnswer, TimeoutError) as error:
            client.close()
            self._result.fail(f"answer: none within {LIMIT_S:g} s ({error!r}) to {path} {_shown(body)}")
            return
        self._slowest_s = max(self._slowest_s, time.perf_counter() - began_s)
        self._result.outcomes[str(answer.status)] += 1
        self._result.num_accepted += answer.status == 200
        fault = answer.fault
        if fault is None and answer.status == 200:
            fault = unfinished(answer, json.loads(body))
        if fault is not None:
            self._result.fail(f"answer: {fault} to {path} {_shown(body)}")

    def _read_log(self) -> None:
        with self._system.process.log_path.open("rb") as log:
            log.seek(self._log_offset)
            text = log.read()
        whole = text.rfind(b"\n") + 1
        self._log_offset += whole
        for line in text[:whole].decode(errors="replace").splitlines():
            if _ENDED in line:
                self._result.outcomes["processes ended"] += 1
                bodies = "; ".join(map(_shown, self._under_way.values()))
                self._result.fail(f"ended: {line.strip()[:200]}, with {bodies}")


def unfinished(answer: Answer, body: dict[str, Any]) -> str | None:
    """What an answer of status 200 lacks of a whole one; None: nothing."""
    try:
        parts = _parts(answer.body)
    except ValueError as error:
        return f"{error}: {answer.body[:200]!r}"
    if any("error" in part for part in parts):
        return f"an error: {answer.body[-200:]!r}"
    reasons: dict[int, object] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        if reasons.get(choice["index"]) is not None:
            return f"choice {choice['index']} goes on after its end"
        reasons[choice["index"]] = choice["finish_reason"]
    prompt = body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    wanted = set(range(num_prompts * (body.get("n") or 1)))
    if reasons.keys() != wanted or not _FINISH_REASONS.issuperset(reasons.values()):
        return f"finish reasons {reasons} of {len(wanted)} choices"
    return None


def _parts(data: bytes) -> list[dict[str, Any]]:
    """The answer, or the events of its stream. Raises ValueError for what is no JSON."""
    texts = [data]
    if data.startswith(b"data: "):
        texts = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
        texts = [text for text in texts if text != b"[DONE]"]
    return [json.loads(text, parse_constant=_refuse) for text in texts]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _shown(body: bytes) -> str:
    text = body.decode()
    return text if len(text) <= 400 else f"{text[:400]}..."
