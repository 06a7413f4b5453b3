"""The verb `chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from linspec.cli.console import explain, guarded, importing, quiet_stdout, say
from linspec.cli.groups import grouped
from linspec.cli.options import Decoding, MaxTokens, Model, Sampling, given
from linspec.errors import InputError, LinspecError

if TYPE_CHECKING:
    from linspec.decoding.sampling import SamplingParams
    from linspec.llm import LLM

COMMANDS = "/reset begins anew, /quit ends (so does Ctrl-D); Ctrl-C stops an answer"


@grouped
@guarded("the chat has ended")
def chat(
    model: Model,
    sampling: Sampling,
    decoding: Decoding,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_tokens: MaxTokens = 512,
) -> None:
    """Talk with a model made for it: a line is a message, the answer is streamed to stdout."""
    with importing():
        from linspec.cli.advice import on_weights
        from linspec.decoding.sampling import SamplingParams
        from linspec.llm import LLM

    params = SamplingParams(max_tokens=max_tokens, **given(asdict(sampling)))
    with quiet_stdout():
        llm = LLM(model, **decoding.to_library())
    llm.encoder.check_template()
    if _at_a_terminal():
        say(COMMANDS)
        if advice := on_weights(llm.model):
            say(advice)
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
