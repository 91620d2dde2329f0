from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.benchmarks.engine.cases import Cases, decode_cases, drafting_cases, prefill_cases
from kvferry.benchmarks.engine.engine import main
from kvferry.benchmarks.engine.load import LoadedEngine, PrefillSample
from kvferry.benchmarks.engine.report import Case, EngineReport, max_ratio, plot_engine, print_engine
from kvferry.benchmarks.shared.rates import MeasuredRates
from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import CoreUse
from kvferry.tools.load.environment import describe_environment

from ...checkpoints import write_checkpoint
from ...engine_driver import make_engine
from ...transformers_checkpoints import SMALL, write_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_model_len=256)


@pytest.fixture
def loaded(model_dir: Path) -> Iterator[LoadedEngine]:
    loaded = LoadedEngine(make_engine(model_dir, max_num_batched_tokens=64))
    yield loaded
    loaded.close()


def test_decode_steps_lie_around_the_asked_context(loaded: LoadedEngine) -> None:
    sample = loaded.decode(num_rows=3, context=100, num_steps=10, num_warm_up_steps=4)
    assert (sample.num_rows, len(sample.step_s)) == (3, 10)
    assert abs(sample.context - 100) <= 1
    assert all(step_s > 0 for step_s in sample.step_s)


def test_rows_check_drafts_that_are_wrong(loaded: LoadedEngine) -> None:
    sample = loaded.decode(num_rows=3, context=100, num_steps=30, num_warm_up_steps=4, num_drafts=5)
    assert len(sample.step_s) == 30 and 100 <= sample.context < 110  # by chance one may be right
    loaded.pool.check()
    assert loaded.pool.num_owned_blocks == 0


def test_short_contexts_begin_with_one_token(loaded: LoadedEngine) -> None:
    assert loaded.decode(num_rows=1, context=2, num_steps=4, num_warm_up_steps=2).context == 5.5  # 4, 5, 6, 7


def test_prompts_go_in_chunks_and_are_never_answered_from_the_cache(loaded: LoadedEngine) -> None:
    samples = [loaded.prefill(200) for _ in range(2)]
    assert [(sample.num_tokens, sample.num_steps) for sample in samples] == [(200, 4)] * 2


def test_every_block_is_given_back(loaded: LoadedEngine) -> None:
    loaded.prefill(100)
    loaded.decode(num_rows=4, context=40, num_steps=8)
    loaded.pool.check()
    assert loaded.pool.num_owned_blocks == 0


