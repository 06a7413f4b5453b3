"""The command line as scripts see it: JSON keys, exit codes, a clean stdout."""

from __future__ import annotations

import gc
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir
from typer.testing import CliRunner, Result

import linspec
from linspec import LLM, SamplingParams, cli
from linspec.cli import app
from linspec.cli.console import importing
from linspec.evaluate.perplexity import evaluate_source
from linspec.kernels.selector import pick_kernel
from linspec.train.drafters import DrafterConfig
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_recipe import LinearizeRecipe

VERBS = (
    "demo",
    "pretrain",
    "linearize",
    "train-drafter",
    "train-parallel",
    "generate",
    "chat",
    "quantize",
    "convert",
    "eval perplexity",
    "eval recall",
    "eval repeats",
    "eval positions",
    "eval continuations",
    "eval embeddings",
    "eval parallel-bench",
    "verify",
    "bench speed",
    "bench drafters",
    "bench kernels",
    "bench load",
    "get",
    "info",
    "list",
)


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


def run(*args: object, stdin: bytes | str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


def test_garbage_is_not_looked_for_while_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    with importing():
        assert gc.isenabled(), "torch is there already"
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def run_json(*args: object, stdin: bytes | str | None = None) -> dict[str, Any]:
    result = run(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    # one object on one line, and nothing else
    assert result.stdout.count("\n") == 1
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def fails(*args: object, stdin: bytes | str | None = None) -> str:
    """The one line of a linspec error."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_an_example(verb: str) -> None:
    result = run(*verb.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: linspec {verb}" in result.output


def test_the_overview_names_every_verb() -> None:
    result = run("--help")
    assert all(re.search(rf"^\s+{verb}\s", result.output, re.M) for verb in VERBS)


@pytest.mark.parametrize("args", [("nonsense",), ("generate",), ("eval", "x", "--nonsense")])
def test_wrong_usage_is_2(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_generate() -> None:
    args = ("generate", model_dir("aug"), "--prompt", "abcd", "--max-tokens", 7, "--temperature", 0)
    data = run_json(*args, "--drafter", "prompt-lookup", "--seed", 1)
    llm = LLM(model_dir("aug"))
    (expected,) = llm.generate("abcd", SamplingParams(max_tokens=7))
    assert data["token_ids"] == list(expected.token_ids) and len(data["token_ids"]) == 7
    assert data["text"] == expected.text
    assert data["finish_reason"] == "length"
    assert data["prompt_tokens"] == len(llm.encode("abcd"))
    # the first token comes from the prompt's own step
    assert data["rounds"] + data["accepted"] >= 6
    assert data["tokens_per_round"] == pytest.approx(1 + data["accepted"] / data["rounds"])
    assert data["tokens_per_s"] > 0
    plain = run(*args)
    assert plain.exit_code == 0
    assert plain.stdout == data["text"] + "\n"
    assert "7 tokens" in plain.stderr


def test_prompts_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    text = "naïve € text"
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    base = ("generate", model_dir("aug"), "--max-tokens", 5)
    expected = run_json(*base, "--prompt", text)["token_ids"]
    assert run_json(*base, "--prompt-file", file)["token_ids"] == expected
    assert run_json(*base, "--prompt", "-", stdin=text.encode())["token_ids"] == expected


def test_generate_options_reach_the_sampler() -> None:
    base = ("generate", model_dir("aug"), "--prompt", "abcd", "--max-tokens", 12)
    sampled = (*base, "--temperature", 1, "--top-k", 9, "--top-p", 0.9, "--repetition-penalty", 1.2)
    first, again, other = (run_json(*sampled, "--seed", s)["token_ids"] for s in (1, 1, 2))
    assert first == again != other
    free = run_json(*base)
    cut = run_json(*base, "--stop", free["text"][4:6], "--stop", "never there")
    assert cut["text"] == free["text"][: free["text"].find(free["text"][4:6])]
    assert cut["finish_reason"] == "stop"
    logprobs = run_json(*base, "--logprobs", 2)["logprobs"]
    assert len(logprobs) == 12 and len(logprobs[0]["top"]) == 2


def test_an_output_is_of_the_language_that_was_asked_for(tmp_path: Path) -> None:
    base = ("generate", model_dir("aug"), "--prompt", "abcd", "--max-tokens", 40)
    schema, rules = tmp_path / "schema.json", tmp_path / "rules.gbnf"
    schema.write_text('{"enum": [["a", 1], ["b"]]}')
    rules.write_text('root ::= "x" [0-9] "y"')
    for given in (schema, schema.read_text()):
        found = run_json(*base, "--json-schema", given, "--drafter", "grammar")
        assert json.loads(found["text"]) in (["a", 1], ["b"])
    assert re.fullmatch("[ab]{3}", run_json(*base, "--regex", "[ab]{3}")["text"])
    assert re.fullmatch("x[0-9]y", run_json(*base, "--grammar", rules)["text"])
    assert "one of --json-schema and --regex" in fails(*base, "--regex", "a", "--json-schema", "{}")
    assert "unclosed group" in fails(*base, "--regex", "(")
    assert "no such file" in fails(*base, "--json-schema", tmp_path / "none.json")
    assert "cannot read" in fails(*base, "--json-schema", "a" * 5000)
    assert "is no path" in fails(*base, "--json-schema", "a\0b")


def test_eval(data: Path) -> None:
    found = run_json("eval", model_dir("aug"), "--data", data, "--limit-bytes", 500)
    assert found == evaluate_source(model_dir("aug"), [data], limit_bytes=500).to_json()
    assert found["bytes"] == 500
    # bits of all tokens, told in two ways
    bits = found["tokens"] * math.log2(found["perplexity"])
    assert bits == pytest.approx(found["bits_per_byte"] * found["bytes"])
    assert "bits_per_byte" in run("eval", model_dir("aug"), "--data", data).stdout
    assert run_json("eval", model_dir("softmax"), "--limit-bytes", 2000)["bytes"] == 2000


def test_verify(data: Path) -> None:
    args = ("--prompts", 3, "--tokens", 10, "--draws", 40, "--data", data)
    found = run_json("verify", model_dir("aug"), "--drafter", "prompt-lookup", *args)
    assert found["lossless_greedy"] is True
    # alone and in batches, unless a near tie ends a comparison
    assert found["near_ties"] or found["tokens"] == 2 * 3 * 10
    assert found["prompts"] == 3
    assert 0 < found["sampling_p_value"] <= 1
    assert found["first_divergence"] is None
    assert found["tokens_per_round"] >= 1


def test_bench(data: Path) -> None:
    args = ("--tokens", 8, "--repeats", 1, "--data", data, "--contexts")
    found = run_json("bench", model_dir("softmax"), "--drafter", "prompt-lookup", *args, "16,999")
    assert [(row["context"], row["mode"]) for row in found["rows"]] == [
        (16, "plain"),
        (16, "prompt-lookup"),
    ]
    for row in found["rows"]:
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_token"], rel=0.01)
        assert row["state_bytes"] == found["rows"][0]["state_bytes"] > 0
        assert row["spread"] == 0
    assert found["rows"][0]["tokens_per_round"] == 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["settings"]["tokens"] == 8
    (skipped,) = found["skipped"]
    assert skipped["context"] == 999 and "999 + 8 tokens exceed" in skipped["reason"]
    people = run("bench", model_dir("softmax"), *args, "16,999")
    assert "plain" in people.stdout and "skipped context 999" in people.stderr


@pytest.mark.slow
def test_bench_load() -> None:
    """Two processes that generate and one that only imports torch, timed from outside."""
    found = run_json("bench", "load", model_dir("softmax"), "--repeats", 1, "--threads", 1)
    assert found["warm_seconds"] > found["torch_seconds"] > 0 and found["cold_seconds"] > 0
    assert found["memory_over_file"] > 1 and found["repeats"] == 1
    assert found["peak_megabytes"] > found["torch_megabytes"] > found["file_megabytes"]


def test_bad_loads_are_refused(tmp_path: Path) -> None:
    assert "must be 1 or more" in fails("bench", "load", model_dir("aug"), "--repeats", 0)
    assert "not a directory" in fails("bench", "load", tmp_path / "nothing")


def test_ctrl_c_after_the_end_was_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda prog_name: sys.exit(0))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_info() -> None:
    found = run_json("info")
    assert found["torch"] == torch.__version__
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["version"] == linspec.__version__
    picked = pick_kernel(torch.zeros(1, device=found["device"]))
    assert found["kernels"]["linear"] == {"name": picked.name, "reason": picked.reason}
    assert "torch" in run("info").stdout
    before = torch.get_num_threads()
    try:
        assert run_json("info", "--threads", 1)["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_list() -> None:
    found = run_json("list")
    axes = {"mixers", "drafters", "verifiers", "policies", "loops", "caches", "trainings"}
    axes |= {"attention", "rope scalings"}
    axes |= {f"diffusion {slot}" for slot in ("blocks", "commits", "stops", "caches", "verifies")}
    assert set(found) == axes
    for entries in found.values():
        assert all({"name", "paper", "summary"} <= set(entry) for entry in entries)
    names = {axis: [entry["name"] for entry in entries] for axis, entries in found.items()}
    assert {"softmax", "aug", "local", "grouped"} <= set(names["mixers"])
    assert {"medusa", "prompt-lookup", "student"} <= set(names["drafters"])
    assert all(m["state"] and m["cost"] and m["direction"] for m in found["mixers"])
    (lookup,) = [each for each in found["drafters"] if each["name"] == "prompt-lookup"]
    assert lookup["needs"] == "nothing"
    defaults = {each["name"]: each["default"] for each in lookup["options"]}
    assert defaults == {"max_ngram": "4", "min_ngram": "2", "tokens": "63"}
    shown = run("list").stdout
    assert "max_ngram" in shown
    assert "arXiv" in shown
    assert "causal" in shown


def test_linearize_and_train_a_drafter(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "student"
    short = ("--data", data, "--tokens", 64, "--context", 16, "--batch-tokens", 32)
    args = (model_dir("softmax"), "--out", out, "--group", 8, "--taps", 4, *short)
    assert run_json("linearize", *args) == {"out": str(out)}
    found = run_json("train-drafter", out, "--kind", "medusa:heads=2", *short)
    assert found["out"] == str(out / "medusa") and found["drafts"] == 2
    said = json.loads((out / "medusa" / "drafter.json").read_text())
    assert 1 <= found["tokens_per_round"] == said["tokens_per_round"] <= 3
    result = run_json("generate", out, "--prompt", "abcd", "--drafter", "medusa", "--policy", 3)
    assert len(result["token_ids"]) >= 1


def test_training_options_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(source: str, out: Path, recipe: LinearizeRecipe, **how: bool) -> None:
        seen.update(how, recipe=recipe)

    monkeypatch.setattr("linspec.train.linearize.linearize", fake)
    run_json("linearize", "x", "--out", "y", "--keep-softmax", "0,2", "--lr", 0.5, "--resume")
    recipe = seen["recipe"]
    assert (seen["resume"], seen["overwrite"]) == (True, False)
    assert recipe.training == LinearizeConfig(lr=0.5)
    assert recipe == LinearizeRecipe(
        keep_softmax=(0, 2), data=["stdlib"], config={"lr": 0.5, "compile": "auto"}
    )
    sizes = ("--features", 3, "--keep", 2, "--mixer-seed", 7, "--mixer", "linformer")
    more = ("--exact-tokens", 128, "--softmax-layers", 1, "--group", 16)
    run_json("linearize", "x", "--out", "y", *sizes, *more)
    recipe = seen["recipe"]
    assert (recipe.features, recipe.keep, recipe.mixer_seed) == (3, 2, 7)
    assert (recipe.span, recipe.exact_tokens, recipe.softmax_layers) == (None, 128, 1)
    assert recipe.mixer_config().group == 16
    run_json("linearize", "x", "--out", "y", "--span", "4,2")
    assert seen["recipe"].span == (4, 2)

    def fake_drafter(model: str, out: Path | None, **how: object) -> Path:
        seen.update(how)
        return Path(model)

    monkeypatch.setattr("linspec.train.drafters.train_drafter", fake_drafter)
    data = str(Path(__file__).parent)
    run_json("train-drafter", "x", "--kind", "medusa:heads=4", "--data", data, "--data", "stdlib")
    assert (seen["config"], seen["kind"]) == (DrafterConfig(), "medusa:heads=4")
    assert seen["data"] == [data, "stdlib"]


def test_demo_calls_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Answer:
        def to_json(self) -> dict[str, Any]:
            return {"lossless": True, "rows": [], "seconds": float("nan")}

    shown: list[bool] = []

    def fake(**settings: Any) -> Answer:
        print("noise of a library")
        assert settings["quick"] and settings["out"] == tmp_path
        shown.append(settings["real"] is not None)
        return Answer()

    monkeypatch.setattr("linspec.demo.run_demo", fake)
    found = run_json("demo", "--quick", "--out", tmp_path)
    assert found == {"lossless": True, "rows": [], "seconds": None}
    run_json("demo", "--quick", "--out", tmp_path, "--no-real-model")
    assert shown == [True, False]


@pytest.mark.parametrize("verb", ["generate", "eval", "verify", "bench", "train-drafter"])
def test_a_missing_model(verb: str) -> None:
    prompt = ("--prompt", "x") if verb == "generate" else ()
    assert "not a directory" in fails(verb, "/nowhere", *prompt)


def test_a_directory_of_pickles(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_dir("softmax") / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "safetensors" in fails("generate", tmp_path, "--prompt", "x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "-"), "prompt is empty"),
        ((), "give one of --prompt"),
        (("--prompt", "x", "--prompt-file", "y"), "give one of --prompt"),
        (("--prompt-file", "/nowhere.txt"), "cannot read"),
        (("--prompt", "x", "--max-tokens", "0"), "--max-tokens must be 1 or more, got 0"),
        (("--prompt", "x", "--max-tokens", "-1"), "--max-tokens must be 1 or more, got -1"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--prompt", "x", "--drafter", "nonsense"), "unknown drafter 'nonsense'"),
        (("--prompt", "x", "--drafter", "prompt-lookup:tokens=x"), "tokens must be a whole number"),
        (("--prompt", "x", "--drafter", "medusa"), "no drafter of kind"),
        (("--prompt", "x", "--verifier", "nonsense"), "unknown verifier"),
        (("--prompt", "x", "--drafter", "prompt-lookup", "--policy", "x"), "unknown policy"),
        (("--prompt", "x", "--device", "nonsense"), "device"),
        (("--prompt", "x", "--threads", "0"), "threads"),
        (("--prompt", "a" * 400), "256"),
    ],
)
def test_bad_requests(args: tuple[str, ...], message: str) -> None:
    assert message in fails("generate", model_dir("softmax"), *args)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    assert "not UTF-8" in fails("generate", model_dir("aug"), "--prompt-file", file)
    assert "not UTF-8" in fails("generate", model_dir("aug"), "--prompt", "-", stdin=b"\xff")
    assert "not UTF-8" in fails("eval", model_dir("aug"), "--data", file)


def test_bad_training_requests(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    base = ("linearize", model_dir("softmax"), "--out", out, "--data", data)
    assert "unknown mixer 'nonsense'" in fails(*base, "--mixer", "nonsense")
    assert "--keep-softmax" in fails(*base, "--keep-softmax", "x")
    assert "layers are 0..1" in fails(*base, "--keep-softmax", "7")
    assert "longer than the 16 tokens of a training text" in fails(*base, "--context", 16)
    assert "nothing to resume" in fails(*base, "--resume", "--context", 32)
    assert "tokens" in fails(*base, "--tokens", 0)
    base = (*base, "--context", 32)
    assert "--keep must be 1 or more, got 0" in fails(*base, "--keep", 0)
    assert "--features must be 1 or more, got -1" in fails(*base, "--features", -1)
    assert "seed must be 0 or more, got -1" in fails(*base, "--mixer-seed", -1)
    assert "'aug' has no 'seed' to set, got 3" in fails(*base, "--mixer-seed", 3)
    linformer = (*base, "--mixer", "linformer", "--group", 8)
    assert "at most as many rows" in fails(*linformer, "--features", 9)
    assert "unknown recipe" in fails("pretrain", "--out", out, "--recipe", "nonsense")
    assert "--steps" in fails("pretrain", "--out", out, "--steps", 0)
    assert "give --from MODEL too" in fails("pretrain", "--out", out, "--rank", 4)
    filling = ("pretrain", "--out", out, "--from", model_dir("softmax"))
    assert "leave out --recipe" in fails(*filling, "--recipe", "embedded")
    assert "no token '<nothing>'" in fails(*filling, "--mask", "<nothing>")
    assert "unknown kind of drafter" in fails(
        "train-drafter", model_dir("aug"), "--kind", "nonsense"
    )
    assert not out.exists()


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in fails("eval", model_dir("aug"), "--data", tmp_path)


def test_an_error_keeps_stdout_clean_with_json() -> None:
    assert "got 0" in fails(
        "generate", model_dir("aug"), "--prompt", "x", "--max-tokens", 0, "--json"
    )


def test_a_divergence_is_reported_and_exits_with_1(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linspec.evaluate.lossless import Divergence, Report

    report = Report(False, 1, 3, None, Divergence(0, 3, 1, 2, 0.5), 0, (), 1.0)
    monkeypatch.setattr("linspec.evaluate.lossless.verify", lambda *a, **k: report)
    result = run("verify", model_dir("aug"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["first_divergence"]["position"] == 3


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("linspec.train.pretrain.pretrain", interrupted)
    result = run("pretrain", "--out", "x")
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    monkeypatch.setattr("linspec.evaluate.perplexity.evaluate_source", interrupted)
    assert run("eval", "x").exit_code == 130


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINSPEC_DEBUG", "1")
    result = run("eval", "/nowhere")
    assert result.exception is not None and "/nowhere" in str(result.exception)


def test_the_real_process_keeps_stdout_for_the_answer() -> None:
    """`python -m linspec` is the command, with nothing but the answer on stdout."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "linspec"),
            *("generate", str(model_dir("aug")), "--prompt", "abcd", "--max-tokens", "3", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["token_ids"]) == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("study",), "studies.linearized_llm"),
        (
            ("study", "--table", "quality", "--help"),
            "studies.linearized_llm --table quality --help",
        ),
        (("bench", "peers", "--quick"), "benchmarks.peers --quick"),
    ],
)
def test_a_verb_that_moved_answers_with_the_new_command(old: tuple[str, ...], new: str) -> None:
    found = run(*old)
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and found.stderr.endswith(f"python -m {new}\n")


