"""A published model, SmolLM2-135M-Instruct, as `transformers` has it.

Skipped without the packages that recipes/smollm2.py names.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from recipes.smollm2 import PACKAGE, write_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers have their own
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

from test_continue import held_texts
from test_hf import assert_close, ours, theirs

from gamayun_jax import config as c
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.demo_corpus import LANGUAGES
from gamayun_jax.inference.generator import Generator
from gamayun_jax.inference.sampling import Sampling
from gamayun_jax.interop.load_model import load_params

LACKING = [n for n in (PACKAGE, "gguf", "accelerate") if not find_spec(n)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(bool(LACKING), reason=f"without {', '.join(LACKING)}"),
]
EXPERIMENT = Path(__file__).parents[2] / "experiments" / "continue_smollm2.py"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the model and the tokenizer here, both there)."""
    folder = tmp_path_factory.mktemp("published")
    write_folder(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return load_params(folder), HFTokenizer(folder), model.eval(), tokenizer


def test_ids_and_logits(published):
    loaded, mine, model, tokenizer = published
    texts = list(held_texts(LANGUAGES))
    assert len(texts) == 600
    for text in texts:
        assert mine.encode(text) == tokenizer.encode(text)
    ids = np.array([tokenizer.encode(" ".join(texts))[:256]], np.int32)
    assert_close(ours(loaded.cfg.model, loaded.params, ids), theirs(model, ids), 1e-4)
    # The experiment that continues it has its shape.
    assert loaded.cfg.model == c.load_config(EXPERIMENT).model


def test_greedy_text(published):
    loaded, mine, model, tokenizer = published
    generator = Generator(loaded.cfg.model, loaded.params, loaded.mesh, mine)
    prompts = ["The capital of France is", "Ankara", "Все люди рождаются"]
    found = generator.generate(prompts, 24, Sampling(temperature=0.0), stop_ids=[-1])
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=-1)
        assert text == tokenizer.decode(made[0, ids.shape[1] :])
