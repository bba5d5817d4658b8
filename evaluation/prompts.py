"""Visual prompts as token rows. Everything here is a pure function of codes.

Legend: B prompts, S shots (example pairs), F frames, N tokens of one image.
"""

import numpy as np


def analogy(inputs_SN: np.ndarray, targets_SN: np.ndarray, query_N: np.ndarray) -> np.ndarray:
    """`[input, target, input, target, ..., query]` as one row of (2 S + 1) N tokens; the answer is the next image."""
    assert inputs_SN.shape == targets_SN.shape
    pairs_S2N = np.stack([inputs_SN, targets_SN], axis=1)
    return np.concatenate([pairs_S2N.reshape(-1), query_N])


def sequence(frames_FN: np.ndarray) -> np.ndarray:
    """`[frame, frame, ...]` as one row of F N tokens; the answer is the next frame."""
    return frames_FN.reshape(-1)


def supports(count: int, shots: int, query: int, seed: int) -> np.ndarray:
    """Which examples of a folder stand as shots before the query: a seeded draw of others, without repetition.

    The draw of fewer shots is the tail of the draw of more, so that curves over the number of shots differ by what is
    put before, not by other examples.
    """
    others = np.delete(np.arange(count), query)
    return np.random.default_rng([seed, query]).permutation(others)[:shots][::-1]
