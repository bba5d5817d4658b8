"""Kinds: image files, tars of image files, and video files.

PNG files have checksums: a mutated one gives the pixels of the whole one, or is refused. The reference of the other
formats is the plain decoder of Pillow or PyAV.
"""

import collections
import contextlib
import fractions
import io
import pathlib
import tarfile
from typing import Any

import av
import numpy as np
from PIL import ExifTags, Image

from campaign.attempts import Attempt, require, require_equal
from campaign.mutations import mutated
from EasyLM.errors import UserError
from tokenizer.builders import views
from tokenizer.media import folders, images, video_frames, videos
from tokenizer.media.video_clock import read_clock
from tokenizer.media.video_file import local_file
from tokenizer.sources import detection, reading

_SIZE = 24
_PIXELS = (40, 30)
_FORMATS: dict[str, dict] = {
    "jpg": {"quality": 90},
    "gif": {},
    "webp": {},
    "bmp": {},
    "tif": {"compression": "tiff_lzw"},
    "ppm": {},
    "tga": {},
    "jp2": {},
    "sgi": {},
    "pcx": {},
    "qoi": {},
}
_CODECS = {
    "mp4": "mpeg4",
    "mkv": "mpeg4",
    "webm": "libvpx-vp9",
    "avi": "mjpeg",
    "mov": "libx264",
    "mpg": "mpeg1video",
    "fragments.mp4": "libx264",
    "cut.mov": "libx264",
}
_MUXER_OPTIONS = {
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "cut.mov": {"avoid_negative_ts": "disabled"},
}
_FRAMES, _CUT_FRAMES = 8, 2
_OPTIONS = {"metadata_errors": "replace"}  # titles can have any encoding


def image_files(folder: pathlib.Path) -> Attempt:
    """Mutated image files, read as images or as labels."""
    plain = {name: _encoded(_smooth_image(), name, **options) for name, options in _FORMATS.items()}
    checked = _png_files()
    expected = {name: images.read(io.BytesIO(data), _SIZE) for name, data in checked.items()}
    labels = {name: _labels(io.BytesIO(data)) for name, data in checked.items()}

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*plain, *checked]))
        is_checked = name in checked
        path = case / ("image.png" if is_checked else f"image.{name}")
        path.write_bytes(mutated(rng, checked[name] if is_checked else plain[name]))
        if is_checked and rng.random() < 0.5:
            require_equal(views.label_ids(path, _SIZE), labels[name], "labels")
            return
        pixels = images.read(path, _SIZE)
        require_equal((pixels.shape, pixels.dtype), ((_SIZE, _SIZE, 3), np.uint8), "shape and type")
        if is_checked:
            require_equal(pixels, expected[name], "pixels")
            return
        with Image.open(path) as image:
            image.load()
            if image.mode == "RGB" and not {"icc_profile", "exif", "transparency"} & set(image.info):
                resized = image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
                require_equal(pixels, np.asarray(resized), "pixels")

    return attempt