def test_answers_go_on_from_states_that_no_step_has_left(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_model(tmp_path, transformers.Lfm2Config(**SMALL | {"layer_types": ["conv", "full_attention"]}))
    loaded = LoadedEngine(make_engine(tmp_path))
    assert loaded.decode(num_rows=2, context=40, num_steps=4, num_warm_up_steps=2).num_rows == 2
    assert loaded.prefill(50).num_tokens == 50
    loaded.close()


def test_step_that_fails_ends_the_measurement(model_dir: Path) -> None:
    loaded = LoadedEngine(make_engine(model_dir, num_blocks=2))
    with pytest.raises(AssertionError, match="every row"):
        loaded.decode(num_rows=1, context=60, num_steps=4, num_warm_up_steps=40)
    loaded.close()


def test_cases_are_read_from_the_command_line() -> None:
    assert drafting_cases("1@128,8@512+4") == ((1, 128, 0), (8, 512, 4))
    assert decode_cases("1@128,8@512") == ((1, 128), (8, 512))
    with pytest.raises(argparse.ArgumentTypeError, match="rows@tokens, as in"):
        decode_cases("8@512+4")
    assert prefill_cases("128,8192") == (128, 8192)
    assert decode_cases("") == ()


@pytest.mark.parametrize(
    "flags",
    [
        ["--decode", "8"],
        ["--decode", "0@5"],
        ["--decode", "1@5+0"],
        ["--decode", "1@5+"],
        ["--prefill", "1k"],
        ["--rates", "7"],
    ],
)
def test_cases_that_make_no_sense_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert "as in" in capsys.readouterr().err


def test_blocks_are_for_the_largest_case_alone() -> None:
    cases = Cases(decode=drafting_cases("4@100"), prefill=(1000,), num_steps=28)
    assert cases.longest == 1001
    assert cases.num_blocks(16) == 63 + 4
    assert replace(cases, decode=drafting_cases("64@100")).num_blocks(16) == 64 * 12 + 4
    assert replace(cases, decode=drafting_cases("64@100+16")).num_blocks(16) == 64 * 13 + 4


def test_measurement_writes_every_case_beside_its_floor(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the measurement sets for itself
    file = tmp_path / "new" / "engine.json"
    flags = [
        "--model",
        str(model_dir),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--rates",
        "200e9,20e9",
        "--json",
        str(file),
    ]
    flags += ["--decode", "1@128,2@300+3", "--prefill", "64,600", "--steps", "4", "--rounds", "2"]
    assert main(flags) == 0
    report = json.loads(file.read_text())
    cases = report["cases"]
    assert [case["name"] for case in cases] == ["decode 1@128", "decode 2@300+3", "prefill 64", "prefill 600"]
    assert [case["count"] for case in cases] == [8, 8, 2, 2]
    assert all(case["ratio"] == case["median_s"] / case["floor_s"] > 1 for case in cases)
    assert report["rates"]["read_bytes_per_s"] == 20e9
    assert report["model"] == "tiny"
    assert file.with_suffix(".svg").exists()
    assert report["misses"] and main([*flags, "--check"]) == 1  # so small a model is all overhead


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_that_is_cut_leaves_what_it_has_in_a_file_that_was_named_alone(
    is_named: bool, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, prefill = tmp_path / "engine.json", LoadedEngine.prefill

    def cut(loaded: LoadedEngine, num_tokens: int) -> PrefillSample:
        if num_tokens == 65:
            raise ConfigError("cut")
        return prefill(loaded, num_tokens)

    monkeypatch.setattr(LoadedEngine, "prefill", cut)
    monkeypatch.setattr("kvferry.benchmarks.engine.engine._RESULTS", file)
    flags = ["--model", str(model_dir), "--device", "cpu", "--threads", "1", "--rates", "200e9,20e9"]
    flags += ["--decode", "", "--prefill", "20,65", "--rounds", "1", *(["--json", str(file)] if is_named else [])]
    assert main(flags) == 2
    assert file.exists() == is_named
    assert not is_named or json.loads(file.read_text())["done"] == 1


def test_wrong_settings_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--decode", "", "--prefill", "", "--check", "--json", str(tmp_path / "e.json")]) == 2
    assert "engine: no case is left" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "absent")]) == 2
    assert main(["--plot", "x.jpg"]) == 2


CASE = Case("decode", 1, 128, 0.014, 0.012, 64, 1, 0.010, "memory", max_ratio=1.5)


def test_bars_are_missed_in_words() -> None:
    assert CASE.misses == []
    assert replace(CASE, median_s=0.016).misses == ["decode 1@128: 1.60 x floor, the bar is 1.50"]
    assert replace(CASE, host_gap=0.08).misses == ["decode 1@128: the device waits for 8% of a step, the bar is 5%"]


def test_bars_are_set_for_models_on_a_cpu_and_the_large_shape_on_a_gpu() -> None:
    assert max_ratio("cpu", None, "decode", 1, 128) == max_ratio("cpu", None, "prefill", 1, 8192) == 1.5
    assert max_ratio("cpu", "llama-tiny", "decode", 1, 128) is None
    assert max_ratio("cuda", "llama-3-8b", "decode", 1, 128) == 1.15
    assert max_ratio("cuda", "llama-3-8b", "decode", 64, 4096) == 1.2
    assert max_ratio("cuda", "llama-3-8b", "prefill", 1, 8192) == pytest.approx(1 / 0.65)
    assert max_ratio("cuda", "llama-3-8b", "prefill", 1, 32000) == pytest.approx(1 / 0.60)
    assert max_ratio("cuda", None, "decode", 1, 128) is None


def test_report_shows_what_was_missed_and_draws_the_same_picture_twice(tmp_path: Path) -> None:
    slow = replace(CASE, kind="prefill", context=8192, median_s=9.0, floor_s=5.0, bound="compute", num_steps=16)
    report = EngineReport(
        model="m",
        device="cpu",
        dtype="bfloat16",
        kv_dtype="bfloat16",
        num_threads=2,
        max_num_batched_tokens=512,
        rates=MeasuredRates(2e12, 24e9, "2048^3", "sum"),
        cases=(CASE, slow),
        cores=CoreUse(client=1.9, server=0.0, foreign=0.01),
        environment=describe_environment("engine", []),
    )
    shown = io.StringIO()
    print_engine(report, Console(file=shown, width=160))
    assert "2.0 TFLOP/s" in shown.getvalue()
    assert "missed: prefill 8192: 1.80 x floor, the bar is 1.50" in shown.getvalue()
    plot_engine(report, tmp_path / "a.svg")
    plot_engine(report, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
