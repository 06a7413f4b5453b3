"""linspec: checkpoint in, fast model out.

    from linspec import LLM
    print(LLM("embedded-aug").generate("def fibonacci(n):")[0].text)

Names are imported when they are first used. After `import linspec`, transformers' AutoConfig and
AutoModelForCausalLM read linspec's own checkpoints.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from linspec.integrations.transformers.register import register_when_loaded as _register

# torch's threads wait for more work by spinning, for milliseconds, on the cores that linspec's own
# threads need next; it has to be said before torch is loaded
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from linspec.checkpoints.hub import load, load_model, load_tokenizer, save_model
    from linspec.decoding.outcome import Outcome
    from linspec.decoding.request import Request
    from linspec.decoding.sampling import Grammar, SamplingParams
    from linspec.decoding.sequence import RunningSequence
    from linspec.decoding.step import StepInput, Want
    from linspec.decoding.target import Target
    from linspec.decoding.tree import Budget, TokenTree
    from linspec.drafters import DRAFTERS, ChainDrafter, Drafter, DrafterContext
    from linspec.engine.loops import LOOPS, GenerationLoop, LoopContext
    from linspec.engine.results import Generation, Piece
    from linspec.engine.scheduler import Batch
    from linspec.errors import ConfigError, LinspecError, StateError
    from linspec.evaluate.quantize import quantize
    from linspec.llm import LLM
    from linspec.mixers import MIXERS, Mixer
    from linspec.policies import POLICIES, Policy, PolicyContext
    from linspec.state.contract import LayerState, StateOptions
    from linspec.state.entries import EntrySpec
    from linspec.state.registry import STATES
    from linspec.state.slots import SlotStates, StateSnapshot
    from linspec.train.drafters import train_drafter
    from linspec.train.linearize import linearize
    from linspec.train.linearize_recipe import LinearizeRecipe
    from linspec.train.pretrain import pretrain
    from linspec.utils.options import option
    from linspec.verifiers import VERIFIERS, Verifier

    __version__: str
    """The installed version; '0+unknown' for a source tree that is not installed."""

__all__ = [
    "DRAFTERS",
    "LLM",
    "LOOPS",
    "MIXERS",
    "POLICIES",
    "STATES",
    "VERIFIERS",
    "Batch",
    "Budget",
    "ChainDrafter",
    "ConfigError",
    "Drafter",
    "DrafterContext",
    "EntrySpec",
    "Generation",
    "GenerationLoop",
    "Grammar",
    "LayerState",
    "LinearizeRecipe",
    "LinspecError",
    "LoopContext",
    "Mixer",
    "Outcome",
    "Piece",
    "Policy",
    "PolicyContext",
    "Request",
    "RunningSequence",
    "SamplingParams",
    "SlotStates",
    "StateError",
    "StateOptions",
    "StateSnapshot",
    "StepInput",
    "Target",
    "TokenTree",
    "Verifier",
    "Want",
    "__version__",
    "linearize",
    "load",
    "load_model",
    "load_tokenizer",
    "option",
    "pretrain",
    "quantize",
    "save_model",
    "train_drafter",
]

_HOMES = {
    "Batch": "linspec.engine.scheduler",
    "Budget": "linspec.decoding.tree",
    "ChainDrafter": "linspec.drafters",
    "ConfigError": "linspec.errors",
    "DRAFTERS": "linspec.drafters",
    "Drafter": "linspec.drafters",
    "DrafterContext": "linspec.drafters",
    "EntrySpec": "linspec.state.entries",
    "Generation": "linspec.engine.results",
    "GenerationLoop": "linspec.engine.loops",
    "Grammar": "linspec.decoding.sampling",
    "LLM": "linspec.llm",
    "LOOPS": "linspec.engine.loops",
    "LayerState": "linspec.state.contract",
    "LinearizeRecipe": "linspec.train.linearize_recipe",
    "LinspecError": "linspec.errors",
    "LoopContext": "linspec.engine.loops",
    "MIXERS": "linspec.mixers",
    "Mixer": "linspec.mixers",
    "Outcome": "linspec.decoding.outcome",
    "POLICIES": "linspec.policies",
    "Piece": "linspec.engine.results",
    "Policy": "linspec.policies",
    "PolicyContext": "linspec.policies",
    "Request": "linspec.decoding.request",
    "RunningSequence": "linspec.decoding.sequence",
    "STATES": "linspec.state.registry",
    "SamplingParams": "linspec.decoding.sampling",
    "SlotStates": "linspec.state.slots",
    "StateError": "linspec.errors",
    "StateOptions": "linspec.state.contract",
    "StateSnapshot": "linspec.state.slots",
    "StepInput": "linspec.decoding.step",
    "Target": "linspec.decoding.target",
    "TokenTree": "linspec.decoding.tree",
    "VERIFIERS": "linspec.verifiers",
    "Verifier": "linspec.verifiers",
    "Want": "linspec.decoding.step",
    "linearize": "linspec.train.linearize",
    "load": "linspec.checkpoints.hub",
    "load_model": "linspec.checkpoints.hub",
    "load_tokenizer": "linspec.checkpoints.hub",
    "option": "linspec.utils.options",
    "pretrain": "linspec.train.pretrain",
    "quantize": "linspec.evaluate.quantize",
    "save_model": "linspec.checkpoints.hub",
    "train_drafter": "linspec.train.drafters",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found: Any = _version()
    elif name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'linspec' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("linspec")
    except PackageNotFoundError:
        # a source tree on the path that was never installed
        return "0+unknown"


_register()
