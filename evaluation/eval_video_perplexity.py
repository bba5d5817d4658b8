"""Perplexity of frames: `python -m evaluation.eval_video_perplexity --checkpoint=C --input_files='D/*.mp4'`.

The first `n_context_frames` of each clip are the prompt, and the next `n_target_frames` are the target. The metric is
that of `evaluation.eval_perplexity`. With `--frame_input` clips are folders of frames.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run, to_dataclass
from evaluation.prompting import PROMPTER_FLAGS
from evaluation.runs import EXAMPLE_FLAGS, EvaluationRun, clips, loops

FLAGS = {
    **PROMPTER_FLAGS,
    **clips.CLIP_FLAGS,
    **EXAMPLE_FLAGS,
    "n_context_frames": Flag(15, "Frames of the prompt.", least=1),
    "n_target_frames": Flag(1, "Frames of the target.", least=1),
    "batch_size": Flag(2, "Clips per batch, over all devices; does not change results.", least=1),
}


def main(config: ConfigDict) -> None:
    """Measures every clip; prints and writes the metrics."""
    lengths = config.n_context_frames, config.n_target_frames
    examples = clips.find_clips(to_dataclass(clips.ClipSettings, config), sum(lengths))

    def load(clip: clips.Clip, side: int) -> tuple[np.ndarray, np.ndarray]:
        frames = clips.load(clip, side, config.center_crop)
        return frames[: config.n_context_frames], frames[config.n_context_frames :]

    loops.measure(EvaluationRun.from_config(config, config.batch_size, examples, load, lambda clip: lengths))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
