"""What each part of augmented linear attention is worth: equal budgets, several seeds.

    python -m linspec.evaluate.ablation --tokens 120000 --seeds 3 --out runs/ablation

Every cell is a `linspec linearize` of the teacher followed by `linspec eval`; finished cells are kept in
`out`, so the grid can be filled over several sittings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from linspec.config import MixerConfig
from linspec.evaluate.perplexity import evaluate_source
from linspec.files import replace_text
from linspec.train.linearize import LinearizeConfig, linearize

# You et al. 2024, table 14: local, what each addition brings, and both together
PARTS = {
    "local": ("local", 0),
    "local + conv": ("local", 32),
    "local + α·global": ("grouped", 0),
    "aug": ("aug", 32),
}


def ablate(
    teacher: str,
    out: Path,
    *,
    tokens: int,
    seeds: int,
    group: int,
    context: int,
    limit_bytes: int,
    parts: Sequence[str] = tuple(PARTS),
) -> dict[str, list[float]]:
    """Held-out bits per byte of every part, one figure per seed."""
    found: dict[str, list[float]] = {part: [] for part in parts}
    for seed in range(seeds):
        for part in parts:
            config = LinearizeConfig(tokens=tokens, context=context, seed=seed)
            name, taps = PARTS[part]
            mixer = MixerConfig(name=name, group=group, taps=taps)
            cell = out / f"{name}-{taps}-group{group}-tokens{tokens}-seed{seed}"
            found[part].append(_cell(teacher, cell, mixer, config, limit_bytes))
            print(f"{part}, seed {seed}: {found[part][-1]:.4f} bits per byte", file=sys.stderr)
    return found


def _cell(
    teacher: str, cell: Path, mixer: MixerConfig, config: LinearizeConfig, limit_bytes: int
) -> float:
    score = cell / f"score-{limit_bytes}.json"
    if not score.exists():
        linearize(teacher, cell, mixer=mixer, config=config, resume=(cell / "training").exists())
        measured = evaluate_source(cell, limit_bytes=limit_bytes)
        replace_text(score, json.dumps({"bits_per_byte": measured.bits_per_byte}))
    return float(json.loads(score.read_text())["bits_per_byte"])


def summarize(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest of the seeds."""
    return {
        part: {
            "mean": round(statistics.mean(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for part, values in found.items()
    }


def main() -> None:
    """Print the summary as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default="embedded-softmax", help="softmax model directory")
    parser.add_argument("--tokens", type=int, default=120_000, help="training tokens of a cell")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per part (default 3)")
    parser.add_argument("--group", type=int, default=64, help="tokens per group (default 64)")
    parser.add_argument("--context", type=int, default=512, help="training context (default 512)")
    parser.add_argument("--limit-bytes", type=int, default=100_000, help="held-out bytes measured")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="kept cells")
    given = parser.parse_args()
    found = ablate(
        given.teacher,
        given.out,
        tokens=given.tokens,
        seeds=given.seeds,
        group=given.group,
        context=given.context,
        limit_bytes=given.limit_bytes,
    )
    print(json.dumps({"bits_per_byte": summarize(found), "seeds": found}, indent=2))


if __name__ == "__main__":
    main()
