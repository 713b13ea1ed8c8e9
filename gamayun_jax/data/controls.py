"""Control arms of a staged run: the same examples, served in another order.

Whether the order of data matters can only be seen between runs that serve exactly the
same examples. Each source is read in one order from one cursor, so two runs serve the
same examples as soon as every source has the same number of them. An arm is the base
config with other stages, of which that is true:

  single    one stage; each source's share is its share of the whole run
  reversed  what the stages serve, the last first
  shuffled  `single` with the sources' turns in a random order of the whole run, each
            at its own place of it: as a real shuffle scatters them
  ramped    shares slide in straight lines from the end of the warm-up to that of the
            run, as steeply as from the first stage's mixture to the last's, or as far
            as no share falls below 0

What arms keep of the base, so that order is all that differs:

  learning rate  The same at every step. Arms have other stages, so the stages'
                 schedules must be one schedule over the run: wsd, one peak, the
                 warm-up of the first stage, a decay in the last stage alone. Anything
                 else is refused: an arm with another learning rate is no control.
  token weights  They say what an example counts, so they go with the stage's content
                 in `reversed`. Where stages are mixed they cannot: the other arms want
                 the same token weights in all stages.
  transitions    They belong to moments of the run. `reversed` has the base's first
                 transition first, and so on. The other arms have the first stage's
                 only, so no later stage may reset Adam's moments. Cursors that restart
                 are refused: examples would come again in another order.
  order          `reversed` keeps that of each stage (`mixture.order`); the other arms
                 have their own. Inside of a stage a ramp is not kept: `reversed` serves
                 a stage's examples evenly, and changes by a step.

Shares are parts of 2**30 and counts within 1 of the integral (curriculum.py), so shares
that only round the wanted counts may miss them by one. They are searched for by the
plan itself, and the counts of the finished arm are compared (`check_counts`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from gamayun_jax.config import Config, MixtureConfig, StageConfig, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.curriculum import ONE, to_fixed_point
from gamayun_jax.data.plan import DataPlan, make_data_plan

Stages = tuple[StageConfig, ...]
Order = Literal["interleaved", "shuffled"]  # of MixtureConfig
TRIES = 48  # plans made in search of a stage's shares
# How much of the steepest slide `ramped` tries: at the steepest a share ends at 0, and
# rounding may ask for less than that.
SLIDES = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)


@dataclasses.dataclass(frozen=True)
class Base:
    """A config and what its plan serves.

    Attributes:
      counts: int64 [K, S]: examples of each source in each stage.
      steps: of each stage.
    """

    cfg: Config
    corpus: Corpus
    plan: DataPlan
    counts: np.ndarray
    steps: tuple[int, ...]

    @property
    def shares(self) -> np.ndarray:
        """float64 [K, S]: of each source among a stage's examples, as realised."""
        return self.counts / self.counts.sum(axis=1, keepdims=True)


def plan_base(cfg: Config, corpus: Corpus) -> Base:
    """The plan of a config that arms are to be made of.

    It is of a run that begins by itself: a first stage's ramp has nothing to begin
    from, and with --init-from it would serve other counts.

    Raises:
      UserError: whatever planning refuses; a stage that restarts data cursors; stages
        whose learning rates are no single schedule.
    """
    for stage in cfg.stages[1:]:
        if stage.transition.cursors == "restart":
            raise UserError(
                f"stages.{stage.name}.transition.cursors=restart: its examples would "
                'come in another order, so no arm can serve the same; set "continue"'
            )
    check_one_schedule(cfg)
    plan = make_data_plan(cfg, corpus)
    return Base(cfg, corpus, plan, stage_counts(plan), tuple(cfg.stage_steps()))


def stage_counts(plan: DataPlan) -> np.ndarray:
    """int64 [K, S]: examples of each source in each stage."""
    return np.stack([b.totals for r in plan.runs for b in r.curriculum.blocks])


def make_arm(arm: str, base: Base) -> Config:
    """The base's config with the stages of an arm, one of `ARMS`.

    Raises:
      UserError: what the arm cannot keep of the base; a source whose count would not
        be the base's.
    """
    stages = with_schedule(arm, base, ARMS[arm](base))
    name = f"{base.cfg.name}-{arm}"
    cfg = dataclasses.replace(base.cfg, name=name, stages=stages)
    # First without the caps on epochs, whose error would hide the reason.
    check_counts(arm, base.plan, make_data_plan(without_caps(cfg), base.corpus))
    return cfg


def check_counts(arm: str, planned: DataPlan, made: DataPlan) -> None:
    """Raise UserError, with source, arm and both counts, unless an arm's plan serves as
    many examples of each source as the base's."""
    wanted, served = (p.served(p.total_steps) for p in (planned, made))
    for source in wanted:
        if wanted[source] != served[source]:
            raise UserError(
                f"arm {arm}: source {source!r} would have {served[source]} examples, "
                f"and has {wanted[source]} in the base: no shares were found that give "
                "all sources their counts; leave the arm out of --arms, or change the "
                "stages' tokens a little"
            )


