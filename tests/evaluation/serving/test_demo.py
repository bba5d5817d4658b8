"""The page: what it draws while tokens come, its examples, and once in a browser."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from serve_kit import TINY, png, tiny_engine

from EasyLM.errors import UserError
from evaluation import demo
from evaluation.serving import page_examples, uploads
from evaluation.serving.engine import Settings

SECONDS = 240


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


@pytest.mark.slow
def test_what_is_shown_while_tokens_come(folder):
    engine = tiny_engine()
    files = [str(folder / "0.png")]
    first, *partials, last = demo.draw(engine, files, Settings(n_candidates=2, n_new_frames=2, seed=3), folder)
    assert "Compiling" in first[0] and first[1] == []
    assert partials and all(status.startswith("Drawing: ") for status, _, _ in partials)
    for _, shown, _ in partials:
        assert [caption for _, caption in shown] == ["1: frame 1", "1: frame 2", "2: frame 1", "2: frame 2"]
        assert (shown[1][0][-1] == 128).all()  # the last rows are gray until the end
    status, shown, button = last
    assert status == f"Done: {2 * TINY.tokens_per_image} tokens a candidate"
    assert [picture.shape for picture, _ in shown] == [(256, 256, 3)] * 4
    sheet = np.asarray(Image.open(button.value["path"] if isinstance(button.value, dict) else button.value))
    assert sheet.shape == (2 * TINY.resolution + 2, 2 * TINY.resolution + 2, 3)
    np.testing.assert_array_equal(shown[0][0][::16, ::16], sheet[: TINY.resolution, : TINY.resolution])
    engine.close(SECONDS)


@pytest.mark.slow  # gradio takes seconds to import
def test_what_a_visitor_does_wrong_is_said(folder):
    gradio = pytest.importorskip("gradio")
    engine = tiny_engine()
    for file, settings, said in (
        ("text.png", Settings(), "not a readable picture"),
        ("0.png", Settings(temperature=-1), "temperature=-1"),
    ):
        with pytest.raises(gradio.Error, match=said):
            list(demo.draw(engine, [str(folder / file)], settings, folder))
    engine.close(SECONDS)
    with pytest.raises(gradio.Error, match="stopping"):
        list(demo.draw(engine, [str(folder / "0.png")], Settings(), folder))


def picture_file(mode: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 2 ** (16 if mode == "I;16" else 8), (9, 9, 4))
    file = io.BytesIO()
    pixels = values[..., 0].astype(np.uint16) if mode == "I;16" else values.astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    assert Image.open(file).mode == mode
    return file.getvalue()


@pytest.mark.slow  # gradio takes seconds to import
@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_picture_in_a_slot_is_seen_as_the_service_sees_it(tmp_path, mode):
    data_classes = pytest.importorskip("gradio.data_classes")
    (tmp_path / "file").write_bytes(picture_file(mode))
    payload = data_classes.ImageData(path=str(tmp_path / "file"), orig_name="file.png")
    path = demo._slot("Query").preprocess(payload)
    seen = uploads.decode([pathlib.Path(path).read_bytes()], 8, demo.LIMITS)
    np.testing.assert_array_equal(seen, uploads.decode([picture_file(mode)], 8, demo.LIMITS))
    assert seen.std() > 0.01  # neither black nor white


@pytest.mark.slow  # gradio takes seconds to import
def test_a_file_that_is_no_picture_reaches_the_check_that_says_so(tmp_path):
    data_classes = pytest.importorskip("gradio.data_classes")
    (tmp_path / "file").write_bytes(b"garbage")
    payload = data_classes.ImageData(path=str(tmp_path / "file"), orig_name="file.png")
    slot = demo._slot("Query")
    assert slot.preprocess(payload) == str(tmp_path / "file") and slot.preprocess(None) is None
    assert not pathlib.Path(demo.__file__).with_suffix(".pyi").exists()


def test_answers_are_kept_for_an_hour(tmp_path):
    picture = np.zeros((1, 1, 8, 8, 3), np.float32)
    old, new = demo._save(picture, tmp_path), demo._save(picture, tmp_path)
    example = tmp_path / "analogy_0.png"
    example.write_bytes(b"")
    for path, age in ((old, 3700), (new, 3500), (example, 3700)):
        os.utime(path, (time.time() - age,) * 2)
    newest = demo._save(picture, tmp_path)
    assert set(tmp_path.iterdir()) == {new, newest, example}


def test_examples_are_prompts_of_one_length(monkeypatch):
    analogies, sequences = page_examples.analogies(16), page_examples.sequences(16, count=2)
    assert [one.name for one in analogies] == ["segmentation", "depth", "normals", "edges", "colours"]
    assert {one.pictures.shape for one in [*analogies, *sequences]} == {(7, 16, 16, 3)}

    def missing(*arguments, **options):
        raise UserError("not installed")

    monkeypatch.setattr("tokenizer.synthetic.photos.crop", missing)
    assert len(page_examples.analogies(8)) == 4


@pytest.mark.slow
def test_both_tabs_in_a_browser(folder, port):
    """Clicks an example in each tab, draws, and downloads; puts `page_*.png` into $LVM_SCREENSHOTS, if that is set."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    command = [sys.executable, "-m", "evaluation.demo", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    browser = None
    try:
        browser = open_browser(webdriver, chromium, driver, folder)
        try_page(browser, f"http://127.0.0.1:{port}", folder)
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