# what the scripts of 0.1 read; others may come
KEYS = {
    "generate": "text token_ids tokens_per_round tokens_per_s rounds prompt_tokens finish_reason drafted "
    "accepted acceptance prefill_seconds decode_seconds",
    "eval": "bits_per_byte perplexity tokens bytes",
    "verify": "lossless_greedy prompts tokens sampling_p_value first_divergence near_ties ties "
    "tokens_per_round",
    "bench": "machine settings rows skipped",
    "info": "version torch device kernels threads fast_bfloat16 python transformers cpu cores",
    "list": "mixers drafters verifiers policies",
}
ROW = "context mode tokens_per_s ms_per_token state_bytes tokens_per_round spread"


def test_keys_of_0_1_are_kept(data: Path) -> None:
    model, text = model_dir("aug"), ("--data", data)
    args: dict[str, tuple[object, ...]] = {
        "generate": (model, "--prompt", "abcd", "--max-tokens", 2),
        "eval": (model, *text, "--limit-bytes", 100),
        "verify": (model, *text, "--prompts", 1, "--tokens", 2, "--draws", 0),
        "bench": (model, *text, "--contexts", 8, "--tokens", 8, "--repeats", 1),
    }
    for verb, keys in KEYS.items():
        found = run_json(verb, *args.get(verb, ()))
        assert set(keys.split()) <= set(found), verb
        if verb == "bench":
            assert set(ROW.split()) <= set(found["rows"][0])
