"""A guest: clients that ask at the same time, and some of which leave in the middle of an answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from linspec import LLM, SamplingParams


@dataclass
class Client:
    """One who asks for `prompt` and leaves after `patience` pieces, or never (None)."""

    prompt: str
    patience: int | None = None
    text: str = ""
    done: bool = False

    def ask(self, llm: LLM, params: SamplingParams) -> None:
        """Read the stream as a server's handler would."""
        stream = llm.stream(self.prompt, params)
        for count, piece in enumerate(stream, 1):
            self.text += piece.text
            self.done = piece.done is not None
            if count == self.patience:
                stream.close()
                return


def serve(llm: LLM, clients: Sequence[Client], params: SamplingParams) -> None:
    """Answer all clients at once, each in a thread of its own; raises what any of them raised."""
    errors: list[BaseException] = []

    def run(client: Client) -> None:
        try:
            client.ask(llm, params)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
