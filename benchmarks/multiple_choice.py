"""Multiple choice: lm-evaluation-harness on our scorer and on its own Hugging Face
backend, with the same exported model: items per second.

    python benchmarks/multiple_choice.py [--rounds 5] [--items 24]

Contexts of 200 tokens, 4 choices of about 16. Both begin from texts, in float32 on all
cores, in one process, in turns; the Hugging Face backend at its best batch size of
those tried. The log-likelihoods must agree to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peers import MODEL, random_params, texts
from rows import ratio, row
from tokenizers import decoders, models, pre_tokenizers, trainers

from gamayun_jax.evaluate.lm_eval import GamayunLM
from gamayun_jax.interop import hf_config, hf_weights

LANGUAGES = ("en", "ru", "tr", "zh")
CONTEXT, CHOICE, CHOICES = 200, 16, 4
BATCHES = (1, 4, 16, 64)


def write_model(folder: Path) -> tokenizers.Tokenizer:
    """A random model with a byte-level tokenizer, as transformers reads it."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator((t for k in LANGUAGES for t in texts(k)), trainer)
    tok.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "config.json").write_text(json.dumps(hf_config.config_to_hf(MODEL)))
    hf_weights.write_weights(random_params(MODEL), MODEL, folder)
    return tok


def requests_of(tok: tokenizers.Tokenizer, items: int) -> list[Instance]:
    """`items` questions, each as one request a choice, as the harness makes them."""
    found = []
    stream = {k: tok.encode(" ".join(texts(k))).ids for k in LANGUAGES}
    rng = np.random.default_rng(1)
    for i in range(items):
        ids = stream[LANGUAGES[i % len(LANGUAGES)]]

        def cut(size: int, ids: list[int] = ids) -> str:
            at = int(rng.integers(0, len(ids) - size))
            return tok.decode(ids[at : at + size]).strip("\ufffd ")

        context = cut(CONTEXT)
        for j in range(CHOICES):
            pair = (context, " " + cut(CHOICE))
            found.append(Instance("loglikelihood", {}, pair, j))
    return found


def timed(lm, requests: list[Instance]) -> tuple[float, np.ndarray]:
    """Seconds, and the log-likelihoods."""
    begin = time.perf_counter()
    found = lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - begin, np.array([x for x, _ in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=24)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        tok = write_model(Path(folder))
        requests = requests_of(tok, args.items)
        ours = GamayunLM(folder)
        theirs = {
            b: HFLM(folder, dtype="float32", device="cpu", batch_size=b)
            for b in BATCHES
        }
    begin = time.perf_counter()
    timed(ours, requests)
    print(f"first call, with compiling: {time.perf_counter() - begin:.1f} s")
    print(f"{ours.scorer.compilations} programs compiled")
    tried = {}
    for b, lm in theirs.items():
        tried[b] = timed(lm, requests)[0]
        rate = args.items / tried[b]
        print(f"Hugging Face backend, batch {b:3}: {rate:6.1f} items/s", flush=True)
    best = min(tried, key=lambda b: tried[b])
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        a, x = timed(ours, requests)
        b, y = timed(theirs[best], requests)
        times["ours"].append(args.items / a)
        times["theirs"].append(args.items / b)
        print(f"{args.items / a:6.1f} {args.items / b:6.1f} items/s", flush=True)
    print(f"largest difference of a log-likelihood: {abs(x - y).max():.1e}")
    assert abs(x - y).max() < 1e-4
    for name, values in times.items():
        row(name, "items/s", values)
    ratio(f"ours over theirs, at their best batch of {best}", *times.values())


if __name__ == "__main__":
    main()
