"""Writes the results of a decision: the keep list, the counts by reason, examples, and a picture of them."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from EasyLM.errors import UserError
from EasyLM.storage import write_json
from tokenizer.filter.decision import KEPT, Decision
from tokenizer.filter.measurements import Measurements
from tokenizer.media import grids, images
from tokenizer.sources.keep_list import keep_list_writer
from tokenizer.sources.reading import open_item

_EXAMPLES = 5  # of a reason
_SAMPLES = 8  # kept images by whose contents a source is recognized
_SIDE, _LABEL_WIDTH = 96, 224  # pixels of the picture


def write_list(path: str, measurements: Measurements, decision: Decision) -> dict[str, Any]:
    """Writes the keep list and `PATH.report.json`; returns the report.

    The report has the counts by reason, and the measurements of a few images of each reason. A duplicate has
    `duplicate_of`: the name of the image that is kept. The list appears last: a list has its own report beside it,
    also after a kill.
    """
    examples = decision.examples(_EXAMPLES)
    wanted: dict[int, Any] = {
        index: None for pairs in examples.values() for pair in pairs for index in pair if index is not None
    }
    kept = np.flatnonzero(decision.numbers_n == KEPT)
    sampled = set(np.random.default_rng(0).choice(kept, min(_SAMPLES, len(kept)), replace=False).tolist())
    samples = {}
    with keep_list_writer(path) as writer:
        for index, measurement in enumerate(measurements):
            if decision.numbers_n[index] == KEPT:
                writer.add(measurement["name"])
            if index in sampled:
                samples[measurement["name"]] = measurement["sha256"]
            if index in wanted:
                wanted[index] = measurement
        writer.finish(measurements.files, samples)
        report = {
            "images": measurements.images(),
            "unreadable": len(measurements.skipped),
            "counts": decision.counts(),
            "examples": {
                reason: [
                    _example(wanted[index], None if original is None else wanted[original]) for index, original in pairs
                ]
                for reason, pairs in examples.items()
            },
            "skipped": measurements.skipped,
        }
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # an earlier list, whose report is replaced
        write_json(f"{path}.report.json", report)
    return report


def _example(measurement: Mapping[str, Any], original: Mapping[str, Any] | None) -> dict[str, Any]:
    if original is None:
        return dict(measurement)
    return {**measurement, "duplicate_of": original["name"], "duplicate_of_address": original["address"]}


def table(report: Mapping[str, Any], path: str) -> str:
    """Returns the counts of a report as lines: the number of images, the reason, and an example or the list's path."""
    counts = {reason: count for reason, count in report["counts"].items() if reason != "kept"}
    lines = [(report["images"], "images", "")]
    lines += [(report["unreadable"], "cannot be read", report["skipped"][0]["input"])] if report["unreadable"] else []
    for reason, count in counts.items():
        example = report["examples"][reason][0]
        of = f", a duplicate of {example['duplicate_of']}" if "duplicate_of" in example else ""
        lines.append((count, reason, f"such as {example['name']}{of}"))
    lines.append((report["counts"]["kept"], "kept", path))
    width = max(len(reason) for _, reason, _ in lines)
    return "\n".join(f"{count:12,}  {reason:{width}}  {example}".rstrip() for count, reason, example in lines)


def example_sheet(report: Mapping[str, Any]) -> np.ndarray:
    """Draws a row of examples for each reason, uint8 [H,W,3]. To the right of a duplicate is the kept image."""
    rows = []
    for reason, examples in report["examples"].items():
        addresses = [
            example[key] for example in examples for key in ("address", "duplicate_of_address") if key in example
        ]
        rows.append((reason, np.stack([_thumbnail(address) for address in addresses])))
    return grids.labelled_rows(rows, _SIDE, _LABEL_WIDTH)


def _thumbnail(address: str) -> np.ndarray:
    """Returns an image in a gray square, uint8 [S,S,3]; only the square, if the image cannot be read any more."""
    square = Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128))
    try:
        with images.open_image(open_item(address)) as image:
            thumbnail = Image.fromarray(images.to_bytes(image, None))
    except UserError:
        return np.asarray(square)
    thumbnail.thumbnail((_SIDE, _SIDE))
    square.paste(thumbnail, ((_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2))
    return np.asarray(square)
