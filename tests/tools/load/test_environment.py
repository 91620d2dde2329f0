from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import kvferry
from kvferry.tools.load import environment as subject
from kvferry.tools.load.environment import describe_environment


def _put_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_record_names_machine_version_and_command() -> None:
    environment = describe_environment("kvferry bench", ["--model", "a b"])
    assert environment.command == "kvferry bench --model 'a b'"
    assert environment.kvferry_version == kvferry.__version__
    assert environment.num_cores >= 1
    assert environment.memory_gib > 0
    assert environment.cpu


def test_api_key_is_not_in_the_record() -> None:
    for words in (["--api-key", "secret"], ["--api-key=secret"], ["--api", "secret"], ["--api-k=secret"]):
        argv = [*words, "--seed", "1"]
        command = describe_environment("kvferry bench", argv).command
        assert "secret" not in command
        assert "***" in command
        assert command.endswith("--seed 1")


def test_program_that_hangs_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_ANSWERED_WITHIN_S", 0.2)
    _put_program(tmp_path, "nvidia-smi", "exec sleep 600", monkeypatch)
    assert describe_environment("kvferry bench", []).gpus == ()


def test_what_answers_is_read_and_what_fails_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_program(tmp_path, "nvidia-smi", "echo 'a card, 8 MiB'; echo 'another, 8 MiB'", monkeypatch)
    assert describe_environment("kvferry bench", []).gpus == ("a card, 8 MiB", "another, 8 MiB")
    _put_program(tmp_path, "nvidia-smi", "echo 'no driver'; exit 9", monkeypatch)
    assert describe_environment("kvferry bench", []).gpus == ()


def test_process_that_may_start_no_program_describes_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_program(tmp_path, "nvidia-smi", "echo 'a card, 8 MiB'", monkeypatch)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    environment = describe_environment("kvferry bench", [])
    assert (environment.gpus, environment.git_commit) == ((), None)
    assert environment.cpu


def test_a_commit_whose_changes_are_not_told_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_program(tmp_path, "git", 'case "$*" in *rev-parse*) echo 0123456789ab;; *) exit 1;; esac', monkeypatch)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(kvferry, "__file__", str(tmp_path / "__init__.py"))
    assert describe_environment("kvferry bench", []).git_commit == "0123456789ab+unknown"
