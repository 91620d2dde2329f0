"""The command line as an operator meets it: names, help, one line for a mistake, exit codes."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
import typer

from kvferry import __version__
from kvferry.cli import app, main, other_flags
from kvferry.models.parts.expert_plan import read_plan
from kvferry.settings.fields import ServeSettings, option_of

from .checkpoints import write_checkpoint
from .deepseek import write_deepseek

# vLLM's names, and what is ours.
SERVE_FLAGS = """
--host --port --served-model-name --max-model-len --dtype --block-size --max-num-seqs --max-num-batched-tokens
--tensor-parallel-size --gpu-memory-utilization --kv-cache-memory-bytes --no-enable-prefix-caching --attention-backend
--chat-template --revision --device --seed --api-key --log-level --config --load-format --prefill --decode
--prefill-tensor-parallel-size --decode-tensor-parallel-size --launcher --ray-address --transfer
--max-local-prefill-tokens --no-local-prefill --secret-file --dry-run --kv-cache-dtype --enforce-eager
--routers --drain-timeout --admin-port --admin-host --admin-key
""".split()


class Result(NamedTuple):
    returncode: int | str | None
    stdout: str
    stderr: str


class Run(Protocol):
    def __call__(self, *arguments: str, **env: str) -> Result: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, with an environment that sets nothing else."""
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str, **env: str) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            for name, value in env.items():
                patch.setenv(name, value)
            main(list(arguments))
        return Result(ended.value.code, *capsys.readouterr())

    return run


def write_model(path: Path, **changes: object) -> str:
    """A model directory; `changes` are of its config.json."""
    return str(write_checkpoint(path, config=changes))


def assert_refused(result: Result, message: str) -> None:
    """One clear line on stderr, exit code 2."""
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stdout == ""


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"kvferry {__version__}\n"


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("serve", "router", "prefill", "decode", "bench", "chaos", "doctor", "config"):
        assert re.search(rf"│ {command}\s", result.stdout), command


def test_serve_help_has_every_flag_under_its_group(run: Run) -> None:
    help_text = run("serve", "--help").stdout
    assert [flag for flag in SERVE_FLAGS if not re.search(rf"{flag}\s", help_text)] == []
    panels = {option_of(name).panel for name in ServeSettings.model_fields if "serve" in option_of(name).on}
    assert [panel for panel in panels if f"─ {panel} ─" not in help_text] == []


def test_names_are_not_cut_on_a_narrow_terminal(run: Run) -> None:
    help_text = run("serve", "--help", COLUMNS="80").stdout
    assert "--prefill-tensor-parallel-size" in help_text
    assert "…" not in help_text


@pytest.mark.parametrize("command", ["router", "prefill", "decode", "doctor", "config", "bench", "chaos"])
def test_each_command_has_help(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout


@pytest.mark.parametrize("command", [(), ("keys",), ("config",), ("experts",)])
def test_where_a_command_is_missing_the_help_says_which_there_are(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"kvferry: which command? ({' '.join(['kvferry', *command])} --help)"


def test_layout_says_what_there_is_no_cpp_for(run: Run, tmp_path: Path) -> None:
    write_deepseek(tmp_path, tokenizer=True)
    arguments = ("--port", "0", "--device", "cpu", "--dtype", "bfloat16")
    result = run("serve", str(tmp_path), *arguments, "--kv-cache-memory-bytes", "1MiB", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Torch computes the model: there is no C++ for latents of such sizes" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), r"ok +kernels +native, (avx2|neon)_float32"),
        (("--quantization", "int8"), r"torch, .+ slower: there is no C\+\+ for quantized weights in float32"),
    ],
)
def test_doctor_names_the_kernels_of_the_checkpoints_own_type(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], found: str
) -> None:
    model = write_model(tmp_path / "tiny", dtype="float32")
    result = run("doctor", str(model), "--port", "0", "--device", "cpu", *arguments)
    assert re.search(found, result.stdout), result.stdout


