"""A model as a small change of another one that everybody has: mixers, and low-rank weights.

    model = load_model("smollm2-aug")

A directory with `config.json` and `delta.safetensors`. The configuration is that of a linspec decoder, with
an entry "delta": the format's version, the base and the SHA-256 of its file, which must be here (`linspec get
smollm2`). `blocks.3.mixer.v.up` and `.down` are factors of what is added to that layer's weight; those of
`embed` change the row of a mask token. Tokenizer and chat template are those of the base.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from linspec.checkpoints.config_file import DELTA, config_file
from linspec.checkpoints.gguf.model import CPU, Change, load_gguf
from linspec.checkpoints.origin import origin_of, set_origin
from linspec.checkpoints.packages import PACKAGES
from linspec.checkpoints.weights import read_shapes, read_tensors
from linspec.errors import CheckpointError, ConfigError
from linspec.kernels.gpu.choice import multiplies_blocks
from linspec.mixers.config import MixerConfig
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.skeleton import without_memory
from linspec.utils.border import STRICT, parse, read_json
from linspec.utils.files import replace_dir
from linspec.utils.messages import shown

FORMAT = 1
WEIGHTS = "delta.safetensors"
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a delta says of itself. facts: how it was made, for people."""

    version: int
    base: str
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)
    __pydantic_config__ = STRICT


def read_delta(folder: Path) -> Delta | None:
    """The entry of a directory that is a delta, None for any other; raises CheckpointError if unsound."""
    path = folder / "config.json"
    data = read_json(path).get(DELTA) if path.is_file() else None
    return None if data is None else parse_delta(data, path)


def parse_delta(data: Any, path: Path) -> Delta:
    """The entry that was read of `path`; raises CheckpointError for another format or an unsound one."""
    if isinstance(data, dict) and data.get("version") != FORMAT:
        raise CheckpointError(
            f"{path} is a delta of format {shown(repr(data.get('version')))}, this version reads {FORMAT}; "
            "update linspec"
        )
    try:
        return parse(Delta, data, f"no sound {DELTA!r} entry")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; copy the file again") from error


def load_delta(
    folder: Path,
    config: DecoderConfig,
    delta: Delta,
    dtype: torch.dtype = torch.float32,
    *,
    keep_blocks: bool = False,
    device: torch.device = CPU,
) -> Decoder:
    """The decoder that a delta makes of its base, in evaluation mode.

    keep_blocks, device: as in `load_gguf`, for the matrices that the delta leaves alone.
    """
    path = base_of(delta, folder)
    if keep_blocks and multiplies_blocks(device, dtype):
        kept = _load_kept(folder, path, config, delta, device).to(dtype)
        set_origin(kept, replace(origin_of(kept), loaded=dtype))
        return kept
    # whatever is computed with, the sum is one of float32 weights
    base = load_gguf(path, torch.float32)
    _check_config(base.config, config, delta, folder)
    with without_memory():
        kind = MaskedDiffusion if isinstance(config, DiffusionConfig) else Decoder
        model: Decoder = kind(config)
    try:
        model.load_state_dict(base.state_dict(), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: mixers with weights of their own are not part of a delta: {error}"
        ) from error
    model.tie()
    set_origin(model, replace(origin_of(base), loaded=dtype))
    return apply_delta(model, folder).to(dtype).eval()


def _load_kept(
    folder: Path, path: Path, config: DecoderConfig, delta: Delta, device: torch.device
) -> Decoder:
    names = {name.rpartition(".")[0] for name in read_shapes([_weights(folder)])}
    change = Change(config.mixers, names, lambda model: apply_delta(model, folder))
    model = load_gguf(path, torch.float32, keep_blocks=True, change=change, device=device)
    _check_config(model.config, config, delta, folder)
    return model


def _check_config(base: DecoderConfig, config: DecoderConfig, delta: Delta, folder: Path) -> None:
    # a diffusion model is its base without the causal mask
    shape = config.decoder() if isinstance(config, DiffusionConfig) else config
    if base.with_mixers(config.mixers) != shape:
        raise CheckpointError(
            f"{folder}: the configuration is not that of {delta.base} with other mixers; make the delta again"
        )


def base_of(delta: Delta, folder: Path) -> Path:
    """The base's file; raises CheckpointError if it is not here or another one."""
    if delta.base not in PACKAGES:
        raise CheckpointError(
            f"{folder} is a delta of {shown(repr(delta.base))}, which this version does not know; known: "
            f"{', '.join(PACKAGES)}"
        )
    path = PACKAGES[delta.base].found()
    found = _sha256(path, path.stat().st_mtime_ns)
    if found != delta.sha256:
        raise CheckpointError(
            f"{folder} was made for {delta.base} with the SHA-256 {shown(delta.sha256)}, {path} has {found}; "
            f"`linspec get {delta.base}` brings the right file, or make the delta again"
        )
    return path


@functools.lru_cache(maxsize=4)
def _sha256(path: Path, changed: int) -> str:
    """The hash of a file that was last changed then: the model and its tokenizer ask for the same one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apply_delta(model: Decoder, folder: Path) -> Decoder:
    """Add the low-rank weights in `folder` to `model`, in place."""
    path = _weights(folder)
    shapes = read_shapes([path])
    layers = dict(model.named_modules())
    names = sorted({name.rpartition(".")[0] for name in shapes})
    for name in names:
        weight = getattr(layers.get(name), "weight", None)
        up, down = (tuple(shapes.get(f"{name}.{part}", ())) for part in ("up", "down"))
        fits = len(up) == len(down) == 2 and up[1:] == down[:1]
        if weight is None or not fits or tuple(weight.shape) != (up[0], down[1]):
            raise CheckpointError(
                f"{path}: {shown(name)} of {list(up)} and {list(down)} fits no layer of the base; the delta "
                "is damaged, or was made for another model"
            )
    # float64: the sum is rounded once
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = read_tensors([path], {name: name for name in shapes}, stored, torch.float64)
    with torch.no_grad():
        for name in names:
            weight = layers[name].get_parameter("weight")
            change = tensors[f"{name}.up"] @ tensors[f"{name}.down"]
            weight.copy_(weight.double() + change.to(weight.device))
    return model


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the delta is not whole; copy it again")
    return path


def save_delta(
    config: DecoderConfig,
    factors: Factors,
    out: Path,
    *,
    base: str,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a delta of the package `base` into the directory `out`, which it replaces."""
    with replace_dir(out) as aside:
        write_delta(config, factors, aside, base=base, facts=facts)
    return out


def write_delta(
    config: DecoderConfig,
    factors: Factors,
    folder: Path,
    *,
    base: str,
    facts: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """The files of a delta of the package `base`, into a directory that is there."""
    delta = Delta(version=FORMAT, base=base, sha256=PACKAGES[base].sha256, facts=dict(facts or {}))
    data = config_file(config, None) | {DELTA: asdict(delta)}
    tensors = {
        f"{name}.{part}": tensor.to("cpu", dtype).contiguous()
        for name, pair in factors.items()
        for part, tensor in zip(("up", "down"), pair, strict=True)
    }
    try:
        save_file(tensors, folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"could not write {folder}: {error}") from error
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def exact_heads(config: DecoderConfig) -> int:
    """KV heads that keep a cache without end."""
    plain = MixerConfig()
    return sum(
        config.kv_heads if mixer.name == plain.name else len(mixer.exact_heads)
        for mixer in config.mixers
    )
