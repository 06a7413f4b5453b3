"""Conversations, from Python and in the terminal; and what `LLM` takes under other engines' names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import linspec
from linspec.checkpoints.dtype import pick_dtype
from linspec.checkpoints.hub import resolve, save_model
from linspec.cli import app
from linspec.decoding.sampling import SamplingParams
from linspec.engine.results import Piece
from linspec.errors import ConfigError, ContextOverflow, InputError, LinspecError, WrongType
from linspec.llm import LLM

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HELLO = [{"role": "user", "content": "ab cd"}]


def talking_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|eos|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a chat template."""
    place = tmp_path_factory.mktemp("chat") / "talker"
    return save_model(text_model("aug"), talking_tokenizer(), place)


@pytest.fixture(scope="module")
def llm(talker: Path) -> LLM:
    return LLM(talker)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path))


# ---- from Python


def test_a_conversation_is_the_text_of_its_template(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5)
    (found,) = llm.chat(HELLO, params)
    assert found.token_ids == llm.generate("[user]ab cd[assistant]", params)[0].token_ids
    (open_end,) = llm.chat(HELLO, params, add_generation_prompt=False)
    assert open_end.token_ids == llm.generate("[user]ab cd", params)[0].token_ids
    (other,) = llm.chat(HELLO, params, chat_template="<{{ messages[0].content }}>")
    assert other.token_ids == llm.generate("<ab cd>", params)[0].token_ids


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    more = [*HELLO, {"role": "assistant", "content": "e"}, {"role": "user", "content": "the end"}]
    params = SamplingParams(max_tokens=5)
    together = llm.chat([HELLO, more], params)
    alone = [llm.chat(each, params)[0] for each in (HELLO, more)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_a_model_without_chat_template_names_the_way_out() -> None:
    with pytest.raises(ConfigError, match="no chat template.*linspec generate"):
        LLM(model_dir("aug")).chat(HELLO)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hello", WrongType),
        ({"role": "user", "content": "a"}, WrongType),
        ([], InputError),
        ([[]], InputError),
        (["hello"], WrongType),
        ([{"content": "a"}], WrongType),
        ([HELLO, [5]], WrongType),
        ([{"role": "cat", "content": "a"}], InputError),
    ],
)
def test_messages_that_are_none_are_named(llm: LLM, messages: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        llm.chat(messages)


def test_special_tokens_around_a_text_can_be_left_out(llm: LLM) -> None:
    assert llm.encode("ab cd", add_special_tokens=False) == llm.encode("ab cd")
    with pytest.raises(InputError, match="empty"):
        llm.encode("", add_special_tokens=False)


# ---- the names of other engines


@pytest.mark.parametrize("name", ["auto", "float32", "int8", "int4"])
def test_caches_go_by_their_new_name_and_the_old_one(name: str) -> None:
    params = SamplingParams(max_tokens=6)
    old = name if name.startswith("int") else "float"
    new = LLM(model_dir("softmax"), kv_cache_dtype=name).generate("ab cd", params)[0]
    assert new.token_ids == LLM(model_dir("softmax"), kv=old).generate("ab cd", params)[0].token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_dtype": "int3"},
        {"kv_cache_dtype": None},
        {"kv_cache_dtype": "int8", "kv": "float"},
        {"kv_cache_dtype": "float32", "dtype": "bfloat16"},
        {"dtype": "float99"},
        {"dtype": torch.int8},
        {"max_model_len": 1},
        {"max_model_len": 257},
        {"max_model_len": "9"},
    ],
)
def test_settings_of_a_model_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(LinspecError):
        LLM(model_dir("softmax"), **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_precision_by_name(dtype: Any) -> None:
    made = LLM(model_dir("aug"), dtype=dtype, device=torch.device("cpu"))
    assert made.model.dtype == torch.bfloat16
    assert (
        len(made.generate("ab cd", SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    )


def test_auto_is_float32_on_a_cpu_and_the_weights_own_elsewhere(tmp_path: Path) -> None:
    narrow = save_model(text_model("aug"), None, tmp_path / "m", dtype=torch.bfloat16)
    assert pick_dtype("auto", narrow, "cpu") == torch.float32
    assert pick_dtype("auto", narrow, "cuda") == torch.bfloat16
    assert pick_dtype("auto", None, "cuda") == torch.float32
    assert pick_dtype("auto", resolve("smollm2-aug"), "cuda") == torch.bfloat16
    assert pick_dtype("half", None, "cpu") == torch.float16
    assert LLM(model_dir("aug"), dtype="auto", device="auto").model.dtype == torch.float32


def test_max_model_len_bounds_prompt_and_output_together() -> None:
    short = LLM(model_dir("softmax"), max_model_len=8)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    found = short.generate([[5] * 3, [5] * 7], params)
    assert [len(each.token_ids) for each in found] == [5, 1]
    assert {each.finish_reason for each in found} == {"length"}
    free = LLM(model_dir("softmax")).generate([5] * 3, params)[0]
    assert found[0].token_ids == free.token_ids[:5]
    with pytest.raises(ContextOverflow, match=r"8 tokens.*max_model_len is 8"):
        short.generate([5] * 8)
    with pytest.raises(ContextOverflow, match=r"asks for 6 more.*max_model_len is 8"):
        short.generate([5] * 3, SamplingParams(min_tokens=6))


def test_load_gives_the_model_and_its_tokenizer() -> None:
    model, tokenizer = linspec.load(model_dir("aug"))
    assert model.config.vocab_size == len(tokenizer)


# ---- in the terminal


def run(*args: object, lines: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, args)], input=lines)


def test_a_piped_conversation(talker: Path, llm: LLM) -> None:
    result = run(talker, "--max-tokens", 6, lines="ab cd\n\nthe end\n/reset\nab cd\n/quit\nnever\n")
    assert result.exit_code == 0, result.output
    params = SamplingParams(max_tokens=6)
    first = llm.chat(HELLO, params)[0].text
    turns = [
        *HELLO,
        {"role": "assistant", "content": first},
        {"role": "user", "content": "the end"},
    ]
    second = llm.chat(turns, params)[0].text
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.stderr.count("tokens per round") == 3
    assert "begins anew" in result.stderr


def test_the_options_of_a_chat_reach_the_model(talker: Path, llm: LLM) -> None:
    options = ("--system", "abcd", "--temperature", 1, "--min-p", 0.01, "--seed", 3)
    result = run(talker, *options, "--max-tokens", 6, "--drafter", "prompt-lookup", lines="ab cd\n")
    params = SamplingParams(max_tokens=6, temperature=1.0, min_p=0.01, seed=3)
    messages = [{"role": "system", "content": "abcd"}, *HELLO]
    assert result.stdout == llm.chat(messages, params)[0].text + "\n"


def test_a_chat_without_template_names_the_way_out() -> None:
    result = run(model_dir("aug"), lines="ab\n")
    assert result.exit_code == 1 and result.stdout == ""
    assert "no chat template" in result.stderr and "linspec generate" in result.stderr


def test_an_unknown_command_is_no_message(talker: Path) -> None:
    result = run(talker, lines="/rest now\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "unknown command /rest" in result.stderr and "/reset" in result.stderr


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    talker: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, calls = LLM.stream, []

    def interrupted(self: LLM, *args: Any, **options: Any) -> Iterator[Piece]:
        calls.append(args[0])
        for number, piece in enumerate(stream(self, *args, **options)):
            if len(calls) == 1 and number == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(LLM, "stream", interrupted)
    result = run(talker, "--max-tokens", 6, lines="ab cd\nthe end\n")
    assert result.exit_code == 0
    assert "[stopped]" in result.stderr
    # the second message goes on from what was said of the first answer
    said = result.stdout.split("\n")[0]
    before = tiny_tokenizer().decode(calls[1])
    assert before.startswith("[user]ab cd[assistant]") and before.endswith(
        "[user]the end[assistant]"
    )
    assert result.stderr.count("tokens per round") == 1
    assert said


def test_a_message_that_does_not_fit_leaves_the_chat_as_it_was(tmp_path: Path) -> None:
    small = save_model(text_model("softmax", max_positions=40), talking_tokenizer(), tmp_path / "m")
    long = "x" * 60
    result = run(small, "--max-tokens", 3, lines=f"{long}\nab\n")
    assert result.exit_code == 0
    assert "error: prompt 0 has" in result.stderr and "/reset" in result.stderr
    (expected,) = LLM(small).chat([{"role": "user", "content": "ab"}], SamplingParams(max_tokens=3))
    assert result.stdout == expected.text + "\n"


def test_lines_that_are_not_utf8_are_named(talker: Path) -> None:
    result = run(talker, lines=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr


def test_ctrl_c_between_answers_says_how_to_leave(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal:
        closed = False
        answers = iter([KeyboardInterrupt(), "hello\n", ""])

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            found = next(self.answers)
            if isinstance(found, KeyboardInterrupt):
                raise found
            return found

    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(SystemExit) as end:
        app(["chat", str(talker), "--max-tokens", "3"])
    assert not end.value.code
    shown = capsys.readouterr()
    # once at the start, once after Ctrl-C; then the message is answered
    assert shown.err.count("/quit ends") == 2
    hello = [{"role": "user", "content": "hello"}]
    (expected,) = LLM(talker).chat(hello, SamplingParams(max_tokens=3))
    assert shown.out == expected.text + "\n"


def test_a_chat_template_can_be_set_as_in_transformers() -> None:
    """It landed on the wrapper, where the template was looked for, and not where it was used."""
    llm = LLM(model_dir("softmax"))
    llm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    llm.encoder.check_template()
    assert llm.encoder.chat([{"role": "user", "content": "abc"}]) == llm.encode("abc")
