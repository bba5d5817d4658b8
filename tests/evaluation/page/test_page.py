"""The page without a browser: previews, answers, errors and slots."""

import io
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image
from serve_kit import SECONDS, TINY, pixels_of, png, tiny_engine, tiny_prompter

from evaluation.page import examples, fields, handlers, layout
from evaluation.page.files import LIMITS, ExampleFiles
from evaluation.page.models import ModelInfo, Models
from evaluation.prompting import GenerationSettings
from evaluation.serving import uploads
from tokenizer.media import images


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "0.png").write_bytes(png(0))
    return tmp_path


def models_of(engine) -> Models:
    """Returns the models of a page with two: the engine of the first is given, the second cannot be loaded."""
    infos = [ModelInfo(name, engine.resolution, engine.max_prompt_images, 4) for name in ("tiny", "other")]
    return Models(infos, lambda name: pytest.fail(f"{name} is loaded"), engine)


def generate(engine, folder, files, settings=GenerationSettings(), model="tiny"):  # noqa: B008
    analogies = ExampleFiles(examples.analogies(TINY.resolution), folder, "analogy")
    request = handlers.Request(model, [str(folder / file) for file in files], settings)
    return handlers.generate(models_of(engine), analogies, request)


@pytest.mark.slow
def test_previews_come_before_the_answer(folder):
    engine = tiny_engine()
    settings = GenerationSettings(num_candidates=2, num_new_images=2, seed=3)
    first, reconstructed, *previews, last = generate(engine, folder, ["0.png"], settings)
    assert "Compiling" in first.status and first.answers == [] and first.reconstructions == []
    ((picture, caption),) = reconstructed.reconstructions
    assert caption == "Query" and picture.shape == (256, 256 + 8 + 256, 3)
    prompt = uploads.decode_images([png(0)], TINY.resolution, LIMITS)
    prompter = tiny_prompter()
    decoded = images.to_uint8(prompter.decode(prompter.encode(prompt)))[0]
    np.testing.assert_array_equal(picture[::16, 264::16], decoded)
    assert previews and all(update.status.startswith("Drawing: ") for update in previews)
    for update in previews:
        captions = [f"Candidate {c}, frame {f}" for c in (1, 2) for f in (1, 2)]
        assert [caption for _, caption in update.answers] == captions
        assert (update.answers[1][0][-1] == 128).all()  # the last rows of the second frame are not generated yet
    done = re.fullmatch(r"Done: (\d+) tokens a candidate in ([\d.]+) s, (\d+) tokens/s in all", last.status)
    assert int(done[1]) == 2 * TINY.tokens_per_image
    num_tokens = 2 * 2 * TINY.tokens_per_image  # of two candidates
    assert num_tokens / (float(done[2]) + 0.06) - 1 < int(done[3]) < num_tokens / max(float(done[2]) - 0.06, 1e-3) + 1
    assert [image.shape for image, _ in last.answers] == [(256, 256, 3)] * 4
    engine.close(SECONDS)


@pytest.mark.slow
def test_answers_to_examples_have_the_truth_and_go_to_the_history(folder):
    engine = tiny_engine()
    analogies = ExampleFiles(examples.analogies(TINY.resolution), folder, "depth")
    *pairs, query = analogies.save(1)  # the model is short: one pair
    history = [(str(folder / "0.png"), "an older strip"), (str(folder / "gone.png"), "a removed one")]
    settings = GenerationSettings(num_candidates=2, seed=3)
    request = handlers.Request("tiny", [*pairs[:2], query], settings)
    *_, last = handlers.generate(models_of(engine), analogies, request)
    assert [caption for _, caption in last.answers] == ["Truth", "Candidate 1", "Candidate 2"]
    truth = analogies.examples[1].truth[0]
    np.testing.assert_array_equal(last.answers[0][0][::16, ::16], truth)
    (strip, older), shown = handlers.remember(last.strip, history)
    assert strip[1].startswith("tiny: seed 3") and older == history[0] and shown == [strip, older]
    value = last.download.value  # gradio's copy of the file
    assert pathlib.Path(value["path"] if isinstance(value, dict) else value).name == pathlib.Path(strip[0]).name
    drawn = pixels_of(pathlib.Path(strip[0]).read_bytes())
    for name, image in [("truth", truth), ("query", analogies.examples[1].images[-1])]:
        big = image.repeat(16, 0).repeat(16, 1)
        places = np.argwhere((drawn == big[0, 0]).all(-1))
        fits = [np.array_equal(drawn[y : y + 256, x : x + 256], big) for y, x in places if drawn[y - 1, x].min() == 255]
        assert any(fits), name
    engine.close(SECONDS)


