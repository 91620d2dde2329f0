"""Programs that speak to an endpoint: curl, lm-eval, aiperf, guidellm. Each is run as its own command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kvferry.tests.clients.calls.call import Calls, NotRun, Server

CALLS = Calls("programs")
LIMIT_S = 240.0
_TASK = """task: kvferry_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def _run(*words: str, folder: str | None = None, is_offline: bool = True) -> str:
    """Run a command of this environment, and return what it prints. Raises where it fails."""
    command = Path(sys.executable).parent / words[0]
    env = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if is_offline else {})}  # the tokenizer is here
    argv = [str(command) if command.exists() else words[0], *words[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder, check=False, env=env)
    if done.returncode and "Failed to resolve" in done.stdout + done.stderr:
        raise NotRun(f"{words[0]} downloads its tokenizer, and there is no network")
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    return done.stdout + done.stderr


@CALLS.works("curl")
def curl(server: Server) -> object:
    body = '{"prompt": "Hello", "max_tokens": 4}'
    return "choices" in _run("curl", "-sf", f"{server.openai_url}/completions", "--json", body)


@CALLS.works("lm-eval, log-probabilities")
def lm_eval(server: Server) -> object:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text('{"text": "Is the sky blue?"}\n{"text": "Is snow white?"}\n')
        (Path(folder) / "task.yaml").write_text(_TASK.replace("DATA", str(data)))
        where = f"base_url={server.openai_url}/completions,model={server.model},tokenizer={server.tokenizer}"
        words = ("--model", "local-completions", "--model_args", where, "--include_path", folder)
        return "acc" in _run("lm_eval", *words, "--tasks", "kvferry_words", "--batch_size", "1", folder=folder)


@CALLS.works("aiperf")
def aiperf(server: Server) -> object:
    with tempfile.TemporaryDirectory() as folder:
        words = ("--model", server.model, "--url", server.url, "--endpoint-type", "chat", "--streaming")
        shape = ("--request-count", "4", "--concurrency", "2", "--prompt-input-tokens-mean", "32", "--ui", "none")
        tokens = ("--output-tokens-mean", "8", "--tokenizer", str(server.tokenizer))
        # Told to be offline it takes a folder for the name of a repository.
        return "Time to First Token" in _run(
            "aiperf", "profile", *words, *shape, *tokens, folder=folder, is_offline=False
        )


@CALLS.works("guidellm")
def guidellm(server: Server) -> object:
    with tempfile.TemporaryDirectory() as folder:
        where = ("--backend", f"kind=openai_http,target={server.url}", "--profile", "kind=synchronous")
        tokens = ("--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}")
        data = ("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8")
        most = ("--constraint", "kind=max_requests,count=2", "--disable-console-interactive")
        _run("guidellm", "run", *where, *tokens, *data, *most, folder=folder)
        return (Path(folder) / "benchmarks.json").exists()


if __name__ == "__main__":
    CALLS.main()
