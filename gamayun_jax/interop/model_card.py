"""README.md of an exported model, from the template beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from gamayun_jax import __version__
from gamayun_jax.config import Config, UserError
from gamayun_jax.data.ledger import (
    ledger_table,
    make_ledger,
    objective_table,
    uncounted,
)
from gamayun_jax.data.plan import past_plan
from gamayun_jax.interop.hf_config import ARCHITECTURES
from gamayun_jax.model.weights import parameter_count
from gamayun_jax.training.meters import MetricAccumulator
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.spool import metric_lines

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(
    cfg: Config,
    meta: RunMeta,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    ledger: Mapping[str, Any] | None = None,
    sentencepiece: bool = True,
) -> str:
    """README.md of an exported model: what it is, where from, how well it does.

    Args:
      data: the exported config.json.
      ledger: what it was trained on, by `exposure_of`.
      evaluation: held-out results, as eval/<step>.json has them.
      sentencepiece: whether the tokenizer is ours.
    """
    lineage, sets = meta.lineage, (evaluation or {}).get("sets") or {}
    # Records of former releases have no weights.
    stages = [s for s in (ledger or {}).get("stages", []) if s["targets"]]
    if ledger and uncounted(ledger):
        stages = []
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
        sentencepiece=sentencepiece,
        sources=lineage.get("corpus", {}).get("sources", {}),
        exposure=ledger and ledger_table(ledger).markdown(),
        objective=stages and objective_table(stages).markdown(),
        sets={
            name: result["languages"]
            | {k: result[k] for k in ("macro", "micro") if k in result}
            for name, result in sets.items()
        },
    )


def exposure_of(meta: RunMeta, run: Path) -> dict[str, Any] | None:
    """The ledger of a checkpoint (data/ledger.py); None where its plan is not known.

    Args:
      run: its run folder, whose records count targets by language; they may be gone.
    """
    cfg = meta.config
    if not meta.lineage.get("curriculum", {}).get("table") or not meta.curricula:
        return None
    try:
        plan = past_plan(meta.step, cfg.data.batch_size, meta.curricula, meta.rollbacks)
    except UserError:  # another version's mapping: what it served cannot be computed
        return None
    lines = metric_lines(run)
    records = [
        r for _, r in lines if r and r.get("kind") == "train" and r["step"] <= meta.step
    ]
    # The steps since the last record are in the checkpoint.
    rest = MetricAccumulator(len(cfg.languages), meta.interval).record(cfg.languages)
    records.append({"stage": cfg.stages[cfg.stage_at(meta.step - 1)].name, **rest})
    served = plan.served(meta.step)
    return make_ledger(meta.lineage, cfg.data.seq_len, served, records)
