"""The images of prompts, in order, as image indices without pixels.

Shapes: Q prompts, K shots or context frames, G images of a shot (image and annotation: 2, frame: 1), q images of the
query (image: 1, clip: 0), P images of a prompt.
"""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PromptLayout:
    """Prompts of one task as image indices. A prompt with fewer shots uses the last shots of a longer prompt.

    Attributes:
      context_QKG: shots, or context frames of a clip.
      query_Qq: query images.
      answer_Q: the true answers.
    """

    context_QKG: np.ndarray  # noqa: N815
    query_Qq: np.ndarray  # noqa: N815
    answer_Q: np.ndarray  # noqa: N815

    @property
    def max_shots(self) -> int:
        """Shots or context frames of the longest prompt."""
        return self.context_QKG.shape[1]

    def images(self, shots: int) -> np.ndarray:
        """Returns the images of each prompt with this number of shots or context frames: [Q, P]."""
        assert 0 <= shots <= self.max_shots
        context_QKG = self.context_QKG[:, self.max_shots - shots :]
        return np.concatenate([context_QKG.reshape(len(self.answer_Q), -1), self.query_Qq], axis=1)

    def annotations(self, shots: int) -> np.ndarray:
        """Returns the annotations of the shots, or the context frames of a clip: [Q, shots]."""
        return self.context_QKG[:, self.max_shots - shots :, -1]


def analogy_prompts(groups: Sequence[Hashable], queries: Sequence[int], shots: int, seed: int) -> PromptLayout:
    """Returns prompts `[input, target, input, target, ..., query]`. Shots are other pairs of the query's group.

    Args:
      groups: the group of each pair; pair i has the images 2 i (input) and 2 i + 1 (target).
      queries: indices of pairs whose groups have at least `shots` other pairs.
    """
    members: dict[Hashable, list[int]] = {}
    for pair, group in enumerate(groups):
        members.setdefault(group, []).append(pair)
    drawn_shots = []
    for query in queries:
        group_pairs = np.array(members[groups[query]])
        position = int(np.flatnonzero(group_pairs == query)[0])
        drawn_shots.append(group_pairs[draw_shots(len(group_pairs), shots, position, seed)])
    shots_QK = np.array(drawn_shots, int).reshape(len(queries), shots)
    queries_Q = np.asarray(queries)
    return PromptLayout(np.stack([2 * shots_QK, 2 * shots_QK + 1], -1), 2 * queries_Q[:, None], 2 * queries_Q + 1)


def sequential_prompts(clips: int, frames: int) -> PromptLayout:
    """Returns prompts `[frame, frame, ...]`. The last frame of each clip is the answer; indices go clip by clip."""
    indices_QF = np.arange(clips * frames).reshape(clips, frames)
    return PromptLayout(indices_QF[:, :-1, None], indices_QF[:, :0], indices_QF[:, -1])


def draw_shots(count: int, shots: int, query: int, seed: int) -> np.ndarray:
    """Draws shots for a query from `count` pairs, without the query and without replacement, in prompt order.

    Fewer shots are the last ones of more shots: along a curve only the number of shots changes.
    """
    others = np.delete(np.arange(count), query)
    return np.random.default_rng([seed, query]).permutation(others)[:shots][::-1]