def test_dry_run_prints_each_process(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    result = run(
        "serve",
        model,
        "--port",
        "0",
        "--prefill",
        "2",
        "--device",
        "cpu",
        "--kv-cache-memory-bytes",
        "1MiB",
        "--dry-run",
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "router", "p-0", "p-1", "d-0", "layout"]
    assert "= 128 blocks = 2048 tokens" in lines[2]  # 2 layers, K and V, 2 heads of 16, float32, 16 tokens: 8 KiB


@pytest.mark.parametrize(
    "words",
    [
        ("--lora-modules", "fr=/a/fr", "de=/a/de"),
        ("--lora-modules", "fr=/a/fr", "--lora-modules", "de=/a/de"),
        ("--lora-modules", '{"name": "fr", "path": "/a/fr", "base_model_name": "m"}', "de=/a/de"),
    ],
)
def test_adapters_may_be_given_in_each_of_the_forms_that_vllm_takes(run: Run, words: tuple[str, ...]) -> None:
    shown = run("config", "show", "--enable-lora", *words, "--max-loras", "2")
    assert 'lora_modules: ["fr=/a/fr", "de=/a/de"]' in shown.stdout
    assert "max_loras: 2" in shown.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--served-model-name", "a", "--served-model-name", "b", "--served-model-name=a"),
        ("--served-model-name=a,b",),
        ("--port=1", "--served-model-name", "a", "b"),
    ],
)
def test_a_model_may_have_several_names_in_each_form(run: Run, words: tuple[str, ...]) -> None:
    assert 'served_model_name: ["a", "b"]' in run("config", "show", *words).stdout


def test_short_flags_and_names_are_those_of_vllm(run: Run) -> None:
    shown = run("config", "show", "-tp", "2", "-ep", "-q", "int8", "--kv-cache-dtype", "fp8_e4m3").stdout
    assert "tensor_parallel_size: 2" in shown and "enable_expert_parallel: true" in shown
    assert 'quantization: "int8"' in shown and 'kv_cache_dtype: "fp8"' in shown
    assert_refused(run("config", "show", "--kv-cache-dtype", "fp8_e5m2"), "must be 'auto', 'bfloat16', 'fp8' or 'int8'")


def test_what_follows_a_name_is_the_model_where_none_was_named(run: Run) -> None:
    assert_refused(run("serve", "--served-model-name", "a", "./no-such-model"), "no model './no-such-model'")
    assert_refused(run("serve", "./no-such-model", "--served-model-name", "a", "b"), "no model './no-such-model'")


def test_taken_port_is_one_line(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert_refused(
            run("serve", "--port", port),
            rf"127.0.0.1:{port}: Address already in use; set another --port, port 0 takes any free one$",
        )


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("bench", ("--num-requests", "0"), "0 is not above 0"),
        ("chaos", ("--minutes", "nan"), "nan is not above 0"),
        ("simulate", ("--prefill", "-1"), "-1 is below 0"),
        ("size", ("--rate", "0"), "0 is not above 0"),
        ("bench", ("--num-requests", "many"), "'many' is no whole number"),
        ("chaos", ("--minutes", "long"), "'long' is no number"),
    ],
)
def test_a_programs_bad_value_is_one_line(run: Run, command: str, words: tuple[str, str], message: str) -> None:
    expected = rf"kvferry {command}: argument {words[0]}: {message} \(kvferry {command} --help\)"
    assert_refused(run(command, *words), expected)


def test_unknown_model_is_one_line(run: Run) -> None:
    assert_refused(run("serve", "./no-such-model", "--port", "0"), "no-such-model")


def test_bad_value_is_one_line_with_its_origin(run: Run, tmp_path: Path) -> None:
    assert_refused(run("serve", "--block-size", "17"), "--block-size: must be 8, 16")
    assert_refused(run("serve", KVFERRY_PORT="x"), "KVFERRY_PORT: must be a whole number")
    file = tmp_path / "a.yaml"
    file.write_text("port: 0\ntransfer: nixl2\n")
    assert_refused(run("serve", "--config", str(file)), "a.yaml:2: transfer: .* did you mean nixl?")


def test_misspelt_flag_is_told_the_right_one(run: Run) -> None:
    result = run("serve", "--prefil", "2")
    assert result.returncode == 2
    assert "--prefill" in result.stderr


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--trust-remote-code", "never run"),
        ("--pipeline_parallel_size=2", "--tensor-parallel-size"),
        ("--no-enable-chunked-prefill", "--max-num-batched-tokens"),
        ("-dp=2", "--prefill N and --decode N"),
        ("-pp", "--tensor-parallel-size"),
        ("-pp2", "--tensor-parallel-size"),
        ("-tp2", "-tp 2 are two words"),
        ("-O3", "--enforce-eager"),
    ],
)
def test_a_flag_of_another_server_is_told_what_stands_in_its_place(run: Run, flag: str, instead: str) -> None:
    done = run("serve", flag)
    assert done.returncode == 2
    assert f"{flag.partition('=')[0]}: there is no such flag here: " in done.stderr and instead in done.stderr


