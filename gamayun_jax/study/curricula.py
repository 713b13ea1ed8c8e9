"""What arms train on and how fast, over tokens: for the pictures of a study's page.

It follows from the registered configs and corpora, so it is no part of the hash and can
be written again at any time.

curricula.json, arm ->
  seq_len   tokens of an example
  stages    [{name, start_tokens, end_tokens}]
  shares    [{tokens, shares: {source: share}}], joined by straight lines
  rates     [[tokens, learning rate]]
  table     [{phase, source, share, examples, epochs, epochs_total}]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.data.files import write_text
from gamayun_jax.study.registration import MadeArm
from gamayun_jax.training.lineage import rate_points, share_points, stage_spans

FILE = "curricula.json"


def write_curricula(folder: Path, made: Mapping[str, MadeArm]) -> None:
    """Write FOLDER/curricula.json, an arm a line."""
    lines = []
    for name, arm in made.items():
        curriculum: dict[str, Any] = {
            "seq_len": arm.cfg.data.seq_len,
            "stages": stage_spans(arm.cfg),
            "shares": share_points(arm.cfg, arm.plan),
            "rates": rate_points(arm.cfg),
            "table": arm.plan.table(),
        }
        told = json.dumps(curriculum, ensure_ascii=False, allow_nan=False)
        lines.append(f" {json.dumps(name)}: {told}")
    write_text(folder / FILE, "{\n" + ",\n".join(lines) + "\n}\n")
