"""Certificates of the listeners, whose files are read at start and again at each reload, and which of them have one."""

from __future__ import annotations

import ssl
from pathlib import Path

from ..common.errors import ConfigError
from ..common.router_config import RouterConfig
from ..wire.address import Address
from ..wire.credentials import open_regular, read_private

_ALPN = "http/1.1"


def read_tls(config: RouterConfig) -> ssl.SSLContext | None:
    """Read what connections are made with, TLS 1.2 or later; None: plain HTTP. Raises ConfigError."""
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        if config.ssl_certfile is not None:
            raise ConfigError("ssl_certfile: needs its private key; set --ssl-keyfile")
        for name, path in (("ssl_keyfile", config.ssl_keyfile), ("ssl_ca_certs", config.ssl_ca_certs)):
            if path is not None:
                raise ConfigError(f"{name}: needs the server's certificate; set --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([_ALPN])
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config.ssl_certfile, "ssl_certfile")
    read_private(config.ssl_keyfile, "ssl_keyfile")
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_refuse_password)
    except ssl.SSLError as error:
        is_another = error.reason == "KEY_VALUES_MISMATCH"
        why = f"is not the key of {config.ssl_certfile}" if is_another else "holds no private key in PEM"
        raise ConfigError(f"ssl_keyfile: {config.ssl_keyfile} {why}") from None
    except _PasswordAsked:
        raise ConfigError(f"ssl_keyfile: {config.ssl_keyfile} asks for a password; give a key without one") from None
    if config.ssl_ca_certs is not None:
        _load_certificates(context, config.ssl_ca_certs, "ssl_ca_certs")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def has_admin_tls(config: RouterConfig) -> bool:
    """Tell whether the admin listener speaks TLS: on a loopback, which a certificate seldom names, it does not."""
    return config.ssl_certfile is not None and not Address(config.admin_host, 0).is_loopback


def http_scheme(config: RouterConfig) -> str:
    return "https" if config.ssl_certfile is not None else "http"


def admin_scheme(config: RouterConfig) -> str:
    return "https" if has_admin_tls(config) else "http"


class _PasswordAsked(Exception):
    """Somebody would have to type it."""


def _refuse_password() -> str:
    raise _PasswordAsked


def _load_certificates(context: ssl.SSLContext, path: Path, setting: str) -> None:
    try:
        open_regular(path, setting).close()  # OpenSSL would wait at a pipe for whoever writes into it
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ConfigError(f"{setting}: {path} holds no certificate in PEM") from None
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error.strerror}") from error
