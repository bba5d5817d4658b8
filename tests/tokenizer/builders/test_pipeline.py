"""Bounded memory, whatever the number of inputs; and the shuffles that examples are made by."""

import collections
import concurrent.futures
import dataclasses
import errno
import os
import sqlite3
import threading
import types

import numpy as np
import pytest

from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from tokenizer.builders import file_index, image_ref, pipeline, samplers
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.file_index import Inputs, Side
from tokenizer.builders.image_ref import Picture
from tokenizer.builders.pipeline import Encoder, Pipeline
from tokenizer.media import folders, images
from tokenizer.sentence_files.skipped_inputs import Problems

TOKENS, SIDE = 4, 2


class FakeCodec:
    """Codes of a picture are its first pixel's value; notes the batches."""

    config = types.SimpleNamespace(resolution=SIDE)

    def __init__(self):
        self.batches, self._lock = [], threading.Lock()

    def encode(self, pixels):
        with self._lock:
            self.batches.append(len(pixels))
        return np.repeat(np.round(pixels[:, 0, 0, :1] * 255).astype(np.int32), TOKENS, axis=1)


@dataclasses.dataclass
class Sentence:
    pictures: list


def value(picture):
    return int(picture.path) % 251


class Reading:
    """Reads at once; counts what is read, and how many were read but not yet taken."""

    def __init__(self, bad=()):
        self.count, self.bad = collections.Counter(), bad

    def __call__(self, group):
        future = concurrent.futures.Future()
        self.count.update(group)
        if group[0].path in self.bad:
            future.set_exception(UserError(f"{group[0].path}: broken"))
        else:
            future.set_result(np.stack([np.full((SIDE, SIDE, 3), value(p), np.uint8) for p in group]))
        return future


def test_a_stream_without_end_needs_bounded_memory(tmp_path):
    codec, read, depth = FakeCodec(), Reading(), 40
    flow = Pipeline(read, Encoder(codec), CodeCache(16, TOKENS, str(tmp_path)), 8, depth)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Sentence([Picture(str(taken * 5 + i)) for i in range(7)])  # neighbours share two pictures

    for yielded, (sentence, codes) in enumerate(flow.run(endless()), start=1):
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, [[value(p)] * TOKENS for p in sentence.pictures])
        assert len(flow._wanted) <= depth + 7
        assert (taken - yielded) * 5 <= depth + 7
        if yielded == 2000:
            break
    assert set(codec.batches[1:]) == {8}  # full ones
    # One that comes again soon is not read again.
    assert max(read.count.values()) == 1


def test_sentences_larger_than_the_window_and_errors_come_in_order(tmp_path):
    codec, read = FakeCodec(), Reading(bad={"3", "30"})
    flow = Pipeline(read, Encoder(codec), CodeCache(1, TOKENS, str(tmp_path)), 8, depth=4)
    sentences = [Sentence([Picture(str(n + i)) for i in range(size)]) for n, size in ((0, 3), (2, 2), (5, 40), (1, 1))]
    found = list(flow.run(sentences))
    assert [sentence for sentence, _ in found] == sentences
    assert [result for _, result in found if isinstance(result, dict)] == [{"3": "3: broken"}, {"30": "30: broken"}]
    np.testing.assert_array_equal(found[3][1], [[1] * TOKENS])
    assert not flow._wanted and codec.batches[-1] == 1


