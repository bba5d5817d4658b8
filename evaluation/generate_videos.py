"""Continues videos: `python -m evaluation.generate_videos --checkpoint=C --input_files='D/*.mp4' --output_dir=O`.

The first `n_context_frames` of each clip are the prompt, and `n_new_frames` are generated. For a clip `D/a/b.mp4` the
command writes the sheet `O/a_b.mp4.png` (one row per candidate: the prompt and the generated frames) and the generated
frames `O/a_b.mp4/CANDIDATE/000.png`, ... `--fps` adds a video `O/a_b.mp4/CANDIDATE.mp4` of prompt and generated frames.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import check_installed
from EasyLM.flags import Flag, run, to_dataclass
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings
from evaluation.runs import EXAMPLE_FLAGS, GENERATION_FLAGS, EvaluationRun, clips, loops
from evaluation.runs.sample_files import ClipOutputs
from tokenizer.media import video_writer

FLAGS = {
    **PROMPTER_FLAGS,
    **clips.CLIP_FLAGS,
    **EXAMPLE_FLAGS,
    "output_dir": Flag("", "Output folder.", required=True),
    **GENERATION_FLAGS,
    "n_context_frames": Flag(12, "Frames of the prompt.", least=1),
    "n_new_frames": Flag(4, "Frames to generate after the prompt.", least=1),
    "n_candidates": Flag(8, "Samples for each clip.", least=1),
    "batch_size_factor": Flag(
        4,
        "Clips in a batch for each device (with mp > 1 in --mesh_dim: for each mp devices). Changes no result.",
        least=1,
    ),
    "batch_size": Flag(32, "Ignored: --batch_size_factor is the number of clips on each device.", ignored=True),
    "fps": Flag(
        0.0,
        "Frame rate of videos to write for each candidate; 0: no videos.",
        least=0,
        most=video_writer.MAX_FPS,
    ),
}


def main(config: ConfigDict) -> None:
    """Continues every clip; prints and writes the metrics."""
    settings = GenerationSettings.from_user(config)
    if config.fps:
        check_installed("--fps", "video", "av")
    num_target = config.n_new_frames if config.evaluate_mse else 0
    lengths = config.n_context_frames, num_target
    clip_settings = to_dataclass(clips.ClipSettings, config)
    examples = clips.find_clips(clip_settings, sum(lengths))
    outputs = ClipOutputs(config.output_dir, config.fps)
    outputs.check(examples)

    def load(clip: clips.Clip, side: int) -> tuple[np.ndarray, np.ndarray | None]:
        frames = clips.load(clip, side, config.center_crop)
        return frames[: config.n_context_frames], frames[config.n_context_frames :] if num_target else None

    loops.generate(
        EvaluationRun.from_config(config, config.batch_size_factor, examples, load, lambda clip: lengths),
        settings,
        outputs.save,
        output_dir=config.output_dir,
        list_path=clip_settings.list_path,
        evaluate_mse=config.evaluate_mse,
    )


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
