"""Drawn deployments: a seed gives the same one again, and its settings are ones that go together."""

from __future__ import annotations

from pathlib import Path

from kvferry.settings.fields import ServeSettings
from kvferry.tests.deployments.drawn import FAMILIES, draw
from kvferry.tests.e2e.exactness_models import write_exactness_model

_SEEDS = range(400)


def _settings(words: list[str]) -> dict[str, object]:
    """Return flags and their values as settings by name."""
    values: dict[str, object] = {}
    for place, word in enumerate(words):
        value = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("--") else None
        if word.startswith("--no-") and value is None:
            values[word.removeprefix("--no-").replace("-", "_")] = False
        elif word.startswith("--"):
            values[word.removeprefix("--").replace("-", "_")] = True if value is None else value
    return values


def test_a_seed_gives_the_same_deployment_again() -> None:
    assert [draw(seed) for seed in range(20)] == [draw(seed) for seed in range(20)]
    assert len({str(draw(seed)).partition(":")[2] for seed in _SEEDS}) == len(_SEEDS)


def test_settings_go_together(tmp_path: Path) -> None:
    model = write_exactness_model(tmp_path / "llama", "llama")
    for seed in _SEEDS:
        drawn = draw(seed)
        pools = {"prefill": {"workers": drawn.num_prefill}, "decode": {"workers": drawn.num_decode}}
        flags = [*drawn.serve_flags(model, (), Path("folder")), "--deterministic"]
        read = ServeSettings.model_validate(_settings(flags) | pools)
        assert read.is_exact and read.decode.workers == drawn.num_decode
        assert read.swap_space in (None, 0, 1 << 20, 256 << 20)


def test_every_family_is_drawn() -> None:
    families = {family for kind in FAMILIES for family in kind}
    assert {draw(seed).family for seed in range(2000)} == families
