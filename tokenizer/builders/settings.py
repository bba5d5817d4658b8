"""Settings of samplers and arrangements."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SentenceSettings:
    """Settings of the samplers and arrangements. A kind ignores those that do not apply to it.

    Attributes:
      seed: seed of every random choice.
      n_shots: items of a sentence.
      images_per_shot: images of each class of a sentence.
      n_frames: frames of a window.
      max_stride: the largest random stride between frames.
      strides: strides of the windows of a video.
      hole_mask_ratio: probability that a mask is a hole.
      depth_range: near,far: the distances of white and black in annotations of more than 8 bits; empty: the values
        span black to white.
    """

    seed: int
    n_shots: int
    images_per_shot: int
    n_frames: int
    max_stride: int
    strides: tuple[int, ...]
    hole_mask_ratio: float
    depth_range: str = ""
