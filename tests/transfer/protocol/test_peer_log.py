"""What fails again and again is one warning for each peer and reason."""

from __future__ import annotations

from structlog.testing import capture_logs

from kvferry.transfer.protocol.peer_log import PeerLog


def test_each_peer_and_reason_is_warned_of_once() -> None:
    warnings = PeerLog("write_failed")
    with capture_logs() as logs:
        for _ in range(3):
            warnings.warn("d-0", "timeout", write=7)
        warnings.warn("d-0", "link")
        warnings.warn("d-1", "timeout")
    told = [(entry["peer"], entry["reason"]) for entry in logs if entry["log_level"] == "warning"]
    assert told == [("d-0", "timeout"), ("d-0", "link"), ("d-1", "timeout")]
    assert [entry["count"] for entry in logs if entry["log_level"] == "debug"] == [2, 3]
    assert logs[0]["event"] == "write_failed" and logs[0]["write"] == 7


def test_what_is_known_of_peers_is_bounded() -> None:
    warnings = PeerLog("write_failed", max_known=2)
    with capture_logs() as logs:
        for peer in ("a", "b", "c", "a", "c"):
            warnings.warn(peer, "link")
    assert [entry["log_level"] for entry in logs] == ["warning"] * 4 + ["debug"]
