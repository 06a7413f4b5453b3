"""The page: what its files promise each other, and what nobody sees in a screenshot."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import linspec
from linspec.serve.loads import Loads
from linspec.serve.metrics import Metrics
from linspec.serve.seeing import PAGE, seeing

FILES = sorted(path.name for path in PAGE.iterdir())
TEXTS = {name: (PAGE / name).read_text(encoding="utf-8") for name in FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
HTML, CSS = TEXTS["index.html"], TEXTS["style.css"]
IDS = set(re.findall(r'\bid="([\w-]+)"', HTML))


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(seeing(Metrics(), Loads()))
    return TestClient(app)


def test_every_file_is_served_with_its_type_and_its_rules(client: TestClient) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "javascript", "svg": "image/svg+xml"}
    for name in FILES:
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200 and answer.text == TEXTS[name]
        assert kinds[name.rpartition(".")[2]] in answer.headers["content-type"]
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/").text == HTML


@pytest.mark.parametrize(
    "name", ["nothing.js", "%2e%2e%2fmetrics.py", "..%2fseeing.py", "x" * 5000]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code in (404, 307)


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/page/app.js").headers["etag"]
    assert client.get("/page/app.js", headers={"if-none-match": tag}).headers["etag"] == tag


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for name, text in TEXTS.items():
        addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        # the policy forbids both, and markup that comes from a model must stay text
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        ), name
    assert "<style" not in HTML and " style=" not in HTML and not re.search(r"\son\w+=", HTML)


def test_files_name_what_there_is() -> None:
    for name in re.findall(r'(?:src|href)="page/([\w.]+)"', HTML):
        assert name in FILES
    for text in SCRIPTS.values():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= set(FILES)
    asked = set(re.findall(r'\bat\("([\w-]+)"\)', "".join(SCRIPTS.values())))
    assert asked and asked <= IDS
    referred = re.findall(
        r'(?:for|aria-controls|aria-labelledby|aria-describedby)="([\w-]+)"', HTML
    )
    assert set(referred) <= IDS
    assert len(re.findall(r'\bid="', HTML)) == len(IDS)


def test_every_field_has_a_label_and_every_button_a_name() -> None:
    labelled = set(re.findall(r'<label[^>]*for="([\w-]+)"', HTML))
    inside = "".join(re.findall(r"<label.*?</label>", HTML, flags=re.S))
    for tag in re.findall(r"<(?:input|select|textarea)\b[^>]*>", HTML):
        own = re.search(r'id="([\w-]+)"', tag)
        assert tag in inside or (own and own[1] in labelled), tag
    for attributes, text in re.findall(r"<button\b([^>]*)>(.*?)</button>", HTML, flags=re.S):
        assert "aria-label" in attributes or re.sub(r"<[^>]+>", "", text).strip()
    assert 'aria-live="polite"' in HTML and 'lang="en"' in HTML and 'role="log"' in HTML


def themes() -> dict[str, dict[str, str]]:
    found = {}
    for name, block in (
        ("light", CSS.partition("}")[0]),
        ("dark", CSS.partition('[data-theme="dark"] {')[2].partition("}")[0]),
    ):
        found[name] = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block))
    assert set(found["light"]) == set(found["dark"])
    return found


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * each for each in colour[1:])
    parts = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_everything_that_it_stands_on(theme: str) -> None:
    colours = themes()[theme]
    hues = sum(name.startswith("tint-") for name in colours)
    grounds = ["paper", "raised", "sunk", *(f"tint-{n}" for n in range(hues))]
    for ground in grounds:
        assert contrast(colours["ink"], colours[ground]) >= 7, ground
    for ground in ("paper", "raised", "sunk"):
        for text in ("faint", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        # marks that are no text
        for mark in ("accent", *(f"edge-{n}" for n in range(hues))):
            assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def test_the_wheel_has_the_page() -> None:
    root = Path(linspec.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["linspec"]
    for name in FILES:
        assert any(fnmatch(f"serve/page/{name}", pattern) for pattern in patterns)
    assert sum(len(text) for text in TEXTS.values()) < 60_000
