"""Random-weight Llama checkpoints: speed needs no training.

folder = write_checkpoint(SHAPES["1b"], Path("runs/peers/models"))
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_POSITIONS = 32_768 + 512
# of the embedded teacher, whose weights are trained and lie with linspec
EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama checkpoint."""

    name: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    tied: bool

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    @property
    def read_parameters(self) -> int:
        """Weights that a step reads once: all matrices, the output layer, not the other embeddings."""
        attention = self.width * self.head_width * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp) + self.vocab * self.width

    @property
    def cache_numbers(self) -> int:
        """Numbers that one token adds to a cache of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_width

    def config(self) -> dict[str, Any]:
        """What config.json says, without end-of-sequence tokens: no engine may stop early."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": MAX_POSITIONS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def read(cls, name: str, folder: Path) -> Shape:
        """The shape of a Llama model directory."""
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(
            name=name,
            vocab=data["vocab_size"],
            width=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=data["num_attention_heads"],
            kv_heads=data["num_key_value_heads"],
            mlp=data["intermediate_size"],
            tied=data["tie_word_embeddings"],
        )


_ALL = (
    Shape(
        name="110m", vocab=32_000, width=768, layers=12, heads=12, kv_heads=12, mlp=2048, tied=True
    ),
    Shape(
        name="1b", vocab=32_000, width=2048, layers=22, heads=32, kv_heads=4, mlp=5632, tied=False
    ),
    Shape(name="toy", vocab=320, width=64, layers=2, heads=4, kv_heads=2, mlp=128, tied=True),
)
SHAPES = {shape.name: shape for shape in _ALL}


def write_checkpoint(shape: Shape, models: Path, seed: int = 0) -> Path:
    """The Hugging Face directory of `shape` under `models`, written in bfloat16 if it is not there."""
    import torch
    from safetensors.torch import save_file

    from linspec.utils.files import replace_dir

    folder = models / shape.name / "source"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, size in tensor_sizes(shape).items():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(size).normal_(std=0.02, generator=generator)
            tensors[name] = drawn.to(torch.bfloat16)
    with replace_dir(folder) as aside:
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        _write_tokenizer(shape, aside)
        text = json.dumps(shape.config(), indent=2) + "\n"
        (aside / "config.json").write_text(text, encoding="utf-8")
    return folder


def tensor_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names of a Llama checkpoint with the sizes of their tensors."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    block = {
        "input_layernorm": (shape.width,),
        "self_attn.q_proj": (queries, shape.width),
        "self_attn.k_proj": (keys, shape.width),
        "self_attn.v_proj": (keys, shape.width),
        "self_attn.o_proj": (shape.width, queries),
        "post_attention_layernorm": (shape.width,),
        "mlp.gate_proj": (shape.mlp, shape.width),
        "mlp.up_proj": (shape.mlp, shape.width),
        "mlp.down_proj": (shape.width, shape.mlp),
    }
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.width)}
    for layer in range(shape.layers):
        sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    sizes["model.norm.weight"] = (shape.width,)
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocab, shape.width)
    return sizes


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A tokenizer of as many words: engines ask for one, nothing is tokenized."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), shape.vocab)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
