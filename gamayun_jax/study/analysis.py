"""How differences of arms are judged: the rules that a registration freezes.

A run's outcome is a mean over held-out sets of a mean over languages of bits per byte;
two arms are compared seed by seed. `RULES` says how, in words and numbers, and is part
of the registration's hash. findings.py applies it to a whole study.

Shape suffixes: R resamples, S seeds, L languages, U units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from gamayun_jax.config import UserError
from gamayun_jax.evaluate.paired import LEVEL, Estimate, by_t, holm, sign_test
from gamayun_jax.study.design import Outcome

RESAMPLES, RANDOM_SEED, POWER = 2000, 20261101, 0.8
RULES: dict[str, Any] = {
    "version": 1,
    "outcome": "mean over held-out sets of the mean over languages of bits per byte "
    "(sum of bits over sum of bytes of a language's units), at the end of training",
    "difference": "outcome of arm `better` minus outcome of arm `than`, by seed, over "
    "the seeds that both arms finished; the estimate is the mean over seeds",
    "interval": "95 %, by Student's t of n - 1 degrees of freedom, n seeds, of the "
    "standard error of a multiway (pigeonhole) bootstrap that resamples seeds, "
    "languages and units together, units of one id in all languages at once, times "
    "sqrt(n / (n - 1)); an outcome of one language keeps its language",
    "resamples": RESAMPLES,
    "random_seed": RANDOM_SEED,
    "p": "two-sided paired t test of the differences by seed. The exact "
    "sign-flip test stands beside it and decides nothing: with fewer than 6 seeds it "
    "cannot fall below 5 %",
    "multiplicity": "Holm over all registered hypotheses",
    "level": LEVEL,
    "verdict": "supported: adjusted p at most the level and the interval below 0; "
    "contradicted: the same with the interval above 0; else not decided",
    "power": POWER,
    "smallest_effect": "(t(1 - level / 2) + t(power)) * sd / sqrt(n), t of n - 1 "
    "degrees of freedom, sd of the differences by seed",
    "excluded": "a diverged run is named and its pair left out; an arm whose runs "
    "served other examples than registered is named and left out; no verdict before "
    "all registered runs are there",
}
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "not decided"

Record = Mapping[str, Any]  # of a finished run (records.py)
Units = Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]  # set -> language


@dataclass(frozen=True)
class Difference:
    """What one arm's outcome differs by from another's, over n shared seeds.

    Attributes:
      estimate: value below 0: the first arm is better; its interval is that of the
        rules, its p the paired t test's. Without two seeds neither is known.
      signs: p of the exact sign-flip test; None: not known.
      sd: standard deviation of the differences by seed.
      smallest: effect that has a verdict, before Holm's correction, with the rules'
        power: the t test's, or what an interval as wide as this one leaves.
      by_seed: seed -> difference.
    """

    estimate: Estimate
    signs: float | None
    sd: float | None
    smallest: float | None
    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        """Seeds that both arms finished."""
        return len(self.by_seed)


def languages_of(
    outcome: Outcome, sets: Mapping[str, Mapping[str, Any]], name: str
) -> list[str]:
    """The languages of a held-out set that an outcome is the mean of, in its order."""
    return outcome.languages_of(list(sets[name]))


def outcome_of(sets: Mapping[str, Mapping[str, float]], outcome: Outcome) -> float:
    """An outcome in bits per byte.

    Args:
      sets: held-out set -> language -> bits per byte.
    """
    means = [
        np.mean([sets[name][k] for k in languages_of(outcome, sets, name)])
        for name in outcome.sets
    ]
    return float(np.mean(means))


class Resampled:
    """Bits per byte of runs on held-out sets whose units are drawn again.

    Units of one id are drawn together in all languages, and the same for all runs.

    Args:
      units: set -> language -> {"ids", "bytes"} (records.read_units).
    """

    def __init__(self, units: Units, resamples: int = RESAMPLES):
        self.units, self.resamples = units, resamples
        self._drawn: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        self._kept: dict[tuple[str, int, str], np.ndarray] = {}

    def _draws(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Language -> how often each of its units is drawn, float64 [R, U], and the
        bytes that are drawn, [R]."""
        if name not in self._drawn:
            of_set, drawn = self.units[name], {}
            ids = list(dict.fromkeys(i for of in of_set.values() for i in of["ids"]))
            rng = np.random.default_rng([RANDOM_SEED, sorted(self.units).index(name)])
            share = [1 / len(ids)] * len(ids)
            counts_RU = rng.multinomial(len(ids), share, self.resamples) * 1.0
            columns = {key: i for i, key in enumerate(ids)}
            for language, of in of_set.items():
                own_RU = counts_RU
                if list(of["ids"]) != ids:
                    own_RU = counts_RU[:, [columns[i] for i in of["ids"]]]
                drawn[language] = own_RU, own_RU @ np.array(of["bytes"], np.float64)
            self._drawn[name] = drawn
        return self._drawn[name]

    def of(self, record: Record, name: str) -> np.ndarray:
        """A run's bits per byte on a set, float64 [R, L] in the set's languages.

        Raises:
          UserError: the record has other units than the set.
        """
        key = record["arm"], record["seed"], name
        if key not in self._kept:
            ratios = []
            for language, (drawn_RU, bytes_R) in self._draws(name).items():
                bits = np.array(record["bits"][name][language], np.float64)
                sizes = self.units[name][language]["bytes"]
                if len(bits) != len(sizes):
                    raise UserError(
                        f"the record of arm {key[0]}, seed {key[1]} has {len(bits)} "
                        f"units of {language} in held-out set {name!r}, and units.json "
                        f"{len(sizes)}: take both from one place"
                    )
                whole = bits.sum() / sum(sizes)  # where no unit was drawn
                found = drawn_RU @ bits / np.maximum(bytes_R, 1)
                ratios.append(np.where(bytes_R > 0, found, whole))
            self._kept[key] = np.stack(ratios, -1)
        return self._kept[key]

    def difference_error(
        self, pairs: Sequence[tuple[Record, Record]], outcome: Outcome
    ) -> float:
        """Standard error of the mean difference of pairs of runs: the interval's rule.

        Args:
          pairs: two runs of one seed each; at least two.
        """
        n, rng = len(pairs), np.random.default_rng(RANDOM_SEED)
        seeds_RS = rng.multinomial(n, [1 / n] * n, self.resamples) / n
        shown = {s: languages_of(outcome, self.units, s) for s in outcome.sets}
        order = list(dict.fromkeys(itertools.chain(*shown.values())))
        weights_RL: np.ndarray = np.ones((self.resamples, 1))
        if len(order) > 1:
            share = [1 / len(order)] * len(order)
            weights_RL = rng.multinomial(len(order), share, self.resamples) * 1.0
        means = []
        for name, languages in shown.items():
            known = list(self.units[name])
            columns = [known.index(k) for k in languages]
            weight_RL = weights_RL[:, [order.index(k) for k in languages]]
            none = weight_RL.sum(-1, keepdims=True) == 0  # of this set was drawn
            weight_RL[none[:, 0]] = 1.0
            sums_RL = np.zeros_like(weight_RL)
            for s, (a, b) in enumerate(pairs):
                change_RL = (self.of(a, name) - self.of(b, name))[:, columns]
                sums_RL += seeds_RS[:, s, None] * change_RL
            means.append((weight_RL * sums_RL).sum(-1) / weight_RL.sum(-1))
        return float(np.mean(means, 0).std(ddof=1)) * math.sqrt(n / (n - 1))


