"""Arguments of Python functions that nothing can use: an error that names the rule, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import model_dir, text_model, tiny_tokenizer
from hostile import damaged

from linspec import LLM, LinearizeRecipe, LinspecError, linearize, pretrain, quantize, train_drafter
from linspec.bench.drafters import bench_drafters
from linspec.bench.speed import bench
from linspec.decoding.sampling import SamplingParams
from linspec.decoding.step import Want
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.errors import (
    CheckpointError,
    ConfigError,
    DrafterError,
    InputError,
    TrainingError,
    WrongType,
)
from linspec.evaluate.continuations import continue_source
from linspec.evaluate.embeddings import compare_sources
from linspec.evaluate.lossless import verify
from linspec.evaluate.perplexity import evaluate_source, held_out_documents
from linspec.evaluate.positions import by_position
from linspec.evaluate.recall import evaluate_recall
from linspec.evaluate.repeats import evaluate_repeats
from linspec.train.data import check_sources, load_documents, train_and_heldout
from linspec.train.linearize_heads import linearize_heads
from linspec.train.linearize_record import RECORD, read_record
from linspec.train.run import _difference

NONE_HERE = Path("nowhere")
# every function that takes `data`, with a model that is never loaded: data come first
TAKERS: dict[str, Callable[[Any], object]] = {
    "linearize": lambda data: linearize(model_dir("softmax"), NONE_HERE, data=data),
    "recipe": lambda data: LinearizeRecipe(data=data),
    "heads": lambda data: linearize_heads(model_dir("softmax"), NONE_HERE, exact="1", data=data),
    "train_drafter": lambda data: train_drafter(model_dir("aug"), NONE_HERE, data=data),
    "quantize": lambda data: quantize(model_dir("aug"), NONE_HERE, data=data),
    "perplexity": lambda data: evaluate_source(NONE_HERE, data),
    "recall": lambda data: evaluate_recall(NONE_HERE, data=data),
    "repeats": lambda data: evaluate_repeats(NONE_HERE, data=data),
    "positions": lambda data: by_position(NONE_HERE, data=data),
    "continuations": lambda data: continue_source(NONE_HERE, data),
    "embeddings": lambda data: compare_sources(NONE_HERE, NONE_HERE, data),
    "verify": lambda data: verify(NONE_HERE, data=data),
    "bench": lambda data: bench(NONE_HERE, [8], data=data),
    "bench drafters": lambda data: bench_drafters(NONE_HERE, data=data),
    "pretrain": lambda data: pretrain(NONE_HERE, data=data),
}
BAD_DATA: list[tuple[Any, str]] = [
    (5, "data are a text or a path, or a list of them, got 5"),
    (b"stdlib", "data are a text or a path"),
    ({"a": 1}, "data are a text or a path"),
    ([5], "a data source is a text or a path, got 5"),
    ("", "a data source has no name"),
    ("sdlib", "did you mean 'stdlib'"),
    ([], "no data were given"),
]


@pytest.mark.parametrize("taker", TAKERS)
def test_data_of_the_wrong_type_are_named_by_every_function(taker: str) -> None:
    for data, message in BAD_DATA:
        # no data are the data of the recipe there
        if (taker, data) != ("pretrain", []):
            with pytest.raises(InputError, match=message):
                TAKERS[taker](data)
    assert not NONE_HERE.exists()


def test_one_text_or_path_is_one_source(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text\n" * 40)
    for one in (str(file), file):
        assert check_sources(one) == (one,)
        assert load_documents(one) == load_documents([one]) == held_out_documents(one)
        assert train_and_heldout(one) == train_and_heldout([one])
        assert LinearizeRecipe(data=one).to_json()["data"] == [str(file)]
    assert check_sources("stdlib") == ("stdlib",)


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"span": 1.5}, ConfigError, "span must be a whole number, got 1.5"),
    ({"span": True}, ConfigError, "span must be a whole number"),
    ({"span": "2"}, WrongType, "span takes whole numbers in a list"),
    ({"span": (2, 1.5)}, ConfigError, "span must be a whole number, got 1.5"),
    ({"span": ()}, ConfigError, "span has no numbers"),
    ({"span": 2, "exact_tokens": 64}, ConfigError, "leave out one of the two"),
    ({"keep_softmax": 1}, WrongType, "keep_softmax takes whole numbers in a list, got 1"),
    ({"keep_softmax": ("0",)}, ConfigError, "keep_softmax must be a whole number"),
    ({"mixer": None}, WrongType, "a mixer is a text such as NAME or NAME:key=value, got None"),
    ({"mixer": 5}, WrongType, "a mixer is a text"),
    ({"recipe": {"mixer": "aug"}}, WrongType, "give its entries as options: linearize"),
    ({"recipe": "aug"}, WrongType, "recipe must be of type LinearizeRecipe or None, got 'aug'"),
    ({"dtype": "float32"}, WrongType, "dtype must be of type dtype or None"),
    ({"field": 5}, WrongType, "field must be of type str, got 5"),
    ({"config": 5}, WrongType, "config must be of type LinearizeConfig or"),
    ({"config": {"lr": "x"}}, ConfigError, "lr must be finite and above 0"),
    ({"config": {"nope": 1}}, ConfigError, "LinearizeConfig has no nope"),
    ({"transfer_share": "x"}, ConfigError, "transfer_share must be in 0..1, got 'x'"),
    ({"recall_share": None}, ConfigError, "recall_share must be in 0..1, got None"),
    ({"kl_weight": "x"}, ConfigError, "kl_weight must be finite and 0 or more, got 'x'"),
    ({"precision": "x"}, ConfigError, "precision must be auto, bf16 or float32"),
    ({"precision": "BF16"}, ConfigError, "did you mean 'bf16'"),
    ({"save_every": "x"}, ConfigError, "save_every must be finite"),
    ({"exact_tokens": 2**40}, ConfigError, "exact_tokens must be at most"),
    ({"exact_tokens": 257}, ConfigError, "must be at most 256, the positions that this teacher"),
]


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS, ids=range(len(OPTIONS)))
def test_an_option_of_linearize_that_nothing_can_use(
    options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the end\n" * 40)
    given = {"data": tmp_path / "a.txt", "context": 64, **options}
    with pytest.raises(kind, match=message):
        linearize(model_dir("softmax"), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


SIZES: list[Callable[[], object]] = [
    lambda: train_drafter(model_dir("aug"), NONE_HERE, config={"heads": 2}),  # type: ignore[arg-type]
    lambda: pretrain(NONE_HERE, recipe=["embedded"]),  # type: ignore[arg-type]
    lambda: quantize(model_dir("softmax"), NONE_HERE, limit_bytes="x"),  # type: ignore[arg-type]
    lambda: quantize(model_dir("softmax"), NONE_HERE, calibration_bytes="x"),  # type: ignore[arg-type]
    lambda: evaluate_source(model_dir("aug"), limit_bytes="x"),  # type: ignore[arg-type]
    lambda: evaluate_source(model_dir("aug"), context=1.5),  # type: ignore[arg-type]
    lambda: evaluate_source(model_dir("aug"), field=5),  # type: ignore[arg-type]
    lambda: evaluate_source(model_dir("aug"), device=5),  # type: ignore[arg-type]
    lambda: evaluate_recall(model_dir("aug"), lengths=None),  # type: ignore[arg-type]
    lambda: evaluate_recall(model_dir("aug"), samples="x"),  # type: ignore[arg-type]
    lambda: evaluate_recall(model_dir("aug"), distances=5),  # type: ignore[arg-type]
    lambda: evaluate_repeats(model_dir("aug"), lengths=5),  # type: ignore[arg-type]
    lambda: by_position(model_dir("aug"), length=None),  # type: ignore[arg-type]
    lambda: verify(model_dir("aug"), prompts="x"),  # type: ignore[arg-type]
    lambda: bench(model_dir("aug"), 8),  # type: ignore[arg-type]
    lambda: bench(model_dir("aug"), [8], tokens="x"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_size_of_the_wrong_type_is_an_error_of_linspec(number: int) -> None:
    with pytest.raises(LinspecError):
        SIZES[number]()


# ---- plug-ins and tokenizers


@pytest.mark.parametrize("layers", [(99,), (2,), (-5,), (1.5,), ("0",)])
def test_a_drafter_that_reads_layers_that_are_not_there_is_refused_when_it_is_attached(
    layers: tuple[Any, ...],
) -> None:
    drafter = PromptLookup(options=LookupOptions())
    drafter.needs = Want(layers=layers)
    message = "drafter 'prompt-lookup' needs the hidden states of layer .* this model has 2 layers"
    with pytest.raises(DrafterError, match=message):
        LLM(model_dir("aug"), drafter=drafter)


def test_needs_that_are_no_want_are_named() -> None:
    drafter = PromptLookup(options=LookupOptions())
    drafter.needs = (1, 2)  # type: ignore[assignment]
    with pytest.raises(DrafterError, match="needs must be a Want"):
        LLM(model_dir("aug"), drafter=drafter)


@pytest.mark.parametrize("tokenizer", [5, "gpt2", 0, "", dict, object()])
def test_what_is_no_tokenizer_is_named_at_once(tokenizer: Any) -> None:
    for model in (model_dir("aug"), text_model("aug")):
        with pytest.raises(WrongType, match="a tokenizer has `encode` and `decode`, got "):
            LLM(model, tokenizer=tokenizer)
    assert LLM(text_model("aug"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("made", [torch.Tensor.long, torch.Tensor.bool])
def test_a_logits_processor_that_returns_no_floats_is_named(made: Callable[..., Any]) -> None:
    params = SamplingParams(max_tokens=2, logits_processors=(lambda _, scores: made(scores),))
    with pytest.raises(WrongType, match="must return scores, which are floats"):
        LLM(model_dir("aug")).generate("abcd", params)


# ---- files


def test_a_record_of_a_newer_linspec_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"format_version": "9.0", "plan": {}}))
    with pytest.raises(CheckpointError, match="linearize.json has format_version 9.0"):
        read_record(tmp_path)


def test_a_bad_drafter_is_found_before_the_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*args: object, **options: object) -> None:
        raise AssertionError("the long work began")

    monkeypatch.setattr("linspec.evaluate.quantize.evaluate", measured)
    with damaged("aug", "medusa/drafter.json", b"{}") as folder, pytest.raises(DrafterError):
        quantize(folder, tmp_path / "out", data="stdlib")
    assert not (tmp_path / "out").exists()


def test_resuming_says_which_entry_of_a_setting_differs() -> None:
    old = {"lr": 1e-3, "inner": [{"a": 1, "span": 2}]}
    new = {"lr": 1e-3, "inner": [{"a": 1, "span": 4}]}
    assert _difference("config", old, new) == ("config.inner.0.span", 2, 4)
    assert _difference("data", ["a"], ["a", "b"]) == ("data", ["a"], ["a", "b"])
    assert issubclass(TrainingError, LinspecError)