def test_what_stands_in_the_place_of_other_flags_is_there() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    flags = {flag for param in serve.params for flag in (*param.opts, *param.secondary_opts)}
    assert not flags & (other_flags.HERE.keys() | other_flags.SHORT.keys())
    assert set(other_flags.SHORT.values()) <= other_flags.HERE.keys()
    named = {word.strip(".,;:") for text in other_flags.HERE.values() for word in text.split() if word.startswith("--")}
    assert named and named <= flags


@pytest.mark.parametrize("flag", ["--model", "--model-path"])
def test_a_model_behind_a_flag_is_told_its_place(run: Run, flag: str) -> None:
    assert_refused(run("serve", flag, "./m"), rf"^kvferry: {flag}: .* the first word: kvferry serve MODEL$")


def test_a_letter_that_is_no_flag_is_told_as_one(run: Run) -> None:
    assert_refused(run("serve", "-x5"), r"^kvferry: No such option: -x ")


def test_the_help_of_a_switch_that_is_on_says_what_turning_it_off_does() -> None:
    names = [name for name in ServeSettings.model_fields if getattr(ServeSettings(), name) is True]
    assert {"store_responses", "local_prefill", "enable_prefix_caching"} <= set(names)
    turned_off = re.compile(r"(Do not|Keep nothing|Never|No|Refuse|Without)\b")
    assert [name for name in names if not turned_off.match(option_of(name).help)] == []


@pytest.mark.parametrize("command", ["serve", "router", "prefill", "decode"])
def test_the_help_names_the_variable_where_the_flag_does_not(run: Run, command: str) -> None:
    words = " ".join(run(command, "--help", COLUMNS="400").stdout.split())
    told = dict(re.findall(r"(--[a-z-]+) [A-Z]+ [^│]*\[variable: (KVFERRY_[A-Z_]+)\]", words))
    by_hand = {"--host": "KVFERRY_HANDOFF_HOST", "--port": "KVFERRY_HANDOFF_PORT"}
    pools = {f"--{pool}-{end}": f"KVFERRY_{pool.upper()}_{end.upper()}_WORKERS" for pool in ("prefill", "decode")
             for end in ("min", "max")}  # fmt: skip
    assert told == {"serve": pools, "router": {}}.get(command, by_hand)


def test_the_help_lists_choices_once(run: Run) -> None:
    words = " ".join(run("serve", "--help", COLUMNS="400").stdout.split())
    assert words.count("plain, int8, int4, fp8") == 1


