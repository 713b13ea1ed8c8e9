"""The tokenizer loses nothing, is the same every time, and says what is wrong."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data import fertility
from gamayun_jax.data import tokenizer_training as training
from gamayun_jax.data.tokenizer import TextCoder, Tokenizer

TEXTS = {
    "en": ["The quick brown fox jumps over 13 lazy dogs.\n\tdef f(x):\n        pass"]
    * 9,
    "ru": ["Съешь же ещё этих мягких французских булок, да выпей чаю."] * 9,
    "zh": ["天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。"] * 9,
}
NASTY = (
    "",
    " ",
    "  two  spaces  and   three   ",
    "\n\n\t\t\n leading and trailing \n",
    "a\r\nb\rc",
    "\0\0x\0",
    "▁a▁▁b ▁ c▁",
    " ▁",
    "<s></s><unk><pad><0x0A><0xE2><0x96><0x81>",
    "👩‍👩‍👧‍👦🏳️‍🌈 é é \u200b\ufeff\u00ad ⁇ ▅ \ufffd \U0010ffff",
    "العربية עברית हिन्दी ไทย ಕನ್ನಡ mixed кириллица 混合",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return training.train(TEXTS, TokenizerConfig(340), out)


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}
    assert not special & set(ids)


def scalar_text(**kwargs):
    return st.text(st.characters(exclude_categories=["Cs"]), **kwargs)


@settings(max_examples=300, deadline=None)
@given(st.one_of(scalar_text(), st.text("a b▁\n\t\r\0<s>é\u0301日🎉‍", max_size=30)))
@example("".join(NASTY))
def test_any_text_comes_back(trained, text):
    check_lossless(trained, text)


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_come_back(trained, text):
    check_lossless(trained, text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab ▁\n日", max_size=8), max_size=5))
def test_batch_is_one_by_one(trained, texts):
    assert trained.encode_batch(texts) == [trained.encode(t) for t in texts]


def test_every_byte_and_every_plane(trained):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 97)]))
    check_lossless(trained, text)


def test_pieces(trained):
    ids = (trained.pad_id, trained.bos_id, trained.eos_id, trained.unk_id)
    assert ids == (0, 1, 2, 3)
    assert trained.vocab_size == len(trained.pieces) == 340
    lengths = trained.byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (340,)
    assert lengths[:4].tolist() == [0] * 4
    assert trained.decode([1, *trained.encode("a\nb"), 2, 0, 0]) == "a\nb"
    assert trained.encode("\n\t") == [
        trained.pieces.index("\n"),
        trained.pieces.index("\t"),
    ]
    # Digits stay alone, and runs of spaces are learnt.
    assert len(trained.encode("2024")) == 4
    assert len(trained.encode("        ")) < 8
    assert all(len(p) == 1 or not set(p) & {"\n", "\t"} for p in trained.pieces)


def test_pickle_and_save(trained, tmp_path):
    other = pickle.loads(pickle.dumps(trained))
    assert other.encode("Привет, 世界") == trained.encode("Привет, 世界")
    assert other.fingerprint == trained.fingerprint
    trained.save(tmp_path / "deep" / "copy.model")
    assert Tokenizer(tmp_path / "deep" / "copy.model").model == trained.model
    assert Tokenizer(trained.model).fingerprint == trained.fingerprint
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["copy.model"]


def test_training_twice_gives_the_same_bytes(trained, tmp_path):
    again = training.train(TEXTS, TokenizerConfig(340), tmp_path / "b.model")
    assert again.model == trained.model == (tmp_path / "b.model").read_bytes()


def test_space_is_a_piece_without_spaces_in_the_text(tmp_path):
    texts = {"zh": ["天地玄黄宇宙洪荒" * 5]}
    check_lossless(
        training.train(texts, TokenizerConfig(272), tmp_path / "m"), "a b ▁ c"
    )


def test_control_pieces_in_the_training_text(tmp_path):
    texts = {"en": ["<s> <0x0A> </s> <unk> <pad><s><s> a▅b c\0d ▁▁ ⁇  x"] * 50}
    model = training.train(texts, TokenizerConfig(277), tmp_path / "m")
    for text in NASTY:
        check_lossless(model, text)


def test_long_and_unbroken_text_is_used(tmp_path):
    """No sentence is skipped: a word that occurs only in a huge line is learnt."""
    text = {"en": ["x" * 300_000 + " " + "hippopotamus " * 20_000]}
    model = training.train(text, TokenizerConfig(290), tmp_path / "m")
    assert model.encode(" hippopotamus") == [model.pieces.index("▁hippopotamus")]


@given(scalar_text(max_size=50), st.integers(1, 7))
def test_cut_sentence(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "MAX_SENTENCE", size)
        parts = list(training.cut_sentence(text))
    assert "".join(parts) == text
    assert all(len(p) <= size for p in parts)


@given(st.lists(scalar_text(max_size=20), max_size=6), st.integers(0, 60))
def test_take_bytes(texts, budget):
    taken, size = training.take_bytes(texts, budget)
    assert size == sum(len(t.encode()) for t in taken)
    assert "".join(texts).startswith("".join(taken))
    whole = sum(len(t.encode()) for t in texts)
    assert min(budget, whole) - 3 <= size <= budget


def test_shares_decide_what_is_learnt(tmp_path):
    texts = {
        "en": ["alpha beta gamma delta "] * 99,
        "de": ["eins zwei drei vier "] * 99,
    }
    size = {}
    for share in (0.0, 1.0):
        cfg = TokenizerConfig(285, {"en": 1 - share, "de": share})
        model = training.train(texts, cfg, tmp_path / "m")
        size[share] = len(model.encode(texts["de"][0]))
    assert size[1.0] < size[0.0]
    assert training.shares_of(TokenizerConfig(9), ["a", "b"]) == {"a": 0.5, "b": 0.5}


def test_too_large_a_vocabulary_names_one_that_works(tmp_path):
    with pytest.raises(UserError, match="at most") as error:
        training.train(TEXTS, TokenizerConfig(5000), tmp_path / "m")
    assert "\n" not in str(error.value)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert training.train(TEXTS, TokenizerConfig(largest), tmp_path / "m")


@pytest.mark.parametrize(
    ("texts", "cfg", "says"),
    [
        (TEXTS, TokenizerConfig(100), "too small"),
        ({"en": []}, TokenizerConfig(300), "no text"),
        ({"en": ["", "\n"]}, TokenizerConfig(300), "no text"),
        (TEXTS, TokenizerConfig(300, {"en": 1.0}), "lacks 'ru'"),
        ({"en": ["a"]}, TokenizerConfig(300, {"en": 1, "xx": 1}), "names 'xx'"),
        ({"en": ["a"]}, TokenizerConfig(300, {"en": 0.0}), "are all 0"),
    ],
)
def test_bad_training_input(texts, cfg, says, tmp_path):
    with pytest.raises(UserError, match=says):
        training.train(texts, cfg, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damaged_models_are_refused(trained, tmp_path):
    model = trained.model
    for end in (0, 1, 100, *range(500, len(model), 997), len(model) - 1):
        with pytest.raises(UserError, match="tokenizer train"):
            Tokenizer(model[:end])
    (tmp_path / "text.model").write_text("not a model\n" * 100)
    for path in (tmp_path / "text.model", tmp_path / "missing.model", tmp_path):
        with pytest.raises(UserError, match=path.name):
            Tokenizer(path)


def test_a_model_that_loses_text_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS["en"] + TEXTS["ru"]),
        model_prefix=str(tmp_path / "lossy"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="give back every text"):
        Tokenizer(tmp_path / "lossy.model")


def test_bad_ids_and_surrogates(trained):
    for i in (-1, trained.vocab_size):
        with pytest.raises(UserError, match="outside"):
            trained.decode([i])
    for text in ("a\ud800", "▁\udfff"):
        with pytest.raises(UserError, match="Unicode"):
            trained.encode(text)
    half = trained.encode("\u20ac")[:-1]
    assert trained.decode(half) in ("\ufffd", "")


def test_report(trained):
    rows = fertility.report(trained, TEXTS)
    assert [r["language"] for r in rows] == list(TEXTS)
    for row in rows:
        assert row["bytes"] == sum(len(t.encode()) for t in TEXTS[row["language"]])
        assert row["bytes_per_token"] * row["tokens"] == pytest.approx(row["bytes"])
    assert rows[2]["bytes_per_token"] > rows[2]["characters_per_token"]
    table = fertility.format_report(rows).splitlines()
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    assert fertility.report(trained, {"en": []})[0]["tokens"] == 0
    euro = fertility.report(trained, {"en": ["\u20ac\u20ac"]})[0]
    assert (euro["tokens"], euro["byte_pieces"]) == (6, 1.0)


def test_uneven_costs_by_hand():
    assert fertility.gini([3, 3, 3]) == 0
    assert fertility.gini([0, 0, 0, 1]) == pytest.approx(3 / 4)
    costs = [1.0, 2.0, 7.0]  # |differences| 1, 6, 5, each twice, over 2 n^2 mean
    assert fertility.gini(costs) == pytest.approx(24 / (2 * 9 * 10 / 3))
    assert fertility.gini([10 * x for x in costs]) == fertility.gini(costs)


def test_a_tokenizer_with_a_method_missing_cannot_be_made():
    """It is said when it is made, not when a corpus of hours needs the method."""

    class Half(TextCoder):
        def encode_batch(self, texts):
            return [[0] for _ in texts]

    with pytest.raises(TypeError, match="encode_prompt"):
        Half()
