"""Settings of how processes are started, reach and believe each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from ..common.config import Checksum, Settings, TransferName
from .option import ALL, ENGINES, ROUTER, SERVE, WORKERS, Option
from .values import FilePath, Host, Name, Names, Port, on_or_off


class ClusterSettings(Settings):
    """Settings of the cluster."""

    transfer: Annotated[TransferName, Option("Cluster", "What moves KV between workers.", ENGINES)] = "nixl"
    kv_checksum: Annotated[
        Annotated[Checksum, BeforeValidator(on_or_off)],
        Option("Cluster", "Check shipped blocks before use; auto: in host memory, not on GPUs.", ENGINES),
    ] = "auto"
    launcher: Annotated[Literal["local", "ray"], Option("Cluster", "Processes here, or actors on Ray.", SERVE)] = (
        "local"
    )
    ray_address: Annotated[
        str | None, Option("Cluster", "A running Ray cluster; without one, one is embedded.", SERVE)
    ] = None
    secret_file: Annotated[
        FilePath | None,
        Option("Cluster", "File with the secret that router and workers share; a second line is believed too.", ALL),
    ] = None
    insecure_loopback: Annotated[
        bool,
        Option("Cluster", "Do without a secret: every process of this machine may join.", ROUTER + WORKERS),
    ] = False
    control_host: Annotated[Host, Option("Cluster", "Address of the socket for workers.", ROUTER)] = "127.0.0.1"
    control_port: Annotated[Port, Option("Cluster", "Port of that socket.", ROUTER)] = 7001
    router: Annotated[Names, Option("Cluster", "host:port of a router's control socket; repeatable.", WORKERS)] = ()
    handoff_host: Annotated[
        Host, Option("Cluster", "Address of this worker for other workers.", WORKERS, flag="host")
    ] = "127.0.0.1"
    handoff_port: Annotated[Port, Option("Cluster", "Port of it; 0: any free one.", WORKERS, flag="port")] = 0
    worker_id: Annotated[
        Name | None,
        Option("Cluster", "Name of this worker in logs and metrics. Default: host and process id.", WORKERS),
    ] = None
