"""A model that reads its past as `--attention` says, with what was found for the model where that is needed.

model = attending(load_model("smollm2"), "lserve:budget=1024", Path("smollm2.gguf"))
"""

from __future__ import annotations

from pathlib import Path

from linspec.checkpoints.calibration import calibrated_heads
from linspec.checkpoints.resolve import resolve
from linspec.mixers.exact_heads import read_exact
from linspec.models.decoder import Decoder
from linspec.models.lserve import check_plain, is_lserve, lserve_options, with_lserve
from linspec.models.sparse import check_causal, with_sparse_attention


def attending(model: Decoder, spec: str | None, source: object = None) -> Decoder:
    """`model` with this attention in the place of softmax, or the model itself where no spec is given.

    source: the name or path of the model, beside which its calibration may lie; anything else for none.
    Raises ConfigError for a spec that names none, a model that it does not fit or one that has to be
    calibrated first, and CheckpointError for a calibration of another model.
    """
    if spec is None:
        return model
    if not is_lserve(spec):
        return with_sparse_attention(model, spec)
    check_causal(model, spec)
    check_plain(model.config, spec)
    wanted = read_exact(lserve_options(spec).exact, model.config)
    if isinstance(wanted, int):
        place = resolve(source) if isinstance(source, str | Path) else None
        given = str(source) if place is not None else None
        wanted = calibrated_heads(model, spec, wanted, place, given)
    return with_lserve(model, spec, wanted)
