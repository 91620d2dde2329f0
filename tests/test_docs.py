"""The documents name what is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import kvferry
from kvferry.router.autoscaler.load_record import LoadRecord, RecordingMetrics, Replicas
from kvferry.router.autoscaler.scale_types import Counts

from .router.fleet import Fleet

ROOT = Path(kvferry.__file__).resolve().parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
METRIC = re.compile(r"\b(?:kvferry_|vllm:)[a-z_]+[a-z]")
CELL_END = re.compile(r"`[^`]*`|\\\\\||(\|)")  # a bar ends a cell, unless it is within code or escaped
FILE = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|toml|yaml))`")


def missing(page: Path) -> Iterator[str]:
    """Yield links and names of files that lead nowhere, from the page or from the repository's root."""
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if "://" not in target and not (page.parent / target).exists():
            yield f"{page.relative_to(ROOT)}: {target}"
    for name in FILE.findall(text):
        if not any((place / name).exists() for place in (ROOT, page.parent, ROOT / "router")):
            yield f"{page.relative_to(ROOT)}: {name}"


def test_every_link_and_file_name_leads_somewhere() -> None:
    assert PAGES
    assert [line for page in PAGES for line in missing(page)] == []


def test_every_metric_that_is_named_is_scraped() -> None:
    metrics = RecordingMetrics("tiny", LoadRecord())
    metrics.replicas = lambda: Replicas(Counts(1, 1), Counts(1, 1))
    body, _ = metrics.scrape([("tiny", Fleet().dispatcher.view())], num_in_flight=0)()
    known = set(re.findall(r"^# TYPE (\S+)", body.decode(), re.MULTILINE))
    named = {(page.name, name) for page in PAGES for name in METRIC.findall(page.read_text(encoding="utf-8"))}
    assert named and {(page, name) for page, name in named if name not in known} == set()


def uneven_rows(page: Path) -> Iterator[str]:
    """Yield the rows of tables that have more or fewer cells than the first row of theirs."""
    num_cells = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        found = sum(map(bool, CELL_END.findall(line))) if line.startswith("|") else 0
        if found and num_cells and found != num_cells:
            yield f"{page.relative_to(ROOT)}:{number}: {found - 1} cells in place of {num_cells - 1}"
        num_cells = (num_cells or found) if found else 0


def test_the_rows_of_a_table_have_as_many_cells() -> None:
    assert [line for page in PAGES for line in uneven_rows(page)] == []


def test_no_command_names_a_day_that_will_be_over() -> None:
    command = re.compile(r"^\S*\$ .*--expires \d.*", re.MULTILINE)
    found = [line for page in PAGES for line in command.findall(page.read_text(encoding="utf-8"))]
    assert found == []
