"""What Python and C share: constants, and the structures that cross the border. Declared here, once.

`csrc/structs.h` is written from this table, and the library says where its compiler put every field:

    python -m linspec.kernels.cpu.structs > src/linspec/kernels/cpu/csrc/structs.h
    LinearStruct(kind=INT8, ...)     # as ctypes has it
"""

from __future__ import annotations

import ctypes
import textwrap
import zlib
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint64, c_void_p
from typing import Any, NamedTuple, TypeVar

from linspec.decoding.step import MAX_STAGED
from linspec.errors import StateError
from linspec.kernels.step_plan import (
    ACTIVATIONS,
    BF16,
    BLOCKS,
    ENDS,
    F16,
    F32,
    INT4,
    INT8,
    JUDGED,
    MAPS,
    PAGE,
    WEIGHTS,
)
from linspec.quantization.blocks import BLOCK_FORMATS
from linspec.quantization.codes import GROUP

# raised with every change of what Python relies on and no structure shows
ABI = 21
TILE = 32
MAX_HEAD_WIDTH = 512
MAX_NODES = MAX_STAGED

CONSTANTS = (
    ("LS_ABI", ABI, "of this table and the functions"),
    ("LS_TILE", TILE, "output channels of a tile"),
    ("LS_GROUP", GROUP, "inputs that share a scale in int4 weights"),
    ("LS_F32", F32, "kinds of weights and of rows"),
    ("LS_BF16", BF16, ""),
    ("LS_INT8", INT8, ""),
    ("LS_INT4", INT4, ""),
    ("LS_F16", F16, "of rows of a state only"),
    (
        "LS_BLOCKS",
        BLOCKS,
        "those of a GGUF file, in formats that go by the numbers they have there",
    ),
    *((f"LS_{each.name}", each.number, "") for each in BLOCK_FORMATS.values()),
    *((f"LS_{name.upper()}", number, "") for number, name in enumerate(ACTIVATIONS)),
    *((f"LS_MAP_{name.upper()}", number, "") for number, name in enumerate(MAPS)),
    *((f"LS_WEIGHT_{name.upper()}", number, "") for number, name in enumerate(WEIGHTS)),
    *((f"LS_END_{name.upper()}", number, "") for number, name in enumerate(ENDS)),
    ("LS_MAX_HEAD_WIDTH", MAX_HEAD_WIDTH, "features of a head"),
    ("LS_MAX_NODES", MAX_NODES, "staged nodes of a slot"),
    ("LS_PAGE", PAGE, "rows of a page"),
    ("LS_JUDGED", JUDGED, "rows that have a bound together"),
)


class Field(NamedTuple):
    """One line of a structure: the names that have a C type, and what they are."""

    type: str
    names: str
    comment: str = ""


class Whole:
    """A whole number of a structure, checked: ctypes itself cuts off high bits without a word."""

    def __init__(self, field: Any, name: str, bits: int) -> None:
        self.field, self.name, self.most = field, name, 2 ** (bits - 1)

    def __get__(self, struct: Any, owner: type) -> Any:
        return self.field.__get__(struct, owner)

    def __set__(self, struct: Any, value: int) -> None:
        if not -self.most <= value < self.most:
            raise StateError(
                f"{self.name} is {value}, which the kernels cannot count; use a smaller model or a "
                "shorter text"
            )
        self.field.__set__(struct, value)


class Struct(ctypes.Structure):
    """A structure of the C side; its docstring is the comment there."""


class Declared(NamedTuple):
    """A structure under its name in C."""

    name: str
    fields: tuple[Field, ...]
    struct: type[Struct]


STRUCTS: list[Declared] = []
# addresses of tensors are plain; of numbers and structures ctypes keeps what they point to alive
_TYPES: dict[str, Any] = {
    "int32_t": c_int32,
    "int64_t": c_int64,
    "float": c_float,
    **dict.fromkeys(("const void *", "char *", "uint16_t *", "float *", "const float *"), c_void_p),
    "int32_t *": POINTER(c_int32),
    "const int32_t *": POINTER(c_int32),
    "const uint64_t *": POINTER(c_uint64),
    "const float *const *": POINTER(c_void_p),
    "const char *": c_void_p,
    "const char *const *": POINTER(c_void_p),
    "const char *const *const *": c_void_p,
}
S = TypeVar("S", bound=type[Struct])


