"""What can be set behind a mixer's name, such as aug:softmax or window:window=128."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.utils.options import option


@dataclass(frozen=True, slots=True)
class MixerOptions:
    """Sizes of MixerConfig; none is what `linspec linearize` takes for this mixer."""

    kernel: str | None = option(
        "weights of the exact part: own, softmax or relu2", default=None, short=True
    )
    group: int | None = option("tokens of a group", default=None)
    span: int | None = option("groups that a token sees exactly", default=None)
    taps: int | None = option("taps of the convolution over values; 0 is none", default=None)
    window: int | None = option("tokens that mixer 'window' sees", default=None)
    features: int | None = option("random features, or linformer's rows of a group", default=None)
    keep: int | None = option("closed groups that linformer remembers", default=None)
    seed: int | None = option("of what is drawn at random", default=None)

    def given(self) -> dict[str, str | int]:
        """The settings that were given."""
        every = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in every.items() if value is not None}
