"""The answer that the examples of a mapping determine: what a learner that only looks them up can reach.

Shapes: Q queries, K shots, S the side in pixels, p pixels, u different keys.
"""

import numpy as np

from evaluation.tasks.mapping_tasks import MappingTask


def lookup_answers(task: MappingTask, shots: int) -> np.ndarray:
    """Returns answers [Q,S,S,3] by a table from the keys of the shots to the colours of their annotations.

    A pixel of the query whose key no shot has is copied. For ramps, whose keys are gray values, its colour is
    interpolated between those of the nearest keys instead, if there is a shot.
    """
    assert task.keys_QPSS3 is not None
    queries_QSS3 = task.pixels[task.prompts.query_Qq[:, 0]]
    if not shots:
        return queries_QSS3
    find = _interpolate if task.family == "ramps" else _find
    annotations_QK = task.prompts.annotations(shots)
    return np.stack(
        [
            find(
                keys_PSS3[-1 - shots : -1].reshape(-1, 3),
                task.pixels[annotations_K].reshape(-1, 3),
                keys_PSS3[-1].reshape(-1, 3),
                query_SS3.reshape(-1, 3),
            ).reshape(query_SS3.shape)
            for keys_PSS3, annotations_K, query_SS3 in zip(task.keys_QPSS3, annotations_QK, queries_QSS3, strict=True)
        ]
    )


def _find(keys_p3: np.ndarray, colours_p3: np.ndarray, query_keys_p3: np.ndarray, query_p3: np.ndarray) -> np.ndarray:
    table_u, first_u = np.unique(_packed(keys_p3), return_index=True)
    wanted_p = _packed(query_keys_p3)
    place_p = np.searchsorted(table_u, wanted_p).clip(max=len(table_u) - 1)
    is_known_p = table_u[place_p] == wanted_p
    return np.where(is_known_p[:, None], colours_p3[first_u[place_p]], query_p3)


def _packed(keys_p3: np.ndarray) -> np.ndarray:
    """Returns colours as single numbers."""
    return keys_p3.astype(int) @ np.array([65536, 256, 1])


def _interpolate(
    keys_p3: np.ndarray, colours_p3: np.ndarray, query_keys_p3: np.ndarray, query_p3: np.ndarray
) -> np.ndarray:
    grays_u, first_u = np.unique(keys_p3[:, 0], return_index=True)
    return np.stack([np.interp(query_keys_p3[:, 0], grays_u, colours_p3[first_u, c]) for c in range(3)], axis=-1)
