"""Sentences from folders: what stands where, the same every time, and every bad input by its name."""

import types

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan, write_picture

from EasyLM import records
from EasyLM.errors import UserError
from tokenizer import build, detokenize, images, sentences
from tokenizer.codec import Codec

N = TINY.tokens_per_image


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture
def folders(tmp_path):
    """Five images with labels (of another extension), and two clips."""
    for i in range(5):
        write_picture(tmp_path / "image" / f"{i}.png", i)
        write_picture(tmp_path / "label" / f"{i}.BMP", 100 + i)
    for clip, length in {"a": 7, "b": 3}.items():
        for i in range(length):
            write_picture(tmp_path / "clips" / clip / f"{i:02d}.png", ord(clip) * 100 + i)
    return tmp_path


def make(folders, tiny, **settings):
    """The records of a build."""
    settings = {"output_file": str(folders / "out.jsonl"), "vqgan": tiny, "batch_size": 8, "workers": 2, **settings}
    run_main(build, **settings)
    return list(records.read_records(settings["output_file"], TINY.num_embeddings))


def paired(folders, tiny, **settings):
    settings = {"kind": "paired", "n_shots": 2, "n_epochs": 2, "seed": 5, **settings}
    return make(folders, tiny, input_dir=str(folders / "image"), target_dir=str(folders / "label"), **settings)


def test_images_are_one_sentence_each_in_name_order(folders, tiny):
    found = make(folders, tiny, kind="images", input_dir=str(folders / "image"))
    paths = [str(folders / "image" / f"{i}.png") for i in range(5)]
    assert [record["sources"] for _, record in found] == [[path] for path in paths]
    expected = Codec(tiny).encode(np.stack([images.load(path, TINY.resolution) for path in paths]))
    np.testing.assert_array_equal([tokens for tokens, _ in found], expected)
    assert all(record["kind"] == "images" for _, record in found)
    assert len(np.unique(expected, axis=0)) == 5  # else order would not show


def test_pairs_hold_the_codes_of_each_image_and_its_own_label(folders, tiny):
    found = paired(folders, tiny)
    assert len(found) == 4  # two epochs of five pairs, two pairs a sentence
    for tokens, record in found:
        stems = [images.pathlib.Path(path).stem for path in record["sources"]]
        assert stems[0::2] == stems[1::2] and len(set(stems)) == 2
        alone = Codec(tiny).encode(np.stack([images.load(path, TINY.resolution) for path in record["sources"]]))
        np.testing.assert_array_equal(tokens, alone.reshape(-1))


def test_a_file_depends_on_the_seed_and_not_on_batch_or_threads(folders, tiny):
    paired(folders, tiny)
    first = (folders / "out.jsonl").read_bytes()
    paired(folders, tiny, batch_size=16, workers=1)
    assert (folders / "out.jsonl").read_bytes() == first
    paired(folders, tiny, seed=6)
    assert (folders / "out.jsonl").read_bytes() != first
    assert not (folders / "out.jsonl.tmp").exists()


def test_every_epoch_uses_pairs_once_in_a_new_order():
    settings = types.SimpleNamespace(n_shots=5, n_epochs=3)
    items = [(i, 10 + i) for i in range(10)]
    found = list(sentences.paired(items, np.random.default_rng(0), settings))
    epochs = [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch[0::2]) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_frames_are_windows_of_one_clip_at_one_stride():
    settings = types.SimpleNamespace(n_frames=3, n_epochs=40, max_stride=4)
    clips = [tuple(range(100, 109)), tuple(range(200, 202))]
    found = list(sentences.frames(clips, np.random.default_rng(0), settings))
    strides = set()
    for sentence in found:
        steps = np.diff(sentence)
        assert len(sentence) == 3 and len(set(steps)) == 1
        assert set(sentence) <= set(clips[0])
        strides.add(int(steps[0]))
    assert strides == {1, 2, 3, 4}
    with pytest.raises(UserError, match="--n_frames=10: the longest clip has 9"):
        list(
            sentences.frames(
                clips, np.random.default_rng(0), types.SimpleNamespace(**{**vars(settings), "n_frames": 10})
            )
        )


