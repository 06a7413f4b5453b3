"""The CPU kernels, as an extension that an installation can do without.

All else about the package is in pyproject.toml. When no compiler is there, or it fails, setuptools
says so and goes on; linspec then computes with torch.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

SOURCES = "src/linspec/kernels/cpu/csrc"

setup(
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
    ]
)
