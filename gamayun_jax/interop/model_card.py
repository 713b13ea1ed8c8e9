"""README.md of an exported model, from the template beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from gamayun_jax import __version__
from gamayun_jax.config import Config
from gamayun_jax.interop.hf_config import ARCHITECTURES
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.training.run_meta import RunMeta

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(
    cfg: Config,
    meta: RunMeta,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
) -> str:
    """README.md of an exported model: what it is, where from, how well it does.

    Args:
      data: the exported config.json.
      evaluation: held-out results, as eval/<step>.json has them.
    """
    lineage, sets = meta.lineage, (evaluation or {}).get("sets") or {}
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        cfg=cfg,
        m=cfg.model,
        meta=meta,
        lineage=lineage,
        version=__version__,
        parameters=parameter_count(cfg.model),
        architecture=ARCHITECTURES[data["model_type"]],
        dtype=data["torch_dtype"],
        languages=[k for k in cfg.languages if k != "und"],
        imported=lineage.get("imported"),
        sources=lineage.get("corpus", {}).get("sources", {}),
        sets={
            name: result["languages"]
            | {k: result[k] for k in ("macro", "micro") if k in result}
            for name, result in sets.items()
        },
    )
