"""Which of the scanned documents stay: no held-out ones, each text once, and for
`parallel_documents="disjoint"` each id in one language.

Documents with the same id in two languages are taken for translations of each other. An
id stays in one of its languages, by chances that leave each language about the same
share of its text. The choice is a weighted rendezvous hash (Thaler and Ravishankar
1998; Schindelhauer and Schomaker 2005).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gamayun_jax.config import CorpusConfig, UserError


@dataclass
class Scanned:
    """A scanned input file, and which of its documents stay."""

    source: str
    folder: Path
    digest: np.ndarray  # S16[N]
    bytes: np.ndarray  # int64[N]
    characters: np.ndarray  # int64[N]
    chunk: np.ndarray  # int64[N]
    keep: np.ndarray  # bool[N]
    duplicates: int = 0
    translations: int = 0  # left out, since their ids stay in another language


def select(
    cfg: CorpusConfig, scanned: Sequence[tuple[str, Path]]
) -> tuple[list[Scanned], int]:
    """Of equal documents in the whole corpus, keep the first; drop held-out ones, and
    keep each id in one language if the config says so.

    Returns:
      the files, and how many ids were in several languages (0 unless that was asked).

    Raises:
      UserError: no id is in several languages, where each was to be kept in one.
    """
    files = []
    for source, folder in scanned:
        with np.load(folder / "docs.npz") as docs:
            columns = {k: docs[k] for k in ("digest", "bytes", "characters", "chunk")}
            keep = ~docs["held"]
        files.append(Scanned(source, folder, **columns, keep=keep))
    digests = np.concatenate([np.zeros(0, "S16"), *(f.digest for f in files)])
    # The index of the first document that is equal to each one.
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first = first[inverse]
    begin = 0
    for file in files:
        end = begin + len(file.keep)
        repeated = file.keep & (first[begin:end] != np.arange(begin, end))
        file.keep &= ~repeated
        file.duplicates = int(repeated.sum())
        begin = end
    if cfg.parallel_documents == "keep":
        return files, 0
    return files, disjoin(files, cfg.disjoint_seed)


def disjoin(files: Sequence[Scanned], seed: int) -> int:
    """Keep each id in one language; returns how many were in several.

    Raises:
      UserError: none was.
    """
    names = sorted({f.source for f in files})
    ids, source, sizes = [], [], []
    for file in files:
        with np.load(file.folder / "docs.npz") as docs:
            ids.append(docs["id"][file.keep])
        source.append(np.full(len(ids[-1]), names.index(file.source)))
        sizes.append(file.bytes[file.keep])
    stays, shared = keep_one_language(
        np.concatenate(ids), np.concatenate(source), np.concatenate(sizes), names, seed
    )
    if not shared:
        raise UserError(
            'corpus.parallel_documents="disjoint": no document has the id of one in '
            "another language; name the field that translations share (id_field of "
            'corpus.sources), or set "keep"'
        )
    begin = 0
    for file in files:
        kept = np.flatnonzero(file.keep)
        gone = kept[~stays[begin : begin + len(kept)]]
        file.keep[gone] = False
        file.translations = len(gone)
        begin += len(kept)
    return shared


def keep_one_language(
    ids: np.ndarray,
    source: np.ndarray,
    sizes: np.ndarray,
    names: Sequence[str],
    seed: int,
) -> tuple[np.ndarray, int]:
    """Which documents stay, so that no id is in two languages.

    Args:
      ids: S16[N], digests of the documents' ids; empty: without one, it stays.
      source: int[N], of each document, index into `names`.
      sizes: int[N], bytes of each document.
      names: sources, as <language>/<domain>.

    Returns:
      bool[N], and the number of ids that were in several languages.
    """
    known = [name.split("/")[0] for name in names]
    languages = sorted(set(known))
    language = np.array([languages.index(k) for k in known], int)[source]
    # Pairs of an id and a language that it is in.
    has_id = np.flatnonzero(ids != b"")
    _, which = np.unique(ids[has_id], return_inverse=True)
    pairs, first, pair_of = np.unique(
        which * len(languages) + language[has_id],
        return_index=True,
        return_inverse=True,
    )
    group, of = np.divmod(pairs, len(languages))
    several = np.bincount(group)[group] > 1 if len(group) else np.zeros(0, bool)
    stays = np.ones(len(ids), bool)
    if not several.any():
        return stays, 0
    # Of languages with several sources, only those count that share ids.
    sharing = np.unique(source[has_id[several[pair_of]]])
    counts = np.isin(source, sharing)
    totals = np.bincount(language[counts], sizes[counts], len(languages))
    weights = np.bincount(pair_of, sizes[has_id], len(pairs))
    rates = balanced_rates(group[several], of[several], weights[several], totals)
    heads = np.frombuffer(ids[has_id][first].astype("S16").tobytes(), "<u8")[::2]
    keys = np.array([language_key(name, seed) for name in languages], np.uint64)
    uniform = (mixed(heads ^ keys[of]) >> np.uint64(11)).astype(np.float64)
    # Of exponential times with these rates, the soonest has the id.
    time = -np.log((uniform + 0.5) / 2.0**53) / rates[of]
    order = np.lexsort((of, time, group))
    wins = np.zeros(len(pairs), bool)
    wins[order[np.unique(group[order], return_index=True)[1]]] = True
    stays[has_id] = wins[pair_of]
    return stays, len(np.unique(group[several]))


def balanced_rates(
    group: np.ndarray, of: np.ndarray, weights: np.ndarray, totals: np.ndarray
) -> np.ndarray:
    """Rates of languages, float64 [G], such that all keep about the same share of their
    text, where an id stays in one of its languages with a chance by their rates.

    Args:
      group, of: int[P], id and language of each pair.
      weights: [P], bytes of the language's documents with that id.
      totals: [G], bytes of the languages, in documents that have such ids or not.
    """
    _, group = np.unique(group, return_inverse=True)
    log_rates = np.zeros(len(totals))
    shared = np.bincount(of, weights, len(totals))
    for _ in range(100):
        rates = np.exp(log_rates)
        chance = rates[of] / np.bincount(group, rates[of])[group]
        kept = np.bincount(of, weights * chance, len(totals))
        left = totals - shared + kept
        missing = totals * left.sum() / totals.sum() - left
        change = np.clip(missing / np.maximum(kept, 1.0), -1.0, 1.0)
        log_rates += np.where(shared > 0, change, 0.0)
        log_rates -= log_rates.mean()
    return np.exp(log_rates)


def language_key(name: str, seed: int) -> int:
    """A number of 64 bits that stands for a language and the seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64 [n], every bit of each depending on all of its bits (SplitMix64, Steele et
    al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
