"""Prompting: a model and its tokenizer generate the images that follow a prompt of images.

May import: EasyLM.storage, EasyLM.checkpoints, EasyLM.parallel, EasyLM.publishing, EasyLM.models, EasyLM.models.llama,
tokenizer.formats, tokenizer.vqgan. Independent of image files and HTTP.

Modules:
  settings     how images are sampled, with checks of these values; the largest batch of a program
  checkpoint   loads a model from any checkpoint format onto a mesh
  prompter     `Prompter`: encode, generate, decode, log-likelihoods
  model_card   the limits of a model, as stated in its card

Vocabulary:
  prompt       images in order. Analogy prompt: shots, then a query. Sequential prompt: frames.
  shot         an (image, annotation) pair that shows the task
  query        the image whose annotation the model generates
  context      the images that the model attends to, including the one that it generates
  candidate    one of several samples for the same prompt
  token        a code of the tokenizer; an image is `tokens_per_image` tokens

Shape letters: B prompts, P images of a prompt, F new images, C candidates, N tokens of an image, S side in pixels,
n tokens so far. Images are RGB float32 in [0, 1] at the tokenizer's resolution.
"""

from evaluation.prompting.checkpoint import load_model
from evaluation.prompting.model_card import stated_limits
from evaluation.prompting.prompter import PROMPTER_FLAGS, Prompter, PrompterSettings, PromptSize, prompt_size
from evaluation.prompting.settings import GenerationSettings, LargestBatch

__all__ = [
    "PROMPTER_FLAGS",
    "GenerationSettings",
    "LargestBatch",
    "PromptSize",
    "Prompter",
    "PrompterSettings",
    "load_model",
    "prompt_size",
    "stated_limits",
]
