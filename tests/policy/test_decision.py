"""What the policy decided is said in one sentence."""

from __future__ import annotations

import pytest
from checkpoints import model_dir

from linspec.decoding.sampling import SamplingParams
from linspec.decoding.sequence import Stats
from linspec.decoding.tree import chain
from linspec.llm import LLM


def test_the_sentence_has_the_numbers_of_the_rounds() -> None:
    stats = Stats(policy="auto", draft_price=1.25)
    for accepted in (0, 1, 3):
        stats.count(chain(range(5)), range(accepted + 1))
    stats.count(chain([1]), [0])
    assert stats.decision == (
        "auto: drafts in 3 of 4 rounds (mean 4.0), 2.00 tokens a round; "
        "one with drafts costs 1.25 plain ones"
    )
    assert Stats(policy="auto", rounds=9).decision == "auto: no drafts in 9 rounds"
    assert Stats(rounds=9).decision == ""


@pytest.mark.parametrize("policy", ["auto", "specdec-pp", 2])
def test_results_have_it(policy: str | int) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    llm = LLM(model_dir("aug"), drafter="prompt-lookup", policy=policy)
    found = llm.generate("abcabcabcabc", params)[0]
    name = "fixed" if policy == 2 else policy
    assert found.stats.decision.startswith(f"{name}: ")
    assert found.to_json()["decision"] == found.stats.decision
    assert found.summary().endswith(f"\n[{found.stats.decision}]")
    plain = LLM(model_dir("aug")).generate("abcabcabcabc", params)[0]
    assert plain.token_ids == found.token_ids
    assert plain.stats.decision == "" and "decision" not in plain.to_json()
