"""Which KV heads of a model see everything, and the mixers that its layers get by that.

heads = read_exact("layers:0,7", config)
mixers = by_head_mixers(config, make_mixer("streaming"), heads)
"""

from __future__ import annotations

from dataclasses import replace

from linspec.errors import ConfigError
from linspec.mixers.by_head import beside_exact
from linspec.mixers.config import MixerConfig, StackConfig
from linspec.mixers.specs import make_mixer
from linspec.utils.messages import shown

# layer by layer
Heads = tuple[tuple[int, ...], ...]


def read_exact(text: str, config: StackConfig) -> int | Heads:
    """How many KV heads `text` asks for, or which; raises ConfigError for what this model has not."""
    total, every = config.layers * config.kv_heads, tuple(range(config.kv_heads))
    if text == "all-linear":
        return ((),) * config.layers
    kind, _, rest = text.partition(":")
    if kind == "layers" and all(part.isdecimal() for part in rest.split(",")):
        layers = {int(part) for part in rest.split(",")}
        if max(layers) >= config.layers:
            raise ConfigError(f"no layer {max(layers)}: layers are 0..{config.layers - 1}")
        return tuple(every if layer in layers else () for layer in range(config.layers))
    share = text.endswith("%") and text[:-1].isdecimal()
    count = round(int(text[:-1]) / 100 * total) if share else int(text) if text.isdecimal() else 0
    if not 1 <= count < total:
        raise ConfigError(
            f"exact heads must be 1 to {total - 1} of this model's {total}, a share such as 12%, "
            f"layers:0,7 or all-linear, got {shown(repr(text))}"
        )
    return count


def by_head_mixers(
    config: StackConfig, streaming: MixerConfig, heads: Heads, exact: str | None = None
) -> tuple[MixerConfig, ...]:
    """A mixer for each layer: `heads` exact, the others streaming.

    exact: spec of the mixer of exact heads, None for softmax. A layer of exact heads only has it alone.
    """
    found = []
    for chosen in heads:
        if len(chosen) == config.kv_heads:
            found.append(MixerConfig() if exact is None else make_mixer(exact))
        elif chosen:
            mixer = beside_exact(streaming, chosen)
            given = {} if exact is None else {"exact": exact}
            found.append(replace(mixer, options={**mixer.options, **given}))
        else:
            found.append(streaming)
    return tuple(found)
