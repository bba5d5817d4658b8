"""Sentences of clips and videos: windows, strides, aligned sequences."""

import collections
import pathlib

import av
import numpy as np
from build_kit import SIDE, assert_codes_of, build_records, clip_and_frames, read_rgb, stem
from PIL import Image
from video_kit import number_of


def test_frames_are_windows_at_one_stride_in_numeric_order(tree, tiny, codec, tmp_path):
    strides = collections.Counter()
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "frames")
    for tokens, record in sentences:
        clip, numbers = clip_and_frames(record, 3)
        (step,) = set(np.diff(numbers))
        strides[clip, int(step)] += 1
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
    assert strides.keys() == {("a", 1), ("a", 2), ("b", 1)}  # b is too short for a stride of 2
    # As many windows as fit: b has 3 frames and 3 epochs, a has 11 frames.
    assert strides["b", 1] == 3 and strides["a", 1] % 3 == 0 and strides["a", 2] % 2 == 0


def test_video_frames_are_windows_of_each_stride(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "video")
    strides = collections.Counter()
    for tokens, record in sentences:
        (path,) = set(record["sources"])
        numbers = np.round(np.array(record["seconds"]) * 10).astype(int)  # 10 frames a second
        (step,) = set(np.diff(numbers))
        strides[pathlib.Path(path).name, int(step)] += 1
        with av.open(path) as container:  # independent of the tested code
            whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert [number_of(frame / 255) for frame in whole] == list(range(len(whole)))
        sized = [Image.fromarray(whole[i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in numbers]
        assert_codes_of(codec, tokens, [np.asarray(frame) for frame in sized])
    assert strides == {("one.mp4", 1): 3, ("one.mp4", 2): 1, ("two.MP4", 1): 1, ("two.MP4", 2): 1}


def test_aligned_sequences_are_sequential_and_interleaved(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "multi_sequence")
    assert len(sentences) == 2 * (3 + 1)
    for (_, sequential), (_, interleaved) in zip(sentences[0::2], sentences[1::2]):
        folders = [pathlib.Path(path).parts[-3] for path in sequential["sources"]]
        assert folders == ["clips1"] * 3 + ["clips2"] * 3
        assert interleaved["sources"] == [
            path for pair in zip(sequential["sources"][:3], sequential["sources"][3:]) for path in pair
        ]
        numbers = [int(stem(path).removeprefix("frame_")) for path in sequential["sources"]]
        assert numbers[:3] == numbers[3:] == list(range(numbers[0], numbers[0] + 3))
    for tokens, record in sentences:
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
