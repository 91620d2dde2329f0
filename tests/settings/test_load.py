"""Layers of settings, and that a mistake is told with its place, its rule and the nearest right name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import ConfigError
from kvferry.common.router_config import RequestClass
from kvferry.settings.fields import ServeSettings, setting_keys
from kvferry.settings.load import DEFAULT, Loaded, Raw, load, value_of
from kvferry.settings.values import parse_number

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def load_text(tmp_path: Path, text: str) -> Loaded:
    return load(flags={}, env={}, file=write(tmp_path, text))


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1\nseed: 1\nhost: from-file\n")
    env = {"KVFERRY_PORT": "2", "KVFERRY_SEED": "2", "HOME": "/"}
    loaded = load(flags={"port": Raw("3", "--port")}, env=env, file=file)
    assert (loaded.settings.port, loaded.settings.seed, loaded.settings.host) == (3, 2, "from-file")
    assert loaded.settings.max_num_seqs == 64
    assert loaded.origins["port"] == "--port"
    assert loaded.origins["seed"] == "KVFERRY_SEED"
    assert loaded.origins["host"] == f"{file}:3"
    assert loaded.origins["max_num_seqs"] == DEFAULT


def test_a_flag_of_names_takes_several_at_once_as_the_variable_does() -> None:
    flags = {"allowed_hosts": Raw(["a.example,b.example", "c.example"], "--allowed-hosts")}
    assert load(flags=flags, env={}, file=None).settings.allowed_hosts == ("a.example", "b.example", "c.example")
    env = {"KVFERRY_ALLOWED_HOSTS": "a.example,b.example"}
    assert load(flags={}, env=env, file=None).settings.allowed_hosts == ("a.example", "b.example")


def test_names_of_a_model_have_no_spaces_around_them_and_stand_once() -> None:
    env = {"KVFERRY_SERVED_MODEL_NAME": "a, b, a"}
    assert load(flags={}, env=env, file=None).settings.served_model_name == ("a", "b")


def test_pool_is_a_number_or_a_section(tmp_path: Path) -> None:
    settings = load_text(tmp_path, "prefill: 2\ndecode:\n  workers: 3\n  max_num_seqs: 1K\n").settings
    assert settings.prefill.workers == 2
    assert settings.decode.workers == 3
    assert settings.decode.overrides() == {"max_num_seqs": 1024}


def test_flag_overrules_one_value_of_a_pool_and_keeps_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path, "prefill:\n  workers: 4\n  tensor_parallel_size: 2\n")
    settings = load(flags={"prefill.workers": Raw("1", "--prefill")}, env={}, file=file).settings
    assert settings.prefill.workers == 1
    assert settings.prefill.tensor_parallel_size == 2


def test_environment_reaches_pools_lists_and_switches() -> None:
    env = {
        "KVFERRY_DECODE": "2",
        "KVFERRY_DECODE_MAX_NUM_SEQS": "8",
        "KVFERRY_API_KEY": "a, b,",
        "KVFERRY_LOCAL_PREFILL": "false",
        "KVFERRY_SECRET": "no setting",
        "KVFERRY_CACHE": "/no/setting",
    }
    settings = load(flags={}, env=env, file=None).settings
    assert settings.decode.workers == 2
    assert settings.decode.max_num_seqs == 8
    assert settings.api_key == ("a", "b")
    assert settings.local_prefill is False


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1k", 1000),
        ("1K", 1024),
        ("32K", 32768),
        ("1.5k", 1500),
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1GB", 10**9),
        ("7", 7),
        (" 8 ", 8),
        ("4.1GB", 4_100_000_000),  # as a float it is none
        ("2.01k", 2010),
        ("9007199254740993", 2**53 + 1),
        ("32_768", 32768),
        ("+7", 7),
        ("-7", -7),
        ("1e3", 1000),
        ("8.589934592e+09", 8 << 30),
        ("1500E-2", 15),
    ],
)
def test_numbers_take_units(text: str, number: int) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["1.0001k", "k", "1X", "1e-3", "1e999", "1e", "_1", "0x10", "", "9" * 5000])
def test_what_is_no_whole_number_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number, perhaps with a unit"):
        parse_number(text)


MISTAKES = [
    ("portt: 3", ":1: portt: unknown key; did you mean port?"),
    ("seed: 1\nprefil: 3", ":2: prefil: unknown key; did you mean prefill?"),
    (
        "decode:\n  workers: 1\n  max_num_seq: 3",
        ":3: decode.max_num_seq: unknown key; did you mean decode.max_num_seqs?",
    ),
    ("port: 99999", ":1: port: must be less than or equal to 65535, not '99999'"),
    ("port: here", ":1: port: must be a whole number"),
    ("\n\ntransfer: nixel", ":3: transfer: must be 'nixl' or 'ucx', not 'nixel'; did you mean nixl?"),
    ("dtype: bflot16", "did you mean bfloat16?"),
    ("block_size: 17", ":1: block_size: must be 8, 16, 32, 64, 128, 256, 512, 1024 or 2048, not '17'"),
    ("gpu_memory_utilization: 90", ":1: gpu_memory_utilization: must be less than or equal to 1, not '90'"),
    ("max_num_seqs: 0", ":1: max_num_seqs: must be greater than 0, not '0'"),
    (
        "max_num_seqs: many",
        ":1: max_num_seqs: must be a whole number, perhaps with a unit such as 32K or 2GiB, not 'many'",
    ),
    (
        "max_num_seqs: 9\nmax_num_batched_tokens: 8",
        ":2: max_num_batched_tokens: must be at least max_num_seqs, which is 9: each of the sequences has a token",
    ),
    (
        "max_num_seqs: 8\ndecode:\n  max_num_batched_tokens: 8\n  max_num_seqs: 9",
        ":3: decode.max_num_batched_tokens: must be at least max_num_seqs, which is 9",
    ),
    ("max_model_len: 1", ":1: max_model_len: must hold a prompt token and an answer token"),
    ("prefill:\n  workers: -1", ":2: prefill.workers: must be greater than or equal to 0, not '-1'"),
    ("decode: 0", ":1: decode.workers: at least one decode worker is needed; for one pool that does both: --prefill 0"),
    (
        "decode:\n  min_workers: 2",
        ":2: decode.min_workers: the pool's 1 workers are not between its min_workers 2 and its",
    ),
    (
        "prefill:\n  max_workers: 0",
        ":2: prefill.max_workers: the pool's 1 workers are not between its min_workers 0 and",
    ),
    ("seed: 1\ndecode:\n  min_workers: 0", ":3: decode.min_workers: at least one decode worker is needed"),
    ("classes:\n  Foo Bar: {}", ":1: classes: Foo Bar.name: must be 1 to 32 lower-case letters, digits, - and _"),
    ("prefill: 0\nlocal_prefill: false", ":2: local_prefill: without prefill workers every prompt is local"),
    ("ray_address: auto", ":1: ray_address: only with --launcher ray"),
    ("api_key: ['a,b']", ":1: api_key: a key has"),
    ("api_key: [' a']", ":1: api_key: a key has"),
    ("admin_key: ['']", ":1: admin_key: a key has"),
    ("port: 3\nport: 4", ":2: port: given twice, first at"),
    ("prefill: 2\nprefill:\n  workers: 3", ":3: prefill.workers: given twice, first at"),
    ("- port", ":1: a mapping of settings is needed"),
    ("port: [", ":1: not YAML"),
    ("a: 1\n\tb: 2", ":2: not YAML"),
    ("port: !!python/object/apply:os.getpid []", ":1: could not determine a constructor"),
    ("port: !!bool maybe", ":1: the tag !!bool does not permit this value"),
    ("seed: 1\nport: !!int ''", ":2: the tag !!int does not permit this value"),
    ("port: !!bool yes", ":1: port: must be a whole number, not 'yes'"),
    ("port: !!int 80:30", ":1: port: must be a whole number, not '80:30'"),
    ("allowed_hosts: &a [!!float 1:30]\nserved_model_name: *a", ":1: allowed_hosts: 1:30 is no name"),
    ("allowed_hosts: [a, !!timestamp b]", ":1: the tag !!timestamp does not permit this value"),
    ("port: " + "[" * 320 + "]" * 320, ":1: lists and mappings lie too deep in one another"),
    pytest.param("port: " + "[" * 5000, ":1: not YAML: maximum recursion depth", id="deeper"),
    ("served_model_name: [[a]]", ":1: served_model_name: "),
    ("served_model_name: ' '", ":1: served_model_name: must not be blank"),
    ("swap_space: 4", ":1: swap_space: 4 bytes hold nothing; say 4GiB if that is meant"),
    ("kv_cache_memory_bytes: '8'", ":1: kv_cache_memory_bytes: 8 bytes hold nothing; say 8GiB"),
    ("decode: {kv_cache_memory_bytes: 8}", ":1: decode.kv_cache_memory_bytes: 8 bytes hold nothing; say 8GiB"),
    ("secret_file: [1]", ":1: secret_file: must be a path, not ['1']"),
    ("lora_modules: [a=b]", ":1: lora_modules: needs enable_lora"),
    ("allow_runtime_lora_updating: true", ":1: allow_runtime_lora_updating: needs enable_lora"),
    ("lora_experts: true", ":1: lora_experts: needs enable_lora"),
    (
        "enable_lora: true\nallow_runtime_lora_updating: true\nrouters: 2",
        ":2: allow_runtime_lora_updating: with one router",
    ),
    ("max_loras: 8\nmax_cpu_loras: 7", ":2: max_cpu_loras: at least max_loras, which is 8"),
    (
        "mixed_quantization: [plain, int4]\nspeculative_config: {method: ngram}",
        ":1: mixed_quantization: not with deterministic",
    ),
    (
        "tensor_parallel_size: 2\ndeterministic: true\ndecode: {enable_expert_parallel: true}",
        ":2: deterministic: both pools need the same enable_expert_parallel",
    ),
    ("allowed_hosts: ['chat.example:443']", ":1: allowed_hosts: chat.example:443 is no name such as chat.example:"),
    ("allowed_hosts: [https://chat.example]", ":1: allowed_hosts: https://chat.example is no name"),
    ("allowed_hosts: '*'", ":1: allowed_hosts: * is no name such as chat.example: without scheme, port, path and *"),
    ("data_dir: ''", ":1: data_dir: must be a path, not ''"),
    (r'data_dir: "a\0b"', r":1: data_dir: must be a path, not 'a\x00b'"),
    ("decode: {expert_plan: ''}", ":1: decode.expert_plan: must be a path, not ''"),
    ("router: {a: 1}", ":1: router: must be a list, not {'a': '1'}"),
    ("speculative_config: 5", ":1: speculative_config: must be a mapping, not '5'"),
    (
        'speculative_config: \'{"method": "ngrams"}\'',
        ":1: speculative_config: method: must be 'ngram', 'suffix' or 'draft_model', not 'ngrams'; did you mean",
    ),
    (
        """speculative_config: '{"method": "ngram", "num_speculative_token": 3}'""",
        ":1: speculative_config: num_speculative_token: is not known here; did you mean num_speculative_tokens?",
    ),
    (
        "speculative_config: {method: ngram, num_speculative_tokens: 99}",
        ":1: speculative_config: num_speculative_tokens: must be less than or equal to 16, not '99'",
    ),
    ("mixed_quantization: 'a:b'", ":1: mixed_quantization: must be 'plain', 'int8', 'int4' or 'fp8', not 'a:b'"),
    ("port: [1]", ":1: port: must be a whole number, not ['1']"),
    ("[a, b]: 1", ":1: a key must be the name of a setting"),
    ("port: yes", ":1: port: must be a whole number, not 'yes'"),
    ("port: 80:30", ":1: port: must be a whole number, not '80:30'"),
    (
        "max_num_seqs: yes",
        ":1: max_num_seqs: must be a whole number, perhaps with a unit such as 32K or 2GiB, not 'yes'",
    ),
    ("kv_cache_memory_bytes: true", ":1: kv_cache_memory_bytes: must be a whole number, perhaps with a unit"),
    ("drain_timeout: yes", ":1: drain_timeout: must be a number, not 'yes'"),
    ("drain_timeout: 1:30", ":1: drain_timeout: must be a number, not '1:30'"),
    ("prefill: yes", ":1: prefill.workers: must be a whole number, not 'yes'"),
    ("classes: {batch: {priority: yes}}", ":1: classes: batch.priority: must be a whole number, not 'yes'"),
    ("""classes: '{"batch": {"priority": true}}'""", ":1: classes: batch.priority: must be a whole number, not 'true'"),
    (
        "speculative_config: {method: ngram, num_speculative_tokens: on}",
        ":1: speculative_config: num_speculative_tokens: must be a whole number, not 'on'",
    ),
    (
        """speculative_config: '{"method": "ngram", "num_speculative_tokens": true}'""",
        ":1: speculative_config: num_speculative_tokens: must be a whole number, not 'true'",
    ),
    ("explain: 7", ":1: explain: must be true or false, not '7'"),
    (f"seed: {'9' * 5000}", ":1: seed: must be a whole number of fewer digits"),
    ("classes:\n  batch: {}\n  batch: {priority: 1}", ":3: classes: batch: given twice, first at"),
    ("classes:\n  a:\n    weight: 2\n    weight: 3", ":4: classes: a.weight: given twice, first at"),
    ("classes:\n- name: a\n  name: b", ":3: classes: name: given twice, first at"),
    ("speculative_config: {method: ngram, method: suffix}", ":1: speculative_config: method: given twice, first at"),
    (
        """speculative_config: '{"method": "ngram", "method": "suffix"}'""",
        ":1: speculative_config: method: given twice",
    ),
    ("classes: &a {b: &b {weight: 2, weight: 3}, c: *a, d: *b}", ":1: classes: b.weight: given twice, first at"),
    ("classes: '{batch: 1}'", ":1: classes: must be a JSON object: Expecting property name"),
    pytest.param(
        f"classes: '{'[' * 100_000}'", ":1: classes: must be a JSON object: maximum recursion depth", id="deep"
    ),
    ("prefill: &a {max_num_seqs: 2}\ndecode: {<<: *a}", ":2: decode.<<: merge keys are not read here; write"),
    ("<<: {port: 3}", ":1: <<: merge keys are not read here"),
    ("enable_lora: true\nlora_modules:\n- name:\n  path: /x", ":2: lora_modules: each is NAME=DIRECTORY or {"),
    ("enable_lora: true\nlora_modules: [a=/x, a=/y]", ":2: lora_modules: each name once"),
    ("enable_lora: true\nlora_modules: [{name: a, path: [b]}]", ":2: lora_modules: each is NAME=DIRECTORY or {"),
    ("data_dir: ~nobody-here/x", ":1: data_dir: a path with ~ must name a user of this machine, not '~nobody-"),
    ("enable_lora: true\nlora_modules: a=~nobody-here/x", ":2: lora_modules: a path with ~ must name a user of"),
    ("host: http://127.0.0.1", ":1: host: must be an address or a name of a host, without scheme, port and brackets"),
    ("host: 127.0.0.1:8010", ":1: host: must be an address or a name of a host, without scheme, port and brackets"),
    ("host: '[::1]'", ":1: host: must be an address or a name of a host, without scheme, port and brackets"),
    ("control_host: unix:/tmp/x", ":1: control_host: must be an address or a name of a host, without scheme"),
    ("seed: 2020-99-99", ":1: "),
    ("classes:\n  batch:\n    prio: 3", ":1: classes: batch.prio: is not known here"),
    (
        "classes: {a: {ttft_objective: 5}}",
        ":1: classes: a.ttft_objective: is not known here; did you mean ttft_objective",
    ),
    ("classes: ['a:b']", ":1: classes: 'a:b' is not like 'batch:priority=10,deadline_s=600'"),
    (
        "classes: {Batch: {}}",
        ":1: classes: Batch.name: must be 1 to 32 lower-case letters, digits, - and _, with neither",
    ),
    ("classes: {default: {priority: 1}}", ":1: classes: 'default' is what the other settings"),
    ("classes: [batch, 'batch:priority=3']", ":1: classes: each name once"),
    ("ttft_stretch: 0.5", ":1: ttft_stretch: must be greater than or equal to 1, not '0.5'"),
    (
        "policy: slow",
        ":1: policy: must be 'slo', 'least_loaded', 'kv_cost' or 'round_robin', not 'slow'; did you mean slo?",
    ),
    ("decode: 99999999999999999999999", ":1: decode.workers: must be less than or equal to 10000"),
    ("prefill:\n  max_workers: 1000000", ":2: prefill.max_workers: must be less than or equal to 10000"),
    ("max_num_seqs: 99999999999999999999", ":1: max_num_seqs: must be less than or equal to 9007199254740992"),
    ("routers: 1000000", ":1: routers: must be less than or equal to 1000"),
    ("num_threads: 99999999999999999999999", ":1: num_threads: must be less than or equal to 4096"),
    ("host: a b", ":1: host: must be an address or a name of a host, not 'a b'"),
    ("host: 10.0.0.0/8", ":1: host: must be an address or a name of a host, without scheme, port and brackets"),
    ("admin_host: ''", ":1: admin_host: must be an address or a name of a host, not ''"),
    ('control_host: "a\\0b"', ":1: control_host: must be an address or a name of a host"),
    (f"served_model_name: {'x' * 201}", ":1: served_model_name: has 201 characters; the limit is 200"),
    (f"worker_id: {'x' * 201}", ":1: worker_id: has 201 characters; the limit is 200"),
    ("served_model_name: [a, ' ']", ":1: served_model_name: must not be blank"),
    ("launcher: kubernetes", ":1: launcher: must be 'local' or 'ray', not 'kubernetes'"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistake_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    assert str(tmp_path / "cluster.yaml") + ":" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("port", "017500"),
        ("seed", "1_000"),
        ("max_num_seqs", "1K"),
        ("drain_timeout", "1e3"),
        ("drain_timeout", "2.5"),
        ("explain", "yes"),
        ("local_prefill", "OFF"),
        ("kv_checksum", "no"),
        ("kv_checksum", "OFF"),
        ("autoscale", "true"),
        ("autoscale", "On"),
        ("max_model_len", "32_768"),
        ("kv_cache_memory_bytes", "8.589934592e+09"),
        ("kv_cache_dtype", "fp8_e4m3"),
        ("served_model_name", "no"),
        ("revision", "1.0"),
        ("api_key", "0123"),
        ("data_dir", "2026-01-31"),
        ("prefill", "2"),
        ("classes", "batch:priority=3"),
    ],
)
def test_a_word_of_a_file_is_read_as_the_same_word_of_a_variable(tmp_path: Path, key: str, text: str) -> None:
    from_file = load_text(tmp_path, f"{key}: {text}\n").settings
    assert from_file == load(flags={}, env={f"KVFERRY_{key.upper()}": text}, file=None).settings
    assert from_file != ServeSettings()


def test_a_character_that_json_writes_as_two_is_one(tmp_path: Path) -> None:
    """A file may be JSON; a half of such a pair is what a name on a disk may have."""
    text = json.dumps({"served_model_name": ["\U0001f600", "a\U0001f600b"], "data_dir": "\udcff"})
    assert "\\ud83d\\ude00" in text
    settings = load_text(tmp_path, text).settings
    assert settings.served_model_name == ("\U0001f600", "a\U0001f600b")
    assert settings.data_dir == Path("\udcff")


def test_a_setting_with_nothing_behind_it_is_as_it_is_without(tmp_path: Path) -> None:
    text = "prefill:\n  # workers: 2\ndecode: ~\nclasses:\n  # batch: {priority: 10}\ndata_dir: null\n"
    assert load_text(tmp_path, text).settings == ServeSettings()


def test_a_key_may_stand_in_each_of_several_mappings(tmp_path: Path) -> None:
    """An alias, too, names its mapping's keys once."""
    text = "classes:\n  a: &a {priority: 1, weight: 2}\n  b: *a\n  c: {<<: *a, weight: 3}\n"
    assert [(known.name, known.priority, known.weight) for known in load_text(tmp_path, text).settings.classes] == [
        ("a", 1, 2),
        ("b", 1, 2),
        ("c", 1, 3),
    ]


