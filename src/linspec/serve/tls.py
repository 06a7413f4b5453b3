"""The files of TLS, looked at before anything is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from linspec.errors import ConfigError
from linspec.utils.messages import because


def check_tls(cert: Path | None, key: Path | None) -> None:
    """Raise ConfigError where the two are no certificate and its key."""
    if cert is None or key is None:
        return
    for file in (cert, key):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"cannot read {because(error)}") from error
    try:
        # without a password OpenSSL asks for one at the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=b"")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{cert} and {key} are no certificate and its key ({error.reason or error}); give "
            "PEM files that belong together, the key without a password"
        ) from error
