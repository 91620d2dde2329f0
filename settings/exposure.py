"""Names for who reaches a router's sockets, and what they must prove."""

from __future__ import annotations

from ..common.errors import ConfigError
from ..common.router_config import RouterConfig
from ..wire.address import Address


def check_exposure(config: RouterConfig, *, has_secret: bool) -> None:
    """Refuse a router that other machines reach without proving anything. Raises ConfigError."""
    if not config.needs_api_keys and not _is_loopback(config.host):
        raise ConfigError(
            f"host: {config.host} is reachable from other machines and no API key is set; "
            "set --api-key-file (or KVFERRY_API_KEY), or listen on 127.0.0.1"
        )
    if "*" in config.allowed_origins and not config.needs_api_keys:
        raise ConfigError(
            "allowed_origins: * lets every web page ask a server that needs no key; "
            "name the origins, or set --api-key-file"
        )
    has_admin_keys = bool(config.admin_key or config.admin_key_file)
    if config.admin_port is not None and not has_admin_keys and not _is_loopback(config.admin_host):
        raise ConfigError(
            f"admin_host: {config.admin_host} is reachable from other machines and no admin key is set; "
            "set --admin-key-file (or KVFERRY_ADMIN_KEY), or listen on 127.0.0.1"
        )
    if not has_secret and not _is_loopback(config.control_host):
        raise ConfigError(
            f"control_host: {config.control_host} is reachable from other machines and no secret is set; "
            "set --secret-file (or KVFERRY_SECRET), or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    return Address(host, 0).is_loopback