def test_frames_of_folders(folders, tiny):
    found = make(folders, tiny, kind="frames", input_dir=str(folders / "clips"), n_frames=3)
    assert len(found) == 3  # two windows of the clip of seven, one of the clip of three
    for tokens, record in found:
        assert len(tokens) == 3 * N
        assert len({images.pathlib.Path(path).parent for path in record["sources"]}) == 1
        assert record["sources"] == sorted(record["sources"])


def test_stems_without_partner_are_named_or_counted(folders, tiny, capsys):
    write_picture(folders / "image" / "lone.png", 9)
    with pytest.raises(UserError, match=r"lone\.png has no partner in --target_dir"):
        paired(folders, tiny)
    assert len(paired(folders, tiny, max_errors=1)) == 4
    output = capsys.readouterr()
    assert "skipped:" in output.err and "1 inputs skipped" in output.out


def test_two_pictures_of_one_stem_are_named(folders, tiny):
    write_picture(folders / "label" / "3.png", 9)
    with pytest.raises(UserError, match=r"3\.(BMP|png) and 3\.(BMP|png) share the stem '3'"):
        paired(folders, tiny)


def test_a_broken_picture_is_named_and_its_pair_left_out(folders, tiny):
    broken = folders / "label" / "2.BMP"
    broken.write_bytes(broken.read_bytes()[:90])
    with pytest.raises(UserError, match=r"2\.BMP: not a readable picture"):
        paired(folders, tiny)
    assert not (folders / "out.jsonl").exists() and not (folders / "out.jsonl.tmp").exists()
    found = paired(folders, tiny, max_errors=1)
    assert not any("2." in path.rsplit("/", 1)[1] for _, record in found for path in record["sources"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_dir": ""}, "--input_dir is missing"),
        ({"input_dir": "nowhere"}, "--input_dir=nowhere: no such folder"),
        ({"n_shots": 0}, "--n_shots=0: must be at least 1"),
        ({"n_shots": 6}, "--n_shots=6: only 5 pairs"),
        ({"target_dir": ""}, "--target_dir is missing"),
    ],
)
def test_bad_settings_are_named(folders, tiny, settings, message):
    base = {"kind": "paired", "input_dir": str(folders / "image"), "target_dir": str(folders / "label")}
    with pytest.raises(UserError, match=message):
        make(folders, tiny, **{**base, **settings})


def test_detokenize_draws_what_was_encoded(folders, tiny):
    found = paired(folders, tiny)
    run_main(
        detokenize,
        input_file=str(folders / "out.jsonl"),
        output_dir=str(folders / "drawn"),
        vqgan=tiny,
        limit=2,
        columns=2,
    )
    drawn = sorted((folders / "drawn").iterdir())
    assert [path.name for path in drawn] == ["000000.png", "000001.png"]
    picture = np.asarray(Image.open(drawn[1]))
    side = TINY.resolution
    assert picture.shape == (2 * side + 2, 2 * side + 2, 3)
    codes = found[1][0].reshape(4, N)
    np.testing.assert_array_equal(picture[side + 2 :, :side], images.to_uint8(Codec(tiny).decode(codes))[2])
    with pytest.raises(UserError, match="no whole number of pictures"):
        detokenize.draw(Codec(tiny), codes.reshape(-1)[:-1], 2, "sentence")


def _white_under_transparency(path):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8), "RGBA").save(path)
    return 1.0


def _sixteen_bit(path):
    Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)).save(path)
    return 200 / 255


def _palette(path):
    Image.new("RGB", (8, 8), (255, 255, 255)).convert("P").save(path)
    return 1.0


def _gray(path):
    Image.new("L", (8, 8), 51).save(path)
    return 0.2


@pytest.mark.parametrize("write", [_white_under_transparency, _sixteen_bit, _palette, _gray])
def test_every_kind_of_picture_becomes_rgb(tmp_path, write):
    value = write(tmp_path / "a.png")
    pixels = images.load(tmp_path / "a.png", 4)
    assert pixels.shape == (4, 4, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, value, atol=1e-6)


def test_cmyk_and_the_cameras_rotation(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.JPG")
    np.testing.assert_allclose(images.load(tmp_path / "a.JPG", 4), 1, atol=0.02)
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(half).save(tmp_path / "b.png", exif=exif)
    pixels = images.load(tmp_path / "b.png", 8)
    assert pixels[0].max() < 0.1 and pixels[-1].min() > 0.9
