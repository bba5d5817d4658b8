"""The page in headless Chromium: both tabs, from an example to a download. Skipped without Chromium."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from serve_kit import png

SECONDS = 240


@pytest.mark.slow
def test_both_tabs_in_a_browser(tmp_path, port):
    """Writes `page_*.png` to the folder $LVM_SCREENSHOTS if the variable is set."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "0.png").write_bytes(png(0))
    command = [sys.executable, "-m", "evaluation.demo", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    browser = None
    try:
        browser = open_browser(webdriver, chromium, driver, tmp_path)
        try_page(PageDriver(browser, tmp_path), f"http://127.0.0.1:{port}")
    finally:
        if browser is not None:
            browser.quit()
        server.send_signal(signal.SIGINT)
        try:
            output, _ = server.communicate(timeout=SECONDS)
        finally:
            server.kill()
    assert "Traceback" not in output, output


def open_browser(webdriver, chromium, driver, folder):
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync window-size=1280,1400 user-data-dir={folder / 'profile'}"
    ).split():
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    service = webdriver.chrome.service.Service(driver)
    return webdriver.Chrome(options=options, service=service)


def wait_until(condition, description):
    """Waits for a condition and returns its value. Ignores elements that the page replaces meanwhile."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except WebDriverException:
            pass
        time.sleep(0.1)
    raise AssertionError(f"timed out: {description}")


# Records every text of an element in `texts`. The test cannot read texts that the page replaces at once.
_RECORD_TEXTS = """window.texts = []
const selector = arguments[0]
new MutationObserver(() => texts.push(document.querySelector(selector)?.innerText ?? "")).observe(
    document.body, {subtree: true, childList: true, characterData: true})"""


class PageDriver:
    """Actions of a visitor. Elements are named by CSS selectors."""

    def __init__(self, browser, folder: pathlib.Path):
        self.browser, self.folder = browser, folder

    def visible(self, selector: str) -> list:
        return [element for element in self.browser.find_elements("css selector", selector) if element.is_displayed()]

    def wait_for(self, selector: str, text: str = "") -> list:
        return wait_until(
            lambda: [element for element in self.visible(selector) if text in element.text], f"{selector} {text!r}"
        )

    def click(self, selector: str, index: int = 0) -> None:
        def clicked():
            elements = self.visible(selector)
            return elements[index:] and [elements[index].click()]

        wait_until(clicked, selector)

    def answers(self, tab: str) -> list[str]:
        return [image.get_attribute("src") for image in self.wait_for(f"#answers_{tab} button.thumbnail-item img")]

    def generate(self, tab: str, before=()) -> list[str]:
        """Clicks the button and waits for answers that differ from those before."""
        self.click(f"#draw_{tab}")
        wait_until(lambda: not set(self.answers(tab)) & set(before), "other answers")
        self.wait_for(f"#status_{tab}", "Done: 64 tokens")
        return wait_until(lambda: self.answers(tab), "answers")

    def replace_image(self, slot: str, file: str) -> None:
        remove, upload = f"#{slot} button[aria-label='Remove Image']", f"#{slot} input[type=file]"
        self.click(remove)
        find = functools.partial(self.browser.find_elements, "css selector", upload)
        wait_until(find, upload)[0].send_keys(str(self.folder / file))
        self.wait_for(remove)  # the upload is complete

    def set_seed(self, seed: int) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.wait_for("input[aria-label='Seed']")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(seed), Keys.TAB)

    def screenshot(self, name: str) -> None:
        if "LVM_SCREENSHOTS" in os.environ:
            time.sleep(1)  # animations
            self.browser.save_screenshot(str(pathlib.Path(os.environ["LVM_SCREENSHOTS"]) / f"page_{name}.png"))

    def assert_downloads_sheet(self, tab: str, columns: int, rows: int, side: int = 32) -> None:
        """Asserts that the download is a PNG file of the answers that is not enlarged."""
        self.wait_for(f"#download_{tab}")[0].click()
        paths = wait_until(lambda: list(self.folder.glob("answer_*.png")), "a download")
        assert Image.open(paths[0]).size == (columns * (side + 2) - 2, rows * (side + 2) - 2)
        paths[0].unlink()

    def assert_contacts_only(self, url: str) -> None:
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert sent
        assert not [address for address in sent if re.match("https?:|wss?:", address) and not address.startswith(url)]
        assert not [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def try_page(page: PageDriver, url: str) -> None:
    browser = page.browser
    wait_until(lambda: browser.get(url) or browser.title == "Large Vision Model", "the page")
    # An example of the analogy tab fills seven slots and gives four answers.
    page.click("#examples_analogy button.thumbnail-item", 1)
    for slot in ("example_1", "answer_3", "query"):
        page.wait_for(f"#{slot} img")
    browser.execute_script(_RECORD_TEXTS, "#status_analogy")
    first = page.generate("analogy")
    assert len(set(first)) == 4
    page.screenshot("analogy")
    page.assert_downloads_sheet("analogy", columns=1, rows=4)
    page.set_seed(7)
    reseeded = page.generate("analogy", before=first)
    # A file that is not an image gives an error; an uploaded image replaces the query.
    page.replace_image("query", "text.png")
    page.click("#draw_analogy")
    page.wait_for(".toast-body", "not a readable image")
    page.replace_image("query", "0.png")
    page.wait_for("#query img")
    page.generate("analogy", before=reseeded)
    # At least one of the three runs shows a preview: the page skips previews in quick succession.
    texts = browser.execute_script("return texts")
    assert [text for text in texts if re.match(r"Drawing: \d+ of 64 tokens", text)]
    browser.find_element("xpath", "//button[@role='tab' and contains(., 'Sequence')]").click()
    page.click("#examples_sequence button.thumbnail-item")
    wait_until(lambda: len(page.visible("#frames button.thumbnail-item img")) == 7, "seven frames")
    assert len(set(page.generate("sequence"))) == 4
    page.screenshot("sequence")
    page.assert_downloads_sheet("sequence", columns=1, rows=4)
    page.assert_contacts_only(url)
