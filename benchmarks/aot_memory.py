"""Memory and traffic of the train step on a TPU pod, compiled ahead of time.

    python benchmarks/aot_memory.py [--shape A] [--rows 1 2] [--remat full minimal]
    python benchmarks/aot_memory.py --maxtext PYTHON   # where maxtext[tpu] is installed

Compiles this project's step beside what MaxText 0.2.5's own `train_compile` needs for
the same shape, topology, batch, sequence and remat policy (sequence 4096, splash
attention, AdamW). With `--maxtext` in the same run, best under the same jax (we run
under that PYTHON too); else beside figures of jax 0.12.0.1 for v5e:16x16 and FSDP
over all 256 chips. Needs the extra `tpu`; nothing is executed.

GiB are argument + temporary + output - alias of the compiler's own analysis, for both.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from gamayun_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    UserError,
)
from gamayun_jax.model import presets
from gamayun_jax.plan import aot
from gamayun_jax.training.chips import GIB

SEQ_LEN = 4096
SHAPES = {
    # A Llama of 1.395B: what MaxText was compiled for.
    "A": ModelConfig(
        vocab_size=128_256, num_layers=24, d_model=2048, num_heads=16,
        num_kv_heads=8, head_dim=128, d_ff=5632, max_seq_len=SEQ_LEN,
    ),
    "L": dataclasses.replace(presets.llama3p2_1b(), max_seq_len=SEQ_LEN),
    "gamayun": presets.gamayun_1p5b(),
}  # fmt: skip
# (shape, rows a chip, remat) -> GiB a chip on v5e:16x16
MAXTEXT = {
    ("A", 1, "full"): 2.46, ("A", 2, "full"): 3.84, ("A", 4, "full"): 6.59,
    ("A", 1, "minimal"): 5.62, ("A", 2, "minimal"): 10.19,
    ("L", 1, "full"): 2.33, ("L", 4, "full"): 6.09,
    ("L", 1, "minimal"): 5.33, ("L", 2, "minimal"): 9.58,
}  # fmt: skip


def maxtext_gib(
    python: str, shape: str, rows: int, remat: str, topology: str, mesh: tuple[int, int]
) -> float | None:
    """GiB a chip of MaxText's step; None if it cannot be compiled for these chips."""
    m = SHAPES[shape]
    kind, _, sizes = topology.partition(":")
    cores = 2 if kind in ("v4", "v5p") else 1  # their names count cores
    chips = math.prod(map(int, sizes.split("x")))
    settings = dict(
        compile_topology=f"{kind}-{cores * chips}", compile_topology_num_slices=1,
        ici_data_parallelism=mesh[0], ici_fsdp_parallelism=mesh[1],
        per_device_batch_size=rows, max_target_length=SEQ_LEN, remat_policy=remat,
        base_emb_dim=m.d_model, base_num_decoder_layers=m.num_layers,
        base_num_query_heads=m.num_heads, base_num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim, base_mlp_dim=m.d_ff, vocab_size=m.vocab_size,
        logits_via_embedding=m.tie_embeddings, use_qk_norm=m.qk_norm,
        decoder_block="llama2", attention="flash", dataset_type="synthetic",
        opt_type="adamw", enable_checkpointing=False, run_name="x", steps=10,
    )  # fmt: skip
    find = "import maxtext; print(maxtext.__path__[0])"
    where = subprocess.check_output([python, "-c", find], text=True).strip()
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-m", "maxtext.trainers.pre_train.train_compile"]
        command += [f"{where}/configs/base.yml", f"base_output_directory={out}"]
        run = subprocess.run(
            [*command, *(f"{k}={v}" for k, v in settings.items())],
            env={**os.environ, "TPU_SKIP_MDS_QUERY": "1"}, cwd=out, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    found = dict(re.findall(r"(\w+)_size_in_bytes=(\d+)", run.stdout))
    if not found:
        return None
    size = {k: int(v) for k, v in found.items()}
    total = size["argument"] + size["temp"] + size["output"] - size["alias"]
    return round(total / GIB, 2)


def config(
    shape: str, rows: int, remat: str, chips: int, chunk: int, fsdp: int
) -> Config:
    """A run of nothing but the model: one stage, one language."""
    return Config(
        name=shape,
        languages=("en",),
        model=SHAPES[shape],
        stages=(
            StageConfig(
                "only", 10**12, MixtureConfig("natural"), ScheduleConfig(peak=3e-4)
            ),
        ),
        data=DataConfig(seq_len=SEQ_LEN, batch_size=rows * chips),
        # Sums of gradients in bfloat16, as the figures of docs/plan.md.
        compute=ComputeConfig(remat=remat, loss_chunk=chunk, reduce_dtype="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=fsdp, tensor=1),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--shape", nargs="+", default=["A"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--remat", nargs="+", default=["full", "minimal"])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--fsdp", type=int, default=256)
    parser.add_argument("--maxtext", metavar="PYTHON", help="where it is installed")
    parser.add_argument("--cache", type=Path, default=Path("build/plan"))
    args = parser.parse_args()
    chips = len(aot.topology_devices(args.topology))
    for shape in args.shape:
        for remat in args.remat:
            for rows in args.rows:
                cfg = config(shape, rows, remat, chips, args.chunk, args.fsdp)
                peer, mesh = None, (chips // args.fsdp, args.fsdp)
                if args.maxtext:
                    where = (args.topology, mesh)
                    peer = maxtext_gib(args.maxtext, shape, rows, remat, *where)
                elif args.topology == "v5e:16x16" and args.fsdp == 256:
                    peer = MAXTEXT.get((shape, rows, remat))
                row = dict(
                    shape=shape, topology=args.topology, rows=rows, remat=remat,
                    chunk=args.chunk, mesh=mesh, maxtext_gib=peer, jax=jax.__version__,
                )  # fmt: skip
                try:
                    p = aot.plan_topology(cfg, args.topology, cache=args.cache)
                except UserError as e:
                    print(json.dumps({**row, "refused": str(e)}), flush=True)
                    continue
                total = p["memory"]["total"] / GIB
                least = sum(p["least_moved_bytes"].values())
                row |= dict(
                    gib=round(total, 2), peak_gib=round(p["memory"]["peak"] / GIB, 2),
                    ratio=round(total / peer, 2) if peer else None,
                    moved_gb=round(p["moved_bytes"] / 1e9, 2),
                    of_least=round(p["moved_bytes"] / least, 2),
                )  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
