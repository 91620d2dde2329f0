"""`kvferry size`: from flags to a table or figures, and one line for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import msgspec
import pytest
import structlog

from kvferry.models.parts.expert_plan import ExpertPlan
from kvferry.simulator import Scenario
from kvferry.simulator.commands.size import main
from kvferry.simulator.oracle import Bound, bound
from kvferry.simulator.traffic import arrivals
from kvferry.sizing.cpu_rates import CpuRates

from ..deepseek import write_deepseek, write_for_cuda
from ..sizing.models import write_config


@pytest.fixture(autouse=True)
def _restore_logs() -> None:
    structlog.reset_defaults()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "llama", "8b"))


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, float]]:
    assert main([*words, "--json"]) == 0
    found: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)
    return found


def test_a_fleet_is_sized_and_priced(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [model, "--gpu", "H100", "--rate", "20", "--requests", "60", "--context", "500", "--output-len", "100"]
    found = figures(capsys, *words)
    fleet, cost = found["fleet"], found["cost"]
    assert found["simulated"]["attainment"] >= 0.9
    assert fleet["gpus"] == fleet["prefill"] + fleet["decode"] >= 1
    assert cost["per_hour"] == pytest.approx(fleet["gpus"] * 2.69)
    assert cost["per_million_output_tokens"] == pytest.approx(cost["per_hour"] / (20 * found["output"] * 3600) * 1e6)  # type: ignore[operator]
    assert main([*words, "--no-simulation"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("weights of a rank", "16.1 GB", "reading weights", "rates alone"))


def test_the_load_that_is_named_is_the_one_that_is_sized_and_priced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a short context, too, which cuts the longest prompts; and in few requests, which are no mean of a trace."""
    path = write_config(tmp_path / "short", "8b")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    seen: list[Scenario] = []

    def noted(scenario: Scenario, *, share: float) -> Bound:
        seen.append(scenario)
        return bound(scenario, share=share)

    monkeypatch.setattr("kvferry.simulator.commands.size.bound", noted)
    words = [str(path), "--gpu", "H100", "--rate", "20", "--no-simulation", "--requests", "100"]
    for more, wanted in ((["--context", "6000"], 6000), (["--context", "500"], 500), ([], None)):
        shown: object = figures(capsys, *words, *more)["context"]
        run = mean(row.num_prompt_tokens for _, row in arrivals(seen[-1].traffic))
        assert shown == pytest.approx(run, abs=0.5) and wanted in (None, shown)


def test_figures_that_cannot_be_written_are_one_line(model: str) -> None:
    program = "import sys, kvferry.simulator.commands.size as size\n"
    script = f"{program}sys.exit(size.main([{model!r}, '--gpu', 'H100', '--json']))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    told = "kvferry size: standard output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, told)