def declared(name: str, *fields: Field) -> Callable[[S], S]:
    """Give a class the fields of the C structure `name`, in this order."""

    def declare(struct: S) -> S:
        struct._fields_ = [(n, _TYPES[field.type]) for field in fields for n in field.names.split()]
        for field in fields:
            if field.type in ("int32_t", "int64_t"):
                for n in field.names.split():
                    bits = 8 * ctypes.sizeof(_TYPES[field.type])
                    setattr(struct, n, Whole(getattr(struct, n), n, bits))
        STRUCTS.append(Declared(name, fields, struct))
        _TYPES[f"const {name} *"] = POINTER(struct)
        _TYPES[f"const {name} *const *"] = POINTER(POINTER(struct))
        return struct

    return declare


@declared(
    "ls_linear_part",
    Field("int32_t", "format outputs"),
    Field("const void *", "weights", "in tiles, see blocks.h"),
)
class LinearPartStruct(Struct):
    """Rows of a weight matrix whose blocks have one format."""


@declared(
    "ls_linear",
    Field("int32_t", "kind inputs outputs padded", "padded: inputs rounded up to whole groups"),
    Field("const void *", "weights"),
    Field(
        "const float *", "scales bias", "scales [tiles * 32] are for int8 only; bias may be null"
    ),
    Field("int32_t", "parts", "of a layer of blocks, whose `weights` is null"),
    Field("const ls_linear_part *", "part", "one below the other"),
)
class LinearStruct(Struct):
    """One linear layer. Weights by kind, for every tile in turn:
    f32, bf16  [inputs][32]
    int8       [padded / 4][32][4] bytes of code + 128
    int4       [padded / 32] groups of { bf16 scale [32], [4][32][4] bytes }: byte (q, c, i) has code
               + 8 of input 4 q + i in its low half and of input 16 + 4 q + i in its high half"""


@declared(
    "ls_summed",
    Field("int32_t", "map features mapped", "LS_MAP_..; rows keep features"),
    Field("int32_t", "exact end together", "LS_WEIGHT_.., LS_END_..; one end for both parts"),
    Field("int32_t", "ones fades delta", "flags"),
    Field("int32_t", "gates", "columns of a key row behind the key: logarithms, then a rate"),
    Field("float", "floor", "of the end"),
    Field("const float *", "query_map key_map", "[..][map_rows][head_width]"),
    Field("int32_t", "map_rows map_shared", "shared: all heads have one"),
    Field("const float *", "query_factors gain", "[heads], [head_width]; null without"),
    Field(
        "const float *",
        "gate_map gate_scale",
        "[kv_heads][head_width][gates], or [kv_heads][head_width]",
    ),
    Field("const float *", "gate_bias", "[kv_heads][gates]"),
    Field("int32_t", "kept_groups kept_rows", "in place of sums: rows of each of the last groups"),
    Field("const float *", "row_keys row_values", "[kept_rows][group]: what they are mixtures by"),
)
class SummedStruct(Struct):
    """Sums of features, see summed.inc.h and the plan of this name."""


@declared(
    "ls_past",
    Field("int32_t", "segments"),
    Field("const int32_t *", "outliers", "[kv_heads][segments * outliers]: numbers of chunks"),
    Field("const int32_t *", "regions", "[segments]: places of their values; null: in this order"),
    Field("const char *", "left right", "[rows][rank], [segments][kv_heads][rank][head_width]"),
    Field("const char *", "landmarks", "[kv_heads][chunks][head_width]"),
    Field("const char *", "outlier_keys outlier_values", "[kv_heads][outliers of all][chunk]"),
    Field(
        "const char *const *", "values", "where they lie now: [places][kv_heads][rows of a segment]"
    ),
)
class PastStruct(Struct):
    """The closed segments of a sequence in a layer, see shadow.inc.h; rows are as those of the state."""


