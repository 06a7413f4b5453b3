"""Losses in pieces: their numbers and all their gradients are those of whole logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from linspec.errors import TrainingError
from linspec.models.head import CappedLinear
from linspec.train import pieces
from linspec.train.pieces import (
    IGNORED,
    Entropy,
    Labels,
    Output,
    Teacher,
    kl_of_states,
    likeliest,
    loss_in_pieces,
)


@dataclass
class Case:
    """Random tokens with all terms; `whole` is the oracle."""

    states: torch.Tensor
    output: Output
    labels: Labels
    teacher: Teacher
    entropy: Entropy

    @classmethod
    def of(
        cls,
        seed: int = 0,
        tokens: int = 7,
        vocab: int = 11,
        width: int = 5,
        bias: bool = True,
        cap: float = 0.0,
        soft: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        def weights() -> torch.Tensor:
            return drawn(tokens).abs()

        own = Output(drawn(vocab, width), drawn(vocab) if bias else None, cap)
        known = Output(drawn(vocab, width + 2), drawn(vocab) if bias else None, cap)
        ids = torch.randint(vocab, (tokens,), generator=generator)
        ids[:: max(2, tokens // 2)] = IGNORED
        return cls(
            drawn(tokens, width),
            own,
            Labels(ids, weights()),
            Teacher(drawn(tokens, width + 2), known, weights(), soft),
            Entropy(weights(), 0.7),
        )

    @property
    def trained(self) -> list[torch.Tensor]:
        found = (self.states, self.output.weight, self.output.bias)
        return [x for x in found if x is not None]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(loss, self.trained, allow_unused=True))

    def in_pieces(self, piece: int | None) -> torch.Tensor:
        terms = self.labels, self.teacher, self.entropy
        return loss_in_pieces(self.states, self.output, *terms, piece=piece)

    def whole(self) -> torch.Tensor:
        log_q = logits_of(self.states, self.output)
        hard = F.cross_entropy(log_q, self.labels.ids, reduction="none", ignore_index=IGNORED)
        p = logits_of(self.teacher.states, self.teacher.output).softmax(-1)
        known = torch.zeros_like(p) if self.teacher.soft else p.log()
        kl = (p * (known - log_q.log_softmax(-1))).sum(-1)
        sure = (log_q / self.entropy.temperature).softmax(-1)
        doubt = -(sure * sure.log()).sum(-1)
        assert self.labels.weights is not None and self.teacher.weights is not None
        nats = hard * self.labels.weights + kl * self.teacher.weights + doubt * self.entropy.weights
        return nats.sum()


def logits_of(states: torch.Tensor, output: Output) -> torch.Tensor:
    logits = F.linear(states, output.weight, output.bias)
    return output.cap * torch.tanh(logits / output.cap) if output.cap else logits


def learning(case: Case) -> Case:
    for x in case.trained:
        x.requires_grad_(True)
    return case


@pytest.mark.parametrize("piece", [1, 3, 7, 100, None])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("soft", [False, True])
def test_pieces_of_any_size_are_the_whole(piece: int | None, cap: float, soft: bool) -> None:
    case = learning(Case.of(cap=cap, soft=soft))
    whole, found = case.whole(), case.in_pieces(piece)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    pairs = zip(case.gradients(found), case.gradients(whole), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=settings().max_examples * 2, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 12),
    vocab=st.integers(1, 20),
    width=st.integers(1, 6),
    bias=st.booleans(),
    cap=st.sampled_from([0.0, 0.8, 30.0]),
    piece=st.integers(1, 14),
)
def test_any_shape_is_the_whole(
    seed: int, tokens: int, vocab: int, width: int, bias: bool, cap: float, piece: int
) -> None:
    case = learning(Case.of(seed, tokens, vocab, width, bias, cap))
    whole, found = case.whole(), case.in_pieces(piece)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    pairs = zip(case.gradients(found), case.gradients(whole), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_its_gradient_is_that_of_its_numbers() -> None:
    case = learning(Case.of(cap=2.0))
    assert torch.autograd.gradcheck(lambda *_: case.in_pieces(3), case.trained)


def test_means_leave_out_ignored_labels() -> None:
    case = Case.of(bias=False)
    found = loss_in_pieces(case.states, case.output, Labels(case.labels.ids), piece=2)
    wanted = F.cross_entropy(logits_of(case.states, case.output), case.labels.ids)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_labels_that_are_all_ignored_cost_nothing() -> None:
    case = learning(Case.of())
    ids = torch.full_like(case.labels.ids, IGNORED)
    loss = loss_in_pieces(case.states, case.output, Labels(ids))
    assert float(loss.detach()) == 0
    assert all(g is not None and not g.any() for g in case.gradients(loss))


def test_no_tokens_cost_nothing() -> None:
    case = learning(Case.of(tokens=4))
    none = case.labels.ids[:0].view(2, 0)
    loss = loss_in_pieces(case.states[:0].view(2, 0, 5), case.output, Labels(none))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    assert float(loss.detach()) == 0


def test_an_output_layer_used_twice_gets_both_gradients() -> None:
    case, other = learning(Case.of()), Case.of(seed=1)
    weight = case.output.weight
    twice = case.in_pieces(2) + 3 * loss_in_pieces(
        other.states @ weight[:5], case.output, other.labels, piece=3
    )
    log_q = logits_of(other.states @ weight[:5], case.output)
    assert other.labels.weights is not None
    hard = F.cross_entropy(log_q, other.labels.ids, reduction="none", ignore_index=IGNORED)
    whole = case.whole() + 3 * (hard * other.labels.weights).sum()
    for got, wanted in zip(case.gradients(twice), case.gradients(whole), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_kept_gives_its_gradients_again() -> None:
    case = learning(Case.of())
    loss = case.in_pieces(2)
    first = torch.autograd.grad(loss, case.trained, retain_graph=True)
    again = torch.autograd.grad(2 * loss, case.trained)
    for once, twice in zip(first, again, strict=True):
        torch.testing.assert_close(2 * once, twice)


@pytest.mark.parametrize("trained", ["states", "weight"])
def test_nothing_is_computed_for_what_is_frozen(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, kept = Case.of(bias=False), list[tuple[bool, ...]]()
    {"states": case.states, "weight": case.output.weight}[trained].requires_grad_(True)
    plain = pieces._add

    def spy(slopes: list[torch.Tensor | None], *rest: object) -> None:
        kept.append(tuple(slope is not None for slope in slopes))
        plain(slopes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces, "_add", spy)
    case.in_pieces(4).backward()  # type: ignore[no-untyped-call]  # torch's
    assert set(kept) == {(trained == "states", trained == "weight", False)}
    kept.clear()
    with torch.no_grad():
        assert not case.in_pieces(4).requires_grad
    assert not kept


def test_logits_are_never_whole() -> None:
    """No tensor of a step is larger than a piece, nor than the weights."""
    tokens, vocab, width, piece = 64, 1000, 8, 4
    case = learning(Case.of(tokens=tokens, vocab=vocab, width=width, dtype=torch.float32))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(found):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return found

    with Watch():
        case.in_pieces(piece).backward()  # type: ignore[no-untyped-call]  # torch's
    assert largest == vocab * (width + 2) < tokens * vocab


def test_autocast_rounds_products_and_adds_up_in_float32() -> None:
    case = learning(Case.of(tokens=64, vocab=50, width=16, dtype=torch.float32))
    exact = case.gradients(case.whole())
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = case.in_pieces(8), case.whole()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2)
    triples = zip(case.gradients(found), case.gradients(plain), exact, strict=True)
    for got, rounded, wanted in triples:
        assert got is not None and rounded is not None and wanted is not None
        assert got.dtype == torch.float32
        assert float((got - wanted).norm()) <= 1.5 * float((rounded - wanted).norm())


def test_a_teacher_near_its_student_is_compared_in_float32_under_autocast() -> None:
    given = torch.randn(6, 16)
    head, other = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)
    plain = kl_of_states(given, given, head, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_of_states(given, given, head, other), plain)


def test_an_output_layer_is_read_from_its_module() -> None:
    capped = CappedLinear(4, 6, bias=True)
    capped.cap = 3.0
    output = Output.of(capped)
    assert output.weight is capped.weight and output.bias is capped.bias and output.cap == 3.0


def test_an_inference_form_is_refused() -> None:
    hooked = nn.Linear(4, 6)
    hooked.register_forward_hook(lambda *_: None)
    for head in (nn.Identity(), hooked):
        with pytest.raises(TrainingError, match="load the model again"):
            Output.of(head)


def test_numbers_for_other_tokens_are_refused() -> None:
    case = Case.of()
    with pytest.raises(TrainingError, match=r"tokens \[7\] was given numbers for \[6\]"):
        loss_in_pieces(case.states, case.output, Labels(case.labels.ids[1:]))


def test_the_likeliest_tokens_are_found_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states = nn.Linear(8, 50), torch.randn(3, 7, 8)
    monkeypatch.setattr(pieces, "PIECE_LOGITS", 200)
    assert torch.equal(likeliest(states, head, 50), head(states).argmax(-1))
