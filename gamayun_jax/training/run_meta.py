"""What a checkpoint says of its run beside the arrays; plain JSON on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gamayun_jax.config import Config, UserError, from_json, to_json


@dataclass(frozen=True)
class RunMeta:
    """The item `meta` of a checkpoint; the names of the fields are its JSON's keys.

    An imported model has no past: `curricula` and `consumed` are empty.
    """

    step: int  # optimiser steps done in this run
    config: Config
    tokens: int = 0  # trained on in the whole history, earlier runs included
    tokenizer: str | None = None  # fingerprint; None: imported without a tokenizer
    lineage: Mapping[str, Any] = field(default_factory=dict)
    # The data: which examples were served, and by what.
    contents: Mapping[str, Any] | None = None  # hashes of shards; once there were none
    consumed: Mapping[str, int] = field(default_factory=dict)  # examples by source
    curricula: Sequence[Mapping[str, Any]] = ()
    shares: Mapping[str, float] = field(default_factory=dict)  # of the current stage
    rest_of: str = "sources"  # see data.plan.make_data_plan; once there was one way
    seed: int = 0  # of the order that `consumed` counts in
    origin: Mapping[str, Any] | None = None  # of a run that --init-from began
    rollbacks: Sequence[Mapping[str, Any]] = ()
    # Meters that go on where they stood.
    interval: Mapping[str, Any] | None = None  # MetricAccumulator
    times: Mapping[str, Any] | None = None  # GoodputTimer
    watch: Mapping[str, Any] | None = None  # DivergenceDetector
    bits: int | None = None  # of quantised weights
    layout: int | None = None  # of int4 weights; once there was none
    group: int | None = None  # of int4 weights without a layout; once it was 64
    # Of an average: scheme, and the checkpoints' steps and weights, oldest first.
    averaged: Mapping[str, Any] | None = None
    checksums: Mapping[str, Mapping[str, str]] | None = None  # by item and array

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; what is not known (None) is left out, but for tokenizer and
        origin, whose absence says something."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["config"] = to_json(self.config)
        told = ("tokenizer", "origin")
        return {k: v for k, v in data.items() if v is not None or k in told}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> RunMeta:
        """Inverse of `to_json`; keys that this version does not know are left out.

        Raises:
          UserError: a key is missing, or the config does not fit this version.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if lacking := {"step", "config"} - data.keys():
            raise UserError(f"{where} lacks {', '.join(sorted(lacking))} in its meta")
        fields = {k: v for k, v in data.items() if k in known}
        return cls(**{**fields, "config": from_json(data["config"], where)})

    @property
    def params_alone(self) -> bool:
        """Whether the checkpoint has no optimiser's state: no run goes on from it."""
        return bool(self.bits or self.averaged or self.lineage.get("imported"))

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint has an average of the parameters (ema.py)."""
        return "ema" in (self.checksums or {})

    @property
    def tokens_before(self) -> int:
        """Tokens that were trained on before this run."""
        return self.origin["tokens"] if self.origin else 0

    @property
    def examples(self) -> int:
        """Examples that were served in this run."""
        return self.step * self.config.data.batch_size