# --- arms ------------------------------------------------------------------------


def single(base: Base) -> Stages:
    """One stage with a constant mixture."""
    check_alike("single", base)
    total = base.counts.sum(axis=0)
    return (even_stage(base, (), blank(base, "single", sum(base.steps)), total),)


def shuffled(base: Base) -> Stages:
    """One stage with its examples in a random order."""
    check_alike("shuffled", base)
    (stage,) = single(base)
    return (with_order(stage, "shuffled"),)


def reversed_stages(base: Base) -> Stages:
    """The stages' contents in reversed order, each served evenly or shuffled."""
    made: Stages = ()
    contents = zip(base.cfg.stages, base.steps, base.counts, strict=True)
    for content, steps, counts in reversed(list(contents)):
        stage = dataclasses.replace(
            blank(base, content.name, steps),
            token_weights=content.token_weights,
            transition=base.cfg.stages[len(made)].transition,
        )
        even = even_stage(base, made, stage, counts)
        made += (with_order(even, content.mixture.order),)
    return made


def ramped(base: Base) -> Stages:
    """A mixture that slides linearly to the end of the run.

    A ramp begins from a former stage's mixture, so there is one before it: the
    warm-up, at least a step, in which the mixture stands still. A base with one mixture
    throughout has nothing to slide to: `single`.
    """
    check_alike("ramped", base)
    total, change = base.counts.sum(axis=0), base.shares[-1] - base.shares[0]
    if not change.any():
        return single(base)
    warmup = base.cfg.stages[0].schedule.warmup_tokens
    steps = max(1, math.ceil(warmup / base.cfg.tokens_per_step))
    begin, slide = (
        blank(base, "begin", steps),
        blank(base, "slide", sum(base.steps) - steps),
    )
    mixture = MixtureConfig(ramp="linear", ramp_tokens=slide.tokens)
    slide = dataclasses.replace(slide, mixture=mixture)
    # Shares begin this much of `change` below their mean, and end that much above.
    below = slide.tokens / (begin.tokens + slide.tokens) / 2
    mean, slides = total / total.sum(), change != 0
    room = np.abs(change) * np.where(change > 0, below, 1 - below)
    steepest = min(1.0, float((mean[slides] / room[slides]).min()))
    for part in SLIDES:
        first = np.clip(mean - part * steepest * below * change, 0.0, 1.0)
        parts = to_fixed_point(first / first.sum())
        began = with_shares(base, begin, parts)
        left = total - trial_counts(base, (began,))
        last = 2 * left / left.sum() - parts / ONE
        # A source that has run out by then, or would below 0, wants a lesser slide.
        if (last < 0).any():
            continue
        guess = to_fixed_point(last / last.sum())
        made = search_shares(base, (began,), slide, left, guess)
        if made is not None:
            return began, made
    fewest = min((n, s) for n, s in zip(total, base.plan.sources, strict=True) if n)
    raise UserError(
        f"arm ramped: no slide gives all sources their counts (source {fewest[1]!r} "
        f"has only {fewest[0]} examples): leave the arm out of --arms, or lengthen the "
        "stages"
    )


ARMS: dict[str, Callable[[Base], Stages]] = {
    "single": single,
    "shuffled": shuffled,
    "reversed": reversed_stages,
    "ramped": ramped,
}


def blank(base: Base, name: str, steps: int) -> StageConfig:
    """A stage of an arm before it has its mixture and its schedule."""
    first = base.cfg.stages[0]
    return dataclasses.replace(
        first,
        name=name,
        tokens=steps * base.cfg.tokens_per_step,
        mixture=MixtureConfig(),
    )


def with_order(stage: StageConfig, order: Order) -> StageConfig:
    """A stage that serves its examples in this order."""
    mixture = dataclasses.replace(stage.mixture, order=order)
    return dataclasses.replace(stage, mixture=mixture)


def check_alike(arm: str, base: Base) -> None:
    """Raise UserError for what an arm that mixes the stages cannot keep of them."""
    first = base.cfg.stages[0]
    for stage in base.cfg.stages[1:]:
        if stage.token_weights != first.token_weights:
            raise UserError(
                f"arm {arm} mixes the stages, but stages.{stage.name}.token_weights "
                f"are not those of stages.{first.name}: give both the same, or leave "
                "the arm out of --arms"
            )
        if stage.transition.moments == "reset":
            raise UserError(
                f"arm {arm} has no boundary at which stages.{stage.name}.transition."
                'moments could be reset: set "keep", or leave the arm out of --arms'
            )


# --- learning rate ---------------------------------------------------------------


