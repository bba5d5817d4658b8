"""Writes the sentences of a build to its file, with a progress bar and a report."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from EasyLM.data import records
from EasyLM.data.tokenizer_names import TOKENIZER_KEY
from EasyLM.errors import prefix_errors
from EasyLM.process_pool import Workers
from EasyLM.progress import progress
from EasyLM.shared_results import SharedResults
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_schema
from tokenizer.builders import image_ref
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.kinds import DataSet, Sentence, compose
from tokenizer.builders.output import OutputFile
from tokenizer.builders.pipeline import IMAGES_PER_READ, Encoder, Pipeline
from tokenizer.builders.schedule import Slot
from tokenizer.formats import ImageTokenizer

_PENDING_BATCHES = 6  # up to three are on the device or queued for it; the others are being read
_INITIAL_STATE = {"number": 0, "sentences": 0, "pictures": 0, "sentences_left_out": 0, "seconds": 0.0, "skipped": {}}
_STATE = {name: type(value) for name, value in _INITIAL_STATE.items()} | {"example": int, "skipped": {str: str}}


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """The sentences to write.

    Attributes:
      data_sets: the inputs.
      schedule: returns the examples of a range of numbers.
      examples: their numbers.
    """

    data_sets: Sequence[DataSet]
    schedule: Callable[[range], Iterator[Slot]]
    examples: range


@dataclasses.dataclass(frozen=True)
class Resources:
    """The resources of a build. They affect its speed, not its result.

    Attributes:
      batch_size: images encoded at a time.
      workers: the processes that read images.
      cached_images: images whose codes are cached on disk; 0: none.
    """

    batch_size: int
    workers: Workers
    cached_images: int


def write_sentences(
    plan: BuildPlan,
    codec: ImageTokenizer,
    file: OutputFile,
    skipped: SkippedInputs,
    resources: Resources,
    fast_decode: bool = False,
) -> dict[str, Any]:
    """Writes the sentences that the file does not contain yet, and returns the report.

    Args:
      plan: the sentences.
      codec: encodes their images.
      file: the output.
      skipped: takes the inputs that cannot be used.
      resources: of the build.
      fast_decode: see `images.read`.
    """
    state = file.state or {**_INITIAL_STATE, "example": plan.examples.start}
    with prefix_errors(f"{file.path}.progress.json"):
        check_schema(state, _STATE, "state")
    skipped.restore(state["skipped"])
    start, done = time.monotonic() - state["seconds"], state["example"] - plan.examples.start
    workers = resources.workers
    reader = functools.partial(image_ref.read, size=codec.resolution, fast_decode=fast_decode)
    max_pending = _PENDING_BATCHES * resources.batch_size + workers.processes
    max_reading = max_pending + workers.processes * IMAGES_PER_READ
    with (
        contextlib.closing(CodeCache(resources.cached_images, codec.tokens_per_image, file.scratch_folder)) as cache,
        contextlib.closing(Encoder(codec)) as encoder,
        SharedResults(workers, reader, (codec.resolution, codec.resolution, 3), max_reading) as pixels,
        progress(desc=os.path.basename(file.path), initial=done, total=len(plan.examples), unit="example") as bar,
    ):
        pipeline = Pipeline(pixels.submit, encoder, cache, resources.batch_size, max_pending, workers.processes)
        for sentence, codes in pipeline.run(_remaining(plan, state, workers, skipped)):
            if isinstance(codes, dict):
                for path, reason in codes.items():
                    skipped.add(path, reason)
                state["sentences_left_out"] += 1
            else:
                file.write(_record_line(sentence, codes, codec))
                state["sentences"] += 1
                state["pictures"] += len(codes)
            state |= {"example": sentence.example, "number": sentence.number + 1}
            bar.set_postfix_str(encoder.progress_text(), refresh=False)
            bar.update(sentence.example - plan.examples.start - bar.n)
            if file.save_is_due():
                file.save({**state, "seconds": time.monotonic() - start, "skipped": skipped.reasons})
        bar.update(len(plan.examples) - bar.n)
        return {
            **{name: state[name] for name in ("sentences", "pictures", "sentences_left_out")},
            "skipped": [{"input": path, "reason": reason} for path, reason in sorted(skipped.reasons.items())],
            "seconds": round(time.monotonic() - start, 1),
            "device_waiting_share": round(encoder.idle_share(), 3),
        }


def _remaining(
    plan: BuildPlan, state: Mapping[str, Any], workers: Workers, skipped: SkippedInputs
) -> Iterator[Sentence]:
    """Yields the sentences from the resume point on."""
    resume_point = state["example"], state["number"]
    examples = range(resume_point[0], plan.examples.stop)
    for sentence in compose(plan.data_sets, plan.schedule(examples), workers, skipped):
        if (sentence.example, sentence.number) >= resume_point:
            yield sentence


def _record_line(sentence: Sentence, codes: np.ndarray, codec: ImageTokenizer) -> bytes:
    tokens = codes.reshape(-1).astype(np.int32)
    records.check_ids(tokens, codec.num_codes)
    others = {"kind": sentence.kind, TOKENIZER_KEY: codec.digest, **image_ref.to_record(sentence.images)}
    return records.record_line(tokens, **others)