def test_the_device_waits_while_nothing_is_there(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    codec = FakeCodec()
    encoder = Encoder(codec)
    now[0] = 3.0  # waits for 3 s
    real = codec.encode

    def encode(pixels):
        now[0] += 5.0
        return real(pixels)

    codec.encode = encode
    encoder.submit(np.zeros((2, SIDE, SIDE, 3), np.uint8)).result()
    now[0] = 10.0  # and for 2 s more
    assert encoder.waiting_share() == pytest.approx(0.5) and encoder.pictures == 2
    assert encoder.figures() == "0 images/s, device waits 50%"


@pytest.mark.slow  # processes start
def test_only_what_kills_its_process_is_left_out(tmp_path):
    deadly, size = ("3", "4", "11"), (1, SIDE, SIDE, 3)
    with Workers(2) as workers:

        def read(group):
            kills = group[0].path in deadly
            return workers.submit(os._exit, 1) if kills else workers.submit(np.full, size, value(group[0]), np.uint8)

        flow = Pipeline(read, Encoder(FakeCodec()), CodeCache(0, TOKENS, str(tmp_path)), 4, depth=8)
        found = [codes for _, codes in flow.run(Sentence([Picture(str(number))]) for number in range(20))]
        assert workers.submit(abs, -1).result() == 1
    for number, codes in enumerate(found):
        if str(number) in deadly:
            reason = f"{number}: the process that reads it dies (out of memory, or a crash in a library)"
            assert codes == {str(number): reason}
        else:
            np.testing.assert_array_equal(codes, [[number] * TOKENS])


def test_the_cache_gives_right_codes_or_none_in_a_file_of_fixed_size(tmp_path):
    room = 64
    cache = CodeCache(room, TOKENS, str(tmp_path))
    codes = {Picture(str(i), i / 7, "hole", i): np.full(TOKENS, i, np.uint16) for i in range(10 * room)}
    kept = 0
    for i, (picture, value) in enumerate(codes.items(), start=1):
        assert cache.get(picture) is None
        cache.put(picture, value)
        np.testing.assert_array_equal(cache.get(picture), value)
        if i == room // 2:
            kept = sum(cache.get(p) is not None for p in list(codes)[:i])
    assert kept >= 0.9 * room // 2  # half full: little is lost
    found = {picture: cache.get(picture) for picture in codes}
    assert 0.8 * room <= sum(value is not None for value in found.values()) <= room
    for picture, value in found.items():
        assert value is None or np.array_equal(value, codes[picture])
    assert not os.listdir(tmp_path)  # it has no name, so a kill leaves nothing


def test_a_full_disk_ends_only_the_cache(tmp_path, monkeypatch, capsys):
    cache = CodeCache(64, TOKENS, str(tmp_path))
    one, two, three = (Picture(str(i)) for i in range(3))
    cache.put(one, np.arange(TOKENS))
    with monkeypatch.context() as patch:
        pwrite = os.pwrite
        patch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:3], place))  # what still went in
        cache.put(two, np.arange(TOKENS))
        assert cache.get(two) is None and cache.get(one).tolist() == list(range(TOKENS))

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "pwrite", full)
        cache.put(three, np.arange(TOKENS))
    for picture in (one, two, three):
        cache.put(picture, np.arange(TOKENS))
        assert cache.get(picture) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not kept for further epochs any more: [Errno 28] No space left" in said


def listed(monkeypatch, names, layout, count=1):
    """Inputs over names that no disk holds."""
    by_directory = [names] * count if isinstance(names[0], str) else names

    def walk(directory, flag, extensions, others):
        return (folders.FileEntry(name, 1, 2) for name in by_directory[int(directory)])

    monkeypatch.setattr(folders, "walk", walk)
    sides = [Side(str(i), "input_dir") for i in range(len(by_directory))]
    problems = Problems(99)
    return Inputs(layout, sides, images.IMAGE_EXTENSIONS, problems), problems


def test_inputs_are_items_of_rows_in_order_and_know_a_change(monkeypatch):
    names = ["b/f10.png", "b/f9.png", "a/x.png", "b/f9a.png", "b/f09.png"]
    clips, _ = listed(monkeypatch, names, file_index.clips)
    assert [[row[0].path for row in clips.rows(i)] for i in range(len(clips))] == [
        ["0/a/x.png"],
        ["0/b/f09.png", "0/b/f9.png", "0/b/f9a.png", "0/b/f10.png"],
    ]
    assert clips.sizes.tolist() == [1, 4] and clips.row(1, 3) == (Picture("0/b/f10.png"),)
    assert clips.digest == listed(monkeypatch, names[::-1], file_index.clips)[0].digest
    assert clips.digest != listed(monkeypatch, names[1:], file_index.clips)[0].digest
    aligned, problems = listed(
        monkeypatch, [["1.png", "2.png", "4.png"], ["2.jpg", "3.jpg", "4.gif"]], file_index.by_stem
    )
    assert [aligned.rows(i) for i in range(len(aligned))] == [
        [(Picture(f"0/{stem}.png"), Picture(f"1/{stem}.{ending}"))] for stem, ending in (("2", "jpg"), ("4", "gif"))
    ]
    assert list(problems.reasons.values()) == [
        "0/1.png has no partner in --input_dir=1",
        "1/3.jpg has no partner in --input_dir=0",
    ]


