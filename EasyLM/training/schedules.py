"""Learning rate schedules from flags. A schedule is a function of the number of updates."""

import dataclasses

import optax

from EasyLM.errors import UserError
from EasyLM.flags import Flag

SCHEDULE_FLAGS = {
    "schedule": Flag(
        "cosine",
        "After the warm-up: cosine decay, or wsd (warm-up, stable, decay): constant, then linear decay.",
        choices=("cosine", "wsd"),
    ),
    "init_lr": Flag(0.0, "Learning rate of the first update.", least=0),
    "end_lr": Flag(0.001, "Learning rate from lr_decay_steps on.", least=0),
    "lr": Flag(0.01, "Peak learning rate, after the warm-up.", least=0),
    "lr_warmup_steps": Flag(2000, "Updates of linear warm-up.", least=0),
    "lr_decay_steps": Flag(500000, "Update at which the decay ends, counted from the start of the warm-up."),
    "wsd_decay_steps": Flag(50000, "Updates of the decay of wsd, the last before lr_decay_steps.", least=1),
}


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """Values of SCHEDULE_FLAGS."""

    schedule: str
    init_lr: float
    end_lr: float
    lr: float
    lr_warmup_steps: int
    lr_decay_steps: int
    wsd_decay_steps: int


def make_schedule(c: ScheduleSettings, group: str) -> optax.Schedule:
    """Returns the schedule.

    Args:
      group: the prefix of the flags in error messages.

    Raises:
      UserError: if the decay begins before the end of the warm-up.
    """
    if c.lr_decay_steps <= c.lr_warmup_steps:
        raise UserError(
            f"--{group}.lr_decay_steps={c.lr_decay_steps}: must be more than lr_warmup_steps={c.lr_warmup_steps}"
        )
    if c.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(c.init_lr, c.lr, c.lr_warmup_steps, c.lr_decay_steps, c.end_lr)
    stable_end = c.lr_decay_steps - c.wsd_decay_steps
    if stable_end < c.lr_warmup_steps:
        raise UserError(
            f"--{group}.wsd_decay_steps={c.wsd_decay_steps}: must be at most "
            f"{c.lr_decay_steps - c.lr_warmup_steps}, lr_decay_steps - lr_warmup_steps"
        )
    # Hu et al., "MiniCPM", arXiv 2404.06395; a linear decay as in Haegele et al., arXiv 2405.18392.
    parts = (
        optax.linear_schedule(c.init_lr, c.lr, c.lr_warmup_steps),
        optax.constant_schedule(c.lr),
        optax.linear_schedule(c.lr, c.end_lr, c.wsd_decay_steps),
    )
    return optax.join_schedules(parts, (c.lr_warmup_steps, stable_end))
