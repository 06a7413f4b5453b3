"""What an answer of /v1/responses is made of: messages and calls of tools, in the order in which they come.

    items = Items(turn)
    for kind, fields in items.push("<tool_call>{"): ...    # events, without 'response.'
    for kind, fields in items.finish("stop"): ...
    items.output

The same text makes the same items, whether it comes whole or in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from linspec.serve.schemas.responses import OutputCall, OutputMessage, OutputText
from linspec.serve.shapes import new_id
from linspec.serve.tool_calls import ToolTurn

Event = tuple[str, dict[str, Any]]
Status = Literal["completed", "incomplete"]


class Items:
    """The items of an answer; the last one of `output` may be open.

    turn: tells text from calls.
    """

    def __init__(self, turn: ToolTurn) -> None:
        self.output: list[OutputMessage | OutputCall] = []
        self._turn, self._open = turn, False

    def push(self, text: str) -> list[Event]:
        """Events for new text."""
        return [event for delta in self._turn.push(text) for event in self._take(delta)]

    def finish(self, reason: str) -> list[Event]:
        """The last events; `reason` is why the engine stopped."""
        last, _ = self._turn.finish(reason)
        events = [event for delta in last for event in self._take(delta)]
        if not self.output:
            # an answer of no tokens is an empty message
            events += self._begin(_message())
        cut = reason == "length" or (self._turn.calling and isinstance(self.output[-1], OutputCall))
        events += self._end("incomplete" if cut else "completed")
        return events

    def _take(self, delta: dict[str, Any]) -> Iterator[Event]:
        if "content" in delta:
            if not (self._open and isinstance(self.output[-1], OutputMessage)):
                yield from self._begin(_message())
            yield from self._more_text(delta["content"])
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                yield from self._begin(_call(part["id"], part["function"]["name"]))
            yield from self._more_arguments(part["function"]["arguments"])

    def _begin(self, item: OutputMessage | OutputCall) -> Iterator[Event]:
        yield from self._end("completed")
        self.output.append(item)
        self._open = True
        shown = item.model_dump()
        if isinstance(item, OutputCall):
            yield "output_item.added", self._at(item=shown)
            return
        yield "output_item.added", self._at(item={**shown, "content": []})
        yield "content_part.added", self._in_text(part=shown["content"][0])

    def _more_text(self, text: str) -> Iterator[Event]:
        item = self.output[-1]
        assert isinstance(item, OutputMessage)
        item.content[0].text += text
        yield "output_text.delta", self._in_text(delta=text, logprobs=[])

    def _more_arguments(self, text: str) -> Iterator[Event]:
        item = self.output[-1]
        assert isinstance(item, OutputCall)
        item.arguments += text
        yield "function_call_arguments.delta", self._at(item_id=item.id, delta=text)

    def _end(self, status: Status) -> Iterator[Event]:
        """Close the item that is open, if one is."""
        if not self._open:
            return
        item, self._open = self.output[-1], False
        item.status = status
        shown = item.model_dump()
        if isinstance(item, OutputCall):
            told = {"item_id": item.id, "name": item.name, "arguments": item.arguments}
            yield "function_call_arguments.done", self._at(**told)
        else:
            yield "output_text.done", self._in_text(text=item.content[0].text, logprobs=[])
            yield "content_part.done", self._in_text(part=shown["content"][0])
        yield "output_item.done", self._at(item=shown)

    def _at(self, **more: Any) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1, **more}

    def _in_text(self, **more: Any) -> dict[str, Any]:
        return self._at(item_id=self.output[-1].id, content_index=0, **more)


def _message() -> OutputMessage:
    return OutputMessage(id=new_id("msg_"), status="in_progress", content=[OutputText(text="")])


def _call(number: str, name: str) -> OutputCall:
    return OutputCall(
        id=new_id("fc_"), call_id=number, name=name, arguments="", status="in_progress"
    )
