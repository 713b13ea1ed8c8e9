"""Memory and traffic of the train step on a TPU pod, compiled ahead of time.

    python benchmarks/aot_memory.py [--shape A] [--rows 1 2] [--remat full minimal]

Compiles this project's step beside what MaxText 0.2.5's own `train_compile` needed for
the same shape, topology, batch, sequence and remat policy (v5e:16x16, sequence 4096,
FSDP over all 256 chips, splash attention, AdamW; jax 0.12.0.1). Needs the extra `tpu`;
nothing is executed, and no TPU is needed.

GiB are argument + temporary + output - alias of the compiler's own analysis, for both.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from gamayun_jax import plan, presets
from gamayun_jax.chips import GIB
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
        compute=ComputeConfig(remat=remat, loss_chunk=chunk),
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
    parser.add_argument("--cache", type=Path, default=Path("build/plan"))
    args = parser.parse_args()
    chips = len(plan.topology_devices(args.topology))
    for shape in args.shape:
        for remat in args.remat:
            for rows in args.rows:
                cfg = config(shape, rows, remat, chips, args.chunk, args.fsdp)
                peer = None
                if args.topology == "v5e:16x16":
                    peer = MAXTEXT.get((shape, rows, remat))
                row = dict(
                    shape=shape, topology=args.topology, rows=rows, remat=remat,
                    chunk=args.chunk, mesh=[chips // args.fsdp, args.fsdp],
                    maxtext_gib=peer,
                )  # fmt: skip
                try:
                    p = plan.make_plan(cfg, args.topology, cache=args.cache)
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
