"""Configs of other lengths: the same run, shorter to be tried or longer to be good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gamayun_jax.config import Config, OptimizerConfig, StageConfig, UserError

RECORDS = 20  # most checkpoints, evaluations and log lines of a shortened run, each


def check_config(cfg: object) -> None:
    """Raise UserError for what is no config, such as its name."""
    if not isinstance(cfg, Config):
        raise UserError(
            f"{cfg!r} is no config: gx.load_config(...) reads one by its name or file"
        )


def shorten(cfg: Config, steps: int = 100) -> Config:
    """The same config with so many steps, to try it before it costs anything.

    All that is a length follows: stages keep their proportion, ramps, warm-ups, decays
    and the average's time constant theirs, in whole steps; checkpoints, evaluations and
    log lines are as often as before, but at most 20. Shares stay: the cap of a `unimax`
    mixture shrinks with its stage. The model, the batch and the data are not touched.

    Example:
      >>> short = gx.shorten(cfg, steps=10)
      >>> short.stage_steps(), cfg.stage_steps()
      ([5, 5], [7, 6])

    Args:
      cfg: returned as it is where it has no more steps than that.
      steps: of all stages together.

    Raises:
      UserError: fewer steps than stages.
    """
    check_config(cfg)
    if not isinstance(steps, int):
        raise UserError(f"steps={steps!r} is no whole number")
    if steps < len(cfg.stages):
        raise UserError(
            f"steps={steps} is less than one for each of {len(cfg.stages)} stages"
        )
    if cfg.total_steps <= steps:
        return cfg
    ratio, unit = steps / cfg.total_steps, cfg.tokens_per_step
    least = max(1, steps // RECORDS)

    def tokens(n: int) -> int:
        return max(1, round(n * ratio / unit)) * unit if n else 0

    def every(n: int) -> int:
        return max(least, round(n * ratio)) if n else 0

    def shorter(stage: StageConfig, steps: int) -> StageConfig:
        new = steps * unit

        def part(n: int) -> int:  # of this stage, which may be all of it
            return new if n >= stage.tokens else min(new, tokens(n))

        mixture, schedule = stage.mixture, stage.schedule
        return replace(
            stage,
            tokens=new,
            mixture=replace(
                mixture,
                ramp_tokens=part(mixture.ramp_tokens),
                max_epochs=mixture.max_epochs * new / stage.tokens,
            ),
            schedule=replace(
                schedule,
                warmup_tokens=tokens(schedule.warmup_tokens),
                decay_tokens=part(schedule.decay_tokens),
            ),
        )

    kept, evaluation = cfg.checkpoint, cfg.evaluation
    saved = every(kept.every_steps)
    return replace(
        cfg,
        stages=tuple(map(shorter, cfg.stages, apportion(steps, cfg.stage_steps()))),
        optimizer=resized(cfg, tokens),
        checkpoint=replace(
            kept,
            every_steps=saved,
            keep_every_steps=saved * (kept.keep_every_steps // kept.every_steps),
            keep_every_tokens=tokens(kept.keep_every_tokens),
        ),
        evaluation=replace(
            evaluation,
            every_steps=every(evaluation.every_steps),
            tasks_every_steps=every(evaluation.tasks_every_steps),
        ),
        log=replace(cfg.log, every_steps=every(cfg.log.every_steps)),
    )


def resized(cfg: Config, length: Callable[[int], int]) -> OptimizerConfig:
    """The optimiser with its lengths in tokens changed by `length`."""
    o = cfg.optimizer
    return replace(
        o,
        ema_tokens=length(o.ema_tokens),
        batch_warmup_tokens=length(o.batch_warmup_tokens),
    )


def apportion(total: int, sizes: list[int]) -> list[int]:
    """Whole numbers of at least 1 in proportion to the sizes, `total` in all."""
    ideal = [total * n / sum(sizes) for n in sizes]
    parts = [max(1, int(x)) for x in ideal]
    while (lack := total - sum(parts)) != 0:
        sign = 1 if lack > 0 else -1
        can = [i for i, n in enumerate(parts) if n + sign >= 1]
        parts[max(can, key=lambda i: sign * (ideal[i] - parts[i]))] += sign
    return parts


def lengthen(cfg: Config, factor: float) -> Config:
    """The same config with every length in tokens, and the epochs, multiplied."""

    def longer(n: int) -> int:
        return round(n * factor)

    stages = [
        replace(
            s,
            tokens=longer(s.tokens),
            mixture=replace(s.mixture, ramp_tokens=longer(s.mixture.ramp_tokens)),
            schedule=replace(
                s.schedule,
                warmup_tokens=longer(s.schedule.warmup_tokens),
                decay_tokens=longer(s.schedule.decay_tokens),
            ),
        )
        for s in cfg.stages
    ]
    return replace(
        cfg,
        stages=tuple(stages),
        data=replace(cfg.data, max_epochs=cfg.data.max_epochs * factor),
        optimizer=resized(cfg, longer),
    )
