"""The paper's tables at the size of the machine: `linspec study`.

A table is a class in a file of its own, registered in `TABLES`: it lists its cells, measures one, and
says how the measured ones are shown. Everything else (order, cache, budget, page) is here once.
"""

from linspec.evaluate.study import (
    design,
    encoders,
    flash,
    latency,
    quality,
    recipes,
    seq2seq,
    speculation,
)
from linspec.evaluate.study.plan import SIZES, Plan, Size, make_plan
from linspec.evaluate.study.run import study
from linspec.evaluate.study.table import TABLES, Table

__all__ = [
    "SIZES",
    "TABLES",
    "Plan",
    "Size",
    "Table",
    "design",
    "encoders",
    "flash",
    "latency",
    "make_plan",
    "quality",
    "recipes",
    "seq2seq",
    "speculation",
    "study",
]
