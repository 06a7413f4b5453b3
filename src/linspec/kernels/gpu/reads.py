"""What kernels of a device compute of a mixer's step, from what its plan says."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.errors import ConfigError
from linspec.kernels.gpu.fading import MAPS, Fading
from linspec.kernels.gpu.reach import Reach
from linspec.kernels.step_plan import AttentionPlan, SummedPlan
from linspec.utils.messages import did_you_mean, shown

# of single rows: a softmax of the scores s, relu(s)², or s
WEIGHTS = ("softmax", "relu2", "products")


def check_weights(name: str) -> None:
    """Raises ConfigError for weights that no kernel knows."""
    if name not in WEIGHTS:
        raise ConfigError(
            f"weights must be one of {', '.join(WEIGHTS)}, got {shown(repr(name))}"
            f"{did_you_mean(name, WEIGHTS)}"
        )


@dataclass(frozen=True, slots=True)
class ExactRead:
    """Rows that nodes weigh one by one: `weights`, one of WEIGHTS, of queries and keys; unit: of length 1.
    sinks: first rows of the text, which all see."""

    weights: str
    reach: Reach
    unit: bool = False
    sinks: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRead:
    """The two parts of what nodes read; the mixer makes an output of these."""

    exact: ExactRead | None
    summed: Fading | None


def device_read(plan: AttentionPlan | SummedPlan | None) -> DeviceRead | None:
    """What kernels of a device compute of a plan; None where they do not know a part of it."""
    if plan is None or plan.bias is not None:
        return None
    return _of_sums(plan) if isinstance(plan, SummedPlan) else _of_rows(plan)


def _of_rows(plan: AttentionPlan) -> DeviceRead | None:
    if plan.chosen or plan.budget or plan.sees_far or plan.chunk:
        return None
    weights = "relu2" if plan.squared_relu else "softmax"
    exact = ExactRead(weights, Reach(plan.window, plan.group, plan.span), sinks=plan.sinks)
    if plan.sinks:
        # they lie where others have their sums
        return DeviceRead(exact, None)
    # rows of relu2 are of unit keys already
    map_ = "same" if plan.squared_relu else "unit"
    summed = Fading(map=map_, group=plan.group, span=plan.span) if plan.group else None
    return DeviceRead(exact, summed)


def _of_sums(plan: SummedPlan) -> DeviceRead | None:
    map_ = "same" if plan.mapped else plan.map
    # products are of features, which kernels make for the sums alone
    made_late = plan.exact == "products" and map_ != "same"
    if plan.kept or map_ not in MAPS or plan.exact not in ("none", *WEIGHTS) or made_late:
        return None
    exact = None
    if plan.exact != "none":
        exact = ExactRead(plan.exact, Reach(0, plan.group, plan.span), plan.exact == "relu2")
    gates = 0
    if plan.fades:
        assert plan.gate_bias is not None, "what fades has gates"
        gates = plan.gate_bias.shape[1] - plan.delta
    # without weights of their own all rows are read through what fades
    group = 0 if plan.fades and exact is None else plan.group
    summed = Fading(gates=gates, delta=plan.delta, map=map_, group=group, span=plan.span)
    return DeviceRead(exact, summed)