@pytest.mark.slow  # gradio takes seconds to import
def test_draws_of_both_tabs_at_once_add_to_one_history(folder):
    """Each draw adds to the history as it is at the end of the draw."""
    info = ModelInfo("tiny", TINY.resolution, 3, 4)
    functions = layout.build_page(Models([info], lambda name: None, None), folder).fns.values()
    draws = [f for f in functions if any(getattr(f, "name", "") == "answer" for _ in f.targets)]
    values = {}
    for number, draw in enumerate(draws):
        (add,) = (f for f in functions if f.trigger_after == draw._id and f.trigger_only_on_success)
        strip, history = add.inputs
        assert strip is draw.outputs[-1] and history not in [*draw.inputs, *draw.outputs]
        values[history], _ = add.fn((str(folder / "0.png"), f"strip {number}"), values.get(history, []))
    assert len(draws) == 2 and [[caption for _, caption in strips] for strips in values.values()] == [
        ["strip 1", "strip 0"]
    ]


@pytest.mark.slow  # gradio takes seconds to import
def test_user_errors_are_shown(folder):
    gradio = pytest.importorskip("gradio")
    engine = tiny_engine()
    for model in ("tiny", "other"):  # before the other model is loaded, in the place of the first
        with pytest.raises(gradio.Error, match="Query: not a readable image"):
            list(generate(engine, folder, ["text.png"], model=model))
        with pytest.raises(gradio.Error, match="no longer stored"):
            list(generate(engine, folder, ["gone.png"], model=model))
        with pytest.raises(gradio.Error, match="4 images: a prompt has at most 3"):
            list(generate(engine, folder, ["0.png"] * 4, model=model))
        with pytest.raises(gradio.Error, match="at most 4 new images"):
            list(generate(engine, folder, ["0.png"], GenerationSettings(3, 2), model))
    with pytest.raises(gradio.Error, match="no model 'gone': choose one of tiny, other"):
        list(generate(engine, folder, ["0.png"], model="gone"))
    with pytest.raises(gradio.Error, match="temperature=-1"):
        handlers.generation_settings(GenerationSettings(), [1, -1, 1, 0, 1])
    engine.close(SECONDS)
    with pytest.raises(gradio.Error, match="stopping"):
        list(generate(engine, folder, ["0.png"]))


@pytest.mark.slow  # gradio takes seconds to import
def test_wrong_numbers_name_their_field(tmp_path):
    gradio = pytest.importorskip("gradio")
    engine = types.SimpleNamespace(resolution=8, max_prompt_images=7)
    blocks = layout.build_page(models_of(engine), tmp_path).blocks
    numbers = [block for block in blocks.values() if isinstance(block, gradio.Slider | gradio.Number)]
    assert {block.label for block in numbers} == {"Pairs", "Candidates", "Temperature", "Top-p", "New frames", "Seed"}
    for block in numbers:
        assert block.preprocess(block.value) == block.value
        for wrong in (None, "1", float("nan"), block.minimum - 1, block.maximum + 1):  # None: the field is empty
            with pytest.raises(gradio.Error, match=f"{block.label}: must be a number from"):
                block.preprocess(wrong)


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
    path = fields.image_slot("Query").preprocess(payload)
    pixels = uploads.decode_images([pathlib.Path(path).read_bytes()], 8, LIMITS)
    np.testing.assert_array_equal(pixels, uploads.decode_images([image_file(mode)], 8, LIMITS))
    assert pixels.std() > 0.01  # neither black nor white


@pytest.mark.slow  # gradio takes seconds to import
def test_an_image_slot_does_not_decode_files(tmp_path):
    data_classes = pytest.importorskip("gradio.data_classes")
    (tmp_path / "file").write_bytes(b"garbage")
    payload = data_classes.ImageData(path=str(tmp_path / "file"), orig_name="file.png")
    slot = fields.image_slot("Query")
    assert slot.preprocess(payload) == str(tmp_path / "file") and slot.preprocess(None) is None
    assert not pathlib.Path(fields.__file__).with_suffix(".pyi").exists()


@pytest.mark.slow
@pytest.mark.parametrize("max_prompt_images", [2, 4, 5])
def test_the_page_fits_models_of_any_length(tmp_path, max_prompt_images):
    """Without room for a shot and a query there is no analogy tab; with room for one shot, no slider."""
    engine = types.SimpleNamespace(resolution=8, max_prompt_images=max_prompt_images)
    config = layout.build_page(models_of(engine), tmp_path).config
    labels = [component["props"].get("label") for component in config["components"]]
    assert ("Query" in labels) == (max_prompt_images > 2)
    (pairs,) = [c["props"] for c in config["components"] if c["props"].get("label") == "Pairs"] or [None]
    assert (pairs is not None and pairs["visible"]) == (max_prompt_images > 4)
