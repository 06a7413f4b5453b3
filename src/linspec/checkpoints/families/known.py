"""The Hugging Face families that linspec knows: one `Family` per `model_type`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# each module registers its families
from linspec.checkpoints.families import (  # noqa: F401
    bert,
    dream,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llada,
    llama,
    olmo2,
    phi3,
    sdar,
    smollm3,
    stablelm,
    starcoder2,
    t5,
)
from linspec.checkpoints.families.base import FAMILIES, Family, Tensors
from linspec.checkpoints.families.given import check_given
from linspec.errors import CheckpointError, UnsupportedModel
from linspec.mixers.config import MixerConfig
from linspec.models.config import ModelConfig

# how transformers says that a whole number stands where it takes only floats
_WHOLE = re.compile(r"Field '(\w+)' expected float, got int \(value: (-?\d+)\)")


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """The model that an ordinary config.json describes.

    Raises UnsupportedModel when our model cannot do what the file asks for, CheckpointError when
    the file contradicts itself.
    """
    family = family_named(data.get("model_type"))
    if data.get("quantization_config"):
        raise UnsupportedModel(
            "the checkpoint is quantized; linspec reads float weights only. Use the original "
            "checkpoint, or dequantize it with transformers and save it again"
        )
    # a copy: transformers completes nested settings in place
    fields = {key: deepcopy(data[key]) for key in data if key not in ("model_type", "auto_map")}
    try:
        check_given(data)
        hf = _settings(family, fields)
        # it belongs to the file, not to the model, so transformers keeps it out of the settings
        hf.architectures = data.get("architectures")
        return family.read(hf)
    except UnsupportedModel:
        raise
    # the file is checked by transformers' own classes, which raise whatever a wrong type leads to
    except Exception as error:
        raise CheckpointError(
            f"config.json is not a sound {family.name} config: {_reason(error)}"
        ) from error


def _settings(family: Family, fields: Mapping[str, Any]) -> Any:
    """What config.json says, with the defaults of the family."""
    if family.settings is not None:
        return family.settings(**fields)
    # the table of all configurations, for which linspec's own directories need not wait
    from transformers import AutoConfig

    return AutoConfig.for_model(family.name, **fields)


def _reason(error: Exception) -> str:
    """What transformers or we have against a file, on one line."""
    # Python puts the text of a KeyError in quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, KeyError) and " " not in text:
        return f"{text} is missing"
    found = _WHOLE.search(text)
    if found is None:
        return " ".join(text.split())
    return f"{found[1]} must be a number with a point, such as {found[2]}.0, got {found[2]}"


def family_named(name: object) -> Family:
    """The family of a `model_type`; raises UnsupportedModel with the known ones."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise UnsupportedModel(
        f"model_type {name!r} is not supported: linspec does not know this family. Supported: "
        f"{', '.join(FAMILIES)}, linspec"
    )


def family_of(config: ModelConfig, tensors: Tensors | None = None) -> Family | None:
    """The family whose ordinary format says all that `config` and our names of `tensors` say, or None."""
    family = FAMILIES.get(config.family)
    if family is None or any(m.name not in ("softmax", "window") or m.taps for m in config.mixers):
        return None
    plain = config.with_mixers(tuple(_plain(mixer) for mixer in config.mixers))
    try:
        again = read_config(write_config(family, config))
        again = family.adapt(again, family.on_disk(tensors or {}, config).keys())
        return family if again == plain else None
    except CheckpointError:
        return None


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config` as a checkpoint of `family`."""
    return {
        "model_type": family.name,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        **config.token_ids(),
        **family.write(config),
    }


def _plain(mixer: MixerConfig) -> MixerConfig:
    return MixerConfig(name=mixer.name, window=mixer.window if mixer.name == "window" else 0)
