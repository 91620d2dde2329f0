"""`kvferry simulate`: from flags to a table, figures and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from kvferry.simulator.commands import size
from kvferry.simulator.commands.simulate import main, make_parser, scenario_of
from kvferry.simulator.commands.simulate_report import Run

from ..sizing.models import write_config

SMALL = ["--trace", "sample:azure-2023-conv", "--requests", "40", "--rate", "8", "--prefill", "1", "--decode", "1"]


@pytest.fixture(autouse=True)
def _restore_logs() -> None:
    structlog.reset_defaults()


def test_policies_are_run_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, plot = tmp_path / "runs.json", tmp_path / "runs.svg"
    words = [*SMALL, "--policy", "slo,colocated", "--oracle", "--json", str(figures), "--plot", str(plot)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "colocated" in shown and "Bound of an oracle" in shown
    runs = json.loads(figures.read_text())["runs"]
    assert [run["name"] for run in runs] == ["slo", "colocated"]
    assert all(run["num_requests"] == 40 and run["attainment"] > 0.9 for run in runs)
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize("words", [["--policy", "colocated"], ["--prefill", "0"]])
def test_an_autoscaler_makes_no_prefill_pool_where_there_is_none(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Run] = []
    monkeypatch.setattr("kvferry.simulator.commands.simulate.print_runs", lambda found, console: runs.extend(found))
    assert main([*SMALL, "--requests", "120", "--autoscale", "4", "--start-s", "1", *words]) == 0
    [(_, _, outcome)] = runs
    assert {sample.num_prefill for sample in outcome.fleet} == {0}


def test_spikes_and_failures_are_read_from_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--spike", "2:1:5", "--fail", "prefill-0@2+1", "--policy", "least_loaded"]) == 0
    assert "least_loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "text", "form"),
    [
        ("--spike", "2", "AT:SECONDS:FACTOR, as in 20:5:3"),
        ("--spike", "2:1:0", "AT:SECONDS:FACTOR"),
        ("--spike", "2:1:nan", "AT:SECONDS:FACTOR"),
        ("--spike", "2:1:-3", "AT:SECONDS:FACTOR"),
        ("--fail", "prefill-0", "WORKER@AT[+BACK_AFTER], as in decode-0@20+60"),
        ("--fail", "p-0@2", "WORKER@AT[+BACK_AFTER]"),
        ("--fail", "decode-0@nan", "WORKER@AT[+BACK_AFTER]"),
    ],
)
def test_what_is_no_spike_and_no_failure_is_refused_with_its_form(
    flag: str, text: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, flag, text])
    assert ended.value.code == 2
    assert f"argument {flag}: {text!r} is not {form}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fail", "prefill-99@1"], "fail: slo has no worker prefill-99: it has prefill-0 to prefill-"),
        (["--fail", "decode-00@1"], "fail: slo has no worker decode-00: it has"),
        (
            ["--fail", "prefill-0@1", "--policy", "colocated"],
            "fail: colocated has no worker prefill-0: it has decode-0 to decode-",
        ),
        (
            ["--draft-acceptance", "0.5", "--draft-model-share", "-1"],
            "draft_model_share = -1: a draft model takes",
        ),
        (["--draft-acceptance", "0.5", "--draft-model-share", "nan"], "draft_model_share = nan: a draft model takes"),
        (["--draft-model-share", "0.1"], "draft_model_share: without --draft-acceptance it changes nothing"),
        (["--num-speculative-tokens", "3"], "num_speculative_tokens: without --draft-acceptance it changes nothing"),
        (["--start-s", "10"], "start_s: without --autoscale it changes nothing"),
        (["--spare-workers", "1"], "spare_workers: without --autoscale it changes nothing"),
        (["--max-loras", "3"], "max_loras: without --adapters it changes nothing"),
        (["--day-low", "0.5"], "day_low: without --day-s it changes nothing"),
        (["--no-noise"], "no_noise: without --steps it changes nothing"),
        (["--share", "0.5"], "share: without --capacity or --oracle it changes nothing"),
        (["--draft-acceptance", "2"], "draft_acceptance = 2 is no share"),
        (["--tensor-parallel-size", "2000"], "tensor_parallel_size: 2,000 is more than 1,024"),
        (["--num-blocks", "1000000000"], "num_blocks: 1,000,000,000 is more than 10,000,000"),
        (["--requests", "1000000000"], "requests: 1,000,000,000 is more than 10,000,000"),
        (["--autoscale", "4", "--spare-workers", "20000"], "spare_workers: 20,000 is more than 10,000"),
        (["--prefill", "200000"], "prefill: 200,000 is more than 100,000"),
        (["--length-scale", "1e23"], "length_scale: 1e+23 is more than 1,000,000.0"),
        (["--rate", "1e-9"], "rate: a request comes 8.07e+04 days after the first one; at most 31 are simulated"),
        (["--day-s", "9", "--day-low", "1e-12"], "days after the first one; at most 31 are simulated"),
        (["--autoscale", "1"], "autoscale: at most 1, but --prefill and --decode begin with more"),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--policy", "slo", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["--fail", "decode-0@500"], "slo: --fail decode-0@500 killed nothing: the run was over after "),
        (
            ["--fail", "prefill-0@1", "--fail", "prefill-0@2"],
            "slo: --fail prefill-0@2 killed nothing: there was no such worker then",
        ),
        (["--spike", "500:5:3"], "slo: the spike at 500 s changed nothing: the last request came at "),
    ],
)
def test_what_has_changed_nothing_in_a_run_is_said(
    words: list[str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words]) == 0
    assert note in capsys.readouterr().out
    assert main([*SMALL, "--fail", "prefill-0@1", "--spike", "1:1:2"]) == 0
    assert "nothing" not in capsys.readouterr().out


def test_prompts_and_answers_without_room_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, figures = tmp_path / "trace.jsonl", tmp_path / "runs.json"
    rows = [(140_000, 5), (131_000, 500), (500, 5), (131_072, 1)]
    trace.write_text(
        "".join(
            json.dumps({"timestamp": 1000 * at, "input_length": prompt, "output_length": output}) + "\n"
            for at, (prompt, output) in enumerate(rows)
        )
    )
    words = ["--trace", str(trace), "--prefill", "1", "--decode", "1", "--json", str(figures)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "slo: prompts refused, which the model's context of 131,072 tokens has no room for: 2" in shown
    assert "slo: answers cut where the model's context of 131,072 tokens ends: 1" in shown
    [found] = json.loads(figures.read_text())["runs"]
    assert (found["num_too_long"], found["num_cut"], found["ended"]) == (2, 1, {"refused": 2, "finished": 2})
    assert main([*words, "--capacity"]) == 2
    assert "share: 2 of 4 prompts are too long" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "is_hinted"), [(0.3, True), (300, False)])
def test_times_in_another_unit_are_hinted_at(
    step: float, is_hinted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = (json.dumps({"timestamp": step * n, "input_length": 100, "output_length": 2}) + "\n" for n in range(30))
    trace.write_text("".join(lines))
    assert main(["--trace", str(trace)]) == 0
    assert ("are they in the unit of its form (Mooncake's: milliseconds)?" in capsys.readouterr().out) is is_hinted
    assert main(["--trace", str(trace), "--rate", "2000"]) == 0
    assert "are they in the unit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--day-s", "1e-308"), ("--ttft-objective-ms", "1e-322"), ("--adapter-mb", "1e308"), ("--rate", "1e308")],
)
def test_a_number_that_no_arithmetic_bears_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--adapters", "1", flag, value])
    assert ended.value.code == 2
    assert f"argument {flag}: {value} is not from" in capsys.readouterr().err


def test_the_folder_of_a_plot_is_made(tmp_path: Path) -> None:
    plot = tmp_path / "new" / "runs.svg"
    assert main([*SMALL, "--plot", str(plot)]) == 0
    assert plot.exists()


def test_a_file_that_cannot_be_written_costs_neither_the_others_nor_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "runs.svg"
    assert main([*SMALL, "--json", "/dev/full", "--plot", str(plot)]) == 2
    shown = capsys.readouterr()
    assert shown.err == "kvferry simulate: /dev/full cannot be written: No space left on device\n"
    assert plot.exists() and "goodput/s" in shown.out


def test_one_request_is_served_by_all_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*SMALL, "--requests", "1", "--tensor-parallel-size", "4"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ slo"))
    assert "8" in [cell.strip() for cell in row.split("│")]


def test_the_highest_good_rate_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--capacity", "--policy", "least_loaded"]) == 0
    assert "least_loaded at " in capsys.readouterr().out


def test_no_highest_rate_is_told_of_requests_that_are_good_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--requests", "2", "--capacity", "--policy", "least_loaded"]) == 2
    seen = capsys.readouterr()
    assert not seen.out
    assert "2 requests are good even if all come at once" in seen.err


def test_a_checkpoint_is_simulated_as_it_is_sized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's config.json is enough; integers are read faster than bfloat16."""
    model = str(write_config(tmp_path / "llama", "8b"))
    tpot_ms = []
    for name, more in (("plain", []), *((name, ["--quantization", name]) for name in ("int8", "int4"))):
        figures = tmp_path / f"{name}.json"
        words = [*SMALL, "--model", model, "--gpu", "L4", "--tensor-parallel-size", "1", "--link-gb-per-s", "5"]
        assert main([*words, *more, "--json", str(figures)]) == 0
        [found] = json.loads(figures.read_text())["runs"]
        tpot_ms.append(found["tpot_ms"]["p50"])
    assert tpot_ms[1] < tpot_ms[0] and tpot_ms[2] < 0.7 * tpot_ms[0]
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_model_with_states_is_simulated_in_its_own_blocks(tmp_path: Path) -> None:
    model = str(write_config(tmp_path / "states", "states"))
    worker = ["--gpu", "cpu", "--memory-gb", "16", "--memory-gb-per-s", "300", "--tflops", "20"]
    words = [*SMALL, "--tensor-parallel-size", "1", "--model", model, *worker]
    for more, block_tokens in (([], 2048), (["--block-size", "512"], 512)):
        fleet = scenario_of(make_parser().parse_args([*words, *more])).fleet
        assert fleet.block_tokens == block_tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--policy", "slo,fastest"],
            "policy: 'fastest' is none of slo, least_loaded, kv_cost, round_robin, colocated",
        ),
        (["--policy", ""], "policy: '' is none of"),
    ],
)
def test_an_unknown_policy_is_refused_by_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--prefill", "--adapters", "--spare-workers", "--max-local-prefill-tokens"])
def test_there_are_no_fewer_than_none(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, flag, "-1"])
    assert ended.value.code == 2
    assert f"argument {flag}: -1 is below 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--decode", "--adapters", "--block-size", "--decode-tokens"])
