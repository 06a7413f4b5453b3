"""What is measured of each model: tokens and logprobs over drafters, weights, caches and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from linspec import LLM, LinspecError, SamplingParams

from .models import VOCAB, Model, write_heads, write_model
from .weights import tokens

DRAFTERS = ("none", "prompt-lookup", "medusa", "draft")
WEIGHTS = ("float32", "int8", "int4")
SAMPLING = {
    "greedy": SamplingParams(max_tokens=12, logprobs=0, ignore_eos=True),
    "sampled": SamplingParams(
        max_tokens=12,
        logprobs=0,
        ignore_eos=True,
        seed=7,
        temperature=0.8,
        top_k=30,
        top_p=0.95,
        repetition_penalty=1.1,
    ),
}
# a short prompt beside one that is read by the full form, across borders of groups
PROMPTS = (tokens("short", 11, VOCAB), tokens("long", 75, VOCAB))
_FULL, _SOURCE, _TARGET = tokens("full", 43, VOCAB), tokens("source", 29, VOCAB), [0, 7, 9, 7, 9]


@dataclass(frozen=True, slots=True)
class Case:
    """One place of the table; `drafter` 'draft' is a copy of the model with noise on its weights."""

    model: str
    weights: str = "float32"
    cache: str = "float"
    drafter: str = "none"
    sampling: str = "greedy"
    verifier: str = "lossless"

    @property
    def key(self) -> str:
        """Its name in the file."""
        parts = (self.model, self.weights, self.cache, self.drafter, self.sampling)
        return "/".join(parts if self.verifier == "lossless" else (*parts, self.verifier))


def cases(models: dict[str, Model]) -> Iterator[Case]:
    """Every combination that can run, and those that must be refused."""
    for name, model in models.items():
        if model["kind"] == "encoder":
            continue
        decoder = model["kind"] == "decoder"
        for weights in WEIGHTS if decoder else WEIGHTS[:1]:
            for kept in ("float", "int8") if _grows(model) else ("float",):
                for drafter in DRAFTERS if decoder else DRAFTERS[:2]:
                    for sampling in SAMPLING:
                        yield Case(name, weights, kept, drafter, sampling)
    yield Case("softmax", verifier="typical", drafter="draft", sampling="sampled")
    yield Case("aug", verifier="typical", drafter="medusa", sampling="sampled")


def _grows(model: Model) -> bool:
    """Whether a layer keeps a cache that grows, which can be kept as 8-bit codes."""
    mixers = model["config"].get("mixers", ())
    return any(mixer["name"] == "softmax" or mixer.get("exact_heads") for mixer in mixers)


class Bench:
    """Models on disk and in memory, each made once."""

    def __init__(self, models: dict[str, Model], root: Path) -> None:
        self.models, self._root = models, root
        self.folder = cache(self._folder)

    def _folder(self, name: str, noise: str = "") -> Path:
        target = self._root / f"{name.replace(':', '-')}{noise}"
        made = write_model(self.models[name], name, target, noise)
        if not noise and self.models[name].get("fingerprint"):
            write_heads(self.models[name], name, made / "medusa")
        return made

    def run(self, case: Case) -> dict[str, Any]:
        """What both prompts, run together, become; or the name of the refusal."""
        try:
            return self._generate(case)
        except LinspecError as error:
            return {"refused": type(error).__name__}

    def _generate(self, case: Case) -> dict[str, Any]:
        drafter = case.drafter
        if drafter == "draft":
            kind = "draft-model" if _grows(self.models[case.model]) else "student"
            drafter = f"{kind}:{self.folder(case.model, 'draft')}"
        llm = LLM(
            self.folder(case.model),
            drafter=drafter,
            verifier=case.verifier,
            policy=5,
            max_batch=2,
            quantize={"float32": None, "int8": 8, "int4": 4}[case.weights],
            kv=case.cache,
        )
        found = llm.generate(list(PROMPTS), SAMPLING[case.sampling])
        return {
            "tokens": [list(each.token_ids) for each in found],
            "logprobs": [[t.logprob for t in each.logprobs or ()] for each in found],
            "rounds": [[each.stats.rounds, each.stats.accepted] for each in found],
        }

    @torch.inference_mode()
    def forward(self, name: str) -> list[float]:
        """Log-probabilities of the full form for the tokens that follow, or for those in place."""
        kind = self.models[name]["kind"]
        full = torch.tensor([_FULL])
        if kind == "encoder":
            from linspec.checkpoints.hub import load_encoder

            model: Any = load_encoder(self.folder(name))
            return _chosen(model.fill(full), full)
        if kind == "seq2seq":
            from linspec.checkpoints.hub import load_seq2seq

            target = torch.tensor([_TARGET])
            model = load_seq2seq(self.folder(name))
            return _chosen(model(torch.tensor([_SOURCE]), target)[:, :-1], target[:, 1:])
        from linspec import load_model

        return _chosen(load_model(self.folder(name))(full)[:, :-1], full[:, 1:])


def _chosen(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    found = logits.log_softmax(-1).gather(-1, ids[..., None])
    return [float(each) for each in found.flatten()]


def fingerprint_of_machine() -> str:
    """Where equal code gives equal bits: the kernels, torch and its instruction set.

    And the maker of the processor, as torch's products add up in another order on each.
    """
    from linspec.bench.library import info
    from linspec.bench.machine import machine

    native, maker = info()["kernels"]["native"]["name"], machine()["cpu"].split()[0]
    return f"{native} torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {maker}"


def difference(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest difference of two lists of lists of numbers of the same lengths, else infinite."""
    if [len(each) for each in a] != [len(each) for each in b]:
        return float("inf")
    flat = [np.concatenate([np.asarray(each) for each in side]) for side in (a, b)]
    return float(np.abs(flat[0] - flat[1]).max(initial=0.0))
