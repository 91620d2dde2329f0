from __future__ import annotations

import kvferry
from kvferry.tools.load.environment import describe_environment


def test_record_names_machine_version_and_command() -> None:
    environment = describe_environment("kvferry bench", ["--model", "a b"])
    assert environment.command == "kvferry bench --model 'a b'"
    assert environment.kvferry_version == kvferry.__version__
    assert environment.num_cores >= 1
    assert environment.memory_gib > 0
    assert environment.cpu


def test_api_key_is_not_in_the_record() -> None:
    for argv in (["--api-key", "secret", "--seed", "1"], ["--api-key=secret", "--seed", "1"]):
        command = describe_environment("kvferry bench", argv).command
        assert "secret" not in command
        assert "***" in command
        assert command.endswith("--seed 1")
