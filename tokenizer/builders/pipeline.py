"""Encodes a stream of sentences. Worker processes prefetch the images, which are encoded in batches.

Memory depends on the batch size and the longest sentence, not on the number of sentences.
"""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from EasyLM import process_pool
from EasyLM.errors import UnavailableError, UserError
from tokenizer.builders import image_ref
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.image_ref import ImageRef
from tokenizer.formats import ImageTokenizer
from tokenizer.media import images

_BATCHES_ON_DEVICE = 2  # one is transferred while the other is computed
# Images that one worker reads in a row: frames of a video, or rows of a table. If each worker read single sentences,
# all would decode the same frames, from the key frame on, and the same row groups.
IMAGES_PER_READ = 128


class HasImages(Protocol):
    """A sentence: anything with `images`."""

    @property
    def images(self) -> Sequence[ImageRef]:
        """The images in order."""
        ...


SentenceT = TypeVar("SentenceT", bound=HasImages)
# Starts `image_ref.read` of a group. Returns a future whose result iterates over the pixels of each image.
Reader = Callable[[list[ImageRef]], Any]


class Encoder:
    """Encodes batches in threads, and measures the idle time of the device.

    Attributes:
      images_encoded: number of images so far.
    """

    def __init__(self, codec: ImageTokenizer):
        """Compiles the encoder, so that compilation does not count as idle time."""
        self._codec, self._lock = codec, threading.Lock()
        side = codec.resolution
        codec.encode(np.zeros((1, side, side, 3), np.float32))
        self._threads = concurrent.futures.ThreadPoolExecutor(_BATCHES_ON_DEVICE)
        self._active_batches, self._idle_since, self._idle_seconds = 0, time.monotonic(), 0.0
        self._start, self.images_encoded = time.monotonic(), 0

    def submit(self, pixels_nSS3: np.ndarray) -> concurrent.futures.Future[np.ndarray]:
        """Starts to encode uint8 pixels. The future's result is codes, uint16 [n,N]."""
        return self._threads.submit(self._encode, pixels_nSS3)

    def _encode(self, pixels_nSS3: np.ndarray) -> np.ndarray:
        pixels_nSS3 = images.to_float32(pixels_nSS3)
        with self._lock:
            if not self._active_batches:
                self._idle_seconds += time.monotonic() - self._idle_since
            self._active_batches += 1
        try:
            return self._codec.encode(pixels_nSS3).astype(np.uint16)
        finally:
            with self._lock:
                self._active_batches -= 1
                self._idle_since = time.monotonic()
                self.images_encoded += len(pixels_nSS3)

    def idle_share(self) -> float:
        """Returns the share of the time since construction in which no batch was on the device."""
        with self._lock:
            now = time.monotonic()
            idle_seconds = self._idle_seconds + (0 if self._active_batches else now - self._idle_since)
            return idle_seconds / max(now - self._start, 1e-9)

    def progress_text(self) -> str:
        """Returns rate and idle share for a progress bar."""
        rate = self.images_encoded / (time.monotonic() - self._start)
        return f"{rate:.0f} images/s, device idle {self.idle_share():.0%}"

    def close(self) -> None:
        """Stops the threads and cancels batches that have not started."""
        self._threads.shutdown(cancel_futures=True)


@dataclasses.dataclass
class _PendingImage:
    """An image of pending sentences.

    Attributes:
      uses: number of pending sentences that contain it.
      result: its codes [N], or the error of reading it; None while pending.
    """

    uses: int = 0
    result: np.ndarray | UserError | None = None


