"""Both sides of a connection prove that they know the shared secret before anything else is decoded."""

from __future__ import annotations

from .fields import Message, Name, Nonce, Text

# Goes up when a message changes: processes of different versions refuse one another, naming both. Version 4 says whom
# a request is for (`RequestSpec.model`, `.adapter`, `.grammar`), names ranks' shards (`RegionInfo.shard`) and has room
# for a draft's state (`KVArrived.draft`). What a worker cannot serve of them, it refuses with a reason. Version 5 has
# prompts embedded (`EmbedTask`, `Embedding`). Version 6 tells how weights are quantized
# (`WorkerHello.quantization`). Version 7 says where an adapter's bytes are (`RequestSpec.adapter_path`) and which
# adapters a worker has (`WorkerStatus.adapters`). Version 8 tells how often experts are chosen
# (`WorkerStatus.experts`). Version 9 tells a worker how long the prompts are that wait for it
# (`LocalTask.tokens_behind`). Version 10 has the mask of first tokens come with a prompt (`PrefillTask.first_mask`).
# Version 11 tells the rank of a prompt's token (`SampledToken.rank`). Version 12 has heartbeats count adapters that are
# being loaded (`WorkerStatus.loading_adapters`). Version 16 has the mask of first tokens come with a prompt that a
# decode worker computes, too (`LocalTask.first_mask`). Version 17 has a step's tokens come in parts that are known as
# such (`StepTokens.is_rest`).
PROTOCOL_VERSION = 17


class Challenge(Message):
    """Accepting side, first frame of a connection."""

    protocol: int
    nonce: Nonce


class Hello(Message):
    """Connecting side. `mac` = HMAC-SHA256(secret, "hello" + the challenge's nonce + this nonce + id).

    Empty without a secret.
    """

    protocol: int
    id: Name  # worker id, or a router's id
    nonce: Nonce
    mac: Nonce


class Welcome(Message):
    """Accepting side: `mac` = HMAC-SHA256(secret, "welcome" + the hello's nonce + the challenge's nonce + id)."""

    id: Name
    mac: Nonce


class Refused(Message):
    """Accepting side: no. The text says both values that do not fit."""

    reason: Text
