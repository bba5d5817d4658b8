"""Few-shot tasks: examples, prompts of examples, and metrics of the answers.

May import: EasyLM.storage, tokenizer.media, tokenizer.builders, tokenizer.image_quality, tokenizer.synthetic,
tokenizer.mappings, evaluation.prompting. Other packages import the names below, or the modules metrics, plots,
report, in_context and in_context_report.

Modules, in the order of the data flow:
  selection      the flags of fewshot that select tasks, numbers of shots and metrics
  benchmarks     tasks of public data sets and of rendered scenes, by name; their flags
  pascal         examples of Pascal VOC
  rendered       examples of rendered scenes
  mapping_tasks  prompts of mappings, another one for each query; `MappingTask`
  tasks          `Task`; tasks of folders; draws queries and shots and reads their images
  prompt_layout  the images of each prompt, as indices
  measure        `Measurement`: a model's metrics over the number of shots
  in_context     `InContextMeasurement`: the same for mappings, after right and after wrong examples
  baselines      answers that need no model
  lookup         the answer that the examples of a mapping determine
  metrics        metrics of answers and of tokens
  report         the table and the sheet of answers
  plots          charts over the number of shots
  in_context_report  the tables and charts of mappings
  contact_sheet  rows of captioned images as one image

Vocabulary:
  task      one kind of answer, such as depth, with its examples
  example   an image and its annotation (a pair), or a clip
  shot      an example that a prompt shows
  query     the image whose annotation the model generates
  answer    the image that follows a prompt: the model's, a baseline's, or the true one
  metric    a number per answer; its mean and standard error are printed (`figure` in flags and JSON)
  split     a kind of rendered scenes that differs from training scenes
  unigram   the baseline that uses token frequencies only
  mapping   makes the annotation of a pair from its image; a family is a set of mappings (tokenizer.mappings)
Shapes: Q queries, K shots, G images of a shot, P images of a prompt, N tokens of an image, n images, B images of a
batch, S the side in pixels, C colours of a palette, V codes.
"""

from evaluation.tasks.in_context import InContextMeasurement
from evaluation.tasks.mapping_tasks import MappingTask
from evaluation.tasks.measure import Measurement
from evaluation.tasks.selection import TASK_FLAGS, TaskSettings, select_tasks
from evaluation.tasks.tasks import TaskSource, load_task

__all__ = [
    "TASK_FLAGS",
    "InContextMeasurement",
    "MappingTask",
    "Measurement",
    "TaskSettings",
    "TaskSource",
    "load_task",
    "select_tasks",
]