@declared(
    "ls_mixer_part",
    Field("const ls_summed *", "summed", "null: attention"),
    Field("int64_t", "window group span", "nearest rows, rows of a group, exact groups; 0: all"),
    Field(
        "int64_t", "far_group far_span", "rows ahead of so many groups are *far* ones; 0: none are"
    ),
    Field("int32_t", "rebuilt", "far keys are read as rebuilt.inc.h says"),
    Field("float", "threshold", "of these"),
    Field(
        "int32_t", "positions", "far ones that a node selects or reads, see positions.inc.h; or 0"
    ),
    Field("int32_t", "selects", "it reads all rows, and selects for later layers"),
    Field("int32_t", "sinks", "first rows of the text, seen from everywhere"),
    Field("int32_t", "state", "kind of state, an index into `committed` of an input"),
    Field("int32_t", "squared_relu", "weights relu(q.k)^2 of unit features instead of a softmax"),
    Field("int32_t", "kv_heads", "of this part"),
    Field("int32_t", "conv_history", "value rows before the first row"),
    Field("float", "alpha", "factor on the sums"),
    Field("const float *", "bias", "[heads of this part][bias_distances], null without"),
    Field("int32_t", "bias_distances", "the last one is for all greater ones"),
    Field("char *", "keys values", "[slots][kv_heads][rows]; values behind conv_history more rows"),
    Field("const float *", "sums", "[slots][kv_heads][sum_floats], null without"),
    Field(
        "int64_t",
        "sum_floats",
        "features x value columns; with sinks [sinks][2 * head_width + 1]: bytes of rows, and a 1; with a "
        "budget [budget][2 * head_width + 1]: a key, a value, and what it is worth, 0 for none",
    ),
    Field("int64_t", "key_stride value_stride", "bytes from one kv head to the next"),
    Field("int32_t", "row_kind", "LS_F32, LS_BF16, LS_F16, LS_INT8: codes and a scale, or LS_INT4"),
    Field(
        "int32_t",
        "row_bytes value_bytes",
        "of a row of keys and of values, alike but for sums and for keys with queries behind them",
    ),
    Field(
        "const char *const *const *",
        "pages",
        "[slots]: pages with the first rows of a slot, whose others are in keys and values; or null",
    ),
    Field("const int32_t *", "paged", "[slots]: how many rows are in pages"),
    Field("int64_t", "page_keys page_values", "bytes to [kv_heads][LS_PAGE] rows in a page"),
    Field(
        "int32_t", "chosen", "groups ahead of the span that a node reads, see select.inc.h; or 0"
    ),
    Field("int32_t", "coded", "they are judged by codes of LS_PAGE rows, not bounds of LS_JUDGED"),
    Field("uint16_t *", "judge", "[slots][kv_heads]: the codes or bounds of all pages"),
    Field("int64_t", "judge_stride", "numbers from one kv head to the next"),
    Field("int32_t *", "judged", "[slots][kv_heads]: how many of these pages have theirs"),
    Field(
        "float *",
        "group_sums",
        "[slots][kv_heads][group_room][sum_floats]: of each group of a canvas, see canvas.c; or null",
    ),
    Field(
        "int32_t *", "group_rows", "[slots][kv_heads][group_room]: of how many rows; 0: not made"
    ),
    Field("int32_t", "group_room", "groups that there is room for"),
    Field(
        "int32_t",
        "budget asked pool",
        "rows that stay of closed groups, where others have sums, see evicting.inc.h; budget 0: none",
    ),
    Field(
        "int32_t",
        "rank chunk outliers marked",
        "of closed segments: of their keys, rows of a chunk, chunks of each that all see, others that a node "
        "selects, see shadow.inc.h; chunk 0: there are none",
    ),
    Field(
        "const ls_past *",
        "past",
        "[slots][2]: those now, and once more have closed, which nodes see that do not see the first row",
    ),
    Field("int32_t", "left_bytes", "of a row of their left factors"),
)
class MixerPartStruct(Struct):
    """KV heads of a layer that read alike, and where their state is."""


