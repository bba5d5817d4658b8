"""The pipeline yields codes in order, in bounded memory, and reads each pending image once."""

import collections
import concurrent.futures
import dataclasses
import os
import threading
import types

import numpy as np
import pytest

from EasyLM.errors import UserError
from EasyLM.process_pool import Workers
from tokenizer.builders import image_ref, pipeline
from tokenizer.builders.image_ref import ImageRef
from tokenizer.builders.pipeline import Encoder, Pipeline

TOKENS, SIDE = 4, 2


class FakeCodec:
    """Encodes an image as the value of its first pixel, and records the batch sizes."""

    resolution = SIDE

    def __init__(self):
        self.batches, self._lock = [], threading.Lock()

    def encode(self, pixels):
        with self._lock:
            self.batches.append(len(pixels))
        return np.repeat(np.round(pixels[:, 0, 0, :1] * 255).astype(np.int32), TOKENS, axis=1)


@dataclasses.dataclass
class Sentence:
    images: list


def value(ref: ImageRef) -> int:
    """Returns the value of all pixels of an image."""
    return int(ref.path) % 251


class CountingReader:
    """Reads images immediately and counts the reads of each. Bad paths raise."""

    def __init__(self, bad=()):
        self.reads, self.bad = collections.Counter(), bad

    def __call__(self, group):
        future = concurrent.futures.Future()
        self.reads.update(group)
        if group[0].path in self.bad:
            future.set_exception(UserError(f"{group[0].path}: broken"))
        else:
            future.set_result(np.stack([np.full((SIDE, SIDE, 3), value(ref), np.uint8) for ref in group]))
        return future


def test_an_endless_stream_needs_bounded_memory(make_cache):
    codec, read, max_pending = FakeCodec(), CountingReader(), 40
    stream = Pipeline(read, Encoder(codec), make_cache(16), 8, max_pending, processes=0)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Sentence([ImageRef(str(taken * 5 + i)) for i in range(7)])  # neighbours share two images

    for yielded, (sentence, codes) in enumerate(stream.run(endless()), start=1):
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, [[value(ref)] * TOKENS for ref in sentence.images])
        assert len(stream._pending) <= max_pending + 7
        assert (taken - yielded) * 5 <= max_pending + 7
        if yielded == 2000:
            break
    assert set(codec.batches[1:]) == {8}  # full batches
    assert max(read.reads.values()) == 1  # also images of two neighbouring sentences


def test_long_sentences_and_errors_are_yielded_in_order(make_cache):
    codec, read = FakeCodec(), CountingReader(bad={"3", "30"})
    stream = Pipeline(read, Encoder(codec), make_cache(1), 8, max_pending=4, processes=0)
    sentences = [Sentence([ImageRef(str(n + i)) for i in range(size)]) for n, size in ((0, 3), (2, 2), (5, 40), (1, 1))]
    results = list(stream.run(sentences))
    assert [sentence for sentence, _ in results] == sentences
    assert [codes for _, codes in results if isinstance(codes, dict)] == [{"3": "3: broken"}, {"30": "30: broken"}]
    np.testing.assert_array_equal(results[3][1], [[1] * TOKENS])
    assert not stream._pending and codec.batches[-1] == 1


def frames_of(path: str, first: int, count: int) -> Sentence:
    return Sentence([ImageRef(path, float(first + i)) for i in range(count)])


def test_sentences_of_one_video_are_read_together(make_cache):
    """A worker decodes neighbouring windows in one go, up to a number of frames."""
    groups, counting = [], CountingReader()

    def read(group):
        groups.append([(ref.path, ref.seconds) for ref in group])
        return counting(group)

    sentences = [frames_of("1", 10 * i, 10) for i in range(30)] + [frames_of("2", 0, 10)] + [frames_of("1", 300, 10)]
    sentences[5:5] = [Sentence([ImageRef("7")])]
    stream = Pipeline(read, Encoder(FakeCodec()), make_cache(1), 8, max_pending=200, processes=0)
    results = list(stream.run(sentences))
    assert [sentence for sentence, _ in results] == sentences
    for sentence, codes in results:
        np.testing.assert_array_equal(codes, [[value(ref)] * TOKENS for ref in sentence.images])
    assert [len(group) for group in groups] == [50, 1, 120, 120, 10, 10, 10]
    assert all(len({path for path, _ in group}) == 1 for group in groups)