def difference(
    by_seed: Mapping[int, float], error: Callable[[], float] | None = None
) -> Difference:
    """The rules on differences by seed.

    Args:
      error: standard error of their mean, of the interval; default: over seeds alone.
    """
    values_S = np.array(list(by_seed.values()), np.float64)
    n = len(values_S)
    value = float(values_S.mean()) if n else math.nan
    if n < 2:
        return Difference(Estimate(value, items=n), None, None, None, by_seed)
    sd = float(values_S.std(ddof=1))
    low, high, p = by_t(value, sd / math.sqrt(n), n - 1)
    smallest = smallest_effect(sd, n)
    if error is not None:
        low, high, _ = by_t(value, error(), n - 1)
        needed = float(special.stdtrit(n - 1, POWER)) * sd / math.sqrt(n)
        smallest = max(smallest, (high - low) / 2 + needed)
    found = Estimate(value, low, high, p, n)
    return Difference(found, sign_test(values_S), sd, smallest, by_seed)


def paired_difference(
    pairs: Mapping[int, tuple[Record, Record]], outcome: Outcome, resampled: Resampled
) -> Difference:
    """What the first runs' outcome differs by from the second ones', seed by seed."""
    by_seed = {
        seed: outcome_of(a["sets"], outcome) - outcome_of(b["sets"], outcome)
        for seed, (a, b) in pairs.items()
    }
    return difference(
        by_seed, lambda: resampled.difference_error(list(pairs.values()), outcome)
    )


def smallest_effect(sd: float, n: int) -> float:
    """Difference that the t test over n seeds shows at the 5 % level with 80 % power.

    Args:
      sd: standard deviation over seeds of the paired differences.
    """
    t = special.stdtrit(n - 1, 1 - LEVEL / 2) + special.stdtrit(n - 1, POWER)
    return float(t) * sd / math.sqrt(n)


def verdicts(found: Sequence[Difference]) -> list[tuple[float, str]]:
    """(p adjusted over all, verdict) of each registered hypothesis."""
    told = []
    for d, p in zip(found, holm([d.estimate.p for d in found]), strict=True):
        low, high = d.estimate.low, d.estimate.high
        verdict = UNDECIDED
        if low is not None and high is not None and p <= LEVEL:
            verdict = SUPPORTED if high < 0 else CONTRADICTED if low > 0 else UNDECIDED
        told.append((p, verdict))
    return told
