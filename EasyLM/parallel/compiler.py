"""Options of XLA for train steps, by platform. XLA's own defaults hold for everything else.

They are options of one compilation. In the environment variable XLA_FLAGS, an option that XLA does not know would abort
the process; here it is an error that names the option.

TPUs need none. MaxText sets options that fuse all-gathers with computation. They are on by default: libtpu 0.0.42
compiles the same step for a v5e with and without them, and a different step if they are off. MaxText's options for
all-reduces between slices do not change the step either. Source: CF_FOR_ALL_GATHER and DATA_PARALLEL_OVERLAP in
https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py
"""

from jax.sharding import Mesh

_GPU = {
    # Matrix products use cuBLAS and are not autotuned against generated Triton kernels. Compilation takes less time.
    # Source: the flags of NVIDIA's JAX images, https://github.com/NVIDIA/JAX-Toolbox
    "xla_gpu_enable_triton_gemm": False,
    # Without this option, a product that scanned layers both use and save is computed twice: for its use, and into the
    # stack of saved values. A layer of vqlm_1b that saves its projections then has 27 products instead of 21.
    # Source: the programs that XLA of JAX 0.11.2 compiles for an H100
    "xla_gpu_enable_dynamic_slice_fusion": False,
}
_GPUS = {
    # Moves communication so that it overlaps with computation.
    # Source: https://docs.jax.dev/en/latest/gpu_performance_tips.html
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Returns the compiler options of a train step on the devices of a mesh."""
    if mesh.devices.flat[0].platform != "gpu":
        return {}
    return _GPU | (_GPUS if mesh.devices.size > 1 else {})
