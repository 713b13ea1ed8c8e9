"""A trained model in llama.cpp, by its own converter: the same ids, logits and text.

LLAMA_CPP names its source folder, which has convert_hf_to_gguf.py, and the package
llama-cpp-python must be importable; skipped without them.
"""

import ctypes
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from gamayun_jax import train
from gamayun_jax.config import ComputeConfig
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.evaluate import heldout
from gamayun_jax.inference.generator import Generator
from gamayun_jax.interop import huggingface, load_model
from gamayun_jax.model import transformer as model_module

SOURCE = os.environ.get("LLAMA_CPP")
if not SOURCE:
    pytest.skip("LLAMA_CPP names no source folder", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package has its own
    llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SPACE_KEY = b"tokenizer.ggml.add_space_prefix"
ADVERSARIAL = [
    " ", "   a  b   ", "\n\n\t \n", "a\nb\tc", "\0\x01\x7f", "<s></s><unk><pad>",
    "<0x41><0x0A>", "e\u0301 \u00e9", "\U0001f468\u200d\U0001f469", "日本語のテキスト",
    "0123456789", "aaaaaaaaaaaaaaaaa", "abababababa" * 3,
    "\ufeff\u200b\u2047\u2585\ufffd", "Ғ҉҈\u0300\u0301", "\r\n\r\n", " " * 33 + "x",
]  # fmt: skip


def rewrite(old, new, ftype, copy):
    """What `llama-quantize --override-kv` does: the space before texts is written."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.only_copy, params.nthread = ftype, copy, 1
    change = (llama_cpp.llama_model_kv_override * 2)()
    change[0].key = SPACE_KEY
    change[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL
    change[0].value.val_bool = False
    params.kv_overrides = change
    paths = (str(p).encode() for p in (old, new))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) == 0


@pytest.fixture(scope="module")
def both(config, tmp_path_factory):
    """(our config, parameters, tokenizer, llama.cpp in float32 and in Q8_0)."""
    folder = tmp_path_factory.mktemp("llama")
    assert train.train(config, folder / "run") == 0
    cfg, params, meta, _ = load_model.load_params(folder / "run")
    tokenizer = open_tokenizer(folder / "run", meta.tokenizer, cfg.data.corpus)
    huggingface.export_hf(folder / "run", folder / "out")
    command = [sys.executable, f"{SOURCE}/convert_hf_to_gguf.py", folder / "out"]
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}/gguf-py"}
    command += ["--outtype", "f32", "--outfile", folder / "f32.gguf"]
    subprocess.run(command, check=True, env=environment)
    rewrite(folder / "f32.gguf", folder / "copy.gguf", 0, copy=True)
    q8 = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    rewrite(folder / "f32.gguf", folder / "q8.gguf", q8, copy=False)
    opened = [
        # Caches in float32, as ours.
        llama_cpp.Llama(
            str(folder / name), n_ctx=64, verbose=False, logits_all=True, type_k=0,
            type_v=0,
        )
        for name in ("copy.gguf", "q8.gguf")
    ]  # fmt: skip
    yield cfg.model, jax.device_get(params), tokenizer, opened
    for llama in opened:
        llama.close()


def test_the_same_ids(both, corpus):
    _, _, tokenizer, (llama, _) = both
    texts = list(ADVERSARIAL)
    for language in ("en", "ru", "tr"):
        texts += [text for _, text in corpus.heldout("udhr", language)]
    for text in texts:
        found = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer.encode(text), text
    # Known: U+2581 itself is a space to llama.cpp, as to SentencePiece.
    assert tokenizer.encode("\u2581") != llama.tokenize("\u2581".encode(), False)


def test_the_same_logits(both):
    cfg, params, tokenizer, (exact, small) = both
    ids = [tokenizer.bos_id, *tokenizer.encode("Все люди рождаются свободными")][:40]
    tokens_BT = np.array([ids], np.int32)
    positions_BT = np.arange(len(ids), dtype=np.int32)[None]
    x_BTD = model_module.Transformer(cfg, ComputeConfig(dtype="float32")).apply(
        {"params": params}, tokens_BT, positions_BT, np.ones_like(tokens_BT)
    )
    expected = np.asarray(model_module.logits(params, x_BTD))[0]
    for llama, tolerance in ((exact, 1e-4), (small, 0.05)):
        llama.reset()
        llama.eval(ids)
        error = np.abs(np.array(llama.scores[: len(ids)]) - expected).max()
        assert error <= tolerance * np.abs(expected).max()


def test_the_same_greedy_text(both):
    cfg, params, tokenizer, (llama, _) = both
    mesh = heldout.sharding.make_mesh(heldout.MeshConfig(), jax.devices()[:1])
    compute = ComputeConfig(dtype="float32")
    generator = Generator(cfg, params, mesh, tokenizer, compute)
    for prompt in ("Все люди", "Everyone has the right", "Herkes"):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        (expected,) = generator.generate_ids([ids], 24)
        llama.reset()
        made = []
        for token in llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            if token in tokenizer.stop_ids or len(made) == 24:
                break
            made.append(token)
        assert made == expected
