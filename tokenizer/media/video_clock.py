"""The times at which a video file shows its frames, and the frames from which decoding can begin.

Times come from packets where packet times are exact, so the file is read but not decoded.
"""

import collections
import dataclasses
import fractions
import functools
import itertools
import os
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from EasyLM.errors import UserError
from tokenizer.media.video_file import VideoFile, open_video

# Codecs with one shown frame per packet, at the packet's time. (VP8, for example, has packets that are never shown.)
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video", "prores", "ffv1"}
# Formats with an index of their frames. Other formats are decoded from the beginning: after a seek
# their frames can have other time stamps.
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_INDEXED_FORMATS = {_MP4, "matroska,webm", "avi"}
# Formats of which FFmpeg reads the first of joined files only: how the next one begins.
_NEXT_FILE = {
    "flv": rb"FLV\x01.\0\0\0\x09",
    "asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
}
_MOST_HEADER_BYTES, _BLOCK_BYTES = 15, 1 << 20
_AVI_CHUNK_HEADER_BYTES = 8
_DURATION_TOLERANCE = 0.2  # seconds between the header's duration and the last packet's end; less is rounding
MOST_AHEAD = 16  # frames that are decoded before one that is shown earlier: the limit of H.264 and HEVC
_CACHED_CLOCKS = 16  # a build reads the times of a video, then its frames, possibly several times


@dataclasses.dataclass(frozen=True)
class VideoClock:
    """The frames of a file, in ticks of its video stream.

    Attributes:
      ticks: int64 [n], ascending.
      seek_points: ticks of the frames from which decoding can begin, int64, ascending; contains the first frame.
      by_index: whether time stamps do not identify frames; if so, the i-th decoded frame is shown at ticks[i].
      tick_seconds: duration of a tick.
      decoded_ticks: int64 [n]: the largest tick of the frames that are decoded up to each frame, itself included. A
        frame may depend on frames that are shown after it. An upper bound if the order of decoding is not known.
      first_bytes: the first byte of the packet of each seek point, by its tick; None: not known.
    """

    ticks: np.ndarray
    seek_points: np.ndarray
    by_index: bool
    tick_seconds: fractions.Fraction
    decoded_ticks: np.ndarray
    first_bytes: Mapping[int, int | None]

    @property
    def seconds(self) -> np.ndarray:
        """The time of each frame, float64 [n]."""
        return self.ticks * float(self.tick_seconds)


@functools.lru_cache(_CACHED_CLOCKS)
def read_clock(video: VideoFile) -> VideoClock:
    """Reads the clock of a file. Clocks are cached.

    Raises:
      UserError: naming the file, if it is broken or truncated, has no frame, or its times are not ascending.
    """
    with open_video(video) as (container, stream):
        if container.format.name == _MP4:
            _check_boxes(video)
        container_format, rate, tick_seconds = container.format.name, stream.average_rate, stream.time_base
        # AVI has no time stamps. FFmpeg's are guesses if frames are decoded in another order than shown.
        by_index = container_format == "avi" and bool(stream.codec_context.has_b_frames) and bool(rate)
        packets, end = _read_packets(video.name, container, stream)
        ticks = [packet.tick for packet in packets]
        first_bytes = {
            packet.tick: packet.first_byte for packet in packets if packet.is_key and packet.tick is not None
        }
        has_one_clock = _are_ascending([packet.decode_tick for packet in packets if packet.decode_tick is not None])
        is_unique = None not in ticks and len(set(ticks)) == len(ticks)
        is_exact = stream.codec_context.name in _ONE_FRAME_PER_PACKET and has_one_clock and is_unique
        can_seek = container_format in _INDEXED_FORMATS
        if container_format == "avi":
            can_seek = _has_true_index(stream, packets)
    most_ahead = 0
    if by_index or not is_exact:
        with open_video(video) as (container, stream):
            ticks = [frame.pts for frame in container.decode(stream)]
            most_ahead = MOST_AHEAD if stream.codec_context.has_b_frames else 0  # their order of decoding is not known
        if by_index:
            ticks, tick_seconds = [*range(len(ticks))], 1 / rate
        elif not _are_ascending(ticks):
            ticks, by_index = [*_continuous(ticks)], True
    if by_index or not can_seek:
        first_bytes = {}
    _check_is_one_file(video, container_format, end)
    if not ticks:
        raise UserError(f"{video.name}: its video stream has no frame")
    ticks_n, places_n = np.unique(np.array(ticks, np.int64), return_index=True)
    # Packets are in the order of decoding, decoded frames in the order in which they are shown.
    decoded_n = np.maximum.accumulate(np.array(ticks, np.int64))[places_n]
    decoded_n = decoded_n[np.minimum(np.arange(len(ticks_n)) + most_ahead, len(ticks_n) - 1)]
    seek_points_k = np.union1d(ticks_n[:1], np.array([*first_bytes], np.int64))
    clock = VideoClock(ticks_n, seek_points_k, by_index, tick_seconds, decoded_n, first_bytes)
    if not (np.diff(clock.seconds) > 0).all():  # as floating point
        raise UserError(f"{video.name}: its times are too large to tell its frames apart: {clock.seconds[0]:.3g} s")
    return clock


