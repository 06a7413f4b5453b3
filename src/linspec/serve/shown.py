"""What the server adds to a stream for those who look at drafts (`stream_options.include_drafts`).

Each chunk has an object `linspec` with the parts of its text, and the last one what the output cost.
"""

from __future__ import annotations

from typing import Any

from linspec.decoding.sequence import Stats
from linspec.engine.results import Generation, Piece


def shown_drafts(piece: Piece, tokenizer: Any) -> dict[str, Any] | None:
    """The object of one piece; None where nobody asked for its drafts.

    parts: text with the name of its drafter ('' for the model's own), in order. tokens, drafted: how many
    tokens are new, and how many of them were drafts. rejected: drafts that were not accepted, as text, with
    the number of accepted ones before them. totals: on the last piece.
    """
    drafts = piece.drafts
    if drafts is None:
        return None
    found: dict[str, Any] = {
        "tokens": len(piece.token_ids),
        "drafted": drafts.drafted,
        "drafter": drafts.drafter,
        "parts": [{"text": text, "drafter": who} for text, who in drafts.parts],
        "rejected": [
            {"behind": each.behind, "text": tokenizer.decode(list(each.tokens))}
            for each in drafts.rejected
        ],
    }
    if piece.done is not None:
        found["totals"] = totals(piece.done)
    return found


def totals(done: Generation) -> dict[str, Any]:
    """What an output cost and brought."""
    stats = done.stats
    plain, bound = plain_speed(stats)
    return {
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_round": stats.tokens_per_round,
        "tokens_per_s": done.tokens_per_s,
        "plain_tokens_per_s": plain,
        "plain_is_lower_bound": bound,
        "decision": stats.decision,
    }


def plain_speed(stats: Stats) -> tuple[float, bool]:
    """Tokens per second that plain decoding had reached, and whether that is only a lower bound.

    Plain decoding has one token a round. Rounds with drafts cost `draft_price` plain ones, as the policy
    measured it last; where it has no price, they count as one, which makes plain rounds dearer than they are.
    """
    price = 1.0 if stats.draft_price is None else stats.draft_price
    plain_rounds = stats.rounds - stats.draft_rounds + price * stats.draft_rounds
    speed = plain_rounds / stats.decode_seconds if stats.decode_seconds else 0.0
    return speed, stats.draft_price is None and stats.draft_rounds > 0
