"""What a stage of training is, and its optimiser: the part of a config that says how
a model is trained on what the corpus holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gamayun_jax.fields import (
    Count,
    Decay,
    Finite,
    Part,
    Positive,
    Share,
    UserError,
    Whole,
)


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of tokens per source in a stage.

    `shares` maps a source name or a glob ("en/*") to its exact share. A language that
    is named there has exactly what is named: its other sources get nothing. The rest
    is divided among the other languages by `scheme`: natural (by size), temperature
    (size ** alpha), unimax (uniform, at most `max_epochs` of a language,
    arXiv 2304.09151), or explicit (there is no rest).
    """

    # How what is not named is divided.
    scheme: Literal["natural", "temperature", "unimax", "explicit"] = "explicit"
    # Source or glob -> share of tokens.
    shares: Mapping[str, Share] = field(default_factory=dict)
    alpha: Share = 0.3  # temperature only
    max_epochs: Positive = 4.0  # unimax only
    # How the former stage's shares leave.
    ramp: Literal["step", "linear", "cosine"] = "step"
    ramp_tokens: Whole = 0  # that it takes
    # interleaved: each block by the shares; shuffled: at random places of the stage.
    order: Literal["interleaved", "shuffled"] = "interleaved"


@dataclass(frozen=True)
class TokenWeightConfig:
    """Weights of target tokens in the loss.

    none; static (`weights`: language -> factor); bytes (a token weighs the bytes
    it spells); parity (bytes, over those that the language takes to say the same in
    the corpus's parallel held-out sets, so that content counts and not how a script is
    coded); target_share (`weights`: language -> share of the objective, while
    sampling follows the mixture; they are made to sum to 1, and it is said where they
    do not). Normalised to mean 1 under the mixture.
    """

    # See above.
    scheme: Literal["none", "static", "bytes", "parity", "target_share"] = "none"
    weights: Mapping[str, Share] = field(default_factory=dict)  # by language

    def check_languages(self, languages: Sequence[str], where: str) -> None:
        """Raise UserError unless the weights are of these languages, and of all of
        them where the scheme needs it."""
        if unknown := sorted(set(self.weights) - set(languages)):
            raise UserError(
                f"{where}.weights names {unknown[0]!r}, which is not in languages "
                f"({', '.join(languages)})"
            )
        missing = sorted(set(languages) - set(self.weights))
        if missing and self.scheme in ("static", "target_share"):
            raise UserError(
                f"{where}.weights lacks {missing[0]!r}: scheme {self.scheme!r} needs a "
                "number for every language"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of tokens.

    `position`: "global" counts tokens from the start of the whole history, the runs
    before --init-from included; "restart" from the start of this stage. The decay ends
    where the stage ends.
    """

    kind: Literal["wsd", "cosine"] = "wsd"  # warmup-stable-decay
    peak: Finite = 3e-4  # highest learning rate
    warmup_tokens: Whole = 0  # from 0 to the peak
    decay_tokens: Whole = 0  # wsd only: length of the final decay
    decay_shape: Literal["linear", "1-sqrt"] = "linear"  # wsd only
    floor: Part = 0.0  # final learning rate as a fraction of the peak
    position: Literal["global", "restart"] = "global"  # where tokens are counted from


@dataclass(frozen=True)
class TransitionConfig:
    """What happens to the former stage's state when a stage begins."""

    moments: Literal["keep", "reset"] = "keep"  # Adam's running moments
    cursors: Literal["continue", "restart"] = "continue"  # data position per source
    # Of a run's first stage, with --init-from a model of another tokenizer or of fewer
    # rows: a piece that both have keeps its row, another gets the mean of the rows of
    # the former pieces that spell it (pieces), or of all (mean). Moments begin anew.
    embeddings: Literal["keep", "pieces", "mean"] = "keep"


@dataclass(frozen=True)
class StageConfig:
    """One segment of training: how long, on what, at which rate, with which weights."""

    name: str  # names its checkpoints and fields
    tokens: Count  # trained on in it
    mixture: MixtureConfig  # what is served
    schedule: ScheduleConfig  # learning rate
    token_weights: TokenWeightConfig = TokenWeightConfig()  # of targets in the loss
    transition: TransitionConfig = TransitionConfig()  # from the stage before


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the layers' matrices and Adam for all else; weight decay on
    these matrices, not on embeddings, norms and biases.

    `kind="muon"`: the running mean of a matrix's gradients is made orthogonal
    (training/optimizer.py). Its updates have AdamW's root mean square, so that AdamW's
    learning rate and weight decay stay right.
    `ema_tokens`: keep an exponential moving average of the parameters in which what was
    averaged so many tokens ago weighs 1/e of the newest, at any batch size
    (training/ema.py); it is evaluated beside the parameters.

    `first_batch_size`: begin with updates on so many examples. While the tokens of the
    whole history grow to `batch_warmup_tokens`, the size follows a straight line to
    data.batch_size, in doublings. A step has data.batch_size examples all the while,
    and several updates; their rate is the schedule's over the root of their number.
    """

    kind: Literal["adamw", "muon"] = "adamw"  # a run cannot change it
    momentum: Decay = 0.95  # muon: decay of the mean of gradients
    update_rms: Finite = 0.2  # muon: root mean square of an update, for rate 1
    b1: Decay = 0.9  # decay of the mean of gradients
    b2: Decay = 0.95  # decay of the mean of their squares
    eps: Finite = 1e-8  # added to the root of the latter
    weight_decay: Share = 0.1  # a step, times the learning rate
    clip_norm: Positive = 1.0  # longest gradient (math.inf: any)
    z_loss: Share = 0.0  # factor of log(sum of exp of logits) squared
    first_batch_size: Whole = 0  # data.batch_size over a power of two; 0: all at once
    batch_warmup_tokens: Whole = 0  # at whose end an update has data.batch_size
    ema_tokens: Whole = 0  # time constant of the average of the parameters; 0: none
