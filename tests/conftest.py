"""Guards that hold for every test."""

from __future__ import annotations

from pathlib import Path

import kvferry


def pytest_configure() -> None:
    """An editable install points at the folder that was installed last: a second checkout would test the first."""
    checkout = Path(__file__).resolve().parent.parent
    imported = Path(kvferry.__file__).resolve().parent
    assert imported == checkout, f"kvferry is {imported}, not this checkout ({checkout}): make install-dev"
