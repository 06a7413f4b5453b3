"""llama.cpp through llama-cpp-python's plain C interface; GGUF files are written here.

Flash attention is on by default there and is the slower choice on many processors: both are measured.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from benchmarks.peers.base import GGUF_FILE, Format, Peer, Prompts, Session, timed
from benchmarks.peers.shapes import Shape

# a matrix of ours under llama.cpp's name
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_CHUNK = 512
# weights of Q8_0 and Q4_0 that share a scale
_BLOCK = 32


class LlamaCpp(Peer):
    """Q8_0 and Q4_0 weights, float16 cache."""

    name = "llama.cpp"
    packages = ("llama_cpp",)
    converters = ("gguf", "torch", "safetensors")
    formats = tuple(
        Format(name=f"{kind}{fa}", bits=bits, weight_bytes=size, cache_bytes=2)
        for kind, bits, size in (("q8_0", 8, 34 / 32), ("q4_0", 4, 18 / 32))
        for fa in ("", "-fa")
    )

    def convert(self, source: Path, target: Path, form: Format) -> None:
        write_gguf(source, target / GGUF_FILE, form.name.removesuffix("-fa"))

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        flash = form.name.endswith("-fa")
        return _Session(folder / GGUF_FILE, context, rows, threads, flash=flash)


PEER = LlamaCpp()


def write_gguf(source: Path, file: Path, kind: str) -> None:
    """A Llama model directory as a GGUF file without vocabulary, matrices as `kind` (q8_0, q4_0)."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    shape = Shape.read(file.parent.name, source)
    quantized = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(str(file), "llama")
    _describe(writer, shape)
    with safe_open(source / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            data = tensors.get_tensor(name).float().numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                data = _interleaved(data, shape.head_width)
            if ".mlp." in name:
                data = padded(data, outputs="down_proj" not in name)
            if data.ndim == 1:
                writer.add_tensor(_name(name), data)
            else:
                packed = gguf.quants.quantize(np.ascontiguousarray(data), quantized)
                writer.add_tensor(_name(name), packed, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_context_length(2**16)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp + -shape.mlp % _BLOCK)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")


def _name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner.removesuffix('.weight')]}.weight"


def padded(weight: Any, *, outputs: bool) -> Any:
    """Features of the feed-forward layer up to whole blocks: zeros, which change nothing."""
    import numpy as np

    short = -weight.shape[0 if outputs else 1] % _BLOCK
    return np.pad(weight, ((0, short), (0, 0)) if outputs else ((0, 0), (0, short)))


def _interleaved(weight: Any, head_width: int) -> Any:
    """Rows in the order in which llama.cpp rotates pairs: neighbours instead of halves."""
    outputs, inputs = weight.shape
    halves = weight.reshape(outputs // head_width, 2, head_width // 2, inputs)
    return halves.swapaxes(1, 2).reshape(outputs, inputs)


class _Session(Session):
    def __init__(self, file: Path, context: int, rows: int, threads: int, *, flash: bool) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = rows * context, _CHUNK, _CHUNK
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.n_seq_max = rows
        wanted.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot use {file}")
        self.batch = llama_cpp.llama_batch_init(_CHUNK, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def open(self, prompts: Prompts) -> float:
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, True)
        self.length = len(prompts[0])
        return timed(lambda: self._read(prompts))

    def _read(self, prompts: Prompts) -> None:
        self.tokens = []
        for row, prompt in enumerate(prompts):
            for first in range(0, self.length, _CHUNK):
                part = prompt[first : first + _CHUNK]
                last = first + len(part) == self.length
                wanted = [last and i == len(part) - 1 for i in range(len(part))]
                places = range(first, first + len(part))
                self._step(part, places, [row] * len(part), wanted)
            self.tokens.append(self._likeliest(-1))

    def _step(self, tokens: Any, places: Any, rows: Any, wanted: Any) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, each in enumerate(zip(tokens, places, rows, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i] = each
            batch.n_seq_id[i] = 1
        failed = self.api.llama_decode(self.context, batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")

    def _likeliest(self, output: int) -> int:
        import numpy as np

        at = self.api.llama_get_logits_ith(self.context, output)
        return int(np.ctypeslib.as_array(at, (self.vocab,)).argmax())

    def decode(self, tokens: int) -> list[float]:
        return [timed(self._next) for _ in range(tokens)]

    def _next(self) -> None:
        rows = len(self.tokens)
        self._step(self.tokens, [self.length] * rows, range(rows), [True] * rows)
        self.length += 1
        self.tokens = [self._likeliest(row) for row in range(rows)]

    def rows(self, count: int, repeats: int) -> list[float] | None:
        return [timed(lambda: self._pass(count)) for _ in range(repeats)]

    def _pass(self, count: int) -> None:
        places = range(self.length, self.length + count)
        self._step([5] * count, places, [0] * count, [True] * count)
        self.api.llama_synchronize(self.context)
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(memory, 0, self.length, -1)
