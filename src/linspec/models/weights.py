"""Tensors in safetensors files: one file, or shards with an index, as Hugging Face lays them out.

Pickled weights (pytorch_model.bin, *.pt, *.ckpt) are never opened: unpickling runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from linspec.border import read_json
from linspec.errors import CheckpointError
from linspec.messages import because
from linspec.models.tensors import SMALL, aligned, check_dtype, check_finite

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 4 * 10**9


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; raises CheckpointError when any is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]} only, a pickle, which linspec does not open "
            "because unpickling can run any code. If you trust the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) with transformers "
            "writes safetensors"
        )
    raise CheckpointError(f"no weights in {folder}: neither {SINGLE} nor {INDEX} is there")


def _shards(folder: Path) -> list[Path]:
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map; copy the file again")
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != folder or "\0" in shard.name:
            raise CheckpointError(f"{folder / INDEX} points outside its directory: {shard}")
        if not shard.is_file():
            raise CheckpointError(f"shard {shard} is missing; copy or download it again")
    return shards


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in `files`, without reading the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return shapes


def read_tensors(
    files: list[Path],
    names: Mapping[str, str],
    expected: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Tensors of `files` that `names` maps to a new name; floats are turned into `dtype`.

    Raises CheckpointError for integers where `expected` has floats, and the other way round, and for small
    tensors that are not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name in names:
                        tensor = aligned(file.get_tensor(name))
                        check_dtype(name, tensor.dtype, expected[names[name]].dtype, path)
                        if tensor.numel() <= SMALL:
                            check_finite(name, tensor, path)
                        tensors[names[name]] = cast(tensor, dtype)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return tensors


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` in `dtype` if it holds floats and a dtype is given; untouched otherwise."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = because(error) if isinstance(error, OSError) else error
    return CheckpointError(f"{path} is damaged or cut short ({reason}); copy or download it again")


def write_tensors(
    tensors: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` to one file, or to shards of at most `shard_bytes` (or one tensor) each."""
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    return shards
