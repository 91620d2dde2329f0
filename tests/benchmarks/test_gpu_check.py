from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kvferry
from kvferry.benchmarks.gpu import run as gpu_run
from kvferry.benchmarks.gpu.host import facts, missing, missing_of_toolkit, nvcc, why_no_gpu
from kvferry.benchmarks.gpu.kernels import (
    check_activation,
    check_attention,
    check_logits,
    check_norms,
    check_rotation,
    check_sampling,
)
from kvferry.benchmarks.gpu.parts import (
    PARTS,
    ROOT,
    Finished,
    Part,
    gpu_test_files,
    judge_checks,
    judge_engine,
    judge_handoff,
    judge_tests,
)
from kvferry.benchmarks.gpu.report import GpuReport, PartResult, Verdict, print_gpu, write_gpu
from kvferry.benchmarks.gpu.run import NO_GPU_EXIT_CODE, TimePlan, check, main, run_parts
from kvferry.benchmarks.gpu.serve import Exposure, check_gaps
from kvferry.benchmarks.gpu.serve import main as serve_main
from kvferry.common.clock import SystemClock
from kvferry.tests.fake_clock import FakeClock
from kvferry.tools.load.environment import describe_environment

from ..engine.cuda.torch_kernels import TorchKernels
from ..forks import Forks

QUIET = Console(file=io.StringIO())
CPU = torch.device("cpu")


def part(
    name: str,
    script: str = "",
    *,
    share: float = 1.0,
    needs: tuple[str, ...] = (),
    judge: Callable[[Finished], Verdict] = judge_checks,
) -> Part:
    return Part(name, f"about {name}", share, needs, lambda output: [sys.executable, "-c", script, str(output)], judge)


def checks_script(*, is_ok: bool) -> str:
    body = {"checks": [{"name": "one", "is_ok": is_ok, "found": "7 of 7"}]}
    return f"import sys; open(sys.argv[1], 'w').write({json.dumps(body)!r}); sys.exit({0 if is_ok else 1})"


# --- time ---------------------------------------------------------------------------------------------------


def test_parts_share_the_time_and_inherit_what_is_left() -> None:
    clock = FakeClock(1000.0)
    first, second, third = part("a", share=1), part("b", share=2), part("c", share=1)
    plan = TimePlan([first, second, third], 400.0, clock)
    assert plan.limit_s(first) == 100
    clock.advance(30)
    assert plan.limit_s(second) == 270
    clock.advance(290)
    assert plan.limit_s(third) == 80
    clock.advance(100)
    assert plan.limit_s(third) == 0


def test_default_parts_fit_into_eight_minutes() -> None:
    assert sum(part.share for part in PARTS) <= 480
    assert len({part.name for part in PARTS}) == len(PARTS)


# --- running ------------------------------------------------------------------------------------------------


def run(parts: list[Part], tmp_path: Path, total_s: float = 60.0, end_s: float = 0.2) -> list[PartResult]:
    plan = TimePlan(parts, total_s, SystemClock())
    return run_parts(parts, plan, tmp_path, dict(os.environ), QUIET, end_s=end_s)


def test_part_that_fails_does_not_keep_the_next_from_running(tmp_path: Path) -> None:
    crashing = part("crashing", "raise SystemExit('no such kernel')")
    results = run(
        [part("bad", checks_script(is_ok=False)), crashing, part("good", checks_script(is_ok=True))], tmp_path
    )
    assert [result.verdict.status for result in results] == ["fail", "fail", "pass"]
    assert [result.verdict.reason for result in results] == [
        "one: 7 of 7",
        "exit code 1, without a result: no such kernel",
        "one: 7 of 7",
    ]


def test_part_that_takes_too_long_is_ended_and_says_so(tmp_path: Path) -> None:
    endless = part("endless", "print('compiling', flush=True)\nimport time\ntime.sleep(600)")
    [result] = run([endless], tmp_path, total_s=1.5)
    assert result.verdict.status == "fail"
    assert result.verdict.reason.startswith("not done after ")
    assert result.verdict.reason.endswith("compiling")


