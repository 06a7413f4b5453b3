"""One decoder for Llama, Mistral, Qwen2, Qwen3, SmolLM and GPT-2: blocks of mixer and MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from linspec.decoding.step import LOGITS, MAX_STAGED, StepInput, StepOutput, Want
from linspec.decoding.tree import Shape
from linspec.errors import ContextOverflow
from linspec.kernels.cpu.library import load as load_kernels
from linspec.mixers.base import LinearFactory, Rope
from linspec.mixers.rope import Rotary
from linspec.models.block import Block, make_norm
from linspec.models.cache import row_specs
from linspec.models.config import DecoderConfig
from linspec.models.layer_path import LayerPath, given_embeddings, node_slices
from linspec.models.linear import fused_linear
from linspec.models.norm import inference_norm
from linspec.models.padding import from_left, to_left
from linspec.models.step_plan import OneCall, one_call
from linspec.state.decoder_state import DecoderState
from linspec.state.dense_group import DenseGroup, dense_groups_of

Through = Callable[[Block, torch.Tensor, Rope], torch.Tensor]


class Decoder(nn.Module):
    """Token ids in, logits out. `forward` is the full form, `step` the inference form."""

    continues_prompt = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.width)
        elif config.positions == "rope":
            self.rotary = Rotary(config.rope, config.head_width)
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        self.is_inference = False
        self.native: OneCall | None = None
        # fingerprint of the plain weights, kept when these are gone
        self.identity: str | None = None

    def make_block(self, layer: int) -> Block:
        """The block of one layer."""
        return Block(self.config, layer)

    def tie(self) -> None:
        """Make parameters that are one in the checkpoint one in memory."""
        if self.config.tied_embeddings:
            self.head.weight = self.embed.weight

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.blocks))

    def hidden(self, ids: torch.Tensor, through: Through = Block.__call__) -> torch.Tensor:
        """Final normalised hidden states [B, T, D] of ids [B, T] at positions 0..T-1.

        through: runs one block on its input; a caller can look at it, or recompute it later.
        """
        x, rope = self.enter(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in self.layers:
            x = through(block, x, rope)
        return self.leave(x)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """What the output layer takes: the last block's states, normalised."""
        x = self.norm(x)
        return x if self.config.logit_scale == 1.0 else x * self.config.logit_scale

    def enter(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        given: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, Rope]:
        """Embedded ids, and the rotation of their positions where there is one.

        given: embeddings [N, D] that stand in place of those of the packed tokens from a number on.
        """
        x = self.embedded(ids, given).to(self.dtype)
        if self.config.positions == "learned":
            return x + self.embed_positions(positions), None
        if self.config.positions == "rope":
            return x, self.rotary(positions, x.dtype)
        return x, None

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
        return self.head(self.hidden(ids.to(self.embed.weight.device))[:, -1])

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
        self.add_module("head", linear_factory(self.head))
        self.is_inference = True
        if not self.embed.weight.is_meta:
            self.finalize_weights()
        return self

    def finalize_weights(self) -> None:
        """Compute what depends on the weights of the inference form, once these are final."""
        for block in self.layers:
            block.finalize_weights()
        self.norm = inference_norm(self.norm)
        self.native = one_call(self)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed and kept in states; embeddings may be narrower."""
        return self.norm.get_parameter("weight").dtype

    @property
    def kernels(self) -> str:
        """What computes a step: the kernels in use, the form of the layers, and whether in one call."""
        layer = f"{type(self.head).__name__}:{getattr(self.head, 'kind', '')}"
        return f"{load_kernels().name} {layer} {'whole' if self.native else 'by layer'}"

    def new_state(self, slots: int = 1, kv: str = "float") -> DecoderState:
        """Empty state for up to `slots` sequences, in the dtype and on the device of the weights.

        kv: 'int8' keeps the rows of softmax caches as 8-bit codes. Raises ConfigError when no layer
        has such a cache.
        """
        mixers = [block.mixer for block in self.layers]
        return DecoderState(
            row_specs(mixers, kv),
            [mixer.fold for mixer in mixers],
            slots,
            dtype=self.dtype,
            device=self.embed.weight.device,
        )

    def open(
        self, prompt: Sequence[int], slot: int, state: DecoderState
    ) -> tuple[list[int], tuple[int, ...]]:
        """Make `slot` an empty sequence; returns the tokens to feed it, all of `prompt`, and no source."""
        state.reset(slot)
        return list(prompt), ()

    @torch.inference_mode()
    def step(
        self,
        inputs: Sequence[StepInput],
        state: DecoderState,
        *,
        layers: frozenset[int] | None = None,
        want: Want = LOGITS,
    ) -> StepOutput:
        """Run new tokens of several slots against their committed state and stage them there.

        layers: only these are computed and only their part of the state means anything, None for all; a
        state is stepped with the same layers always. want: layers whose states are handed out too.
        Feeds are in the order of their slots. Nothing committed changes: call `state.commit` with the
        accepted path afterwards. Raises ContextOverflow before any work when a sequence would pass
        the model's longest position.
        """
        if layers is not None or want.inner or any(i.embeddings is not None for i in inputs):
            return self._step(inputs, state, LayerPath(layers, want.inner))
        parts = self._apart(inputs)
        outputs = [self._step([inputs[i] for i in part], state, None) for part in parts]
        return outputs[0] if len(outputs) == 1 else _interleaved(parts, outputs)

    def _apart(self, inputs: Sequence[StepInput]) -> list[list[int]]:
        """Which inputs are computed together.

        The one-call step takes trees only. It must take all of them: a tree that shared a step with a
        prompt would be rounded in another way than one that did not.
        """
        if self.native is None:
            return [list(range(len(inputs)))]
        parts = [
            [
                i
                for i, step_input in enumerate(inputs)
                if (len(step_input.tokens) > MAX_STAGED) is long
            ]
            for long in (False, True)
        ]
        return [part for part in parts if part] or [[]]

    def _step(
        self, inputs: Sequence[StepInput], state: DecoderState, path: LayerPath | None
    ) -> StepOutput:
        """One step; `path` is what the one-call form cannot do."""
        dense_groups = dense_groups_of(inputs, state)
        shapes = [shape for dense_group in dense_groups for shape in dense_group.shapes]
        places = [self._positions(*each, state) for each in zip(inputs, shapes, strict=True)]
        for step_input in inputs:
            state.reserve(step_input.slot, len(step_input.tokens))
        slices, wanted = _wanted(inputs)
        if self.native is not None and path is None:
            hidden, logits = self.native.run(inputs, shapes, places, wanted, state)
        else:
            path = path or LayerPath()
            hidden, logits = self._by_layers(inputs, dense_groups, places, wanted, state, path)
        for step_input, shape in zip(inputs, shapes, strict=True):
            state.record(step_input.slot, shape)
        nodes = node_slices(inputs) if path and path.found else []
        return StepOutput(hidden, logits, slices, path.found if path else {}, nodes)

    def _by_layers(
        self,
        inputs: Sequence[StepInput],
        dense_groups: list[DenseGroup],
        places: Sequence[Sequence[int]],
        wanted: Sequence[int],
        state: DecoderState,
        path: LayerPath,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of the `wanted` nodes, by torch's operators."""
        device = self.embed.weight.device
        ids = torch.tensor([t for step_input in inputs for t in step_input.tokens], device=device)
        positions = torch.tensor([p for place in places for p in place], device=device)
        x, rope = self.enter(ids, positions, given_embeddings(inputs))
        x = self.run(x, rope, dense_groups, state, path)
        if len(wanted) < len(x):
            x = x[torch.tensor(wanted, device=device)]
        hidden = self.leave(x)
        return hidden, self.head(hidden)

    def run(
        self,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: DecoderState,
        path: LayerPath,
    ) -> torch.Tensor:
        """Packed nodes [M, D] through the step form of every layer of `path`."""
        for layer in range(len(self.blocks)):
            if path.takes(layer):
                x = self.step_layer(layer, x, rope, dense_groups, state)
            path.passed(layer, x)
        return x

    def step_layer(
        self,
        layer: int,
        x: torch.Tensor,
        rope: Rope,
        dense_groups: list[DenseGroup],
        state: DecoderState,
    ) -> torch.Tensor:
        """Packed nodes [M, D] through the step form of one layer."""
        part, index = state.layers[layer]
        return self.layers[layer].step(x, rope, dense_groups, part, index)

    def _positions(self, step_input: StepInput, shape: Shape, state: DecoderState) -> list[int]:
        start = state.length(step_input.slot)
        places = [start + depth for depth in shape.depths[len(shape) - len(step_input.tokens) :]]
        limit = self.config.position_limit
        if limit is not None and max(places, default=0) >= limit:
            raise ContextOverflow(
                f"position {max(places)} is beyond this model's {limit} positions; shorten the prompt or "
                "max_tokens, or linearize the model: linear mixers have no such limit"
            )
        return places


def _wanted(inputs: Sequence[StepInput]) -> tuple[list[slice], list[int]]:
    """Which of the packed nodes have logits, and which of those belong to each step_input."""
    slices: list[slice] = []
    wanted: list[int] = []
    first = 0
    for step_input in inputs:
        count = len(step_input.tokens)
        keep = range(first if step_input.all_logits else first + count - 1, first + count)
        slices.append(slice(len(wanted), len(wanted) + len(keep)))
        wanted += keep
        first += count
    return slices, wanted


def _interleaved(parts: Sequence[Sequence[int]], outputs: Sequence[StepOutput]) -> StepOutput:
    """One output of several, with rows in the order of all inputs."""
    rows: dict[int, slice] = {}
    first = 0
    for part, output in zip(parts, outputs, strict=True):
        for step_input, own in zip(part, output.slices, strict=True):
            rows[step_input] = slice(first + own.start, first + own.stop)
        first += len(output.hidden)
    return StepOutput(
        torch.cat([output.hidden for output in outputs]),
        torch.cat([output.logits for output in outputs]),
        [rows[step_input] for step_input in sorted(rows)],
    )
