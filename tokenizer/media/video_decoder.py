"""Decodes selected frames of a video file in order, and keeps the file open for the next ones.

Otherwise a long file with few key frames, or without an index, would be decoded from its beginning for each call.
Memory does not grow with the length of the file.
"""

import collections
import contextlib
import fractions
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenizer.media.video_clock import MOST_AHEAD, VideoClock
from tokenizer.media.video_file import VideoFile, captured_errors, import_av, names_errors, open_container

# Markers of JPEG (ITU-T T.81, table B.1; T.87 for JPEG-LS).
_START_OF_IMAGE, _START_OF_SCAN, _TABLES = b"\xff\xd8", 0xDA, 0xDB
# FFmpeg's messages for a damaged slice of an H.264 frame. It can return the frame without an error.
_DAMAGED_SLICE = (
    "abs_diff_pic_num overflow",
    "co located POCs unavailable",
    "error while decoding MB",
    "first_mb_in_slice overflow",
    "illegal short term buffer state detected",
    "reference picture missing during reorder",
)
_RETURN_ALL = {"h264", "hevc"}  # codecs whose frames are all returned, except for damaged ones
# What is added to the time of a frame that an edit list cuts off. Others need it, but it is not shown.
_NOT_SHOWN = -(1 << 62)
_FRAMES, _LOSSLESS_FRAMES = {0xC0, 0xC1, 0xC2}, {0xC3, 0xF7}
_MOST_IDLE = 2  # a build goes from one video to the next
_idle: dict[VideoFile, "Decoder"] = {}  # the latest one last
_lock = threading.Lock()  # of _idle


class Decoder:
    """Decodes frames of a file, of ascending numbers.

    Attributes:
      pixel_aspect: width by height of the pixels; 1 if the file does not tell.
    """

    def __init__(self, video: VideoFile, clock: VideoClock):
        self._clock, self._stack = clock, contextlib.ExitStack()
        self._container, self._stream = self._stack.enter_context(open_container(video))
        self.pixel_aspect = self._stream.sample_aspect_ratio or fractions.Fraction(1)
        self._restart(None)

    def close(self) -> None:
        """Closes the file."""
        self._stack.close()

    def _restart(self, seek_point: int | None) -> None:
        self._frames = _decode_from(self._container, self._stream, self._clock, seek_point)
        self._seek_point = seek_point
        self._latest: tuple[int, Any, bool] | None = None  # what `_decode_from` yielded last

    def has_passed(self, number: int) -> bool:
        """Whether a frame is before the one that was decoded last."""
        return self._latest is not None and self._latest[0] > self._clock.ticks[number]

    def frames(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any, bool]]:
        """Yields (number, frame, whether it is damaged). Omits frames that FFmpeg does not return.

        Args:
          numbers: of frames, ascending; `has_passed` is False for the first one.
        """
        ticks, seek_points = self._clock.ticks, self._clock.seek_points
        for number in numbers:
            target = ticks[number]
            nearest = seek_points[np.searchsorted(seek_points, target, side="right") - 1]
            if not self._clock.by_index and nearest > (ticks[0] if self._latest is None else self._latest[0]):
                self._restart(nearest)
            while self._latest is None or self._latest[0] < target:
                decoded = next(self._frames, None)
                missed = decoded is None or (self._latest is None and (decoded[0] > target or not decoded[1].key_frame))
                if self._seek_point is not None and missed:
                    # Some formats seek only approximately: decode from the beginning instead.
                    self._restart(ticks[0])
                    self._seek_point = None
                elif decoded is None:
                    return
                else:
                    self._latest = decoded
            if self._latest[0] == target:
                yield number, *self._latest[1:]


@contextlib.contextmanager
def open_decoder(video: VideoFile, clock: VideoClock, first: int) -> Iterator[Decoder]:
    """Provides a decoder for frames from number `first` on: one that has not passed it, or a new one.

    If the context ends without an error, the decoder stays open for the next call.

    Raises:
      UserError: naming the file, for errors of PyAV inside the context.
    """
    with _lock:
        decoder = _idle.pop(video, None)
    if decoder is not None and decoder.has_passed(first):
        decoder.close()
        decoder = None
    with names_errors(video.name):
        decoder = decoder or Decoder(video, clock)
        try:
            yield decoder
        except BaseException:
            decoder.close()
            raise
    with _lock:
        unused = [_idle.pop(video, None)]  # of another thread
        _idle[video] = decoder
        unused += [_idle.pop(oldest) for oldest in list(_idle)[:-_MOST_IDLE]]
    for other in filter(None, unused):
        other.close()