def test_without_a_rate_there_is_a_ratio_and_no_fleet(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "--gpu", "A100-80GB", "--tensor-parallel-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "P:D that matches rates" in shown and "sent by a rank in a step" in shown and "GPU-hour" not in shown


def test_nothing_is_priced_that_has_no_price(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [model, "--gpu", "l4", "--quantization", "int8", "--rate", "1", "--no-simulation", "--link-gb-per-s", "10"]
    assert "cost" not in figures(capsys, *words)
    assert figures(capsys, *words, "--gpu-hour-cost", "0.5")["cost"]["gpu_hour"] == 0.5
    assert main([*words, "--gpu-hour-cost", "50000"]) == 0
    shown = capsys.readouterr().out
    assert "e+" not in shown and re.search(r"cost of a million output tokens\W+\d+,\d{3}\b", shown)


def test_where_no_model_is_named_the_built_in_one_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "h100"]) == 0
    assert capsys.readouterr().out.startswith("SmolLM2-135M-Instruct, weights as stored, on 1 x H100 a worker; ")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "gpu: say on what: H100"),
        (["--gpu", "H900"], "gpu H900: known are H100"),
        (["--gpu", "cpu"], "memory_gb: of a CPU what was measured on it is needed"),
        (["--gpu", "L40S"], "link_gb_per_s: L40S comes without a network port"),
        (["--gpu", "H100", "--block-size", "5"], "block_size: "),
        (
            ["--gpu", "H100", "--context", "999999"],
            "context: 999,999 tokens are more than the model's context has room",
        ),
        (["--gpu", "H100", "--output-len", "99999"], "output_len: 99,999 tokens are more than the model's context has"),
        (["--gpu", "H100", "--cpu-rates", "/nowhere"], "cpu_rates: H100 is no CPU: leave them away"),
        (["--gpu", "cpu", "--cpu-rates", "/nowhere"], "memory_gb: say how much a CPU has"),
        (["--gpu", "cpu", "--cpu-rates", "/", "--memory-gb", "9"], "cpu_rates: /: Is a directory\n"),
        (
            ["--gpu", "cpu", "--cpu-rates", "/nowhere", "--memory-gb", "9", "--tflops", "1"],
            "tflops: --cpu-rates say it",
        ),
        (["--gpu", "H100", "--tensor-parallel-size", "3"], "tensor_parallel_size = 3 does not divide"),
        (["--gpu", "H100", "--memory-gb", "1e300"], "memory_gb: 1e+300 is more than 1,000,000"),
        (["--gpu", "H100", "--rate", "1e300"], "rate: 2e+301 requests are more than 1,000,000"),
        (["--gpu", "H100", "--rate", "1", "--requests", "9999999"], "requests: 1e+07 requests are more than 1,000,000"),
        (["--gpu", "H100", "--rate", "1e300", "--no-simulation"], "rate: takes "),
        (
            ["--gpu", "H100", "--memory-gb", "18"],
            "LlamaForCausalLM has 16.1 GB of weights; 1 x H100 have 18 GB, 0.9 of it to be used; what steps need",
        ),
        (
            ["--gpu", "H100", "--expert-plan", "/nowhere"],
            "expert_plan: needs a mixture of experts, and enable_",
        ),
        (["--gpu", "H100", "--quantization", "awq"], "quantization = awq: the checkpoint's config.json has no such"),
    ],
)
def test_mistakes_are_one_line(model: str, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, *words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"kvferry size: {why}") and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--gpu", "H100", "--kv-cache-dtype", "fp8"], "fp8 has no kernels here for latents"),
        (["--gpu", "cpu", "--memory-gb", "8", "--kv-cache-dtype", "int8"], "int8 keeps keys and values of heads"),
    ],
)
def test_latents_are_sized_in_no_type_that_a_worker_refuses(
    tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_for_cuda(tmp_path / "latents")
    rates = tmp_path / "rates.json"
    rates.write_bytes(msgspec.json.encode(CpuRates(((1, 1e-10), (8, 1.2e-10)), 1e-9, 1e-9, 1e-11, 1e-10, 1e-3)))
    assert main([str(path), *words, *(["--cpu-rates", str(rates)] if "cpu" in words else [])]) == 2
    assert why in capsys.readouterr().err


def test_latents_are_sized_on_no_gpu_that_a_worker_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "mistral4", "mistral-small-4")
    assert main([str(path), "--gpu", "H200", "--tensor-parallel-size", "2", "--no-simulation"]) == 0
    path = write_deepseek(tmp_path / "latents")
    assert main([str(path), "--gpu", "H200", "--no-simulation"]) == 2
    assert "latents of 128, 256, 512 numbers with 64 that are turned, the model's are 32 + 8" in capsys.readouterr().err


def test_the_command_takes_a_model_and_imports_no_torch(model: str) -> None:
    script = (
        "import sys, kvferry.cli as cli\n"
        f"try: cli.main(['size', {model!r}, '--gpu', 'H200', '--json'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["hardware"]["name"] == "H200"


def test_what_either_exchange_of_experts_tokens_sends_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write_config(tmp_path / "moe", "30b-a3b")), "--gpu", "H100", "--tensor-parallel-size", "4"]
    words += ["--enable-expert-parallel"]
    summed, exchanged = (
        figures(capsys, *words, *more)["exchanged_bytes"] for more in ([], ["--expert-exchange", "all_to_all"])
    )
    assert summed["alone"] == exchanged["sum"]["alone"] < exchanged["alone"] == summed["all_to_all"]["alone"]  # type: ignore[index]
    assert main(words) == 0
    assert ", all_to_all " in capsys.readouterr().out
    assert main([*words[:-1], "--expert-exchange", "all_to_all"]) == 2
    assert "expert_exchange: all_to_all needs enable_expert_parallel" in capsys.readouterr().err


def test_replicas_of_experts_take_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "moe", "30b-a3b")
    own = tuple(range(80)), tuple(range(48, 128))  # a quarter more than 64 each
    (tmp_path / "plan").write_text(ExpertPlan(128, 2, dict.fromkeys(range(48), own)).text())
    words = [str(path), "--gpu", "H100", "--tensor-parallel-size", "2", "--enable-expert-parallel"]
    even, planned = (
        figures(capsys, *words, *more)["memory"]["weights"] for more in ([], ["--expert-plan", str(tmp_path / "plan")])
    )
    assert planned - even == pytest.approx(16 * 48 * 3 * 2048 * 768 * 2, rel=0.01)


def test_a_cpu_is_sized_by_the_rates_of_each_part(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rates.json"
    rates = CpuRates(((1, 1e-10), (8, 1.2e-10)), 1e-9, 1e-9, 1e-11, 1e-10, 1e-3)
    path.write_bytes(msgspec.json.encode(rates))
    words = [model, "--gpu", "cpu", "--memory-gb", "64", "--cpu-rates", str(path), "--json"]
    assert main(words) == 0
    assert '"products"' in capsys.readouterr().out
    path.write_bytes(msgspec.json.encode(CpuRates((), 0, 0, 0, 0, 0)))
    assert main(words) == 2
    assert "cpu_rates" in capsys.readouterr().err
