"""A mixer of another package has settings of its own: in a spec, in config.json, as a typed object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import assert_close, full_logits, random_tokens, tiny_config, tiny_model

from linspec import MIXERS, ConfigError, option
from linspec.checkpoints.hub import load_model, save_model
from linspec.errors import CheckpointError
from linspec.mixers.config import MixerConfig
from linspec.mixers.local import Local
from linspec.mixers.options import SpanOptions
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledOptions(SpanOptions):
    factor: float = option("on the outputs", default=2.0)


class ScaledLocal(Local):
    """`local` times a factor."""

    def __init__(self, config: object, mixer: MixerConfig) -> None:
        super().__init__(config, mixer)  # type: ignore[arg-type]
        self.factor = mixer.own_options(ScaledOptions).factor

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o * self.factor


@pytest.fixture(autouse=True)
def scaled() -> Iterator[None]:
    """Registers `scaled-local` for one test."""
    MIXERS.register("scaled-local", summary="test", paper="none", options=ScaledOptions)(
        ScaledLocal
    )
    yield
    MIXERS.forget("scaled-local")


def test_its_own_option_is_in_the_spec_in_config_json_and_in_the_result(tmp_path: Path) -> None:
    mixer = make_mixer("scaled-local:factor=0.5,group=4")
    assert (mixer.options, mixer.group) == ({"factor": 0.5}, 4)
    model = tiny_model(mixer, dtype=torch.float32)
    save_model(model, None, tmp_path / "m")
    kept = json.loads((tmp_path / "m" / "config.json").read_text())["decoder"]["mixers"]
    assert [each["options"] for each in kept] == 2 * [{"factor": 0.5}]
    again, text = load_model(tmp_path / "m"), [random_tokens(11)]
    assert again.config == model.config
    assert_close(full_logits(again, text), full_logits(model, text))
    plain = make_mixer("scaled-local:group=4")
    assert plain.options == {"factor": 2.0}
    other = tiny_model(plain, dtype=torch.float32)
    assert not torch.equal(full_logits(other, text), full_logits(model, text))


def test_a_run_is_known_by_them_and_older_runs_are_known_as_before() -> None:
    mixer = make_mixer("scaled-local:factor=0.5,group=4")
    assert mixer.recorded()["options"] == mixer.chosen()["options"] == {"factor": 0.5}
    for plain in (MixerConfig(), MixerConfig(name="aug", taps=3)):
        assert "options" not in plain.recorded() and "options" not in plain.chosen()


def test_options_that_a_mixer_does_not_have_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixer 'local' has no 'factor' to set, got 0.5"):
        Decoder(tiny_config(MixerConfig(name="local", options={"factor": 0.5})))
    wrong = MixerConfig(name="scaled-local", group=4, options={"factor": "much"})
    with pytest.raises(ConfigError, match="options of mixer 'scaled-local'.*factor"):
        Decoder(tiny_config(wrong))
    model = Decoder(tiny_config(make_mixer("scaled-local:factor=0.5,group=4")))
    save_model(model, None, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace("0.5", "[1]"))
    with pytest.raises((CheckpointError, ConfigError), match="options"):
        load_model(tmp_path / "m")
