"""Bodies as JSON: large ones are parsed in another process, as a parser in this one would hold up every stream."""

from __future__ import annotations

import msgspec

from ...common.errors import CapacityError, RequestError
from .helper import Helper, HelperLost
from .strict_json import MAX_COMMAS, parse_json
from .wire import COMMAS, PARSE_JSON, REFUSAL, HelperRefusal

INLINE_BYTES = 32 * 2**10  # parsed where they are: a fraction of a millisecond
TIME_LIMIT_S = 10.0


class JsonParser:
    """One large body at a time: others wait."""

    def __init__(self) -> None:
        self.helper = Helper()

    async def parse(self, data: bytes, max_commas: int = MAX_COMMAS) -> dict[str, object]:
        """Parse as `parse_json` does. Raises CapacityError where the process failed."""
        if len(data) <= INLINE_BYTES:
            return parse_json(data, max_commas)
        try:
            kind, payload = await self.helper.ask_again(PARSE_JSON, COMMAS.pack(max_commas) + data, TIME_LIMIT_S)
        except HelperLost:
            raise CapacityError(f"a body of {len(data)} bytes could not be parsed", status=503) from None
        if kind == REFUSAL:
            refusal = msgspec.msgpack.decode(payload, type=HelperRefusal)
            raise RequestError(refusal.message, code=refusal.code, status=refusal.status)
        return msgspec.msgpack.decode(payload, type=dict[str, object])

    def close(self) -> None:
        self.helper.close()
