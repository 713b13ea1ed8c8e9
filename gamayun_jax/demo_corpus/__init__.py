"""The embedded corpus: real text in 12 languages. See NOTICE.md and manifest.json.

train/<language>.<domain>.jsonl.zst   documents to train on, one JSON object a line
heldout/<language>.jsonl.zst          12-way parallel paragraphs of software help
heldout/udhr.<language>.jsonl.zst     12-way parallel clauses on human rights

`python -m recipes.demo_data.debian sample OUT --work DIR` makes these files.
"""

from __future__ import annotations

from pathlib import Path

from gamayun_jax.config import UserError

FOLDER: Path = Path(__file__).parent
LANGUAGES: tuple[str, ...] = (
    *("en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr"),
)
HELDOUT = ("help", "udhr")


def train_files() -> dict[str, Path]:
    """Source name such as "ru/help" or "en/hq" -> its file of documents."""
    names = {
        path.name.removesuffix(".jsonl.zst").replace(".", "/"): path
        for path in sorted((FOLDER / "train").glob("*.jsonl.zst"))
    }
    return dict(sorted(names.items(), key=lambda item: LANGUAGES.index(item[0][:2])))


def heldout_files(name: str = "help") -> dict[str, Path]:
    """Language -> its file of parallel units of the held-out set `name`.

    Raises:
      UserError: `name` is not one of HELDOUT.
    """
    if name not in HELDOUT:
        raise UserError(f"held-out set {name!r}: choose one of {', '.join(HELDOUT)}")
    prefix = "" if name == "help" else f"{name}."
    return {
        language: FOLDER / "heldout" / f"{prefix}{language}.jsonl.zst"
        for language in LANGUAGES
    }
