"""`linspec linearize MODEL --exact-heads 11`: a model of which few KV heads see everything.

    linearize_heads("smollm2", "small", exact="11")

Gates find the heads, KL makes what is left match the teacher (see `exact_heads`). Of a model that a package
holds a *delta* is written, a few megabytes that need the package's own file; of any other the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from linspec.checkpoints.fingerprint import source_fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer
from linspec.errors import ConfigError, TrainingError
from linspec.mixers.config import MixerConfig
from linspec.mixers.exact_heads import Heads, read_exact
from linspec.mixers.specs import DEFAULT_GROUP, make_mixer
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder
from linspec.train.changed_model import save_changed
from linspec.train.compiled import check_choice
from linspec.train.data import Sources, check_sources, end_of_text, tokenize, train_and_heldout
from linspec.train.exact_heads import (
    context_of,
    exact_student,
    find_heads,
    lengths_up_to,
    match_teacher,
    needle_windows,
)
from linspec.train.gates import GateConfig
from linspec.train.linearize_record import RECORD, output_place, record_files
from linspec.train.loop import TrainConfig
from linspec.train.precision import check_precision
from linspec.train.run import make_accelerator, training_run
from linspec.train.student import check_softmax
from linspec.utils.border import read_json
from linspec.utils.files import replace_text
from linspec.utils.messages import shown
from linspec.utils.places import Place
from linspec.utils.sizes import check_instance, check_positive, check_share, check_size, check_sizes

_GATES, _STEPS = "gates.json", "gate-steps.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """How long and how to train.

    window: tokens that heads which are not exact see at most, their own group of 64 included, beside the
    first four of the text. gate_steps: to find the heads, at most; 0 tokens leave the student untrained.
    context: tokens of a training window, None for 2,048 or as many as the model reads; batch_tokens: of a
    step. recall_share: of the windows, how many are chats that ask for what stood far above.
    """

    window: int = 256
    gate_steps: int = 400
    tokens: int = 2_200_000
    context: int | None = None
    batch_tokens: int = 8192
    lr: float = 1e-3
    recall_share: float = 0.25
    precision: str = "auto"
    compile: str = "off"
    save_every: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.compile)
        check_precision(self.precision)
        check_positive("save_every", self.save_every, zero=True)
        if self.window < DEFAULT_GROUP or self.window % DEFAULT_GROUP:
            raise ConfigError(
                f"window must be a multiple of the {DEFAULT_GROUP} tokens of a group, got "
                f"{shown(repr(self.window))}"
            )
        check_sizes(self, "gate_steps batch_tokens")
        if self.context is not None:
            check_size("context", self.context)
        check_sizes(self, "tokens seed", least=0)
        check_positive("lr", self.lr)
        check_share("recall_share", self.recall_share)

    @property
    def streaming(self) -> MixerConfig:
        """The mixer of heads that are not exact."""
        return make_mixer("streaming", span=self.window // DEFAULT_GROUP)

    @property
    def window_tokens(self) -> int:
        """The context, once it is known."""
        assert self.context is not None, "the model says it"
        return self.context

    @property
    def rows(self) -> int:
        """Windows of a step."""
        return max(1, self.batch_tokens // self.window_tokens)

    @property
    def train(self) -> TrainConfig | None:
        """Settings of the training loop; None where nothing is trained."""
        steps = round(self.tokens / (self.rows * self.window_tokens))
        if not steps:
            return None
        return TrainConfig(
            steps=steps,
            lr=self.lr,
            warmup=10,
            precision=self.precision,
            compile=self.compile,
            save_every=self.save_every,
            seed=self.seed,
        )


def linearize_heads(
    source: str | Path,
    out: str | Path,
    *,
    exact: str,
    data: Sources = ("stdlib",),
    field: str = "text",
    config: HeadsConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write `source` with few exact KV heads into `out`; returns it.

    exact: how many, as a number ('11'), a share ('12%'), 'layers:0,7' for all heads of some layers, or
    'all-linear' for none. data, field, resume, overwrite: as in `linearize`. Raises ConfigError,
    CheckpointError or InputError before any long work.
    """
    check_instance("config", config, HeadsConfig, none=True)
    check_instance("field", field, str)
    config = config or HeadsConfig()
    data = check_sources(data)
    place = output_place(out, source, data, overwrite)
    place.check(resume=resume)
    teacher, tokenizer = load_model(source), load_tokenizer(source)
    check_tokenizer(tokenizer, teacher.config)
    check_softmax(teacher.config)
    wanted = read_exact(exact, teacher.config)
    config = replace(config, context=context_of(config.context, teacher.config.max_positions))
    plan = {
        "source": str(source),
        "source_weights": source_fingerprint(teacher),
        "exact": exact,
        "data": [str(d) for d in data],
        "field": field,
        "config": asdict(config),
    }
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("exact heads are trained by one process; start it without a launcher")
    with training_run(place, plan, RECORD, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            teacher.to(accelerator.device).requires_grad_(False)
            task = _Task(teacher, tokenizer, config, folder)
            task.run(wanted, _stream(data, field, tokenizer, teacher.config), resume=resume)
            task.save(source, place, plan)
    return place.path


def _stream(
    data: Sequence[str | Path], field: str, tokenizer: PreTrainedTokenizerBase, model: DecoderConfig
) -> np.ndarray:
    texts, _ = train_and_heldout(data, field)
    return tokenize(texts, tokenizer, end_of_text(tokenizer, model))


@dataclass
class _Task:
    """One linearization: the student, and what is known of how it came about."""

    teacher: Decoder
    tokenizer: PreTrainedTokenizerBase
    config: HeadsConfig
    folder: Path

    def run(self, wanted: int | Heads, stream: np.ndarray, *, resume: bool) -> None:
        """Find the heads where only their number is known, then train."""
        heads = self._found(wanted, stream) if isinstance(wanted, int) else wanted
        self.student = exact_student(self.teacher, heads, self.config.streaming)
        self.heads, self.log = heads, []
        train = self.config.train
        if train is None:
            return
        windows = needle_windows(
            self.tokenizer,
            stream,
            self.config.window_tokens,
            self.config.recall_share,
            seed=train.seed,
        )
        self.log = match_teacher(
            self.teacher,
            self.student,
            windows,
            train,
            self.folder / "match",
            rows=self.config.rows,
            label="match",
            resume=resume,
        )

    def _found(self, count: int, stream: np.ndarray) -> Heads:
        """The heads that gates choose; kept, so that a run that is resumed has the same."""
        path = self.folder / _GATES
        if not path.exists():
            gates = find_heads(
                self.teacher,
                self.tokenizer,
                stream,
                GateConfig(counts=(count,), steps=self.config.gate_steps),
                lengths=lengths_up_to(self.config.window_tokens),
                batch_tokens=self.config.batch_tokens,
                streaming=self.config.streaming,
                seed=self.config.seed,
                state=self.folder / _STEPS,
            )[count]
            replace_text(path, json.dumps(asdict(gates)) + "\n")
        kept = read_json(path, TrainingError)["heads"]
        return tuple(tuple(layer) for layer in kept)

    def save(self, source: str | Path, place: Place, plan: dict[str, Any]) -> None:
        """A delta where the source is a package's file, else the model."""
        size = sum(p.numel() for p in self.teacher.parameters())
        facts = {"heads": [list(layer) for layer in self.heads]}
        logs = {"match": self.log} if self.log else {}
        files = record_files(plan, plan, logs, size, **facts)
        save_changed(self.student, source, self.tokenizer, place, files=files, facts=facts)
