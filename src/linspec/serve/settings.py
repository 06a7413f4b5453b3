"""The settings of a server: flags, then variables LINSPEC_SERVE_…, then one TOML file, then defaults.

settings = Settings.read(Path("serve.toml"), port=9000)
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from linspec.errors import ConfigError
from linspec.utils.messages import shown

PREFIX = "LINSPEC_SERVE_"
Seconds = Annotated[float, Field(gt=0, le=10**6)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Settings(BaseSettings):
    """How a server listens, whom it lets in, and what a request may ask for."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    models: list[str] = Field([], description="MODEL or NAME=MODEL, where none is named.")
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8000, description="0 takes a free one.")
    api_key: SecretStr | None = Field(None, description="A bearer key; better in the environment.")
    key_file: Path | None = Field(None, description="Bearer keys, lines NAME:SHA256.")
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM), for https.")
    tls_key: Path | None = Field(None, description="Private key (PEM) of --tls-cert.")
    cors_origins: list[str] = Field([], description="Web origins whose pages may ask.")
    max_batch: Count = Field(8, description="Sequences that run at once.")
    queue_limit: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        128, description="Sequences that may wait."
    )
    tbt_ms: Annotated[float, Field(ge=0, le=10**6)] = Field(
        50.0,
        description="Milliseconds that a stream may wait while prompts are read; 0 is no limit.",
    )
    state_mib: Count | None = Field(
        None, description="MiB of the states of running sequences; the others wait."
    )
    prefix_mib: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        256, description="MiB for states of earlier prompts and answers; 0 keeps none."
    )
    prefix_store: Path | None = Field(
        None, description="A directory for those that leave this memory; it holds texts too."
    )
    max_model_len: Count | None = Field(None, description="Tokens of a prompt and its output.")
    max_prompt_tokens: Count | None = Field(None, description="Tokens of a prompt.")
    max_tokens: Count = Field(4096, description="Output tokens that a request may ask for.")
    max_body_bytes: Count = Field(8 * 2**20, description="Bytes of a request.")
    body_seconds: Seconds = Field(60.0, description="Longest time in which a request arrives.")
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        1.0, description="Of requests that name none."
    )
    request_seconds: Seconds = Field(600.0, description="Longest time of a request.")
    shutdown_seconds: Annotated[float, Field(ge=0, le=10**6)] = Field(
        30.0, description="Time for running requests at the end."
    )
    log_prompts: bool = Field(False, description="Write prompts into the log.")
    otel: bool = Field(False, description="Send spans of requests by OpenTelemetry's protocol.")
    replicas: Count = Field(1, description="Copies of the models, behind one front; with --ray.")
    ray: bool = Field(False, description="Run them on Ray Serve.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file; the file of a directory that one happens to be in is not read."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def read(cls, config: Path | None = None, **given: Any) -> Settings:
        """The settings; raises ConfigError for what breaks a rule, with where it came from."""
        if config is not None and not config.is_file():
            raise ConfigError(f"{shown(config)}: there is no such file; give a TOML file")

        class FromFile(cls):  # type: ignore[misc, valid-type]  # of this very class
            model_config = SettingsConfigDict(toml_file=config)

        try:
            found: Settings = FromFile(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            said = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{name}: {said}" if name else said) from error
        # a file that is no TOML, a list in the environment that is no JSON
        except ValueError as error:
            raise ConfigError(f"the settings cannot be read: {error}") from error
        return found

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together; give both")
        if self.prefix_store is not None and not self.prefix_mib:
            raise ValueError(
                "--prefix-store keeps what leaves the memory of --prefix-mib, which is 0; raise that, or "
                "leave out the store"
            )
        if not self.keyed and not is_loopback(self.host):
            raise ValueError(
                f"{self.host} can be reached by others, so it needs a key: set {PREFIX}API_KEY or give "
                "--key-file, or listen at 127.0.0.1"
            )
        if self.replicas > 1 and not self.ray:
            raise ValueError(
                f"{self.replicas} replicas need Ray to run on; give --ray too, or leave --replicas out"
            )
        return self

    @property
    def keyed(self) -> bool:
        """Whether callers need a key."""
        return self.api_key is not None or self.key_file is not None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
