"""config.json: what a model directory says of its model, read once and written.

    read = read_config_file(resolve("path/to/llama"))
    print(read.config.layers, read.family)

linspec's own format has `model_type` "linspec", the version of the format, and the model's
configuration under the key that names its kind. A GGUF file says the same in its header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linspec.checkpoints.families import known as families
from linspec.checkpoints.families.base import FAMILIES, Family
from linspec.checkpoints.gguf.config import read_config
from linspec.checkpoints.gguf.reader import is_gguf, read_gguf
from linspec.checkpoints.origin import GENERATION
from linspec.errors import CheckpointError
from linspec.models.config import ModelConfig
from linspec.models.model_types import MODEL_TYPES, ModelType, of_config
from linspec.utils.border import read_json
from linspec.utils.format_version import CURRENT, KEY, check_format

# the key of what is said of quantized weights
QUANTIZATION = "quantization"
# the key of what is said of the model that this one is a change of
DELTA = "delta"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What was read of one model. family: of the format on disk, None for linspec's own.

    quantization, delta: the entries of linspec's own format about quantized weights, and about the model of
    which this one is a change; None where there is no such thing.
    """

    folder: Path
    config: ModelConfig
    family: Family | None
    quantization: Any = None
    delta: Any = None

    @property
    def kind(self) -> ModelType:
        """The kind of model."""
        return of_config(self.config)


def read_config_file(folder: Path) -> ConfigFile:
    """What a directory or a GGUF file says; raises CheckpointError if that is no sound model."""
    if is_gguf(folder):
        config = read_config(read_gguf(folder))
        return ConfigFile(folder, config, FAMILIES[config.family])
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no config.json in {folder}: not a model directory, or one whose saving was cut off"
        )
    data = read_json(folder / "config.json")
    if data.get("model_type") == "linspec":
        own = _read_own(data, folder)
        return ConfigFile(folder, own, None, data.get(QUANTIZATION), data.get(DELTA))
    generation = folder / GENERATION
    if generation.exists():
        given = read_json(generation)
        data |= {key: given[key] for key in _IDS if given.get(key) is not None}
    family = families.family_named(data.get("model_type"))
    return ConfigFile(folder, families.read_config(data), family)


def _read_own(data: Mapping[str, Any], folder: Path) -> ModelConfig:
    check_format(data, folder / "config.json")
    kinds = [kind for name, kind in MODEL_TYPES.items() if name in data]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{folder / 'config.json'} needs one entry of {', '.join(map(repr, MODEL_TYPES))}, it has "
            f"{len(kinds)}; save the model again"
        )
    name = kinds[0].name
    try:
        return kinds[0].config.from_dict(data[name])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} has no sound {name!r} entry: {error}"
        ) from error


def config_file(config: ModelConfig, family: Family | None) -> dict[str, Any]:
    """What config.json says, in the format of `family` or, without one, in linspec's own."""
    if family is not None:
        return families.write_config(family, config)
    kind = of_config(config)
    return {
        "model_type": "linspec",
        KEY: CURRENT,
        "architectures": [kind.architecture],
        "vocab_size": config.vocab_size,
        **config.token_ids(),
        **config.hub_sizes(),
        kind.name: config.to_dict(),
    }
