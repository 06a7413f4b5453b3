"""linspec with a drafter, end to end through its engine: the embedded teacher on held-out text.

Random weights have no drafter that fits them, so other shapes are left out by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.base import Format, Peer, Prompts, Session, timed

if TYPE_CHECKING:
    from linspec.llm import LLM

# what can draft for the embedded teacher without being trained first
_DRAFTERS = ("prompt-lookup", "draft-model")
_TEACHER, _STUDENT = "embedded-softmax", "embedded-aug"
_SKIPPED_TOKENS = 4096
# places of the text where prompts begin
_PLACES = 64


class OwnDrafted(Peer):
    """Weights are quantized as they are loaded: drafters are matched to the model that they know."""

    name = "linspec-drafted"
    packages = ("torch", "transformers", "safetensors")
    formats = tuple(
        Format(name=f"{kind}-{drafter}", bits=bits, weight_bytes=size, cache_bytes=4)
        for kind, bits, size in (("int8", 8, 1.0), ("int4", 4, 0.5 + 2 / 32))
        for drafter in _DRAFTERS
    )

    def convert(self, source: Path, target: Path, form: Format) -> None:
        from linspec.checkpoints.hub import resolve

        if source.resolve() != resolve(_TEACHER).resolve():
            raise ValueError("random weights have no drafter; --accept draws their curve")

    def load(self, folder: Path, form: Format, context: int, rows: int, threads: int) -> Session:
        import torch

        from linspec.llm import LLM

        torch.set_num_threads(threads)
        drafter = form.name.split("-", 1)[1]
        if drafter == "draft-model":
            drafter += f":{_STUDENT}"
        llm = LLM(_TEACHER, drafter=drafter, quantize=form.bits, max_batch=rows)
        return _Session(llm, context)


PEER: Peer = OwnDrafted()


class _Session(Session):
    def __init__(self, llm: LLM, context: int) -> None:
        self.llm = llm
        self.text = _held_out(llm, _PLACES * context)

    def open(self, prompts: Prompts) -> float:
        """Read as many tokens of text instead: drafters live on what text is like."""
        from linspec.decoding.outcome import raise_first
        from linspec.decoding.request import Request
        from linspec.decoding.sampling import SamplingParams

        engine = self.llm.engine
        engine.cancel()
        params = SamplingParams(max_tokens=10**6, ignore_eos=True)
        for prompt in prompts:
            # another prompt is another place
            begin = prompt[0] % _PLACES * len(prompt)
            engine.add(Request(tuple(self.text[begin : begin + len(prompt)]), params))

        def read() -> None:
            for _ in range(-(-len(prompts[0]) // 512)):
                raise_first(engine.step())

        return timed(read)

    def decode(self, tokens: int) -> list[float]:
        """A mean for all tokens: rounds emit several at once."""
        from linspec.decoding.outcome import raise_first

        found: list[Any] = []

        def run() -> None:
            while len(found) < tokens:
                step = self.llm.engine.step()
                raise_first(step)
                for emitted in step:
                    found.extend(emitted.tokens)

        seconds = timed(run)
        return [seconds / len(found)] * tokens


def _held_out(llm: LLM, count: int) -> list[int]:
    from linspec.evaluate.perplexity import held_out_documents

    ids: list[int] = []
    for document in held_out_documents(["stdlib"]):
        ids += llm.encode(document)
        if len(ids) >= count + _SKIPPED_TOKENS:
            break
    # a file begins with its licence, which is not what most of it looks like
    return ids[_SKIPPED_TOKENS : _SKIPPED_TOKENS + count]
