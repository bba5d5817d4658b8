"""Unusable inputs and settings are reported by name, skipped when allowed, and counted."""

import os
import struct
import zlib

import pytest
from build_kit import build_records, clip_and_frames, report_of, skipped_names
from PIL import Image
from tokenizer_kit import write_image

from EasyLM.errors import UserError


def test_files_without_partner_are_reported_or_skipped(pairs, tiny, capsys):
    write_image(pairs / "image" / "lone.png", 9)
    output = pairs / "out.jsonl"
    with pytest.raises(UserError, match=r"lone\.png has no partner in --target_dir"):
        build_records(pairs, tiny, output, "paired")
    assert not output.exists()
    assert len(build_records(pairs, tiny, output, "paired", max_errors=1)) == 4
    printed = capsys.readouterr()
    assert "skipped:" in printed.err and "1 inputs skipped" in printed.out
    assert skipped_names(output).keys() == {"lone.png"}


def test_a_sentence_with_a_broken_image_is_left_out_and_not_replaced(pairs, tiny):
    before = build_records(pairs, tiny, pairs / "before.jsonl", "paired", n_epochs=4)
    broken = pairs / "label" / "2.png"
    broken.write_bytes(broken.read_bytes()[:90])
    output = pairs / "out.jsonl"
    with pytest.raises(UserError, match=r"2\.png: not a readable image"):
        build_records(pairs, tiny, output, "paired", n_epochs=4)
    assert not output.exists()
    sentences = build_records(pairs, tiny, output, "paired", n_epochs=4, max_errors=1)
    expected = [record["sources"] for _, record in before if str(broken) not in record["sources"]]
    assert [record["sources"] for _, record in sentences] == expected and len(expected) < len(before)
    report = report_of(output)
    assert report["sentences"] == len(expected) and report["sentences_left_out"] == len(before) - len(expected)
    assert "not a readable image" in skipped_names(output)["2.png"] and len(report["skipped"]) == 1


