"""Answers that need no model.

Shapes: Q queries, K shots, S the side in pixels.
"""

import numpy as np

from evaluation.tasks.tasks import Task


def baseline_answers(task: Task, shots: int) -> dict[str, np.ndarray]:
    """Answers [Q,S,S,3] of each baseline at a number of shots.

    `copy_query` is the query itself; clips do not have it. `copy_last` is the last annotation or frame of the prompt.
    `mean_annotation` is the mean of all annotations or frames. Both need at least one shot.
    """
    answers = {} if task.is_clip else {"copy_query": task.pixels[task.prompts.query_Qq[:, -1]]}
    if shots:
        annotations_QK = task.prompts.annotations(shots)
        answers["copy_last"] = task.pixels[annotations_QK[:, -1]]
        answers["mean_annotation"] = np.stack([task.pixels[indices_K].mean(axis=0) for indices_K in annotations_QK])
    return answers