def test_ranks_that_cannot_share_the_heads_are_one_line(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    assert_refused(run("serve", model, "--port", "0", "--decode-tensor-parallel-size", "3"), "possible: 1, 2")


def test_model_of_an_unknown_kind_is_one_line(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "odd", architectures=["OddForCausalLM"])
    assert_refused(run("serve", model, "--port", "0"), "OddForCausalLM")


def test_sockets_for_other_machines_need_a_secret(run: Run, tmp_path: Path) -> None:
    refused = "is no loopback address: --secret-file FILE or KVFERRY_SECRET is needed"
    assert_refused(run("router", "--control-host", "0.0.0.0", "--port", "0"), refused)
    assert_refused(run("decode", "--router", "10.0.0.1:7001"), refused)
    assert_refused(run("prefill", "--router", "127.0.0.1:7001", "--host", "10.0.0.2"), refused)
    short = tmp_path / "secret"
    short.write_text("short")
    short.chmod(0o600)
    assert_refused(run("decode", "--router", "10.0.0.1:7001", "--secret-file", str(short)), "at least 16")


@pytest.mark.parametrize("command", [("router", "--port", "0"), ("decode", "--router", "127.0.0.1:7001")])
def test_without_a_secret_a_process_by_hand_starts_only_if_told_that_this_is_insecure(
    run: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(run(*command), "every process of this machine may join .* --insecure-loopback")
    started: list[str] = []
    monkeypatch.setattr("kvferry.cli.serve.os.execve", lambda path, words, env: started.append(words[2]))
    run(*command, "--insecure-loopback")
    run(*command, KVFERRY_SECRET="s" * 16)
    assert len(started) == 2


def test_router_by_hand_of_more_positions_than_the_model_has_is_refused(run: Run, tmp_path: Path) -> None:
    command = ("router", write_model(tmp_path / "tiny"), "--port", "0", "--insecure-loopback")
    assert_refused(run(*command, "--max-model-len", "100000"), "max_model_len: 100000 is more than the model's 2048")


def test_worker_by_hand_needs_a_router(run: Run) -> None:
    assert_refused(run("decode"), "needs --router HOST:PORT")
    for router in ("10.0.0.1", "10.0.0.1:http", "10.0.0.1:\u00b2", f"10.0.0.1:{'9' * 5000}"):
        assert_refused(run("decode", "--router", router), "kvferry: router: '.*' is not host:port")
    refused = "kvferry: router: '{}' is not host:port: the host must be an address or a name of a host"
    assert_refused(run("decode", "--router", "..:7001"), refused.format("..:7001"))
    url = "http://10.0.0.1:7001"
    assert_refused(run("decode", "--router", url), f"{refused.format(url)}, without scheme, port and brackets")
    assert_refused(run("decode", "--router", "[::1]:7001"), "secret_file: ")


def test_worker_by_hand_whose_address_is_taken_or_elsewhere_is_refused_before_it_loads(
    run: Run, tmp_path: Path
) -> None:
    command = ("decode", "./no-such-model", "--router", "127.0.0.1:7001")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = rf"handoff_port: cannot listen on 127.0.0.1:{port}: Address already in use; .* --port, port 0"
        assert_refused(run(*command, "--insecure-loopback", "--port", str(port)), refused)
    refused = r"handoff_host: cannot listen on 192.0.2.1:0: Cannot assign requested address$"
    assert_refused(run(*command, "--host", "192.0.2.1", KVFERRY_SECRET="s" * 16), refused)


def test_config_show_tells_origins_and_hides_keys(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 7\ndecode:\n  workers: 3\n")
    result = run(
        "config", "show", "--origins", "--config", str(file), "--port", "9", "--api-key", "hidden", KVFERRY_HOST="::1"
    )
    assert result.returncode == 0, result.stderr
    for line in (
        "port: 9  # --port",
        f"seed: 7  # {file}:1",
        f"  workers: 3  # {file}:3",
        'host: "::1"  # KVFERRY_HOST',
    ):
        assert line in result.stdout.splitlines()
    assert "hidden" not in result.stdout
    assert "max_num_seqs: 64  # default" in result.stdout


def test_a_switch_that_is_off_by_default_is_turned_on_and_off_again(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("enforce_eager: true\n")
    for arguments, expected in (((), "false"), (("--enforce-eager",), "true"), (("--config", str(file)), "true")):
        assert f"enforce_eager: {expected}" in run("config", "show", *arguments).stdout
    assert "enforce_eager: false" in run("config", "show", "--config", str(file), "--no-enforce-eager").stdout


def test_what_config_show_prints_can_be_loaded_again(run: Run, tmp_path: Path) -> None:
    """Of each kind of value: words that YAML takes for others, numbers with exponents, lists, mappings, nothing."""
    file = tmp_path / "first.yaml"
    file.write_text(
        "max_model_len: 2K\nautoscale: on\nkv_checksum: off\nserved_model_name: [on, 1.0, null-model, 'a: b', '~']\n"
        "scale_down_after: 1e22\nscale_interval: 1e-7\nenable_lora: yes\n"
        "lora_modules: [a=~/a, {name: 7, path: 2026-01-01}]\n"
        "scale_schedule: mon-fri 08:00-18:00 prefill>=4 decode>=2\nmodel: 017\nrevision: '0x10'\ndata_dir: ~/x\n"
        "classes: {on: {deadline_s: 1e-3}, 1: {priority: -5, weight: .5}, null-one: {ttft_objective_ms: null}}\n"
        "speculative_config: {method: draft_model, model: ~/d, suffix_decoding_min_token_prob: 1e-5}\n"
        "prefill: {workers: 3, num_threads: 2}\ndecode: {min_workers: 1, expert_plan: p, enable_prefix_caching: no}\n"
    )
    shown = run("config", "show", "--config", str(file))
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "again.yaml").write_text(shown.stdout)
    again = run("config", "show", "--config", str(tmp_path / "again.yaml"))
    assert again.stdout == shown.stdout
    assert "max_model_len: 2048" in again.stdout and '"null-one"' in again.stdout


@pytest.mark.parametrize(
    ("text", "behind"),
    [
        ("speculative_config: {method: ngram}", "# deterministic: false"),
        ("max_num_batched_tokens: 32", "# max_num_seqs: 64"),
        ("decode: {max_num_batched_tokens: 32}", "# max_num_seqs: 64"),
        ("deterministic: true\nspeculative_config: {method: ngram}", None),
        ("device: cuda\nspeculative_config: {method: ngram}", None),
        ("decode: {max_num_batched_tokens: 32, max_num_seqs: 8}", None),
        ("prefill: {max_num_batched_tokens: 32}", None),
    ],
)
def test_config_show_does_not_give_what_gives_way(run: Run, tmp_path: Path, text: str, behind: str | None) -> None:
    """Given, a default that others overrule would be refused: with drafts, for one, `deterministic: false`."""
    (tmp_path / "first.yaml").write_text(text)
    shown = run("config", "show", "--config", str(tmp_path / "first.yaml"))
    assert shown.returncode == 0, shown.stderr
    assert [line for line in shown.stdout.splitlines() if line.startswith("#")] == ([behind] if behind else [])
    (tmp_path / "again.yaml").write_text(shown.stdout)
    again = run("config", "show", "--config", str(tmp_path / "again.yaml"))
    assert again.returncode == 0, again.stderr
    assert again.stdout == shown.stdout


def test_config_check_says_ok_or_every_mistake(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("port: 8000\n")
    assert run("config", "check", str(file)).stdout == f"{file}: ok\n"
    file.write_text("port: -1\nprot: 1\nmax_num_seqs: 0\nport: 2\nrouters: !!timestamp x\n")
    result = run("config", "check", str(file))
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 5, lines
    for number, rule in (
        (1, "port: must be greater"),
        (2, "prot: unknown key"),
        (3, "max_num_seqs: must"),
        (4, "given"),
    ):
        assert any(f"a.yaml:{number}: " in line and rule in line for line in lines), lines


@pytest.mark.slow
def test_doctor_fails_where_serve_would(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run("doctor", "--port", str(server.getsockname()[1]))
    assert result.returncode == 1
    assert re.search(r"^fail +port .*port 0", result.stdout, re.MULTILINE)
    assert re.search(r"^ok +torch ", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_once_in_its_words(tmp_path: Path) -> None:
    """What no check before the start can know: here, transports that UCX does not have."""
    model = write_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "kvferry", "serve", model, "--port", "0", "--log-level", "error"]
    env = {**os.environ, "UCX_TLS": "bogus"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240.0, check=False, env=env)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if "making an agent" in line]
    assert re.match(r"kvferry: [pd]-0: making an agent .*: NIXL_ERR_BACKEND", line), result.stderr


@pytest.mark.slow
def test_interrupt_while_it_starts_ends_serve_with_zero() -> None:
    command = [sys.executable, "-m", "kvferry", "serve", "--port", "0", "--load-format", "dummy"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first sign of a child
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0


def test_what_a_node_of_ray_decides_is_said_so(run: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    command = ["serve", str(model), "--port", "0", "--launcher", "ray", "--dry-run", "--ray-address"]
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        plan = run(*command, f"127.0.0.1:{port}")
    assert ", auto, threads by its node, " in plan.stdout and "None" not in plan.stdout
    refused = run(*command, f"127.0.0.1:{port}")
    assert refused.returncode == 2 and f"ray_address: nobody answers at 127.0.0.1:{port}" in refused.stderr
    refused = run(*command, "head")
    assert refused.returncode == 2 and "ray_address: 'head' is neither HOST:PORT nor ray://HOST:PORT" in refused.stderr


def test_an_interrupt_while_the_command_is_being_imported_is_no_traceback() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "kvferry", "status"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "typer" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in said


@pytest.mark.parametrize("step", ["typer.Typer.command", "typer.main.get_command"])
def test_an_interrupt_while_flags_are_made_is_no_traceback(step: str) -> None:
    owner, _, name = step.rpartition(".")
    program = f"""
import os, signal, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # where whoever started the tests has it ignored
original = {step}
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*args, **options)
{owner}.{name} = interrupted
from kvferry.cli import main
main(["status"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("kvferry.launch.preflight.Preflight._check_ports", ("serve",)),
        ("kvferry.models.files.resolve_model", ("router", "--port", "0", "--insecure-loopback")),
        ("kvferry.models.files.resolve_model", ("decode", "--router", "127.0.0.1:7001", "--insecure-loopback")),
    ],
)
def test_a_reload_while_a_start_is_checked_ends_nothing(step: str, words: tuple[str, ...]) -> None:
    owner, _, name = step.rpartition(".")
    program = f"""
import os, signal
import kvferry.launch.preflight, kvferry.models.files
from kvferry.cli import main
from kvferry.common.errors import ConfigError
def asked_to_reload(*args, **options):
    os.kill(os.getpid(), signal.SIGHUP)
    raise ConfigError("it went on")
{owner}.{name} = asked_to_reload
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may have been ignored, as nohup does
main([*{words}])
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (2, "kvferry: it went on\n")


def test_a_file_may_be_in_the_home_of_who_asks(run: Run, tmp_path: Path) -> None:
    """A shell leaves `--file=~/keys.yaml` as it is."""
    (tmp_path / "kvferry.pid").write_text("0")
    asked = [run("status", f"--pid-file={home}/kvferry.pid", HOME=str(tmp_path)) for home in ("~", tmp_path)]
    assert asked[0] == asked[1] and str(tmp_path) in asked[0].stderr, asked[0].stderr
    assert run("keys", "add", "alice", "--file=~/keys.yaml", HOME=str(tmp_path)).returncode == 0
    assert run("keys", "list", "--file", str(tmp_path / "keys.yaml")).stdout.startswith("alice ")
    mistake = run("keys", "list", "--file=~nobody-here/keys")
    assert_refused(mistake, "--file: a path with ~ must name a user of this machine, not '~nobody-here/keys'")


def test_keys_are_drawn_listed_and_revoked_by_whose_they_are(run: Run, tmp_path: Path) -> None:
    """The file holds hashes alone: a key is shown once, by the command that draws it."""
    file = tmp_path / "keys.yaml"
    added = [run("keys", "add", name, "--file", str(file)) for name in ("alice", "alice", "bob")]
    ending = run("keys", "add", "carol", "--file", str(file), "--expires", "2999-01-31")
    keys = [result.stdout.strip() for result in (*added, ending)]
    assert len(set(keys)) == 4 and all(key.startswith("kvf-") for key in keys)
    assert not any(key in file.read_text() for key in keys) and file.stat().st_mode & 0o777 == 0o600

    rows = run("keys", "list", "--file", str(file)).stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["alice", "alice", "bob", "carol"]
    assert rows[2].endswith("no end") and rows[3].endswith("2999-01-31T00:00:00+00:00")
    file.write_text(file.read_text().replace("2999-01-31", "2020-01-31"))
    rows = run("keys", "list", "--file", str(file)).stdout.splitlines()
    assert rows[3].endswith("2020-01-31T00:00:00+00:00 (expired)")

    assert run("keys", "revoke", "alice", "--file", str(file)).stdout == "2 of alice revoked\n"
    rows = run("keys", "list", "--file", str(file)).stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["bob", "carol"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("revoke", "nobody"), "has no key of nobody"),
        (("add", "alice", "--expires", "soon"), "--expires: 'soon' is no date such as 2027-01-31"),
        (("add", "alice", "--expires", "2020-01-31"), "2020-01-31T00:00:00+00:00 is over: the key would never"),
        (("add", "two words"), "id: 'two words' is not 1 to 64 letters, digits"),
    ],
)
def test_a_mistake_about_keys_is_one_line_and_leaves_the_file(
    run: Run, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    file = tmp_path / "keys.yaml"
    run("keys", "add", "bob", "--file", str(file))
    before = file.read_bytes()
    result = run("keys", *words, "--file", str(file))
    assert result.returncode == 2
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert file.read_bytes() == before


def _experts_of(worker_id: str, taken: list[int], of_ranks: list[int]) -> dict[str, object]:
    layer = {"layer": 2, "taken": taken, "recently_taken": taken, "of_ranks": of_ranks}
    known = {"worker_id": worker_id, "role": "decode", "ranks": 2, "imbalance": 2.5, "rank_imbalance": 1.25}
    return known | {"layers": [layer]}


def test_experts_show_tells_the_busiest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [_experts_of("d-0", [2, 10, 0, 4], [12, 4])]
    monkeypatch.setattr("kvferry.router.admin.explain_view.fetch", lambda admin, path, key: {"workers": workers})
    shown = run("experts", "show", "--admin", "127.0.0.1:9")
    assert shown.returncode == 0
    assert re.search(r"d-0 +decode +2 +16 +2\.50x +1\.25x +2\.1 62%, 2\.3 25%, 2\.0 12%", shown.stdout)
    workers.clear()
    shown = run("experts", "show", "--admin", "127.0.0.1:9")
    assert shown.returncode == 2 and "no worker has told of experts" in shown.stderr


def test_rows_of_status_are_whole_where_no_terminal_says_how_wide_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvferry.cli.operate import _show

    name, waits = "decode-worker-0", "the model's weights from a file system of the network that answers slowly today"
    row: dict[str, object] = {"name": name, "role": "decode", "state": "starting", "pid": 4_194_304}
    row |= {"restarts": 3, "waits_for": [waits]}
    deployment = {"http": None, "model": "tiny", "state": "starting", "admin": [], "pid": 1, "processes": [row]}
    shown = io.StringIO()
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", shown)
    _show(deployment)
    assert any(name in line and waits in line for line in shown.getvalue().splitlines())


def test_a_path_that_may_not_be_looked_at_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    is_dir = Path.is_dir

    def guarded(path: Path) -> bool:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", guarded)
    refused = run("serve", "/root/secret", "--dry-run")
    assert (refused.returncode, refused.stderr) == (2, "kvferry: /root/secret: Permission denied\n")


WRONG_COUNTS = [
    ([], "no worker has told of experts"),
    ([{"role": "decode", "ranks": 1, "layers": [{}]}], "missing required field `layer` - at `$.workers[0].layers[0]`"),
    ([{"role": "decode", "ranks": "x", "layers": []}], "got `str` - at `$.workers[0].ranks`"),
    ([{"role": "decode", "ranks": 1, "layers": [{"layer": 0, "taken": [-1]}]}], ">= 0"),
]


def test_experts_plan_writes_what_serve_takes(run: Run, tmp_path: Path) -> None:
    saved, plan = tmp_path / "counts.json", tmp_path / "plan.json"
    names = itertools.count()

    def wrong(workers: object) -> str:
        path = tmp_path / f"wrong-{next(names)}.json"
        path.write_text(json.dumps({"workers": workers}))
        return str(path)

    saved.write_text(json.dumps({"workers": [_experts_of("d-0", [8, 1, 1, 2], [9, 3])] * 2}))
    done = run("experts", "plan", str(plan), "--replicas", "2", "--from", str(saved))
    assert done.returncode == 0, done.stderr
    assert run("experts", "plan", str(plan), "--replicas=2", "--from=~/counts.json", HOME=str(tmp_path)) == done
    assert "1 layers of 4 experts; each of 2 ranks holds 3" in done.stdout
    assert "by 24: 1.50x split evenly, 1.00x with this plan" in done.stdout
    found = read_plan(plan, num_ranks=2, num_experts=4, sparse_layers=(2,))
    assert sorted(map(len, found.held(2))) == [3, 3]
    for words, message in (
        (["--replicas", "1"], "use 0"),
        (["--replicas", "0", "--pool", "prefill"], "no worker of prefill has told of experts"),
        (["--replicas", "0", "--from", str(plan)], "is no answer of /admin/experts"),
        (["--replicas", "0", "--from", str(tmp_path)], "cannot be read: Is a directory"),
        *((["--replicas", "0", "--from", wrong(workers)], message) for workers, message in WRONG_COUNTS),
    ):
        refused = run("experts", "plan", str(plan), "--from", str(saved), *words)
        assert refused.returncode == 2 and message in refused.stderr
