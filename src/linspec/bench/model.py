"""What a model is and what linspec can do with it: `linspec info MODEL`. No weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from linspec.bench.switches import Told
from linspec.checkpoints.config_file import ConfigFile, read_config_file
from linspec.checkpoints.description import describe
from linspec.checkpoints.dtype import auto_kind, kept_dtype
from linspec.checkpoints.gguf.model import plan_gguf
from linspec.checkpoints.gguf.reader import is_gguf
from linspec.checkpoints.hub import resolve
from linspec.checkpoints.weights import weight_files
from linspec.drafters.found import shipped_for
from linspec.drafters.saved import CONFIG_FILE
from linspec.errors import CheckpointError, ConfigError
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.models.diffusion_config import DiffusionConfig
from linspec.models.one_call import why_not
from linspec.models.skeleton import without_memory
from linspec.utils.border import read_json
from linspec.utils.files import is_leftover

# tokens of one sequence at which the memory of its state is told
LENGTHS = {"1k": 1024, "8k": 8192, "32k": 32_768}
# widths that decide nothing about the step, made small
_SMALL = 64


def info(source: str | Path, threads: int | None = None) -> dict[str, Any]:
    """What `linspec info MODEL` prints: what `describe` reads, memory in 10⁶ bytes, the step, drafters.

    `errors`, if there are any, are the switches of the environment that are wrong.
    """
    told = Told()
    told.switches(threads)
    facts = _facts(source, told)
    return {**facts, "errors": told.errors} if told.errors else facts


def _facts(source: str | Path, told: Told) -> dict[str, Any]:
    facts, folder = describe(source), resolve(source)
    read = read_config_file(folder)
    facts["weights_mb"] = {"on_disk": _disk(folder)}
    if read.kind.loop is None:
        return facts
    config = read.config
    if isinstance(config, DecoderConfig):
        facts |= _memory(read, config, _disk(folder))
        if is_gguf(folder):
            kept = plan_gguf(folder, keep_blocks=True).bytes(torch.float32)
            facts["weights_mb"]["in_memory"] = round(kept / 1e6, 3)
        facts["step"] = told.by(lambda: _step(config), "unknown")
    # what fills masks takes no drafter
    at_hand = [] if isinstance(config, DiffusionConfig) else drafters_at_hand(folder)
    return facts | {"drafters": at_hand}


def drafters_at_hand(folder: Path) -> list[str]:
    """Drafters that need nothing more: from text, and trained ones beside the model or shipped for it."""
    files = [] if is_gguf(folder) else sorted(folder.glob(f"*/{CONFIG_FILE}"))
    found = ["prompt-lookup", "suffix"]
    for path in files:
        if is_leftover(path.parent.name):
            continue
        kind = read_json(path).get("kind", "medusa")
        name = path.parent.name
        found.append(str(kind) if name == kind else f"{kind}:{path.parent}")
    return found + [kind for kind in shipped_for(folder) if kind not in found]


def _memory(read: ConfigFile, config: DecoderConfig, on_disk: float) -> dict[str, Any]:
    """Megabytes of the weights and of one sequence's state, with caches by default and in int8."""
    with without_memory():
        model = Decoder(config)
    parameters = sum(each.numel() for each in model.parameters())
    # integers lie in memory as on disk
    loaded = {} if read.quantization is not None else {"float32": round(parameters * 4 / 1e6, 3)}
    found: dict[str, Any] = {
        "parameters": parameters,
        "weights_mb": {"on_disk": on_disk, **loaded},
    }
    kept = auto_kind(kept_dtype(read), model)
    if model.keeps_cache:
        found["kv_cache_dtype"] = "float32" if kept == "float" else kept
    for name, kv in (("state_mb", kept), ("state_mb_int8", "int8")):
        try:
            state = model.new_state(kv=kv)
        # no layer has such a cache
        except ConfigError:
            continue
        sizes = {label: state.bytes_at(length) / 1e6 for label, length in LENGTHS.items()}
        found[name] = {label: round(size, 3) for label, size in sizes.items()}
    return found


def _step(config: DecoderConfig) -> str:
    """How a step runs, with every reason against a single call; asked of a small model of the same layers."""
    if isinstance(config, DiffusionConfig):
        config = replace(config, mask_id=0)
    ropes = config.layer_ropes or ("",) * config.layers
    mixers, ropes = zip(*dict.fromkeys(zip(config.mixers, ropes, strict=True)), strict=True)
    small = replace(
        config,
        layers=len(mixers),
        mixers=mixers,
        layer_ropes=ropes if config.layer_ropes else (),
        width=min(config.width, _SMALL),
        mlp_width=min(config.mlp_width, _SMALL),
        vocab_size=min(config.vocab_size, _SMALL),
        max_positions=min(config.max_positions, _SMALL),
        eos_ids=(),
        bos_id=None,
        pad_id=None,
    )
    reason = why_not(Decoder(small).float().to_inference())
    return "one call into C" if reason is None else f"layer by layer: {reason}"


def _disk(folder: Path) -> float:
    try:
        files = [folder] if is_gguf(folder) else weight_files(folder)
    except CheckpointError:
        files = sorted(folder.glob("*.safetensors"))
    return round(sum(each.stat().st_size for each in files) / 1e6, 3)
