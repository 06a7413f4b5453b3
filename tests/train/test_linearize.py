"""Linearization: both stages learn, a killed run resumes exactly, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linspec.checkpoints.hub import load_config, load_model, load_tokenizer, save_model
from linspec.errors import CheckpointError, ConfigError, InputError, TrainingError
from linspec.mixers import MIXERS
from linspec.mixers.config import MixerConfig
from linspec.mixers.specs import make_mixer
from linspec.models.decoder import Decoder
from linspec.train import linearize as module
from linspec.train import loop
from linspec.train.finetune import add_lora, finetune_loss, merge_lora
from linspec.train.linearize import continue_training, linearize
from linspec.train.linearize_config import LinearizeConfig
from linspec.train.linearize_heads import linearize_heads
from linspec.train.student import changed_layers, student_mixers, with_mixers
from linspec.train.transfer import Transfer, relative_error
from linspec.utils.files import exclusive

SHORT = LinearizeConfig(
    tokens=16 * 256,
    transfer_share=0.5,
    context=64,
    batch_tokens=256,
    lr=3e-3,
    transfer_lr=1e-2,
    warmup=2,
    precision="float32",
    save_every=0.0,
)
AUG = MixerConfig(name="aug", group=8, taps=4)
Same = Callable[[nn.Module, nn.Module], None]
NoTraining = Callable[[], AbstractContextManager[None]]


def run(source: Path, out: Path, corpus: Path, **options: Any) -> Path:
    options = {"mixer": AUG, "config": SHORT, "data": [corpus]} | options
    return linearize(source, out, **options)


def ids(seed: int = 0, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 290, (rows, 33), generator=torch.Generator().manual_seed(seed))


# ---- the whole


def test_linearized_model_loads_and_says_what_was_done(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus, keep_softmax=(1,))
    assert load_config(out).mixers == (AUG, MixerConfig())
    record = json.loads((out / "linearize.json").read_text())
    assert record["tokens"] == {"transfer": 8 * 256, "finetune": 8 * 256}
    assert set(record["losses"]) == {"transfer", "finetune"}
    stages = [json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert set(stages) == {"transfer", "finetune"}
    assert not (out / "training").exists()
    before, after = load_model(teacher_dir), load_model(out)
    assert after.blocks[0].mixer.taps.abs().sum() > 0
    assert not torch.equal(before.embed.weight, after.embed.weight)


def test_both_stages_lower_their_loss(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    longer = replace(SHORT, tokens=80 * 256, lr=1e-2)
    out = run(teacher_dir, tmp_path / "s", corpus, config=longer)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for stage in ("transfer", "finetune"):
        losses = [entry["loss"] for entry in log if entry["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.crossed(2)
# the first eight updates are those of the transfer stage
@pytest.mark.parametrize("update", [0, 5, 8, 11])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_killed_run_resumes_bit_for_bit(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    killed_before: Callable[[int], AbstractContextManager[None]],
    assert_same: Same,
    update: int,
    lora_rank: int,
) -> None:
    config = replace(SHORT, lora_rank=lora_rank)
    whole = run(teacher_dir, tmp_path / "whole", corpus, config=config)
    with pytest.raises(RuntimeError, match="killed"), killed_before(update):
        run(teacher_dir, tmp_path / "cut", corpus, config=config)
    cut = run(teacher_dir, tmp_path / "cut", corpus, config=config, resume=True)
    assert_same(load_model(whole), load_model(cut))


def test_finished_run_resumes_at_once(
    teacher_dir: Path, tmp_path: Path, corpus: Path, no_training: NoTraining
) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus)
    with no_training():
        assert run(teacher_dir, tmp_path / "s", corpus, resume=True) == out


def test_full_disk_at_the_last_save_loses_no_training(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_training: NoTraining,
    assert_same: Same,
) -> None:
    whole = run(teacher_dir, tmp_path / "whole", corpus)

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointError("could not write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(teacher_dir, tmp_path / "s", corpus)
    with no_training():
        resumed = run(teacher_dir, tmp_path / "s", corpus, resume=True)
    assert_same(load_model(whole), load_model(resumed))


def test_full_disk_shows_before_the_first_step(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_training: NoTraining,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"), no_training():
        run(teacher_dir, tmp_path / "s", corpus)


def test_new_run_keeps_the_old_model_until_it_is_done(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    no_training: NoTraining,
    assert_same: Same,
) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus)
    before = load_model(out)
    with pytest.raises(RuntimeError, match="killed"), no_training():
        run(teacher_dir, out, corpus, config=replace(SHORT, seed=1), overwrite=True)
    assert_same(load_model(out), before)


# ---- what is refused


def test_resuming_with_other_settings_names_the_setting(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus)
    with pytest.raises(TrainingError, match="started with mixers.* anew with --overwrite"):
        run(teacher_dir, out, corpus, mixer="local", resume=True)
    with pytest.raises(TrainingError, match="started with config"):
        run(teacher_dir, out, corpus, config=replace(SHORT, seed=9), resume=True)


def test_a_run_does_not_go_on_with_another_teacher_of_the_same_name(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    """The rest of it once learned from the new one, without a word."""
    source = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    out = run(source, tmp_path / "s", corpus)
    changed = load_model(source)
    with torch.no_grad():
        changed.blocks[0].mixer.v.weight.mul_(1.5)
    save_model(changed, load_tokenizer(source), tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "model.safetensors", source / "model.safetensors")
    with pytest.raises(TrainingError, match="started with source_weights"):
        run(source, out, corpus, resume=True)
    # what older versions wrote says nothing of it
    record = json.loads((out / "linearize.json").read_text())
    del record["plan"]["source_weights"], record["plan"]["dtype"]
    (out / "linearize.json").write_text(json.dumps(record))
    assert run(source, out, corpus, resume=True) == out


def test_nothing_to_resume(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        run(teacher_dir, tmp_path / "s", corpus, resume=True)
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    with pytest.raises(TrainingError, match="nothing to resume"):
        run(teacher_dir, tmp_path / "s", corpus, resume=True)


def test_output_in_use(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    with exclusive(tmp_path / "s"), pytest.raises(CheckpointError, match="in use.*--overwrite"):
        run(teacher_dir, tmp_path / "s", corpus)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixer": "mamba"}, ConfigError, "unknown mixer 'mamba'; known: aug"),
        ({"mixer": MixerConfig(name="mamba")}, ConfigError, "unknown mixer 'mamba'"),
        ({"mixer": "aug", "keep": 2}, ConfigError, "mixer 'aug' has no 'keep' to set, got 2"),
        ({"mixer": "local", "features": 2}, ConfigError, "mixer 'local' has no 'features'"),
        ({"mixer": "relu", "mixer_seed": 2}, ConfigError, "mixer 'relu' has no 'seed'"),
        ({"keep_softmax": (2,)}, ConfigError, r"no layer 2: layers are 0\.\.1"),
        ({"data": ["/nowhere"]}, InputError, "nowhere does not exist"),
        (
            {"config": replace(SHORT, context=256)},
            ConfigError,
            "beyond the teacher's 128 positions",
        ),
        (
            {"mixer": "aug", "taps": SHORT.context + 1},
            ConfigError,
            f"longer than the {SHORT.context} tokens of a training text",
        ),
    ],
)
def test_bad_input_is_refused(
    teacher_dir: Path,
    tmp_path: Path,
    corpus: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run(teacher_dir, tmp_path / "s", corpus, **options)


def test_a_source_without_softmax_lost_what_was_searched(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    student = run(teacher_dir, tmp_path / "s", corpus)
    with pytest.raises(
        ConfigError, match="no layer of this source has softmax .* mixers are aug; "
    ):
        run(student, tmp_path / "again", corpus, mixer="relu")
    with pytest.raises(ConfigError, match="linearize the model that it was made from"):
        linearize_heads(student, tmp_path / "heads", exact="1", data=[corpus])
    # some layer is softmax, or nothing changes
    mixed = run(teacher_dir, tmp_path / "mixed", corpus, keep_softmax=(0,))
    for source, kept in ((mixed, (0,)), (student, (0, 1))):
        out = tmp_path / f"{source.name}-again"
        assert run(source, out, corpus, mixer="relu", keep_softmax=kept) == out


def test_source_is_never_overwritten(teacher_dir: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="is itself an input of this command"):
        run(teacher_dir, teacher_dir / ".." / "teacher", corpus)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"transfer_share": 1.5}, {"kl_weight": -1.0}, {"lora_rank": -1}]
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LinearizeConfig(**wrong)


# ---- the control


@pytest.mark.parametrize("by_name", [True, False])
def test_control_trains_the_teacher_on_for_the_same_tokens(
    teacher_dir: Path, tmp_path: Path, corpus: Path, by_name: bool
) -> None:
    if by_name:
        out = run(teacher_dir, tmp_path / "c", corpus, mixer="softmax")
    else:
        out = continue_training(teacher_dir, tmp_path / "c", data=[corpus], config=SHORT)
    assert load_config(out).mixers == load_config(teacher_dir).mixers
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((out / "linearize.json").read_text())["tokens"] == {"finetune": 16 * 256}


def test_control_has_no_teacher_in_its_loss(
    teacher_dir: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []

    def spy(student: Decoder, batch: torch.Tensor, teacher: Any, kl_weight: float) -> torch.Tensor:
        teachers.append(teacher)
        return finetune_loss(student, batch, teacher, kl_weight)

    monkeypatch.setattr(module, "finetune_loss", spy)
    run(teacher_dir, tmp_path / "c", corpus, mixer="softmax")
    assert teachers and not any(teachers)


# ---- the parts


def test_mixers_by_name() -> None:
    assert make_mixer("aug") == MixerConfig(name="aug", group=64, span=2, kernel="softmax", taps=32)
    assert make_mixer("relu", group=16) == MixerConfig(name="relu", group=16)
    assert make_mixer("local", span=1, kernel="own") == MixerConfig(name="local", group=64)
    assert make_mixer("local", taps=8).taps == 8
    assert make_mixer("window").window == 64
    assert make_mixer("gla") == MixerConfig(name="gla", span=2, kernel="softmax")
    assert make_mixer("hedgehog") == MixerConfig(name="hedgehog", span=2)
    assert make_mixer("performer", kernel="relu2").kernel == "relu2"
    assert make_mixer("linformer", features=4, keep=2) == MixerConfig(
        name="linformer", span=2, features=4, keep=2
    )
    assert make_mixer("rfa", seed=3).seed == 3


@pytest.mark.parametrize("name", [name for name in MIXERS.names() if name != "softmax"])
def test_the_transfer_stage_trains_every_weight_of_a_new_mixer(
    name: str, tiny_teacher: Callable[..., Decoder]
) -> None:
    teacher = tiny_teacher()
    wanted = make_mixer(name, group=8)
    student = with_mixers(teacher, student_mixers(teacher.config, wanted, ()))
    with Transfer(teacher, student, range(teacher.config.layers)) as transfer:
        loss = transfer.loss(torch.arange(34).view(2, 17) % teacher.config.vocab_size)
        loss.backward()
        assert loss.isfinite()
        for weight, parameter in transfer.parameters().named_parameters():
            assert parameter.grad is not None, weight
            assert parameter.grad.isfinite().all(), weight


def test_lora_leaves_the_mixers_own_weights_trainable(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    student = with_mixers(tiny_teacher(), (make_mixer("hedgehog"), make_mixer("gla")))
    trained = {n for n, p in add_lora(student, 2, 4, seed=0).named_parameters() if p.requires_grad}
    for weight in ("0.mixer.query_map", "0.mixer.gamma", "1.mixer.gate_bias", "1.mixer.alpha"):
        assert any(name.endswith(weight) for name in trained), weight


def test_a_student_next_to_its_teacher_is_finetuned_gently() -> None:
    close = LinearizeConfig().completed([make_mixer("aug")])
    far = LinearizeConfig().completed([make_mixer("aug", kernel="own")])
    assert close.transfer_share == 0
    assert far.transfer_share == 0.4
    assert close.lr is not None and far.lr is not None and close.lr < far.lr
    given = LinearizeConfig(transfer_share=0.3, lr=1e-3)
    assert given.completed([make_mixer("aug")]) == given


def test_softmax_equals_softmax_whatever_the_group(tiny_teacher: Callable[..., Decoder]) -> None:
    config = tiny_teacher().config
    mixers = student_mixers(config, make_mixer("softmax", group=8), ())
    assert changed_layers(config, config.with_mixers(mixers)) == []


def test_student_starts_with_the_teachers_weights(tiny_teacher: Callable[..., Decoder]) -> None:
    teacher = tiny_teacher()
    student = with_mixers(teacher, (AUG, AUG))
    ours = dict(student.named_parameters())
    for name, weight in teacher.named_parameters():
        assert torch.equal(weight, ours.pop(name))
    assert set(ours) == {f"blocks.{i}.mixer.{name}" for i in (0, 1) for name in ("alpha", "taps")}
    assert not any(weight.any() for weight in ours.values())


def test_transfer_loss_is_zero_for_equal_mixers(tiny_teacher: Callable[..., Decoder]) -> None:
    teacher = tiny_teacher()
    with Transfer(teacher, tiny_teacher(), (0, 1)) as transfer:
        assert transfer.loss(ids()).item() < 1e-10
    assert not any(block.mixer._forward_hooks for block in teacher.blocks)


def test_transfer_loss_is_the_mean_error_of_the_layers(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    teacher, student = tiny_teacher(), with_mixers(tiny_teacher(), (AUG, AUG))
    batch = ids()
    with Transfer(teacher, student, (0, 1)) as both, torch.no_grad():
        together = both.loss(batch)
    alone = []
    for layer in (0, 1):
        with Transfer(teacher, student, (layer,)) as one, torch.no_grad():
            alone.append(one.loss(batch))
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_transfer_trains_mixers_only(tiny_teacher: Callable[..., Decoder]) -> None:
    teacher = tiny_teacher().requires_grad_(False)
    student = with_mixers(teacher, (AUG, AUG))
    with Transfer(teacher, student, (1,)) as transfer:
        transfer.loss(ids()).backward()
    moved = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert moved == {n for n, _ in student.named_parameters() if n.startswith("blocks.1.mixer.")}


def test_silence_has_a_relative_error_of_one() -> None:
    wanted = torch.randn(5, 7)
    assert relative_error(torch.zeros(5, 7), wanted).item() == pytest.approx(1.0)


def test_kl_to_an_equal_teacher_is_zero(tiny_teacher: Callable[..., Decoder]) -> None:
    student, teacher = tiny_teacher(), tiny_teacher()
    plain = finetune_loss(student, ids())
    torch.testing.assert_close(finetune_loss(student, ids(), teacher, 5.0), plain)


def test_finetune_loss_is_cross_entropy_plus_weighted_kl(
    tiny_teacher: Callable[..., Decoder],
) -> None:
    student, teacher, batch = tiny_teacher(seed=1), tiny_teacher(), ids()
    ours, theirs = (model(batch[:, :-1]).log_softmax(-1) for model in (student, teacher))
    ce = -ours.gather(-1, batch[:, 1:, None]).mean()
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    torch.testing.assert_close(finetune_loss(student, batch, teacher, 0.7), ce + 0.7 * kl)


def test_lora_trains_what_the_paper_trains(tiny_teacher: Callable[..., Decoder]) -> None:
    student = with_mixers(tiny_teacher(), (AUG, AUG))
    adapted = add_lora(student, 4, 8, seed=0)
    trained = {n.rsplit("blocks.", 1)[-1] for n, p in adapted.named_parameters() if p.requires_grad}
    assert {"0.mixer.alpha", "0.mixer.taps", "0.mixer_norm.weight", "1.mlp_norm.weight"} <= trained
    assert any(n.endswith("embed.weight") for n in trained)
    assert any("mixer.q.lora_A" in n for n in trained)
    assert not any("mlp.up" in n or "base_layer" in n for n in trained)


def test_lora_start_depends_on_its_seed_only(tiny_teacher: Callable[..., Decoder]) -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)
        adapted = add_lora(tiny_teacher(), 4, 8, seed=seed % 2)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    assert torch.equal(start(0), start(2)) and not torch.equal(start(0), start(1))


def test_merged_lora_gives_the_same_logits(tiny_teacher: Callable[..., Decoder]) -> None:
    student = with_mixers(tiny_teacher(), (AUG, MixerConfig()))
    names = set(student.state_dict())
    adapted = add_lora(student, 4, 8, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        before = student(ids())
        merged = merge_lora(adapted)
        torch.testing.assert_close(merged(ids()), before, rtol=0, atol=1e-5 * before.abs().max())
    assert type(merged) is Decoder and set(merged.state_dict()) == names
    assert torch.equal(merged.head.weight, merged.embed.weight)


# ---- several processes

SCRIPT = """
import sys
from linspec.mixers.config import MixerConfig
from linspec.train.linearize import linearize
from linspec.train.linearize_config import LinearizeConfig
config = LinearizeConfig(tokens=8 * 256, context=64, batch_tokens=256, precision="float32")
linearize(sys.argv[1], sys.argv[2], data=[sys.argv[3]], config=config,
          mixer=MixerConfig(name="aug", group=8, taps=4))
