"""Corpora made with an imported model's tokenizer: documents, bytes, batches."""

import dataclasses
import json
import shutil

import imported
import numpy as np
import pytest
import small_corpora
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import TokenizerConfig, UserError, from_json, to_json
from gamayun_jax.data import build_jobs
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.hf_tokenizer import HFTokenizer
from gamayun_jax.data.inspect_corpus import inspect, verify
from gamayun_jax.data.loader import make_batch
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.data.tokenizer import Boundaries
from gamayun_jax.evaluate.heldout import unigram_bits

KINDS = ("llama", "qwen")


def with_tokenizer(cfg, folder, **fields):
    spec = TokenizerConfig(model=str(folder), **fields)
    return dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, tokenizer=spec)
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(config, its corpus, folder of the tokenizer) by a tokenizer with or without
    BOS."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = small_corpora.three_sources(folder)
    words = [" ".join(map(str, range(i, 3 * i))) + " a few words" for i in range(60)]
    imported.byte_level(folder / "hf", words, bos=request.param == "llama")
    cfg = with_tokenizer(cfg, folder / "hf")
    return cfg, small_corpora.build(cfg, folder / "out"), folder


def test_documents_come_back(made):
    cfg, corpus, folder = made
    verify(corpus)
    t = corpus.tokenizer()
    assert isinstance(t, HFTokenizer)
    assert corpus.manifest["tokenizer"] == {
        "fingerprint": HFTokenizer(folder / "hf").fingerprint,
        "vocab_size": t.vocab_size,
    }
    ours = dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, tokenizer=TokenizerConfig(400))
    )
    other = small_corpora.build(ours, folder / "ours")
    for name, source in corpus.sources.items():
        found = small_corpora.documents_of(corpus, name)
        assert found == small_corpora.documents_of(other, name)
        assert sum(len(x.encode()) for x in found) == source.bytes
        counts = corpus.token_counts(name)
        assert counts[t.boundaries.end] == len(found) + (t.bos_id is None) * len(
            source.shards
        )
        assert corpus.text_tokens(name) == sum(len(t.encode(x)) for x in found)
    assert "bytes/token" in inspect(corpus.folder)
    for bits in unigram_bits(corpus).values():
        assert np.exp2(-bits).sum() == pytest.approx(1)
    model = dataclasses.replace(cfg.model, vocab_size=t.vocab_size + 8)
    weighted = dataclasses.replace(cfg, model=model)
    build_token_weights(weighted, corpus, dict.fromkeys(cfg.languages, 1.0), 0)


