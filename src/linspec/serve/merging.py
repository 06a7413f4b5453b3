"""Metrics of several replicas as one text: each sample gets a label `replica`, each family stays together."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([^\s{]+)(?:\{(.*)\})?(\s.*)")


def merged(texts: Mapping[str, str]) -> str:
    """The texts of replicas, by their names, as Prometheus reads them."""
    families: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP"):
                family = families.setdefault(line.split()[2], [])
            if not line.startswith("#"):
                family.append(_labelled(line, replica))
            elif line not in family:
                family.append(line)
    return "".join(f"{line}\n" for family in families.values() for line in family)


def _labelled(line: str, replica: str) -> str:
    found = _SAMPLE.fullmatch(line)
    if found is None:
        return line
    name, labels, rest = found.groups()
    more = f",{labels}" if labels else ""
    return f'{name}{{replica="{replica}"{more}}}{rest}'
