"""What a caller writes, as token ids: prompts, conversations and words.

encoder = TextEncoder(tokenizer, vocab_size)
encoder.encode("def f(")
encoder.chat([{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from linspec.decoding.request import Request
from linspec.engine.prompts import Prompt, token_ids
from linspec.errors import ConfigError, InputError, WrongType
from linspec.utils.messages import shown

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def check_tokenizer_type(tokenizer: object) -> None:
    """Raise WrongType for what is no tokenizer."""
    if isinstance(tokenizer, type) or not all(
        callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")
    ):
        raise WrongType(
            f"a tokenizer has `encode` and `decode`, got {shown(repr(tokenizer))}; take that of "
            "linspec.load or transformers, or leave it out with a model directory"
        )


class TextEncoder:
    """Token ids inside a vocabulary, of texts, conversations and words."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    def encode(self, prompt: Prompt, *, special: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens around a text if `special`.

        Raises InputError for an empty one or text that is not Unicode.
        """
        if not isinstance(prompt, str):
            ids = token_ids(
                prompt.prompt if isinstance(prompt, Request) else prompt, self.vocab_size
            )
        else:
            ids = self._tokens(prompt, special=special)
            start = self._start if special else []
            # a rendered chat template begins with the token that the tokenizer adds
            if start and ids[: 2 * len(start)] == start * 2:
                ids = ids[len(start) :]
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        return ids

    def chat(
        self, messages: Conversation, *, template: str | None = None, answer: bool = True
    ) -> list[int]:
        """Token ids of a conversation as the model's chat template writes it.

        answer: begin the model's answer. Raises ConfigError without a template, InputError where the
        template refuses the messages.
        """
        # the template has written the special tokens already
        return self.encode(self.render(messages, template=template, answer=answer), special=False)

    def render(
        self,
        messages: Conversation,
        *,
        template: str | None = None,
        answer: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The same as text; a template that knows tools says what `tools` are."""
        check_messages(messages)
        if template is None:
            self.check_template()
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                add_generation_prompt=answer,
                tokenize=False,
                **({"tools": list(tools)} if tools else {}),
            )
        # templates raise errors of their own language
        except Exception as error:
            raise InputError(
                f"the chat template refuses this conversation: {error}; change the messages, or give "
                "another chat_template"
            ) from error
        return text

    def check_template(self) -> None:
        """Raise ConfigError where the tokenizer has no chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "this model has no chat template: it continues texts and knows no turns. Let it continue one "
                "(`linspec generate MODEL --prompt TEXT`, /v1/completions of a server), take a model made "
                "for chat, or, in Python, give chat_template"
            )

    def spelled(self, words: Iterable[str | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """The words as tokens: each as a text may begin with it and, where it differs, behind a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if isinstance(word, str):
                bare = word.lstrip()
                # a word of spaces alone has one form
                forms = (bare, f" {bare}") if bare else (word,)
                found |= dict.fromkeys(tuple(self._tokens(form, special=False)) for form in forms)
            else:
                found[tuple(word)] = None
        found.pop((), None)
        return tuple(found)

    @cached_property
    def _start(self) -> list[int]:
        """The tokens that the tokenizer puts in front of every text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        begin = next((i for i in places if whole[i : i + len(bare)] == bare), 0)
        return list(whole[:begin])

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt is not valid text at character {error.start}: {error.reason}; leave "
                "that character out"
            ) from error
        options = {} if special else {"add_special_tokens": False}
        try:
            # as a list of one: only while it encodes a batch does the library let other threads run
            ids: list[int] = self.tokenizer([text], **options)["input_ids"][0]
        # the tokenizers library raises bare Exception for what its file cannot encode
        except Exception as error:
            raise InputError(
                f"this tokenizer cannot encode the prompt: {error}; write it otherwise, or copy the "
                "tokenizer's files again"
            ) from error
        return token_ids(ids, self.vocab_size) if ids else []


def as_conversations(messages: Any) -> list[Conversation]:
    """The conversations in what a caller gave; one is a list of one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise WrongType(
            "a conversation is a list of messages like {'role': 'user', 'content': 'Hello'}, got "
            f"{shown(repr(messages))}; for a plain text use generate"
        )
    items = list(messages)
    if not items:
        raise InputError("no messages were given")
    return [items] if all(isinstance(item, Mapping) for item in items) else items


def check_messages(messages: Any) -> None:
    """Raise WrongType or InputError unless `messages` are messages with a role and a content."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise WrongType(f"a conversation is a list of messages, got {shown(repr(messages))}")
    if not messages:
        raise InputError("a conversation has no messages; give at least one")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise WrongType(
                "a message is a dict like {'role': 'user', 'content': 'Hello'}, got "
                f"{shown(repr(message))}"
            )
