"""Drafts behind long texts: a drafter beside plain decoding of the same model, both behind one reading.

    python -m benchmarks.long_drafts MODEL --drafters self-pages:256 self-pages:1024 --length 32000

Held-out text is read once by plain decoding, and its states are handed on by a prefix store: what is timed is
decoding, in turns, plain first and last. Outputs must be those of plain decoding. Seconds are those of
decoding by the clock; processor time is that of a whole call, with a state that is fetched, in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from linspec.checkpoints.hub import load_tokenizer
from linspec.checkpoints.load_quantized import load_for
from linspec.decoding.sampling import SamplingParams
from linspec.evaluate.perplexity import held_out_documents
from linspec.llm import LLM
from linspec.train.data import end_of_text, tokenize
from linspec.utils.progress import Progress

PLAIN = "plain"


@dataclass
class Mode:
    """A way to decode and what its calls took."""

    llm: LLM
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    rounds: int = 0
    accepted: int = 0
    decision: str = ""

    def run(self, prompt: list[int], tokens: int) -> tuple[int, ...]:
        """Answer once; returns the tokens."""
        began = time.process_time()
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        (answer,) = self.llm.generate([prompt], params)
        self.processor.append(time.process_time() - began)
        self.seconds.append(answer.stats.decode_seconds)
        self.rounds += answer.stats.rounds
        self.accepted += answer.stats.accepted
        self.decision = answer.stats.decision
        return answer.token_ids

    def report(self, plain: Mode) -> dict[str, Any]:
        """Medians, beside those of plain decoding."""
        seconds, processor = (statistics.median(x) for x in (self.seconds, self.processor))
        return {
            "seconds": seconds,
            "processor_s": processor,
            "times_plain": statistics.median(plain.seconds) / seconds,
            "times_plain_processor": statistics.median(plain.processor) / processor,
            "tokens_per_round": 1 + self.accepted / self.rounds,
            "decision": self.decision,
        }


def measure(options: argparse.Namespace, store: str) -> dict[str, dict[str, Any]]:
    """A report for plain decoding and for each drafter."""
    model, tokenizer = load_for(options.model, options.quantize), load_tokenizer(options.model)
    stream = tokenize(
        held_out_documents(options.data), tokenizer, end_of_text(tokenizer, model.config)
    )
    room = (len(stream) - options.length) // max(1, options.texts)
    prompts = [stream[at * room :][: options.length].tolist() for at in range(options.texts)]
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_batch": 1,
        "kv_cache_dtype": options.kv,
        "prefix_cache": "4GB",
        "prefix_store": store,
    }
    modes = {PLAIN: Mode(LLM(model, **common))}
    with Progress("read", len(prompts)) as progress:
        for done, prompt in enumerate(prompts, 1):
            modes[PLAIN].llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0))
            progress.update(done)
    cache = modes[PLAIN].llm.engine.prefix_cache
    assert cache is not None, "it was asked for"
    cache.flush()
    for spec in options.drafters:
        modes[spec] = Mode(LLM(model, drafter=spec, policy=options.policy, **common))
    return _in_turns(modes, prompts, options.tokens, options.rounds)


def _in_turns(
    modes: dict[str, Mode], prompts: Sequence[list[int]], tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    order = [*modes, PLAIN]
    with Progress("drafts", rounds * len(prompts)) as progress:
        for turn in range(rounds):
            for at, prompt in enumerate(prompts):
                outputs = {name: modes[name].run(prompt, tokens) for name in order}
                wrong = [name for name, out in outputs.items() if out != outputs[PLAIN]]
                if wrong:
                    raise SystemExit(f"{', '.join(wrong)} decodes something else on text {at}")
                progress.update(turn * len(prompts) + at + 1)
    return {name: mode.report(modes[PLAIN]) for name, mode in modes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--drafters", nargs="+", default=["self-pages:256"])
    parser.add_argument("--policy", default="auto", help="auto, or a number of drafts")
    parser.add_argument("--length", type=int, default=32_000, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="turns, of which medians are taken")
    parser.add_argument("--kv", default="int8", help="how the cache is kept")
    parser.add_argument("--quantize", type=int, choices=(8, 4), help="bits of the weights")
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="held-out running text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        for name, row in measure(options, store).items():
            print(json.dumps({"drafter": name, "length": options.length, **row}), flush=True)


if __name__ == "__main__":
    main()
