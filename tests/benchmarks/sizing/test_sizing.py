"""What the calculator's benchmark compares, and with what."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import structlog

from kvferry.benchmarks.shared.rates import MeasuredRates
from kvferry.benchmarks.sizing import on_cpu, probe, published, ratio
from kvferry.benchmarks.sizing.ratio import Ratio
from kvferry.benchmarks.sizing.sizing import main
from kvferry.common.config import EngineConfig
from kvferry.models.config import ModelConfig
from kvferry.simulator.ratio import Split
from kvferry.sizing.cpu_rates import CpuRates
from kvferry.sizing.figures import Sizer
from kvferry.sizing.hardware import probed_cpu
from kvferry.sizing.steps import StepWork


@pytest.fixture(autouse=True)
def _restore_logs() -> None:
    structlog.reset_defaults()


def test_published_figures_are_of_four_sources_and_most_are_met() -> None:
    rows = list(published.rows())
    assert {row.source for row in rows} == {"NVIDIA", "vLLM", "DeepSeek", "SGLang"}
    long = [row for row in rows if "2,048" in row.what or row.source == "vLLM"]
    assert len(long) == 7 and all(row.is_met for row in long)
    assert all(0.4 < row.computed_ms / row.published_ms < 1.25 for row in rows), "a published step is rarely a bound"


def test_parts_are_kept_beside_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sizing.json"
    path.write_text(json.dumps({"cpu": {"rows": []}}))
    assert main(["--parts", "published", "--json", str(path)]) == 0
    body = json.loads(path.read_text())
    assert body["cpu"] == {"rows": []} and len(body["published"]["rows"]) == 13
    assert "MISSED" in capsys.readouterr().out
    assert main(["--parts", "published", "--json", str(path), "--check"]) == 1


def test_a_cpus_rates_are_written_for_the_calculator_into_whatever_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, probed = MeasuredRates(1e12, 1e10, "m", "r"), CpuRates(((1, 1e-10),), 1e-9, 1e-9, 1e-11, 1e-10, 1e-4)
    monkeypatch.setattr(on_cpu, "measure", lambda *args: (measured, probed, []))
    path = tmp_path / "new" / "rates.json"
    assert main(["--parts", "cpu", "--rates", str(path), "--json", str(tmp_path / "s.json")]) == 0
    assert msgspec.json.decode(path.read_bytes(), type=CpuRates) == probed
    assert json.loads((tmp_path / "s.json").read_text())["cpu"]["rates"]["read_bytes_per_s"] == 1e10


@pytest.mark.parametrize("parts", ["publishd", "", "published,cpus"])
def test_a_part_that_is_not_there_is_refused(parts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--parts", parts, "--json", str(tmp_path / "s.json")])
    assert "choose from published, cpu, ratio" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("found", [Split(0, 1), Split(0, 2), Split(1, 1)])
def test_every_split_is_judged_the_one_of_colocated_workers_too(found: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio, "least_fleet", lambda scenario: SimpleNamespace(split=found))
    monkeypatch.setattr(ratio, "simulate", lambda scenario: SimpleNamespace(attainment=scenario.fleet.prefill / 2))
    judged = ratio.ratio_of(ratio.TRACES[0], 1.0, 10, lambda text: None)
    assert [split for split, _ in judged.shares] == [f"{n}:{found.prefill + found.decode - n}" for n in
                                                     range(found.prefill + found.decode)]  # fmt: skip
    assert judged.chosen == str(found) and judged.is_best == (found != Split(0, 2))


def test_a_split_is_best_when_none_is_better_by_more_than_the_search_tells_apart() -> None:
    shares = (("1:3", 0.95), ("2:2", 0.945), ("3:1", 0.9))
    assert Ratio("t", 60.0, "3:1", "2:2", shares).is_best
    assert not Ratio("t", 60.0, "2:2", "3:1", shares).is_best


def test_a_probe_finds_the_rates_of_which_its_times_are_made(tmp_path: Path) -> None:
    rates = CpuRates(
        products=tuple((rows, (90 + 10 * rows) * 1e-12) for rows in (1, 2, 4, 8, 16, 32, 64, 512)),
        value_s=1.5e-9,
        score_s=1e-9,
        score_item_s=8e-12,
        cache_byte_s=8e-11,
        step_s=5e-4,
        layer_s=2e-5,
    )
    found = probe.rates_of(_times(rates, tmp_path), tmp_path)
    assert [rows for rows, _ in found.products] == [rows for rows, _ in rates.products]
    # A row of little context, and a prompt of a few tokens, have some of the cache in what is taken for their products.
    assert [took for _, took in found.products] == pytest.approx([took for _, took in rates.products], rel=0.01)
    assert found.value_s == pytest.approx(rates.value_s, rel=0.01)
    assert found.score_s == pytest.approx(1e-9)
    assert found.score_item_s == pytest.approx(8e-12)
    assert found.cache_byte_s == pytest.approx(8e-11)
    assert found.step_s == pytest.approx(5e-4, rel=0.02)
    assert found.layer_s == pytest.approx(2e-5, rel=0.1)  # with the cache of little context


def _times(rates: CpuRates, folder: Path) -> dict[str, float]:
    """Return what a machine of these rates would take for each case of the probe, in ms."""
    times: dict[str, float] = {}
    for name, shape in probe.SHAPES.items():
        for layers in probe.LAYERS[name]:
            config = probe.write_shape(folder / f"{name}-{layers}", shape, layers)
            steps = Sizer(
                EngineConfig(model_dir=config, served_model_name="m", device="cpu"),
                ModelConfig.from_dir(config),
                probed_cpu(64, rates),
                1024,
            ).steps
            cases = {f"decode {rows}": StepWork(0, 0, rows, 16 * rows) for rows in (1, 2, 4, 8, 16, 32)}
            cases["long"] = StepWork(0, 0, 8, 8 * 1024)
            cases |= {f"prompt {n}": StepWork(n, n * (n + 1) // 2) for n in (64, 512)}
            cases["behind"] = StepWork(512, 512 * 513 // 2 + 512 * 1024)
            times |= {f"{name}-{layers} {case}": steps.step_s(work) * 1e3 for case, work in cases.items()}
    return times