def test_part_without_its_packages_or_without_time_is_skipped(tmp_path: Path) -> None:
    results = run([part("a", needs=("no_such_module", "json"))], tmp_path)
    results += run([part("b", checks_script(is_ok=True))], tmp_path, total_s=0.1)
    assert [result.verdict for result in results] == [
        Verdict("skipped", "not here: no_such_module"),
        Verdict("skipped", "the parts before it took its time"),
    ]


def test_program_that_cannot_be_started_fails_its_part(tmp_path: Path) -> None:
    broken = Part("broken", "", 1.0, (), lambda output: [str(tmp_path / "absent")], judge_checks)
    [result] = run([broken], tmp_path)
    assert (result.verdict.status, "cannot start" in result.verdict.reason) == ("fail", True)


def test_report_holds_every_part_with_its_time_and_the_command(tmp_path: Path) -> None:
    parts = [part("good", checks_script(is_ok=True)), part("bad", checks_script(is_ok=False))]
    report = check(parts, 60.0, tmp_path, ["--parts", "good,bad"], dict(os.environ), QUIET, tmp_path / "gpu.json")
    assert [(result.name, result.verdict.status) for result in report.parts] == [("good", "pass"), ("bad", "fail")]
    assert report.num_failed == 1
    assert report.elapsed_s >= sum(result.elapsed_s for result in report.parts) - 0.11  # rounded to tenths
    assert report.environment.command.endswith("gpu_check --parts good,bad")


def test_what_is_found_is_written_after_each_part(tmp_path: Path) -> None:
    seen = (
        f"import json, sys; body = json.load(open({str(tmp_path / 'gpu.json')!r})); "
        "found = {'name': str(len(body['parts'])), 'is_ok': True, 'found': 'so many'}; "
        "json.dump({'checks': [found]}, open(sys.argv[1], 'w'))"
    )
    parts = [part("first", checks_script(is_ok=True)), part("second", seen)]
    report = check(parts, 60.0, tmp_path, [], dict(os.environ), QUIET, tmp_path / "gpu.json")
    assert [result.verdict.reason for result in report.parts] == ["one: 7 of 7", "1: so many"]
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert (len(saved["parts"]), saved["num_wanted"]) == (2, 2)


