"""Registries build plug-ins from one spec; what is wrong in one is named."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_dir
from hypothesis import given
from hypothesis import strategies as st

import linspec
from linspec import DRAFTERS, LLM, MIXERS, POLICIES, VERIFIERS
from linspec.cli.plugins import catalogue
from linspec.drafters import DrafterContext, make_drafter
from linspec.drafters.base import Drafter
from linspec.drafters.lookup import LookupOptions, PromptLookup
from linspec.errors import ConfigError, DrafterError, WrongType
from linspec.mixers.specs import leaves_span, make_mixer
from linspec.policies import make_policy
from linspec.policies.fixed import Fixed
from linspec.utils.options import option, parse_options, read_spec
from linspec.utils.registry import Registry
from linspec.verifiers import LosslessVerifier, TypicalVerifier, make_verifier


@dataclass(frozen=True)
class Settings:
    """One field of each type."""

    path: Path | None = option("a directory", default=None, short=True)
    count: int = option("a number", default=3)
    share: float = option("a share", default=0.5)
    on: bool = option("a switch", default=False)
    word: str = option("a word", default="w")
    rest: int | None = option("a number or none", default=7)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count must be 0 or more, got {self.count}")


def parsed(settings: str | None) -> Any:
    return parse_options(Settings, settings, "thing", "x")


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (None, {}),
        (
            "count=4,share=1e-3,on=true,word=a b",
            {"count": 4, "share": 1e-3, "on": True, "word": "a b"},
        ),
        ("count = -0 , on=False", {"count": 0}),
        ("rest=none", {"rest": None}),
        ("path=None", {}),
        ("/a/b", {"path": Path("/a/b")}),
        ("C:\\models\\x", {"path": Path("C:\\models\\x")}),
        ("/a,b/c:d,count=4", {"path": Path("/a,b/c:d"), "count": 4}),
        ("path=run=3/x,y", {"path": Path("run=3/x,y")}),
    ],
)
def test_a_spec_sets_fields_by_their_types(settings: str | None, changes: dict[str, Any]) -> None:
    assert parsed(settings) == Settings(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("", "nothing follows the colon"),
        ("coutn=4", "has no option 'coutn'; known: path, .*did you mean 'count'"),
        ("run=3/x", "has no option 'run'"),
        ("count=4,count=5", "count is given twice"),
        ("count=-1", "thing 'x:count=-1': count must be 0 or more, got -1"),
        ("count=4.0", "count must be a whole number of at most 18 digits, got '4.0'"),
        ("count=٣", "must be a whole number"),
        ("count=" + "9" * 5000, r"count must be .*\(5002 characters\)"),
        ("count=none", "must be a whole number"),
        ("rest=x", "a whole number of at most 18 digits or none, got 'x'"),
        ("share=nan", "share must be a finite number, got 'nan'"),
        ("share=1_0", "share must be a finite number"),
        ("on=1", "on must be true or false, got '1'"),
        ("word=", "word must be a text, got ''"),
        ("path=", "path must be a path or none, got ''"),
    ],
)
def test_a_wrong_setting_is_named(settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(settings)


@given(st.text(max_size=40))
def test_any_text_is_a_spec_or_a_named_error(text: str) -> None:
    registry: Registry[Any] = Registry("thing", beside=("none",))
    registry.register("x", summary="s", paper="-", options=Settings)(lambda options: options)  # type: ignore[arg-type, return-value]
    for spec in (text, f"x:{text}", f"x:count={text}", f"x:path={text}"):
        with contextlib.suppress(ConfigError):
            assert isinstance(registry.build(spec), Settings)


def test_what_was_written_for_a_path_is_what_arrives() -> None:
    assert read_spec("medusa:a:b") == ("medusa", "a:b")
    assert read_spec("medusa") == ("medusa", None)


def test_a_setting_that_has_to_be_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="policy 'fixed' needs nodes, .*: fixed:NODES"):
        POLICIES.read("fixed")
    for name in ("draft-model", "student"):
        with pytest.raises(DrafterError, match=f"needs a model directory: --drafter {name}:DIR"):
            LLM(model_dir("aug"), drafter=name)


def test_options_without_help_or_of_other_types_are_refused_when_they_are_registered() -> None:
    @dataclass(frozen=True)
    class Bare:
        x: int = 3

    @dataclass(frozen=True)
    class Strange:
        x: list[int] = option("numbers", default=())

    @dataclass
    class Loose:
        x: int = option("a number", default=3)

    for options, message in (
        (Bare, "option x has no help text"),
        (Strange, "an option is an int, float, bool, str or Path"),
        (Loose, "must be a frozen dataclass"),
    ):
        with pytest.raises(ConfigError, match=message):
            Registry[Any]("thing").register("x", summary="s", paper="-", options=options)


@pytest.mark.parametrize("name", ["none", "a:b", "a,b", "", "prompt-lookup"])
def test_names_that_no_spec_could_write_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        DRAFTERS.register(name, summary="s", paper="-")


def test_drafters_policies_verifiers_and_mixers_share_one_syntax() -> None:
    context = DrafterContext(None)  # type: ignore[arg-type]  # prompt-lookup asks nothing of its target
    made = make_drafter("prompt-lookup:max_ngram=4,tokens=8", context)
    assert isinstance(made, PromptLookup) and (made.max_ngram, made.max_nodes) == (4, 8)
    assert made.name == "prompt-lookup"
    assert make_drafter("none", context) is None and make_drafter(made, context) is made
    for text in ("5", "fixed:5", "fixed:nodes=5"):
        policy = make_policy(text, None)  # type: ignore[arg-type]  # the same for a fixed one
        assert isinstance(policy, Fixed) and policy.nodes == 5
    verifier = make_verifier("typical:epsilon=0.2")
    assert isinstance(verifier, TypicalVerifier) and verifier.options.epsilon == 0.2
    assert isinstance(make_verifier("lossless"), LosslessVerifier)
    assert make_verifier(verifier) is verifier
    assert make_mixer("aug:softmax") == make_mixer("aug")
    assert leaves_span("aug:own") and not leaves_span("aug:span=3")
    assert make_mixer("aug:own,taps=8", group=16) == make_mixer(
        "aug", kernel="own", taps=8, group=16
    )


@pytest.mark.parametrize(
    ("axis", "spec", "message"),
    [
        (DRAFTERS, "prompt-lookpu", "known: none, .*did you mean 'prompt-lookup'"),
        (DRAFTERS, "none:x=1", "drafter 'none' takes no options"),
        (DRAFTERS, "prompt-lookup:ngram=3", "has no option 'ngram'.*did you mean 'm.._ngram'"),
        (DRAFTERS, "prompt-lookup:4", "'4' is no setting; write key=value"),
        (DRAFTERS, "prompt-lookup:max_ngram=1", "min_ngram must be .*at most max_ngram"),
        (DRAFTERS, "prompt-lookup:tokens=64", "tokens must be in 1..63"),
        (POLICIES, "auto:x=1", "policy 'auto' has no option 'x'; it takes none"),
        (POLICIES, "aut", "a number of draft nodes, .*did you mean 'auto'"),
        (
            VERIFIERS,
            "typical:epsilon=2",
            "verifier 'typical:epsilon=2': epsilon must be between 0 and 1",
        ),
        (MIXERS, "aug:tap=3", "mixer 'aug' has no option 'tap'.*did you mean 'taps'"),
    ],
)
def test_unknown_names_and_keys_are_named_with_the_way_out(
    axis: Registry[Any], spec: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        axis.read(spec)


def test_a_policy_was_once_checked_only_where_a_drafter_needed_it() -> None:
    for policy, message in (
        ("aut", "did you mean 'auto'"),
        ("fixed:node=3", "did you mean 'nodes'"),
        (-1, "draft nodes must be 0 or more, got -1"),
        (64, "a tree holds at most 63 draft nodes, got 64"),
        ("fixed:1000", "a tree holds at most 63 draft nodes, got 1000; ask for fewer, or for auto"),
        (True, "nodes must be a whole number"),
        (10**30, "nodes must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model_dir("aug"), policy=policy)


def test_what_is_no_name_is_refused_by_its_type() -> None:
    with pytest.raises(WrongType, match="a drafter is a name"):
        make_drafter(3, DrafterContext(None))  # type: ignore[arg-type]
    with pytest.raises(WrongType, match="a verifier is a name"):
        make_verifier(3)  # type: ignore[arg-type]
    with pytest.raises(DrafterError, match="drafts for decoders"):
        make_drafter("medusa", DrafterContext(None))  # type: ignore[arg-type]


def test_the_catalogue_shows_every_option_with_default_and_help() -> None:
    found = catalogue()
    drafters = {each["name"]: each["options"] for each in found["drafters"]}
    assert drafters["prompt-lookup"][0] == {
        "name": "max_ngram",
        "kind": "int",
        "default": str(LookupOptions().max_ngram),
        "help": "tokens of the longest n-gram that is looked for",
    }
    policies = {each["name"]: each["options"] for each in found["policies"]}
    assert policies["fixed"][0]["default"] is None
    mixers = {each["name"]: [o["name"] for o in each["options"]] for each in found["mixers"]}
    assert "window" in mixers["window"] and "window" not in mixers["aug"]
    assert "features" in mixers["performer"] and "features" not in mixers["aug"]


SOUND = """
from linspec import DRAFTERS, ChainDrafter
@DRAFTERS.register("outside", summary="drafts nothing", paper="-", needs="nothing")
class Outside(ChainDrafter):
    def draft(self, rows, budgets):
        return [[] for _ in rows]