@pytest.mark.parametrize("host", ["::1", "fe80::1%eth0", "127.0.0.1", "0.0.0.0", "node-3.example"])
def test_hosts_are_addresses_of_both_kinds_and_names(host: str) -> None:
    assert load(flags={"host": Raw(host, "--host")}, env={}, file=None).settings.host == host


def test_a_path_may_be_in_the_home_of_who_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [name for name in ServeSettings.model_fields if name.endswith(("_file", "_dir", "_template"))]
    assert {"pid_file", "chat_template", "api_key_file", "data_dir"} <= set(names)
    file = write(tmp_path, "".join(f"{name}: ~/x\n" for name in names) + "decode: {expert_plan: ~/x}\n")
    settings = load(flags={}, env={}, file=Path("~") / file.name).settings
    assert {value_of(settings, name) for name in (*names, "decode.expert_plan")} == {tmp_path / "x"}
    with pytest.raises(ConfigError, match=r"^config: a path with ~ must name a user of this machine, not '~nobody"):
        load(flags={}, env={}, file=Path("~nobody-here/x.yaml"))


@pytest.mark.parametrize("text", ["api_key: {key: sk-1}", "admin_key: [[sk-1]]", "admin_key: [{key: sk-1}]"])
def test_a_key_that_is_given_in_a_wrong_form_is_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r":1: \w+_key: must be a") as caught:
        load_text(tmp_path, text)
    assert "sk-1" not in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "port: -1\nseed: x\nmax_num_seqs: 0\n")
    assert len(str(caught.value).splitlines()) == 3


