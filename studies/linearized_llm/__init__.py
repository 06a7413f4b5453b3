"""The paper's tables at the size of the machine: `python -m studies.linearized_llm`.

A table is a class in a file of its own, registered in `TABLES`: it lists its cells, measures one, and
says how the measured ones are shown. Everything else (order, cache, budget, page) is here once.
"""

from studies.linearized_llm import (
    design,
    encoders,
    flash,
    latency,
    quality,
    recipes,
    seq2seq,
    speculation,
)
from studies.linearized_llm.plan import SIZES, Plan, Size, make_plan
from studies.linearized_llm.run import study
from studies.linearized_llm.table import TABLES, Table

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
