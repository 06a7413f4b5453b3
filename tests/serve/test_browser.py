"""The page in a real browser: Chromium through Playwright, against a server of this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from api_server import running

from linspec.llm import LLM
from linspec.serve.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
# Debian's; Playwright's own is taken where it was installed
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "class Stack:\n    def push(self, x):"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of the embedded model, which continues texts and knows no turns."""
    llm = LLM("embedded-aug", drafter="suffix+medusa", policy=6, max_batch=2)
    with running({"embedded-aug": llm}) as (found, _):
        yield f"{found}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get("LINSPEC_CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    with playwright.sync_playwright() as driver:
        try:
            made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser can be started: {str(error).splitlines()[0]}")
        yield made
        made.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page, connected; errors that it reports fail the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    # a refusal is an answer
    refused = "Failed to load resource: the server responded with a status of 400"
    page.goto(address)
    page.wait_for_selector("figure output:not(:empty)", state="attached")
    page.wait_for_selector(".welcome:has-text('continues texts')")
    yield page
    context.close()
    assert not [each for each in wrong if not each.startswith(refused)]


def ask(page: Any, text: str, tokens: int = 60) -> None:
    page.evaluate(
        """tokens => {
        const field = document.querySelector('[name=max_tokens]');
        field.value = tokens;
        document.querySelector('[name=temperature]').value = 0;
        field.dispatchEvent(new Event('input', { bubbles: true }));
    }""",
        tokens,
    )
    page.focus("#ask")
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".cost")
    page.wait_for_selector("#send:visible")


def test_an_answer_is_streamed_coloured_and_measured(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ask(page, PROMPT)
        written = page.inner_text(".turn.assistant .text")
        assert "self" in written
        assert page.locator(".draft").count() > 0
        titles = {each.get_attribute("title") for each in page.locator(".turn .draft").all()}
        assert titles <= {"drafted by suffix", "drafted by medusa"}
        assert "tokens per round" in page.inner_text(".cost")
        assert "plain decoding" in page.inner_text(".race")
        assert page.text_content("#told") == page.evaluate(
            "JSON.parse(localStorage['linspec.chats'])[0].turns[1].text"
        )
        # colours by drafter, and only where they are wanted
        tint = "getComputedStyle(document.querySelector('.turn .draft')).backgroundColor"
        assert page.evaluate(tint) != "rgba(0, 0, 0, 0)"
        page.uncheck("#colours")
        assert page.evaluate(tint) == "rgba(0, 0, 0, 0)"
        rejected = page.locator(".turn .rejected")
        assert rejected.count() > 0 and not rejected.first.is_visible()
        page.check("#rejected")
        assert rejected.first.is_visible()
        # figures follow within two seconds
        page.wait_for_function("document.querySelectorAll('figure output')[5].textContent !== '–'")


def test_chats_are_there_again_after_a_reload_and_can_be_forgotten(
    browser: Any, address: str
) -> None:
    with opened(browser, address) as page:
        ask(page, PROMPT)
        before = page.inner_text(".turn.assistant .text")
        page.reload()
        page.click("#list .open")
        assert page.inner_text(".turn.assistant .text") == before
        assert page.locator(".turn .draft").count() > 0
        page.click("#list .drop")
        assert page.locator("#list li").count() == 0
        assert page.locator(".welcome").count() == 1


def test_the_keyboard_is_enough(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.keyboard.type("def f(")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("x")
        assert page.input_value("#ask") == "def f(\nx"
        page.evaluate("document.querySelector('[name=max_tokens]').value = 4000")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:visible")
        page.wait_for_selector(".turn.assistant .text:not(:empty)")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:visible")
        page.keyboard.press("Alt+n")
        assert page.locator(".welcome").count() == 1
        assert page.locator("#list li").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_both_schemes(browser: Any, address: str, scheme: str) -> None:
    size = {"width": 360, "height": 640}
    with opened(browser, address, viewport=size, color_scheme=scheme, has_touch=True) as page:
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        ask(page, PROMPT)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert not page.is_visible("#panel")
        page.tap("#show-panel")
        assert (
            page.is_visible("#charts")
            and page.get_attribute("#show-panel", "aria-expanded") == "true"
        )
        page.keyboard.press("Escape")
        assert not page.is_visible("#panel")


def test_a_server_that_refuses_is_quoted(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.fill("[name=temperature]", "1000")
        page.fill("#ask", "x")
        page.press("#ask", "Enter")
        page.wait_for_selector(".turn.wrong")
        assert "1000" in page.inner_text(".turn.wrong")


def test_a_key_is_asked_for_and_then_enough(browser: Any) -> None:
    llm = LLM("embedded-aug", drafter="suffix", max_batch=2)
    with running({"embedded-aug": llm}, Settings.read(port=0, api_key="a-long-key")) as (found, _):
        page = browser.new_page()
        page.goto(found)
        page.wait_for_selector("#reach:has-text('key')")
        page.fill("[name=key]", "a-long-key")
        page.wait_for_selector("figure output:not(:empty)", state="attached")
        assert page.inner_text("#reach") == ""
        ask(page, PROMPT, tokens=10)
        assert "a-long-key" not in page.evaluate("JSON.stringify(localStorage)")
        page.close()


def test_what_a_model_writes_stays_text(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ask(page, "<img src=x onerror=alert(1)><b>bold</b>", tokens=5)
        assert page.locator("#log img, #log b").count() == 0
        assert "<b>bold</b>" in page.inner_text(".turn.user")
