"""Embeddings exchanged for another tokenizer: which rows come from where."""

import contextlib
import dataclasses

import imported
import jax
import numpy as np
import pytest
from conftest import mesh_of, small_config

from gamayun_jax import config as c
from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data import tokenizer_training
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.training.compatibility import check_schedules
from gamayun_jax.training.embeddings import exchange, former_abstract, plan_rows

TEXTS = {
    "en": ["the quick brown fox jumps over the lazy dog " * 3, "other thoughts 123"],
    "ru": ["съешь ещё этих мягких французских булок", "да выпей же чаю"],
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Ours, LLaMA-like and Qwen-like tokenizers of different texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    ours = tokenizer_training.train(TEXTS, TokenizerConfig(330), folder / "a.model")
    llama = imported.byte_level(folder / "l", TEXTS["en"], bos=True, size=300)
    qwen = imported.byte_level(folder / "q", TEXTS["ru"], bos=False, size=310)
    return {"ours": ours, "llama": HFTokenizer(llama), "qwen": HFTokenizer(qwen)}


@pytest.mark.parametrize("old", ["ours", "llama", "qwen"])
@pytest.mark.parametrize("new", ["ours", "llama", "qwen"])
@pytest.mark.parametrize("pieces", [True, False])
def test_rows_spell_what_they_stand_for(three, old, new, pieces):
    old, new = three[old], three[new]
    size = new.vocab_size + 5
    rows = plan_rows(old, new, size, pieces)
    assert sum(rows.counts.values()) == size
    sources = [
        ids[w > 0].tolist() for ids, w in zip(rows.ids, rows.weights, strict=True)
    ]
    for i, ids in enumerate(sources):
        np.testing.assert_allclose(rows.weights[i].sum(), bool(ids), rtol=1e-6)
        if i >= new.vocab_size:
            assert not ids
            continue
        piece = new.spell([i])
        if piece and (ids or pieces):
            assert old.spell(ids) == piece
            if len(ids) > 1:  # as the old one writes it, where it is a text
                with contextlib.suppress(UnicodeDecodeError):
                    assert old.encode(piece.decode()) == ids
        elif piece:
            assert piece not in {old.spell([k]) for k in range(old.vocab_size)}
    ends = (new.boundaries.end, old.boundaries.end)
    starts = (new.boundaries.start, old.boundaries.start)
    for a, b in (ends, starts) if starts[0] != ends[0] else (ends,):
        assert sources[a] == [b]
    if old is new:
        assert sources == [[i] for i in range(new.vocab_size)] + [[]] * 5
        assert rows.counts == {"kept": new.vocab_size, "pieces": 0, "mean": 5}


@pytest.mark.parametrize("tied", [True, False])
def test_tables_by_hand_on_any_devices(three, tied):
    old, new = three["llama"], three["ours"]
    model = dataclasses.replace(
        small_config(".").model, vocab_size=old.vocab_size + 4, tie_embeddings=tied
    )
    target = dataclasses.replace(model, vocab_size=336)
    rng = np.random.default_rng(0)
    former = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype("f4"), abstract_params(model)
    )
    rows = plan_rows(old, new, target.vocab_size, True)
    made = []
    for sizes in ((1, 1, 1), (1, 4, 2)):
        mesh = mesh_of(sizes)
        abstract = sharding.place_abstract(abstract_params(target), mesh)
        where = former_abstract(abstract, model)  # 304 rows on 8 devices
        placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), former, where)
        found = exchange(placed, rows, abstract)
        for x, a in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
            assert x.sharding == a.sharding
        made.append(jax.tree.map(np.asarray, found))
    for name, table in made[0].items():
        if name not in ("embedding", "unembedding"):
            jax.tree.map(np.testing.assert_array_equal, table, former[name])
            continue
        mean = former[name][: old.vocab_size].mean(0)
        for i in range(target.vocab_size):
            ids = rows.ids[i][rows.weights[i] > 0]
            expected = former[name][ids].mean(0) if len(ids) else mean
            np.testing.assert_allclose(table[i], expected, atol=1e-6)
            if len(ids) == 1:
                np.testing.assert_array_equal(table[i], former[name][ids[0]])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), made[0], made[1]
    )


def test_only_where_a_run_begins(config):
    stages = config.stages
    late = dataclasses.replace(
        stages[1], transition=c.TransitionConfig(embeddings="mean")
    )
    cfg = dataclasses.replace(config, stages=(stages[0], late))
    with pytest.raises(UserError, match=r"stages.enrich.transition.embeddings='mean'"):
        check_schedules(cfg)