def test_files_passed_over_are_counted_once_a_folder(tmp_path):
    for name in ("x/s/images/1.jpg", "x/s/masks/1.png", "x/s/pointcloud.ply", "x/frame_annotations.jgz", "y/1.ply"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sides = [Side(str(tmp_path), "input_dir", folder) for folder in ("images", "masks")]
    assert Inputs(file_index.co3d, sides, images.IMAGE_EXTENSIONS, Problems(0)).others == {".ply": 2, ".jgz": 1}


def test_a_disk_without_room_for_the_list_is_named(monkeypatch):
    connect = sqlite3.connect

    def small(name):
        database = connect(name)
        database.execute("PRAGMA max_page_count = 8")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(UserError, match=r"cannot be kept in /full \(.*disk is full\): set \$TMPDIR to"):
        listed(monkeypatch, [f"{number:0100d}.png" for number in range(1000)], file_index.by_name)


def test_every_epoch_of_shots_uses_items_once_in_a_new_order(monkeypatch):
    names = [f"{i:02d}.png" for i in range(11)]
    inputs, _ = listed(monkeypatch, names, file_index.by_name)
    group = samplers.Shots(inputs, types.SimpleNamespace(n_shots=3, seed=1))
    assert group.examples == 3
    epochs = [[p.path for example in range(3) for (p,) in group.rows(epoch, example)] for epoch in range(60)]
    assert all(len(set(epoch)) == 9 for epoch in epochs) and len(set(map(tuple, epochs))) == 60
    left_over = collections.Counter(f"0/{name}" for name in names for epoch in epochs if f"0/{name}" not in epoch)
    assert len(left_over) == 11 and max(left_over.values()) < 25  # 11 of 60 each, on average
    other = samplers.Shots(inputs, types.SimpleNamespace(n_shots=3, seed=2))
    assert other.rows(0, 0) != group.rows(0, 0)


def test_every_epoch_of_classes_uses_pictures_once_and_as_many_as_can_be(monkeypatch):
    sizes = {"a": 7, "b": 6, "c": 4, "d": 2, "e": 1}
    names = [f"{name}/{i}.png" for name, size in sizes.items() for i in range(size)]
    inputs, _ = listed(monkeypatch, names, file_index.classes)
    group = samplers.Classes(inputs, types.SimpleNamespace(n_shots=2, images_per_shot=2, seed=1))
    monkeypatch.setattr(Inputs, "sizes", property(lambda _: pytest.fail("all sizes are listed for an example")))
    # Rounds of two pictures: a b c d, a b c, a b.
    assert group.examples == 2 + 1 + 1
    seen = set()
    for epoch in range(40):
        used = []
        for example in range(group.examples):
            rows = [row[0].path for row in group.rows(epoch, example)]
            names = [path.split("/")[1] for path in rows]
            assert names[0] == names[1] != names[2] == names[3]
            used += rows
        assert len(set(used)) == len(used)
        seen |= set(used)
    assert seen == {f"0/{name}/{i}.png" for name, size in sizes.items() if size > 1 for i in range(size)}


def test_facts_of_a_sentence_are_those_of_its_pictures():
    sentence = [Picture("a.mp4", 1.5), Picture("b:c.png", None, "hole", 12), Picture("d.png", None, "gray")]
    facts = image_ref.facts(sentence)
    assert facts == {
        "sources": ["a.mp4", "b:c.png", "d.png"],
        "seconds": [1.5, None, None],
        "views": ["plain", "hole:12", "gray"],
    }
    assert image_ref.of_record(facts) == sentence
    assert image_ref.facts(sentence[:1]).keys() == {"sources", "seconds"}