def test_a_program_of_checks_that_is_cut_says_how_far_it_came(tmp_path: Path) -> None:
    body = (
        "import os, signal, sys; from pathlib import Path; from rich.console import Console\n"
        "from kvferry.benchmarks.shared.checks import run_checks\n"
        "def die() -> str:\n    os.kill(os.getpid(), signal.SIGKILL)\n    return ''\n"
        "named = {'a': lambda: 'fine', 'b': lambda: 1 // 0, 'c': die, 'd': lambda: 'never'}\n"
        "run_checks(Path(sys.argv[1]), named, Console(stderr=True))\n"
    )
    [result] = run([part("cut", body)], tmp_path)
    assert result.verdict.status == "fail"
    assert result.verdict.reason == (
        "2 of 4 checks, then cut (exit code -9); a: fine; b: ZeroDivisionError: integer division or modulo by zero"
    )


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Starts programs that have torch from one process."""
    with closing(Forks("torch", "kvferry.engine.engine", "kvferry.benchmarks.shared.checks")) as opened:
        yield opened


@pytest.mark.parametrize("each", [part for part in PARTS if part.name != "tests"], ids=lambda part: part.name)
def test_parts_name_programs_that_are_there(forks: Forks, each: Part, tmp_path: Path) -> None:
    command = each.command(tmp_path / "out")
    with (tmp_path / "told").open("w+b") as told:
        done = forks.Popen([*command[:3], "--help"], stdout=told, stderr=told, env=os.environ)
        assert done.wait() == 0, (tmp_path / "told").read_text()
    shown = (tmp_path / "told").read_text()
    assert "--json" in shown or "{exposed,tokens}" in shown


# --- judging ------------------------------------------------------------------------------------------------


def finished(tmp_path: Path, body: object, returncode: int | None = 0) -> Finished:
    output = tmp_path / "out"
    output.write_text(body if isinstance(body, str) else json.dumps(body))
    return Finished(returncode, output, "the last line\n", 100.0)


def test_engine_passes_with_its_ratios_and_fails_with_its_misses(tmp_path: Path) -> None:
    cases = [{"name": "decode 1@128", "ratio": 1.1}]
    good = judge_engine(finished(tmp_path, {"cases": cases, "misses": []}))
    assert (good.status, good.reason, good.figures["cases"]) == ("pass", "decode 1@128 1.10 x floor", cases)
    bad = judge_engine(finished(tmp_path, {"cases": cases, "misses": ["decode 1@128: too slow"]}, 1))
    assert (bad.status, bad.reason) == ("fail", "decode 1@128: too slow")
    assert judge_engine(finished(tmp_path, {}, 2)).status == "fail"
    cut = judge_engine(finished(tmp_path, {"done": 1, "of": 7, "cases": cases, "misses": []}, None))
    assert cut.reason == "1 of 7 cases, then cut (not done after 100 s); decode 1@128 1.10 x floor"


def test_handoff_is_judged_by_its_exit_code(tmp_path: Path) -> None:
    assert judge_handoff(finished(tmp_path, {"any": 1})) == Verdict("pass", "figures in the JSON", {"any": 1})
    assert judge_handoff(finished(tmp_path, {"any": 1}, 1)).reason == "exit code 1: the last line"
    cut = judge_handoff(finished(tmp_path, {"done": 2, "of": 10}, None))
    assert cut.reason == "2 of 10 results, then cut (not done after 100 s): the last line"
    assert judge_handoff(finished(tmp_path, "not JSON", None)).reason.startswith("not done after 100 s")


def junit(cases: str, **counts: int) -> str:
    numbers = " ".join(f'{name}="{counts.get(name, 0)}"' for name in ("tests", "failures", "errors", "skipped"))
    return f"<testsuites><testsuite {numbers}>{cases}</testsuite></testsuites>"


def test_tests_are_counted_and_named(tmp_path: Path) -> None:
    passed = '<testcase classname="t" name="a"/>'
    failed = '<testcase classname="t" name="b"><failure message="x"/></testcase>'
    skipped = '<testcase classname="t" name="c"><skipped message="needs a CUDA device"/></testcase>'
    assert judge_tests(finished(tmp_path, junit(passed, tests=1))).reason == "1 passed"
    verdict = judge_tests(finished(tmp_path, junit(passed + failed + skipped, tests=3, failures=1, skipped=1), 1))
    assert (verdict.status, verdict.figures["failed"]) == ("fail", ["t::b"])
    assert verdict.reason == "1 passed, 1 skipped (needs a CUDA device), failed: t::b"
    assert judge_tests(finished(tmp_path, junit(skipped, tests=1, skipped=1))).status == "skipped"
    unfinished = judge_tests(finished(tmp_path, junit(passed, tests=1), None))
    assert (unfinished.status, unfinished.reason) == ("fail", "not done after 100 s: 1 passed")
    assert judge_tests(finished(tmp_path, "", 4)).reason == "exit code 4, without a result: the last line"


def gpu_tests(output: Path, file: Path) -> list[str]:
    """What runs the tests for a GPU, with this file in place of all that have some."""
    tests = next(part for part in PARTS if part.name == "tests")
    files = {str(path) for path in gpu_test_files(ROOT / "tests")}
    return [*(word for word in tests.command(output) if word not in files), str(file)]


def test_tests_that_are_cut_short_still_tell_what_passed(tmp_path: Path) -> None:
    endless = tmp_path / "test_endless.py"
    endless.write_text(
        "import os, signal, time\n\ndef test_quick(): ...\n\n"
        "def test_endless():\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(600)\n"
    )

    def command(output: Path) -> list[str]:
        return [word for word in gpu_tests(output, endless) if word not in ("-m", "gpu")]

    [result] = run([Part("tests", "", 1.0, (), command, judge_tests)], tmp_path)
    assert (result.verdict.status, result.verdict.reason) == ("fail", "exit code 2: 1 passed")


def test_files_with_gpu_tests_are_found_by_their_marker(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "test_a.py").write_text("@pytest.mark.gpu\ndef test_it(): ...\n")
    (tmp_path / "test_b.py").write_text("def test_it(): ...\n")
    assert gpu_test_files(tmp_path) == [tmp_path / "sub" / "test_a.py"]


def test_tests_for_a_gpu_are_skipped_with_a_reason_where_there_is_none(tmp_path: Path) -> None:
    """One file's: that none runs without one is seen wherever all tests are run."""
    command = gpu_tests(tmp_path / "out", Path(__file__).parents[1] / "engine" / "test_cuda_states.py")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    verdict = judge_tests(Finished(done.returncode, tmp_path / "out", done.stdout, 60.0))
    assert (done.returncode, verdict.status) == (0, "skipped"), done.stdout
    assert verdict.figures["skipped_because"]


