"""Ways in turns, prompt by prompt: the command, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from denoisers import talker

from benchmarks import diffusion_claims
from benchmarks.diffusion_pairs import main
from linspec.errors import ConfigError


def test_each_way_has_a_line_beside_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusion_claims, "DRAFTER", str(talker()))
    words = ["auto-blocks", "--folder", str(tmp_path), "--tokens", "4", "--prompts", "1"]
    main([*words, "--rounds", "2"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "verify=auto: " in line and "median of 2 pairs" in line
    with pytest.raises(ConfigError, match="two pairs or more, got 1 prompts and 1 rounds"):
        main([*words, "--rounds", "1"])
