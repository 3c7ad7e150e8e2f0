"""The page at `/` in a real browser, against a real server: drawn, edited, cancelled, refused, by keyboard, offline."""

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
from fastcache.serve.models.listed import Listed, Offer
from serve.models.test_quality import fitted
from serve.serving import LIMITS, Running, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
)
FILES = {"/": "text/html", "/page.js": "text/javascript", "/easel.js": "text/javascript", "/page.css": "text/css"}
KEY = "a-key-for-the-tests-of-the-page"
# A wide picture, dropped by a mouse.
DROP = """
const canvas = Object.assign(document.createElement('canvas'), {width: 80, height: 40});
canvas.getContext('2d').fillRect(0, 0, 40, 40);
canvas.toBlob((blob) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([blob], 'a.png', {type: 'image/png'}));
  document.body.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));
});
"""
# The share of the mask that is painted.
PAINTED = """
const {data} = mask.getContext('2d').getImageData(0, 0, mask.width, mask.height);
return data.filter((value, k) => k % 4 === 3 && value > 127).length * 4 / data.length;
"""
# Of a text to what is behind it.
CONTRAST = """
const light = (colour) => {
  const context = document.createElement('canvas').getContext('2d', {colorSpace: 'srgb'});
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255);
  const [r, g, b] = parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const own = getComputedStyle(arguments[0]);
const behind = own.backgroundColor === 'rgba(0, 0, 0, 0)' ? 'Canvas' : own.backgroundColor;
const system = document.body.appendChild(Object.assign(document.createElement('i'), {hidden: true}));
system.style.color = behind;
const [a, b] = [light(own.color), light(getComputedStyle(system).color)].sort((x, y) => x - y);
system.remove();
return (b + 0.05) / (a + 0.05);
"""


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

    def more(self) -> None:
        self.one("summary").click()

    def drawn(self) -> list[str]:
        """Draw, and what the steps of the cached picture were."""
        self.one("#draw").click()
        self.until(lambda: self.status.startswith("Done"))
        return [cell.get_attribute("class") for cell in self.browser.find_elements("css selector", "#cached .strip i")]

    def set(self, name: str, value: object) -> None:
        field = self.one(f"[name={name}]")
        field.clear()
        field.send_keys(str(value))


@needs_browser
def test_cached_beside_uncached(browser: Any, tiny: Running, tmp_path: Path) -> None:
    page = Page(browser, tiny.port)
    assert page.status.startswith("Ready")
    page.more()
    for name, value in (("prompt", "a b"), ("num_inference_steps", 7), ("cache_interval", 3)):
        page.set(name, value)
    kinds = page.drawn()
    assert "times as fast" in page.status
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
    page.more()
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
    page.more()
    page.set("num_inference_steps", 0)
    page.more()
    page.one("#draw").click()
    assert page.one("[name=num_inference_steps]").is_displayed()
    page.set("num_inference_steps", 4)
    page.set("prompt", "a " * 900)
    page.one("#draw").click()
    page.until(lambda: "tokens" in page.status)
    assert page.one("#status").get_attribute("class") == "failed"


@pytest.fixture(scope="module")
def planned(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two models, one with fitted plans."""
    folder = tmp_path_factory.mktemp("plans")
    for name, points in {"draft": (0, 6), "standard": (0, 4, 8), "fine": (0, 3, 6, 9)}.items():
        (folder / f"{name}.json").write_text(fitted(tiny_bundle, points, 25.5).to_json())
    offer = Offer((Listed(tiny_bundle.path, "one"), Listed(tiny_bundle.path, "two")), plans=(folder,))
    with running(offer, limits=LIMITS) as served:
        yield served


@needs_browser
def test_a_quality_in_place_of_numbers(browser: Any, planned: Running) -> None:
    from selenium.webdriver.support.ui import Select

    page = Page(browser, planned.port)
    page.set("prompt", "a b")
    page.until(lambda: planned.service.shelf.entries["two"].served is not None)
    Select(page.one("[name=model]")).select_by_value("two")
    quality = Select(page.one("[name=quality]"))
    assert quality.first_selected_option.text == "medium: 3 steps, 2 full, 25.5 dB"
    assert page.drawn() == ["full", "shallow", "full"]
    assert page.count("#uncached .strip .full") == 12  # what the plan was fitted to
    assert "25.5 dB from uncached" in page.one("#cached .figures").text
    assert "quality medium" in page.one("#history li").text
    page.more()
    assert not page.one("[name=num_inference_steps]").is_enabled()
    quality.select_by_value("")
    page.set("num_inference_steps", 5)
    assert len(page.drawn()) == 5


@needs_browser
def test_a_picture_is_dropped_and_a_mask_painted(browser: Any, tiny: Running, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, tiny.port)
    page.set("prompt", "a b")
    assert not page.one("#easel").is_displayed()
    browser.execute_script(DROP)
    page.until(lambda: page.one("#easel").is_displayed())
    assert browser.execute_script("return [picture.width, picture.height]") == [32, 32]  # as large as what is drawn
    page.drawn()
    assert "from a picture, strength 0.8" in page.one("#history li").text
    mask = page.one("#mask")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mask)
    ActionChains(browser).move_to_element_with_offset(mask, -60, 0).click_and_hold().move_by_offset(40, 0).perform()
    ActionChains(browser).release().perform()
    painted = browser.execute_script(PAINTED)
    assert 0 < painted < 0.3
    mask.send_keys(Keys.SPACE)
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(*[Keys.ARROW_DOWN] * 9).key_up(Keys.SHIFT).perform()
    assert browser.execute_script(PAINTED) > painted
    page.drawn()
    assert "under a mask" in page.one("#history li").text
    page.one("#clear-mask").click()
    assert browser.execute_script(PAINTED) == 0
    page.one("#remove").click()
    page.drawn()
    assert "strength" not in page.one("#history li").text
    (tmp_path / "no.png").write_text("no picture")
    page.one("#file").send_keys(str(tmp_path / "no.png"))
    page.until(lambda: "got no.png" in page.status)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_can_be_read_in_the_dark(browser: Any, tiny: Running, scheme: str) -> None:
    narrow = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page = Page(browser, tiny.port)
        page.more()
        browser.execute_script(DROP)
        page.until(lambda: page.one("#easel").is_displayed())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 375
        for selector in ("body", "#draw", "[name=prompt]", "summary"):
            assert browser.execute_script(CONTRAST, page.one(selector)) >= 4.5  # WCAG 2.2, 1.4.3
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


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
    for path, kind in FILES.items():
        answer: httpx.Response = tiny.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("http-equiv", "")  # nothing from anywhere else
    assert not FILES.keys() & set(tiny.client.get("/openapi.json").json()["paths"])