def test_handoff_is_judged_by_its_share_and_its_bytes() -> None:
    good = Exposure(3, 32_000, ttft_s=2.0, transfer_s=1.5, exposed_s=0.01, num_bytes=3e9, expected_bytes=3_000_000_000)
    assert good.check().startswith("10.00 ms of 2000 ms TTFT (0.50%) at 32000 tokens")
    with pytest.raises(AssertionError, match="the bar is 1%"):
        Exposure(3, 32_000, 2.0, 1.5, 0.1, 3e9, 3_000_000_000).check()
    with pytest.raises(AssertionError, match="0 bytes, not 3000000000"):
        Exposure(3, 32_000, 2.0, 0.0, 0.0, 0.0, 3_000_000_000).check()


def test_tokens_may_differ_where_float32_nearly_ties_and_nowhere_else() -> None:
    near, far = [[0.0] * 9 + [0.2]], [[0.0] * 9 + [6.0]]
    assert check_gaps(near, 10, "float32") == "9 of 10 tokens are the best by float32, largest gap 0.200"
    with pytest.raises(AssertionError, match=r"largest gap 6.000"):
        check_gaps(far, 10, "float32")
    with pytest.raises(AssertionError, match="5 of 10"):
        check_gaps([[0.0, 0.1] * 5], 10, "float32")
    with pytest.raises(AssertionError, match="9 of 10"):
        check_gaps(near, 12, "float32")  # an answer of another length


@pytest.mark.slow
def test_served_answers_are_held_against_float32(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    flags = ["--device", "cpu", "--shape", "llama-tiny", "--answer-tokens", "8", "--threads", "1", "--json", str(file)]
    assert serve_main(["tokens", *flags]) == 0
    assert [len(gaps) for gaps in json.loads(file.read_text())["gaps"]] == [8] * 8


# --- the references of the kernels, by plain torch ------------------------------------------------------------


@pytest.mark.parametrize("kernel", [check_norms, check_rotation, check_activation])
def test_plain_kernels_agree_with_the_references(kernel: Callable[[torch.device, TorchKernels], str]) -> None:
    assert kernel(CPU, TorchKernels()).startswith("largest difference")


def test_plain_logits_and_draws_agree_with_the_references() -> None:
    assert check_logits(CPU, TorchKernels(), vocab_size=300).startswith("largest difference")
    assert check_sampling(CPU, TorchKernels(), vocab_size=2000) == "256 of 256 draws are the CPU's"


@pytest.mark.parametrize("window", [None, 500])
def test_attention_in_16_bits_agrees_with_float32(window: int | None) -> None:
    assert check_attention(CPU, window).startswith("largest difference")


# --- the host -----------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_written_and_what_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--json", str(tmp_path / "gpu.json"), "--log-dir", str(tmp_path / "logs")]) == NO_GPU_EXIT_CODE
    assert list(tmp_path.iterdir()) == []
    assert "no GPU to check on" in capsys.readouterr().err


@pytest.mark.parametrize(("scripts", "code"), [([None, None], 1), ([True, None], 0), ([True, False], 1)])
def test_a_run_in_which_no_part_passed_has_proven_nothing(
    scripts: list[bool | None], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        part(name, "" if is_ok is None else checks_script(is_ok=is_ok), needs=("no_such_module",) * (is_ok is None))
        for name, is_ok in zip(("kernels", "engine"), scripts, strict=True)
    ]
    monkeypatch.setattr(gpu_run, "PARTS", parts)
    monkeypatch.setattr(gpu_run, "why_no_gpu", lambda env: [])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert main(["--json", str(tmp_path / "gpu.json"), "--log-dir", str(tmp_path / "logs")]) == code


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "kernels,plumbing"])
    assert "plumbing: choose from build, kernels, tests, engine, handoff" in capsys.readouterr().err


