"""Which pictures stand in a prompt, in what order: pure functions of picture numbers.

Legend: Q prompts, K examples or frames at hand, G pictures of an example (image and annotation: 2; a frame: 1), q
pictures of the query (an image: 1; none where the next frame is asked for: 0), P pictures of a prompt.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one task, as numbers of pictures. Fewer shots are the last of more, so a curve varies nothing else."""

    context_QKG: np.ndarray  # noqa: N815
    query_Qq: np.ndarray  # noqa: N815
    answer_Q: np.ndarray  # noqa: N815

    @property
    def most_shots(self) -> int:
        return self.context_QKG.shape[1]

    def shown(self, shots: int) -> np.ndarray:
        """The pictures of each prompt with so many examples or frames: [Q, P]."""
        assert 0 <= shots <= self.most_shots
        context_QKG = self.context_QKG[:, self.most_shots - shots :]
        return np.concatenate([context_QKG.reshape(len(self.answer_Q), -1), self.query_Qq], axis=1)

    def annotations(self, shots: int) -> np.ndarray:
        """What the examples answer (of a clip: its frames): [Q, shots]."""
        return self.context_QKG[:, self.most_shots - shots :, -1]


def analogies(groups: Sequence, queries: Sequence[int], shots: int, seed: int) -> Prompts:
    """`[input, target, input, target, ..., query]`: the examples are others of the query's group.

    Args:
      groups: of each pair; pair i has the pictures 2 i (input) and 2 i + 1 (target).
      queries: pairs; each has at least `shots` others in its group.
    """
    members: dict = {}
    for pair, group in enumerate(groups):
        members.setdefault(group, []).append(pair)
    chosen = []
    for query in queries:
        alike = np.array(members[groups[query]])
        chosen.append(alike[supports(len(alike), shots, int(np.flatnonzero(alike == query)[0]), seed)])
    examples_QK = np.array(chosen, int).reshape(len(queries), shots)
    queries_Q = np.asarray(queries)
    return Prompts(np.stack([2 * examples_QK, 2 * examples_QK + 1], -1), 2 * queries_Q[:, None], 2 * queries_Q + 1)


def sequences(clips: int, frames: int) -> Prompts:
    """`[frame, frame, ...]`, and the last one of each clip as the answer; the pictures are clip after clip."""
    numbers_QF = np.arange(clips * frames).reshape(clips, frames)
    return Prompts(numbers_QF[:, :-1, None], numbers_QF[:, :0], numbers_QF[:, -1])


def supports(count: int, shots: int, query: int, seed: int) -> np.ndarray:
    """Which examples of a folder stand as shots before the query: a seeded draw of others, without repetition.

    The draw of fewer shots is the tail of the draw of more, so that curves over the number of shots differ by what is
    put before, not by other examples.
    """
    others = np.delete(np.arange(count), query)
    return np.random.default_rng([seed, query]).permutation(others)[:shots][::-1]
