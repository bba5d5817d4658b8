"""Reports of a few-shot evaluation: the table of metrics and the sheet of answers.

Shapes: Q queries, S the side in pixels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.tasks import contact_sheet
from evaluation.tasks.tasks import Task

_SOURCES = ("model", "copy_last", "copy_query", "tokenizer")
_SHEET_SIZE = 96  # pixels of an image on the sheet


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the metrics at the largest number of shots, one line per task and metric.

    Args:
      results: the value of `tasks` in the JSON file.
    """
    columns = (*_SOURCES, "unigram")
    print(f"{'task':22}{'shots':>6}  {'metric':18}" + "".join(f"{name:>19}" for name in columns))
    for task, result in results.items():
        point = result["curve"][-1]
        lines = {"perplexity": {"model": point["perplexity"], "unigram": point["unigram_perplexity"]}}
        if len(result["curve"]) > 1:
            lines["nats_gained"] = {"model": point["nats_gained"]}
        lines |= {name: point[name] for name in ("mse", result["figure"]) if name}
        for name, values in lines.items():
            cells = "".join(f"{cell(values.get(column)):>19}" for column in columns)
            print(f"{task:22}{point['shots']:6}  {name:18}{cells}")


def cell(value: Mapping[str, float] | None) -> str:
    """Returns a mean with its standard error as text; empty for None."""
    return "" if value is None else f"{value['mean']:.4g} ±{value['standard_error']:.2g}"


def sheet_rows(task: Task, shots: int, answers_QSS3: np.ndarray) -> list[contact_sheet.Row]:
    """Returns a row per answer: the prompt, the model's answer and the true answer."""
    captions = [*task.captions(shots), "the model", "truth"]
    prompts_QP, truths_Q = task.prompts.images(shots), task.prompts.answer_Q
    return [
        contact_sheet.Row(task.name, captions, [*task.pixels[prompts_QP[i]], answer, task.pixels[truths_Q[i]]])
        for i, answer in enumerate(answers_QSS3)
    ]


def answer_sheet(rows: list[contact_sheet.Row]) -> np.ndarray:
    """Draws the rows as one image, uint8 [height,width,3], with a frame around the model's answers."""
    return np.asarray(contact_sheet.contact_sheet(rows, _SHEET_SIZE, framed="the model"))
