"""Evaluation runs: many examples from files, in batches, resumable after a kill.

May import: EasyLM.storage, tokenizer.media, evaluation.prompting, evaluation.tasks.

Modules:
  example       the `Example` protocol, and the flags of every run
  lines         examples of a JSONL file
  clips         examples of video files and folders of frames
  prefetch      batches whose images are loaded by threads while the device computes
  results       results per example: appended to a file, from which a stopped run resumes
  loops         the two loops: `measure` (perplexity) and `generate` (images)
  sample_files  the image and video files that `generate` writes

Vocabulary:
  example       a prompt with its target or output: a line of a JSONL file, or a clip
  target        the true images after a prompt
  sample        what the model generates; a candidate is one of several samples
  metric        a number per example; its mean and standard error are printed and written

Shape letters: as in `evaluation.prompting`; T frames of a clip.
"""

from evaluation.runs.example import EXAMPLE_FLAGS
from evaluation.runs.lines import LINE_FLAGS, Line, read_lines
from evaluation.runs.loops import GENERATION_FLAGS, EvaluationRun
from evaluation.runs.results import UNFINISHED, Results, open_results

__all__ = [
    "EXAMPLE_FLAGS",
    "GENERATION_FLAGS",
    "LINE_FLAGS",
    "UNFINISHED",
    "EvaluationRun",
    "Line",
    "Results",
    "open_results",
    "read_lines",
]
