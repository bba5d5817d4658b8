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
      strides: steps in frames of the windows of a video.
      frame_seconds: steps in seconds instead.
      split_at_cuts: whether no window of a video crosses a hard cut.
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
    frame_seconds: tuple[float, ...] = ()
    split_at_cuts: bool = False
    depth_range: str = ""