def wait_until(condition, what):
    """What the condition gives, once it gives something; the page may change under its hands."""
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except WebDriverException:
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited in vain for {what}")


# Collects the texts of a place in `said`: some stay for less time than lies between two looks.
_LISTEN = """window.said = []
const place = arguments[0]
new MutationObserver(() => said.push(document.querySelector(place)?.innerText ?? "")).observe(
    document.body, {subtree: true, childList: true, characterData: true})"""


def try_page(browser, url, folder):
    from selenium.webdriver.common.keys import Keys

    def all_of(selector):
        return [one for one in browser.find_elements("css selector", selector) if one.is_displayed()]

    def wait_for(selector, text=""):
        return wait_until(lambda: [one for one in all_of(selector) if text in one.text], f"{selector} {text!r}")

    def click(selector, place=0):
        def clicked():
            found = all_of(selector)
            return found[place:] and [found[place].click()]

        wait_until(clicked, selector)

    def answers(tab):
        shown = wait_for(f"#answers_{tab} button.thumbnail-item img")
        return [one.get_attribute("src") for one in shown]

    def draw(tab, before=()):
        """Clicks, and waits for other answers than those before."""
        click(f"#draw_{tab}")
        wait_until(lambda: not set(answers(tab)) & set(before), "other answers")
        wait_for(f"#status_{tab}", "Done: 64 tokens")
        return wait_until(lambda: answers(tab), "answers")

    def put(place, file):
        """Into the place of a picture that is there."""
        remove, selector = f"#{place} button[aria-label='Remove Image']", f"#{place} input[type=file]"
        click(remove)
        wait_until(lambda: browser.find_elements("css selector", selector), selector)[0].send_keys(str(folder / file))
        wait_for(remove)  # once it has arrived

    def set_seed(seed):
        field = wait_for("input[aria-label='Seed']")[0]
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(seed), Keys.TAB)

    def screenshot(name):
        if "LVM_SCREENSHOTS" in os.environ:
            time.sleep(1)
            browser.save_screenshot(str(pathlib.Path(os.environ["LVM_SCREENSHOTS"]) / f"page_{name}.png"))

    wait_until(lambda: browser.get(url) or browser.title == "Large Vision Model", "the page")
    # An example of the analogy tab: seven pictures come into their places, four answers come out.
    click("#examples_analogy button.thumbnail-item", 1)
    for place in ("example_1", "answer_3", "query"):
        wait_for(f"#{place} img")
    browser.execute_script(_LISTEN, "#status_analogy")
    first = draw("analogy")
    assert len(set(first)) == 4
    screenshot("analogy")
    assert_is_sheet(wait_for("#download_analogy")[0], folder, columns=1, rows=4)
    # Another seed.
    set_seed(7)
    reseeded = draw("analogy", before=first)
    # A file that is no picture, then a picture of one's own in place of the query.
    put("query", "text.png")
    click("#draw_analogy")
    wait_for(".toast-body", "not a readable picture")
    put("query", "0.png")
    wait_for("#query img")
    draw("analogy", before=reseeded)
    # In one of the three at least: what follows too fast is not shown.
    assert [text for text in browser.execute_script("return said") if re.match(r"Drawing: \d+ of 64 tokens", text)]
    # The sequence tab.
    browser.find_element("xpath", "//button[@role='tab' and contains(., 'Sequence')]").click()
    click("#examples_sequence button.thumbnail-item")
    wait_until(lambda: len(all_of("#frames button.thumbnail-item img")) == 7, "seven frames")
    assert len(set(draw("sequence"))) == 4
    screenshot("sequence")
    assert_is_sheet(wait_for("#download_sequence")[0], folder, columns=1, rows=4)
    assert_talks_to_nobody_else(browser, url)


def assert_is_sheet(button, folder, columns, rows, side=32):
    """What the button gives is a PNG of the answers as they are, not enlarged."""
    button.click()
    found = wait_until(lambda: list(folder.glob("answer_*.png")), "a download")
    assert Image.open(found[0]).size == (columns * (side + 2) - 2, rows * (side + 2) - 2)
    found[0].unlink()


def assert_talks_to_nobody_else(browser, url):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    elsewhere = [one for one in sent if re.match("https?:|wss?:", one) and not one.startswith(url)]
    assert sent and not elsewhere
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
