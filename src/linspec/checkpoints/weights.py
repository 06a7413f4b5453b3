"""Tensors in safetensors files: one file, or shards with an index, as Hugging Face lays them out.

Pickled weights (pytorch_model.bin, *.pt, *.ckpt) are never opened: unpickling runs code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from linspec.checkpoints.tensors import SMALL, aligned, check_dtype, check_finite
from linspec.errors import CheckpointError
from linspec.utils.border import read_json
from linspec.utils.messages import because

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_BYTES = 4 * 10**9
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; raises CheckpointError when any is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    if numbered := _numbered(folder):
        return numbered
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]} only, a pickle, which linspec does not open "
            "because unpickling can run any code. If you trust the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) with transformers "
            "writes safetensors"
        )
    raise CheckpointError(f"no weights in {folder}: neither {SINGLE} nor {INDEX} is there")


def _numbered(folder: Path) -> list[Path]:
    """Shards that lie in `folder` without an index; raises CheckpointError unless one set is complete."""
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if parts := SHARD.fullmatch(path.name):
            name, number, count = parts[1], int(parts[2]), int(parts[3])
            sets.setdefault((name, count), {})[number] = path
    if len(sets) > 1:
        found = ", ".join(f"{name}-*-of-{count:05d}" for name, count in sets)
        raise CheckpointError(
            f"{folder} has shards of several sets ({found}) and no {INDEX} that says which to read; "
            "keep one set, or copy the index"
        )
    for (name, count), shards in sets.items():
        missing = [number for number in range(1, count + 1) if number not in shards]
        if missing:
            listed = ", ".join(f"{name}-{number:05d}-of-{count:05d}" for number in missing[:4])
            raise CheckpointError(
                f"{folder} has {len(shards)} of {count} shards and no {INDEX}; missing: {listed}"
                f"{', ...' if len(missing) > 4 else ''} (.safetensors). Copy or download them again"
            )
        return [shards[number] for number in range(1, count + 1)]
    return []


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
                    if name in shapes:
                        raise CheckpointError(f"{name} is in {path} and in another shard as well")
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return shapes


def read_tensors(
    files: list[Path],
    names: Mapping[str, str],
    expected: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
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


def read_dtype(files: list[Path]) -> torch.dtype | None:
    """The dtype in which no float of `files` loses anything; None if they hold no floats."""
    found: torch.dtype | None = None
    for path in files:
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        for kind in kinds & FLOATS.keys():
            found = FLOATS[kind] if found is None else torch.promote_types(found, FLOATS[kind])
    return found


def same_tensors(files: list[Path], first: str, second: str) -> bool:
    """Whether two tensors of `files` are equal, number by number."""
    found = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found += [aligned(file.get_tensor(n)) for n in {first, second} & set(file.keys())]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return len(found) == 2 and torch.equal(*found)


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
