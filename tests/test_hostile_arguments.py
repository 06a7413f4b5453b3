"""Arguments that no verb can use: each ends in one line that names the rule, and with 1 or 2.

An `unexpected error` line, a traceback or a message that is nothing but the system's own is a failure here.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import model_dir
from typer.testing import CliRunner, Result

from linspec.cli import app
from linspec.cli.console import explain, keep_traceback

DIGITS = "9" * 5000
# what a message must not be alone: the words of the operating system
BARE = [os.strerror(number) for number in range(1, 40)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LINSPEC_DEBUG", raising=False)
    monkeypatch.delenv("LINSPEC_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*args: object) -> Result:
    before = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [str(a) for a in args])
    finally:
        torch.set_num_threads(before)


def only_line(result: Result) -> str:
    """The one line that explains a failure."""
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output and "unexpected error" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert len(lines[0]) < 1200
    assert lines[0].rpartition(": ")[2] not in BARE
    return lines[0]


def softmax() -> Path:
    return model_dir("softmax")


def files(folder: Path) -> dict[str, Path]:
    """Bad data of every kind, and directories that are no models."""
    (folder / "half.jsonl").write_text('{"text": "' + "\\ud800" + '"}\n')
    (folder / "torn.jsonl").write_text('{"text": \n')
    (folder / "digits.jsonl").write_text(f'{{"text": {DIGITS}}}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "file.txt").write_text("some text\n")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "dataset_info.json").write_text("[]")
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


GENERATE = ("generate", "{model}", "--prompt", "x")
LINEARIZE = ("linearize", "{model}", "--out", "out", "--data", "{file}")
DRAFTER = ("train-drafter", "{model}", "--data", "{file}")
ARGUMENTS = [
    # numbers that are none, or break a rule
    ((*LINEARIZE, "--lr", "nan"), "--lr must be finite and above 0, got nan"),
    ((*LINEARIZE, "--lr", "-1"), "--lr must be finite and above 0, got -1.0"),
    ((*LINEARIZE, "--lr", "inf"), "--lr must be finite"),
    ((*LINEARIZE, "--seed", "-1"), "--seed must be 0 or more, got -1"),
    ((*LINEARIZE, "--exact-tokens", "0"), "--exact-tokens must be 1 or more, got 0"),
    ((*LINEARIZE, "--group", "0"), "--group must be 1 or more"),
    ((*LINEARIZE, "--group", DIGITS), "--group"),
    ((*LINEARIZE, "--span", DIGITS), "--span takes numbers"),
    ((*LINEARIZE, "--group", 2**20, "--span", 2**30), "span must be at most"),
    ((*LINEARIZE, "--taps", "-1"), "--taps must be 0 or more"),
    ((*LINEARIZE, "--kl-weight", "nan"), "--kl-weight must be finite"),
    (
        (*LINEARIZE, "--recall-share", "2"),
        "--recall-share must be finite and 0 or more and at most 1",
    ),
    ((*LINEARIZE, "--transfer-share", "nan"), "--transfer-share must be finite"),
    ((*DRAFTER, "--lr", "nan"), "--lr must be finite"),
    ((*DRAFTER, "--kind", "medusa:heads=0"), "heads must be 1 or more"),
    ((*DRAFTER, "--seed", "-1"), "--seed must be 0 or more"),
    (("pretrain", "--out", "out", "--steps", "-1"), "--steps must be 1 or more"),
    ((*GENERATE, "--seed", "-1"), "--seed must be 0 or more, got -1"),
    ((*GENERATE, "--seed", DIGITS), "--seed"),
    ((*GENERATE, "--max-tokens", "0"), "--max-tokens must be 1 or more"),
    ((*GENERATE, "--temperature", "nan"), "--temperature must be finite"),
    ((*GENERATE, "--top-p", "nan"), "--top-p must be finite and above 0"),
    ((*GENERATE, "--logprobs", "-1"), "--logprobs must be 0 or more"),
    ((*GENERATE, "--drafter", "prompt-lookup", "--policy", DIGITS), "unknown policy"),
    ((*GENERATE, "--drafter", "prompt-lookup", "--policy", "٣x"), "unknown policy"),
    ((*GENERATE, "--threads", "10000"), "threads must be 1 or more and at most"),
    ((*GENERATE, "--threads", "99999999999"), "--threads must be at most"),
    ((*GENERATE, "--threads", "0"), "--threads must be 1 or more"),
    ((*GENERATE, "--quantize", "3"), "8 or 4 bits"),
    (
        ("quantize", "{model}", "--out", "out", "--limit-bytes", "0"),
        "--limit-bytes must be 1 or more",
    ),
    (("quantize", "{model}", "--out", "out", "--bits", "7"), "8 or 4 bits"),
    (("eval", "{model}", "--context", "0"), "--context must be 1 or more"),
    (("eval", "recall", "{model}", "--lengths", DIGITS), "--lengths takes numbers"),
    (("verify", "{model}", "--prompts", "0"), "--prompts must be 1 or more"),
    (("verify", "{model}", "--seed", "-1"), "--seed must be 0 or more"),
    (("bench", "{model}", "--repeats", "0"), "--repeats must be 1 or more"),
    (("bench", "{model}", "--contexts", "0x10"), "--contexts takes numbers"),
    (("bench", "load", "{model}", "--tokens", "0"), "--tokens must be 1 or more"),
    # places
    (("linearize", "{model}", "--out", "."), "--out must name a new directory"),
    (("linearize", "{model}", "--out", ""), "--out must name a new directory"),
    (("linearize", "{model}", "--out", ".."), "--out must name a new directory"),
    (("quantize", "{model}", "--out", "."), "--out must name a new directory"),
    (("train-drafter", "{model}", "--out", ""), "--out must name a new directory"),
    (("pretrain", "--out", "/"), "--out must name a new directory"),
    ((*DRAFTER[:2], "--prompts", "none", "--out", "out"), "cannot read prompts: none"),
    ((*DRAFTER[:2], "--prompts", "", "--out", "out"), "cannot read prompts"),
    ((*DRAFTER[:2], "--answer-tokens", 0), "--answer-tokens must be 1 or more, got 0"),
    ((*DRAFTER[:2], "--temperature", "nan"), "--temperature"),
    (("eval", "{model}", "--data", ""), "a data source has no name"),
    ((*LINEARIZE[:4], "--context", 32, "--data", ""), "a data source has no name"),
    (("eval", "{model}", "--data", "sdlib"), "did you mean 'stdlib'?"),
    (("eval", "{model}", "--data", "{half}"), "is not Unicode text"),
    (("eval", "{model}", "--data", "{torn}"), "is not JSON"),
    (("eval", "{model}", "--data", "{digits}"), "is not JSON"),
    (("eval", "{model}", "--data", "{deep}"), "is not JSON"),
    (("eval", "{model}", "--data", "{dataset}"), "no sound datasets directory"),
    (("eval", "{model}", "--data", "{loop}"), "does not exist"),
    (("eval", "{model}", "--data", "x" * 300), "longer than the system allows"),
    (("eval", "{model}", "--data", "a\0b"), "does not exist"),
    (("eval", "{file}"), "is not a directory"),
    (("eval", "x" * 300), "longer than the system allows"),
    (
        ("generate", "{model}", "--prompt-file", "{dataset}"),
        "it is a directory where a file is needed",
    ),
    (("generate", "{model}", "--prompt-file", "nowhere"), "there is no such file"),
    # names
    (("eval", "embeded-aug"), "did you mean 'embedded-aug'?"),
    ((*LINEARIZE, "--mixer", "agu"), "did you mean 'aug'?"),
    ((*LINEARIZE, "--kernel", "sofmax"), "did you mean 'softmax'?"),
    ((*GENERATE, "--drafter", "prompt-lokup"), "did you mean 'prompt-lookup'?"),
    ((*GENERATE, "--verifier", "losless"), "did you mean 'lossless'?"),
    ((*GENERATE, "--drafter", "prompt-lookup", "--policy", "aut"), "did you mean 'auto'?"),
    ((*GENERATE, "--device", "cdua"), "did you mean 'cuda'?"),
    ((*GENERATE, "--kv-cache-dtype", "itn8"), "did you mean 'int8'?"),
    ((*GENERATE, "--max-token", "3"), "did you mean '--max-tokens'?"),
    (("genrate", "x"), "did you mean 'generate'?"),
    (("evl", "{model}"), "no such verb: evl; did you mean 'eval'?"),
    (("bnech", "{model}"), "did you mean 'bench'?"),
    (("eval", "perplexty", "{model}"), "did you mean eval 'perplexity'?"),
    (("bench", "kernel", "{model}"), "did you mean bench 'kernels'?"),
    # two names of one thing, and what contradicts another option
    (
        (*GENERATE, "--kv", "int8", "--kv-cache-dtype", "float32"),
        "--kv and --kv-cache-dtype are two names of one option",
    ),
    (
        (*GENERATE, "--kv-cache-dtype=int8", "--kv=int8"),
        "--kv and --kv-cache-dtype are two names of one option",
    ),
    (
        (*LINEARIZE, "--rows", 64, "--exact-tokens", 128),
        "--rows and --exact-tokens are two names of one option",
    ),
    (
        (*LINEARIZE, "--span", 2, "--exact-tokens", 128),
        "exact_tokens 128 lets a search choose the spans, and span gives them",
    ),
    ((*LINEARIZE, "--span", 2, "--rows", 128), "leave out one of the two"),
    ((*LINEARIZE, "--mixer", "aug:span=2", "--exact-tokens", 128), "and the mixer gives them"),
    ((*LINEARIZE, "--exact-heads", 1, "--span", 2), "or leave out --exact-heads"),
    # naming a default looked like not naming it
    ((*LINEARIZE, "--exact-heads", 1, "--mixer", "aug"), "or leave out --exact-heads"),
    ((*LINEARIZE, "--exact-heads", 1, "--softmax-layers", 0), "or leave out --exact-heads"),
    ((*LINEARIZE, "--exact-heads", 1, "--mixer-seed", 0), "or leave out --exact-heads"),
    ((*LINEARIZE, "--exact-heads", 1, "--keep-softmax", ""), "or leave out --exact-heads"),
    ((*GENERATE, "--logprobs", 3), "--logprobs are printed with --json only"),
    ((*GENERATE, "--drafter", "medusa"), "--out DIR` and name its directory: medusa:DIR"),
    ((*LINEARIZE, "--exact-heads", 1, "--lora-rank", 2), "or leave out --exact-heads"),
    ((*LINEARIZE, "--gate-steps", 2), "--gate-steps finds the heads of --exact-heads"),
    ((*LINEARIZE, "--resume", "--overwrite"), "give one of the two"),
    # sizes beyond what the teacher can read
    (
        (*LINEARIZE, "--context", 128, "--exact-tokens", 2**31 - 1),
        "exact_tokens must be at most 256, the positions that this teacher can read",
    ),
    ((*LINEARIZE, "--context", 128, "--span", 2**20), "span 1048576 of mixer 'aug' (group 64)"),
    ((*LINEARIZE, "--context", 128, "--group", 2**24), "choose a smaller group"),
    (
        (*LINEARIZE, "--context", 128, "--mixer", "linformer", "--keep", 2**30),
        "choose a smaller keep",
    ),
    ((*GENERATE, "--drafter", "prompt-lookup", "--policy", "fixed:1000"), "at most 63 draft"),
    (("pretrain", "--out", "out", "--recipe", "embeded"), "did you mean 'embedded'?"),
    (("train-drafter", "{model}", "--kind", "medua"), "did you mean 'medusa'?"),
    (("eval", "recal", "{model}"), "did you mean eval 'recall'?"),
    (("bench", "kernels", "{model}", "--formats", "int9"), "did you mean 'int8'?"),
    # usage
    (("generate",), "Missing argument"),
    ((*GENERATE, "--max-tokens", "many"), "see linspec generate --help"),
    ((*GENERATE, "--device", "cuda:99"), "no CUDA device can be used"),
]


@pytest.mark.crossed(4)
@pytest.mark.parametrize(("args", "message"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_a_hostile_argument_ends_in_one_line(
    args: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    inside = tmp_path / "inputs"
    inside.mkdir()
    places = {"model": softmax(), **files(inside)}
    given = [str(a).format(**places) if "{" in str(a) else str(a) for a in args]
    assert message in only_line(run(*given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["99999999999", "0", "many"])
def test_threads_of_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_THREADS", value)
    assert "threads" in only_line(run("generate", softmax(), "--prompt", "x")).lower()


@pytest.mark.parametrize("how", ["none", "closed"])
def test_a_prompt_from_standard_input_that_is_closed(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linspec.cli.console import read_prompt
    from linspec.errors import InputError

    stream = io.TextIOWrapper(io.BytesIO(b""))
    stream.close()
    monkeypatch.setattr("sys.stdin", None if how == "none" else stream)
    with pytest.raises(InputError, match="standard input is closed"):
        read_prompt("-", None)


def test_an_unexpected_error_says_where_its_traceback_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("linspec.evaluate.perplexity.evaluate_source", broken)
    result = run("eval", softmax())
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("unexpected error: ZeroDivisionError: a fault; ")
    kept = Path(line.rpartition("kept in ")[2])
    assert kept.is_relative_to(tmp_path / "cache")
    assert "in broken" in kept.read_text()


def test_a_traceback_is_kept_where_the_cache_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "file"))
    kept = keep_traceback(ValueError("x"))
    assert "ValueError: x" in kept.read_text()
    kept.unlink()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the memory of this machine is used up"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ask for less"),
        (PermissionError(13, "Permission denied", "a.txt"), "a.txt: this user may not open it"),
        (OSError(28, "No space left on device"), "No space left on the disk; free some space"),
        (OSError("odd"), "odd; try another path"),
    ],
)
def test_errors_of_the_system_name_the_rule_and_the_way_out(error: Exception, message: str) -> None:
    assert message in explain(error)


def test_names_of_files_that_are_not_unicode_are_printed(tmp_path: Path) -> None:
    from linspec.cli.console import print_json

    print_json({"out": Path(os.fsdecode(b"\xff"))})


@pytest.mark.parametrize(
    "command", [["generate", "embedded-aug", "--prompt"], ["list", "--json=1"]]
)
def test_an_option_without_its_value_is_one_line(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        app(command)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said


def test_the_help_was_called_otherwise_by_the_module() -> None:
    command = [sys.executable, "-m", "linspec", "generate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "see linspec generate --help" in done.stderr


def test_the_help_names_the_defaults_of_the_library_and_every_package() -> None:
    from linspec.checkpoints.packages import PACKAGES
    from linspec.cli.train import DrafterTraining
    from linspec.train.drafters import DrafterConfig

    usual = DrafterConfig()
    assert DrafterTraining.usual == {
        name: str(getattr(usual, name)) for name in DrafterTraining.usual if name != "lr"
    } | {"lr": "the kind's"}
    help = " ".join(CliRunner().invoke(app, ["train-drafter", "--help"]).stdout.split())
    assert all(f"[default: ({text})]" in help for text in DrafterTraining.usual.values())
    assert all(name in help for name in PACKAGES)
