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
    from linspec.decoding.sampling import SamplingParams
    from linspec.decoding.sequence import RunningSequence
    from linspec.decoding.tree import Budget, TokenTree
    from linspec.drafters import DRAFTERS, ChainDrafter, Drafter, DrafterContext
    from linspec.engine.results import Generation, Piece
    from linspec.errors import LinspecError, StateError
    from linspec.evaluate.quantize import quantize
    from linspec.llm import LLM
    from linspec.mixers import MIXERS, Mixer
    from linspec.policies import POLICIES, Policy, PolicyContext
    from linspec.state.contract import LayerState, StateOptions
    from linspec.state.entries import EntrySpec
    from linspec.state.registry import STATES
    from linspec.state.slots import SlotStates, StateSnapshot
    from linspec.train.drafter import train_drafter
    from linspec.train.linearize import linearize
    from linspec.train.pretrain import pretrain
    from linspec.utils.options import option
    from linspec.verifiers import VERIFIERS, Verifier

    __version__: str

__all__ = [
    "DRAFTERS",
    "LLM",
    "MIXERS",
    "POLICIES",
    "STATES",
    "VERIFIERS",
    "Budget",
    "ChainDrafter",
    "Drafter",
    "DrafterContext",
    "EntrySpec",
    "Generation",
    "LayerState",
    "LinspecError",
    "Mixer",
    "Piece",
    "Policy",
    "PolicyContext",
    "RunningSequence",
    "SamplingParams",
    "SlotStates",
    "StateError",
    "StateOptions",
    "StateSnapshot",
    "TokenTree",
    "Verifier",
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
    "DRAFTERS": "linspec.drafters",
    "LLM": "linspec.llm",
    "MIXERS": "linspec.mixers",
    "POLICIES": "linspec.policies",
    "STATES": "linspec.state.registry",
    "VERIFIERS": "linspec.verifiers",
    "Budget": "linspec.decoding.tree",
    "ChainDrafter": "linspec.drafters",
    "Drafter": "linspec.drafters",
    "DrafterContext": "linspec.drafters",
    "EntrySpec": "linspec.state.entries",
    "Generation": "linspec.engine.results",
    "LayerState": "linspec.state.contract",
    "LinspecError": "linspec.errors",
    "Mixer": "linspec.mixers",
    "Piece": "linspec.engine.results",
    "Policy": "linspec.policies",
    "PolicyContext": "linspec.policies",
    "RunningSequence": "linspec.decoding.sequence",
    "SamplingParams": "linspec.decoding.sampling",
    "SlotStates": "linspec.state.slots",
    "StateError": "linspec.errors",
    "StateOptions": "linspec.state.contract",
    "StateSnapshot": "linspec.state.slots",
    "TokenTree": "linspec.decoding.tree",
    "Verifier": "linspec.verifiers",
    "linearize": "linspec.train.linearize",
    "load": "linspec.checkpoints.hub",
    "load_model": "linspec.checkpoints.hub",
    "load_tokenizer": "linspec.checkpoints.hub",
    "option": "linspec.utils.options",
    "pretrain": "linspec.train.pretrain",
    "quantize": "linspec.evaluate.quantize",
    "save_model": "linspec.checkpoints.hub",
    "train_drafter": "linspec.train.drafter",
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
