"""Certificates of tests, and what both sides make of them."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path
from typing import Any

from kvferry.common.router_config import RouterConfig

HERE = Path(__file__).parent


def write_certificate(folder: Path, name: str = "server") -> dict[str, Path]:
    """Copy a certificate and its key, which nobody else may read, in place of those before; return the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    shutil.copyfile(HERE / f"{name}.pem", certificate)
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes((HERE / f"{name}.key").read_bytes())
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


def router_config(**fields: object) -> RouterConfig:
    return RouterConfig.model_validate({"model_dir": "/m", "served_model_name": "m"} | fields)


def client_context(*, certificate: dict[str, Path] | None = None) -> ssl.SSLContext:
    """A client's, that believes the tests' authority; `certificate`: that it shows."""
    context = ssl.create_default_context(cafile=HERE / "authority.pem")
    if certificate is not None:
        context.load_cert_chain(certificate["ssl_certfile"], certificate["ssl_keyfile"])
    return context


def common_name(certificate: Any) -> str:
    """The name in a certificate that was shown, as `getpeercert` tells of it."""
    return str(dict(pair[0] for pair in certificate["subject"])["commonName"])
