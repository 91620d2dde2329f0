from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvferry.benchmarks.peers.vllm_install import VLLM_VERSION
from kvferry.benchmarks.serve import serve
from kvferry.benchmarks.serve.client import Cell
from kvferry.benchmarks.serve.measurement import Measurement, Plan
from kvferry.benchmarks.serve.report import ServeReport, load_report, write_report
from kvferry.benchmarks.serve.serve import main
from kvferry.benchmarks.serve.terms import Terms
from kvferry.benchmarks.shared.peers import Setup
from kvferry.tools.load.environment import describe_environment

SHORT, FATAL, LONG = Cell(100, 4, 1, 2), Cell(13, 4, 1, 2), Cell(20000, 4, 1, 1)
TERMS = Terms("m", 1, 32768, "a client", "a CPU", "bfloat16", "")

# In the place of vLLM: a server that is healthy, and a client whose prompts of 13 tokens end that server.
PEER = """#!{python}
import http.server, json, os, signal, sys
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
if sys.argv[1] == "serve":
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def do_POST(self):
            os._exit(1)
    http.server.HTTPServer(("127.0.0.1", int(flags["--port"])), Healthy).serve_forever()
num, inputs, outputs = (int(flags[f"--{{name}}"]) for name in ("num-prompts", "random-input-len", "random-output-len"))
if inputs == 13:
    import urllib.request
    urllib.request.urlopen(flags["--base-url"], data=b"x")
names = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms", "median_e2el_ms", "output_throughput")
figures = {{name: 10.0 for name in names}}
counts = {{"completed": num, "failed": 0, "total_input_tokens": num * inputs, "total_output_tokens": num * outputs}}
with open(flags["--result-dir"] + "/" + flags["--result-filename"], "w") as file:
    json.dump(figures | counts | {{"duration": 1.0}}, file)
"""


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    program = tmp_path / "peer" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(PEER.format(python=sys.executable))
    program.chmod(0o755)
    return Setup(model_dir=tmp_path, log_dir=tmp_path / "logs", peer_venv=tmp_path / "peer", cores=(0, 1))


def measurement(setup: Setup, json_path: Path, *cells: Cell, systems: tuple[str, ...] = ("vllm-agg",)) -> Measurement:
    plan = Plan(
        systems, cells, num_runs=2, num_rounds=1, seed=0, timeout_s=60.0, quiet_limit_s=0.0, quiet_sample_s=0.01
    )
    return Measurement(
        plan,
        setup,
        describe_environment("serve", []),
        load_report(json_path, TERMS),
        lambda report: write_report(report, json_path),
        Console(file=io.StringIO()),
    )


def test_every_cell_is_run_so_often_with_new_prompts(setup: Setup, tmp_path: Path) -> None:
    measured = measurement(setup, tmp_path / "s.json", SHORT, LONG)
    measured.plan = replace(measured.plan, num_rounds=2)
    measured.run()
    short, long = load_report(tmp_path / "s.json", TERMS).rows
    assert (len(short.runs), len(long.runs)) == (4, 2)  # a long one is run once in a round
    assert [run.round for run in short.runs] == [0, 0, 1, 1]
    assert len({run.seed for run in short.runs}) == 4
    assert short.is_clean
    assert short.about.startswith("vLLM")


def test_system_that_dies_leaves_failed_runs_in_all_later_cells(setup: Setup, tmp_path: Path) -> None:
    measured = measurement(setup, tmp_path / "s.json", SHORT, FATAL, replace(SHORT, concurrency=2))
    measured.run()
    found = {str(row.cell): row for row in load_report(tmp_path / "s.json", TERMS).rows}
    assert found["100/4/1"].is_clean
    assert found["13/4/1"].num_failed == 4
    assert "the client ended with 1" in found["13/4/1"].problems[0]
    assert found["100/4/2"].num_failed == 2
    assert "its process" in found["100/4/2"].problems[0]


