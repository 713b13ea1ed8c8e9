"""Tokenizers as imported models have them, made here with the `tokenizers` library."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as t

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def byte_level(
    folder: Path, texts: Iterable[str], *, bos: bool, size: int = 400, **own: object
) -> Path:
    """A folder with a byte-level BPE: LLaMA-3's, which writes BOS, or Qwen's."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = t.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, BEGIN, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, tok.token_to_id(BEGIN))]
        )
    tok.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "bos_token": BEGIN if bos else None,
        **own,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
