"""LLaMA-3.2-1B continued as continue_qwen3.py does it with Qwen3: 100B tokens.

    gamayun corpus build experiments/continue_llama.py --out corpus-llama
    gamayun train experiments/continue_llama.py --workdir continued-llama \\
        --init-from models/Llama-3.2-1B                  (on every host)

Hardware: a TPU pod slice; not run: the config was loaded, its curriculum planned and
its parameters counted.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.model import presets


def get_config() -> c.Config:
    other = c.load_config(Path(__file__).with_name("continue_qwen3.py"))
    tokenizer = c.TokenizerConfig(model="models/Llama-3.2-1B")
    return dataclasses.replace(
        other,
        name="continue-llama",
        model=presets.llama3p2_1b(),
        corpus=dataclasses.replace(other.corpus, tokenizer=tokenizer),
        data=dataclasses.replace(other.data, corpus="corpus-llama"),
    )
