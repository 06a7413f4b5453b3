"""What papers claim of single policies of masked diffusion, each by one command beside what it is held to.

    python -m benchmarks.diffusion_claims dkv --folder claims
    python -m benchmarks.diffusion_claims specdiff --target embedded-aug --folder claims

Ways take turns as in `benchmarks.diffusion`, but speed is by the processor's time of one thread, which bears
other work beside it. What was measured is kept in the folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.diffusion import Cells, Way, measure, rows, table, ways_of
from benchmarks.diffusion_lines import BREAK, Lines
from benchmarks.diffusion_watched import ends_of_lines, settled_after
from benchmarks.diffusion_work import Tasks, Text, Work
from linspec.bench.machine import machine
from linspec.engine.loops.masked_diffusion import AUTO
from linspec.errors import ConfigError
from linspec.llm import LLM
from linspec.models.masked_diffusion import MaskedDiffusion

DRAFTER = "embedded-diffusion"
# tokens of prompts, and of long ones; positions of a block of a block-diffusion model
GIVEN, LONG, BLOCK = 96, 512, 32


@dataclass(frozen=True, slots=True)
class Claim:
    """about: for --help. work: what is answered. ways: how, the reference first."""

    about: str
    work: Callable[[argparse.Namespace], Work]
    ways: Callable[[Work, argparse.Namespace], list[Way]]


def _policies(*specs: str) -> Callable[[Work, argparse.Namespace], list[Way]]:
    plans = [f"masked-diffusion:{spec}" for spec in specs]
    return lambda work, given: ways_of(work, plans, None)


def _text(given: argparse.Namespace) -> Work:
    return Text(DRAFTER, given.prompts, given.tokens, None, GIVEN)


def _long_text(given: argparse.Namespace) -> Work:
    return Text(DRAFTER, given.prompts, given.tokens, None, LONG)


def _lines(given: argparse.Namespace) -> Work:
    return Lines(given.folder, given.prompts, given.steps)


def _drafted(work: Work, given: argparse.Namespace) -> list[Way]:
    """The target alone, and with trees of several sizes."""

    def way(name: str, nodes: int) -> Way:
        drafter = f"specdiff:model={DRAFTER}"
        return Way(
            name,
            lambda: LLM(given.target, drafter=drafter, policy=nodes, max_batch=1),
            work.prompts,
        )

    plain = Way(given.target, lambda: LLM(given.target, max_batch=1), work.prompts)
    return [plain, *(way(f"{given.target}, {nodes} nodes", nodes) for nodes in (4, 8, 16))]


def _in_blocks(given: argparse.Namespace) -> Work:
    """A model of blocks whose weights never learned that: it writes noise, at the cost of text."""
    work = Text(DRAFTER, given.prompts, given.tokens, None, GIVEN)
    config = replace(work.model.config, block_length=BLOCK, logit_shift=0)
    made = MaskedDiffusion(config).eval()
    made.load_state_dict(work.model.state_dict())
    work.model = made
    return work


def _one_call_or_layers(work: Work, given: argparse.Namespace) -> list[Way]:
    """Each cache in one call, and the cache of blocks layer by layer."""
    specs = ("commit=static,cache=blocks", "commit=static,cache=none")
    one, other = ways_of(work, [f"masked-diffusion:{each}" for each in specs], None)

    def layered() -> LLM:
        # a model of its own: it stays without its one-call form
        model = _in_blocks(given).model
        llm = LLM(model, tokenizer=work.tokenizer, loop=one.name, max_batch=1)
        llm.model.native = None
        return llm

    return [Way("layer by layer", layered, work.prompts), one, other]


def _tasks(given: argparse.Namespace) -> Work:
    return Tasks(given.folder, given.prompts, given.steps)


_FREEDAVE = ("", ",verify=freedave:2", ",verify=freedave:4", ",verify=freedave:drafts=2+least=0.6")
_AUTO = "at least .98 times the speed without drafts, for the same tokens"
# where drafts pay least and most
_AUTO_BASES = {
    "auto-blocks": (_text, "block=fixed:8,commit=static,cache=dual"),
    "auto-wide": (_text, "block=fixed:32,commit=static,cache=dual"),
    "auto-default": (_text, AUTO),
    "auto-whole": (_text, "block=fixed:none,commit=static"),
    "auto-tasks": (_tasks, "block=fixed:none,commit=static"),
    "auto-tasks-blocks": (_tasks, "block=fixed:3,commit=static,cache=dual"),
}
# as published for models of billions of parameters, whose logits have another scale, and of the least gap
_GAPS = (
    "early=7.5",
    "early=7.5+over=least",
    *(f"early={n}+middle={n}+late={n}+over=least" for n in (5, 2.5, 1)),
)
_WINDOW = "block=sliding,commit=threshold:0.9"
CLAIMS = {
    "ada-block": Claim(
        "blocks end with lines, in at most 1.1 times the forwards of the best fixed length",
        _lines,
        _policies(
            *(f"block=fixed:{n},commit=threshold:0.9,cache=dual" for n in (8, 4, 16, 32)),
            f"block=ada-block:delimiters={BREAK}+length=8,commit=threshold:0.9,cache=dual",
        ),
    ),
    "foreseen-end": Claim(
        "half of the positions at most where answers fill a quarter of the masks, 98% identical",
        _lines,
        _policies("commit=static", "commit=static,stop=foreseen-end"),
    ),
    "foreseen-end-threshold": Claim(
        "the same beside a commit policy that decides several tokens",
        _lines,
        _policies("commit=threshold:0.9", "commit=threshold:0.9,stop=foreseen-end"),
    ),
    "prophet": Claim(
        "at most .6 of the forwards, 97% identical",
        _lines,
        _policies("commit=static", *(f"commit=static,stop=prophet:{each}" for each in _GAPS)),
    ),
    "dkv": Claim(
        "behind a prompt of 512 tokens at most .7 of the time without a cache",
        _long_text,
        _policies(
            "commit=static",
            "commit=static,cache=dkv",
            "commit=static,cache=dkv:prompt=frozen",
            "commit=static,cache=dual",
        ),
    ),
    "elastic": Claim(
        "less than a refresh in each eighth forward computes, with as many tokens of no cache",
        _text,
        _policies(
            _WINDOW,
            f"{_WINDOW},cache=dual:8",
            *(f"{_WINDOW},cache=elastic:{gamma}" for gamma in (0.7, 0.8, 0.9, 0.95)),
        ),
    ),
    "freedave": Claim(
        "1.8 times fewer forwards and 1.2 times the speed, for the same tokens",
        _text,
        _policies(*(f"block=fixed:8,commit=static,cache=dual{each}" for each in _FREEDAVE)),
    ),
    "blocks": Claim(
        "a step of a block-diffusion model in one call takes less time than layer by layer",
        _in_blocks,
        _one_call_or_layers,
    ),
    **{
        name: Claim(_AUTO, work, _policies(base, f"{base},verify=auto"))
        for name, (work, base) in _AUTO_BASES.items()
    },
    "specdiff": Claim(
        "2 tokens a round or more, for the tokens of the target alone",
        _text,
        _drafted,
    ),
}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    text = "\n".join(f"  {name}: {claim.about}" for name, claim in CLAIMS.items())
    about = argparse.ArgumentParser(
        description=f"{(__doc__ or '').partition(chr(10))[0]}\n\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about.add_argument("claim", choices=tuple(CLAIMS))
    about.add_argument("--folder", type=Path, required=True, help="of what was measured")
    about.add_argument("--target", default="embedded-softmax", help="of specdiff")
    about.add_argument("--prompts", type=int, default=24)
    about.add_argument("--tokens", type=int, default=64, help="of a text")
    about.add_argument(
        "--steps", type=int, default=3000, help="of training the model of lines or of tasks"
    )
    about.add_argument("--rounds", type=int, default=3)
    about.add_argument("--json", action="store_true", help="a line of JSON for each way")
    return about.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    given = _arguments(words)
    if given.rounds < 1:
        raise ConfigError(f"rounds must be 1 or more, got {given.rounds}")
    torch.set_num_threads(1)
    claim = CLAIMS[given.claim]
    work = claim.work(given)
    ways = claim.ways(work, given)
    settings = {name: getattr(given, name) for name in ("prompts", "tokens", "steps", "target")}
    cells = Cells(given.folder / given.claim / Path(given.target).name, settings)
    measure(work, ways, cells, given.rounds, time.process_time)
    found = list(rows(work, ways, cells))
    for each in found if given.claim == "specdiff" else ():
        # positions are counted of masked diffusion alone
        each.pop("computed", None)
    for each in found if given.json else ():
        print(json.dumps(each | {"claim": given.claim, "machine": machine()}))
    if not given.json:
        print(f"{given.claim}: wanted is {claim.about}\n\n{table(found, work.quality, work.falls)}")
    if isinstance(work, Lines) and given.claim == "ada-block" and not given.json:
        for way in ways:
            ending, count = ends_of_lines(work, way)
            print(f"{way.name}: {ending} of {count} blocks end with a line")
    if given.claim == "prophet" and not given.json:
        settled, forwards = settled_after(work, ways[0])
        print(f"{ways[0].name}: answers change until forward {settled:.1f} of {forwards:.1f}")


if __name__ == "__main__":
    main()
