"""The public names, and what `import linspec` costs and brings."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import linspec
from linspec.integrations.transformers import register

PUBLIC = {
    "DRAFTERS",
    "LLM",
    "MIXERS",
    "POLICIES",
    "STATES",
    "VERIFIERS",
    "Budget",
    "ChainDrafter",
    "Drafter",
    "DrafterContext",
    "EntrySpec",
    "Generation",
    "LayerState",
    "LinspecError",
    "Mixer",
    "Piece",
    "Policy",
    "PolicyContext",
    "RunningSequence",
    "SamplingParams",
    "SlotStates",
    "StateError",
    "StateOptions",
    "StateSnapshot",
    "TokenTree",
    "Verifier",
    "__version__",
    "linearize",
    "load",
    "load_model",
    "load_tokenizer",
    "option",
    "pretrain",
    "quantize",
    "save_model",
    "train_drafter",
}


def test_public_list_is_what_the_package_says() -> None:
    assert set(linspec.__all__) == PUBLIC
    assert set(linspec._HOMES) | {"__version__"} == PUBLIC
    assert set(dir(linspec)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_importable(name: str) -> None:
    linspec.__dict__.pop(name, None)
    found = getattr(linspec, name)
    assert found is getattr(linspec, name)
    if name != "__version__":
        assert found is getattr(import_module(linspec._HOMES[name]), name)
        assert found.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        linspec.nothing  # noqa: B018


def test_version_of_a_tree_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert linspec._version() == "0+unknown"


def test_type_marker_is_shipped() -> None:
    assert (Path(linspec.__file__).parent / "py.typed").exists()


def test_import_is_light_and_registers_when_transformers_comes() -> None:
    code = (
        "import sys, linspec\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert CONFIG_MAPPING['linspec'].__name__ == 'LinspecConfig'\n"
        "from linspec.integrations.transformers import register\n"
        "assert not any(type(f).__module__ == register.__name__ for f in sys.meta_path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for transformers' table and our module, which writes down that it was imported."""
    (tmp_path / "a_table.py").write_text("ready = True\n")
    (tmp_path / "our_entry.py").write_text("import a_table\nassert a_table.ready\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(register, "TABLE", "a_table")
    monkeypatch.setattr(register, "OURS", "our_entry")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("a_table", "our_entry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_registration_waits_for_the_table(tables: Path) -> None:
    before = list(sys.meta_path)
    register.register_when_loaded()
    register.register_when_loaded()
    assert len(sys.meta_path) == len(before) + 1
    assert "our_entry" not in sys.modules
    import_module("a_table")
    assert "our_entry" in sys.modules
    assert sys.meta_path == before


def test_registration_is_immediate_when_the_table_is_there(tables: Path) -> None:
    import_module("a_table")
    before = list(sys.meta_path)
    register.register_when_loaded()
    assert "our_entry" in sys.modules
    assert sys.meta_path == before


def test_registration_survives_a_failed_import(tables: Path) -> None:
    register.register_when_loaded()
    (tables / "a_table.py").write_text("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        import_module("a_table")
    assert "our_entry" not in sys.modules
    (tables / "a_table.py").write_text("ready = True  # now it is\n")
    import_module("a_table")
    assert "our_entry" in sys.modules