@declared(
    "ls_norm",
    Field("const float *", "weight bias", "bias may be null"),
    Field("int32_t", "centred", "the mean is taken off first, as a LayerNorm does"),
)
class NormStruct(Struct):
    """x * weight / sqrt(mean(x^2) + eps) + bias."""


@declared(
    "ls_layer",
    Field("const ls_mixer_part *", "part"),
    Field("const int32_t *", "part_of place", "[kv_heads]: its part, and its number there"),
    Field("int32_t", "taps", "of the convolution"),
    Field("const float *", "conv_weights", "[heads][taps]"),
    Field("const ls_norm *", "mixer_norm mlp_norm", "of what goes in; null: none"),
    Field("const ls_norm *", "mixer_out_norm mlp_out_norm", "of what comes out; null: none"),
    Field("const ls_norm *", "q_norm k_norm", "null: none"),
    Field("int32_t", "whole_norms", "those of q and k are over the projections of all heads"),
    Field("int32_t", "norm_stride", "floats from a head's weights to the next; 0: all have one"),
    Field("int32_t", "rotary", "table of its positions, -1: none"),
    Field("int32_t", "parallel", "the MLP reads what enters the block, as the mixer does"),
    Field("const ls_linear *", "qkv out", "null: the mixer is left out"),
    Field("const ls_linear *", "up down", "up: with a gate, of both, the gate first; null: no MLP"),
)
class LayerStruct(Struct):
    """A block: what the parts of its mixer do, and its weights."""


@declared(
    "ls_decoder",
    Field("int32_t", "layers width heads kv_heads head_width mlp_width vocabulary"),
    Field("int32_t", "embedding_kind", "LS_F32, LS_BF16 or LS_BLOCKS"),
    Field("int32_t", "activation gated", "LS_SILU, ..; whether it gates other outputs"),
    Field("float", "eps", "of the norms"),
    Field("float", "score_factor", "on q.k / sqrt(head_width) ahead of a softmax"),
    Field("float", "score_cap", "on these then; 0 is none"),
    Field("float", "embedding_scale residual_scale logit_scale logit_cap"),
    Field("const void *", "embedding", "[vocabulary][width]; of blocks an ls_linear_part"),
    Field("const float *", "position_rows", "[positions][width], added to it; null without"),
    Field("const int32_t *", "turned", "features of a head that each rotary table turns"),
    Field("const ls_norm *", "final_norm"),
    Field(
        "const ls_norm *",
        "token_norm",
        "nodes have given states, and mixers read the token's embedding beside them; null: not so",
    ),
    Field("const ls_linear *", "head"),
    Field("const ls_layer *", "layer"),
)
class DecoderStruct(Struct):
    """A whole decoder."""


@declared(
    "ls_step_input",
    Field("int32_t", "slot first", "first: the row of its first new node among those of the step"),
    Field("int32_t", "nodes staged", "new nodes; staged rows after this step, the new ones last"),
    Field("const int32_t *", "committed", "rows in each kind of state"),
    Field("const uint64_t *", "ancestors", "[staged]: bit i says that staged row i is seen"),
    Field(
        "const int32_t *",
        "overwritten",
        "[nodes]: committed rows that they replace, seeing all of them; null: they are staged",
    ),
    Field("const int32_t *", "behind", "slots of the branches behind this one"),
    Field(
        "const int32_t *",
        "carried",
        "[nodes]: in how many of them the row that a node replaces stands too; null: in none",
    ),
)
class InputStruct(Struct):
    """The new nodes of one slot."""


