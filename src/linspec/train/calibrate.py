"""`linspec calibrate MODEL --attention lserve:budget=1024`: which KV heads recall, found by gates and kept.

    report = calibrate("smollm2", "lserve:budget=1024,exact=22")
    llm = LLM("smollm2", attention="lserve:budget=1024,exact=22")

The weights of the model stay as they are: only one gate for each KV head is trained (DuoAttention, Xiao et
al. 2024, arXiv 2410.10819; see `gates`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from linspec.checkpoints.calibration import (
    FILE,
    Calibration,
    calibration_folder,
    calibration_name,
    read_calibration,
)
from linspec.checkpoints.fingerprint import fingerprint, weight_fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer, resolve
from linspec.errors import ConfigError, TrainingError
from linspec.mixers.exact_heads import read_exact
from linspec.models.decoder import Decoder
from linspec.models.lserve import LserveOptions, check_plain, is_lserve, lserve_options
from linspec.models.sparse import sparse_mixer
from linspec.train.data import Sources, check_sources, end_of_text, tokenize, train_and_heldout
from linspec.train.exact_heads import context_of, find_heads, lengths_up_to
from linspec.train.gates import GateConfig, Gates
from linspec.train.run import make_accelerator, training_run
from linspec.utils.format_version import stamped
from linspec.utils.messages import shown
from linspec.utils.places import Place
from linspec.utils.sizes import check_instance, check_positive, check_size, check_sizes

_STEPS = "gate-steps.json"
# calibrations lie where they are looked for
_ELSEWHERE = "move the directory away"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """How long and on what gates are trained.

    steps, seconds: no more than these; the pull on the gates grows after a quarter of the steps. context:
    tokens of the longest text, None for 2,048 or as many as the model reads; batch_tokens: of a step.
    """

    steps: int = 400
    seconds: float | None = None
    context: int | None = None
    batch_tokens: int = 8192
    lr: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, "steps batch_tokens")
        check_sizes(self, "seed", least=0)
        if self.context is not None:
            check_size("context", self.context)
        check_positive("lr", self.lr)
        if self.seconds is not None:
            check_positive("seconds", self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was found, and where it is kept.

    reached: whether the mean gate came down to the share that was asked for before the steps ended; if not,
    the heads are those whose gates stood widest open.
    """

    out: Path
    heads: list[list[int]]
    steps: int
    reached: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "out": str(self.out)}


def calibrate(
    model: str | Path,
    attention: str,
    *,
    data: Sources = ("stdlib",),
    field: str = "text",
    config: CalibrateConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Calibrated:
    """Find the KV heads that `attention` needs to know of a model, and keep them where they are looked for.

    Args:
        model: a directory, a GGUF file or a name, all of whose layers are softmax.
        attention: 'lserve' with its options; 'exact' says how many heads, or which share.
        data, field: running text that the sentences to recall are hidden in.
        config: None for the defaults.
        resume: go on from the last step of a run that was stopped.
        overwrite: replace what was found before.

    Raises:
        ConfigError: this attention needs no calibration, does not fit the model, or there is one already.
        CheckpointError, InputError: the model or the data cannot be read. All before any long work.
        TrainingError: the loss is not finite, or there is nothing to resume.
    """
    check_instance("config", config, CalibrateConfig, none=True)
    check_instance("field", field, str)
    config, data, options = config or CalibrateConfig(), check_sources(data), _options(attention)
    teacher, tokenizer = load_model(model), load_tokenizer(model)
    check_tokenizer(tokenizer, teacher.config)
    check_plain(teacher.config, attention)
    count = _count(options, attention, teacher)
    context = context_of(config.context, teacher.config.max_positions)
    config = replace(config, context=context)
    source, known = resolve(model), fingerprint(teacher)
    out = calibration_folder(source, calibration_name(options, count), known)
    place = Place(
        out, "calibrate", holders=(source, *data), overwrite=overwrite, elsewhere=_ELSEWHERE
    )
    plan = {
        "target": known,
        "weights": weight_fingerprint(teacher),
        "count": count,
        "window": options.window,
        "sinks": options.sinks,
        "data": [str(each) for each in data],
        "field": field,
        # a run may be given more time when it is resumed
        "config": {k: v for k, v in asdict(config).items() if k != "seconds"},
    }
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise TrainingError("gates are trained by one process; start it without a launcher")
    with training_run(place, plan, FILE, resume=resume, accelerator=accelerator) as folder:
        if folder is not None:
            texts, _ = train_and_heldout(data, field)
            stream = tokenize(texts, tokenizer, end_of_text(tokenizer, teacher.config))
            gates = find_heads(
                teacher.to(accelerator.device).requires_grad_(False),
                tokenizer,
                stream,
                _gate_config(config, count),
                lengths=lengths_up_to(context),
                batch_tokens=config.batch_tokens,
                streaming=options.streaming,
                seed=config.seed,
                state=folder / _STEPS,
            )[count]
            _write(place, plan, gates)
    return _report(out)


def _options(attention: str) -> LserveOptions:
    """The options of an attention that is calibrated; raises ConfigError for any other one."""
    if is_lserve(attention):
        return lserve_options(attention)
    name = sparse_mixer(attention).name
    raise ConfigError(
        f"attention {name!r} needs no calibration: every verb takes --attention {shown(attention)} as it is. "
        "lserve:budget=1024 is what linspec calibrate finds heads for"
    )


def _count(options: LserveOptions, attention: str, teacher: Decoder) -> int:
    wanted = read_exact(options.exact, teacher.config)
    if isinstance(wanted, int):
        return wanted
    raise ConfigError(
        f"exact={options.exact} names the heads already: every verb takes --attention {shown(attention)} as "
        "it is. Give a number or a share to have them found"
    )


def _gate_config(config: CalibrateConfig, count: int) -> GateConfig:
    return GateConfig(
        counts=(count,),
        steps=config.steps,
        seconds=config.seconds,
        settle=config.steps // 4,
        lr=config.lr,
    )


def _write(place: Place, plan: dict[str, Any], gates: Gates) -> None:
    facts = {name: value for name, value in asdict(gates).items() if name != "heads"}
    known = {name: plan[name] for name in ("target", "weights")}
    found = Calibration(**known, heads=gates.heads, plan=plan, facts=facts)
    with place.replaced() as aside:
        text = json.dumps(stamped(asdict(found)), indent=1) + "\n"
        (aside / FILE).write_text(text, encoding="utf-8")


def _report(out: Path) -> Calibrated:
    found = read_calibration(out / FILE)
    return Calibrated(
        out=out,
        heads=[list(layer) for layer in found.heads],
        steps=int(found.facts.get("steps", 0)),
        reached=bool(found.facts.get("reached", True)),
    )
