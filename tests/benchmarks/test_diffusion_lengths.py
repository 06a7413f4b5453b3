"""Long canvases: the command, and what it refuses."""

from __future__ import annotations

import json

import pytest
from denoisers import source, talker

from benchmarks.diffusion_lengths import main
from linspec.errors import ConfigError


def test_each_model_has_a_line_for_each_length(capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(talker()), str(source("sdar")[0])]
    words = [*models, "--lengths", "8", "40", "--block", "4", "--turns", "1", "--rounds", "1"]
    main([*words, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["model"], each["length"]) for each in found] == [
        (model, length) for length in (8, 40) for model in models
    ]
    assert found[0]["whole_times"] == found[0]["block_times"] == 1
    assert all(each["whole_ms"] > 0 and each["block_ms"] > 0 for each in found)
    assert found[2]["state_mib"] >= found[0]["state_mib"] > 0
    main(words)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_canvas_has_a_block_at_least() -> None:
    with pytest.raises(ConfigError, match="lengths must be 32 or more, a block, got 16"):
        main([str(talker()), "--lengths", "16", "64"])
