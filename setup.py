"""The CPU kernels, as an extension that an installation can do without.

All else about the package is in pyproject.toml. When no compiler is there, or it fails, setuptools
says so and goes on; linspec then computes with torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "src/linspec/kernels/cpu/csrc"


class BuildInParallel(build_ext):
    """Compiles a file on each core: four of them, one for each instruction set, take a minute."""

    def build_extensions(self) -> None:
        one_by_one = self.compiler.compile

        def compile_all(sources: Sequence[str], *args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: one_by_one([source], *args, **options), sources)
                return list(chain.from_iterable(made))

        self.compiler.compile = compile_all
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildInParallel},
    ext_modules=[
        # not a Python module: it is loaded by ctypes, so one build serves every Python and torch
        Extension(
            "linspec.kernels.cpu._native",
            sources=sorted(glob(f"{SOURCES}/*.c")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            # contraction would round differently from one instruction set to the next
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-pthread",
                "-Wno-psabi",
            ],
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ],
)