def tar_files(folder: pathlib.Path) -> Attempt:
    """Mutated tars of PNG files: all members are listed, with their pixels.

    Some damage does not show in a tar: a changed name whose bytes have the same sum, or zeros in place of the last
    members. Such a tar has the members that its headers tell.
    """
    files = _png_files()
    expected = {f"{name}.png": images.read(io.BytesIO(data), _SIZE) for name, data in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        name_at = {info.offset_data: info.name for info in archive}

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        path = case / "images.tar"
        data = mutated(rng, buffer.getvalue())
        path.write_bytes(data)
        listed = _names_in_tar(data)
        names = [*expected] if listed is None else [name for name in listed if _has_image_name(name)]
        source = detection.find_source(str(path), "input_dir", images.IMAGE_EXTENSIONS)
        items = list(source.items(collections.Counter(), folders.refuse))
        require_equal(sorted(item.name for item in items), sorted(names), "names")
        for item in items:
            original = name_at.get(int(item.location.partition("+")[0]), item.name)
            pixels = images.read(reading.open_item(item.address, item.location), _SIZE)
            require_equal(pixels, expected[original], "pixels")

    return attempt


def _has_image_name(name: str) -> bool:
    return pathlib.PurePath(name).suffix.lower() in images.IMAGE_EXTENSIONS


def _names_in_tar(data: bytes) -> list[str] | None:
    """Returns the names in a whole tar of files, from its headers alone; None if a header or the end is damaged."""
    names, position = [], 0
    while any(header := data[position : position + tarfile.BLOCKSIZE]):
        size, checksum = header[124:135], header[148:154]
        if len(header) < tarfile.BLOCKSIZE or set(size + checksum) - set(b"01234567"):
            return None
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != int(checksum, 8):
            return None
        parts = [header[start:end].partition(b"\0")[0] for start, end in ((345, 500), (0, 100))]  # prefix and name
        names.append(b"/".join(filter(None, parts)).decode(errors="surrogateescape"))
        position += tarfile.BLOCKSIZE * (1 + -(-int(size, 8) // tarfile.BLOCKSIZE))
    return None if any(data[position:]) or position >= len(data) else names


def _labels(file: Any) -> np.ndarray | None:
    try:
        return views.label_ids(file, _SIZE)
    except UserError:  # an RGB image has no labels
        return None


def _png_files() -> dict[str, bytes]:
    image = _smooth_image()
    gray = np.asarray(image.convert("L")).astype(np.uint16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return {
        "rgb": _encoded(image, "png"),
        "palette": _encoded(image.quantize(16), "png"),
        "two_bits": _encoded(image.quantize(4), "png", bits=2),
        "gray": _encoded(image.convert("L"), "png"),
        "sixteen_bits": _encoded(Image.fromarray(gray * 257), "png"),
        "transparent": _encoded(image.quantize(16), "png", transparency=3),
        "turned": _encoded(image, "png", exif=exif),
        "with_alpha": _encoded(image.convert("RGBA"), "png", dpi=(72, 72)),
    }


def _smooth_image() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(_PIXELS, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, extension: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[f".{extension}"], **options)
    return file.getvalue()


def video_files(folder: pathlib.Path) -> Attempt:
    """Mutated video files. Frames at some times are those of a decoder that reads from the beginning."""
    whole = {}
    for name, codec in _CODECS.items():
        _write_video(folder / f"video.{name}", codec)
        whole[name] = (folder / f"video.{name}").read_bytes()

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*whole]))
        path = case / f"video.{name}"
        path.write_bytes(mutated(rng, whole[name]))
        times = videos.timestamps(path)
        require(np.all(np.diff(times) > 0) and np.all(np.isfinite(times)), f"times are not ascending: {times}")
        chosen = rng.choice(times, min(len(times), 3))
        frames = videos.read(path, chosen)
        require_equal(frames.dtype, np.dtype(np.float32), "type")
        references = _frames(path, times)
        for time, frame in zip(chosen, frames, strict=True):
            if time in references and references[time].shape == frame.shape:
                difference = float(np.abs(references[time] - frame).max())
                require(difference < 0.02, f"the frame at {time} s differs by {difference:.3f}")

    return attempt


def _write_video(path: pathlib.Path, codec: str) -> None:
    name = path.name.removeprefix("video.")
    shift = -_CUT_FRAMES if name.startswith("cut.") else 0  # an edit list cuts off frames before time 0
    with av.open(str(path), "w", container_options=_MUXER_OPTIONS.get(name, {})) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.gop_size = 64, 48, 4
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(_FRAMES):
            coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(16, 0).repeat(16, 1), format="rgb24")
            frame.time_base, frame.pts = fractions.Fraction(1, 25), number + shift
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _frames(path: pathlib.Path, times: np.ndarray) -> dict[float, np.ndarray]:
    """Returns the whole frames by time, decoded from the beginning of the file, up to the first that cannot be decoded.

    In files whose clock restarts, the time of a frame is that of its number.
    """
    frames: dict[float, np.ndarray] = {}
    with contextlib.suppress(av.FFmpegError, ValueError, OverflowError), av.open(str(path), **_OPTIONS) as container:
        stream = container.streams.video[0]
        by_index = read_clock(local_file(path)).by_index
        for number, frame in enumerate(container.decode(stream)):
            time = times[min(number, len(times) - 1)] if by_index else (frame.pts or 0) * float(stream.time_base)
            if not frame.is_corrupt:
                frames[time] = images.to_float32(video_frames.to_bytes(frame, None))
    return frames
