"""Time by kernel of a function, from a trace of JAX's profiler."""

import collections
import glob
import re
import tempfile
from collections.abc import Callable

import jax

from gpu_day.measure import reason

MOST_KERNELS = 20


def time_by_kernel(function: Callable[[], None]) -> dict[str, float]:
    """Returns the milliseconds of each kernel on the device, the longest first, and their sum as "all".

    The names of kernels lose their numbers, so that the kernels of all layers count together. If the profiler fails,
    the result has its error as a key: measurements do not depend on the trace.
    """
    try:
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                function()
            (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
            data = jax.profiler.ProfileData.from_file(path)
    except Exception as error:
        return {reason(error): 0.0}
    nanoseconds: collections.Counter = collections.Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):  # other lines group the same kernels
                for event in line.events:
                    nanoseconds[re.sub(r"[._]\d+", "", event.name)] += event.duration_ns
    longest = nanoseconds.most_common(MOST_KERNELS)
    return {"all": sum(nanoseconds.values()) / 1e6, **{name[:120]: time / 1e6 for name, time in longest}}
