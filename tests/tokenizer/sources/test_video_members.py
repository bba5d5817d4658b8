"""Videos in tars, parquet files and remote file systems are read where they are, without a copy."""

import collections
import os
import tempfile

import numpy as np
import pytest
from source_kit import tar_bytes, write_parquet, write_remote
from video_kit import number_of, write_video

from EasyLM.errors import UserError
from tokenizer.media import folders, videos
from tokenizer.media.video_file import VideoFile
from tokenizer.sources import detection, reading
from tokenizer.sources.remote import RangeFile

TIMES = np.arange(0, 2500, 50)
NAMES = {"a.mp4": "libx264", "b.mkv": "libx264", "c.ts": "libx264", "d.avi": "mpeg4"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """Four videos by name."""
    folder = tmp_path_factory.mktemp("videos")
    for first, (name, codec) in enumerate(NAMES.items()):
        options = {"b": "9M", "bf": "0"} if codec == "mpeg4" else {"crf": "0", "bf": "2", "preset": "ultrafast"}
        write_video(folder / name, codec, TIMES, first=50 * first, g="2", **options)
    return {name: (folder / name).read_bytes() for name in NAMES}


def test_a_range_of_a_file_is_a_file(tmp_path):
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "a").write_bytes(data)
    with RangeFile(str(tmp_path / "a"), 100, 500, "a!b") as file:
        assert file.read() == data[100:600] and file.read(1) == b""
        assert file.seek(490) == file.tell() == 490 and file.read(20) == data[590:600]
        assert file.seek(-8, os.SEEK_END) == 492 and file.read(3) == data[592:595]
        assert file.seek(2, os.SEEK_CUR) == 497 and file.read(9) == data[597:600]
        assert file.seek(900) == 900 and file.read(1) == b""
    with pytest.raises(UserError, match=r"^x!b: cannot be read .FileNotFoundError"):
        RangeFile(str(tmp_path / "none"), 0, 1, "x!b")


def in_source(kind: str, contents: dict[str, bytes], folder) -> list[VideoFile]:
    """The videos in a source, as a build finds them, in the order of their names."""
    value = str(folder / "in.tar")
    if kind == "tar":
        (folder / "in.tar").write_bytes(tar_bytes(contents))
    elif kind == "parquet":
        value = str(folder / "in.parquet")
        write_parquet(folder / "in.parquet", {"video": list(contents.values())})
    else:
        value = write_remote(f"memory:/{folder}", {"in.tar": tar_bytes(contents)} if "tar" in kind else contents)
        value += "/*.tar" if "tar" in kind else ""
    source = detection.find_source(value, "input_dir", videos.VIDEO_EXTENSIONS)
    items = sorted(source.items(collections.Counter(), folders.refuse), key=lambda item: item.name)
    return [reading.video_file(item.address, item.location) for item in items]


@pytest.mark.parametrize("kind", ["tar", "parquet", "remote", "remote tar"])
def test_the_frames_are_those_of_the_file(contents, tmp_path, monkeypatch, kind):
    def no_copies(*arguments, **settings):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_copies)
    files = in_source(kind, contents, tmp_path)
    assert len(files) == len(NAMES)
    for first, (name, video) in enumerate(zip(NAMES, files)):
        (tmp_path / name).write_bytes(contents[name])
        times = videos.timestamps(video)
        np.testing.assert_array_equal(times, videos.timestamps(tmp_path / name))
        chosen = times[[20, 3, 49]]
        frames = videos.read(video, chosen)
        assert [number_of(frame) for frame in frames] == [50 * first + 20, 50 * first + 3, 50 * first + 49]
        np.testing.assert_array_equal(frames, videos.read(tmp_path / name, chosen))


@pytest.mark.parametrize("kind", ["tar", "parquet", "remote", "remote tar"])
def test_errors_name_the_member(contents, tmp_path, kind):
    broken = {"a.mp4": contents["a.mp4"][:900], "b.mkv": b"text", "c.mp4": 2 * contents["a.mp4"]}
    messages = ("not a readable video", "not a readable video", "consists of 2 joined files")
    for (name, video), message in zip(zip(broken, in_source(kind, broken, tmp_path)), messages):
        member = "in.parquet!" if kind == "parquet" else f"in.tar!{name}" if "tar" in kind else name
        with pytest.raises(UserError, match=f"{member}.*: {message}"):
            videos.timestamps(video)


def test_a_tar_that_is_written_again_is_read_again(contents, tmp_path):
    for first, name in ((0, "a.mp4"), (50, "b.mkv")):
        (tmp_path / "in.tar").write_bytes(tar_bytes({"x.mp4": contents[name]}))
        video = reading.video_file(f"{tmp_path}/in.tar!x.mp4")
        assert number_of(videos.read(video, videos.timestamps(video)[[4]])[0]) == first + 4
    with pytest.raises(UserError, match=r"in\.tar!y\.mp4: no such member"):
        reading.video_file(f"{tmp_path}/in.tar!y.mp4")
    with pytest.raises(UserError, match=r"no\.tar: no such file"):
        reading.video_file(f"{tmp_path}/no.tar!x.mp4", "512+100")
    (tmp_path / "in.tar").write_bytes(tar_bytes({"x.mp4": contents["a.mp4"]})[:2048])
    with pytest.raises(UserError, match=r"in\.tar!x\.mp4: not a readable video"):
        videos.timestamps(reading.video_file(f"{tmp_path}/in.tar!x.mp4", f"512+{len(contents['a.mp4'])}"))
