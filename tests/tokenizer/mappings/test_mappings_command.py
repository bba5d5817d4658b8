"""The command that writes sentences of mappings: pool, workers, resume, errors."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizer_kit import TINY, run_main, tiny_vqgan

from EasyLM.data import records
from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from EasyLM.storage import HeartbeatLock, LockedError
from tokenizer.builders import resumable_file
from tokenizer.mappings import __main__ as command
from tokenizer.mappings import pool, sentences, writing
from tokenizer.mappings.pool import NUM_FRAMES, Pool, PoolSettings
from tokenizer.mappings.sentences import FAMILIES, Mixture
from tokenizer.media import images
from tokenizer.vqgan import Codec

SMALL = {"num_scenes": 12, "num_clips": 2, "num_photos": 8}
FEW_IMAGES = {**SMALL, "families": "segmentation:1,frames:1"}  # all of the pool, so that little is encoded


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory) -> str:
    """A folder of a tokenizer for 16x16 pixels, as 64 codes of 32."""
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def write(vqgan):
    def run(path, **settings) -> list[bytes]:
        run_main(command, output_file=str(path), **{"workers": 1, "vqgan": vqgan, **SMALL, **settings})
        return path.read_bytes().splitlines(keepends=True)

    return run


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory) -> Pool:
    directory = str(tmp_path_factory.mktemp("pool"))
    with Workers(1) as workers:
        pool.render(PoolSettings(0, 12, 2, 8, TINY.resolution), directory, workers)
    return Pool(directory)


@pytest.mark.slow
def test_sentences_depend_on_the_seed_and_their_number_only(tmp_path, write):
    lines = write(tmp_path / "one.jsonl", num=10)
    many = write(tmp_path / "many.jsonl", num=200, **FEW_IMAGES)
    assert many == write(tmp_path / "again.jsonl", num=200, workers=2, **FEW_IMAGES)
    assert lines[:3] == write(tmp_path / "short.jsonl", num=3)
    assert not set(lines) & set(write(tmp_path / "other.jsonl", num=10, seed=1))


def test_tokens_are_the_codes_of_the_composed_images(tmp_path, write, small_pool, vqgan):
    write(tmp_path / "all.jsonl", num=30)
    mixture, codec = command.parse_families(command.DEFAULT_FAMILIES), Codec(vqgan)
    kinds = set()
    for seed, (tokens, record) in enumerate(records.read_records(str(tmp_path / "all.jsonl"), TINY.num_embeddings)):
        kinds.add(record["kind"])
        assert len(tokens) == 16 * 64
        if seed < 6:
            numbers, new_images, keys = sentences.compose(small_pool, mixture, seed)
            others = iter(new_images)
            pixels = [next(others) if n < 0 else small_pool.pixels(np.array([n]))[0] for n in numbers]
            assert np.array_equal(tokens, codec.encode(images.to_float32(np.stack(pixels))).reshape(-1))
            assert {name: record[name] for name in keys} == keys
    assert len(kinds) > 7
    report = json.loads((tmp_path / "all.jsonl.report.json").read_bytes())
    assert report["sentences"] == 30 and report["sentences_per_second"] > 0


def test_a_file_that_another_process_writes_is_refused_before_the_pool_is_rendered(tmp_path, write, monkeypatch):
    monkeypatch.setattr(pool, "render", None)
    with HeartbeatLock(f"{tmp_path}/all.jsonl", is_output=True), pytest.raises(LockedError, match="in use by process"):
        write(tmp_path / "all.jsonl")


def test_images_of_the_pool_are_encoded_once(tmp_path, write):
    lines = write(tmp_path / "few.jsonl", num=200, **FEW_IMAGES)
    report = json.loads((tmp_path / "few.jsonl.report.json").read_bytes())
    assert len(lines) == 200 and report["images_encoded"] == 2 * 12 + 2 * NUM_FRAMES


@pytest.mark.slow
def test_an_interrupted_run_resumes(tmp_path, write, monkeypatch):
    whole = write(tmp_path / "whole.jsonl", num=200, **FEW_IMAGES)
    path, record_line, calls = tmp_path / "part.jsonl", records.record_line, []

    def interrupted(*arguments, **keys):
        calls.append(keys)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return record_line(*arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(resumable_file, "SAVE_SECONDS", 0)
        patch.setattr(writing.records, "record_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(path, num=200, **FEW_IMAGES)
    with pytest.raises(UserError, match=r"num=201 \(then: 200\)"):
        write(path, num=201, **FEW_IMAGES)
    calls.clear()
    monkeypatch.setattr(writing.records, "record_line", lambda *a, **keys: calls.append(1) or record_line(*a, **keys))
    assert write(path, num=200, **FEW_IMAGES) == whole
    assert len(calls) == 200 - 64
    assert write(path, num=200, **FEW_IMAGES) == whole and len(calls) == 200 - 64  # complete: nothing is written


def test_picture_shows_each_family_as_composed_and_as_decoded(tmp_path, write, small_pool, vqgan):
    path = tmp_path / "sheet.png"
    write(tmp_path / "x.jsonl", num=1, output_picture=str(path), families="segmentation:1,mosaic:1")
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[0] == 4 * 64 + 3 * 4
    composed, decoded = (sheet[top : top + 64, 176 : 176 + 64][::4, ::4] for top in (0, 68))
    assert np.array_equal(composed, sentences.sentence_images(small_pool, "segmentation", 0)[0])
    codec = Codec(vqgan)
    expected = codec.decode(codec.encode(images.to_float32(composed[None])))[0]
    assert np.abs(images.to_float32(decoded) - expected).max() < 0.01
    with pytest.raises(UserError, match=r"--output_picture=p.txt: must end with one of .png"):
        write(tmp_path / "y.jsonl", num=1, output_picture="p.txt")


def test_pool_numbers_its_images(small_pool):
    assert small_pool.num_images == 12 * 6 + 8 * 2 + 2 * NUM_FRAMES
    numbers = np.array([small_pool.number("scenes", "depth", 5), small_pool.number("photos", "gray", 7)])
    pixels = small_pool.pixels(numbers)
    assert np.array_equal(pixels[0], small_pool.scene("scenes", 5)["depth"])
    assert np.array_equal(pixels[1], small_pool.scene("photos", 7)["gray"])
    frames = small_pool.pixels(np.array(small_pool.frame_numbers(1)))
    moved = np.abs(np.diff(frames.astype(int), axis=0)).max((1, 2, 3))
    assert len(frames) == NUM_FRAMES and np.all(moved > 20)
    assert np.array_equal(small_pool.shows[5], np.isin(np.arange(7), small_pool.scene("scenes", 5)["labels"]))


def test_marked_classes_occur_in_most_scenes(small_pool):
    shown = []
    for seed in range(100):
        numbers, _, keys = sentences.compose(small_pool, Mixture(("marks",), (1.0,)), seed)
        scenes = np.array(numbers[::2]) - small_pool.number("scenes", "image", 0)
        assert len(set(scenes)) == 8
        shown.append(small_pool.shows[scenes, keys["mapping"]["steps"][0]["label"]].mean())
    assert np.mean(shown) > small_pool.shows[:, 1:5].mean() + 0.1


def test_families_occur_in_their_shares():
    mixture = command.parse_families("mosaic:1, frames:3")
    rng = np.random.default_rng(0)
    drawn = [mixture.draw(rng) for _ in range(2000)]
    assert set(drawn) == {"mosaic", "frames"} and drawn.count("frames") / 2000 == pytest.approx(0.75, abs=0.04)
    assert set(command.parse_families(command.DEFAULT_FAMILIES).families) == set(FAMILIES)


def test_families_of_few_mappings_have_the_same_ones_for_all_seeds(small_pool):
    few = Mixture(("recolour", "marks"), (1.0, 1.0), num_mappings=3)
    mappings: dict[str, set[str]] = {"recolour": set(), "marks": set()}
    by_seeds = []
    for first_seed in (0, 10**6):
        for seed in range(first_seed, first_seed + 60):
            _, _, keys = sentences.compose(small_pool, few, seed)
            mappings[keys["kind"]].add(json.dumps(keys["mapping"]))
        by_seeds.append({kind: set(texts) for kind, texts in mappings.items()})
    assert by_seeds[0] == by_seeds[1] and [len(texts) for texts in mappings.values()] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 500}, "--seed=500: scenes 500,000,000.* are reserved"),
        ({"families": "mosaics:1"}, "--families='mosaics': choose one of 'mosaic', 'recolour'"),
        ({"families": "mosaic"}, "'mosaic' must be mosaic:SHARE with a positive number"),
        ({"families": "mosaic:0"}, "'mosaic:0' must be mosaic:SHARE"),
        ({"families": "mosaic:nan"}, "'mosaic:nan' must be mosaic:SHARE"),
        ({"families": "mosaic:1,mosaic:2"}, "mosaic occurs twice"),
    ],
)
def test_errors_name_the_flag(tmp_path, write, settings, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "x.jsonl", **settings)
    assert not list(tmp_path.iterdir())