def test_request_classes_come_from_a_file_from_flags_or_from_a_variable(tmp_path: Path) -> None:
    text = "classes:\n  interactive: {ttft_objective_ms: 500, tpot_objective_ms: 40}\n  batch: {priority: 10}\n"
    wanted = (
        RequestClass(name="interactive", ttft_objective_ms=500, tpot_objective_ms=40),
        RequestClass(name="batch", priority=10),
    )
    assert load_text(tmp_path, text).settings.classes == wanted
    flags = ["interactive:ttft_objective_ms=500,tpot_objective_ms=40", "batch:priority=10"]
    assert load(flags={"classes": Raw(flags, "--classes")}, env={}, file=None).settings.classes == wanted
    assert load(flags={}, env={"KVFERRY_CLASSES": " ".join(flags)}, file=None).settings.classes == wanted
    in_json = '{"interactive": {"ttft_objective_ms": 500, "tpot_objective_ms": 40}, "batch": {"priority": 10}}'
    assert load(flags={}, env={"KVFERRY_CLASSES": in_json}, file=None).settings.classes == wanted
    assert load(flags={"classes": Raw([in_json], "--classes")}, env={}, file=None).settings.classes == wanted


def test_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"KVFERRY_PREFIL: unknown variable; did you mean KVFERRY_PREFILL?"):
        load(flags={}, env={"KVFERRY_PREFIL": "2"}, file=None)


