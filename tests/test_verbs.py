"""Verbs of two words, and what the old names of verbs and flags answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_dir
from typer.testing import CliRunner, Result

from linspec.checkpoints.hub import load_model
from linspec.cli import app
from linspec.drafters.lud import Slot, SlotConfig
from linspec.drafters.saved import save_drafter
from linspec.evaluate.positions import by_position
from linspec.evaluate.recall import evaluate_recall
from linspec.evaluate.repeats import evaluate_repeats
from linspec.kernels.cpu.library import load


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LINSPEC_DEBUG", raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"abcd end {i} the end\n" * 30)
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def run_json(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# ---- verbs of two words


def test_the_first_word_alone_is_the_usual_measurement(data: Path) -> None:
    args = (model_dir("aug"), "--data", data, "--limit-bytes", 300)
    assert run_json("eval", *args) == run_json("eval", "perplexity", *args)
    for first, default in (("eval", "perplexity"), ("bench", "speed")):
        found = run(first, "--help").output
        assert found == run(first, default, "--help").output
        assert f"`linspec {first} MODEL` is the same" in found


def test_eval_recall(data: Path) -> None:
    teacher = model_dir("softmax")
    args = ("--data", data, "--lengths", 1200, "--samples", 1, "--seeds", 1, "--teacher", teacher)
    found = run_json("eval", "recall", model_dir("aug"), *args)
    assert len(found["limits"]) == 1
    expected = evaluate_recall(
        model_dir("aug"), teacher=teacher, data=[data], lengths=[1200], samples=1
    )
    assert found == json.loads(json.dumps(expected.to_json()))
    assert "the teacher ends at 256" in run("eval", "recall", model_dir("aug"), *args).stdout


def test_eval_positions(data: Path) -> None:
    args = ("eval", "positions", model_dir("aug"), "--data", data, "--length", 300)
    found = run_json(*args, "--context", 50)
    assert [s["end"] for s in found["stretches"]] == [256, 300]
    assert (
        found["drift"] == by_position(model_dir("aug"), data=[data], length=300, context=50).drift
    )
    assert "drift" in run(*args).stdout


def test_eval_repeats(data: Path) -> None:
    model = model_dir("softmax")
    args = ("--data", data, "--lengths", "256,300", "--teacher", model)
    found = run_json("eval", "repeats", model, *args)
    assert [(c["length"], c["relative"]) for c in found["cells"]] == [(256, 1.0)]
    assert len(found["limits"]) == 2
    expected = evaluate_repeats(model, data=[data], lengths=[256, 300])
    assert found["cells"][0]["gain"] == expected.cells[0].gain


def test_bench_drafters(data: Path) -> None:
    itself = f"draft-model:{model_dir('aug')}"
    verb = ("bench", "drafters", model_dir("aug"), "--tokens", 8, "--data", data, "--per-family", 2)
    found = run_json(*verb, "--policy", 3, "--drafter", itself)
    plain, drafted, again = found["rows"]
    assert [row["drafter"] for row in found["rows"]] == ["plain", itself, "plain again"]
    # the model drafts for itself: everything is accepted
    assert drafted["tokens_per_round"] > 3 and set(drafted["acceptance"]) == {1.0}
    assert plain["tokens"] == drafted["tokens"] == again["tokens"] and plain["prompts"] == 2
    assert drafted["low"] <= drafted["times_plain"] <= drafted["high"]
    shares = [drafted[name] for name in ("drafting", "verifying", "rest")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3) and min(shares) > 0
    assert plain["oracle"] is None and 1.0 <= drafted["oracle"] <= drafted["tokens_per_round"]
    assert found["settings"]["policy"] == "3" and found["skipped"] == []
    # without names: every registered one that can be made
    everyone = run_json(*verb)
    names = [row["drafter"] for row in everyone["rows"]]
    left_out = {each["drafter"]: each["reason"] for each in everyone["skipped"]}
    assert {"plain", "prompt-lookup"} <= set(names)
    assert {"medusa", "draft-model"} <= left_out.keys()
    assert "train-drafter" in left_out["medusa"]
    people = run(*verb)
    assert people.exit_code == 0, people.stderr
    assert "prompt-lookup" in people.stdout and "left out medusa: " in people.stderr


def test_bench_drafters_marks_what_is_lossy(data: Path, tmp_path: Path) -> None:
    model = load_model(model_dir("aug"))
    shape = SlotConfig(width=model.config.width, vocab_size=model.config.vocab_size)
    slot = save_drafter(Slot(shape), model, tmp_path / "lud")
    spec = f"lud:path={slot},threshold=0.001"
    verb = ("bench", "drafters", model_dir("aug"), "--tokens", 8, "--data", data, "--per-family", 2)
    verb = (*verb, "--policy", 8, "--drafter", spec)
    exact = run_json(*verb)["rows"]
    assert [row["lossy"] for row in exact] == [False] * 3
    assert [row["agreement"] for row in exact] == [1.0] * 3
    verb = (*verb, "--verifier", "trusting:threshold=0.001")
    _, trusted, _ = run_json(*verb)["rows"]
    assert trusted["lossy"] and trusted["agreement"] < 1 and trusted["tokens_per_round"] > 1.5
    assert "is lossy with verifier trusting" in run(*verb).stderr


def test_bench_drafters_by_family(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"category": "code", "prompt": "def area("},
        {"category": "code", "prompt": "class Stack:"},
        {"category": "code", "prompt": "left out: two prompts of a family are asked for"},
        {"category": "prose", "prompt": "The old"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    verb = ("bench", "drafters", model_dir("aug"), "--drafter", "prompt-lookup", "--prompts", file)
    found = run_json(*verb, "--tokens", 8, "--per-family", 2, "--batch", 2)
    counts = {(row["drafter"], row["family"]): row["prompts"] for row in found["rows"]}
    assert [counts["plain", family] for family in ("all", "code", "prose")] == [3, 2, 1]
    assert "prose" in run(*verb, "--tokens", 8).stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"prompt": "a"}\n{"turns"\n', "line 2 is not JSON"),
        ('{"turns": [7]}\n', "line 1 has neither 'turns', a list of texts, nor 'prompt'"),
        ('{"category": 3, "prompt": "a"}\n', "'category' is a text"),
        ('{"turns": ["a question"]}\n', "no chat template"),
    ],
)
def test_a_file_of_prompts_that_holds_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    drafter = ("--drafter", "prompt-lookup")
    refused = run("bench", "drafters", model_dir("aug"), *drafter, "--prompts", file)
    assert refused.exit_code and " ".join(refused.stderr.split()).count(said) == 1, refused.stderr


@pytest.mark.skipif(load().library is None, reason="no compiled kernels")
def test_bench_kernels_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linspec.bench.products.last_cache_bytes", lambda: 2**18)
    args = ("bench", "kernels", "--repeats", 1, "--formats", "int8", "--nodes", "2")
    found = run_json(*args, "--ghz", 3)
    assert {(row["format"], row["rows"]) for row in found["products"]} == {("int8", 1), ("int8", 2)}
    assert found["clock"] == {"ghz": 3.0, "from": "stated"}
    assert "cycles are for 32 weights" in run(*args).stdout
    assert "without MODEL" in run(*args[:2], model_dir("aug"), "--nodes", "2").output


def test_bench_kernels() -> None:
    found = run_json("bench", "kernels", model_dir("aug"), "--repeats", 1, "--formats", "int8")
    assert found["settings"]["formats"] == ["int8"]
    one, *more = found["steps"]
    assert (one["nodes"], one["times_one"]) == (1, 1.0)
    assert all(row["times_one"] > 0 and row["format"] == "int8" for row in more)
    everything = sum(row["layers"] for row in found["linears"] if row["nodes"] == 1)
    assert everything == 2 * 4 + 1, "q-k-v, o, gate-up and down of two layers, and the head"
    assert all(row["seconds"] > 0 and row["of_roof"] >= 0 for row in found["linears"])
    people = run("bench", "kernels", model_dir("aug"), "--repeats", 1)
    for name in ("float32", "int8", "int4"):
        assert name in people.stdout
    assert (
        "unknown format 'int3'"
        in run("bench", "kernels", model_dir("aug"), "--formats", "int3").output
    )


def test_a_directory_called_like_a_verb_is_written_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recall").symlink_to(model_dir("aug"))
    found = run("eval", "recall", "--data", data)
    assert found.exit_code == 2
    assert "the directory recall is written ./recall" in found.stderr
    expected = run_json("eval", model_dir("aug"), "--data", data)
    assert run_json("eval", "./recall", "--data", data) == expected


def test_a_misspelt_second_word_is_not_taken_for_a_model() -> None:
    for words in (("eval", "recal", model_dir("aug")), ("bench", "kernel", model_dir("aug"))):
        found = run(*words)
        assert found.exit_code == 2
        assert "did you mean" in found.stderr and found.stderr.count("\n") == 1


# ---- old names


def test_old_flags_work_and_say_their_new_names() -> None:
    base = ("generate", model_dir("softmax"), "--prompt", "ab cd", "--max-tokens", "5")
    new = run(*base, "--kv-cache-dtype", "int8")
    for old in (("--kv", "int8"), ("--kv=int8",)):
        found = run(*base, *old)
        assert found.exit_code == 0 and found.stdout == new.stdout != ""
        assert "note: --kv is now called --kv-cache-dtype\n" in found.stderr
    assert "note:" not in new.stderr
    plain = run(*base, "--kv", "float")
    assert plain.stdout == run(*base, "--kv-cache-dtype", "auto").stdout == run(*base).stdout
    found = run("linearize", "x", "--out", "y", "--rows", "0")
    assert "note: --rows is now called --exact-tokens\n" in found.stderr
    assert "--exact-tokens must be 1 or more, got 0" in found.stderr


def test_what_looks_like_an_old_flag_in_a_value_is_left_alone() -> None:
    base = ("generate", model_dir("softmax"), "--max-tokens", "3")
    found = run(*base, "--prompt", "--kv")
    assert found.exit_code == 0, found.stderr
    assert "note:" not in found.stderr
    # a flag that was never one of this verb
    found = run("linearize", "x", "--out", "y", "--kv", "int8")
    assert found.exit_code == 2 and "note:" not in found.stderr


@pytest.mark.parametrize(
    ("flag", "word"),
    [("--recall", "recall"), ("--repeats", "repeats"), ("--by-position", "positions")],
)
def test_a_flag_that_became_a_word_says_so(flag: str, word: str, data: Path) -> None:
    sizes = {"recall": ("--lengths", 600, "--samples", 1), "repeats": ("--lengths", 256)}
    args = ("--data", data, *sizes.get(word, ("--length", 300)), "--json")
    found = run("eval", model_dir("aug"), flag, *args)
    assert found.exit_code == 0, found.stderr
    assert found.stdout == run("eval", word, model_dir("aug"), *args).stdout
    told = f"note: linspec eval MODEL {flag} is now called linspec eval {word} MODEL\n"
    assert told in found.stderr


@pytest.mark.crossed(3)
@pytest.mark.parametrize(
    ("module", "verb"),
    [
        ("linspec.train.encoder", "linspec linearize"),
        ("linspec.evaluate.embeddings", "linspec eval embeddings"),
        ("linspec.evaluate.continuations", "linspec eval continuations"),
    ],
)
def test_a_module_that_became_a_verb_answers_with_it(module: str, verb: str) -> None:
    command = [sys.executable, "-m", module, "model dir", "--field", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: this command is now: {verb} 'model dir' --field x\n"


def test_convert_there_and_back(tmp_path: Path) -> None:
    there = run_json("convert", "embedded-softmax", tmp_path / "m.gguf", "--type", "f32")
    back = run_json("convert", tmp_path / "m.gguf", tmp_path / "again")
    assert (there["format"], back["format"]) == ("gguf", "huggingface")
    args = ("--prompt", "class Stack:", "--max-tokens", 8)
    texts = {run("generate", m, *args).stdout for m in ("embedded-softmax", back["out"])}
    assert len(texts) == 1 and texts != {""}


# ---- numbers from the environment


@pytest.mark.parametrize("value", ["0", "99999999999"])
def test_a_wrong_variable_of_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LINSPEC_THREADS", value)
    found = run("info")
    assert found.exit_code == 1
    assert "error: LINSPEC_THREADS must be 1 or more and at most" in found.stderr
    # what the command says goes before the environment
    assert "--threads must be 1 or more" in run("info", "--threads", "-1").stderr
    monkeypatch.setenv("LINSPEC_THREADS", "10000")
    assert "(--threads, LINSPEC_THREADS)" in run("info").stderr


# ---- flags of 0.1 whose meaning nobody can guess, and the version


@pytest.mark.parametrize(
    "args",
    [("MODEL", "--recall", "--repeats"), ("perplexity", "MODEL", "--recall")],
)
def test_a_measurement_that_became_a_verb_is_named_where_it_cannot_be_guessed(
    args: tuple[str, ...],
) -> None:
    found = run("eval", *args)
    assert found.exit_code == 2 and found.stdout == ""
    assert "is now linspec eval recall MODEL" in found.stderr
    assert ("linspec eval repeats MODEL" in found.stderr) == ("--repeats" in args)


def test_the_version_is_printed_without_torch() -> None:
    code = (
        "import sys; from linspec.cli import app\n"
        "try: app(['--version'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    name, version = done.stdout.split()
    assert name == "linspec" and version[0].isdigit()


def test_tasks_without_lm_eval_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "linspec.integrations.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run("eval", "task", model_dir("aug"), "arc_easy")
    assert found.exit_code == 1 and found.stdout == ""
    assert "lm_eval is not installed: pip install 'linspec[eval]'" in found.stderr