@declared(
    "ls_batch",
    Field("int32_t", "rows inputs outputs", "new nodes, slots that they are of, logits asked for"),
    Field("int32_t", "chained", "inputs are pieces, which read what others of their slot write"),
    Field("const int32_t *", "tokens positions", "[rows]; positions are rows of the tables"),
    Field(
        "const float *const *",
        "given",
        "[rows]: in place of embeddings; null for none, or of a row",
    ),
    Field("const int32_t *", "output_rows", "[outputs]"),
    Field("const float *const *", "cosines", "of each rotary table: [positions][turned]"),
    Field("const float *const *", "sines", "alike"),
    Field("const ls_step_input *", "input"),
    Field("float *", "hidden logits", "[outputs][width], [outputs][vocabulary]"),
    Field("int32_t", "layers", "how many layers' states are handed out"),
    Field("const int32_t *", "layer_numbers", "[layers], ascending"),
    Field("float *", "layer_states", "[layers][rows][width]: what those layers put out"),
)
class BatchStruct(Struct):
    """What one step is to compute, and where the results go."""


@declared(
    "ls_heads",
    Field("int32_t", "heads blocks width inner vocabulary"),
    Field("int32_t", "seen", "floats that the first blocks read; the first `width` are added to"),
    Field("int32_t", "shared", "all heads have the first output layer"),
    Field("const ls_linear *const *", "first", "[blocks][heads]: width -> inner"),
    Field("const ls_linear *const *", "back", "[blocks][heads]: inner -> width"),
    Field("const ls_linear *const *", "out", "[heads], or one"),
)
class HeadsStruct(Struct):
    """Medusa heads, see heads.c: x += W2 silu(W1 x + b) for every block, then the output layer. Where
    `back` is null a block is x += silu(W1 x + b) and `inner` is `width`. All layers of one list are
    alike."""


@declared(
    "ls_guess",
    Field("int32_t", "rows heads top", "the `top` likeliest tokens of the first `heads` heads"),
    Field("const float *const *", "hidden", "[rows]: where what is seen [seen] lies"),
    Field("int32_t *", "tokens", "[rows][heads][top], likeliest first"),
)
class GuessStruct(Struct):
    """What Medusa heads are asked."""


@declared(
    "ls_fusion",
    Field("int32_t", "read", "layers of the target whose states are read"),
    Field("const ls_norm *const *", "norm", "[read]; null: none"),
    Field("const ls_linear *", "layer", "[read * width] -> width"),
    Field("const ls_norm *", "out_norm", "of what comes out; null: none"),
)
class FusionStruct(Struct):
    """What makes one state of those of several layers, see fuse.c."""


@declared(
    "ls_block_drafter",
    Field("const ls_decoder *", "decoder", "its layers and norm; head: what is drafted"),
    Field("int32_t", "places rank", "places of a block; see `markov`"),
    Field("const ls_fusion *", "fusion", "makes rows of context"),
    Field("const float *", "masks", "[places][width]"),
    Field("const ls_linear *", "markov", "[rank] -> as many as the head has"),
    Field("const float *", "before", "[outputs][rank]: what `markov` reads of a drafted token"),
    Field("const float *", "sure", "[width + rank], then a bias"),
)
class BlockDrafterStruct(Struct):
    """A block drafter, see block_draft.c."""


@declared(
    "ls_block_round",
    Field("const ls_batch *", "context", "the rows that its state lacks, behind which it reads"),
    Field("const ls_batch *", "blocks", "a block for each input"),
    Field("const float *const *", "states", "[rows of context][read]: [width] each"),
    Field("const float *", "roots before", "[inputs][width], [inputs][rank]: of the newest tokens"),
    Field("float *", "newest", "[slots][width]: the last row of context of each"),
    Field("int32_t *", "drafts", "[inputs][places]: outputs of the head"),
    Field("float *", "sure", "[inputs][places]: logits of the confidences"),
)
class BlockRoundStruct(Struct):
    """What a block drafter is asked. Context and blocks have the same slots in the same order."""


@declared(
    "ls_eviction",
    Field("int32_t", "heads repeats width rows", "kv heads, query heads of each; rows that close"),
    Field("int32_t", "group budget asked pool", "as in ls_mixer_part"),
    Field("float", "score_factor score_cap", "as in ls_decoder"),
    Field("const float *", "keys values", "[heads][rows]: keys [1 + repeats][width], queries last"),
    Field("float *", "kept", "[heads][budget][2 * width + 1]"),
)
class EvictionStruct(Struct):
    """Groups that close in a state, see evict.c."""


