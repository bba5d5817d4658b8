"""The flags of every training run, and their values as a frozen dataclass."""

import dataclasses
from typing import Any

from EasyLM import checkpoints
from EasyLM.flags import Flag, to_dataclass
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS
from EasyLM.training import metrics_log
from EasyLM.training.loop import LoopSettings
from EasyLM.training.profiler import profiled_steps
from EasyLM.training.start import StartFiles

RUN_FLAGS = {
    # JAX takes seeds modulo 2**32.
    "seed": Flag(42, "Seed of the initial parameters and of dropout.", least=-(2**31), most=2**32 - 1),
    "mesh_dim": Flag(
        "1,-1,1",
        "Sizes of the mesh axes dp,fsdp,mp, of which one may be -1: all remaining devices. Also with names: "
        "dp:1,fsdp:-1,mp:2. In llama_train a further axis sp splits the tokens of each row: dp:1,fsdp:-1,mp:1,sp:2. A "
        "leading ! allows a physical axis of a TPU network to be split.",
    ),
    "total_steps": Flag(10000, "Micro-steps to train in total, including those before a resume.", least=0),
    "load_checkpoint": Flag("", "PREFIX::PATH to start from: trainstate, trainstate_params, params, flax_params, ..."),
    "load_dataset_state": Flag("", "dataset.json (or a release's dataset.pkl) with the position to start the data at."),
    "load_metadata": Flag("", "metadata.json (or a release's metadata.pkl) with the step and the model settings."),
    "log_freq": Flag(50, "Steps between logged steps.", least=1),
    "save_model_freq": Flag(
        0, "Steps between checkpoints; only the latest are kept. 0: save only after a signal or an error.", least=0
    ),
    "save_milestone_freq": Flag(0, "Steps between milestones, checkpoints that are all kept; 0: none.", least=0),
    "preemption_notice_seconds": Flag(
        0.0,
        "Seconds from a stop signal, such as SIGTERM, to the end of the process. A save that would take longer is not "
        "started; the newest checkpoint remains. 0: unknown, the state is always saved.",
        least=0,
    ),
    "eval_steps": Flag(0, "Batches of eval_dataset to evaluate at each logged step; 0: no evaluation.", least=0),
    "log_all_worker": Flag(False, "Every process writes its metrics, not only process 0."),
    "max_nonfinite_steps": Flag(10, "Stop after this many steps in a row with a non-finite loss.", least=1),
    "watchdog_minutes": Flag(
        30.0,
        "End a run if a step, checkpoint or evaluation takes longer, and print the stacks of all threads; 0: never.",
        least=0,
        most=10**6,
    ),
    "compilation_cache_dir": Flag(
        "", "Folder that keeps compiled functions for later starts; all hosts should share it. Empty: none."
    ),
    "profile_steps": Flag("", "Steps to trace for TensorBoard and xprof, FIRST:END; 10:13 traces 10, 11 and 12."),
    "peak_tflops": Flag(0.0, "Peak TFLOP/s of one device, for MFU; 0: looked up by the device's kind.", least=0),
    "checkpointer": checkpoints.CHECKPOINTER_FLAGS,
    "logger": metrics_log.LOGGER_FLAGS,
    "jax_distributed": JAX_DISTRIBUTED_FLAGS,
}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Values of RUN_FLAGS.

    Attributes:
      flags: the values of all flags of the command, for metadata.json and wandb.
    """

    seed: int
    loop: LoopSettings
    start: StartFiles
    eval_steps: int
    log_all_worker: bool
    watchdog_minutes: float
    preemption_notice_seconds: float
    compilation_cache_dir: str
    profile_steps: range
    peak_tflops: float
    checkpointer: Any
    logger: Any
    flags: dict[str, Any]

    @classmethod
    def from_flags(cls, config: Any) -> "RunSettings":
        """Reads the settings of a run from a config that has RUN_FLAGS, among other flags."""
        return cls(
            loop=to_dataclass(LoopSettings, config),
            start=StartFiles(config.load_checkpoint, config.load_dataset_state, config.load_metadata),
            profile_steps=profiled_steps(config.profile_steps, config.total_steps),
            flags=config.to_dict(),
            **{
                name: config[name]
                for name in (
                    "seed",
                    "eval_steps",
                    "log_all_worker",
                    "watchdog_minutes",
                    "preemption_notice_seconds",
                    "compilation_cache_dir",
                    "peak_tflops",
                    "checkpointer",
                    "logger",
                )
            },
        )
