"""Everything that a linearization is asked for, as one object: which mixers, which text, which training.

recipe = LinearizeRecipe.of(mixer="aug", exact_tokens=256, tokens=500_000)
linearize("embedded-softmax", "student", recipe)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from linspec.errors import ConfigError, WrongType
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import DEFAULT_GROUP, leaves_span, make_mixer
from linspec.train.data import Sources, check_sources
from linspec.train.encoder_training import EncoderTraining
from linspec.train.linearize_config import LinearizeConfig
from linspec.utils.messages import did_you_mean, shown
from linspec.utils.sizes import check_instance, check_lengths, check_size

# names of 0.1.0, which still work
OLD_NAMES = {"rows": "exact_tokens"}
Training = LinearizeConfig | EncoderTraining | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LinearizeRecipe:
    """How a softmax model becomes one with other mixers; checked when it is made.

    A mixer that changes nothing trains the teacher itself.

    Attributes:
        mixer: a spec of `linspec list` such as 'aug:taps=16', or a MixerConfig. A spec goes before the
            sizes below.
        group: tokens of a group; None for 64, or 32 for an encoder.
        taps: taps of the causal convolution over values; None for the default of the mixer.
        window: tokens that the mixer 'window' sees; None for its default.
        span: groups that a layer sees exactly, for all layers or one for each; None searches.
        exact_tokens: tokens that a layer sees exactly, in the mean over the layers, which the search for
            spans may spend; None for 384.
        kernel: weights of the exact positions: 'softmax' (those of the teacher), 'own' or 'relu2'.
        features: random features of 'performer' and 'rfa', positions of a group of 'linformer'; 0 for the
            default.
        keep: groups that 'linformer' remembers; 0 for the default.
        mixer_seed: of the random features.
        keep_softmax: numbers of the layers that keep their mixer.
        softmax_layers: how many more layers keep theirs: those that need distant positions most.
        config: tokens, rates and precision; a mapping gives some settings of LinearizeConfig and leaves the
            others to the kind of model.
        data: files, folders, 'stdlib' or data sets; the held-out documents are not trained on.
        field: the entry of a `.jsonl` line that holds the text.
        dtype: of the saved weights; None for that of the source.

    Raises:
        ConfigError: a setting breaks a rule.
        InputError: the data cannot be read.
    """

    mixer: str | MixerConfig = "aug"
    group: int | None = None
    taps: int | None = None
    window: int | None = None
    span: int | Sequence[int] | None = None
    exact_tokens: int | None = None
    kernel: str | None = None
    features: int = 0
    keep: int = 0
    mixer_seed: int = 0
    keep_softmax: Sequence[int] = ()
    softmax_layers: int = 0
    config: Training = field(default_factory=dict)
    data: Sources = ("stdlib",)
    field: str = "text"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.exact_tokens is not None:
            check_size("exact_tokens", self.exact_tokens)
        check_size("softmax_layers", self.softmax_layers, least=0)
        check_lengths("keep_softmax", self.keep_softmax, least=0, empty=True)
        if isinstance(self.span, Sequence):
            check_lengths("span", self.span)
        elif self.span is not None:
            check_size("span", self.span)
        self._check_exact_tokens()
        check_instance("dtype", self.dtype, torch.dtype, none=True)
        check_instance("field", self.field, str)
        check_instance("config", self.config, LinearizeConfig, EncoderTraining, Mapping)
        check_sources(self.data)
        self.mixer_config()
        if isinstance(self.config, Mapping):
            _changed(LinearizeConfig(), self.config)

    def _check_exact_tokens(self) -> None:
        """Raise ConfigError for two answers to the question of what each layer sees exactly."""
        if self.exact_tokens is None:
            return
        if self.span is not None or not leaves_span(self.mixer):
            raise ConfigError(
                f"exact_tokens {self.exact_tokens} lets a search choose the spans, and "
                f"{'span' if self.span is not None else 'the mixer'} gives them; leave out one of the two"
            )

    @classmethod
    def of(cls, recipe: LinearizeRecipe | None = None, **options: Any) -> LinearizeRecipe:
        """`recipe`, or the default one, with other options: its own and those of its training.

        Raises WrongType for an unknown one, ConfigError for what breaks a rule.
        """
        if isinstance(recipe, Mapping):
            raise WrongType(
                f"a recipe is a LinearizeRecipe, got {shown(recipe)}; give its entries as options: "
                "linearize(source, out, **recipe)"
            )
        check_instance("recipe", recipe, LinearizeRecipe, none=True)
        for old, new in OLD_NAMES.items():
            if old in options:
                warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=3)
                options[new] = options.pop(old)
        own, trained = _names(cls), _names(LinearizeConfig)
        for name in options:
            if name not in own and name not in trained:
                known = sorted({*own, *trained})
                raise WrongType(
                    f"linearize has no option {name!r}; known: {', '.join(known)}"
                    f"{did_you_mean(name, known)}"
                )
        chosen = {name: value for name, value in options.items() if name in own}
        # `config=None` stands for the default
        chosen = {k: v for k, v in chosen.items() if k != "config" or v is not None}
        made = replace(recipe or cls(), **chosen)
        changed = {name: value for name, value in options.items() if name not in own}
        return replace(made, config=_changed(made.config, changed)) if changed else made

    def mixer_config(self, group: int = DEFAULT_GROUP) -> MixerConfig:
        """The mixer of every layer that changes. group: where neither mixer nor recipe says one."""
        return make_mixer(
            self.mixer,
            group=group if self.group is None else self.group,
            span=self.span if isinstance(self.span, int) else None,
            kernel=self.kernel,
            taps=self.taps,
            window=self.window,
            features=self.features,
            keep=self.keep,
            seed=self.mixer_seed,
        )

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """`data` as a list, also where it is one source."""
        return check_sources(self.data)

    @property
    def training(self) -> LinearizeConfig:
        """How a model that generates is trained; not completed yet."""
        if isinstance(self.config, EncoderTraining):
            raise ConfigError(
                "EncoderTraining is how encoders are trained, and this source generates text; give "
                "a LinearizeConfig"
            )
        if isinstance(self.config, LinearizeConfig):
            return self.config
        return LinearizeConfig(**self.config)

    @property
    def encoder_training(self) -> EncoderTraining:
        """How an encoder is trained."""
        if isinstance(self.config, EncoderTraining):
            return self.config
        if isinstance(self.config, LinearizeConfig):
            return EncoderTraining.of(self.config.chosen())
        return EncoderTraining.of(self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: what was asked for, as linearize.json keeps it."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found["data"] = [str(source) for source in self.sources]
        found["keep_softmax"] = list(self.keep_softmax)
        found["span"] = list(self.span) if isinstance(self.span, Sequence) else self.span
        found["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        found["mixer"] = (
            self.mixer.recorded() if isinstance(self.mixer, MixerConfig) else self.mixer
        )
        found["config"] = self.config if isinstance(self.config, Mapping) else asdict(self.config)
        return found


def _names(kind: type[Any]) -> set[str]:
    return {each.name for each in fields(kind)}


def _changed(config: Training, options: Mapping[str, Any]) -> Training:
    """A training with other settings."""
    if isinstance(config, Mapping):
        return {**config, **options}
    strange = sorted(options.keys() - _names(type(config)))
    if strange:
        raise ConfigError(f"{type(config).__name__} has no {', '.join(strange)}; leave it out")
    return replace(config, **options)
