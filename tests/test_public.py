"""The public names, and what `import linspec` costs and brings."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import linspec
from linspec.integrations.transformers import register

PUBLIC = {
    "Batch",
    "Budget",
    "ChainDrafter",
    "ConfigError",
    "DRAFTERS",
    "Drafter",
    "DrafterContext",
    "EntrySpec",
    "Generation",
    "GenerationLoop",
    "Grammar",
    "LLM",
    "LOOPS",
    "LayerState",
    "LinearizeRecipe",
    "LinspecError",
    "LoopContext",
    "MIXERS",
    "Mixer",
    "Outcome",
    "POLICIES",
    "Piece",
    "Policy",
    "PolicyContext",
    "Request",
    "RunningSequence",
    "STATES",
    "SamplingParams",
    "SlotStates",
    "StateError",
    "StateOptions",
    "StateSnapshot",
    "StepInput",
    "Target",
    "TokenTree",
    "VERIFIERS",
    "Verifier",
    "Want",
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
    assert set(dir(linspec)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_importable(name: str) -> None:
    linspec.__dict__.pop(name, None)
    found = getattr(linspec, name)
    assert found is getattr(linspec, name)
    if name != "__version__":
        assert found.__doc__


def test_the_page_of_the_api_has_every_public_name_once() -> None:
    page = Path(__file__).parents[1] / "docs" / "api.md"
    listed = re.findall(r"^::: linspec\.(\w+)$", page.read_text(), flags=re.M)
    # not public itself, but its classes are what public names raise
    listed.remove("errors")
    assert sorted(listed) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_methods_have_docstrings(name: str) -> None:
    found = getattr(linspec, name)
    kind = found if isinstance(found, type) else type(found)
    owners = [owner for owner in kind.__mro__ if owner.__module__.startswith("linspec.")]
    bare = [
        f"{owner.__name__}.{key}"
        for owner in owners
        for key, member in vars(owner).items()
        if not key.startswith("_") and callable(getattr(owner, key))
        if not inspect.getdoc(getattr(member, "__func__", member))
    ]
    assert not bare


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        linspec.nothing  # noqa: B018


def test_version_of_a_tree_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    linspec.__dict__.pop("__version__", None)
    assert linspec.__version__ == "0+unknown"
    # the next test asks again
    del linspec.__version__


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
    # the package itself waits where nothing has imported transformers yet
    others = [each for each in sys.meta_path if type(each).__module__ != register.__name__]
    monkeypatch.setattr(sys, "meta_path", others)
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
