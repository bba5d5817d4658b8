"""Folders of pictures to a JSONL file of visual sentences: `python -m tokenizer.build --kind=K ...`; see DATASET.md.

    python -m tokenizer.build --kind=paired --input_dir=data/image --target_dir=data/depth --output_file=depth.jsonl

The inputs are listed (collect.py) and grouped into examples (groups.py); each example becomes sentences (kinds.py,
sentences.py), whose pictures are read and encoded as a stream (pipeline.py), into a file that survives its writer
(resumable.py).
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from EasyLM.data import records
from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.process_pool import Workers
from EasyLM.storage import check_output, content_digest
from tokenizer.builders import arrangements, image_ref
from tokenizer.builders.code_cache import CodeCache
from tokenizer.builders.file_index import Inputs, Side
from tokenizer.builders.image_ref import Picture
from tokenizer.builders.kinds import KINDS, Kind, compose
from tokenizer.builders.pipeline import Encoder, Pipeline
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.media import folders, images, videos
from tokenizer.sentence_files.skipped_inputs import Problems
from tokenizer.vqgan import CODEC_FLAGS, Codec

_BATCHES = 6  # under way at a time: up to three on the device or before it, the others being read
_SEVERAL_TIMES = (arrangements.video, arrangements.multi_sequence)  # orders that show a picture twice in an epoch
_BEGIN = {"number": 0, "sentences": 0, "pictures": 0, "sentences_left_out": 0, "seconds": 0.0, "skipped": {}}
VERSION = 1  # of the sentences that follow from flags and inputs: a build that was stopped under another cannot go on

# Flags that decide the sentences; a build that was stopped goes on only with the same.
SENTENCE_FLAGS = {
    "kind": Flag("images", "The sentences to make.", choices=tuple(KINDS)),
    "input_dir": Flag("", "Folder of the inputs (folders below it included).", required=True),
    "target_dir": Flag("", "Folder of the labels or further sequences; for multi_* several, with commas between."),
    "n_shots": Flag(8, "Pairs, images, or classes of a sentence.", least=1),
    "images_per_shot": Flag(1, "category: pictures of each class of a sentence.", least=1),
    "n_epochs": Flag(1, "How often all inputs are gone through, each time in another way.", least=1),
    "n_frames": Flag(16, "Frames of a sentence.", least=1),
    "max_stride": Flag(1, "frames, multi_sequence, co3d: the largest random step from one frame to the next.", least=1),
    "strides": Flag("1", "video: steps from one frame to the next, with commas between; each gives its own sentences."),
    "hole_mask_ratio": Flag(
        0.5, "inpainting: probability that what is masked is one hole, not many patches.", least=0, most=1
    ),
    "seed": Flag(0, "Of every random choice.", least=0),
    "shard": Flag("0/1", "i/n: make only the i-th of n parts (from 0), which stand one behind the other in the whole."),
    "vqgan": CODEC_FLAGS["vqgan"],
    "dtype": CODEC_FLAGS["dtype"],
}
FLAGS = {
    **SENTENCE_FLAGS,
    "batch_size": CODEC_FLAGS["batch_size"],
    "output_file": Flag(
        "", "The JSONL file to write; it appears when it is whole, OUTPUT_FILE.report.json beside it.", required=True
    ),
    "max_errors": Flag(0, "Skip up to so many broken, unmatched or short inputs, each named; then end.", least=0),
    "fresh": Flag(False, "Begin again, though a build was stopped here, or has ended with the same settings."),
    "workers": Flag(os.cpu_count() or 1, "Processes that read pictures.", least=1),
    "cache_pictures": Flag(
        1 << 21, "Codes kept on disk for further epochs, of so many pictures at 2 bytes a token.", least=1
    ),
}


def main(config) -> None:
    """Builds the file and prints what it holds."""
    settings = _checked(config)
    kind, problems = KINDS[config.kind], Problems(config.max_errors)
    codec = Codec(config.vqgan, config.dtype, config.batch_size)
    extensions = videos.VIDEO_EXTENSIONS if kind.videos else images.IMAGE_EXTENSIONS
    inputs = Inputs(kind.layout, _sides(kind, config), extensions, problems)
    group = kind.group(inputs, settings)
    shard, shards = settings.shard
    total = group.examples * settings.n_epochs
    span = range(total * shard // shards, total * (shard + 1) // shards)
    with contextlib.closing(ResumableFile(config.output_file, _identity(config, inputs), config.fresh)) as file:
        if file.whole is not None:
            print(f"{config.output_file} is whole already: {_told(file.whole)}")
            return
        folders.report_ignored(inputs.others, "inputs")
        composed = functools.partial(compose, kind, group, settings)
        report = _build(config, codec, composed, span, file, problems)
        if not report["sentences"] and shards == 1:
            raise UserError(f"--input_dir={config.input_dir}: not one sentence, {len(problems)} inputs skipped")
        file.finish({**report, "files_passed_over": inputs.others})
    print(f"{config.output_file}: {_told(report)}")


def _told(report: dict) -> str:
    skipped = f", {len(report['skipped'])} inputs skipped" if report["skipped"] else ""
    waited = f"; the device waited {report['device_waiting_share']:.0%} of {report['seconds']:.0f} s"
    return f"{report['sentences']} sentences of {report['pictures']} pictures{skipped}{waited}"


def _checked(config):
    """A frozen copy of the settings with lists parsed. Raises UserError for the first that cannot be."""
    kind = KINDS[config.kind]
    if kind.targets != "none" and not config.target_dir:
        raise UserError(f"--target_dir is missing: --kind={config.kind} needs it")
    if kind.targets == "one" and "," in config.target_dir:
        raise UserError(f"--target_dir={config.target_dir}: --kind={config.kind} takes one folder")
    settings = config.copy_and_resolve_references()
    with settings.ignore_type():
        settings.strides = _numbers("strides", config.strides, ",")
        settings.shard = _numbers("shard", config.shard, "/")
    if min(settings.strides) < 1:
        raise UserError(f"--strides={config.strides}: each must be at least 1")
    if len(settings.shard) != 2 or not 0 <= settings.shard[0] < settings.shard[1]:
        raise UserError(f"--shard={config.shard}: must be i/n with i one of 0..n-1")
    return settings


def _numbers(name: str, value: str, separator: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(separator))
    except ValueError:
        raise UserError(f"--{name}={value}: must be whole numbers with {separator!r} between") from None


def _sides(kind: Kind, config) -> list[Side]:
    if kind.folders:
        return [Side(config.input_dir, "input_dir", folder) for folder in kind.folders]
    targets = config.target_dir.split(",") if kind.targets != "none" else []
    return [Side(config.input_dir, "input_dir"), *(Side(target.strip(), "target_dir") for target in targets)]


def _identity(config, inputs: Inputs) -> dict:
    """All that the bytes of the file follow from."""
    names = [os.path.join(config.vqgan, name) for name in sorted(os.listdir(config.vqgan))]
    tokenizer = [content_digest(name, os.path.getsize(name)) for name in names if os.path.isfile(name)]
    return {
        "version": VERSION,
        "inputs": inputs.digest,
        "tokenizer": tokenizer,
        **{n: config[n] for n in SENTENCE_FLAGS},
    }


def _build(config, codec: Codec, composed: Callable, span: range, file: ResumableFile, problems: Problems) -> dict:
    """Writes those sentences of the examples `span` that are not there yet; returns the report."""
    state = file.state or {**_BEGIN, "example": span.start}
    problems.restore(state["skipped"])
    check_output(config.output_file, "output_file")
    directory = os.path.dirname(config.output_file) or "."
    again = config.n_epochs > 1 or KINDS[config.kind].order in _SEVERAL_TIMES
    cache = CodeCache(config.cache_pictures if again else 0, codec.config.tokens_per_image, directory)
    begin = time.monotonic() - state["seconds"]
    with Workers(config.workers) as workers, contextlib.closing(Encoder(codec)) as encoder, _bar(config) as bar:
        _begin(bar, state["example"] - span.start, len(span))
        depth = _BATCHES * config.batch_size + 2 * config.workers
        read = functools.partial(workers.submit, functools.partial(image_ref.read, size=codec.config.resolution))
        done = state["example"], state["number"]
        to_come = (s for s in composed(range(done[0], span.stop), workers, problems) if (s.example, s.number) >= done)
        for sentence, codes in Pipeline(read, encoder, cache, config.batch_size, depth).run(to_come):
            if isinstance(codes, dict):
                for path, reason in codes.items():
                    problems.add(path, reason)
                state["sentences_left_out"] += 1
            else:
                file.write(_line(config.kind, sentence.pictures, codes, codec.config.num_embeddings))
                state["sentences"] += 1
                state["pictures"] += len(codes)
            state |= {"example": sentence.example, "number": sentence.number + 1}
            bar.set_postfix_str(encoder.figures(), refresh=False)
            bar.update(sentence.example - span.start - bar.n)
            if file.due():
                file.mark({**state, "seconds": time.monotonic() - begin, "skipped": problems.reasons})
        bar.update(len(span) - bar.n)
        return {
            **{name: state[name] for name in ("sentences", "pictures", "sentences_left_out")},
            "skipped": [{"input": path, "reason": reason} for path, reason in sorted(problems.reasons.items())],
            "seconds": round(time.monotonic() - begin, 1),
            "device_waiting_share": round(encoder.waiting_share(), 3),
        }


def _bar(config) -> tqdm:
    # Without a terminal, as in a job's log, one line a minute is enough.
    return tqdm(unit="example", desc=config.kind, mininterval=0.5 if sys.stderr.isatty() else 60)


def _begin(bar: tqdm, done: int, total: int) -> None:
    """Starts the bar's clock; what an earlier run has done took none of the time from here on."""
    bar.reset(total)
    bar.initial = bar.n = bar.last_print_n = done
    bar.refresh()


def _line(kind: str, sentence: list[Picture], codes: np.ndarray, num_codes: int) -> bytes:
    tokens = codes.reshape(-1).astype(np.int32)
    records.check_ids(tokens, num_codes)
    return records.record_line(tokens, kind=kind, **image_ref.facts(sentence))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
