"""Which loop decodes a model, by what was said of `loop` and `policy`.

A policy spec is read by the loop of the model: `commit=…,cache=…` by that of a diffusion model, a number of
draft nodes or the name of a policy by the others.
"""

from __future__ import annotations

import re

from linspec.decoding.protocols import CausalModel
from linspec.diffusion.kinds import kinds
from linspec.engine.loops.base import LOOPS
from linspec.engine.loops.masked_diffusion import AUTO, AUTO_OF_BLOCKS
from linspec.errors import ConfigError, WrongType
from linspec.models.masked_diffusion import MaskedDiffusion
from linspec.models.model_types import MODEL_TYPES, loop_of
from linspec.policies import check_policy as check_draft_policy
from linspec.policies.base import POLICIES, Policy
from linspec.utils.messages import shown
from linspec.utils.options import read_spec

_SETTING = re.compile(r"\s*[A-Za-z_][\w-]*\s*=")
_LOOP = str(MODEL_TYPES["diffusion"].loop)


def check_policy(policy: str | int | Policy, *, diffusion: bool) -> None:
    """Raise ConfigError for a policy that the loop of such a model cannot read; no model is asked."""
    if not diffusion and _for_loop(policy):
        raise ConfigError(
            f"policy {shown(repr(policy))} is read by the loop of a diffusion model, and this is none; give "
            "'auto' or a number of draft nodes"
        )
    if not diffusion:
        check_draft_policy(policy)
    elif _for_loop(policy):
        LOOPS.read(f"{_LOOP}:{policy}")
    elif policy != "auto":
        raise _none_of_a_loop(policy)


def choose_loop(loop: object, policy: str | int | Policy, model: CausalModel) -> str:
    """The spec of the generation loop; 'auto' and None are that of the type of the model.

    Raises ConfigError for a policy that belongs to another kind of model, or says again what `loop` says.
    """
    if loop is not None and not isinstance(loop, str):
        raise WrongType(f"a loop is a spec of `linspec list`, got {shown(repr(loop))}")
    check_policy(policy, diffusion=isinstance(model, MaskedDiffusion))
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


def _none_of_a_loop(policy: object) -> ConfigError:
    """The error for a policy of a diffusion model that is no setting of its loop."""
    known, name = kinds(), read_spec(policy)[0] if isinstance(policy, str) else None
    fault = "is none of a diffusion model"
    if name is None or name.isdecimal() or name in POLICIES:
        fault = "plans drafts, and a diffusion model takes none"
    kind = next((kind for kind, each in known.items() if name in each), None)
    meant = "" if kind is None else f"; did you mean '{kind}={shown(policy)}'?"
    names = "; ".join(f"{kind}={'|'.join(each.names())}" for kind, each in known.items())
    return ConfigError(
        f"policy {shown(repr(policy))} {fault}; give 'auto', or what its loop reads, such as "
        f"'commit=threshold:0.9,cache=dual'. Known: {names}; masks=NUMBER{meant}"
    )
