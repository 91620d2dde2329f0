from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.tools.load.traces import TraceRow, read_trace

MOONCAKE = """\
{"timestamp": 1000, "input_length": 1200, "output_length": 50, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 600, "output_length": 3, "hash_ids": [0, 9]}

{"timestamp": 2500, "input_length": 10, "output_length": 7, "hash_ids": [4]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.5000000,374,44
2023-11-17 00:00:01.2500000,396,109
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_mooncake_rows_come_in_order_of_arrival_from_zero_on(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, MOONCAKE)) == [
        TraceRow(0.0, 1200, 50, (0, 1, 2)),
        TraceRow(1.5, 10, 7, (4,)),
        TraceRow(2.0, 600, 3, (0, 9)),
    ]


def test_azure_times_may_have_a_zone(tmp_path: Path) -> None:
    text = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.250000+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 02:00:01.7500000+02:00,76,15
2024-05-10T00:00:02Z,2376,4
"""
    assert [row.arrival_s for row in read_trace(written(tmp_path, text))] == [0.0, 0.75, 1.5, 1.75]


def test_azure_times_cross_midnight(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, AZURE)) == [TraceRow(0.0, 374, 44), TraceRow(1.75, 396, 109)]


def test_scales_shrink_lengths_and_blocks_and_make_arrivals_denser(tmp_path: Path) -> None:
    rows = read_trace(written(tmp_path, MOONCAKE), length_scale=0.1, rate_scale=4)
    assert rows[0] == TraceRow(0.0, 120, 5, (0, 1, 2), block_tokens=51)
    assert (rows[1].num_prompt_tokens, rows[1].num_output_tokens) == (1, 1)
    assert rows[2].arrival_s == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither JSON lines nor a CSV"),
        ("TIMESTAMP,ContextTokens\n", "missing: GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        (AZURE + "2023-11-17 00:00:02,many,1\n", "line 4"),
        (AZURE + "yesterday,1,1\n", "line 4"),
        (AZURE + "2023-11-17 00:00:02,5\n", "line 4"),
        ("ContextTokens,GeneratedTokens,TIMESTAMP\n5,6\n", "line 2"),
        (AZURE + "2023-11-17 00:00:02,%s,1\n" % ("1" * 140_000), "line 3: field larger than field limit"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1.*output_length"),
        (MOONCAKE.replace("600", "-600"), "-600 tokens, times 1: 0 to 1,000,000,000 are read"),
        (
            MOONCAKE.replace('"output_length": 7', '"output_length": 1000000000000'),
            "1000000000000 tokens, times 1",
        ),
        (MOONCAKE.replace("3000", "1764000000000"), "20,417 days .* 366 at most: are its times of one clock"),
        (MOONCAKE.replace("3000", "1e30"), "days from its first request"),
    ],
)
def test_file_that_is_no_trace_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(written(tmp_path, text))


def test_bytes_that_are_no_text_are_refused_and_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"no text in UTF-8: .* at byte 0"):
        read_trace(path)
    path.write_text(AZURE, encoding="utf-8-sig")
    assert read_trace(path)[0] == TraceRow(0.0, 374, 44)


def test_missing_file_and_senseless_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "absent")
    with pytest.raises(ConfigError, match="374 tokens, times 1e\\+300"):
        read_trace(written(tmp_path, AZURE), length_scale=1e300)
    with pytest.raises(ConfigError, match="--trace-scale 0: must be above 0"):
        read_trace(written(tmp_path, AZURE), length_scale=0)
