"""A `NixlBackend` tells its peers this of itself, as the metadata of its region."""

from __future__ import annotations

from ...common.errors import ProtocolError, TransferError
from ...wire.codec import Decoder
from ...wire.fields import Message
from ...wire.grants import RegionInfo
from .host_memory import HostMark


class NixlMetadata(Message, frozen=True):
    """Metadata that a peer needs to reach us."""

    nixl: bytes
    mark: HostMark | None  # None: our pages are a GPU's, or UCX was told not to use shared memory


_decoder: Decoder[NixlMetadata] = Decoder(NixlMetadata)


def metadata_of(region: RegionInfo) -> NixlMetadata:
    """Read a peer's. Raises TransferError."""
    try:
        return _decoder.decode(region.agent_metadata)
    except ProtocolError as error:
        text = f"the metadata of {region.agent}: {error}"
        raise TransferError(text, peer=region.agent, may_land=False) from error