@declared(
    "ls_growth",
    Field(
        "int32_t",
        "sequences top levels",
        "top: children of a node, and nodes of a level that get some",
    ),
    Field("int32_t", "normed", "drafts go on from normalized states"),
    Field("const ls_batch *", "fresh", "entries that are made first, [inputs]; null: none"),
    Field("const ls_fusion *", "fusion", "makes the states of these"),
    Field("const float *const *", "read_states", "[rows of fresh][read]: [width] each"),
    Field(
        "float *",
        "ends end_shares",
        "[slots][width], [slots][top]: what the newest entry of a slot says, written by fresh ones",
    ),
    Field("int32_t *", "end_tokens", "[slots][top]: the children of the root; shares: logarithms"),
    Field(
        "const int32_t *",
        "slots committed",
        "[sequences]: the rows of each in the state, fresh ones too",
    ),
    Field(
        "const int32_t *",
        "nodes depths",
        "[sequences]: the largest tree of each, levels deep at most",
    ),
    Field("const int32_t *", "ids", "[vocabulary]: the tokens that can be drafted"),
    Field("const float *const *", "cosines", "as in ls_batch"),
    Field("const float *const *", "sines", "alike"),
    Field("int32_t *", "tokens parents", "[sequences][LS_MAX_NODES]"),
    Field("float *", "shares", "alike: how likely each is behind its parent; logarithms"),
    Field("int32_t *", "found", "[sequences]: draft nodes of each tree"),
)
class GrowthStruct(Struct):
    """What the trees of some sequences grow from, and what they become; see grow.c."""


def layout() -> list[int]:
    """This table as a number, then the size of every structure and the offset of every field."""
    numbers = [_checksum()]
    for each in STRUCTS:
        numbers.append(ctypes.sizeof(each.struct))
        numbers += [getattr(each.struct, name).offset for name in _names(each)]
    return numbers


def _names(each: Declared) -> list[str]:
    return [name for field in each.fields for name in field.names.split()]


def _checksum() -> int:
    """Of all that is declared here: fields of one size could change places unseen."""
    return zlib.crc32(repr((CONSTANTS, [each[:2] for each in STRUCTS])).encode()) >> 1


def header() -> str:
    """The text of `csrc/structs.h`."""
    lines = [
        "/* Written from kernels/cpu/structs.py, where it is changed; see there. */",
        "#ifndef LINSPEC_STRUCTS_H",
        "#define LINSPEC_STRUCTS_H",
        "",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
        *(_behind(f"#define {name} {value}", comment) for name, value, comment in CONSTANTS),
        *(line for each in STRUCTS for line in _struct_lines(each)),
        "",
        "/* what `layout` of structs.py says, as this compiler has it */",
        "#define LS_LAYOUT \\",
        *_layout_lines(),
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _struct_lines(each: Declared) -> list[str]:
    comment = textwrap.dedent("    " + (each.struct.__doc__ or "")).strip().split("\n")
    lines = ["", "/* " + "\n * ".join(comment) + " */", "typedef struct {"]
    for field in each.fields:
        pointer = field.type.endswith("*")
        kind = field.type.removesuffix("*").rstrip() if pointer else field.type
        names = ", ".join(f"*{name}" if pointer else name for name in field.names.split())
        lines.append(_behind(f"    {kind} {names};", field.comment))
    return [*lines, f"}} {each.name};"]


def _layout_lines() -> list[str]:
    lines = [f"    {_checksum()},"]
    for each in STRUCTS:
        offsets = "".join(f", offsetof({each.name},{name})" for name in _names(each))
        text = f"sizeof({each.name}){offsets},"
        wrapped = textwrap.wrap(text, 90, initial_indent="    ", subsequent_indent="        ")
        lines += [line.replace(f"({each.name},", f"({each.name}, ") for line in wrapped]
    lines[-1] = lines[-1].rstrip(",")
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _behind(code: str, comment: str) -> str:
    return f"{code:<44} /* {comment} */" if comment else code


if __name__ == "__main__":
    print(header(), end="")
