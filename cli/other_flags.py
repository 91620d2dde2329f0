"""Flags of vLLM that have no counterpart here: what stands in their place, for who brings a command line of its."""

from __future__ import annotations

import re
from collections.abc import Iterable

HERE = {
    "--trust-remote-code": "code of a checkpoint is never run; models of a known architecture need none",
    "--pipeline-parallel-size": "layers are not shared out; --tensor-parallel-size shares each layer among ranks",
    "--data-parallel-size": "--prefill N and --decode N start so many workers behind one address",
    "--kv-transfer-config": "workers hand keys and values over by themselves; --transfer says by what",
    "--tokenizer": "the tokenizer is the one in the model's directory",
    "--download-dir": "HF_HOME says where models are kept that are named as on the hub",
    "--tokenizer-mode": "the tokenizer is the one in the model's directory",
    "--hf-overrides": "what config.json says holds; change a copy of it",
    "--rope-scaling": "what config.json says holds; change a copy of it",
    "--task": "every model that generates also embeds, at /v1/embeddings; one without a head only embeds",
    "--runner": "every model that generates also embeds, at /v1/embeddings; one without a head only embeds",
    "--convert": "every model that generates also embeds, at /v1/embeddings; one without a head only embeds",
    "--limit-mm-per-prompt": "models read text alone; images are refused by name",
    "--generation-config": "sampling defaults are those of generation_config.json in the model's directory",
    "--override-generation-config": "sampling defaults are those of generation_config.json in the model's directory",
    "--root-path": "a proxy in front takes its prefix away",
    "--enable-chunked-prefill": "prompts are always computed in chunks: --max-num-batched-tokens is the size of a step",
    "--max-num-partial-prefills": "prompts share a step: --max-num-batched-tokens is the size of one",
    "--long-prefill-token-threshold": "prompts share a step: --max-num-batched-tokens is the size of one",
    "--async-scheduling": "a step is always prepared while the one before is computed, where that helps",
    "--scheduling-policy": "a request's priority is always heeded; --policy says where it runs",
    "--guided-decoding-backend": "grammars are always kept, by llguidance",
    "--max-logprobs": "up to 20 log-probabilities may be asked for, as of OpenAI",
    "--enable-prompt-tokens-details": "usage always tells how many prompt tokens were cached",
    "--response-role": "answers are the assistant's",
    "--disable-log-stats": "figures are in /metrics alone, and in no line of the log",
    "--disable-log-requests": "each request is one line, without prompt and answer; --log-level warning leaves it out",
    "--enable-log-requests": "each request is one line at --log-level info, without prompt and answer",
    "--uvicorn-log-level": "--log-level is that of all processes",
    "--cpu-offload-gb": "weights stay on the device; --quantization makes them smaller",
    "--distributed-executor-backend": "--launcher ray, or processes on this machine",
    "--compilation-config": "decode steps are recorded as CUDA graphs where there are some; --enforce-eager: none",
    "--ssl-cert-reqs": "--ssl-ca-certs asks clients for a certificate",
    "--middleware": "no code is loaded into the router; a proxy in front may do what it would",
    "--disable-frontend-multiprocessing": "--routers N says how many processes take requests",
    "--api-server-count": "--routers N says how many processes take requests",
}
SHORT = {"-dp": "--data-parallel-size", "-pp": "--pipeline-parallel-size", "-O": "--compilation-config"}
_RANKS = re.compile(r"-tp(\d+)")


def whole(name: str, words: Iterable[str]) -> str:
    """Return an unknown flag as it was written: of `-dp` the parser names `-d` alone, as if that went with `-p`."""
    is_letter = len(name) == 2 and name[0] == "-" != name[1]
    written = (word.partition("=")[0] for word in words if is_letter and word.startswith(name))
    return next(written, name)


def hint(flag: str) -> str | None:
    """Return what to do without a flag of vLLM; None: it is none, or one with a counterpart."""
    if match := _RANKS.fullmatch(flag):
        return f"-tp {match[1]} are two words"
    name = SHORT.get(flag.rstrip("0123456789"), flag.replace("_", "-"))
    return HERE.get(name) or HERE.get(name.replace("--no-", "--", 1))
