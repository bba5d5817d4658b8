"""Writes videos with any codec, container and timestamps. A bar of black and white squares encodes the frame number."""

import fractions

import av
import numpy as np

BITS, SQUARE = 8, 8  # squares of a bar, the lowest bit first; side of a square in pixels
MILLISECOND = fractions.Fraction(1, 1000)


def numbered_frame(number: int) -> np.ndarray:
    """Returns uint8 [24,64,3]: the bar, and below it red on the left and blue on the right."""
    pixels = np.zeros((3 * SQUARE, BITS * SQUARE, 3), np.uint8)
    for bit in range(BITS):
        pixels[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 255 * (number >> bit & 1)
    half = BITS * SQUARE // 2
    pixels[SQUARE:, :half, 0] = pixels[SQUARE:, half:, 2] = 255
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Decodes the number that a frame shows: float [24,64,3] in [0, 1]."""
    squares = pixels[:SQUARE].reshape(SQUARE, BITS, SQUARE, 3).mean(axis=(0, 2, 3))
    return sum(int(square > 0.5) << bit for bit, square in enumerate(squares))


def write_video(
    path, codec: str, milliseconds, rotation: int = 0, first: int = 0, pixel_aspect: str = "", **options
) -> None:
    """Writes a frame at each time, numbered from `first`. `rotation` is metadata, in degrees."""
    with av.open(str(path), "w") as container:
        rate = fractions.Fraction(1000, int(milliseconds[1] - milliseconds[0]))
        has_rate_only = str(path).endswith((".avi", ".mpg", ".m2v"))  # these containers do not store timestamps
        base = 1 / rate if has_rate_only else MILLISECOND
        stream = container.add_stream(codec, rate=rate, time_base=base)
        stream.width, stream.height = BITS * SQUARE, 3 * SQUARE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = fractions.Fraction(pixel_aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(numbered_frame(first + number), format="rgb24")
            frame.time_base, frame.pts = base, round(int(time) * MILLISECOND / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_shifted(path, milliseconds, shift: int, **options) -> None:
    """Writes an H.264 video whose frames are shown `shift` milliseconds later. Those before time 0 are not shown."""
    source_path = path.with_name("source.mp4")
    write_video(source_path, "libx264", milliseconds, **options)
    with av.open(str(source_path)) as source:
        with av.open(str(path), "w", container_options={"avoid_negative_ts": "disabled"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    ticks = round(shift / 1000 / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                    target.mux(packet)


def write_interlaced(path, codec: str, count: int, is_top_first: bool, pixels=None, **options) -> None:
    """Writes interlaced frames: the first field of frame i shows number 2 i, the other field 2 i + 1.

    With gray pixels [24,64], both fields of all frames show these.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = BITS * SQUARE, 3 * SQUARE, "yuv420p"
        stream.options = options
        other_lines = slice(1 if is_top_first else 0, None, 2)
        for number in range(count):
            shown = numbered_frame(2 * number)
            shown[other_lines] = numbered_frame(2 * number + 1)[other_lines]
            if pixels is not None:
                shown[:] = np.round(pixels)[..., None]
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.time_base, frame.pts = fractions.Fraction(1, 25), number
            container.mux(stream.encode(marked_interlaced(frame, is_top_first, "yuv420p")))
        container.mux(stream.encode())


def marked_interlaced(frame: av.VideoFrame, is_top_first: bool, pixel_format: str) -> av.VideoFrame:
    """Marks a frame as interlaced, and converts it field by field. PyAV cannot set the mark."""
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("setfield", "tff" if is_top_first else "bff"),
        graph.add("scale", "interl=1"),
        graph.add("format", pixel_format),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    graph.push(None)
    marked = graph.pull()
    marked.time_base, marked.pts = frame.time_base, frame.pts
    return marked


def write_planes(
    path, codec: str, pixel_format: str, planes, size=(64, 48), count: int = 2, is_interlaced: bool = False, **tags
) -> None:
    """Writes frames of one colour.

    Args:
      planes: the value of each plane's samples.
      size: width and height.
      tags: of the stream: colorspace, color_range, color_trc and color_primaries, as numbers of H.273.
    """
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = {"crf": "0", "preset": "ultrafast"} if codec == "libx264" else {}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(count):
            frame = av.VideoFrame(width, height, pixel_format)
            for plane, value in zip(frame.planes, planes, strict=True):
                samples = np.full(plane.buffer_size // (2 if "10le" in pixel_format else 1), value)
                plane.update(samples.astype("<u2" if "10le" in pixel_format else np.uint8).tobytes())
            frame.pts, frame.time_base = number, fractions.Fraction(1, 10)
            if is_interlaced:
                frame = marked_interlaced(frame, True, pixel_format)
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(path, frames, codec: str = "libx264", **options) -> None:
    """Writes frames [height,width,3] of values from 0 to 255, 25 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", **options}
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8), format="rgb24")
            frame.time_base, frame.pts = fractions.Fraction(1, 25), number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