def test_near_rows_of_a_table_are_read_together(make_cache):
    """Otherwise each worker would read each row group. Rows of a shuffled build are far apart."""
    groups = []

    def read(group):
        groups.append([ref.location for ref in group])
        future = concurrent.futures.Future()
        future.set_result(np.zeros((len(group), SIDE, SIDE, 3), np.uint8))
        return future

    def rows(table: str, numbers) -> list[Sentence]:
        return [Sentence([ImageRef(f"{table}!{row}.image", location=str(row))]) for row in numbers]

    tar = [Sentence([ImageRef(f"c.tar!{i}.png", location=f"{512 * i}+9")]) for i in range(3)]
    sentences = [*rows("a.parquet", range(80)), *rows("b.parquet", (80, 81)), *tar, *rows("a.parquet", (500, 100, 300))]
    stream = Pipeline(read, Encoder(FakeCodec()), make_cache(1), 8, 20, processes=4)
    limits = []
    for sentence, _ in stream.run(sentences):
        limits.append(len(stream._pending))
        assert sentence is sentences[len(limits) - 1]
    assert len(limits) == len(sentences)
    assert [len(group) for group in groups] == [25, 32, 23, 2, 1, 1, 1, 1, 1, 1]
    assert max(limits) <= 20 + 4 * 32


@pytest.mark.parametrize("max_pending", [5, 200])
def test_a_damaged_frame_leaves_out_its_sentence_alone(max_pending, make_cache):
    counting = CountingReader()

    def read(group):
        if any(ref.seconds == 14 for ref in group):
            future = concurrent.futures.Future()
            future.set_exception(UserError("1: damaged"))
            return future
        return counting(group)

    sentences = [frames_of("1", 10 * i, 10) for i in range(5)]
    stream = Pipeline(read, Encoder(FakeCodec()), make_cache(1), 8, max_pending, processes=0)
    results = list(stream.run(sentences))
    assert [sentence for sentence, _ in results] == sentences and not stream._pending
    assert [isinstance(codes, dict) for _, codes in results] == [False, True, False, False, False]
    assert results[1][1] == {"1": "1: damaged"}


def test_idle_time_excludes_encoding(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pipeline, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    codec = FakeCodec()
    encoder = Encoder(codec)
    now[0] = 3.0  # idle for 3 s
    plain_encode = codec.encode

    def encode(pixels):
        now[0] += 5.0
        return plain_encode(pixels)

    codec.encode = encode
    encoder.submit(np.zeros((2, SIDE, SIDE, 3), np.uint8)).result()
    now[0] = 10.0  # idle for 2 s more
    assert encoder.idle_share() == pytest.approx(0.5) and encoder.images_encoded == 2
    assert encoder.progress_text() == "0 images/s, device idle 50%"


@pytest.mark.slow  # starts processes
def test_an_image_that_kills_its_worker_is_reported(make_cache):
    deadly, size = ("3", "4", "11"), (1, SIDE, SIDE, 3)
    with Workers(2) as workers:

        def read(group):
            kills = group[0].path in deadly
            return workers.submit(os._exit, 1) if kills else workers.submit(np.full, size, value(group[0]), np.uint8)

        stream = Pipeline(read, Encoder(FakeCodec()), make_cache(0), 4, max_pending=8, processes=2)
        results = [codes for _, codes in stream.run(Sentence([ImageRef(str(number))]) for number in range(20))]
        assert workers.submit(abs, -1).result() == 1
    for number, codes in enumerate(results):
        if str(number) in deadly:
            reason = f"{number}: the process that read it died (out of memory, or a crash in a library)"
            assert codes == {str(number): reason}
        else:
            np.testing.assert_array_equal(codes, [[number] * TOKENS])


def test_images_are_written_to_records_and_back():
    sentence = [ImageRef("a.mp4", 1.5), ImageRef("b:c.png", None, "hole", "12"), ImageRef("d.png", None, "gray")]
    fields = image_ref.to_record(sentence)
    assert fields == {
        "sources": ["a.mp4", "b:c.png", "d.png"],
        "seconds": [1.5, None, None],
        "views": ["plain", "hole:12", "gray"],
    }
    assert image_ref.from_record(fields) == sentence
    assert image_ref.to_record(sentence[:1]).keys() == {"sources", "seconds"}
