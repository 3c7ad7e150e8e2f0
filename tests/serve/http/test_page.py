"""The page at `/` in a real browser, against a real server: drawn, cancelled, refused, by keyboard alone, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from fastcache import Bundle
from fastcache.serve.http.guard import read_keys
from serve.serving import LIMITS, Running, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
)
KEY = "a-key-for-the-tests-of-the-page"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
    for flag in (
        *flags,
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
        "window-size=900,1300",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a user sees it."""

    def __init__(self, browser: Any, port: int) -> None:
        self.browser = browser
        self.browser.get(f"http://127.0.0.1:{port}/")
        self.until(lambda: self.status != "Loading.")

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def count(self, selector: str) -> int:
        return len(self.browser.find_elements("css selector", selector))

    @property
    def status(self) -> str:
        return self.one("#status").text

    def until(self, true: Any) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60, poll_frequency=0.02).until(lambda _: true())

    def set(self, name: str, value: object) -> None:
        field = self.one(f"[name={name}]")
        field.clear()
        field.send_keys(str(value))


@needs_browser
def test_cached_beside_uncached(browser: Any, tiny: Running, tmp_path: Path) -> None:
    page = Page(browser, tiny.port)
    assert page.status.startswith("Ready")
    for name, value in (("prompt", "a b"), ("num_inference_steps", 7), ("cache_interval", 3)):
        page.set(name, value)
    page.one("#draw").click()
    page.until(lambda: page.status.startswith("Done"))
    assert "times as fast" in page.status
    kinds = [cell.get_attribute("class") for cell in browser.find_elements("css selector", "#cached .strip i")]
    assert kinds == ["full" if step % 3 == 0 else "shallow" for step in range(7)]
    assert page.count("#uncached .strip .full") == 7
    assert page.one("#cached .strip").get_attribute("aria-label") == "7 of 7 steps, 3 of them full"
    for panel in ("#cached", "#uncached"):
        assert page.one(f"{panel} img").get_attribute("alt") == "a b"
        assert browser.execute_script("return arguments[0].naturalWidth", page.one(f"{panel} img")) > 0
    assert page.count("#history li") == 1
    assert page.count("#history img") == 2
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {urlsplit(url).netloc for url in asked if url.startswith("http")} == {f"127.0.0.1:{tiny.port}"}


@needs_browser
def test_by_keyboard_and_cancelled(browser: Any, tiny: Running) -> None:
    """Enter in a field draws, Escape ends it, and the server stops working on it."""
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, tiny.port)
    page.set("prompt", "a b")
    page.set("num_inference_steps", 400)
    page.one("[name=prompt]").send_keys(Keys.ENTER)
    page.until(lambda: page.count("#cached .strip .full") > 1)
    page.one("[name=prompt]").send_keys(Keys.ESCAPE)
    page.until(lambda: page.status == "Cancelled.")
    tiny.until(lambda: tiny.client.get("/health").json()["running"] == 0)
    assert page.count("#history li") == 0
    assert page.one("#draw").is_enabled()


@needs_browser
def test_what_the_server_refuses_is_said(browser: Any, tiny: Running) -> None:
    page = Page(browser, tiny.port)
    page.set("prompt", "a " * 900)
    page.one("#draw").click()
    page.until(lambda: "tokens" in page.status)
    assert page.one("#status").get_attribute("class") == "failed"


@needs_browser
def test_every_field_has_a_label_and_every_picture_a_name(browser: Any, tiny: Running) -> None:
    Page(browser, tiny.port)
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, select')].filter(f => !f.labels.length).map(f => f.name)"
    )
    assert unnamed == []
    assert browser.execute_script("return [...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    assert browser.execute_script("return document.documentElement.lang") == "en"


@needs_browser
def test_with_a_key_the_page_asks_for_it(browser: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    with running(tiny_bundle.path, limits=LIMITS, keys=read_keys(file)) as locked:
        page = Page(browser, locked.port)
        assert "API key" in page.status
        from selenium.webdriver.common.keys import Keys

        page.set("key", KEY)
        page.one("[name=key]").send_keys(Keys.TAB)
        page.until(lambda: page.status.startswith("Ready"))


def test_the_files_come_with_a_policy_and_are_no_part_of_the_api(tiny: Running) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        answer: httpx.Response = tiny.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("http-equiv", "")  # nothing from anywhere else
    assert not {"/", "/page.js", "/page.css"} & set(tiny.client.get("/openapi.json").json()["paths"])
