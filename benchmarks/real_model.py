"""A published model beside `transformers`: scoring, long prompts, decoding.

    python benchmarks/real_model.py [--model FOLDER] [--rounds 5] [--quick]

SmolLM2-135M-Instruct (135M parameters, a vocabulary of 49,152): a folder in Hugging
Face's format or, without one, made by recipes/smollm2.py, which says what to install.
Texts are the embedded held-out pages. Both compute on all cores, in one process, in
turns: in float32, where scores must agree to 1e-4 nats a token and the first greedy
token be the same; and in bfloat16, where each rounds in its own way and only figures
are told.

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from peers import NoText, compare_scoring, greedy, texts
from rows import compare, row

from gamayun_jax import config as c
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.evaluate.loglikelihood import Scorer
from gamayun_jax.inference.generator import Generator
from gamayun_jax.interop.load_model import load_params

ROOT = Path(__file__).parents[1]
# Tokens; ours pads the first prompt to 1,536.
PROMPTS, SHORT_PROMPT, NEW = (1100, 2000), 64, 128
BIG = 1 << 13  # tokens of a case from which three rounds must do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder in Hugging Face's format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as made:
        if not args.model:
            recipe = [sys.executable, "-m", "recipes.smollm2", made]
            subprocess.run(recipe, cwd=ROOT, check=True)
        folder = args.model or Path(made)
        measure(folder, "float32", args.rounds, args.quick)
        measure(folder, "bfloat16", min(args.rounds, 3), args.quick)


def measure(folder: Path, dtype: str, rounds: int, quick: bool) -> None:
    """All cases of a model in one dtype."""
    cfg, params, _, mesh = load_params(folder)
    compute = c.ComputeConfig(dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    tokenizer = HFTokenizer(folder)
    stream = np.array(tokenizer.encode("\n".join(texts("en"))))

    def cut(count: int, length: int) -> np.ndarray:
        return np.resize(stream, (count, length))  # from its start again, if need be

    scorer = Scorer(cfg.model, params, mesh, compute)
    counts = (1,) if quick else (1, 8, 64) if dtype == "float32" else (1, 8)
    for length in (32, 256):
        for count in counts:
            ids = np.insert(cut(count, length), 0, tokenizer.start_id, axis=1)
            few = min(rounds, 3) if ids.size > BIG else rounds
            compare_scoring(dtype, ids, scorer, model, few)
    generator = Generator(cfg.model, params, mesh, NoText(), compute)
    prompts, new = ((100,), 8) if quick else (PROMPTS, NEW)
    cases = [*((1, prompt, 1) for prompt in prompts), (1, SHORT_PROMPT, new)]
    if not quick:
        cases.append((8, SHORT_PROMPT, new))
    for batch, length, count in cases:
        ids = cut(batch, length)
        ours = functools.partial(generator.generate_ids, ids.tolist(), count)
        theirs = functools.partial(greedy, model, ids, count)
        same = np.array(ours()) == np.array(theirs())
        assert same[:, 0].all() or dtype != "float32"
        name = f"{dtype}, {count} tokens of {batch}"
        if count == 1:
            name = f"{dtype}, first token after {length}"
        runs = {"ours": ours, "transformers": theirs}
        compare(name, "tokens/s", batch * count, runs, rounds)
        row(f"{name}: same tokens", "of 1", [float(same.mean())])


if __name__ == "__main__":
    main()
