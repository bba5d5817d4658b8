"""The page in headless Chromium: both tabs, from an example to a download, the brush, a phone, and two models.

Skipped without Chromium.
"""

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

import httpx
import jax
import numpy as np
import pytest
from page_kit import running_page, wait_until
from PIL import Image
from safetensors.numpy import load_file, save_file
from serve_kit import png

from evaluation import demo
from evaluation.page.pictures import enlarged
from tokenizer.media import images
from tokenizer.synthetic import scenes
from tokenizer.vqgan import PRETRAINED, Codec

WIDTHS = (1280, 390)  # pixels of a desktop and of a phone
DEMO_MODEL = demo.FLAGS["checkpoint"].default


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
    checkpoints = f"{DEMO_MODEL},{write_model_without_knowledge(tmp_path / 'ignorant')}"
    with running_page(port, f"--checkpoint={checkpoints}", stop=signal.SIGINT) as when_ready:
        with open_browser(webdriver, chromium, driver, tmp_path) as browser:
            try_page(PageDriver(browser, tmp_path), when_ready())


def write_model_without_knowledge(folder: pathlib.Path) -> str:
    """Writes a model for which all codes are equally likely: at temperature 0, each code of its images is 0."""
    shutil.copytree(DEMO_MODEL, folder)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / files["model.norm.weight"]
    arrays = load_file(path)
    arrays["model.norm.weight"] *= 0
    save_file(arrays, path, metadata={"format": "pt"})
    (folder / "README.md").write_text("# A model\n## Limits\nIt knows nothing.\n")
    return str(folder)


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
        (status,) = self.wait_for(f"#status_{tab}", "Done")
        assert re.fullmatch(r"Done: 64 tokens a candidate in [\d.]+ s, \d+ tokens/s in all", status.text)
        return wait_for(lambda: self.answers(tab), "answers")

    def replace_image(self, slot: str, file: str) -> None:
        remove = f"#{slot} button[aria-label='Remove Image']"
        self.click(remove)
        self.upload(f"#{slot} input[type=file]", file)
        self.wait_for(remove)  # the upload is complete

    def captions(self, gallery: str) -> list[str]:
        return [caption.text for caption in self.visible(f"{gallery} .caption-label")]

    def pixels(self, selector: str, index: int = 0) -> np.ndarray:
        """Returns the pixels of a picture's file."""
        url = wait_for(lambda: self.visible(selector)[index].get_attribute("src"), selector)
        return np.asarray(Image.open(io.BytesIO(httpx.get(url).content)).convert("RGB"))

    def rectangle(self, selector: str) -> dict[str, float]:
        (element,) = self.wait_for(selector)
        return self.browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)

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
        for element in self.visible(selector):
            colours = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB").getcolors(100)
            if colours is None:  # more than 100
                return [element]
        return []

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
    try_second_model(page)
    try_brush(page)  # last: the canvas is drawn all the time
    page.assert_contacts_only(url)


# Returns the width of a text in the page's bold font, for two fonts that replace letters which it lacks.
_WIDTHS_OF_TEXT = """const context = document.createElement("canvas").getContext("2d")
return ["serif", "monospace"].map(other => {
    context.font = `600 20px "Source Sans Pro", ${other}`
    return context.measureText("Large Vision Model: draw").width
})"""


def try_analogy(page: PageDriver) -> None:
    browser = page.browser
    # Before the first answer.
    hint = 'return getComputedStyle(document.querySelector("#answers_analogy > .empty"), "::after").content'
    wait_for(lambda: "Click an example" in browser.execute_script(hint), "a hint")
    for empty in ("#reconstructions_analogy", "#download_analogy", "#history"):
        assert not page.visible(empty)
    wait_for(lambda: len(set(browser.execute_script(_WIDTHS_OF_TEXT))) == 1, "a font with all letters")
    # An example fills seven slots; the truth and four answers appear.
    page.click("#examples_analogy button.thumbnail-item", 1)
    for slot in ("example_1", "answer_3", "query"):
        page.wait_for(f"#{slot} img")
        assert page.rectangle(f"#{slot} > label")["bottom"] <= page.rectangle(f"#{slot} img")["top"]
    browser.execute_script(_RECORD_TEXTS, "#status_analogy")
    first = page.generate("analogy")
    assert len(set(first)) == 5
    assert page.captions("#answers_analogy") == ["Truth", *(f"Candidate {i}" for i in range(1, 5))]
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
    wait_for(lambda: not page.visible("#status_analogy") or not page.visible("#status_analogy")[0].text, "no status")
    page.replace_image("query", "0.png")
    page.wait_for("#query img")
    assert len(set(page.generate("analogy", before=reseeded))) == 4
    assert not page.visible(".toast-body")
    page.assert_number_of("#history", 3)
    # At least one of the three runs shows a preview: the page skips previews in quick succession.
    texts = browser.execute_script("return texts")
    assert [text for text in texts if re.match(r"Drawing: \d+ of 64 tokens", text)]


