"""What Linux tells of a processor, by the field that its kind has for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.processor import processor_features, processor_fields

X86 = "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("told", "features"),
    [(X86, {"fpu", "avx2", "fma"}), (ARM, {"fp", "asimd", "asimddp"}), ("processor\t: 0\nisa\t: rv64imafdc\n", set())],
)
def test_features_are_those_of_the_first_core(told: str, features: set[str], tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(told)
    assert processor_features(path) == features


def test_nothing_is_known_where_nothing_is_told(tmp_path: Path) -> None:
    assert processor_fields(tmp_path / "none") == {} and processor_features(tmp_path / "none") == frozenset()