def check_one_schedule(cfg: Config) -> None:
    """Raise UserError, with the field, unless the stages' learning rates are those of
    one wsd schedule over the run. A config of one stage may have any schedule."""
    first = cfg.stages[0].schedule
    for k, stage in enumerate(cfg.stages if len(cfg.stages) > 1 else ()):
        mine, where = stage.schedule, f"stages.{stage.name}.schedule"
        begin, end = (cfg.stage_start(i) * cfg.tokens_per_step for i in (k, k + 1))
        length = end - begin
        # Warm-ups that are over when a stage begins are all alike.
        warm = mine.warmup_tokens if mine.position == "global" or not k else 0
        late = max(warm, first.warmup_tokens) > begin and warm != first.warmup_tokens
        fault = ""
        if mine.kind != "wsd":
            fault = f'kind={mine.kind} ends with its stage: use "wsd"'
        elif mine.peak != first.peak:
            fault = f"peak={mine.peak:g} is not the first stage's {first.peak:g}"
        elif mine.position == "restart" and k and mine.warmup_tokens:
            fault = f"warmup_tokens={mine.warmup_tokens} warms up again: set 0"
        elif late:
            fault = (
                f"warmup_tokens={mine.warmup_tokens} is not the first stage's "
                f"{first.warmup_tokens}, which is not over where this stage begins"
            )
        elif mine.decay_tokens and k < len(cfg.stages) - 1:
            fault = f"decay_tokens={mine.decay_tokens} decays before the run's end"
        elif mine.decay_tokens > length:
            fault = f"decay_tokens={mine.decay_tokens} exceeds the stage's {length}"
        if fault:
            raise UserError(
                f"{where}.{fault}; the stages' schedules must be one over the run "
                "(wsd, one peak, warm-up first, decay last), or arms would have "
                "another learning rate"
            )


def with_schedule(arm: str, base: Base, stages: Stages) -> Stages:
    """An arm's stages with the base's learning rate at every step.

    Raises:
      UserError: the warm-up or the decay is longer than the stage of the arm in which
        it must be.
    """
    if len(base.cfg.stages) == 1:
        return stages  # they have the base's own, from `blank`
    warmup = base.cfg.stages[0].schedule.warmup_tokens
    whole = dataclasses.replace(
        base.cfg.stages[-1].schedule, warmup_tokens=warmup, position="global"
    )
    for what, tokens, stage in (
        ("warms up over the first", warmup, stages[0]),
        ("decays over the last", whole.decay_tokens, stages[-1]),
    ):
        if tokens > stage.tokens:
            raise UserError(
                f"arm {arm}: the learning rate {what} {tokens} tokens, but the arm's "
                f"stage {stage.name!r} there has {stage.tokens}: leave the arm out of "
                "--arms, or shorten that"
            )
    before = dataclasses.replace(whole, decay_tokens=0)
    return (
        *(dataclasses.replace(s, schedule=before) for s in stages[:-1]),
        dataclasses.replace(stages[-1], schedule=whole),
    )


# --- exact shares ----------------------------------------------------------------


def even_stage(
    base: Base, former: Stages, stage: StageConfig, target: np.ndarray
) -> StageConfig:
    """A stage with a constant mixture that serves `target` examples (int64 [S])."""
    examples = int(target.sum())
    guess = to_fixed_point(target / examples)
    if 4 * len(target) * examples < ONE:
        # All but the largest rounded up: their integrals are just above the wanted
        # whole numbers, the largest's is just below, and only that one is due.
        guess = -(-target * ONE // examples)
        guess[np.argmax(target)] += ONE - guess.sum()
    made = search_shares(base, former, stage, target, guess)
    # What was not found is told by `check_counts`, with the counts.
    return made or with_shares(base, stage, guess)


def search_shares(
    base: Base,
    former: Stages,
    stage: StageConfig,
    target: np.ndarray,
    parts: np.ndarray,
) -> StageConfig | None:
    """A stage that serves `target` examples (int64 [S]) after the former stages; None
    if no shares were found. `parts`, int64 [S] over ONE, is where the search begins."""
    parts = parts.copy()
    for k in range(TRIES):
        made = with_shares(base, stage, parts)
        missing = target - trial_counts(base, (*former, made))
        if not missing.any():
            return made
        # A count is off by little: move shares by their smallest step, later by more.
        parts += np.sign(missing) * (1 << (k // 6))
        parts = np.where(target > 0, np.maximum(parts, 1), 0)
        parts[np.argmax(parts)] += ONE - parts.sum()
    return None


def with_shares(base: Base, stage: StageConfig, parts: np.ndarray) -> StageConfig:
    """A stage whose sources have these parts (int64 [S]) of ONE."""
    shares: Mapping[str, float] = {
        name: part / ONE
        for name, part in zip(base.plan.sources, parts.tolist(), strict=True)
        if part
    }
    return dataclasses.replace(
        stage, mixture=dataclasses.replace(stage.mixture, shares=shares)
    )


def trial_counts(base: Base, stages: Stages) -> np.ndarray:
    """int64 [S]: examples of each source that the last of some stages would serve."""
    cfg = without_caps(dataclasses.replace(base.cfg, stages=stages))
    return stage_counts(make_data_plan(cfg, base.corpus))[-1]


def without_caps(cfg: Config) -> Config:
    """The same without bounds on epochs: a count on trial may be one too many."""
    data = dataclasses.replace(cfg.data, max_epochs=math.inf, max_epochs_of={})
    return dataclasses.replace(cfg, data=data)