def test_workers_and_copies_make_the_same_bytes(made, tmp_path):
    cfg, corpus, _ = made
    again = small_corpora.build(cfg, tmp_path / "again", workers=2)
    # The tokenizer as a corpus or an import keeps it is the same one.
    kept = with_tokenizer(cfg, corpus.folder)
    copy = small_corpora.build(kept, tmp_path / "copy")
    for path in sorted(corpus.folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            name = path.relative_to(corpus.folder)
            for other in (again, copy):
                assert (other.folder / name).read_bytes() == path.read_bytes(), name


def test_a_build_goes_on_and_refuses_another_tokenizer(made, tmp_path, monkeypatch):
    cfg, corpus, folder = made
    left = [2]

    def fail(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return tokenise(*args)

    tokenise = build_jobs.tokenise
    with monkeypatch.context() as patch:
        patch.setattr("gamayun_jax.data.build.tokenise", fail)
        with pytest.raises(KeyboardInterrupt):
            small_corpora.build(cfg, tmp_path / "out")
    shutil.copytree(folder / "hf", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|im_end|>"
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="another recipe"):
        small_corpora.build(with_tokenizer(cfg, tmp_path / "hf"), tmp_path / "out")
    done = small_corpora.build(cfg, tmp_path / "out")
    assert done.manifest == corpus.manifest
    (tmp_path / "out" / "tokenizer.json").write_text(
        (folder / "hf" / "tokenizer.json").read_text() + "\n"
    )
    with pytest.raises(UserError, match="is not the one"):
        open_corpus(tmp_path / "out").tokenizer()


def test_documents_that_spell_control_tokens_are_counted(made, tmp_path):
    """They are text, and whoever takes chats for a corpus is told so."""
    cfg, corpus, _ = made
    assert not any("control_texts" in s for s in corpus.manifest["sources"].values())
    chat = tmp_path / "chat.jsonl"
    texts = [f"<|im_end|> {n} a chat of some length, <|im_end|>" for n in range(7)]
    texts += [f"no chat of some length, but <| {n}" for n in range(5)]
    chat.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    first, name = cfg.corpus.sources[0], f"{cfg.corpus.sources[0].language}/chat"
    source = dataclasses.replace(first, name=name, files=(str(chat),))
    more = dataclasses.replace(cfg.corpus, sources=(*cfg.corpus.sources, source))
    found = small_corpora.build(dataclasses.replace(cfg, corpus=more), tmp_path / "out")
    assert found.manifest["sources"][name]["control_texts"] == {"<|im_end|>": 7}
    assert f"{name}: of 12 documents some spell" in inspect(found.folder)
    assert "<|im_end|> (7)" in inspect(found.folder)


def test_control_texts_are_found_fast(made):
    """Many that begin in several ways, in text that is full of how they begin."""
    texts = ["<unk>", "<s>", "</s>", "[INST]", "", "[/INST]"]
    texts += [f"<SPECIAL_{n}>" for n in range(1000)]
    found = build_jobs.any_of(texts)
    assert set(found.findall("a <s>[INST] b<SPECIAL_7><SPECIAL_77></SPECIAL_7>")) == {
        "<s>", "[INST]", "<SPECIAL_7>", "<SPECIAL_77>"
    }  # fmt: skip
    assert not build_jobs.any_of(()).pattern


def test_refuses_what_cannot_part_documents(made, tmp_path):
    cfg, _, folder = made
    bad = tmp_path / "hf"
    shutil.copytree(folder / "hf", bad)
    data = json.loads((bad / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = False
    (bad / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="is read as that token"):
        small_corpora.build(with_tokenizer(cfg, bad), tmp_path / "out")
    with pytest.raises(UserError, match=r"vocab_size=7: .*leave it out"):
        small_corpora.build(
            with_tokenizer(cfg, folder / "hf", vocab_size=7), tmp_path / "out"
        )
    with pytest.raises(UserError, match=r"vocab_size=0"):
        TokenizerConfig()
    again = with_tokenizer(cfg, folder / "hf")
    assert from_json(to_json(again)) == again


def test_a_turn_s_end_does_not_end_documents(tmp_path):
    texts = ["a b c"]
    plain = imported.byte_level(tmp_path / "a", texts, bos=False)
    chat = imported.byte_level(tmp_path / "b", texts, bos=True, eos_token="<|im_end|>")
    end = HFTokenizer(plain).eos_id
    assert HFTokenizer(plain).boundaries == (end, end, end)
    assert HFTokenizer(chat).eos_id != end
    turns = imported.byte_level(
        tmp_path / "c", texts, bos=False, eos_token="<|im_end|>", bos_token="<|im_end|>"
    )
    assert HFTokenizer(turns).start_id == HFTokenizer(turns).boundaries.start == end
    begin = HFTokenizer(chat).bos_id
    assert HFTokenizer(chat).boundaries == (begin, end, end)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(5, 9), min_size=1, max_size=7), min_size=1),
    st.sampled_from([Boundaries(1, 2, 0), Boundaries(1, 2, 2), Boundaries(2, 2, 2)]),
    st.integers(2, 6),
)
def test_every_token_of_a_document_is_a_target_in_its_own_segment(
    documents, marks, length
):
    """Whatever parts documents: of the stream cut into rows, each token but a BOS
    counts once, after the tokens of its own document only."""
    shared = marks.start == marks.end
    stream = [marks.start] if shared else []
    owner = [0] if shared else []  # the document that a token as an input belongs to
    for number, ids in enumerate(documents):
        stream += [*([] if shared else [marks.start]), *ids, marks.end]
        owner += [number] * (len(ids) + 1 + (not shared))
        if shared:  # the end is the start of the next
            owner[-1] += 1
    rows = -(-(len(stream) - 1) // length)
    padded = np.full(rows * length + 1, marks.pad, np.int32)
    padded[: len(stream)] = stream
    tokens = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length]
    batch = make_batch(tokens, np.zeros(rows, np.int32), marks)
    flat = {k: v.reshape(-1) for k, v in batch.items()}
    wanted = [
        i + 1 < len(stream) and (shared or stream[i + 1] != marks.start)
        for i in range(rows * length)
    ]
    np.testing.assert_array_equal(flat["loss_mask"], wanted)
    for i in np.flatnonzero(flat["loss_mask"]).tolist():
        begin = i - i % length
        seen = [
            j
            for j in range(begin, i + 1)
            if flat["segment_ids"][j] == flat["segment_ids"][i] > 0
        ]
        of_document = [j for j in range(begin, i + 1) if owner[j] == owner[i]]
        assert seen == of_document
        assert flat["positions"][i] == len(seen) - 1
    record = padded[:]
    assert marks.tokens(record) == len(stream) - 1
    assert marks.documents(record) == len(documents)
