"""Settings of the listeners: who may ask, where, and how much."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from ..common.config import Settings
from ..common.router_config import UnknownFields
from .option import ALL, FRONTS, SERVE, Option
from .values import Count, FilePath, Host, Names, NumRouters, Port, Texts, check_host_names, check_origins

KEY_SETTINGS = ("api_key", "admin_key")  # whose values are shown to nobody


class HttpSettings(Settings):
    """The listeners."""

    host: Annotated[Host, Option("HTTP", "Address of the API.", FRONTS)] = "127.0.0.1"
    port: Annotated[Port, Option("HTTP", "Port of the API; 0: any free one.", FRONTS)] = 8000
    api_key_file: Annotated[
        FilePath | None,
        Option("HTTP", "File of keys that clients must send (kvferry keys); read again on a reload.", FRONTS),
    ] = None
    api_key: Annotated[Texts, Option("HTTP", "Key that clients must send; repeatable.", FRONTS)] = ()
    ssl_certfile: Annotated[
        FilePath | None,
        Option("HTTP", "Certificate in PEM, with its chain: clients come by https; read again on a reload.", FRONTS),
    ] = None
    ssl_keyfile: Annotated[FilePath | None, Option("HTTP", "Its private key in PEM, without a password.", FRONTS)] = (
        None
    )
    ssl_ca_certs: Annotated[
        FilePath | None,
        Option("HTTP", "Authorities in PEM, of one of which each client must show a certificate.", FRONTS),
    ] = None
    allowed_hosts: Annotated[
        Annotated[Names, AfterValidator(check_host_names)],
        Option("HTTP", "Name by which clients reach a server without keys, as through a proxy; repeatable.", FRONTS),
    ] = ()
    allowed_origins: Annotated[
        Annotated[Names, AfterValidator(check_origins)],
        Option("HTTP", "Origin of web pages that may ask; *: any, with API keys. Repeatable. Default: none.", FRONTS),
    ] = ()

    unknown_fields: Annotated[
        UnknownFields, Option("HTTP", "Unknown fields in a request; warn: ignored, and the answer says so.", FRONTS)
    ] = "refuse"

    answers_dir: Annotated[
        FilePath | None,
        Option(
            "HTTP",
            "Folder of answers to requests with an Idempotency-Key, for which clients may come back for ten minutes, "
            "and of what /v1/responses answered, kept for a day: any router of the folder finds them. Default: one of "
            "the launcher's own; none where there is no launcher.",
            FRONTS,
        ),
    ] = None
    store_responses: Annotated[
        bool, Option("HTTP", "Keep nothing that /v1/responses answered: no later request can go on with it.", FRONTS)
    ] = True
    max_connections: Annotated[
        Count | None,
        Option("HTTP", "Clients' connections at once. Default: 4096, or what open files allow.", FRONTS),
    ] = None
    max_connections_per_address: Annotated[
        Count, Option("HTTP", "Of these, from one address (of IPv6: one /64).", FRONTS)
    ] = 1024
    max_concurrency_per_key: Annotated[
        Count | None, Option("HTTP", "Requests of one API key at once. Default: no limit.", FRONTS)
    ] = None
    requests_per_minute_per_key: Annotated[
        Count | None, Option("HTTP", "Requests of one API key a minute. Default: no limit.", FRONTS)
    ] = None
    tokens_per_minute_per_key: Annotated[
        Count | None,
        Option("HTTP", "Tokens of one API key a minute, prompts and answers. Default: no limit.", FRONTS),
    ] = None
    share_prefix_cache: Annotated[
        bool, Option("HTTP", "Let API keys reuse the KV of each other's equal prompt beginnings.", FRONTS)
    ] = False
    admin_port: Annotated[
        Port | None, Option("HTTP", "Port of the admin listener; 0: any free one. Default: none.", FRONTS)
    ] = None
    admin_host: Annotated[Host, Option("HTTP", "Address of the admin listener.", FRONTS)] = "127.0.0.1"
    admin_key_file: Annotated[
        FilePath | None, Option("HTTP", "File of keys of the admin listener; read again on a reload.", FRONTS)
    ] = None
    admin_key: Annotated[Texts, Option("HTTP", "Key of the admin listener; repeatable.", FRONTS)] = ()
    routers: Annotated[NumRouters, Option("HTTP", "Router processes behind the one address.", SERVE)] = 1
    drain_timeout: Annotated[
        Annotated[float, Field(ge=0, le=86400)],
        Option("HTTP", "Seconds that running answers get after SIGTERM.", ALL),
    ] = 30.0
