"""Perplexity of frames: `python -m evaluation.eval_video_perplexity --checkpoint=C --input_files='D/*.mp4'`.

Of each clip `n_context_frames` are the prompt, and the `n_target_frames` after them are measured, as by
`evaluation.eval_perplexity`. With `--frame_input` clips are folders of frames.
"""

from EasyLM.flags import Flag, run
from evaluation.prompting.prompter import PROMPTER_FLAGS
from evaluation.runs import clips, lines, loops

FLAGS = {
    **PROMPTER_FLAGS,
    **clips.CLIP_FLAGS,
    **lines.EXAMPLE_FLAGS,
    "n_context_frames": Flag(15, "Frames before those that are measured."),
    "n_target_frames": Flag(1, "Frames that are measured."),
    "batch_size": Flag(2, "Clips at a time, over all devices; changes no result."),
}


def main(config) -> None:
    """Measures every clip, prints and writes the figures."""
    loops.check(config, "n_context_frames", "n_target_frames", "batch_size", "n_workers")
    lengths = config.n_context_frames, config.n_target_frames

    def load(clip, side):
        frames = clips.load(clip, side, config.center_crop)
        return frames[: config.n_context_frames], frames[config.n_context_frames :]

    loops.measure(config, clips.find_clips(config, sum(lengths)), load, lambda clip: lengths)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
