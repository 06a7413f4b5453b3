"""A process that is killed while it saves models: forks one writer for every line on its input.

Every weight of model number n is n, so that a mixture of two models is seen.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import torch

import linspec.utils.files
from linspec.checkpoints.hub import save_model
from linspec.models.config import DecoderConfig
from linspec.models.decoder import Decoder

SHAPE = DecoderConfig(
    vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=16
)


def numbered(n: int) -> Decoder:
    """A model whose weights are all n."""
    model = Decoder(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(n)
    return model


def save(n: int, out: Path) -> None:
    """Save model number n over whatever model is there, in several files."""
    texts = {"number.txt": str(n)}
    save_model(numbered(n), None, out, extra_files=texts, shard_bytes=4000, overwrite=True)


def main() -> None:
    """For every line: fork a writer, which prints its process id and seconds per model; await its end."""
    out, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
    if not exchange:
        linspec.utils.files._exchange = lambda a, b: False
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    # what is imported at the first save is imported once, not by every writer
    save(0, out)
    for _ in sys.stdin:
        writer = os.fork()
        if writer == 0:
            began = time.monotonic()
            save(1, out)
            print(os.getpid(), time.monotonic() - began, flush=True)
            for n in itertools.count(2):
                save(n, out)
        os.waitpid(writer, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
