"""LLaDA, Dream and SDAR as plain torch functions over the tensors of their checkpoints, and tiny random ones.

Nothing of linspec is in here: what linspec loads and decodes is held against this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB, MASK, EOS = 61, 60, 2
LLADA: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "max_sequence_length": 96,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "multi_query_attention": None,
    "rms_norm_eps": 3e-5,
    "rope": True,
    "rope_theta": 500.0,
    "alibi": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
}
DREAM: dict[str, Any] = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "mask_token_id": MASK,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "hidden_act": "silu",
    "rms_norm_eps": 2e-6,
    "rope_theta": 700.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
SDAR: dict[str, Any] = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "hidden_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "mask_token_id": MASK,
    "block_size": 4,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "hidden_act": "silu",
    "rms_norm_eps": 2e-6,
    "rope_theta": 700.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
}
CONFIGS = {"llada": LLADA, "dream": DREAM}
BLOCK_CONFIGS = {"sdar": SDAR}
# what the layers are called: (LLaDA, Dream)
_OUTER = {
    "embed": ("model.transformer.wte", "model.embed_tokens"),
    "norm": ("model.transformer.ln_f", "model.norm"),
    "head": ("model.transformer.ff_out", "lm_head"),
}
_INNER = {
    "q": ("q_proj", "self_attn.q_proj"),
    "k": ("k_proj", "self_attn.k_proj"),
    "v": ("v_proj", "self_attn.v_proj"),
    "o": ("attn_out", "self_attn.o_proj"),
    "mixer_norm": ("attn_norm", "input_layernorm"),
    "mlp_norm": ("ff_norm", "post_attention_layernorm"),
    "gate": ("ff_proj", "mlp.gate_proj"),
    "up": ("up_proj", "mlp.up_proj"),
    "down": ("ff_out", "mlp.down_proj"),
}


class PlainModel:
    """Bidirectional attention, RMS norms, SwiGLU and rotary positions, one line after the other."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.llada = config["model_type"] == "llada"
        self.shift = config["model_type"] == "Dream"
        self.block: int | None = config.get("block_size")
        said = ("d_model", "n_heads", "n_kv_heads", "n_layers")
        named = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
        self.width, self.heads, self.kv_heads, self.layers = (
            config[key] for key in (said if self.llada else named)
        )

    def tensor(self, name: str, layer: int | None = None, kind: str = "weight") -> Any:
        outer = layer is None
        theirs = (_OUTER if outer else _INNER)[name][not self.llada]
        stack = "model.transformer.blocks" if self.llada else "model.layers"
        return self.tensors.get(f"{theirs}.{kind}" if outer else f"{stack}.{layer}.{theirs}.{kind}")

    def linear(self, x: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        return F.linear(x, self.tensor(name, layer), self.tensor(name, layer, "bias"))

    def normed(self, x: torch.Tensor, name: str, layer: int | None = None) -> torch.Tensor:
        return self.scaled(x) * self.tensor(name, layer)

    def heads_of(self, x: torch.Tensor, name: str, layer: int, count: int) -> torch.Tensor:
        found = self.linear(x, name, layer).unflatten(-1, (count, -1)).transpose(1, 2)
        norm = self.tensors.get(f"model.layers.{layer}.self_attn.{name}_norm.weight")
        return found if norm is None else self.scaled(found) * norm

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()

    def turned(self, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
        half = x.shape[-1] // 2
        steps = torch.arange(half, dtype=torch.float64) / half
        angle = (torch.tensor(rows)[:, None] * self.config["rope_theta"] ** -steps).to(x)
        cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, vocab] as the output layer gives them."""
        return self.rows_of(ids, list(range(len(ids))), {})

    def rows_of(self, ids: list[int], rows: list[int], kept: dict[int, Any]) -> torch.Tensor:
        """[R, vocab] of some rows. kept: keys and values of all positions by layer, put right at `rows`."""
        x = F.embedding(torch.tensor([[ids[row] for row in rows]]), self.tensor("embed"))
        for layer in range(self.layers):
            y = self.normed(x, "mixer_norm", layer)
            q = self.turned(self.heads_of(y, "q", layer, self.heads), rows)
            k = self.turned(self.heads_of(y, "k", layer, self.kv_heads), rows)
            v = self.heads_of(y, "v", layer, self.kv_heads)
            # what is not computed yet is never read: the first rows of a text are all
            shape = (*k.shape[:2], len(ids), k.shape[3])
            keys, values = kept.setdefault(layer, (k.new_zeros(shape), v.new_zeros(shape)))
            keys[:, :, rows], values[:, :, rows] = k, v
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (keys, values))
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            if self.block is not None:
                own = torch.tensor(rows)[:, None] // self.block
                scores = scores.masked_fill(torch.arange(len(ids)) // self.block > own, -torch.inf)
            weights = scores.softmax(-1)
            x = x + self.linear((weights @ v).transpose(1, 2).flatten(2), "o", layer)
            y = self.normed(x, "mlp_norm", layer)
            gated = F.silu(self.linear(y, "gate", layer)) * self.linear(y, "up", layer)
            x = x + self.linear(gated, "down", layer)
        head = self.tensor("head")
        out = F.linear(self.normed(x, "norm"), self.tensor("embed") if head is None else head)
        return out[0]

    def predicted(self, ids: list[int]) -> torch.Tensor:
        """[T, vocab] of the token at each position."""
        logits = self.logits(ids)
        return torch.cat((logits[:1], logits[:-1])) if self.shift else logits


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of a checkpoint, large enough that a model has opinions."""
    draw, llada = torch.Generator().manual_seed(seed), config["model_type"] == "llada"
    plain = PlainModel(config, {})
    mlp = config["mlp_hidden_size" if llada else "intermediate_size"]
    head_width = config.get("head_dim", plain.width // plain.heads)
    inner, kv_width = head_width * plain.heads, head_width * plain.kv_heads
    rows = {"q": inner, "k": kv_width, "v": kv_width, "o": plain.width}
    rows |= {"gate": mlp, "up": mlp, "down": plain.width}
    found: dict[str, torch.Tensor] = {}

    def add(name: str, shape: tuple[int, ...], at: float = 0.0) -> None:
        spread = 0.1 if at else shape[-1] ** -0.5 * (1.7 if len(shape) == 2 else 0.3)
        found[name] = at + spread * torch.randn(shape, generator=draw)

    stack = "model.transformer.blocks" if llada else "model.layers"
    for name, theirs in _OUTER.items():
        tied = config.get("weight_tying") or config.get("tie_word_embeddings")
        if name == "norm":
            add(f"{theirs[not llada]}.weight", (plain.width,), 1.0)
        elif name == "embed" or not tied:
            add(f"{theirs[not llada]}.weight", (VOCAB, plain.width))
    for layer in range(plain.layers):
        for name, theirs in _INNER.items():
            path = f"{stack}.{layer}.{theirs[not llada]}"
            if name not in rows:
                add(f"{path}.weight", (plain.width,), 1.0)
                continue
            columns = {"down": mlp, "o": inner}.get(name, plain.width)
            add(f"{path}.weight", (rows[name], columns))
            if biased(config, name):
                add(f"{path}.bias", (rows[name],))
        if config["model_type"] == "sdar":
            for name in "qk":
                add(f"{stack}.{layer}.self_attn.{name}_norm.weight", (head_width,), 1.0)
    return found


def biased(config: dict[str, Any], name: str) -> bool:
    if config["model_type"] == "llada":
        return config["include_bias"] or (name in "qkv" and config["include_qkv_bias"])
    return name in "qkv" and config["model_type"] == "Dream"


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> PlainModel:
    """A model directory as Hugging Face has it; returns the plain model of the same tensors."""
    folder.mkdir(parents=True)
    tensors = make_tensors(config, seed)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return PlainModel(config, tensors)