"""
MODULES = {
    "sound": SOUND,
    "broken": "raise RuntimeError('made for another version')",
    "empty": "",
    "ending": "raise SystemExit(3)",
    "doubled": SOUND.replace("outside", "medusa"),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with an installed package whose entry points are sound, broken, empty and doubled."""
    for name, text in MODULES.items():
        (tmp_path / f"guest_{name}.py").write_text(text)
    info = tmp_path / "guests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guests\nVersion: 1.0\n")
    names = [
        "outside = guest_sound",
        *(f"{n} = guest_{n}" for n in ("broken", "empty", "ending", "doubled")),
    ]
    (info / "entry_points.txt").write_text("\n".join(["[linspec.drafters]", *names]))
    return tmp_path


def test_plug_ins_of_other_packages_are_loaded_and_broken_ones_named(
    outside: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(outside)
    drafters: Registry[Drafter] = Registry("drafter", "linspec.drafters")
    drafters.register("medusa", summary="of the tree", paper="-")(DRAFTERS["medusa"])
    monkeypatch.setattr(linspec, "DRAFTERS", drafters)
    with caplog.at_level(logging.WARNING, "linspec"):
        assert "outside" in drafters.names() and "medusa" in drafters
    assert len(caplog.messages) == 4
    for name, message in (
        ("broken", "'broken' of package 'guests' cannot be used: RuntimeError: .*another version"),
        ("empty", "guest_empty registers no such name"),
        ("ending", "SystemExit"),
        ("doubled", "'medusa' is registered twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            drafters.read(name)
    for module in MODULES:
        sys.modules.pop(f"guest_{module}", None)


def test_a_plug_in_of_another_package_is_loaded_without_the_others(
    outside: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(outside)
    drafters: Registry[Drafter] = Registry("drafter", "linspec.drafters")
    monkeypatch.setattr(linspec, "DRAFTERS", drafters)
    # nothing is imported to say that there is no such name, and the names are known all the same
    with pytest.raises(ConfigError, match=r"known: .*broken, .*did you mean 'outside'"):
        drafters.read("outsid")
    assert not [name for name in sys.modules if name.startswith("guest_")]
    assert drafters.read("outside")[0].name == "outside"
    assert [name for name in sys.modules if name.startswith("guest_")] == ["guest_sound"]
    assert not caplog.messages
    sys.modules.pop("guest_sound")


def test_the_command_line_runs_a_plug_in_of_another_package(outside: Path) -> None:
    where = os.pathsep.join([str(outside), str(Path(linspec.__file__).parents[1])])
    command = "generate --prompt abcd --drafter outside --policy fixed:3 --max-tokens 3 --json"
    done = subprocess.run(
        [sys.executable, "-m", "linspec", *command.split(), model_dir("aug")],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"token_ids"' in done.stdout
