"""proof.c, built and run: natively, under sanitizers, and on processors that this machine is not.

    python -m pytest -m slow -rs tests/kernels/test_proof.py

What is missing is skipped by name. On Debian, `apt-get install gcc-aarch64-linux-gnu qemu-user` brings
the cross compiler and the emulators.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from linspec.kernels.cpu import library

SOURCES = Path(library.__file__).parent / "csrc"
# as setup.py has them
FLAGS = ("-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wno-psabi")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# gcc takes buffers that a loop fills for uninitialized where it instruments the loop
SANITIZERS = (
    *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-Wno-maybe-uninitialized",
)
CROSS = "aarch64-linux-gnu-gcc"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def need(*tools: str) -> None:
    """Skip by name what this machine lacks."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def build(compiler: str, folder: Path, *flags: str, sources: Path = SOURCES) -> str:
    program = folder / "proof"
    files = [str(Path(__file__).parent / "proof.c"), *map(str, sorted(sources.glob("*.c")))]
    given = [*FLAGS, *WARNINGS, *flags, f"-I{sources}"]
    done = subprocess.run(
        [compiler, *given, *files, "-o", str(program), "-lm"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return str(program)


def sets_that_agree(*command: str) -> list[str]:
    """The instruction sets that the program found here and proved."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_all_sets_of_this_processor_give_the_bits_of_plain_c(compiler: str, tmp_path: Path) -> None:
    need(compiler)
    assert sets_that_agree(build(compiler, tmp_path))[-1] == "portable"


def test_all_sets_stay_within_their_memory(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, on buffers without a byte to spare."""
    need("cc")
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    probe = ["cc", *SANITIZERS, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("cc has no address and undefined-behaviour sanitizers")
    assert sets_that_agree(build("cc", tmp_path, *SANITIZERS))[-1] == "portable"


def test_a_ninth_product_in_sixteen_bits_is_seen(tmp_path: Path) -> None:
    """Eight pairs of products of 4-bit codes fit. One more changes nothing but what overflows."""
    need("cc")
    native = library.load().library
    if native is None or "avx2" not in library.instruction_sets(native):
        pytest.skip("this processor has no AVX2")
    changed = tmp_path / "csrc"
    shutil.copytree(SOURCES, changed)
    text = (changed / "isa_avx2.c").read_text()
    more = "_mm256_add_epi16(pairs, _mm256_set1_epi16(2 * 15 * 127))"
    for old, new in (
        ("sum = _mm256_madd_epi16(pairs,", f"sum = _mm256_madd_epi16({more},"),
        ("_mm256_set1_epi32(offset)", "_mm256_set1_epi32(offset - 2 * 2 * 15 * 127)"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (changed / "isa_avx2.c").write_text(text)
    done = subprocess.run(build("cc", tmp_path, sources=changed), capture_output=True, text=True)
    assert done.returncode == 1
    assert {line.split(":")[0] for line in done.stdout.splitlines() if "differs" in line} == {
        "avx2"
    }


# the second: others are late at once, so that threads are left out and leave
@pytest.mark.parametrize("patience", ["INT64_MAX", "20000"])
def test_threads_agree_on_what_they_share(patience: str, tmp_path: Path) -> None:
    """Under the thread sanitizer; with all threads even where other processes crowd them out, or fewer."""
    need("cc")
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    flags = (
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-Wno-maybe-uninitialized",
        f"-DLS_HELD_UP={patience}",
    )
    probe = ["cc", *flags, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("cc has no thread sanitizer")
    assert sets_that_agree(build("cc", tmp_path, *flags))[-1] == "portable"


@pytest.mark.parametrize(
    ("processor", "sets"),
    [("neoverse-n1", ["neon-dotprod", "portable"]), ("cortex-a53", ["portable"])],
)
@pytest.mark.parametrize("compiler", [CROSS, "clang"])
def test_64_bit_arm_with_and_without_dot_products(
    compiler: str, processor: str, sets: list[str], tmp_path: Path
) -> None:
    need(compiler, CROSS, "qemu-aarch64")
    target = ["--target=aarch64-linux-gnu"] if compiler == "clang" else []
    program = build(compiler, tmp_path, "-static", *target)
    assert sets_that_agree("qemu-aarch64", "-cpu", processor, program) == sets


@pytest.mark.parametrize(
    ("processor", "sets"), [("Haswell", ["avx2", "portable"]), ("Nehalem", ["portable"])]
)
def test_x86_processors_of_before(processor: str, sets: list[str], tmp_path: Path) -> None:
    """No instruction of a newer processor is met on the way to the choice, or after it."""
    need("cc", "qemu-x86_64")
    program = build("cc", tmp_path, "-static")
    assert sets_that_agree("qemu-x86_64", "-cpu", processor, program) == sets
