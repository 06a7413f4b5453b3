"""One training run in one output directory: a lock, what was asked for, and resuming.

While a run is under way `out/training/` holds `plan.json` (what was asked for) and a folder of
state for each stage. When the run is done its result carries the plan and `out/training/` is gone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from linspec.errors import TrainingError
from linspec.utils.border import read_json
from linspec.utils.files import replace_dir, replace_text, restored
from linspec.utils.format_version import KEY, check_format, stamped
from linspec.utils.messages import shown
from linspec.utils.places import TRAINING, Place, mark_folder

Plan = Mapping[str, Any]
# in the folder of a run under way
PLAN_FILE = "plan.json"
# of what is asked for, as linspec 0.1 wrote it
OLD_NAMES = {"rows": "exact_tokens"}
# what plans did not tell at first: older ones say nothing of it
NEWER_NAMES = ("source_weights", "dtype")


def make_accelerator() -> Accelerator:
    """The processes and the device of this run: a GPU if there is one, else the CPU."""
    return Accelerator(cpu=not torch.cuda.is_available())


@contextlib.contextmanager
def training_run(
    place: Place, plan: Plan, record: str, *, resume: bool, accelerator: Accelerator
) -> Iterator[Path | None]:
    """Yield the folder for the stages' states, or None when the run asked for is already done.

    record: name of the JSON file in the place that a finished run leaves, with its plan under "plan".
    Raises ConfigError when the place may not be written (see `Place`), TrainingError when there is
    nothing to resume or what is there was asked for differently.
    """
    plan = json.loads(json.dumps(plan))
    out, folder = place.path, place.path / TRAINING
    if resume and not restored(out).is_dir():
        raise TrainingError(f"nothing to resume in {out}; run without --resume first")
    main = accelerator.is_main_process
    with place.held(resume=resume) if main else contextlib.nullcontext():
        if resume and _is_done(out, plan, folder, record):
            yield None
            return
        if accelerator.is_main_process and not resume:
            # at once: a folder without its plan could neither be resumed nor told from one of others
            with replace_dir(folder) as aside:
                mark_folder(aside, place.kind)
                replace_text(aside / PLAN_FILE, json.dumps(stamped(plan), indent=2) + "\n")
        accelerator.wait_for_everyone()
        yield folder
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def begun(out: Path, record: str) -> bool:
    """Whether `out` holds a run that can be resumed: one under way, or a finished one."""
    return (out / TRAINING / PLAN_FILE).exists() or (out / record).exists()


def _is_done(out: Path, plan: Plan, folder: Path, record: str) -> bool:
    if (folder / PLAN_FILE).exists():
        _check_same(_read(folder / PLAN_FILE), plan, out)
        return False
    if not (out / record).exists():
        raise TrainingError(f"nothing to resume in {out}; run without --resume first")
    before = _read(out / record).get("plan", {})
    if not isinstance(before, dict):
        raise TrainingError(f"{out / record} holds no plan; run without --resume")
    _check_same(before, plan, out)
    return True


def _check_same(before: Plan, now: Plan, out: Path) -> None:
    before = {OLD_NAMES.get(name, name): value for name, value in before.items() if name != KEY}
    for key in dict.fromkeys((*now, *before)):
        if key in NEWER_NAMES and key not in before:
            continue
        if before.get(key) != now.get(key):
            name, old, new = _difference(key, before.get(key), now.get(key))
            raise TrainingError(
                f"the run in {out} was started with {name} = {shown(old)}, now it is "
                f"{shown(new)}; resume with the same settings, begin anew with --overwrite "
                "(overwrite=True in Python) instead of --resume, or use another --out"
            )


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first entry inside two unequal settings that differs: its name and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key), new.get(key)) for key in (*new, *old)}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = dict(enumerate(zip(old, new, strict=True)))
    else:
        return name, old, new
    inside = next((key for key, (a, b) in pairs.items() if a != b), None)
    return (name, old, new) if inside is None else _difference(f"{name}.{inside}", *pairs[inside])


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path, TrainingError)
    check_format(data, path, TrainingError)
    return data
