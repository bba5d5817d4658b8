"""Generation settings: one dataclass from flags and request fields to the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError
from EasyLM.models.llama.inference_memory import Batch
from EasyLM.models.sampling import check_sampling, check_seed

# Flags and request fields keep the names of the LVM release. Errors use these names.
USER_NAMES = {"num_new_images": "n_new_frames", "num_candidates": "n_candidates", "context_images": "context_frames"}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How the images that follow a prompt are generated. The constructor checks all values.

    Attributes:
      num_new_images: images to generate, one after the other.
      num_candidates: samples for each prompt. They share the prompt's cache.
      context_images: the window: the image being generated and the images before it that the model attends to.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample from the k most likely tokens; 0: from all.
      top_p: sample from the fewest most likely tokens that together have this probability; 1: from all.
      seed: seed of the sampling.

    Raises:
      UserError: naming the setting that is out of range, its value and the range.
    """

    num_new_images: int = 1
    num_candidates: int = 1
    context_images: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_least("num_new_images", 1)
        self._check_least("num_candidates", 1)
        self._check_least("context_images", 2, ": the generated image and one image before it")
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_seed(self.seed)

    def _check_least(self, name: str, least: int, reason: str = "") -> None:
        if getattr(self, name) < least:
            raise UserError(f"{USER_NAMES[name]}={getattr(self, name)}: must be at least {least}{reason}")

    @classmethod
    def from_user(cls, values: Mapping[str, Any]) -> "GenerationSettings":
        """Creates settings from flags or request fields, by their names there (`USER_NAMES`). Ignores other keys."""
        names = {field.name: USER_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: values[user_name] for name, user_name in names.items() if user_name in values})


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The largest batch of a program, from which its memory follows.

    Attributes:
      prompts: prompts of a batch.
      images: of the longest prompt, or of the longest sequence that is scored; 0: as long as the model allows.
      settings: how images are generated; None: sequences are scored, nothing is generated.
      on_each_device: the prompts are those of each device; otherwise of all devices.
    """

    prompts: int = 1
    images: int = 0
    settings: GenerationSettings | None = GenerationSettings()
    on_each_device: bool = False

    def in_tokens(self, max_images: int, tokens_per_image: int, devices: int) -> Batch:
        """Returns the batch in tokens.

        Args:
          max_images: images in the model's longest sequence.
          tokens_per_image: N.
          devices: shards of a batch.
        """
        prompts = self.prompts * (devices if self.on_each_device else 1)
        if self.settings is None:
            return Batch(prompts, min(self.images or max_images, max_images) * tokens_per_image, candidates=0)
        candidates, new_images = self.settings.num_candidates, self.settings.num_new_images
        window = min(self.settings.context_images, max_images)
        images = min(self.images or window, window - 1)
        room = min(window - images, new_images)
        if room < new_images:  # the window moves: each candidate becomes its own prompt
            return Batch(prompts * candidates, (window - 1) * tokens_per_image, 1, tokens_per_image)
        return Batch(prompts, images * tokens_per_image, candidates, room * tokens_per_image)