def test_no_count_is_larger_than_any_array(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, flag, "99999999999999999999999"])
    assert ended.value.code == 2
    assert f"argument {flag}: 99999999999999999999999 is more than 1000000000" in capsys.readouterr().err


def test_steps_that_are_too_long_to_be_served_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = ["--gpu", "cpu", "--memory-gb", "64", "--memory-gb-per-s", "50", "--tflops", "0.001"]
    model = str(write_config(tmp_path / "llama", "8b"))
    assert main([*SMALL, "--requests", "3", "--tensor-parallel-size", "1", "--model", model, *worker]) == 2
    told = capsys.readouterr().err
    assert "for hung (a step runs for" in told and "its steps are too long to be served" in told


@pytest.mark.parametrize("program", [main, size.main])
def test_a_prompts_own_time_is_multiplied_by_one_at_least(
    program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program(["--ttft-stretch", "0.5"])
    assert ended.value.code == 2
    assert "argument --ttft-stretch: 0.5 is less than 1" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--share", "--day-low"])
def test_a_share_is_not_more_than_the_whole(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, flag, "1.5"])
    assert ended.value.code == 2
    assert f"argument {flag}: 1.5 is more than 1" in capsys.readouterr().err


def test_flags_of_a_checkpoint_are_refused_with_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--quantization", "int8"]) == 2
    assert "quantization: llama-3.1-70b stands for published figures" in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--model", "/nowhere/at-all"]) == 2
    assert "/nowhere/at-all" in capsys.readouterr().err


def test_nobody_is_told_of_objectives_that_only_judge(tmp_path: Path) -> None:
    """Hopeless requests are refused with objectives alone."""
    refused = []
    for more in ([], ["--no-objectives"]):
        figures = tmp_path / f"{len(more)}.json"
        words = [*SMALL, "--requests", "80", "--rate", "200", "--ttft-objective-ms", "60", "--ttft-stretch", "1"]
        assert main([*words, *more, "--json", str(figures)]) == 0
        [found] = json.loads(figures.read_text())["runs"]
        refused.append(found["num_requests"] - found["ended"].get("finished", 0))
    assert refused[0] > 0 == refused[1]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--model", "deepseek-v3", "--tensor-parallel-size", "8"]) == 2
    assert "671 GB of weights" in capsys.readouterr().err


def test_memory_for_more_blocks_than_are_simulated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path, "8b")
    words = [*SMALL, "--model", str(tmp_path), "--tensor-parallel-size", "1", "--memory-gb", "1e6"]
    assert main(words) == 2
    assert "memory_gb: a worker has room for 107," in (text := capsys.readouterr().err) and "(--num-blocks)" in text
    assert main([*words, "--num-blocks", "1000"]) == 0
