from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from kvferry.benchmarks.serve.client import (
    DEFAULT_CELLS,
    Cell,
    ClientRun,
    client_command,
    parse_cell,
    read_result,
    run_client,
    seed_of,
)
from kvferry.benchmarks.shared.peers import RunningSystem, Setup

CELL = Cell(128, 8, 2, 4)
SYSTEM = RunningSystem("http://127.0.0.1:1", "m", (), "a server")


def result(**changed: object) -> bytes:
    """A file as the client writes it, all four requests answered."""
    content: dict[str, object] = {
        "completed": 4,
        "failed": 0,
        "duration": 2.0,
        "total_input_tokens": 512,
        "total_output_tokens": 32,
        "output_throughput": 16.0,
        "median_ttft_ms": 50.0,
        "median_tpot_ms": 12.0,
        "p99_itl_ms": 20.0,
        "median_e2el_ms": 134.0,
        "errors": ["", "", "", ""],
        "backend": "openai",
    }
    return json.dumps(content | changed).encode()


def read(**changed: object) -> ClientRun:
    return read_result(result(**changed), CELL, 1, 7)


def test_cell_is_read_with_its_number_of_requests() -> None:
    assert parse_cell("512/64/4") == Cell(512, 64, 4, 16)
    assert parse_cell(" 512/64/4x5 ") == Cell(512, 64, 4, 5)
    assert parse_cell("77/8/2") == Cell(77, 8, 2, 6)
    assert all(parse_cell(str(cell)) == cell for cell in DEFAULT_CELLS)


@pytest.mark.parametrize("text", ["", "512/64", "512/64/0", "512/64/4x0", "a/b/c", "512/64/4/2"])
def test_what_is_no_cell_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not INPUT/OUTPUT/CONCURRENCY"):
        parse_cell(text)


def test_warm_up_fills_the_server_unless_one_request_is_the_whole_run() -> None:
    assert Cell(512, 64, 4, 16).num_warmups == 4
    assert Cell(32000, 8, 1, 1).num_warmups == 0


def test_seed_is_equal_for_all_systems_and_another_for_every_run() -> None:
    seeds = [seed_of(0, cell, round_, run) for cell in DEFAULT_CELLS for round_ in range(3) for run in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**31
    assert seed_of(0, CELL, 1, 2) == seed_of(0, CELL, 1, 2)
    assert seed_of(0, CELL, 1, 2) != seed_of(1, CELL, 1, 2)


def test_figures_are_read_from_the_clients_file() -> None:
    run = read()
    assert (run.median_ttft_ms, run.median_tpot_ms, run.p99_itl_ms) == (50.0, 12.0, 20.0)
    assert (run.output_tokens_per_s, run.num_completed, run.num_failed) == (16.0, 4, 0)
    assert (run.round, run.seed, run.is_clean) == (1, 7, True)


def test_failed_requests_are_counted_with_their_reasons() -> None:
    run = read(completed=3, failed=1, total_input_tokens=384, total_output_tokens=24, errors=["", "Bad\n Gateway"])
    assert (run.num_failed, run.problems, run.is_clean) == (1, ("Bad Gateway",), False)
    assert run.median_ttft_ms == 50.0


def test_run_in_which_nothing_succeeded_has_no_figures() -> None:
    run = read(completed=0, failed=4, total_input_tokens=0, total_output_tokens=0, median_ttft_ms=0.0)
    assert (run.num_failed, run.median_ttft_ms, run.output_tokens_per_s) == (4, None, None)


def test_answers_that_broke_off_are_found_by_their_tokens() -> None:
    run = read(total_output_tokens=30)
    assert (run.problems, run.is_clean) == (("30 output tokens instead of 32",), False)


def test_prompts_of_another_length_are_found_but_a_token_more_is_not() -> None:
    assert read(total_input_tokens=514).is_clean
    assert read(total_input_tokens=400).problems == ("400 input tokens instead of 512",)


def test_file_of_another_form_is_a_failed_run() -> None:
    run = read(completed="four")
    assert (run.num_failed, run.is_clean) == (4, False)
    assert "the client's file is not as expected" in run.problems[0]


# In the place of vLLM's client: writes the file that it is asked for, or fails.
CLIENT = """#!{python}
import sys
flags = dict(zip(sys.argv[3:], sys.argv[4:]))
if flags["--random-input-len"] == "13":
    sys.exit("no tokenizer")
if flags["--random-input-len"] == "99":
    import signal
    signal.pause()
with open(flags["--result-dir"] + "/" + flags["--result-filename"], "w") as file:
    file.write({content!r})
"""


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    client = tmp_path / "peer" / "bin" / "vllm"
    client.parent.mkdir(parents=True)
    client.write_text(CLIENT.format(python=sys.executable, content=result().decode()))
    client.chmod(0o755)
    return Setup(model_dir=tmp_path, log_dir=tmp_path / "logs", peer_venv=tmp_path / "peer", cores=(0,))


def run_once(setup: Setup, cell: Cell, timeout_s: float = 60) -> ClientRun:
    return run_client(
        SYSTEM,
        setup,
        cell,
        label="x",
        round_number=0,
        seed=1,
        timeout_s=timeout_s,
        quiet_limit_s=0,
        quiet_sample_s=0.01,
    )


def test_run_has_the_figures_of_the_client_and_the_cores_that_were_used(setup: Setup) -> None:
    run = run_once(setup, CELL)
    assert (run.median_ttft_ms, run.is_clean) == (50.0, True)
    assert run.cores is not None
    assert run.cores.client > 0
    assert run.quiet is not None


def test_client_that_fails_leaves_a_failed_run_with_its_last_words(setup: Setup) -> None:
    run_once(setup, CELL)  # its file must not be taken for that of the next
    run = run_once(setup, Cell(13, 8, 2, 4))
    assert (run.num_failed, run.median_ttft_ms) == (4, None)
    assert run.problems == ("the client ended with 1: no tokenizer",)


def test_client_that_does_not_end_is_given_up(setup: Setup) -> None:
    run = run_once(setup, Cell(99, 8, 2, 4), timeout_s=0)
    assert run.num_failed == 4
    assert "the client did not end within 0 s" in run.problems[0]


def test_command_asks_for_fixed_lengths_in_closed_loop(setup: Setup) -> None:
    command = client_command(SYSTEM, setup, CELL, 7, Path("/r/x.json"))
    flags = dict(itertools.pairwise(command))
    assert (flags["--random-input-len"], flags["--random-output-len"], flags["--num-prompts"]) == ("128", "8", "4")
    assert (flags["--max-concurrency"], flags["--seed"], flags["--temperature"]) == ("2", "7", "0")
    assert (flags["--backend"], flags["--endpoint"]) == ("openai", "/v1/completions")
    assert (flags["--result-dir"], flags["--result-filename"]) == ("/r", "x.json")
    assert "--ignore-eos" in command