def test_short_and_broken_clips_are_reported(tree, tiny, tmp_path, capsys):
    with pytest.raises(UserError, match=r"clips1/b: too short: 3 frames, 4 needed"):
        build_records(tree, tiny, tmp_path / "out.jsonl", "frames", n_frames=4)
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "frames", n_frames=4, max_errors=1)
    assert {clip_and_frames(record, 4)[0] for _, record in sentences} == {"a"}
    assert skipped_names(tmp_path / "out.jsonl").keys() == {"b"}
    with pytest.raises(UserError, match="no sentence was built, 2 inputs skipped"):
        build_records(tree, tiny, tmp_path / "none.jsonl", "frames", n_frames=40, max_errors=2)
    (tmp_path / "videos").mkdir()
    whole = (tree / "videos" / "one.mp4").read_bytes()
    (tmp_path / "videos" / "a.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "videos" / "b.mp4").write_bytes((tree / "videos" / "two.MP4").read_bytes())
    (tmp_path / "videos" / "c.mp4").write_bytes(whole)
    build_records(tmp_path, tiny, tmp_path / "video.jsonl", "video", n_frames=6, strides="1", max_errors=2)
    assert skipped_names(tmp_path / "video.jsonl").keys() == {"a.mp4", "b.mp4"}
    assert "too short: 5 frames, 6 needed" in skipped_names(tmp_path / "video.jsonl")["b.mp4"]


def test_two_files_of_one_stem_are_reported_or_skipped(pairs, tiny):
    write_image(pairs / "label" / "3.bmp", 9)
    with pytest.raises(UserError, match=r"3\.bmp and 3\.png share the stem '3'"):
        build_records(pairs, tiny, pairs / "out.jsonl", "paired")
    sentences = build_records(pairs, tiny, pairs / "out.jsonl", "paired", n_shots=1, max_errors=1)
    sources = {os.path.basename(path) for _, record in sentences for path in record["sources"]}
    assert sources == {f"{i}.png" for i in (0, 1, 2, 4)}  # which annotation is the right one is unknown
    assert skipped_names(pairs / "out.jsonl").keys() == {"3.bmp"}


def test_every_kind_of_unusable_file_is_named_counted_and_skipped(tmp_path, tiny):
    """Good names and good files are used, however odd they are."""
    root = tmp_path / "in"
    for name in ("good.png", "a\nb.png", "\x1b[31m.png", "%s{}.png", "folder.png/inside.png"):
        write_image(root / name, 1)
    for name, size in {"wide.png": (3000, 1), "high.png": (1, 3000), "dot.png": (1, 1)}.items():
        Image.new("RGB", size, "red").save(root / name)
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp", "pages.tif"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:])
    used = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    whole = (root / "good.png").read_bytes()
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = whole[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:]
    bad_files = {"zero.png": b"", "cut.png": whole[:60], "text.jpg": b"text", "cut\n.png": whole[:60], "bomb.png": bomb}
    for name, content in bad_files.items():
        (root / name).write_bytes(content)
    (root / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    bad = {*bad_files, r"caf\xe9.png", "pipe.png", "dangling.png", "loop.png"}
    settings = {"input_dir": str(root)}
    sentences = build_records(tmp_path, tiny, tmp_path / "out.jsonl", "images", max_errors=len(bad), **settings)
    assert sorted(record["sources"] for _, record in sentences) == sorted([f"{root}/{name}"] for name in used)
    reasons = {
        entry["input"].removeprefix(f"{root}/"): entry["reason"]
        for entry in report_of(tmp_path / "out.jsonl")["skipped"]
    }
    assert reasons.keys() == bad and not any("\n" in reason for reason in reasons.values())
    with pytest.raises(UserError, match=f"after {len(bad) - 1} others .--max_errors={len(bad) - 1}") as caught:
        build_records(tmp_path, tiny, tmp_path / "less.jsonl", "images", max_errors=len(bad) - 1, **settings)
    assert "\n" not in str(caught.value)


def test_every_kind_of_unusable_video_is_named_counted_and_skipped(tree, tmp_path, tiny):
    root = tmp_path / "in"
    whole = (tree / "videos" / "one.mp4").read_bytes()
    for name in ("good.mp4", "folder.mp4/a:b.mp4", "a\nb.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(whole)
    bad_files = {
        "zero.mp4": b"",
        "cut.mp4": whole[:600],
        "text.avi": b"text",
        "list.mkv": b"ffconcat version 1.0\nfile good.mp4\n",
    }
    for name, content in bad_files.items():
        (root / name).write_bytes(content)
    (root / os.fsdecode(b"caf\xe9.mp4")).write_bytes(whole)
    os.mkfifo(root / "pipe.ts")
    (root / "dangling.mov").symlink_to("nowhere.mov")
    bad = {*bad_files, r"caf\xe9.mp4", "pipe.ts", "dangling.mov"}
    settings = {"input_dir": str(root), "strides": "1"}
    sentences = build_records(tmp_path, tiny, tmp_path / "out.jsonl", "video", max_errors=len(bad), **settings)
    used = {path.removeprefix(f"{root}/") for _, record in sentences for path in record["sources"]}
    assert used == {"good.mp4", "folder.mp4/a:b.mp4", "a\nb.mp4"}
    assert skipped_names(tmp_path / "out.jsonl").keys() == bad


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("paired", {"input_dir": ""}, "--input_dir .required unless --inputs is given. is missing"),
        ("paired", {"input_dir": "", "target_dir": ""}, "--input_dir .*, --target_dir .required for .* are missing"),
        ("paired", {"input_dir": "nowhere"}, "--input_dir=.*nowhere: no such folder"),
        ("paired", {"n_shots": 0}, "--n_shots=0: must be at least 1"),
        ("paired", {"n_shots": 6}, "--n_shots=6: there are only 5 inputs"),
        ("paired", {"target_dir": ""}, r"--target_dir .required for --kind=paired\|.*, unless --keys .* is missing"),
        ("multi_sequence", {"target_dir": "", "keys": "jpg"}, "--target_dir .required for .* is missing"),
        ("paired", {"target_dir": "label,other"}, "takes one folder"),
        ("category", {"n_shots": 5}, "--n_shots=5: only 4 classes have images_per_shot=2 images"),
        ("category", {"input_dir": "image"}, r"\d\.png is not in the folder of a class"),
        ("video", {"strides": "1,two"}, "--strides=1,two: must be integers separated by ','"),
        ("video", {"strides": "0"}, "--strides=0: each must be at least 1"),
        ("video", {"input_dir": "image"}, "--input_dir=.*image: contains no file with extension .mp4, "),
        ("images", {"shard": "2/2"}, "--shard=2/2: must be i/n"),
        ("inpainting", {"hole_mask_ratio": 1.5}, "--hole_mask_ratio=1.5: must be 0..1"),
        ("co3d", {"input_dir": "image"}, "no sentence was built"),
    ],
)  # fmt: skip
def test_invalid_settings_are_reported(tree, tiny, tmp_path, kind, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build_records(tree, tiny, tmp_path / "out.jsonl", kind, **settings)
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)