"""


@pytest.mark.slow
def test_two_processes_train_one_model(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # what `accelerate launch` starts for several GPUs; on a CPU it is started by name
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(script), str(teacher_dir), str(tmp_path / "s"), str(corpus)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "s" / "linearize.json").read_text())
    assert sum(record["tokens"].values()) == 2 * 8 * 256
    load_model(tmp_path / "s")


def test_spans_may_be_given_for_each_layer(teacher_dir: Path, tmp_path: Path, corpus: Path) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus, mixer="aug", group=8, span=[1, 3])
    assert [mixer.span for mixer in load_config(out).mixers] == [1, 3]
    with pytest.raises(ConfigError, match="3 spans given for 2 layers"):
        run(teacher_dir, tmp_path / "t", corpus, mixer="aug", span=[1, 2, 3])


def test_the_layers_that_need_it_most_stay_softmax(
    teacher_dir: Path, tmp_path: Path, corpus: Path
) -> None:
    out = run(teacher_dir, tmp_path / "s", corpus, mixer="aug", group=8, softmax_layers=1)
    assert sorted(mixer.name for mixer in load_config(out).mixers) == ["aug", "softmax"]
    with pytest.raises(ConfigError, match=r"softmax_layers must be in 0\.\.1, got 2"):
        run(teacher_dir, tmp_path / "t", corpus, mixer="aug", softmax_layers=2)
