"""The page in headless Chromium: both tabs, from an example to a download. Skipped without Chromium."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import time

import pytest
from page_kit import running_page, wait_until
from PIL import Image
from serve_kit import png

WIDTHS = (1280, 390)  # pixels of a desktop and of a phone


@pytest.mark.slow
def test_both_tabs_in_a_browser(tmp_path, port):
    """Writes `page_*.png` to the folder $LVM_SCREENSHOTS if the variable is set."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "0.png").write_bytes(png(0))
    with contextlib.suppress(ImportError):  # PyAV
        from video_kit import write_video

        write_video(tmp_path / "clip.mp4", "libx264", range(0, 300, 100))
    with running_page(port, stop=signal.SIGINT) as when_ready:
        with open_browser(webdriver, chromium, driver, tmp_path) as browser:
            try_page(PageDriver(browser, tmp_path), when_ready())


def open_browser(webdriver, chromium, driver, folder):
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync window-size=1280,1400 user-data-dir={folder / 'profile'} "
        "use-angle=swiftshader enable-unsafe-swiftshader"  # the canvas needs WebGL
    ).split():
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    service = webdriver.chrome.service.Service(driver)
    return webdriver.Chrome(options=options, service=service)


def wait_for(condition, description):
    """Waits for a condition and returns its value. Ignores elements that the page replaces meanwhile."""
    from selenium.common.exceptions import WebDriverException

    return wait_until(condition, description, WebDriverException)


# Records every text of an element in `texts`. The test cannot read texts that the page replaces at once.
_RECORD_TEXTS = """window.texts = []
const selector = arguments[0]
new MutationObserver(() => texts.push(document.querySelector(selector)?.innerText ?? "")).observe(
    document.body, {subtree: true, childList: true, characterData: true})"""


# Without animations, the page needs no time to settle, and the browser leaves the processor to the model.
_NO_ANIMATIONS = """addEventListener("DOMContentLoaded", () => {
    const style = document.createElement("style")
    style.textContent = "*, *::before, *::after { animation: none !important; transition: none !important }"
    document.head.append(style)
})"""
# Returns the width of the window, and width and height of the page, when it is drawn.
_EXTENT = """const done = arguments[0]
requestAnimationFrame(() => requestAnimationFrame(() => {
    const {scrollWidth, scrollHeight} = document.documentElement
    done([innerWidth, scrollWidth, scrollHeight])
}))"""


