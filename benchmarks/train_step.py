"""The train step on CPU against PyTorch and a bare JAX loop: tokens per second.

    pip install torch transformers    # optional: two of the peers
    python benchmarks/train_step.py [--rounds 5] [--threads 1]
    python benchmarks/train_step.py --maxtext PYTHON --levanter PYTHON
                                      # where maxtext[tpu], marin-levanter are installed

Llama-style, 8 layers, width 256, 4 heads, FFN 1024, vocabulary 8192, sequences of 256,
batch 16, float32, AdamW, synthetic tokens. Each peer is a process of its own that
makes a few steps when told to; rounds go in turns. Ours is the real step of step.py:
token weights, per-language sums, segment ids and all, layers in a scan, 4 microbatches.
Reported: medians of wall time and of CPU time, the time to the second step and the peak
resident memory.

  gamayun_jax whole     ours, all 16 rows at once
  gamayun_jax unrolled  ours, layers without a loop
  gamayun_jax ema       ours, which also keeps a moving average of the parameters
  jax      what one writes first: einsums, log_softmax + take_along_axis, optax.adamw,
           layers unrolled
  eager    transformers' LlamaForCausalLM and torch.optim.AdamW
  compiled the same through torch.compile
  maxtext  MaxText 0.2.5's own `train`, layers in a scan, no remat; stopped (SIGSTOP)
           while others take their turn, timed by the lines that it logs
  levanter Levanter's own Trainer.train_step, layers in a scan, no checkpointing

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rows import ratio, row

LAYERS, D, N, F, V, T, B = 8, 256, 4, 1024, 8192, 256, 16
STEPS = 3  # of a turn
MICROBATCHES = 4  # of ours, unless "whole": arrays of 4 rows stay in the caches
PEERS = (
    "gamayun_jax",
    "gamayun_jax whole",
    "gamayun_jax unrolled",
    "gamayun_jax ema",
    "jax",
    "eager",
    "compiled",
    "maxtext",
    "levanter",
)
TINY = Path(__file__).parents[1] / "experiments" / "tiny.py"


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, V, (B, T + 1)).astype(np.int32)


def ours(scan: bool, ema: bool, microbatches: int) -> Callable[[], Any]:
    import flax.linen as nn
    import jax

    from gamayun_jax import config as c
    from gamayun_jax.data.loader import make_batch
    from gamayun_jax.data.token_weights import make_token_weights
    from gamayun_jax.data.tokenizer import Boundaries
    from gamayun_jax.model import sharding
    from gamayun_jax.model.loss import TokenWeights
    from gamayun_jax.training import step

    replace = dataclasses.replace
    base = c.load_config(TINY)
    model = c.ModelConfig(
        vocab_size=V, num_layers=LAYERS, d_model=D, num_heads=N, num_kv_heads=N,
        head_dim=D // N, d_ff=F, max_seq_len=T,
    )  # fmt: skip
    cfg = replace(
        base,
        model=model,
        data=replace(base.data, seq_len=T, batch_size=B),
        corpus=replace(
            base.corpus,
            record_tokens=T,
            tokenizer=replace(base.corpus.tokenizer, vocab_size=V),
        ),
        compute=c.ComputeConfig(
            scan_layers=scan,
            loss_chunk=32 * microbatches,  # 512 rows of logits at a time
            microbatches=microbatches,
        ),
        optimizer=replace(base.optimizer, ema_tokens=100 * B * T if ema else 0),
    )
    mesh = sharding.make_mesh(cfg.mesh)
    names = cfg.languages
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = step.new_state(cfg, mesh)
        weights = make_token_weights(
            c.TokenWeightConfig("bytes"),
            names,
            V,
            dict.fromkeys(names, 1 / len(names)),
            np.full(V, 4, np.int32),
            dict.fromkeys(names, 4.0),
        )
        run = step.compile_step(
            cfg, mesh, step.abstract_state(cfg, mesh), 0, TokenWeights(*weights), 0
        )
    languages = np.arange(B, dtype=np.int32) % len(names)
    batch = make_batch(tokens(), languages, Boundaries(1, 2, 0))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def one() -> None:
        nonlocal state
        state, _ = run(state, batch)
        jax.block_until_ready(state)

    return one


def bare_jax() -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optax

    H = D // N
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)

    params = {
        "embedding": weight(V, D),
        "norm": jnp.ones(D),
        "layers": [
            {
                "q": weight(D, N, H), "k": weight(D, N, H), "v": weight(D, N, H),
                "o": weight(N, H, D), "gate": weight(D, F), "up": weight(D, F),
                "down": weight(F, D), "norm1": jnp.ones(D), "norm2": jnp.ones(D),
            }
            for _ in range(LAYERS)
        ],
    }  # fmt: skip
    optimizer = optax.adamw(1e-3)
    angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
    cos = jnp.asarray(np.cos(angle), jnp.float32)[None, :, None]
    sin = jnp.asarray(np.sin(angle), jnp.float32)[None, :, None]
    mask = np.tril(np.ones((T, T), bool))[None, None]

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def rotate(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def loss(params, ids):
        inputs, targets = ids[:, :-1], ids[:, 1:]
        x = params["embedding"][inputs]
        for p in params["layers"]:
            h = norm(x, p["norm1"])
            q = rotate(jnp.einsum("btd,dnh->btnh", h, p["q"]))
            k = rotate(jnp.einsum("btd,dnh->btnh", h, p["k"]))
            v = jnp.einsum("btd,dnh->btnh", h, p["v"])
            scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
            probs = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
            out = jnp.einsum("bnts,bsnh->btnh", probs, v)
            x = x + jnp.einsum("btnh,nhd->btd", out, p["o"])
            h = norm(x, p["norm2"])
            x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        logits = norm(x, params["norm"]) @ params["embedding"].T
        logp = jax.nn.log_softmax(logits, -1)
        return -jnp.take_along_axis(logp, targets[..., None], -1).mean()

    @jax.jit
    def step(params, state, ids):
        grads = jax.grad(loss)(params, ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, ids = optimizer.init(params), jnp.asarray(tokens())

    def one() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state, ids))

    return one


def pytorch(compiled: bool, threads: int) -> Callable[[], Any]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=N, num_key_value_heads=N, max_position_embeddings=T,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = torch.compile(model) if compiled else model
    ids = torch.from_numpy(tokens()[:, :T].astype(np.int64))

    def one() -> None:
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return one


def levanter() -> Callable[[], Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import haliax as hax
    import jax
    import jmp
    import optax
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    model = LlamaConfig(
        max_seq_len=T, hidden_dim=D, intermediate_dim=F, num_layers=LAYERS, num_heads=N,
        num_kv_heads=N, tie_word_embeddings=True, gradient_checkpointing=False,
    )  # fmt: skip
    config = TrainerConfig(
        mp=jmp.get_policy("f32"), tracker=NoopConfig(), train_batch_size=B,
        num_train_steps=10**6, log_dir=Path(tempfile.mkdtemp()), load_checkpoint=False,
        require_accelerator=False, log_jaxprs=False, log_xla_hlo=False,
    )  # fmt: skip
    config.initialize()

    def loss(model: Any, example: Any, *, key: Any = None) -> Any:
        return model.compute_next_token_loss(example, key=key)

    trainer = Trainer(config, optax.adamw(1e-3), loss, add_default_hooks=False)
    trainer.__enter__()
    vocabulary, rows = hax.Axis("vocab", V), hax.Axis("batch", B)
    state = trainer.initial_state(
        jax.random.PRNGKey(0),
        model_init=lambda: model.build(vocabulary, key=jax.random.PRNGKey(1)),
    )
    ids = hax.named(tokens()[:, :T], (rows, model.max_Pos))
    batch = hax.vmap(LmExample.causal, rows)(ids)

    def one() -> None:
        nonlocal state
        state = trainer.train_step(state, batch).state
        jax.block_until_ready(jax.tree.leaves(state))

    return one


def maxtext(python: str) -> None:
    """As `worker`, around a process of MaxText that knows nothing of turns."""
    sizes = dict(
        hardware="cpu", per_device_batch_size=B, max_target_length=T, base_emb_dim=D,
        base_num_decoder_layers=LAYERS, base_num_query_heads=N, base_num_kv_heads=N,
        head_dim=D // N, base_mlp_dim=F, vocab_size=V, logits_via_embedding=True,
        decoder_block="llama2", attention="dot_product", dataset_type="synthetic",
        remat_policy="none", dtype="float32", weight_dtype="float32", opt_type="adamw",
        enable_checkpointing=False, skip_jax_distributed_system=True, steps=100_000,
        run_name="x",
    )  # fmt: skip
    find = "import maxtext; print(maxtext.__path__[0])"
    where = subprocess.check_output([python, "-c", find], text=True).strip()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [python, "-m", "maxtext.trainers.pre_train.train"]
        command += [f"{where}/configs/base.yml", f"base_output_directory={out}"]
        process = subprocess.Popen(
            [*command, *(f"{k}={v}" for k, v in sizes.items())],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=out, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None

        def wait(steps: int) -> None:
            while steps:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError("maxtext ended")
                steps -= "completed step: " in line

        def cpu() -> float:
            fields = (
                Path(f"/proc/{process.pid}/stat").read_text().split(")")[-1].split()
            )
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        wait(4)  # it logs two steps late
        print(json.dumps({"first": time.perf_counter() - begin}), flush=True)
        process.send_signal(signal.SIGSTOP)
        for _ in sys.stdin:
            process.send_signal(signal.SIGCONT)
            wait(1)
            wall, spent = time.perf_counter(), cpu()
            wait(STEPS)
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = {
                "wall": STEPS * B * T / (time.perf_counter() - wall),
                "cpu": STEPS * B * T / (cpu() - spent),
                "peak": int(status.split("VmHWM:")[1].split()[0]) / 1024,
            }
            process.send_signal(signal.SIGSTOP)
            print(json.dumps(found), flush=True)
        process.kill()
        process.wait()


def worker(peer: str, threads: int) -> None:
    """Make a step, say so, then make STEPS whenever a line comes in."""
    begin = time.perf_counter()
    if peer == "jax":
        one = bare_jax()
    elif peer.startswith("gamayun_jax"):
        microbatches = 1 if "whole" in peer else MICROBATCHES
        one = ours("unrolled" not in peer, "ema" in peer, microbatches)
    elif peer == "levanter":
        one = levanter()
    else:
        one = pytorch(peer == "compiled", threads)
    one()
    one()
    print(json.dumps({"first": time.perf_counter() - begin}), flush=True)
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            one()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        used = resource.getrusage(resource.RUSAGE_SELF)
        count, peak = STEPS * B * T, used.ru_maxrss / 1024
        step = {
            "faults": (used.ru_minflt - before) / STEPS,
            "cpu": cpu / STEPS,
            "wall": wall / STEPS,
            "peak": peak,
        }
        rates = {"wall": count / wall, "cpu": count / cpu, "peak": peak}
        print(json.dumps({**rates, "step": step}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--maxtext", metavar="PYTHON", help="where it is installed")
    parser.add_argument("--levanter", metavar="PYTHON", help="where it is installed")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    # XLA takes as many threads as the process may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.worker == "maxtext":
        maxtext(args.maxtext)
        return
    if args.worker:
        worker(args.worker, args.threads)
        return
    running, first = {}, {}
    for peer in args.peers:
        elsewhere = {"maxtext": args.maxtext, "levanter": args.levanter}
        if not elsewhere.get(peer, True):
            continue
        python = args.levanter if peer == "levanter" else sys.executable
        command = [python, __file__, "--worker", peer]
        command += ["--maxtext", args.maxtext] if peer == "maxtext" else []
        process = subprocess.Popen(
            [*command, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            print(f"{peer}: left out, it cannot be run here")
            continue
        running[peer], first[peer] = process, json.loads(line)["first"]
    rates: dict[str, list[dict[str, float]]] = {peer: [] for peer in running}
    for _ in range(args.rounds):
        for peer, process in running.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            rates[peer].append(json.loads(process.stdout.readline()))
    for process in running.values():
        process.communicate()
    print(f"{args.threads} threads, {args.rounds} rounds of {STEPS} steps")
    base = rates[args.peers[0]]
    for peer, found in rates.items():
        row(peer, "tokens/s", [r["wall"] for r in found])
        row(peer, "tokens per CPU second", [r["cpu"] for r in found])
        row(f"{peer}: peak", "MiB", [found[-1]["peak"]])
        row(f"{peer}: to the second step", "s", [first[peer]])
        if peer != args.peers[0]:
            over = [[r["wall"] for r in x] for x in (base, found)]
            ratio(f"{args.peers[0]} over {peer}", *over)


if __name__ == "__main__":
    main()
