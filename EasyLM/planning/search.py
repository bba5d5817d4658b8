"""Finds the settings of the fastest step that fits, by compiling candidates."""

import dataclasses
from collections.abc import Callable, Sequence

from EasyLM.planning.plan import Plan

_LEAST_GAIN = 1.02  # a doubled batch that is faster by less than this factor is not worth its memory


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of a step.

    Attributes:
      mesh_dim: as the flag.
      policy: what is saved for the backward pass.
      rows: rows of a batch for each part into which the mesh splits it.
    """

    mesh_dim: str
    policy: str
    rows: int

    def __str__(self) -> str:
        return f"mesh {self.mesh_dim}, saving {self.policy or 'everything'}, {self.rows} rows a device"


@dataclasses.dataclass(frozen=True)
class Search:
    """The plans of all candidates that were tried, and the fastest that fits."""

    tried: list[tuple[Candidate, Plan]]

    @property
    def fastest(self) -> tuple[Candidate, Plan] | None:
        """The candidate with the most tokens per second, according to the estimate. None if none fits."""
        fitting = [(candidate, plan) for candidate, plan in self.tried if plan.fits]
        return max(fitting, key=lambda tried: _speed(tried[1]), default=None)

    @property
    def reason(self) -> str:
        """Compares the fastest candidate with those that differ from it in one setting."""
        if self.fastest is None:
            return "none of the candidates fits"
        best, best_plan = self.fastest
        reasons = []
        for candidate, plan in self.tried:
            changes = {
                "mesh": (candidate.mesh_dim, best.mesh_dim),
                "policy": (candidate.policy, best.policy),
                "rows": (candidate.rows, best.rows),
            }
            changed = [name for name, (value, kept) in changes.items() if value != kept]
            if len(changed) == 1:
                reasons.append(f"{candidate}: {_outcome(plan, best_plan)}")
        return "; ".join(reasons) or "it is the only candidate that was compiled"


def search(
    make: Callable[[Candidate], Plan],
    mesh_dims: Sequence[str],
    policies: Sequence[str],
    report: Callable[[Candidate, Plan], None] = lambda candidate, plan: None,
) -> Search:
    """Compiles candidates. For each mesh and policy, the batch doubles while it fits and the estimate rises.

    Args:
      make: compiles the step of a candidate.
      policies: those that recompute the least first. If memory does not limit the batch under a policy, later ones
        cannot be faster and are not tried.
      report: called with each candidate and its plan.
    """
    tried: list[tuple[Candidate, Plan]] = []
    for mesh_dim in mesh_dims:
        for policy in policies:
            plans: list[Plan] = []
            while True:
                candidate = Candidate(mesh_dim, policy, 2 ** len(plans))
                plans.append(make(candidate))
                tried.append((candidate, plans[-1]))
                report(candidate, plans[-1])
                if not plans[-1].fits or _is_saturated(plans):
                    break
            if plans[-1].fits or plans[-1].fits is None:  # the batch is large enough, or the step does not compile
                break
    return Search(tried)


def _is_saturated(plans: Sequence[Plan]) -> bool:
    return len(plans) > 1 and _speed(plans[-1]) < _LEAST_GAIN * _speed(plans[-2])


def _speed(plan: Plan) -> float:
    return plan.tokens_per_second_estimate or 0.0


def _outcome(plan: Plan, best: Plan) -> str:
    if not plan.fits:
        return plan.error or "does not fit"
    return f"{_speed(plan) / _speed(best) - 1:+.1%} tokens/s"
