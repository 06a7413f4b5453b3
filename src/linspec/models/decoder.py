"""One decoder for all families of decoders: blocks of mixer and MLP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from linspec.decoding.judged import Judged, Onward
from linspec.decoding.step import LOGITS, StepInput, StepOutput, Want
from linspec.decoding.tree import Shape, chain_shape
from linspec.errors import ContextOverflow
from linspec.kernels.cpu.library import load as load_kernels
from linspec.mixers.base import Rope
from linspec.mixers.handed import handing
from linspec.mixers.norms import make_norm
from linspec.mixers.projections import LinearFactory
from linspec.mixers.rope import Rotary
from linspec.mixers.shards import Shard
from linspec.models.arranged_block import ArrangedBlock
from linspec.models.block import Block
from linspec.models.cache import keeps_cache, new_states
from linspec.models.config import DecoderConfig
from linspec.models.head import inference_head, make_head
from linspec.models.layer_path import LayerPath, given_embeddings, node_slices
from linspec.models.linear import fused_linear
from linspec.models.norm import inference_norm
from linspec.models.padding import from_left, to_left
from linspec.models.step_outputs import interleaved, wanted_nodes
from linspec.models.whole_step import WholeStep, kernels_of, whole_step
from linspec.state.dense_group import DenseGroup, dense_groups_of, open_branches, staged_shapes
from linspec.state.sequence_states import SequenceStates

Through = Callable[[Block, torch.Tensor, Rope], torch.Tensor]


class Decoder(nn.Module):
    """Token ids in, logits out. `forward` is the full form, `step` the inference form."""

    continues_prompt = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # asked in every step
        self.position_limit = config.position_limit
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.width)
        elif config.positions == "rope":
            self.rotary = Rotary(config.rope, config.head_width)
            if config.local_rope is not None:
                self.local_rotary = Rotary(config.local_rope, config.head_width)
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = make_head(config)
        self.tie()
        # the part of a sequence that the full form computes, None for all of it; see `on_shard`
        self.shard: Shard | None = None
        self.is_inference = False
        self.native: WholeStep | None = None
        # fingerprints of the plain weights, kept when these are gone: of the last ones, and of all
        self.identity: str | None = None
        self.weight_identity: str | None = None

    def make_block(self, layer: int) -> Block:
        """The block of one layer."""
        kind = ArrangedBlock if self.config.arranged else Block
        return kind(self.config, layer)

    def tie(self) -> None:
        """Make parameters that are one in the checkpoint one in memory."""
        if self.config.tied_embeddings:
            self.head.weight = self.embed.weight

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def hidden(self, ids: torch.Tensor, through: Through = Block.__call__) -> torch.Tensor:
        """Final normalized hidden states [B, T, D] of ids [B, T] at positions 0..T-1, or those of its shard.

        through: runs one block on its input; a caller can look at it, or recompute it later.
        """
        first = self.shard.start if self.shard is not None else 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x, ropes = self.enter(ids, positions)
        with handing({}):
            for block, rope in zip(self.layers, ropes, strict=True):
                x = through(block, x, rope)
        return self.leave(x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What the output layer takes: the last block's states, normalized."""
        x = self.norm(x)
        return x if self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def enter(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        given: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, list[Rope]]:
        """Embedded ids, and for each layer the rotation of their positions where there is one.

        given: embeddings [N, D] that stand in place of those of the packed tokens from a number on, before
        `embedding_scale`.
        """
        x = self.embedded(ids, given).to(self.dtype)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.config.positions == "learned":
            x = x + self.embed_positions(positions)
        return x, self.ropes(positions, x.dtype)

    def ropes(self, positions: torch.Tensor, dtype: torch.dtype) -> list[Rope]:
        """The rotation of `positions` in each layer."""
        if self.config.positions != "rope":
            return [None] * self.config.layers
        ropes: dict[str, Rope] = {"main": self.rotary(positions, dtype), "none": None}
        if self.config.local_rope is not None:
            ropes["local"] = self.local_rotary(positions, dtype)
        return [ropes[name] for name in self.config.layer_ropes or ("main",) * self.config.layers]

    def embedded(
        self, ids: torch.Tensor, given: Sequence[tuple[int, torch.Tensor]]
    ) -> torch.Tensor:
        """The embeddings of ids, some of which are given; see `enter`."""
        x = self.embed(ids)
        for first, embeddings in given:
            x[first : first + len(embeddings)] = embeddings.to(x)
        return x

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocab] of ids [B, T]; `mask` [B, T] is true at real tokens.

        Rows may be padded at either end; logits at padding mean nothing.
        """
        if mask is None:
            return self.head(self.hidden(ids))
        ids, shifts = to_left(ids, mask)
        return self.head(from_left(self.hidden(ids), shifts))

    def full_logits(self, prompt: Sequence[int], outputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, vocab] behind `prompt` and each of B equally long outputs, by the full form."""
        ids = torch.tensor([[*prompt, *output] for output in outputs])
        return self.head(self.hidden(ids.to(self.device))[:, -1])

    def to_inference(self, linear_factory: LinearFactory = fused_linear) -> Decoder:
        """Turn this decoder into its inference form, in place; returns it.

        Projections of the same input become one product, with weights prepacked where that pays. The
        full form still works; training and saving do not. Calling it again changes nothing.
        `linear_factory` makes the layers, by default in the precision of the weights.
        """
        if self.is_inference:
            return self
        self.eval().requires_grad_(False)
        for block in self.layers:
            block.to_inference(linear_factory)
        self.add_module("head", inference_head(self.head, linear_factory))
        self.is_inference = True
        # else weights are loaded later
        if not any(weight.is_meta for weight in self.embed.parameters()):
            self.finalize_weights()
        return self

    def finalize_weights(self) -> None:
        """Compute what depends on the weights of the inference form, once these are final."""
        for block in self.layers:
            block.finalize_weights()
        self.norm = inference_norm(self.norm)
        self.native = whole_step(self)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed and kept in states; embeddings may be narrower."""
        return self.norm.get_parameter("weight").dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.get_parameter("weight").device

    @property
    def kernels(self) -> str:
        """What computes a step: the kernels in use, the form of the layers, and whether in one call."""
        kinds = (getattr(each, "formats", "") for each in self.modules())
        formats = " ".join(sorted({kind for kind in kinds if kind}))
        layer = f"{type(self.head).__name__}:{getattr(self.head, 'kind', '')} {formats}".rstrip()
        device = kernels_of(self.native)
        step = f"whole {device.name if device else ''}".rstrip() if self.native else "by layer"
        return f"{load_kernels().name} {layer} {step}"

    @property
    def keeps_cache(self) -> bool:
        """Whether a layer has a softmax cache, which can be kept in several ways."""
        return keeps_cache([block.state_makers() for block in self.layers])

    def new_state(
        self,
        slots: int = 1,
        kv: str = "float",
        *,
        layers: Collection[int] | None = None,
        offload: Path | None = None,
    ) -> SequenceStates:
        """Empty state for up to `slots` sequences, in the dtype and on the device of the weights.

        kv: how softmax caches keep their entries, such as 'int8'. layers: only these have a state, for steps
        that run through no others. offload: a directory for what states can have in files. Raises ConfigError
        when another kind than 'float', or a directory, is named and no layer has use for it.
        """
        makers = [
            block.state_makers() if layers is None or i in layers else ()
            for i, block in enumerate(self.layers)
        ]
        kernels = kernels_of(self.native)
        return new_states(makers, slots, kv, self.dtype, self.device, offload, kernels)

    def open(
        self, prompt: Sequence[int], slot: int, state: SequenceStates
    ) -> tuple[list[int], tuple[int, ...]]:
        """Make `slot` an empty sequence; returns the tokens to feed it, all of `prompt`, and no source."""
        state.reset(slot)
        return list(prompt), ()

    @torch.inference_mode()
    def step(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        *,
        layers: Collection[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        """Run new tokens of several slots against their committed state and stage them there.

        Inputs are in the order of their slots. Nothing committed changes: call `state.commit` with the
        accepted path afterwards. Raises ContextOverflow before any work when a sequence would pass
        the model's longest position.

        layers: those that the nodes go through, None for all; the states of the others stay as they are.
        want: layers whose hidden states are handed out too.
        """
        native = self.native if layers is None and state.in_kernels else None
        if native is None or any(each.by_layer for each in inputs):
            return self._step(inputs, state, None, LayerPath(layers, want.inner))
        kinds = [each.kind for each in inputs]
        if len(set(kinds)) == 1:
            return self._step_alike(inputs, state, native, want)
        # a whole step takes inputs of one kind only, and it must take all of them: a tree that shared a
        # step with a prompt would be rounded in another way than one that did not
        self._positions(inputs, staged_shapes(inputs, state), state)
        parts = [[i for i, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds))]
        outputs = [
            self._step_alike([inputs[i] for i in part], state, native, want) for part in parts
        ]
        return interleaved(parts, outputs)

    def _step_alike(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        native: WholeStep,
        want: Want,
    ) -> StepOutput:
        """Inputs of one kind through all layers, as a whole where there is such a form for them."""
        whole = native if native.takes(inputs) else None
        return self._step(inputs, state, whole, LayerPath(None, want.inner), want.onward)

    def _step(
        self,
        inputs: Sequence[StepInput],
        state: SequenceStates,
        native: WholeStep | None,
        path: LayerPath,
        onward: Onward | None = None,
    ) -> StepOutput:
        shapes = staged_shapes(inputs, state)
        positions = self._positions(inputs, shapes, state)
        for step_input in inputs:
            state.check_layers(step_input.slot, path.layers)
        for step_input in inputs:
            if native is None or step_input.overwrite is not None:
                state.unshare(step_input.slot)
            if step_input.overwrite is None:
                state.reserve(step_input.slot, len(step_input.tokens))
        places = open_branches(inputs, state)
        slices, wanted = wanted_nodes(
            inputs, () if native is None else native.judges(inputs, shapes)
        )
        judged: Mapping[int, Judged] = {}
        if native is not None:
            inner = sorted(path.wanted)
            output = native.run(inputs, shapes, positions, wanted, state, places, inner, onward)
            hidden, logits, judged = output.hidden, output.logits, output.judged
            if inner:
                path.found.update(zip(inner, output.inner.unbind(), strict=True))
        else:
            x, ropes = self._enter_nodes(inputs, positions)
            dense_groups = dense_groups_of(inputs, shapes)
            hidden = self._wanted_of(self.run(x, ropes, dense_groups, state, path), wanted)
            logits = self.head(hidden)
        for number, (step_input, shape) in enumerate(zip(inputs, shapes, strict=True)):
            if number in judged:
                # only the accepted nodes are still there, one behind the other
                shape = chain_shape(len(judged[number].path))
            if step_input.overwrite is None:
                ephemeral = step_input.ephemeral
                state.record(step_input.slot, shape, layers=path.layers, ephemeral=ephemeral)
            elif step_input.branch:
                state.record_branch(step_input.slot, step_input.branch)
        nodes = node_slices(inputs) if path.found else []
        return StepOutput(hidden, logits, slices, path.found, nodes, judged)

    def _enter_nodes(
        self, inputs: Sequence[StepInput], positions: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, list[Rope]]:
        """`enter` for the packed nodes [M] of a step."""
        device = self.device
        ids = torch.tensor([t for step_input in inputs for t in step_input.tokens], device=device)
        packed = torch.tensor([at for each in positions for at in each], device=device)
        return self.enter(ids, packed, given_embeddings(inputs))

    def _wanted_of(self, x: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """`leave` for the `wanted` of packed nodes [M, D]."""
        if len(wanted) < len(x):
            x = x[torch.tensor(wanted, dtype=torch.long, device=x.device)]
        return self.leave(x)

    def run(
        self,
        x: torch.Tensor,
        ropes: Sequence[Rope],
        dense_groups: list[DenseGroup],
        state: SequenceStates,
        path: LayerPath,
    ) -> torch.Tensor:
        """Packed nodes [M, D] through the step form of every layer of `path`."""
        places = zip(self.layers, ropes, state.layers, strict=True)
        for layer, (block, rope, place) in enumerate(places):
            if path.takes(layer):
                x = block.step(x, rope, dense_groups, *place)
            path.passed(layer, x)
        return x

    def _positions(
        self, inputs: Sequence[StepInput], shapes: Sequence[Shape], state: SequenceStates
    ) -> list[list[int]]:
        """Positions of the new nodes of each input; raises ContextOverflow beyond the last one."""
        limit, positions = self.position_limit, []
        for step_input, shape in zip(inputs, shapes, strict=True):
            start, new = state.length(step_input.slot), len(step_input.tokens)
            mine = [start + depth for depth in shape.depths[-new:]]
            if step_input.overwrite is not None:
                mine = list(step_input.overwrite)
            if limit is not None and max(mine) >= limit:
                raise ContextOverflow(
                    f"position {max(mine)} is beyond this model's {limit} positions; shorten the prompt "
                    "or max_tokens, or linearize the model: linear mixers have no such limit"
                )
            positions.append(mine)
        return positions