def test_reasons_against_a_gpu_name_the_driver() -> None:
    reasons = why_no_gpu({"PATH": "", "CUDA_VISIBLE_DEVICES": ""})
    assert any("nvidia-smi" in reason for reason in reasons)


def test_compiler_is_found_on_the_path_and_in_cuda_home(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert nvcc({"PATH": str(compiler.parent)}) == nvcc({"PATH": "", "CUDA_HOME": str(tmp_path)}) == compiler


def test_a_toolkit_without_its_headers_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    env = {"PATH": str(compiler.parent)}
    assert [line.split()[0] for line in missing_of_toolkit(env)] == ["curand.h", "cublasLt.h", "lib64/stubs/libcuda.so"]
    more = tmp_path / "more"
    more.mkdir()
    for name in ("curand.h", "cublasLt.h", "libcuda.so"):
        (more / name).touch()
    env |= {"FLASHINFER_EXTRA_CUDAFLAGS": f"-O3 -I{more}", "FLASHINFER_EXTRA_LDFLAGS": f"-L{more}"}
    assert missing_of_toolkit(env) == []


def test_missing_packages_go_by_the_name_of_their_wheel() -> None:
    assert missing(("json", "no_such_module"), {}) == ["no_such_module"]
    assert "nixl-cu13==1.5.1" in missing(("nixl",), {}) or missing(("nixl",), {}) == []


def test_facts_name_the_card_and_what_is_installed() -> None:
    found = facts(dict(os.environ))
    assert found.keys() == {"gpu", "driver, power limit", "torch", "nvcc", "flashinfer", "nixl"}
    assert torch.__version__.partition("+")[0] in found["torch"]


def test_script_runs_from_a_checkout_of_any_name(tmp_path: Path) -> None:
    checkout = tmp_path / "some-checkout"
    checkout.symlink_to(Path(kvferry.__file__).resolve().parent)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-I",
        str(checkout / "benchmarks" / "gpu_check.py"),
        "--json",
        str(tmp_path / "gpu.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == NO_GPU_EXIT_CODE, done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_report_shows_every_part_and_counts_failures(tmp_path: Path) -> None:
    verdicts = {
        "a": Verdict("pass", "fine", {"x": 1}),
        "b": Verdict("fail", "[oops]"),
        "c": Verdict("skipped", "not here: nixl"),
    }
    parts = tuple(PartResult(name, "about", verdict, 3.2, 90.0) for name, verdict in verdicts.items())
    report = GpuReport({"gpu": "a card"}, 12.0, parts, describe_environment("gpu_check", []))
    shown = io.StringIO()
    print_gpu(report, Console(file=shown, width=120))
    assert "[oops]" in shown.getvalue()
    assert "3 parts in 12 s, 1 failed" in shown.getvalue()
    write_gpu(report, tmp_path / "new" / "gpu.json")
    saved = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert [part["verdict"]["status"] for part in saved["parts"]] == ["pass", "fail", "skipped"]
