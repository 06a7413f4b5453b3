"""Other forms of a decoder that hold its weights: what a model can draft for itself with.

    near = near_sighted(model, group=64, span=4, sinks=4)   # softmax sees the near and the first tokens
    thin = skipping(model, mixers={3, 5}, mlps={4})         # these add nothing
    rough = rounded(model, 4)                               # linear layers in 4 bits, copies

Their steps run against a state of `model` itself: they stage nodes behind what the model has committed, and
whoever asked drops them. The model stays as it is, and so do its own forms once they are made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import mul

import torch
from torch import nn

from linspec.errors import ConfigError
from linspec.kernels.step_plan import BF16, F32, INT4, INT8
from linspec.mixers import MIXERS, Mixer
from linspec.mixers.config import MixerConfig
from linspec.mixers.softmax import Softmax
from linspec.models.arranged_block import ArrangedBlock
from linspec.models.decoder import Decoder
from linspec.models.head import CappedLinear, inference_head
from linspec.models.linear import PackedLinear, Quantizer
from linspec.models.native_linear import NativeLinear
from linspec.models.skeleton import without_memory
from linspec.models.skipped import Skipped
from linspec.models.whole_step import whole_step

# of a weight, its share of a group's scale included
_BITS = {F32: 32.0, BF16: 16.0, INT8: 8.0, INT4: 4.5}


def near_sighted(model: Decoder, *, group: int, span: int, sinks: int) -> Decoder:
    """`model` with `streaming` in the place of softmax, for all heads that see all tokens.

    Raises ConfigError where no layer has such heads, or the sizes do not go together.
    """
    mixer = MixerConfig(name="streaming", group=group, span=span, sinks=sinks)
    return with_attention(model, mixer)


def with_attention(model: Decoder, mixer: MixerConfig | Sequence[MixerConfig]) -> Decoder:
    """`model` with `mixer` in the place of softmax, for all heads that see all tokens.

    mixer: one for all such layers, or one for each. It has no weights of its own. Raises ConfigError where no
    layer has such heads, or where the mixer does not fit the model.
    """
    made = again(model)
    places = [
        (parent, name, part)
        for parent in made.modules()
        for name, part in parent.named_children()
        if sees_all(part)
    ]
    if not places:
        wanted = mixer.name if isinstance(mixer, MixerConfig) else mixer[0].name
        there = ", ".join(dict.fromkeys(each.name for each in model.config.mixers))
        raise ConfigError(
            f"attention {wanted!r} takes the place of softmax over all tokens, and no layer here has "
            f"that: its mixers are {there}. Leave it out, or take the model that this one was made from"
        )
    if isinstance(mixer, MixerConfig):
        mixer = MIXERS[mixer.name].for_layers(mixer, model.config, len(places))
    for (parent, name, part), own in zip(places, mixer, strict=True):
        setattr(parent, name, _in_place_of(part, own))
    return ready(made)


def sees_all(part: nn.Module) -> bool:
    """Whether a part of a model is softmax attention over all tokens, without a bias by distance."""
    return type(part) is Softmax and part.plain


def skipping(model: Decoder, mixers: Collection[int], mlps: Collection[int]) -> Decoder:
    """`model` without the mixers and the MLPs of these layers.

    Raises ConfigError for blocks that are not made of the two, and where nothing is left.
    """
    every = set(range(len(model.layers)))
    if every <= set(mixers) and every <= set(mlps):
        raise ConfigError("a model without all of its mixers and MLPs is none; leave out fewer")
    made = again(model)
    for layer, block in enumerate(made.layers):
        if not hasattr(block, "mlp"):
            raise ConfigError(f"a {type(block).__name__} has no mixer and MLP that can be left out")
        if layer in mixers:
            block.mixer = Skipped(block.mixer)  # type: ignore[assignment]  # it has the two forms of one
        if layer in mlps:
            block.mlp = Skipped(block.mlp)  # type: ignore[assignment]
        if isinstance(block, ArrangedBlock):
            _without_norms(block, layer in mixers, layer in mlps)
    return ready(made)


def _without_norms(block: ArrangedBlock, mixer: bool, mlp: bool) -> None:
    # a norm with a bias makes something of nothing
    if mixer:
        block.mixer_out_norm = nn.Identity()
    if mlp:
        block.mlp_out_norm = nn.Identity()


def rounded(model: Decoder, bits: int) -> Decoder:
    """`model` with a copy of its linear layers, the output layer too, in 8 or 4 bits; on the CPU only."""
    made, quantizer = again(model), Quantizer(bits, {})
    for parent in list(made.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear | PackedLinear | NativeLinear):
                setattr(parent, name, _rounded(part, quantizer))
    return ready(made)


def bits_per_weight(model: Decoder) -> float:
    """Mean bits of the weights of linear layers."""
    layers = [each for each in model.modules() if isinstance(each, NativeLinear)]
    if not layers:
        return 8.0 * model.head.weight.element_size()
    weights = [each.out_features * each.in_features for each in layers]
    bits = [_BITS.get(each.kind) or _block_bits(each) for each in layers]
    return sum(map(mul, weights, bits)) / sum(weights)


def _block_bits(layer: NativeLinear) -> float:
    return 8.0 * layer.packed.numel() / (layer.out_features * layer.in_features)


def again(model: Decoder) -> Decoder:
    """`model` in modules of its own around the same layers."""
    made = _module_again(model)
    assert isinstance(made, Decoder)
    return made


def _module_again(module: nn.Module) -> nn.Module:
    # what has no parts is not changed, and so shared
    if not module._modules:
        return module
    made: nn.Module = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    for kept in ("_parameters", "_buffers"):
        made.__dict__[kept] = dict(module.__dict__[kept])
    made.__dict__["_modules"] = {
        name: None if part is None else _module_again(part)
        for name, part in module._modules.items()
    }
    return made


def ready(made: Decoder) -> Decoder:
    made.native = whole_step(made) if made.is_inference else None
    return made


def _in_place_of(softmax: nn.Module, mixer: MixerConfig) -> Mixer:
    """A mixer with the projections and the convolution of `softmax`."""
    assert isinstance(softmax, Softmax)
    with without_memory():
        made = MIXERS[mixer.name](softmax.config, replace(mixer, taps=softmax.mixer.taps))
        plain = Softmax(softmax.config, softmax.mixer)
    # what the mixer has beside these are parts without weights
    for name in [*plain._modules, *plain._parameters]:
        delattr(made, name)
    for name, part in (*softmax._modules.items(), *softmax._parameters.items()):
        setattr(made, name, part)
    if softmax.padded_taps is not None:
        made.finalize_weights()
    return made.train(softmax.training)


def _rounded(layer: nn.Module, quantizer: Quantizer) -> nn.Module:
    if isinstance(layer, CappedLinear):
        return inference_head(layer, quantizer)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    with without_memory():
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if isinstance(bias, torch.Tensor):
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    made = quantizer(plain)
    # such as the cap of logits
    made._forward_hooks.update(layer._forward_hooks)
    return made
