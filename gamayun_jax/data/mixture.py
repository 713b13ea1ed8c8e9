"""Mixtures: which share of a stage's tokens each source has."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from gamayun_jax.config import StageConfig, UserError
from gamayun_jax.data.curriculum import near


def stage_shares(
    stage: StageConfig, tokens: Mapping[str, int], rest_of: str = "languages"
) -> dict[str, float]:
    """Shares per source of a stage; `tokens`: source -> size of the source."""
    mix = stage.mixture
    rule = (mix.scheme, mix.shares, mix.alpha, mix.max_epochs, stage.tokens, rest_of)
    try:
        return mixture_shares(tokens, *rule)
    except UserError as e:
        raise UserError(f"stages.{stage.name}.mixture: {e}") from e


def mixture_shares(
    sizes: Mapping[str, int],
    scheme: str,
    shares: Mapping[str, float],
    alpha: float,
    max_epochs: float,
    budget: int,
    rest_of: str = "languages",
) -> dict[str, float]:
    """Share of the tokens per source; sums to 1.

    Args:
      sizes: tokens per source "<language>/<domain>".
      scheme: how the languages that `shares` does not name divide the rest: natural
        (by size n), temperature (n ** alpha), unimax (uniform, at most `max_epochs` of
        a language; arXiv 2304.09151, algorithm 1), explicit (no rest).
      shares: source or glob -> exact share, divided among its sources by size. An
        exact name goes before a glob. A language that one of them begins with
        ("en/web", "en/*") has what they give it and nothing of the rest; "*/web" names
        no language.
      budget: tokens of the phase, for unimax.
      rest_of: "sources": as former releases did, the sources that no key matches take
        part in the rest, whether their language is named or not.

    Raises:
      UserError: a pattern that matches nothing, two globs that match one source, shares
        beyond 1, a rest that nobody may take.
    """
    owner = owners(sizes, shares)
    given = sum(shares.values())
    rest = 1.0 - given
    if rest < -1e-6:
        raise UserError(f"shares sum to {given:.9g}, which is more than 1")
    result = dict.fromkeys(sizes, 0.0)
    for pattern, share in shares.items():
        mine = {n: sizes[n] for n in sizes if owner.get(n) == pattern}
        total = sum(mine.values())
        if share > 0 and not total:
            raise UserError(f"shares: {pattern!r} has share {share:g} but no tokens")
        for name, size in mine.items():
            result[name] = share * size / total if total else 0.0
    if rest <= 1e-6:
        return {n: v / given for n, v in result.items()}
    if scheme == "explicit":
        raise UserError(
            f"shares sum to {given:.6g}: with scheme 'explicit' they must sum to 1"
        )
    left_out = unnamed_sources(sizes, shares) if rest_of == "languages" else {}
    without = {n for names in left_out.values() for n in names}
    free = {n: k for n, k in sizes.items() if k and n not in owner and n not in without}
    languages: dict[str, int] = {}
    for name, size in free.items():
        language = name.split("/")[0]
        languages[language] = languages.get(language, 0) + size
    if not languages:
        also = f"; give a share to {', '.join(sorted(without))}" if without else ""
        raise UserError(
            f"shares sum to {given:.6g} and no other language is left for the rest"
            f"{also}"
        )
    if scheme == "unimax":
        portions = unimax(languages, max_epochs, budget * rest)
    else:
        power = alpha if scheme == "temperature" else 1.0
        most = max(languages.values())  # relative, or a large alpha overflows
        portions = {k: (n / most) ** power for k, n in languages.items()}
    total_portion = sum(portions.values())
    for name, size in free.items():
        language = name.split("/")[0]
        of_language = rest * portions[language] / total_portion
        result[name] = of_language * size / languages[language]
    return result


def owners(sizes: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, str]:
    """Source -> the key of `shares` that gives it its share; UserError as
    `mixture_shares`."""
    owner: dict[str, str] = {}
    for pattern in shares:
        matched = [n for n in sizes if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            raise UserError(
                f"shares: {pattern!r} matches no source{near(pattern, sizes)}"
            )
        for name in matched:
            if name == pattern or name not in owner:
                owner[name] = pattern
            elif owner[name] != name:
                raise UserError(
                    f"shares: {owner[name]!r} and {pattern!r} both match {name!r}; "
                    "make one of them narrower"
                )
    return owner


def unnamed_sources(
    sizes: Mapping[str, int], shares: Mapping[str, float]
) -> dict[str, list[str]]:
    """Language that `shares` names -> its sources with text that no key matches."""
    owner = owners(sizes, shares)
    named = {key.split("/")[0] for key in shares}
    unnamed: dict[str, list[str]] = {}
    for name, size in sizes.items():
        language = name.split("/")[0]
        if size and language in named and name not in owner:
            unnamed.setdefault(language, []).append(name)
    return unnamed


def unimax(
    sizes: Mapping[str, int], max_epochs: float, budget: float
) -> dict[str, float]:
    """Tokens per language: uniform, at most `max_epochs` (2304.09151, alg. 1)."""
    taken: dict[str, float] = {}
    left = budget
    for k, (name, size) in enumerate(sorted(sizes.items(), key=lambda kv: kv[1])):
        taken[name] = min(left / (len(sizes) - k), max_epochs * size)
        left -= taken[name]
    if left > 1e-6 * budget:
        raise UserError(
            f"unimax: all languages together have {sum(taken.values()):.3g} tokens at "
            f"{max_epochs:g} epochs, but the stage wants {budget:.3g}: raise "
            "mixture.max_epochs, shorten the stage, or add text"
        )
    return {name: taken[name] for name in sizes}
