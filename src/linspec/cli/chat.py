"""The verb `chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from linspec.cli.console import (
    configure,
    explain,
    guarded,
    importing,
    place_on,
    quiet_stdout,
    say,
)
from linspec.cli.options import (
    Device,
    DrafterName,
    Kv,
    MaxTokens,
    MinP,
    Model,
    PolicyName,
    Quantize,
    RepetitionPenalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    VerifierName,
)
from linspec.errors import InputError, LinspecError

if TYPE_CHECKING:
    from linspec.decoding.sampling import SamplingParams
    from linspec.llm import LLM

COMMANDS = "/reset begins anew, /quit ends (so does Ctrl-D); Ctrl-C stops an answer"


@guarded("the chat has ended")
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    drafter: DrafterName = "none",
    policy: PolicyName = "auto",
    verifier: VerifierName = "lossless",
    quantize: Quantize = None,
    kv: Kv = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Talk with a model made for it: a line is a message, the answer is streamed to stdout."""
    with importing():
        from linspec.decoding.sampling import SamplingParams
        from linspec.llm import LLM

    params = configure(SamplingParams, locals())
    place = place_on(device, threads)
    with quiet_stdout():
        llm = LLM(
            model,
            drafter=drafter,
            policy=policy,
            verifier=verifier,
            max_batch=1,
            device=place,
            quantize=quantize,
            kv_cache_dtype=kv,
        )
    llm.encoder.check_template()
    if _at_a_terminal():
        say(COMMANDS)
    Chat(llm, params, system).run(_lines())


class Chat:
    """A conversation, and what the lines of its user do to it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params = llm, params
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._begin)

    def run(self, lines: Iterator[str]) -> None:
        """Take lines until they end or one is /quit."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text == "/reset":
                self.messages = list(self._begin)
                say("the conversation begins anew")
            elif text.startswith("/"):
                say(f"unknown command {text.split()[0]}: {COMMANDS}")
            elif text:
                self._turn(text)

    def _turn(self, text: str) -> None:
        """Answer a message; one that fails leaves the conversation as it was."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            self._answer(said)
        except KeyboardInterrupt:
            say("\n[stopped]")
        except LinspecError as error:
            say(f"{explain(error)}; /reset begins anew")
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": "".join(said)})

    def _answer(self, said: list[str]) -> None:
        for piece in self.llm.stream(self.llm.encoder.chat(self.messages), self.params):
            said.append(piece.text)
            print(piece.text, end="", flush=True)
            if piece.done:
                print(flush=True)
                say(piece.done.summary())


def _lines() -> Iterator[str]:
    """Lines of standard input; Ctrl-C between answers leaves the chat running."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("standard input is closed; start the chat in a terminal, or pipe lines in")
    while True:
        if _at_a_terminal():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            say(f"\n{COMMANDS}")
            continue
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input is not UTF-8 text (byte {error.start}); convert it"
            ) from error
        if not line:
            return
        yield line


def _at_a_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