class PageDriver:
    """Actions of a visitor. Elements are named by CSS selectors."""

    def __init__(self, browser, folder: pathlib.Path):
        self.browser, self.folder = browser, folder

    def visible(self, selector: str) -> list:
        return [element for element in self.browser.find_elements("css selector", selector) if element.is_displayed()]

    def wait_for(self, selector: str, text: str = "") -> list:
        return wait_for(
            lambda: [element for element in self.visible(selector) if text in element.text], f"{selector} {text!r}"
        )

    def click(self, selector: str, index: int = 0) -> None:
        def clicked():
            elements = self.visible(selector)
            return elements[index:] and [elements[index].click()]

        wait_for(clicked, selector)

    def answers(self, tab: str) -> list[str]:
        return [image.get_attribute("src") for image in self.wait_for(f"#answers_{tab} button.thumbnail-item img")]

    def generate(self, tab: str, before=()) -> list[str]:
        """Clicks the button and waits for answers that differ from those before."""
        self.click(f"#draw_{tab}")
        wait_for(lambda: not set(self.answers(tab)) & set(before), "other answers")
        self.wait_for(f"#status_{tab}", "Done: 64 tokens")
        return wait_for(lambda: self.answers(tab), "answers")

    def replace_image(self, slot: str, file: str) -> None:
        remove = f"#{slot} button[aria-label='Remove Image']"
        self.click(remove)
        self.upload(f"#{slot} input[type=file]", file)
        self.wait_for(remove)  # the upload is complete

    def upload(self, selector: str, file: str) -> None:
        find = functools.partial(self.browser.find_elements, "css selector", selector)
        wait_for(find, selector)[0].send_keys(str(self.folder / file))

    def open_tab(self, name: str) -> None:
        self.browser.find_element("xpath", f"//button[@role='tab' and contains(., '{name}')]").click()

    def choose(self, dropdown: str, choice: str) -> None:
        self.click(f"#{dropdown} input")
        self.click(f"#{dropdown} [role=option][aria-label='{choice}']")

    def with_colours(self, selector: str) -> list:
        """Returns the element if it shows a picture, else an empty list."""
        (element,) = self.visible(selector)
        colours = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB").getcolors(100)
        return [element] if colours is None else []  # more than 100

    def set_width(self, width: int, height: int = 1400) -> None:
        """Sets the size of the window's inside. Windows of a real size cannot be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def height_at(self, width: int) -> int:
        """Returns the height of the page; 0 if the window has another width, or the page does not fit into it."""
        inner_width, page_width, page_height = self.browser.execute_async_script(_EXTENT)
        return page_height if inner_width == width and page_width <= width else 0

    def assert_fits(self, name: str) -> None:
        """Asserts that the page needs no horizontal scrolling, on a desktop and on a phone."""
        for width in WIDTHS:
            self.set_width(width)
            height = wait_for(functools.partial(self.height_at, width), f"a page that fits into {width} pixels")
            if "LVM_SCREENSHOTS" in os.environ:
                self.set_width(width, height)
                time.sleep(1)  # images are loaded
                path = pathlib.Path(os.environ["LVM_SCREENSHOTS"]) / f"page_{name}_{width}.png"
                self.browser.save_screenshot(str(path))
        self.set_width(WIDTHS[0])

    def assert_downloads_strip(self, tab: str, columns: int, rows: int) -> None:
        """Asserts that the download is a PNG file of so many columns and rows of labelled images of 256 pixels."""
        self.wait_for(f"#download_{tab}")[0].click()
        paths = wait_for(lambda: list(self.folder.glob("answer_*.png")), "a download")
        assert Image.open(paths[0]).size == (12 + columns * 268, 48 + rows * 304)
        if "LVM_SCREENSHOTS" in os.environ:
            shutil.copy(paths[0], pathlib.Path(os.environ["LVM_SCREENSHOTS"]) / f"strip_{tab}.png")
        paths[0].unlink()

    def assert_number_of(self, selector: str, count: int) -> None:
        """Waits until a gallery has so many pictures."""
        wait_for(lambda: len(self.visible(f"{selector} button.thumbnail-item img")) == count, f"{count} {selector}")

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
    page.set_width(WIDTHS[0])
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _NO_ANIMATIONS})
    wait_for(lambda: browser.get(url) or browser.title == "Large Vision Model", "the page")
    try_analogy(page)
    # Sequences.
    page.open_tab("Sequence")
    page.click("#examples_sequence button.thumbnail-item")
    page.assert_number_of("#frames", 7)
    assert len(set(page.generate("sequence"))) == 5
    page.assert_number_of("#reconstructions_sequence", 7)
    page.assert_number_of("#history", 4)
    page.assert_fits("sequence")
    page.assert_downloads_strip("sequence", columns=7, rows=2)
    if (page.folder / "clip.mp4").exists():
        page.upload("input[data-testid$='-upload-button']", "clip.mp4")
        page.assert_number_of("#frames", 3)  # the video has no more
    page.open_tab("Analogy")
    try_brush(page)  # last: the canvas is drawn all the time
    page.assert_contacts_only(url)


def try_analogy(page: PageDriver) -> None:
    browser = page.browser
    # An example fills seven slots; the truth and four answers appear.
    page.click("#examples_analogy button.thumbnail-item", 1)
    for slot in ("example_1", "answer_3", "query"):
        page.wait_for(f"#{slot} img")
    browser.execute_script(_RECORD_TEXTS, "#status_analogy")
    first = page.generate("analogy")
    assert len(set(first)) == 5
    page.assert_number_of("#reconstructions_analogy", 7)
    page.assert_downloads_strip("analogy", columns=5, rows=3)
    seed = page.wait_for("input[aria-label='Seed']")[0]
    page.click("#random_analogy")
    wait_for(lambda: seed.get_attribute("value") != "0", "a random seed")
    reseeded = page.generate("analogy", before=first[1:])
    assert reseeded[0] == first[0]  # the truth
    page.assert_fits("analogy")
    # A file that is not an image gives an error; an uploaded image replaces the query, and its answer is not known.
    page.replace_image("query", "text.png")
    page.click("#draw_analogy")
    page.wait_for(".toast-body", "Query: not a readable image")
    page.replace_image("query", "0.png")
    page.wait_for("#query img")
    assert len(set(page.generate("analogy", before=reseeded))) == 4
    page.assert_number_of("#history", 3)
    # At least one of the three runs shows a preview: the page skips previews in quick succession.
    texts = browser.execute_script("return texts")
    assert [text for text in texts if re.match(r"Drawing: \d+ of 64 tokens", text)]


def try_brush(page: PageDriver) -> None:
    """Paints a hole on the query, and chooses another image before it is used."""
    from selenium.webdriver import ActionChains

    def query() -> str:
        return page.wait_for("#query img")[0].get_attribute("src")

    before = query()
    page.click("#brush button")
    page.click("#load_painted")
    page.wait_for("#on_canvas", "Query")
    (canvas,) = wait_for(lambda: page.with_colours("#canvas canvas"), "the image on the canvas")
    ActionChains(page.browser).move_to_element(canvas).click_and_hold().move_by_offset(60, 30).release().perform()
    page.choose("painted", "Example 1")
    page.assert_fits("brush")
    page.click("#use_hole")
    wait_for(lambda: query() != before, "a query with a hole")