def _decode_from(
    container: Any, stream: Any, clock: VideoClock, seek_point: int | None
) -> Iterator[tuple[int, Any, bool]]:
    """Yields (tick, frame, whether it is damaged) from a seek point on. None: from the current position in the file.

    A decoder marks only the damaged frame itself. Those after it, up to the next key frame, are predicted from it. So
    are those that are shown before it and decoded later, and those that a decoder returns although it has not returned
    the frame before them. A damaged frame can be one that is not shown.

    Yields nothing if the seek leads to another packet than the one that reading from the beginning has found at its
    time: with a damaged index, FFmpeg gives it the time that was looked for.
    """
    packets = iter(container.demux(stream))
    if seek_point is not None:
        container.seek(int(seek_point), stream=stream)
        packet = next(packets, None)
        if packet is None or clock.first_bytes.get(packet.pts, packet.pos) != packet.pos:
            return
        packets = itertools.chain([packet], packets)
    first, is_first, is_damaged = clock.ticks[0] if seek_point is None else seek_point, True, False
    returns_all, previous = stream.codec_context.name in _RETURN_ALL, int(np.searchsorted(clock.ticks, first)) - 1
    source = _ticks_and_frames(packets, stream, clock)
    ahead: collections.deque[tuple[int, Any, bool]] = collections.deque()
    while ahead or (ahead := collections.deque(itertools.islice(source, 1))):
        tick, frame, is_corrupt = ahead.popleft()
        number = int(np.searchsorted(clock.ticks, tick))
        last = int(clock.decoded_ticks[number]) if number < len(clock.ticks) else tick
        while (ahead[-1][0] if ahead else tick) < last and len(ahead) < MOST_AHEAD and (decoded := next(source, None)):
            ahead.append(decoded)
        is_after_gap = tick != first if is_first else returns_all and number > previous + 1
        is_damaged = is_corrupt or (not frame.key_frame and (is_damaged or is_after_gap))
        is_first = False
        if frame is not None and _is_shown(tick):
            previous = number
            yield tick, frame, is_damaged or any(is_corrupt for later, _, is_corrupt in ahead if later <= last)


def _ticks_and_frames(packets: Iterator, stream: Any, clock: VideoClock) -> Iterator[tuple[int, Any, bool]]:
    i = 0
    for tick, frame, is_corrupt in _frames(packets, stream):
        if clock.by_index and _is_shown(tick):
            tick = int(clock.ticks[min(i, len(clock.ticks) - 1)])
            i += frame is not None  # frames that FFmpeg does not return have no index
        if tick is not None:
            yield tick, frame, is_corrupt


def _frames(packets: Iterator, stream: Any) -> Iterator[tuple[int | None, Any, bool]]:
    """Yields (tick, frame, whether it is damaged) as they are decoded.

    A frame that is not shown has a tick below `_NOT_SHOWN / 2`. A damaged one that FFmpeg does not return is None.

    Raises:
      ValueError: for a JPEG frame with a damaged header. FFmpeg then decodes it with the tables of the frame before it,
        or returns that frame again, and reports no error.
    """
    is_jpeg = stream.codec_context.name == "mjpeg"
    incomplete, expected = set(), set()  # ticks of damaged frames, and of those that FFmpeg can still return
    for packet in packets:
        if is_jpeg and packet.size and not _has_whole_header(bytes(packet)):
            raise ValueError("the header of a JPEG frame is damaged")
        if packet.is_discard:
            packet = _kept(packet)
        with captured_errors() as messages:
            frames = packet.decode()
        if packet.pts is not None and any(reason in text for _, _, text in messages for reason in _DAMAGED_SLICE):
            incomplete.add(packet.pts)
            expected.add(packet.pts)
        for frame in frames:
            missing = {tick for tick in expected if frame.pts is not None and tick < frame.pts}
            yield from ((tick, None, True) for tick in sorted(missing))
            yield frame.pts, frame, frame.is_corrupt or frame.pts in incomplete
            expected -= {*missing, frame.pts}


def _kept(packet: Any) -> Any:
    """Returns a copy of a packet whose frame is not shown. FFmpeg returns the frame of the copy, and reports damage."""
    kept = import_av().Packet(bytes(packet))
    kept.stream, kept.is_keyframe = packet.stream, packet.is_keyframe
    kept.pts, kept.dts, kept.time_base = (packet.pts or 0) + _NOT_SHOWN, packet.dts, packet.time_base
    for data in packet.iter_sidedata():
        kept.set_sidedata(data)
    return kept


def _is_shown(tick: int | None) -> bool:
    return tick is None or tick > _NOT_SHOWN // 2


def _has_whole_header(jpeg: bytes) -> bool:
    """Whether segments lead from the start of a JPEG image to its scan, with the size and the quantization tables."""
    markers: set[int] = set()
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF and jpeg.startswith(_START_OF_IMAGE):
        marker = jpeg[position + 1]
        if marker == _START_OF_SCAN:
            return bool(markers & _LOSSLESS_FRAMES) or (_TABLES in markers and bool(markers & _FRAMES))
        if marker != 0xFF:  # which fills the space before a marker
            markers.add(marker)
            position += 1 + int.from_bytes(jpeg[position + 2 : position + 4])
        position += 1
    return False
