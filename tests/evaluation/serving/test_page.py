"""The page without a browser: previews, errors, files and examples."""

import io
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image
from serve_kit import SECONDS, TINY, png, tiny_engine

from EasyLM.errors import UserError
from evaluation.prompting import GenerationSettings
from evaluation.serving import page, page_examples, page_handlers, uploads


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "0.png").write_bytes(png(0))
    return tmp_path


@pytest.mark.slow
def test_previews_come_before_the_answer(folder):
    engine = tiny_engine()
    settings = GenerationSettings(num_candidates=2, num_new_images=2, seed=3)
    first, *previews, last = page_handlers.generate(engine, [str(folder / "0.png")], settings, folder)
    assert "Compiling" in first[0] and first[1] == []
    assert previews and all(status.startswith("Drawing: ") for status, _, _ in previews)
    for _, captioned, _ in previews:
        assert [caption for _, caption in captioned] == ["1: frame 1", "1: frame 2", "2: frame 1", "2: frame 2"]
        assert (captioned[1][0][-1] == 128).all()  # the last rows of the second frame are not generated yet
    status, captioned, button = last
    told = re.fullmatch(r"Done: (\d+) tokens a candidate in ([\d.]+) s, (\d+) tokens/s in all", status)
    assert int(told[1]) == 2 * TINY.tokens_per_image
    num_tokens = 2 * 2 * TINY.tokens_per_image  # of two candidates
    assert num_tokens / (float(told[2]) + 0.06) - 1 < int(told[3]) < num_tokens / max(float(told[2]) - 0.06, 1e-3) + 1
    assert [image.shape for image, _ in captioned] == [(256, 256, 3)] * 4
    sheet = np.asarray(Image.open(button.value["path"] if isinstance(button.value, dict) else button.value))
    assert sheet.shape == (2 * TINY.resolution + 2, 2 * TINY.resolution + 2, 3)
    np.testing.assert_array_equal(captioned[0][0][::16, ::16], sheet[: TINY.resolution, : TINY.resolution])
    engine.close(SECONDS)


@pytest.mark.slow  # gradio takes seconds to import
def test_user_errors_are_shown(folder):
    gradio = pytest.importorskip("gradio")
    engine = tiny_engine()
    with pytest.raises(gradio.Error, match="not a readable image"):
        list(page_handlers.generate(engine, [str(folder / "text.png")], GenerationSettings(), folder))
    with pytest.raises(gradio.Error, match="no longer stored"):
        list(page_handlers.generate(engine, [str(folder / "gone.png")], GenerationSettings(), folder))
    with pytest.raises(gradio.Error, match="temperature=-1"):
        page_handlers.generation_settings(GenerationSettings(), [1, -1, 1, 0, 1])
    engine.close(SECONDS)
    with pytest.raises(gradio.Error, match="stopping"):
        list(page_handlers.generate(engine, [str(folder / "0.png")], GenerationSettings(), folder))


def image_file(mode: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 2 ** (16 if mode == "I;16" else 8), (9, 9, 4))
    file = io.BytesIO()
    pixels = values[..., 0].astype(np.uint16) if mode == "I;16" else values.astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    assert Image.open(file).mode == mode
    return file.getvalue()


@pytest.mark.slow  # gradio takes seconds to import
@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_an_image_slot_passes_the_file_on_as_the_service_does(tmp_path, mode):
    data_classes = pytest.importorskip("gradio.data_classes")
    (tmp_path / "file").write_bytes(image_file(mode))
    payload = data_classes.ImageData(path=str(tmp_path / "file"), orig_name="file.png")
    path = page.image_slot("Query").preprocess(payload)
    pixels = uploads.decode_images([pathlib.Path(path).read_bytes()], 8, page_handlers.LIMITS)
    np.testing.assert_array_equal(pixels, uploads.decode_images([image_file(mode)], 8, page_handlers.LIMITS))
    assert pixels.std() > 0.01  # neither black nor white


@pytest.mark.slow  # gradio takes seconds to import
def test_an_image_slot_does_not_decode_files(tmp_path):
    data_classes = pytest.importorskip("gradio.data_classes")
    (tmp_path / "file").write_bytes(b"garbage")
    payload = data_classes.ImageData(path=str(tmp_path / "file"), orig_name="file.png")
    slot = page.image_slot("Query")
    assert slot.preprocess(payload) == str(tmp_path / "file") and slot.preprocess(None) is None
    assert not pathlib.Path(page.__file__).with_suffix(".pyi").exists()


def test_examples_are_prompts_of_one_length(monkeypatch):
    analogies, sequences = page_examples.analogies(16), page_examples.sequences(16, count=2)
    assert [example.name for example in analogies] == ["segmentation", "depth", "normals", "edges", "colours"]
    assert {example.images.shape for example in [*analogies, *sequences]} == {(7, 16, 16, 3)}

    def raise_not_installed(*arguments, **options):
        raise UserError("not installed")

    monkeypatch.setattr("tokenizer.synthetic.photos.crop", raise_not_installed)
    assert len(page_examples.analogies(8)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("max_prompt_images", [2, 4, 5])
def test_the_page_fits_models_of_any_length(tmp_path, max_prompt_images):
    """Without room for a shot and a query there is no analogy tab; with room for one shot, no slider."""
    engine = types.SimpleNamespace(resolution=8, max_prompt_images=max_prompt_images)
    config = page.build_page(engine, tmp_path).config
    labels = [component["props"].get("label") for component in config["components"]]
    assert ("Query" in labels) == (max_prompt_images > 2)
    (pairs,) = [c["props"] for c in config["components"] if c["props"].get("label") == "Pairs"] or [None]
    assert (pairs is not None and pairs["visible"]) == (max_prompt_images > 4)