def test_system_that_does_not_start_is_recorded_and_the_next_is_measured(setup: Setup, tmp_path: Path) -> None:
    alone = replace(setup, cores=(0,))
    measured = measurement(alone, tmp_path / "s.json", SHORT, systems=("vllm-pd", "vllm-agg"))
    measured.run()
    agg, pd = load_report(tmp_path / "s.json", TERMS).rows
    assert (agg.system, agg.is_clean) == ("vllm-agg", True)
    assert (pd.num_failed, pd.is_clean) == (2, False)
    assert "a core for each of its two servers" in pd.problems[0]


def test_a_clean_row_of_earlier_outlives_a_system_that_does_not_start(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    measurement(setup, path, SHORT).run()
    [before] = load_report(path, TERMS).rows
    (setup.peer_venv / "bin" / "vllm").unlink()
    again = measurement(setup, path, SHORT)
    again.run()
    assert load_report(path, TERMS).rows == (before,) and before.is_clean
    assert not again.is_clean  # which is the exit code
    assert isinstance(again.console.file, io.StringIO)
    assert (
        f"vllm-agg 100/4/1: not measured, the row of {before.environment.date} stays" in again.console.file.getvalue()
    )


def test_a_failure_of_this_measurement_stays_beside_its_own_runs(setup: Setup, tmp_path: Path) -> None:
    measured = measurement(setup, tmp_path / "s.json", SHORT)
    measured.run()
    (setup.peer_venv / "bin" / "vllm").unlink()
    measured.run()
    [row] = load_report(tmp_path / "s.json", TERMS).rows
    assert [run.is_clean for run in row.runs] == [True, True, False]


def test_very_long_prompts_are_for_a_split_vllm_where_that_is_asked_for(setup: Setup, tmp_path: Path) -> None:
    plan = measurement(setup, tmp_path / "s.json", SHORT, LONG).plan
    assert plan.cells_of("vllm-pd") == [SHORT]
    assert replace(plan, has_long_split=True).cells_of("vllm-pd") == [SHORT, LONG]
    assert plan.cells_of("kvferry-pd") == [SHORT, LONG]
    assert plan.num_runs_of(LONG) == 1


def test_wrong_settings_end_it_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plot", "x.jpg"]) == 2
    assert main(["--cells", "9000/8/1", "--max-model-len", "8192"]) == 2
    assert "9000/8/1 is longer than --max-model-len 8192" in capsys.readouterr().err
    assert main(["--systems", "vllm-pd", "--cells", "32000/8/1"]) == 2
    assert "with --long-split alone" in capsys.readouterr().err
    for wrong in (["--cells", "1/2"], ["--systems", "sglang"], ["--runs", "0"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_rows_of_another_processor_or_other_flags_are_not_added_to(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "ensure_vllm", lambda venv: None)
    monkeypatch.setattr(serve, "_setup", lambda flags: setup)
    path, plot = tmp_path / "s.json", str(tmp_path / "s.svg")
    measurement(setup, path, SHORT).run()
    monkeypatch.setattr(Measurement, "run", lambda measured: None)
    body = json.loads(path.read_text())
    flags = ["--systems", "vllm-agg", "--cells", "100/4/1", "--json", str(path), "--plot", plot]
    own = {"model": setup.served_name, "num_cores": 2, "max_model_len": setup.max_model_len}
    own |= {"client": f"vllm bench serve {VLLM_VERSION}", "cpu": describe_environment("", []).cpu}
    for terms, more, code in (
        (own, [], 0),
        (own, ["--vllm-dtype", "float32"], 2),
        (own, ["--kvferry-flags", "--dtype float32"], 2),
        (own | {"cpu": "another"}, [], 2),
        (own | {"cpu": "another"}, ["--fresh"], 0),
    ):
        path.write_text(json.dumps(body | {"terms": {"vllm_dtype": "bfloat16", "kvferry_flags": "", **terms}}))
        assert main([*flags, *more]) == code
        assert ("holds figures of" in capsys.readouterr().err) == (code == 2)


def test_saved_figures_are_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "s.json", tmp_path / "s.svg"
    assert main(["--show", "--json", str(path), "--plot", str(plot)]) == 2
    write_report(ServeReport(TERMS), path)
    assert main(["--show", "--json", str(path), "--plot", str(plot)]) == 0
    assert "a client in closed loop" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"] == []
    assert plot.exists()
