"""Import and export of a 1B-parameter model: seconds, memory, and the disk's own time.

    python benchmarks/hf_folders.py [--folder DIR] [--layers 16]

A bfloat16 folder of LLaMA-3.2-1B's shape with random weights is read into parameters
(`read`), imported into a checkpoint (`import`), and exported from it in bfloat16
(`export`), each in a process of its own. The peak is that of the resident memory above
the process's own before it began, over the bytes of the float32 parameters. `disk` is
the time to write and sync as many bytes as the step writes, by a plain loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rows import row

from gamayun_jax.interop import hf_config, hf_weights, huggingface
from gamayun_jax.model import presets
from gamayun_jax.model.weights import abstract_params, parameter_count


def make_folder(layers: int, folder: Path) -> None:
    """A folder with random weights, written tensor by tensor."""
    cfg = dataclasses.replace(presets.llama3p2_1b(), num_layers=layers)
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(1 << 20, np.float32)).astype(jnp.bfloat16)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.resize(noise, x.shape)

    params = jax.tree.map(draw, abstract_params(cfg))
    folder.mkdir(parents=True)
    data = hf_config.config_to_hf(cfg, "bfloat16")
    (folder / "config.json").write_text(json.dumps(data))
    hf_weights.write_weights(params, cfg, folder, dtype="bfloat16")


def step(name: str, folder: Path) -> dict:
    """One step in this process: seconds, and peak memory above the start, bytes."""
    data = json.loads((folder / "in/config.json").read_text())
    cfg = hf_config.config_from_hf(data)
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    begin, busy = time.perf_counter(), time.process_time()
    if name == "read":
        jax.block_until_ready(hf_weights.read_weights(folder / "in", cfg))
    elif name == "import":
        huggingface.import_hf(folder / "in", folder / "imported")
    elif name == "export":
        huggingface.export_hf(folder / "imported", folder / "out", dtype="bfloat16")
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "busy": time.process_time() - busy,
        "peak": resident("VmHWM") - before,
        "count": parameter_count(cfg),
    }


def resident(field: str) -> int:
    """Bytes of this process's memory (Linux): now (VmRSS) or at most (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def disk_seconds(folder: Path, size: int) -> float:
    """Time to write and sync `size` bytes of noise."""
    block = os.urandom(1 << 24)
    begin = time.perf_counter()
    with open(folder / "disk", "wb") as f:
        for _ in range(size // len(block)):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
    seconds = time.perf_counter() - begin
    (folder / "disk").unlink()
    return seconds


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: temp)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args.folder)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_folder(args.layers, folder / "in")
        for name, made in (("read", None), ("import", "imported"), ("export", "out")):
            command = [sys.executable, __file__, "--step", name, "--folder", folder]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            size = size_of(folder / made) if made else 0
            disk = disk_seconds(folder, size) if made else 0.0
            whole = 4 * found["count"]
            row(name, "s", [found["seconds"]])
            row(name, "CPU s", [found["busy"]])
            row(f"{name}: peak over the float32 size", "times", [found["peak"] / whole])
            row(f"{name}: written", "GB", [size / 1e9])
            row(f"{name}: the disk alone", "s", [disk])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
