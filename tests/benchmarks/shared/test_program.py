"""Programs end alike: a wrong setting is told in a line, before anything starts where it can be known."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import kvferry
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.errors import ConfigError, TransferError


def _main(name: str) -> Callable[[Sequence[str]], int]:
    found: Callable[[Sequence[str]], int] = importlib.import_module(f"kvferry.benchmarks.{name}").main
    return found


def _writers() -> list[str]:
    """Name the programs that keep figures."""
    root, found = Path(kvferry.__file__).resolve().parent / "benchmarks", []
    for path in sorted(root.rglob("*.py")):
        if "@benchmark(" in (text := path.read_text(encoding="utf-8")) and '"--json"' in text:
            found.append(".".join(path.relative_to(root).with_suffix("").parts))
    return found


def test_results_lie_in_the_checkout_whatever_folder_a_program_is_run_in() -> None:
    assert Path(kvferry.__file__).resolve().parent / "benchmarks" / "results" == RESULTS_DIR


def test_an_error_of_ours_is_told_and_another_is_not_caught(capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"trace": ConfigError("[no] such trace"), "transfer": TransferError("gone"), "slip": KeyError("a slip")}

    @benchmark("it")
    def main(argv: list[str]) -> int:
        for word in argv:
            raise errors[word]
        return 1

    assert main([]) == 1
    assert [main(["trace"]), main(["transfer"])] == [2, 2]
    assert capsys.readouterr().err.splitlines() == ["it: [no] such trace", "it: gone"]
    with pytest.raises(KeyError):
        main(["slip"])


def test_a_program_reads_the_command_line_where_it_is_given_no_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @benchmark("it")
    def main(argv: list[str]) -> int:
        parser = parser_of("it", "What it is.\n\n    and how")
        parser.add_argument("number", type=int)
        number: int = parser.parse_args(argv).number
        return number

    monkeypatch.setattr("sys.argv", ["it", "3"])
    assert (main(), main(("4",))) == (3, 4)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "usage: python -m kvferry.benchmarks.it " in (shown := capsys.readouterr().out)
    assert "What it is.\n\n    and how\n" in shown


def test_names_are_known_or_refused() -> None:
    parse = names_of({"a": 1, "b": 2})
    assert parse("b,a") == ("b", "a") and parse(" a ") == ("a",)
    for text in ("", "a,", "a,c"):
        with pytest.raises(argparse.ArgumentTypeError, match="choose from a, b"):
            parse(text)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("faults.faults", ["--parts", "aborts,gapp"]),
        ("faults.faults", ["--cost-lens", "128,x"]),
        ("faults.faults", ["--pairs", "0"]),
        ("roles.roles", ["--cases", "decode,prefil"]),
        ("fidelity.fidelity", ["--policies", "slow"]),
        ("placement_live.placement_live", ["--policies", ""]),
        ("placement_live.placement_live", ["--levels", "0"]),
        ("lowload.lowload", ["--shapes", "128"]),
        ("lowload.lowload", ["--shapes", "128/1"]),
        ("overhead.overhead", ["--systems", "kvfery"]),
        ("handoff.handoff", ["--tables", "x"]),
        ("isa.isa", ["--rounds", "0"]),
        ("deterministic.deterministic", ["--prompt-rounds", "0"]),
        ("adapters.adapters", ["--rounds", "0"]),
        ("experts.experts", ["--rows", "0"]),
        ("restart.restart", ["--rounds", "0"]),
        ("batches.batches", ["--rounds", "0"]),
        ("llama_cpp.llama_cpp", ["--peer", "python", "--kinds", "Q5"]),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(name: str, flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _main(name)(flags)


@pytest.mark.parametrize("name", _writers())
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(SystemExit, match="2"):
        _main(name)(["--json", str(tmp_path / "a-file" / "out.json")])
    assert "a-file is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("fidelity.fidelity", ["--trace", "nosuch"]),
        ("placement_live.placement_live", ["--trace", "nosuch"]),
        ("fleet.fleet", ["--trace", "nosuch"]),
        ("reuse.reuse", ["--trace", "nosuch"]),
        ("goodput.goodput", ["--traces", "sample:azure-2023-conv", "nosuch"]),
        *((name, ["--plot", "x.jpg"]) for name in ("goodput.goodput", "fleet.fleet", "fidelity.fidelity")),
        *((name, ["--plot", "x.jpg"]) for name in ("turns.turns", "lowload.lowload", "roles.roles")),
        ("interference.interference", ["--plot", "x.jpg"]),
        ("experts.experts", ["--rows", "", "--check"]),
        ("experts.experts", ["--quantization", "int3"]),
        ("adapters.adapters", ["--rank", "257"]),
        ("quantization.speed", ["--cpu-isa", "sse"]),
        ("quantization.speed", ["--decode", "", "--prefill", ""]),
        ("llama_cpp.llama_cpp", ["--peer", "python", "--decode", "", "--prefill", ""]),
    ],
)
def test_what_cannot_be_measured_is_told(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # as before, afterwards
    assert _main(name)([*flags, "--json", str(tmp_path / "out.json")]) == 2
    assert f"{name.partition('.')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("name", ["turns.turns", "lowload.lowload", "roles.roles", "faults.faults", "restart.restart"])
def test_a_system_that_does_not_start_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> AbstractContextManager[None]:
        raise ConfigError("no model in /nonexistent")

    monkeypatch.setattr(f"kvferry.benchmarks.{name}.serving", failing)
    assert _main(name)(["--json", str(tmp_path / "out.json")]) == 2
    assert "no model in /nonexistent" in capsys.readouterr().err
