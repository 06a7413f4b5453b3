"""Confidences made honest: sequential temperature scaling (DSpark, arXiv 2607.05147), and how good they are.

Of N blocks with B places each: which places can be judged (`known`), which drafts were right together with
all before them (`survived`), and the logits of the confidences, [N, B] each.
"""

from __future__ import annotations

import torch

# of a confidence's logits: from sharper to flatter
GRID = tuple(round(0.25 * 1.08**i, 4) for i in range(55))
BINS = 15


def calibration_error(sure: torch.Tensor, right: torch.Tensor, bins: int = BINS) -> float:
    """Expected distance |share right - mean confidence| over bins of confidences, by their size."""
    if not len(sure):
        return 0.0
    bin_of = (sure * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_of, right.double() - sure.double())
    return float(gaps.abs().sum() / len(sure))


def area_under_curve(sure: torch.Tensor, right: torch.Tensor) -> float:
    """How likely a right draft has more confidence than a wrong one; ties count half."""
    values, places = sure.unique(return_inverse=True)
    good = torch.zeros(len(values), dtype=torch.float64).index_add_(0, places, right.double())
    bad = torch.zeros(len(values), dtype=torch.float64).index_add_(0, places, (~right).double())
    pairs = float(good.sum() * bad.sum())
    below = bad.cumsum(0) - bad
    return float((good * (below + 0.5 * bad)).sum()) / pairs if pairs else 0.5


def reached_of(known: torch.Tensor, survived: torch.Tensor) -> torch.Tensor:
    """Places that can be judged and whose drafts before were all right."""
    reached = known.clone()
    reached[:, 1:] &= survived[:, :-1]
    return reached


def conditional(reached: torch.Tensor, survived: torch.Tensor) -> list[float]:
    """How often each place is right once those before it are."""
    shares: list[float] = ((reached & survived).sum(0) / reached.sum(0).clamp(min=1)).tolist()
    return shares


def temperatures(known: torch.Tensor, survived: torch.Tensor, sure: torch.Tensor) -> list[float]:
    """One temperature for each place, left to right: the product of confidences up to it is calibrated."""
    found: list[float] = []
    product = torch.ones(len(sure), dtype=torch.float64)
    for place in range(sure.shape[1]):
        counts, outcome = known[:, place], survived[:, place]
        tries = [product * (sure[:, place].double() / t).sigmoid() for t in GRID]
        errors = [calibration_error(each[counts], outcome[counts]) for each in tries]
        best = min(range(len(GRID)), key=errors.__getitem__)
        found.append(GRID[best])
        product = tries[best]
    return found