@pytest.mark.parametrize("pool", ["PREFILL", "DECODE"])
def test_a_variable_of_a_pools_number_that_is_called_as_in_a_file_is_told_the_right_one(pool: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^KVFERRY_{pool}_WORKERS: unknown variable; did you mean KVFERRY_{pool}\?$"
    ):
        load(flags={}, env={f"KVFERRY_{pool}_WORKERS": "2"}, file=None)


@pytest.mark.parametrize("service", ["KVFERRY", "KVFERRY_CONTROL", "KVFERRY_DECODE_0"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(service: str) -> None:
    env = {
        f"{service}_SERVICE_HOST": "10.96.0.7",
        f"{service}_SERVICE_PORT": "80",
        f"{service}_SERVICE_PORT_HTTP_ADMIN": "8001",
        f"{service}_PORT": "tcp://10.96.0.7:80",
        f"{service}_PORT_80_TCP": "tcp://10.96.0.7:80",
        f"{service}_PORT_80_TCP_PROTO": "tcp",
        f"{service}_PORT_80_TCP_PORT": "80",
        f"{service}_PORT_80_TCP_ADDR": "10.96.0.7",
        "KVFERRY_HOST": "127.0.0.2",
    }
    loaded = load(flags={}, env=env, file=None)
    assert {key for key, origin in loaded.origins.items() if origin != "default"} == {"host"}


@pytest.mark.parametrize("name", ["data_dir", "disk_cache_dir", "api_key_file", "secret_file", "chat_template"])
def test_path_of_an_unset_variable_is_not_the_folder_that_the_command_runs_in(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^KVFERRY_{name.upper()}: must be a path, not ''$"):
        load(flags={}, env={f"KVFERRY_{name.upper()}": ""}, file=None)


def test_bad_flag_is_told_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^--port: must be less than"):
        load(flags={"port": Raw("70000", "--port")}, env={}, file=None)


def test_a_rule_about_a_setting_that_was_not_given_names_it() -> None:
    """Drafts imply `deterministic`, which wants pools of equal ranks."""
    speculative = Raw({"method": "ngram", "num_speculative_tokens": 3}, "--speculative-config")
    with pytest.raises(
        ConfigError, match=r"^deterministic: both pools need the same tensor_parallel_size.*device cuda"
    ):
        load(
            flags={"speculative_config": speculative, "prefill.tensor_parallel_size": Raw(2, "--p")}, env={}, file=None
        )


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: cannot read .*none.yaml: No such file or directory$"):
        load(flags={}, env={}, file=tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^config: .*bytes.yaml is no text in UTF-8$"):
        load(flags={}, env={}, file=tmp_path / "bytes.yaml")


def test_rule_between_settings_names_the_flag_that_breaks_it() -> None:
    with pytest.raises(ConfigError, match=r"^--ray-address: only with --launcher ray$"):
        load(flags={"ray_address": Raw("auto", "--ray-address")}, env={}, file=None)


@pytest.mark.parametrize(
    "text",
    [
        "max_num_batched_tokens: 8",
        "max_num_seqs: 10000",
        "max_num_seqs: 8\nmax_num_batched_tokens: 8",
        "max_num_seqs: 8\nprefill:\n  max_num_batched_tokens: 4",
        "max_num_seqs: 64\nmax_num_batched_tokens: 8\ndecode:\n  max_num_seqs: 8",
    ],
)
def test_few_tokens_limit_the_sequences_of_a_step_that_were_not_asked_for(tmp_path: Path, text: str) -> None:
    load_text(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "max_loras: 8\nmax_cpu_loras: 8",
        "deterministic: true\ndecode: {enable_expert_parallel: true}",
        "swap_space: 0\nkv_cache_memory_bytes: 1K",
    ],
)
def test_what_is_just_enough_and_what_splits_nothing_are_taken(tmp_path: Path, text: str) -> None:
    load_text(tmp_path, text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_right(path: Path) -> None:
    load(flags={}, env={}, file=path)


def test_every_setting_has_one_key_and_a_default() -> None:
    keys = setting_keys()
    assert len(set(keys.values())) == len(keys)
    for key in keys.values():
        value_of(ServeSettings(), key)


@given(st.text(max_size=200))
def test_any_text_loads_or_is_refused_with_a_place(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load(flags={}, env={}, file=path)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(sorted(ServeSettings.model_fields)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
), max_size=4))  # fmt: skip
def test_any_values_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        load(flags={}, env={}, file=path)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(("text", "mode"), [("on", "on"), ("off", "off"), ("advise", "advise"), ('"on"', "on")])
def test_a_scaling_mode_may_be_a_bare_word(tmp_path: Path, text: str, mode: str) -> None:
    assert load_text(tmp_path, f"autoscale: {text}\n").settings.autoscale == mode


@pytest.mark.parametrize(("text", "checksum"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off")])
def test_whether_checksums_are_compared_may_be_a_bare_word(tmp_path: Path, text: str, checksum: str) -> None:
    assert load_text(tmp_path, f"kv_checksum: {text}\n").settings.kv_checksum == checksum


def test_a_schedule_is_checked_before_anything_starts(tmp_path: Path) -> None:
    good = load_text(tmp_path, "scale_schedule: mon-fri 08:00-18:00 decode>=2\n")
    assert good.settings.scale_schedule == ("mon-fri 08:00-18:00 decode>=2",)
    with pytest.raises(ConfigError, match=r"cluster.yaml:1: scale_schedule: .* no day has"):
        load_text(tmp_path, "scale_schedule: 25:00-26:00 decode>=2\n")


def test_weights_of_two_forms_are_asked_for_by_name(tmp_path: Path) -> None:
    both = {"decode.quantization": Raw("int4", "--decode-quantization")}
    with pytest.raises(
        ConfigError, match=r"--decode-quantization: prefill workers have plain weights, decode workers int4"
    ):
        load(flags=both, env={}, file=None)
    alone = load(flags=both | {"prefill.workers": Raw("0", "--prefill")}, env={}, file=None).settings
    assert alone.decode.quantization == "int4"
    mixed = both | {"mixed_quantization": Raw(["plain,int4"], "--mixed-quantization")}
    settings = load(flags=mixed, env={}, file=None).settings
    assert settings.mixed_quantization == ("plain", "int4") and settings.decode.overrides() == {"quantization": "int4"}
    with pytest.raises(ConfigError, match="not with deterministic"):
        load(flags=mixed | {"deterministic": Raw(True, "--deterministic")}, env={}, file=None)
    narrow = {"decode.quantization": Raw("fp8", "--f"), "mixed_quantization": Raw(["plain,fp8"], "--m")}
    assert load(flags=narrow, env={}, file=None).settings.mixed_quantization == ("plain", "fp8")
    with pytest.raises(ConfigError, match="int5"):
        load(flags=both | {"mixed_quantization": Raw(["plain", "int5"], "--mixed-quantization")}, env={}, file=None)
    with pytest.raises(ConfigError, match="give --mixed-quantization plain,int4"):
        load(flags=both | {"mixed_quantization": Raw(["plain"], "--mixed-quantization")}, env={}, file=None)


def test_exact_answers_need_one_plan_of_experts(tmp_path: Path) -> None:
    text = "deterministic: true\ntensor_parallel_size: 2\nenable_expert_parallel: true\n"
    load_text(tmp_path, text + "expert_plan: plan.json\n")
    with pytest.raises(ConfigError, match="both pools need the same expert_plan"):
        load_text(tmp_path, text + "decode:\n  expert_plan: plan.json\n")


def test_exact_answers_need_one_exchange_of_experts_tokens(tmp_path: Path) -> None:
    text = "tensor_parallel_size: 2\nenable_expert_parallel: true\ndecode:\n  expert_exchange: all_to_all\n"
    settings = load_text(tmp_path, text).settings
    assert (settings.expert_exchange, settings.decode.expert_exchange) == ("sum", "all_to_all")
    with pytest.raises(ConfigError, match="both pools need the same expert_exchange"):
        load_text(tmp_path, "deterministic: true\n" + text)


@pytest.mark.parametrize("key", ["scale_down_after", "ttft_objective_ms", "ttft_stretch"])
@pytest.mark.parametrize("text", [".inf", "inf", ".nan"])
def test_a_number_without_end_is_refused(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.yaml:1: {key}: must be a (finite )?number, not "):
        load_text(tmp_path, f"{key}: {text}\n")
    with pytest.raises(ConfigError, match=r"must be a (finite )?number"):
        load_text(tmp_path, f"classes: {{batch: {{deadline_s: {text}}}}}\n")


@pytest.mark.parametrize(
    "text",
    [
        "[fr=/a/fr, de=/a/de]",
        "fr=/a/fr,de=/a/de",
        '[{name: fr, path: /a/fr, base_model_name: m}, "de=/a/de"]',
        "\n  - {name: fr, path: /a/fr}\n  - name: de\n    path: /a/de",
    ],
)
def test_adapters_may_be_texts_or_mappings_in_a_file(tmp_path: Path, text: str) -> None:
    settings = load_text(tmp_path, f"enable_lora: true\nlora_modules: {text}\n").settings
    assert settings.lora_modules == ("fr=/a/fr", "de=/a/de")


@pytest.mark.parametrize(
    ("text", "adapters"),
    [
        ("fr=/a/fr, de=/a/de", ("fr=/a/fr", "de=/a/de")),
        ('{"name": "fr", "path": "/a/fr"}', ("fr=/a/fr",)),
        ('[{"name": "fr", "path": "/a/fr"}, "de=/a/de"]', ("fr=/a/fr", "de=/a/de")),
    ],
)
def test_adapters_may_be_json_in_a_variable(text: str, adapters: tuple[str, ...]) -> None:
    env = {"KVFERRY_ENABLE_LORA": "1", "KVFERRY_LORA_MODULES": text}
    assert load(flags={}, env=env, file=None).settings.lora_modules == adapters


def test_an_adapters_directory_is_one_of_the_folder_that_the_command_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may run in another one."""
    monkeypatch.chdir(tmp_path)
    settings = load_text(tmp_path, "enable_lora: true\nlora_modules: fr=adapters/fr\n").settings
    assert settings.lora_modules == (f"fr={tmp_path}/adapters/fr",)


@pytest.mark.parametrize(
    "text", ["{name: fr}", "[{name: a=b, path: /a}]", "[{2001-01-01: x}]", "3", "=/a", "[{name: a, path: /a, to: b}]"]
)
def test_what_names_no_adapter_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml:2: lora_modules"):
        load_text(tmp_path, f"enable_lora: true\nlora_modules: {text}\n")


def test_every_router_needs_a_port_of_its_own_for_operators(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.yaml:1: admin_port: each router has one, and 3 from here on"):
        load_text(tmp_path, "admin_port: 65534\nrouters: 3\n")
    assert load_text(tmp_path, "admin_port: 65534\nrouters: 2\n").settings.admin_port == 65534
    assert load_text(tmp_path, "admin_port: 0\nrouters: 3\n").settings.admin_port == 0


@pytest.mark.parametrize("text", ["soon", "08:00-24:00 decode>=2", "08:60-09:00 decode>=2", "08:00-09:60 decode>=2"])
def test_a_window_that_is_none_is_told_once(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags={"scale_schedule": Raw([text], "--scale-schedule")}, env={}, file=None)
    assert str(caught.value).startswith(f"--scale-schedule: '{text}' ")
    assert "[" not in str(caught.value)
