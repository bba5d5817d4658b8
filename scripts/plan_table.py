"""Plans presets on topologies and prints the table of the README: `python scripts/plan_table.py --kinds=cpu,v5p`.

Each plan is made by `llama_plan` in its own process. The plans are kept in --results, so that TPU topologies (extra
`tpu`) and GPU topologies (extra `gpu`) can be planned in different environments. Plans with 7 billion parameters
compile for minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from ml_collections import ConfigDict

from EasyLM.errors import choose
from EasyLM.flags import Flag, run
from EasyLM.parallel import SHARE_VARIABLES
from EasyLM.storage import write_json

FLAGS = {
    "kinds": Flag("", "Comma list of kinds of devices to plan for, such as v5e,h100; empty: only print the table."),
    "presets": Flag("", "Comma list of presets to plan; empty: all of the table."),
    "results": Flag("scripts/plan_table.json", "File of the plans, which is read and updated."),
    "time_limit": Flag(1200.0, "Seconds for one plan.", above=0),
}
_GROUP = "--train_dataset.json_dataset"
_LENGTH, _LONG = 4096, 131072  # tokens of a row
_SHARED = ["--dtype=bf16", f"{_GROUP}.seq_length={_LENGTH}", "--checkpointer.save_optimizer_state=True"]
_LONG_ROWS = (
    f"{_GROUP}.seq_length={_LONG}",
    f"--llama.max_sequence_length={_LONG}",
    "--mesh_dim=dp:1,fsdp:1,mp:1,sp:8",
)
_WHOLE_CARD = dict(zip(SHARE_VARIABLES, ("1", ""), strict=True))  # plans are compared with the memory of the cards
# (preset, topology, rows of a batch, further flags)
CASES: list[tuple[str, str, int, tuple[str, ...]]] = [
    ("vqlm_100m", "h100:1", 16, ()),
    ("vqlm_1b", "h100:8", 32, ()),
    ("vqlm_3b", "h100:8", 32, ()),
    ("vqlm_7b", "h100:8", 32, ()),
    ("vqlm_13b", "h100:8", 32, ()),
    ("vqlm_30b", "h100:8x8", 64, ()),
    ("vqlm_7b", "v5p:2x2x2", 8, ()),
    ("vqlm_7b", "v5e:4x4", 16, ()),
    ("vqlm_30b", "v5p:4x4x4", 64, ("--mesh_dim=4,-1,1",)),  # sends less than 1,-1,1, and fits
    ("vqlm_7b", "v6e:4x4", 16, ()),
    ("vqlm_7b", "v4:2x2x4", 16, ()),
    ("vqlm_1b", "v5e:4x4", 16, ()),
    ("vqlm_100m", "v5e:2x2", 8, ()),
    ("vqlm_3b", "v5e:4x4", 16, ()),
    ("vqlm_13b", "v5p:2x2x4", 16, ()),
    ("vqlm_7b", "h100:8", 1, _LONG_ROWS),
    ("vqlm_7b", "v5p:2x2x2", 1, _LONG_ROWS),
]


def main(config: ConfigDict) -> None:
    """Plans the chosen cases, and prints the table of all plans."""
    kinds, presets = ([part for part in text.split(",") if part] for text in (config.kinds, config.presets))
    for kind in kinds:
        choose("--kinds", kind, sorted({topology.partition(":")[0] for _, topology, _, _ in CASES}))
    for preset in presets:
        choose("--presets", preset, sorted({preset for preset, _, _, _ in CASES}))
    plans: dict[str, dict] = {}
    if os.path.exists(config.results):
        with open(config.results) as file:
            plans = json.load(file)
    for preset, topology, rows, flags in CASES:
        if topology.partition(":")[0] in kinds and (not presets or preset in presets):
            plans[key_of(preset, topology, flags)] = made_plan(preset, topology, rows, flags, config.time_limit)
            write_json(config.results, plans)
    print(table(plans))


def key_of(preset: str, topology: str, flags: Sequence[str]) -> str:
    """Returns the key of a plan in the file."""
    return " ".join([preset, topology, *flags])


def made_plan(preset: str, topology: str, rows: int, flags: Sequence[str], time_limit: float) -> dict:
    """Returns the plan of a case. A plan that fails holds its `error`."""
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_plan", f"--topology={topology}"]
    command += [f"--load_llama_config={preset}", f"{_GROUP}.batch_size={rows}", *_SHARED, *flags]
    print(f"--- {key_of(preset, topology, flags)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        file_name = os.path.join(directory, "plan.json")
        try:
            process = subprocess.run(
                [*command, f"--output_json={file_name}"], timeout=time_limit, check=False, env=os.environ | _WHOLE_CARD
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled in {time_limit:.0f} s"}
        if not os.path.exists(file_name):
            return {"error": f"exit code {process.returncode}"}
        with open(file_name) as file:
            return json.load(file)


def table(plans: dict[str, dict]) -> str:
    """Returns the plans as a table in Markdown."""
    lines = [
        "| preset | devices | mesh | rows | memory of a device | FLOPs | sent by a device | checkpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset, topology, rows, flags in CASES:
        plan = plans.get(key_of(preset, topology, flags))
        if plan is not None:
            lines.append(f"| {' | '.join([preset, topology, *_cells(plan, rows)])} |")
    return "\n".join(lines)


def _cells(plan: dict, rows: int) -> list[str]:
    if not plan.get("peak_bytes_per_device"):
        return ["", f"{rows}", plan["error"], "", "", ""]
    used, limit = (plan[name] / 1e9 for name in ("peak_bytes_per_device", "hbm_bytes_per_device"))
    return [
        _mesh(plan["mesh"]),
        f"{rows}" if plan["seq_length"] == _LENGTH else f"{rows} x {plan['seq_length']}",
        f"{used:.1f} of {limit:.0f} GB" + ("" if plan["fits"] else ": does not fit"),
        f"{plan['matmul_flops_ratio']:.2f}",
        f"{sum(plan['collective_bytes'].values()) / 1e9:.1f} GB",
        f"{plan['checkpoint_bytes'] / 1e9:.1f} GB",
    ]


def _mesh(sizes: dict[str, int]) -> str:
    """Returns a mesh in the shortest form of --mesh_dim."""
    if sizes.get("sp", 1) == 1:
        return ",".join(str(size) for axis, size in sizes.items() if axis != "sp")
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items())


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