class Pipeline:
    """Reads and encodes the images of pending sentences, each image once."""

    def __init__(
        self, read: Reader, encoder: Encoder, cache: CodeCache, batch_size: int, max_pending: int, processes: int
    ):
        """Creates a pipeline.

        Args:
          read: starts to read images.
          encoder: encodes them.
          cache: their codes.
          batch_size: images that are encoded together.
          max_pending: the most pending images, besides those of the longest sentence and of a read of each process.
          processes: the number of processes that read.
        """
        self._read, self._encoder, self._cache = read, encoder, cache
        self._batch_size, self._max_pending, self._processes = batch_size, max_pending, processes
        self._largest_read = 1  # images
        self._pending: dict[ImageRef, _PendingImage] = {}
        self._collected: list[list[ImageRef]] = []  # images that are read together, whose reading has not started
        self._reads: collections.deque = collections.deque()  # (groups that are read together, future), in order
        self._batch: list[ImageRef] = []
        self._pixels_nSS3 = np.empty(0, np.uint8)  # of the batch
        self._encodes: collections.deque = collections.deque()  # (refs, future), in order

    def run(self, sentences: Iterable[SentenceT]) -> Iterator[tuple[SentenceT, np.ndarray | dict[str, str]]]:
        """Yields (sentence, codes uint16 [n,N]) in order. Unreadable images give {path: reason} instead of codes."""
        waiting: collections.deque[SentenceT] = collections.deque()
        for sentence in sentences:
            self._request(sentence.images)
            waiting.append(sentence)
            while self._is_full() and self._advance():
                yield from self._pop_finished(waiting)
            yield from self._pop_finished(waiting)
        self._start_read()
        while self._advance():
            yield from self._pop_finished(waiting)
        assert not waiting and not self._pending

    def _is_full(self) -> bool:
        return len(self._pending) > self._max_pending + self._processes * self._largest_read

    def _request(self, refs: Sequence[ImageRef]) -> None:
        """Counts the uses of a sentence's images, and starts to read those that are neither pending nor cached."""
        unread = []
        for ref in dict.fromkeys(refs):
            if ref not in self._pending:
                self._pending[ref] = _PendingImage(result=self._cache.get(ref))
                if self._pending[ref].result is None:
                    unread.append(ref)
            self._pending[ref].uses += 1
        for group in image_ref.group_by_file(unread):
            if not self._is_continued_by(group):
                self._start_read()
            self._collected.append(group)
            if not image_ref.are_near(group[0], group[0]):  # nothing continues it
                self._start_read()

    def _is_continued_by(self, group: list[ImageRef]) -> bool:
        """Whether a group can be read together with the collected ones."""
        count = sum(map(len, self._collected)) + len(group)
        is_near = bool(self._collected) and image_ref.are_near(self._collected[0][0], group[0])
        return is_near and count <= IMAGES_PER_READ

    def _start_read(self) -> None:
        """Starts to read what is collected."""
        if self._collected:
            together = [ref for group in self._collected for ref in group]
            self._reads.append((self._collected, self._read(together)))
            self._largest_read = max(self._largest_read, len(together))
            self._collected = []

    def _pop_finished(
        self, waiting: collections.deque[SentenceT]
    ) -> Iterator[tuple[SentenceT, np.ndarray | dict[str, str]]]:
        while waiting and all(self._pending[ref].result is not None for ref in waiting[0].images):
            sentence = waiting.popleft()
            results = [self._pending[ref].result for ref in sentence.images]
            for ref in set(sentence.images):
                self._pending[ref].uses -= 1
                if not self._pending[ref].uses:
                    del self._pending[ref]
            errors = {
                ref.path: str(error) for ref, error in zip(sentence.images, results) if isinstance(error, UserError)
            }
            yield sentence, errors or np.stack(results)  # type: ignore[arg-type]  # no error: all are arrays

    def _advance(self) -> bool:
        """Takes the next step for the oldest pending image; returns False if nothing is pending."""
        if self._encodes and (len(self._encodes) > _BATCHES_ON_DEVICE or not (self._reads or self._batch)):
            refs, future = self._encodes.popleft()
            for ref, codes in zip(refs, future.result(), strict=True):
                self._pending[ref].result = codes
                self._cache.put(ref, codes)
        elif self._reads:
            self._finish_read(*self._reads.popleft())
        elif self._collected:
            self._start_read()
        elif self._batch:
            self._submit_batch()
        else:
            return False
        return True

    def _finish_read(self, groups: list[list[ImageRef]], future: concurrent.futures.Future) -> None:
        """Waits for the pixels of groups and adds them to the batch. An UnavailableError ends the build."""
        together = [ref for group in groups for ref in group]
        try:
            images_SS3 = process_pool.result(future, together[0].path)
        except UnavailableError:
            raise
        except UserError as error:
            if len(groups) > 1:  # only the sentences with a damaged frame are left out
                self._reads.extendleft([([group], self._read(group)) for group in groups][::-1])
                return
            for ref in together:
                self._pending[ref].result = error
            return
        for ref, pixels_SS3 in zip(together, images_SS3, strict=True):
            if not self._batch:
                self._pixels_nSS3 = np.empty((self._batch_size, *pixels_SS3.shape), np.uint8)
            self._pixels_nSS3[len(self._batch)] = pixels_SS3
            self._batch.append(ref)
            if len(self._batch) == self._batch_size:
                self._submit_batch()

    def _submit_batch(self) -> None:
        self._encodes.append((self._batch, self._encoder.submit(self._pixels_nSS3[: len(self._batch)])))
        self._batch = []
