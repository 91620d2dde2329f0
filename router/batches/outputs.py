"""The files of a batch that ends: each line's answer stands in the output file or in the error file.

Their names do not depend on the try: who writes them again replaces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from .call import CallAnswer
from .files import OUTPUT, FileStore
from .folder import sync
from .input import InputLine
from .journal import Journal
from .record import BatchRecord, BatchStatus
from .store import output_id

_REASONS = {
    BatchStatus.EXPIRED: ("batch_expired", "the completion window was over before this request was answered"),
    BatchStatus.CANCELLED: ("batch_cancelled", "the batch was cancelled before this request was answered"),
}


def write_files(
    files: FileStore, record: BatchRecord, journal: Journal, lines: Sequence[InputLine], end: BatchStatus
) -> tuple[str | None, str | None]:
    """Write both in the order of the input, and return their ids; None for one with nothing in it.

    `lines`: empty where the input is gone. Counts lines without an answer as failed. Waits for the disk.
    """
    parts = {True: files.folder.new_part(), False: files.folder.new_part()}
    try:
        with parts[True].open("wb") as outputs, parts[False].open("wb") as errors:
            opened = {True: outputs, False: errors}
            for number, answer, is_ok in journal.answers(range(record.total)):
                record.failed += answer is None
                if answer is not None:
                    opened[is_ok].write(answer + b"\n")
                elif lines:  # else nobody knows its custom_id any more
                    opened[is_ok].write(_unanswered(lines[number], end) + b"\n")
            for file in opened.values():
                sync(file)
        return _placed(files, record, parts[True], "output"), _placed(files, record, parts[False], "error")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _placed(files: FileStore, record: BatchRecord, part: Path, kind: str) -> str | None:
    if not part.stat().st_size:
        return None
    stored = files.add(
        part,
        owner=record.owner,
        filename=f"{record.id}_{kind}.jsonl",
        purpose=OUTPUT,
        lifetime_s=record.output_lifetime_s,
        file_id=output_id(record.id, kind),
    )
    return stored.id


def line_of(line: InputLine, answer: CallAnswer) -> bytes:
    """Return OpenAI's line for an answer."""
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)}
    return _encoded(line, answer.request_id, response, None)


def _unanswered(line: InputLine, end: BatchStatus) -> bytes:
    code, message = _REASONS.get(end, _REASONS[BatchStatus.EXPIRED])
    return _encoded(line, line.custom_id, None, {"code": code, "message": message})


def _encoded(line: InputLine, name: str, response: object, error: object) -> bytes:
    return msgspec.json.encode(
        {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": response, "error": error}
    )
