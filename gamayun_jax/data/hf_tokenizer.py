"""Tokenizers of Hugging Face folders, read through the `tokenizers` library.

`HFTokenizer` reads any tokenizer.json, so that corpora, evaluation and generation are
made with it as with our own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gamayun_jax.config import UserError
from gamayun_jax.data import files
from gamayun_jax.data.tokenizer import SPACE, Boundaries, TextCoder
from gamayun_jax.storage import as_path

# What a Hugging Face folder keeps of its tokenizer; copied as they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE writes bytes (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in kept]
    shifted = {chr(256 + i): b for i, b in enumerate(rest)}
    return {chr(b): b for b in kept} | shifted


KINDS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")  # of named tokens
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",  # a text
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
# What ends a turn of a chat, not a document; and what ends documents of such models.
TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"}
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Tokens that a class of transformers 5 has where the folder names none.
CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk", "bos", "eos"), END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("unk", "eos", "pad"), END_OF_TEXT),
}


def tokenizer_class(settings: Mapping[str, Mapping[str, Any]], text: str) -> str:
    """The class of transformers 5 that `AutoTokenizer` takes; "" for a plain one."""
    config = settings.get("config.json", {})
    own = settings.get("tokenizer_config.json", {})
    name = own.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name = str(name).removesuffix("Fast")
    kind = config.get("model_type")
    if kind == "qwen2" or (kind == "qwen3" and not name):
        return "Qwen2Tokenizer"  # whatever a qwen2 folder names
    if name == "LlamaTokenizer" and '"ByteLevel"' in text:
        return ""
    return name if name in CLASS_TOKENS else ""


def as_built(data: dict[str, Any], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json as the class builds it, which reads vocabulary, merges, added
    tokens and post-processor of the file and knows the rest by itself."""
    model = data.get("model") or {}
    if not name or model.get("type", "BPE") != "BPE":
        return data
    prefix = own.get("add_prefix_space")
    flags = dict(fuse_unk=False, byte_fallback=False, unk_token=None)
    normalizer: Any = None
    words: Any = {"type": "ByteLevel", "add_prefix_space": bool(prefix)}
    words |= {"trim_offsets": True, "use_regex": name == "GPT2Tokenizer"}
    if name == "Qwen2Tokenizer":
        normalizer = {"type": "NFC"}
        split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}}
        split |= {"behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [split, words]}
    elif name == "LlamaTokenizer":
        scheme = "always" if own.get("legacy", False) else "first"
        scheme = "never" if prefix is False else scheme
        words = {"type": "Metaspace", "replacement": SPACE, "split": False}
        words |= {"prepend_scheme": scheme}
        flags |= dict(fuse_unk=True, byte_fallback=True)
    flags |= dict(dropout=None, ignore_merges=False)
    flags |= dict(continuing_subword_prefix=None, end_of_word_suffix=None)
    return {
        **data,
        "normalizer": normalizer,
        "pre_tokenizer": words,
        "model": {**model, **flags},
    }


def added_token(value: Any, special: bool = True) -> AddedToken:
    """A token as settings write it: its text, or an object with its properties."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(
        **{"special": special} | {k: value[k] for k in keys if k in value}
    )


class HFTokenizer(TextCoder):
    """The tokenizer of a Hugging Face folder. Picklable.

    `encode_prompt` gives the ids of `AutoTokenizer(folder)(text)`. What it writes
    before a text is what tokenizer.json's post-processor writes (`prefix_ids`): as in
    transformers 5, `add_bos_token` has no say beside it, nor has a `bos_token` that
    is only named. `bos_id` is None where there is no token of that name (Qwen).
    `start_id` serves as context of a text's first token: what is written before it,
    else BOS, else the end-of-text token, which parts documents there.

    Raises:
      UserError: no or a broken tokenizer.json, or a kind whose bytes are unknown.
    """

    def __init__(self, folder: str | Path):
        folder = as_path(folder)
        path = folder / "tokenizer.json"
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeError) as e:
            raise UserError(
                f"{path} cannot be read ({getattr(e, 'strerror', e)}): give a folder "
                "with a tokenizer.json"
            ) from e
        settings: dict[str, Any] = {}
        for name in SETTINGS:
            if (folder / name).is_file():
                read = files.read_json if name.endswith(".json") else files.read_text
                settings[name] = read(folder / name)
        self.__setstate__((str(path), text, settings))

    def __getstate__(self) -> tuple[str, str, dict[str, Any]]:
        return self._source

    def __setstate__(self, source: tuple[str, str, dict[str, Any]]) -> None:
        self._source = source
        where, text, settings = source
        self.folder = as_path(where).parent
        own = settings.get("tokenizer_config.json", {})
        self._class = tokenizer_class(settings, text)
        try:
            data = json.loads(text)
            data = as_built(data, self._class, own)
            self._tok = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as e:  # the library raises Exception itself
            raise UserError(f"{where} is not a tokenizer ({e}): copy it again") from e
        self._tok.no_padding()
        self._tok.no_truncation()
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        try:
            named = self._add_tokens(settings)
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise UserError(
                f"{self.folder}: the settings of its tokenizer have a value of a kind "
                f"that they cannot have ({e}): copy it again"
            ) from e
        # A text that spells a control token is text, as in SentencePiece.
        self._tok.encode_special_tokens = True
        self._split = bool(own.get("split_special_tokens"))
        self._find_control_ids(settings, named, where)
        self._spelled = self._spell(data, where)
        added = self._tok.get_added_tokens_decoder().values()
        self.control_texts = tuple(token.content for token in added if token.special)

    def _add_tokens(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Add what the settings name and tokenizer.json lacks; the named tokens."""
        own = settings.get("tokenizer_config.json", {})
        named: dict[str, Any] = dict(CLASS_TOKENS.get(self._class, {}))
        tokens = {int(i): t for i, t in own.get("added_tokens_decoder", {}).items()}
        sources = [own]
        if "added_tokens_decoder" not in own:  # older folders have files instead
            sources.append(settings.get("special_tokens_map.json", {}))
            for text, i in settings.get("added_tokens.json", {}).items():
                tokens[i] = {"content": text, "special": False}
        extra: list[Any] = []
        for source in sources:
            named |= {k: source[f"{k}_token"] for k in KINDS if f"{k}_token" in source}
            for key in ("extra_special_tokens", "additional_special_tokens"):
                found = source.get(key) or ()
                extra += found.values() if isinstance(found, Mapping) else found
            extra += [
                v
                for k, v in source.items()
                if k.endswith("_token") and k[:-6] not in KINDS and isinstance(v, str)
            ]
        named = {k: v for k, v in named.items() if v is not None}
        wanted = [added_token(tokens[i], False) for i in sorted(tokens)]
        special = [added_token(v) for v in (*named.values(), *extra)]
        if "added_tokens_decoder" not in own:
            texts = {t.content for t in special}
            wanted = [t for t in wanted if t.content not in texts]
        same = {repr(t) for t in self._tok.get_added_tokens_decoder().values()}
        self._tok.add_tokens([t for t in wanted if repr(t) not in same])
        self.vocab_size = 1 + max(self._tok.get_vocab().values(), default=-1)
        known = {t.content for t in self._tok.get_added_tokens_decoder().values()}
        # May get ids beyond the model's table: they spell nothing and count for none.
        self._tok.add_tokens([t for t in special if t.content not in known])
        return {k: added_token(v).content for k, v in named.items()}

    def _find_control_ids(
        self, settings: Mapping[str, Any], named: Mapping[str, str], where: str
    ) -> None:
        def find(kind: str) -> list[int]:
            number = self._tok.token_to_id(named[kind]) if kind in named else None
            ids = [] if number is None else [number]
            for name in ("generation_config.json", "config.json"):
                value = settings.get(name, {}).get(f"{kind}_token_id")
                values = value if isinstance(value, list) else [value]
                if any(type(i) is not int for i in values if i is not None):
                    raise UserError(
                        f"{self.folder / name}: {kind}_token_id={value!r} is neither "
                        "an id nor a list of ids: correct it"
                    )
                ids += [i for i in values if i is not None]
            known = dict.fromkeys(ids)
            return [i for i in known if 0 <= i < self.vocab_size]

        ends = find("eos")
        if not ends:
            raise UserError(f"{where}: its folder names no end-of-text token")
        told = "bos" in named or "tokenizer_config.json" not in settings
        begins = find("bos")
        written = self._tok.encode("a").special_tokens_mask
        count = next((n for n, x in enumerate(written) if not x), len(written))
        self.prefix_ids = tuple(self._tok.encode("a").ids[:count])
        self.eos_id = ends[0]
        self.stop_ids = tuple(ends)
        # config.json may name a BOS that the tokenizer knows nothing of (Qwen).
        self.bos_id = begins[0] if begins and told else None
        if self.prefix_ids:
            self.bos_id = self.prefix_ids[0]
        self.start_id = (*self.prefix_ids[-1:], *begins, *ends)[0]
        self.pad_id = (find("pad") or ends)[0]
        self.boundaries = self._find_boundaries()

    def _find_boundaries(self) -> Boundaries:
        """BOS where it is written before a text, and what ends a document: EOS, or the
        end-of-text token of a model whose EOS ends a turn of a chat."""
        end, special = self.eos_id, self._tok.get_added_tokens_decoder()
        if end in special and special[end].content in TURN_ENDS:
            numbers = {t.content: i for i, t in special.items() if t.special}
            end = next((numbers[t] for t in DOCUMENT_ENDS if t in numbers), end)
            if not self.prefix_ids and end != self.eos_id:
                self.start_id = end  # a BOS of such a model begins a turn
        return Boundaries((*self.prefix_ids, end)[0], end, end)

    def _spell(self, data: dict[str, Any], where: str) -> list[bytes]:
        """The bytes that each id spells; none for control tokens and unused ids."""
        steps = data.get("decoder") or {}
        kinds = {d.get("type") for d in (steps, *steps.get("decoders", ()))}
        spelled = [b""] * self.vocab_size
        alphabet = byte_alphabet()
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise UserError(
                f"{where}: bytes of its tokens are unknown (its decoder is neither "
                "byte-level nor with byte fallback)"
            )
        for token, i in self._tok.get_vocab(with_added_tokens=False).items():
            if "ByteLevel" in kinds:
                spelled[i] = bytes(alphabet[c] for c in token if c in alphabet)
            elif len(token) == 6 and token.startswith("<0x") and token[5] == ">":
                spelled[i] = bytes([int(token[3:5], 16)])
            else:
                spelled[i] = token.replace(SPACE, " ").encode()
        for i, added in self._tok.get_added_tokens_decoder().items():
            if i < self.vocab_size:
                spelled[i] = b"" if added.special else added.content.encode()
        return spelled

    def encode_prompt(self, text: str, literal: bool = False) -> list[int]:
        """The ids of `AutoTokenizer(folder)(text)`.

        Control tokens in the text are read as such unless the folder says otherwise
        (split_special_tokens), or they are to be text (`literal`).

        Raises:
          UserError: a text with lone surrogates, which has no bytes.
        """
        self._tok.encode_special_tokens = literal or self._split
        try:
            return self._tok.encode(text).ids
        except (UnicodeError, TypeError) as e:
            raise UserError(f"a prompt is not valid Unicode: {e}") from e
        finally:
            self._tok.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            found = self._tok.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeError, TypeError) as e:
            raise UserError(f"a text to tokenise is not valid Unicode: {e}") from e
        return [x.ids for x in found]

    def token_text(self, i: int) -> str:
        """How the vocabulary writes an id, such as "<|endoftext|>"; "" for none."""
        return self._tok.id_to_token(i) or ""

    def write(self, folder: Path) -> None:
        for name, text in self.contents().items():
            files.write_text(folder / name, text)

    def contents(self) -> dict[str, str]:
        """Name -> text of the files that `write` writes."""
        _, text, settings = self._source
        config = settings.get("config.json", {})
        kept = {k: v for k, v in settings.items() if k != "config.json"}
        if self._class:  # which the model's architecture may have decided
            own = kept.get("tokenizer_config.json", {})
            kept["tokenizer_config.json"] = {**own, "tokenizer_class": self._class}
        names = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
        ids = {k: config[k] for k in names if config.get(k) is not None}
        kept["generation_config.json"] = {
            **ids,
            **kept.get("generation_config.json", {}),
        }
        return {"tokenizer.json": text} | {
            name: values if isinstance(values, str) else files.json_text(values)
            for name, values in sorted(kept.items())
        }
