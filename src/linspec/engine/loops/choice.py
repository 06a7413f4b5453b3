"""Which loop decodes a model, by what was said of `loop` and `policy`.

A policy spec is read by the loop of the model: `commit=…,cache=…` by that of a diffusion model, a number of
draft nodes or the name of a policy by the others.
"""

from __future__ import annotations

import re

from linspec.decoding.protocols import CausalModel
from linspec.engine.loops.base import LOOPS
from linspec.engine.loops.masked_diffusion import AUTO, AUTO_OF_BLOCKS
from linspec.errors import ConfigError, WrongType
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import MODEL_TYPES, loop_of
from linspec.policies import check_policy as check_draft_policy
from linspec.policies.base import Policy
from linspec.utils.messages import shown

_SETTING = re.compile(r"\s*[A-Za-z_][\w-]*\s*=")
_LOOP = str(MODEL_TYPES["diffusion"].loop)


def check_policy(policy: str | int | Policy) -> None:
    """Raise ConfigError for a policy that no loop can read; no model is asked."""
    if _for_loop(policy):
        LOOPS.read(f"{_LOOP}:{policy}")
    else:
        check_draft_policy(policy)


def choose_loop(loop: object, policy: str | int | Policy, model: CausalModel) -> str:
    """The spec of the generation loop; 'auto' and None are that of the type of the model.

    Raises ConfigError for a policy that belongs to another kind of model, or says again what `loop` says.
    """
    if loop is not None and not isinstance(loop, str):
        raise WrongType(f"a loop is a spec of `linspec list`, got {shown(repr(loop))}")
    _check_kind(policy, model)
    if _for_loop(policy):
        if loop not in (None, "auto", _LOOP):
            raise ConfigError(
                f"loop {shown(repr(loop))} and policy {shown(repr(policy))} both say how to decode; write it "
                f"into one of the two, such as policy='commit=threshold:0.9,cache=dual'"
            )
        return f"{_LOOP}:{policy}"
    if loop is not None and loop != "auto":
        return loop
    found = loop_of(model)
    if not isinstance(model, MaskedDiffusion):
        return found
    return f"{found}:{AUTO if model.config.block_length is None else AUTO_OF_BLOCKS}"


def _for_loop(policy: object) -> bool:
    """Whether a policy is settings of a loop: no policy of drafts begins with one."""
    return isinstance(policy, str) and _SETTING.match(policy) is not None


def _check_kind(policy: str | int | Policy, model: CausalModel) -> None:
    diffusion = isinstance(model, MaskedDiffusion)
    if _for_loop(policy) and not diffusion:
        raise ConfigError(
            f"policy {shown(repr(policy))} is read by the loop of a diffusion model, and this is a "
            f"{type(model).__name__}; give 'auto' or a number of draft nodes"
        )
    if diffusion and policy != "auto" and not _for_loop(policy):
        raise ConfigError(
            f"policy {shown(repr(policy))} plans drafts, and a diffusion model takes none; give 'auto', or "
            "the policies of its loop, such as 'commit=threshold:0.9,cache=dual'"
        )
