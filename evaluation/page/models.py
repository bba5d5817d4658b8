"""The models of the page. One is in memory at a time: another one takes its place when a visitor draws with it."""

import contextlib
import dataclasses
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from EasyLM.errors import UserError
from EasyLM.storage import split_paths
from evaluation.prompting import GenerationSettings, PrompterSettings
from evaluation.serving.batch_worker import Turns
from evaluation.serving.engine import Engine
from evaluation.serving.workload import check_num_new_images, check_prompt_length

# When a model is replaced, its answers have this time to finish. Then they are cancelled, which takes until the program
# that the device runs, or the compiler, has ended.
_FINISH_SECONDS, _CLOSE_SECONDS = 600.0, 60.0


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the page knows of a model, whether it is loaded or not.

    Attributes:
      name: what visitors choose.
      resolution: side of a prompt's images in pixels.
      max_prompt_images: images of the longest prompt.
      max_new_images: the most images that a request may ask for, of all candidates together.
      limits: what it knows and what not, in a sentence of its card; empty: not stated.
    """

    name: str
    resolution: int
    max_prompt_images: int
    max_new_images: int
    limits: str = ""

    def check(self, num_images: int, settings: GenerationSettings) -> None:
        """Raises UserError if the model's engine would refuse such a request. The model need not be loaded."""
        check_prompt_length(num_images, self.max_prompt_images)
        check_num_new_images(settings, self.max_new_images)

    @property
    def text(self) -> str:
        """The description for visitors, in Markdown."""
        limits = self.limits or "Its card (README.md) states no limits: what it knows is unknown."
        images = f"{self.max_prompt_images} image{'s' if self.max_prompt_images > 1 else ''}"
        size = f"{self.resolution}x{self.resolution} pixels"
        return f"`{self.name}`: prompts of up to {images} of {size}. **Limits:** {limits}"


class Models:
    """The models of the page, by name, and the engine of the one that is loaded."""

    def __init__(self, infos: Sequence[ModelInfo], load: Callable[[str], Engine], first: Engine):
        """`load` loads the engine of a name; `first` is that of the first one."""
        self.infos = {info.name: info for info in infos}
        self._load, self._loaded = load, infos[0].name
        self._engine: Engine | None = first  # None: the last load failed. Closed, if no model is loaded.
        self._turns, self._changed, self._num_users = Turns(), threading.Condition(), 0

    def info(self, name: str) -> ModelInfo:
        """Returns what is known of a model. Raises UserError if it is unknown."""
        if name not in self.infos:
            raise UserError(f"there is no model {name!r}: choose one of {', '.join(self.infos)}")
        return self.infos[name]

    def is_loaded(self, name: str) -> bool:
        return self._loaded == name

    @contextlib.contextmanager
    def engine(self, name: str) -> Iterator[Engine]:
        """Provides the engine of a model for one answer. It stays loaded until the context ends.

        If another model is loaded, waits for its answers, frees its memory and loads this one. Other calls wait
        meanwhile.

        Raises:
          UserError: if the model is unknown or cannot be loaded, or the other one does not stop.
        """
        self.info(name)
        with self._turns:
            if not self.is_loaded(name):
                self._replace(name)
            with self._changed:
                self._num_users += 1
        try:
            assert self._engine is not None
            yield self._engine  # no variable here keeps it in memory
        finally:
            with self._changed:
                self._num_users -= 1
                self._changed.notify_all()

    def _replace(self, name: str) -> None:
        if self._loaded:  # otherwise its answers are cancelled already
            self._wait_for_users(_FINISH_SECONDS)
        # A second model beside the first could exceed the device's memory.
        if not (self.close(_CLOSE_SECONDS) and self._wait_for_users(_CLOSE_SECONDS)):
            raise UserError("another model is still stopping, and only one is in memory: try again in a minute")
        self._engine = None
        gc.collect()  # frees the device's memory before the next model needs it
        self._engine, self._loaded = self._load(name), name

    def _wait_for_users(self, timeout: float) -> bool:
        """Returns whether all answers have ended within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_users == 0, timeout)

    def close(self, timeout: float) -> bool:
        """Closes the engine. Returns whether it ended its answers in time; otherwise they are cancelled."""
        self._loaded = ""
        return self._engine is None or self._engine.close(timeout)


def split_settings(settings: PrompterSettings) -> dict[str, PrompterSettings]:
    """Returns the settings of each model by its name, from settings whose values are comma lists.

    A tokenizer or a configuration that is given once applies to all models. The name of a model is the end of its
    checkpoint's path, with as many parts as the names need to differ.

    Raises:
      UserError: naming the flag.
    """
    given = settings.checkpoint
    specs = split_paths(given)
    if len(set(specs)) < len(specs) or not specs:
        raise UserError(f"--checkpoint={given}: must be different checkpoints, separated by commas")
    vqgans = _one_each("vqgan", settings.vqgan, len(specs))
    configs = _one_each("load_llama_config", settings.load_llama_config, len(specs))
    parts = [spec.rstrip("/").split("/") for spec in specs]
    names = [["/".join(part[-count:]) for part in parts] for count in range(1, max(map(len, parts)) + 1)]
    short = next(candidates for candidates in [*names, specs] if len(set(candidates)) == len(specs))
    return {
        name: dataclasses.replace(settings, checkpoint=spec, vqgan=vqgan, load_llama_config=config)
        for name, spec, vqgan, config in zip(short, specs, vqgans, configs, strict=True)
    }


def _one_each(flag: str, value: str, count: int) -> list[str]:
    values = [value] if os.path.exists(value) else [part.strip() for part in value.split(",")]
    if len(values) not in (1, count):
        raise UserError(f"--{flag}={value}: {len(values)} values for {count} checkpoints: give one, or one for each")
    return values * count if len(values) == 1 else values
