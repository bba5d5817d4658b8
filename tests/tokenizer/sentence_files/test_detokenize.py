"""The selected sentences are decoded and written in every format."""

import base64
import html.parser
import io
import os

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from tokenizer import detokenize
from tokenizer.media import images, videos
from tokenizer.sentence_files.selection import Selection, parse_ranges, select
from tokenizer.vqgan import Codec

N, S = TINY.tokens_per_image, TINY.resolution
KINDS = ["paired", "frames", "images"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def codec(tiny):
    return Codec(tiny)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Nine sentences of 1 to 3 images and three kinds. Their sources need HTML escaping."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("sentences") / "s.jsonl"
    lines = []
    for number in range(9):
        ids = rng.integers(0, TINY.num_embeddings, N * (1 + number % 3))
        sources = [f"<{number}>/&{i}.png" for i in range(1 + number % 3)] if number != 3 else ["clip.mp4", "0.5 s"]
        others = {"seconds": [0.5, 1.25]} if number == 4 else {}
        lines.append(records.record_line(ids, kind=KINDS[number % 3], sources=sources, **others))
    path.write_bytes(b"".join(lines))
    return path


def detokenize_file(file, tiny, directory, **settings) -> list[str]:
    """Runs the command; returns the names of the written files."""
    run_main(detokenize, input_file=str(file), output_dir=str(directory), vqgan=tiny, **settings)
    return sorted(os.listdir(directory))


def selected(sentences, ranges="", kinds=(), limit=0) -> list[int]:
    """Returns the numbers of the selected sentences."""
    selection = Selection(parse_ranges(ranges), frozenset(kinds), limit)
    return [number for number, _, _ in select(sentences, selection)]


def decoded_images(file, codec, number):
    """Returns the images of a sentence, uint8 [n,S,S,3]."""
    ids = [ids for ids, _ in records.read_records(str(file), TINY.num_embeddings)][number]
    return images.to_uint8(codec.decode(ids.reshape(-1, N)))


@pytest.mark.parametrize(
    "settings, numbers",
    [
        ({}, range(9)),
        ({"limit": 2}, [0, 1]),
        ({"ranges": "0,5,7-8"}, [0, 5, 7, 8]),
        ({"ranges": " 7-8 , 0 "}, [0, 7, 8]),
        ({"kinds": ["frames"]}, [1, 4, 7]),
        ({"kinds": ["frames", "images"], "ranges": "2-6"}, [2, 4, 5]),
        ({"kinds": ["images"], "limit": 2}, [2, 5]),
    ],
)
def test_sentences_are_selected_by_number_kind_and_limit(file, settings, numbers):
    assert selected(records.read_records(str(file), 32), **settings) == list(numbers)


def test_nothing_is_read_after_the_last_selected_sentence(file):
    def sentences():
        yield from list(records.read_records(str(file), 32))[:5]
        raise AssertionError("read too far")

    assert selected(sentences(), ranges="0,4") == [0, 4]
    assert selected(sentences(), kinds=["frames"], limit=2) == [1, 4]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sentences": "1-"}, "--sentences=1-: cannot read '1-'"),
        ({"sentences": "5-2"}, "cannot read '5-2'"),
        ({"sentences": "x"}, "cannot read 'x': give numbers from 0 and ranges"),
        ({"sentences": "4,9"}, "s.jsonl: ends with sentence 8, but sentence 9 is selected"),
        (
            {"kinds": "video"},
            "s.jsonl: has no sentence of kind 'video' up to sentence 8, only of kind 'frames', 'images', 'paired'",
        ),
        (
            {"sentences": "0", "kinds": "frames"},
            "has no sentence of kind 'frames' up to sentence 0, only of kind 'paired'",
        ),
    ],
)
def test_invalid_selections_are_reported(file, tiny, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        detokenize_file(file, tiny, tmp_path, **settings)


def test_a_file_without_sentences_is_reported(tiny, tmp_path):
    (tmp_path / "s.jsonl").touch()
    for ranges in ("", "4"):
        with pytest.raises(UserError, match=r"s\.jsonl: contains no sentence"):
            detokenize_file(tmp_path / "s.jsonl", tiny, tmp_path / "d", sentences=ranges)


def test_png_files_have_rows_of_images(file, tiny, codec, tmp_path):
    detokenize_file(file, tiny, tmp_path, sentences="8", columns=2)
    sheet, expected = np.asarray(Image.open(tmp_path / "000008.png")), decoded_images(file, codec, 8)
    assert sheet.shape == (2 * S + 2, 2 * S + 2, 3)
    for image, (top, left) in zip(expected, [(0, 0), (0, S + 2), (S + 2, 0)]):
        np.testing.assert_array_equal(sheet[top : top + S, left : left + S], image)


def test_mp4_files(file, tiny, codec, tmp_path):
    names = detokenize_file(file, tiny, tmp_path, kinds="images", format="mp4", fps=5)
    assert names == [f"{i:06d}.mp4" for i in (2, 5, 8)]
    np.testing.assert_allclose(videos.timestamps(tmp_path / "000005.mp4"), [0, 0.2, 0.4], atol=1e-3)
    frames = videos.read(tmp_path / "000005.mp4", [0, 0.2, 0.4])
    expected = decoded_images(file, codec, 5) / 255
    differences = [[np.abs(a - b).mean() for b in expected] for a in frames]
    assert (np.argmin(differences, axis=1) == range(3)).all()


def test_gif_files(file, tiny, tmp_path):
    assert detokenize_file(file, tiny, tmp_path, sentences="8", format="gif") == ["000008.gif"]
    with Image.open(tmp_path / "000008.gif") as animation:
        assert (animation.n_frames, animation.info["duration"], animation.size) == (3, 250, (S, S))


class Page(html.parser.HTMLParser):
    """Headings, captions and images of a page in order, and its links to other files."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._tag, self.links = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith("data:image/png;base64,"):
                self.links.append(value)
            elif name == "src":
                data = base64.b64decode(value.partition(",")[2])
                self.elements.append(np.asarray(Image.open(io.BytesIO(data))))

    def handle_data(self, data):
        if self._tag in ("h2", "figcaption", "p") and data.strip():
            self.elements.append(data)


def test_html_page(file, tiny, codec, tmp_path):
    assert detokenize_file(file, tiny, tmp_path, sentences="1,3-4", format="html") == ["sentences.html"]
    page = Page((tmp_path / "sentences.html").read_text())
    first, third = decoded_images(file, codec, 1), decoded_images(file, codec, 3)
    expected = ["sentence 1 · frames", first[0], "<1>/&0.png", first[1], "<1>/&1.png"]
    expected += ["sentence 3 · paired", "clip.mp4, 0.5 s", third[0], "sentence 4 · frames"]
    fourth = decoded_images(file, codec, 4)
    expected += [fourth[0], "<4>/&0.png, 0.5 s", fourth[1], "<4>/&1.png, 1.25 s"]
    assert len(page.elements) == len(expected) and not page.links
    for element, expected_element in zip(page.elements, expected):
        np.testing.assert_array_equal(element, expected_element)


def test_packed_files(file, tiny, tmp_path):
    packed_file.write(str(tmp_path / "s.packed"), [(str(file), records.read_records(str(file), 32))], keep_others=True)
    names = detokenize_file(tmp_path / "s.packed", tiny, tmp_path / "p", kinds="frames", limit=2)
    assert names == detokenize_file(file, tiny, tmp_path / "j", kinds="frames", limit=2) and len(names) == 2
    for name in names:
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "j" / name).read_bytes()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"format": "mp4", "fps": 0.0}, "--fps=0.0: must be above 0"),
        ({"columns": 0}, "--columns=0: must be at least 1"),
        ({"input_file": "none.jsonl"}, "none.jsonl: no such file"),
        ({"input_file": ""}, "--input_file is missing"),
    ],
)
def test_invalid_settings_are_reported(file, tiny, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        detokenize_file(settings.pop("input_file", file), tiny, tmp_path, **settings)


def test_tokens_that_are_not_whole_images_are_reported(tiny, tmp_path):
    (tmp_path / "s.jsonl").write_bytes(records.record_line(np.zeros(N + 1, np.int32)))
    with pytest.raises(UserError, match=rf"s.jsonl: sentence 0: {N + 1} tokens are not a whole number of images"):
        detokenize_file(tmp_path / "s.jsonl", tiny, tmp_path / "d", format="html")
    assert not os.listdir(tmp_path / "d")


@pytest.mark.slow
def test_sentences_of_another_tokenizer_are_refused(tiny, codec, tmp_path):
    """Also if the flag is forgotten, and if their ids are outside its codebook."""
    for name, ids in (("ours", [1] * N), ("other", [9000] * N)):
        digest = codec.digest if name == "ours" else "0123456789abcdef"
        (tmp_path / f"{name}.jsonl").write_bytes(records.record_line(ids, tokenizer=digest))
    for name, vqgan in (("other", tiny), ("other", ""), ("ours", "")):
        with pytest.raises(UserError, match=rf"{name}\.jsonl: sentence 0 has tokens of the tokenizer .*--vqgan"):
            detokenize_file(tmp_path / f"{name}.jsonl", vqgan, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert detokenize_file(tmp_path / "ours.jsonl", tiny, tmp_path / "o") == ["000000.png"]
    with open(tmp_path / "ours.jsonl", "ab") as joined:
        joined.write(records.record_line([1] * N, tokenizer="0123456789abcdef"))
    with pytest.raises(UserError, match=r"ours\.jsonl: sentence 1 has tokens of the tokenizer 0123456789abcdef"):
        detokenize_file(tmp_path / "ours.jsonl", tiny, tmp_path / "o")


@pytest.mark.slow
def test_without_a_name_and_without_the_flag_one_line_warns(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(records.record_line([1] * Codec().config.tokens_per_image) * 2)
    detokenize_file(tmp_path / "a.jsonl", "", tmp_path / "o")
    assert capsys.readouterr().err.count("a.jsonl does not name its tokenizer") == 1
