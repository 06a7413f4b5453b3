"""Folders of known files: which of their files are text of one kind, and how it is read.

known_sources("data", out)  # {"wikitext2": (".../wikitext2_valid.txt",), "gsm8k": (...,)}
"""

from __future__ import annotations

import json
from pathlib import Path

from linspec.errors import InputError
from linspec.utils.files import replace_text

# name of the domain, and how its text is told
_WIKITEXT, _GSM8K = "wikitext2_valid.txt", "gsm8k_train.jsonl"


def known_sources(source: str, out: Path) -> dict[str, tuple[str, ...]]:
    """Sources for `load_documents` by domain.

    source: 'stdlib', a file, a folder of texts, or a folder that holds wikitext2_valid.txt or
    gsm8k_train.jsonl, which then stands for those. out: where a converted file goes. Raises
    InputError for a source that does not exist.
    """
    if source == "stdlib":
        return {"stdlib": ("stdlib",)}
    path = Path(source)
    # the empty path would be the current directory
    if not source or not path.exists():
        raise InputError(f"{path} does not exist; give 'stdlib', a file or a folder")
    found: dict[str, tuple[str, ...]] = {}
    if (path / _WIKITEXT).exists():
        found["wikitext2"] = (str(path / _WIKITEXT),)
    if (path / _GSM8K).exists():
        found["gsm8k"] = (str(_worked_problems(path / _GSM8K, out)),)
    return found or {path.stem: (str(path),)}


def _worked_problems(source: Path, out: Path) -> Path:
    """GSM8K with question and answer in one text, where a single field can name it."""
    target = out / "data" / "gsm8k.jsonl"
    if not target.exists():
        lines = []
        for line in source.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            lines.append(json.dumps({"text": f"{record['question']}\n{record['answer']}\n"}))
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, "\n".join(lines) + "\n")
    return target