def try_second_model(page: PageDriver) -> None:
    """Draws with the other model, whose answer is known. Its prompt is the example of segmentation."""
    page.click("#examples_analogy button.thumbnail-item", 0)
    page.wait_for("#model_text", "Answers that are scenes are soft")
    page.choose("model", "ignorant")
    page.wait_for("#model_text", "It knows nothing.")
    (temperature,) = page.wait_for("input[aria-label='number input for Temperature']")
    temperature.clear()
    temperature.send_keys("0\t")
    page.generate("analogy", before=page.answers("analogy"))
    codec = Codec(PRETRAINED, batch_size=1, devices=jax.devices()[:1])
    expected = enlarged(images.to_uint8(codec.decode(np.zeros((1, codec.tokens_per_image), np.int32))))[0]
    for i in range(1, 5):
        answer = page.pixels("#answers_analogy button.thumbnail-item img", i)
        np.testing.assert_allclose(answer, expected.astype(float), atol=1)


def try_brush(page: PageDriver) -> None:
    """Paints a hole on the query with the mouse, then on a phone a mask for an example. Both reach the prompt."""
    from selenium.webdriver import ActionChains

    before, mask = page.pixels("#query img"), page.pixels("#answer_1 img")
    page.click("#brush button")
    canvas = load_on_canvas(page, "Query")
    ActionChains(page.browser).move_to_element(canvas).click_and_hold().move_by_offset(60, 30).release().perform()
    page.choose("painted", "Example 1")  # the painting belongs to the loaded image
    page.assert_fits("brush")
    page.click("#use_hole")
    wait_for(lambda: (page.pixels("#query img") != before).any(), "a query with a hole")
    query = page.pixels("#query img")
    hole = (query == 0).all(-1)
    assert 1000 < hole.sum() < 10_000 and np.allclose(np.argwhere(hole).mean(0), 128, atol=40)
    np.testing.assert_array_equal(query[~hole], before[~hole])

    page.set_width(WIDTHS[1])
    wait_for(lambda: page.rectangle("#canvas canvas")["width"] < WIDTHS[1], "a narrow canvas")
    canvas = load_on_canvas(page, "Example 1")
    swipe(page, canvas)
    page.click("#use_mask")
    wait_for(lambda: (page.pixels("#answer_1 img") != mask).any(), "another mask")
    mask = page.pixels("#answer_1 img")
    painted = (mask == scenes.PALETTE["sphere"]).all(-1)
    assert painted.any() and ((mask == scenes.BACKGROUND).all(-1) | painted).all()

    page.click("button[aria-label='Color']")
    assert_usable_on_a_phone(page)
    page.click("#draw_analogy")  # the answers are those of before: the model draws the same for all prompts
    wait_for(lambda: "Truth" not in page.captions("#answers_analogy"), "answers to a prompt without a truth")
    pictures = "#reconstructions_analogy button.thumbnail-item img"
    for number, image in ((1, mask), (6, query)):
        np.testing.assert_array_equal(page.pixels(pictures, number)[:, :256], image)


def load_on_canvas(page: PageDriver, name: str):
    """Loads an image of the prompt on the canvas, and returns the canvas."""
    page.choose("painted", name)
    page.click("#load_painted")
    page.wait_for("#on_canvas", name)
    (canvas,) = wait_for(lambda: page.with_colours("#canvas canvas"), f"{name} on the canvas")
    return canvas


def swipe(page: PageDriver, canvas) -> None:
    """Moves a finger over the canvas, from its centre."""
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    page.browser.execute_async_script(_EXTENT)  # until it is drawn there, a touch would scroll
    place = page.rectangle("#canvas canvas")
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    for i, event in enumerate(("touchStart", *["touchMove"] * 8, "touchEnd")):
        points = [] if event == "touchEnd" else [{"x": x + 5 * i, "y": y + 2 * i}]
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": event, "touchPoints": points})


def assert_usable_on_a_phone(page: PageDriver) -> None:
    """Asserts that the small buttons are large enough for a finger, and that nothing of the brush is cut off."""
    kinds = (".icon-button", ".toolbar-wrap button", ".source-selection button", ".reset-button")
    for kind in kinds:
        for size in [button.size for button in page.wait_for(kind)]:
            assert min(size["height"], size["width"]) >= 30, (kind, size)
    (brush,) = page.wait_for("#brush")
    width, inner_width = page.browser.execute_script(
        "return [arguments[0].scrollWidth, arguments[0].clientWidth]", brush
    )
    assert width == inner_width