def _check_boxes(video: VideoFile) -> None:
    """Raises UserError if an MP4 file consists of joined files, of which FFmpeg reads the first one only.

    Also if it ends within a fragment. It has no number of frames, and FFmpeg reads those that are left.
    """
    kinds: collections.Counter[bytes] = collections.Counter()
    kind, is_cut = b"", False
    with video.open() as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        while len(header := file.read(16)) >= 8:
            size, kind = struct.unpack(">I4s", header[:8])
            if size == 1:  # the size follows in 64 bits
                size = int.from_bytes(header[8:])
            is_cut = kind in (b"moof", b"mdat") and file.tell() - len(header) + size > end
            if not 8 <= size <= end:  # 0: up to the end of the file; others are damaged
                break
            kinds[kind] += 1
            file.seek(size - len(header), os.SEEK_CUR)
    if kinds[b"moof"] and (is_cut or kind == b"moof"):  # its data follow in another box
        raise UserError(f"{video.name}: is truncated: it ends within a fragment")
    if kinds[b"moov"] > 1 and not kinds[b"moof"]:  # fragments (moof) of repeated headers are read
        raise UserError(f"{video.name}: consists of {kinds[b'moov']} joined files: give them as separate files")


def _check_is_one_file(video: VideoFile, container_format: str, end: int) -> None:
    """Raises UserError if another file follows the last packet that FFmpeg has read, and ends at byte `end`."""
    header = _NEXT_FILE.get(container_format)
    if header is None:
        return
    with video.open() as file:
        file.seek(end)
        block = b""
        while data := file.read(_BLOCK_BYTES):
            block = block[-_MOST_HEADER_BYTES:] + data
            if re.search(header, block, re.DOTALL):
                raise UserError(f"{video.name}: consists of joined files: give them as separate files")


def _are_ascending(ticks: Sequence[int | None]) -> bool:
    known = [tick for tick in ticks if tick is not None]
    return len(known) == len(ticks) and all(earlier < later for earlier, later in itertools.pairwise(known))


def _continuous(ticks: Sequence[int | None]) -> list[int]:
    """Returns ascending ticks of frames whose clock restarts, or which have no tick.

    In joined segments each one can begin at the same tick. It follows the segment before it at the usual distance.
    """
    known = [tick for tick in ticks if tick is not None]
    distances = [later - earlier for earlier, later in itertools.pairwise(known) if later > earlier]
    distance = int(np.median(distances)) if distances else 1
    shown: list[int] = []
    shift = 0
    for tick in ticks:
        last = shown[-1] if shown else (known[0] if known else 0) - distance
        if tick is None:
            shown.append(last + distance)
            continue
        if tick + shift <= last:
            shift = last + distance - tick
        shown.append(tick + shift)
    return shown


class _Packet(NamedTuple):
    """A shown packet: the ticks of its frame and of its decoding, whether it is a key frame, its first byte."""

    tick: int | None
    decode_tick: int | None
    is_key: bool
    first_byte: int | None


def _has_true_index(stream: Any, packets: Sequence[_Packet]) -> bool:
    """Whether the index of an AVI file has the key frames where reading from its beginning has found them.

    FFmpeg numbers the frames after a seek by the index. With a damaged one they would be other frames.
    """
    first_bytes = {entry.timestamp: entry.pos + _AVI_CHUNK_HEADER_BYTES for entry in stream.index_entries}
    return all(first_bytes.get(packet.decode_tick) == packet.first_byte for packet in packets if packet.is_key)


def _read_packets(name: str, container: Any, stream: Any) -> tuple[list[_Packet], int]:
    """Returns the shown packets, without their data to save memory, and the byte at which the last packet ends.

    Raises:
      UserError: naming the file, if it is truncated.
    """
    shown, count, end, last_byte = [], 0, 0.0, 0
    has_duration = container.format.name == "matroska,webm"  # of all packets, in its header
    for packet in container.demux():
        if packet.dts is None and not packet.size:
            continue  # PyAV's end marker
        last_byte = max(last_byte, (packet.pos or 0) + packet.size)
        if has_duration and packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            count += 1
            if packet.size and not packet.is_discard:
                shown.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.pos))
    frames = stream.frames
    if container.format.name == _MP4:
        frames = min(frames, len(stream.index_entries))  # without those that an edit list cuts off
    if count < frames:
        raise UserError(f"{name}: is truncated: it has {count} of {frames} frames")
    duration = (container.duration or 0) / 1e6 if has_duration else 0.0
    if end < duration - _DURATION_TOLERANCE:
        raise UserError(f"{name}: is truncated: it has {end:.1f} of {duration:.1f} seconds")
    return shown, last_byte
