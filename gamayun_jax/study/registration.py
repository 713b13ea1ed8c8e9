"""A study's arms made and proven before training, and its design frozen with a hash.

The first run of a study writes `registration.json` beside its records: question, arms
with their whole configs, seeds, outcomes, hypotheses, the rules of the analysis, the
corpora by their contents, and the SHA-256 of all that. A study that no longer has this
hash is refused. Paths are left out: the same study goes on on another machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.config import Config, UserError, to_dict
from gamayun_jax.data import controls
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.files import write_json
from gamayun_jax.data.plan import DataPlan, make_data_plan
from gamayun_jax.evaluate.tasks import Task, load_task
from gamayun_jax.fields import decode
from gamayun_jax.study.analysis import RULES
from gamayun_jax.study.design import (
    ANSWER,
    PER_BYTE,
    PER_QUESTION,
    RETRIEVAL,
    SHARE_MISSED,
    Arm,
    Study,
)
from gamayun_jax.training.run_folder import differences

FILE = "registration.json"


@dataclass(frozen=True)
class MadeArm:
    """An arm with what the corpus made of it.

    Attributes:
      cfg: the twin's config, where the arm is one.
      plan: of its first seed; other seeds serve as many examples of each source.
      measures: what is measured beyond its held-out sets and tasks (measures.py).
    """

    arm: Arm
    cfg: Config
    corpus: Corpus
    plan: DataPlan
    measures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.arm.name

    def plan_of(self, seed: int) -> DataPlan:
        """The plan of a run."""
        return make_data_plan(dataclasses.replace(self.cfg, seed=seed), self.corpus)

    def served(self) -> dict[str, int]:
        """Source -> examples that the whole run serves."""
        return self.plan.served(self.plan.total_steps)


def make_arms(study: Study) -> dict[str, MadeArm]:
    """Arm's name -> what is made of it, with exposures proven from the plans.

    Raises:
      UserError: a corpus that is not there, a twin that cannot be made, arms that are
        declared matched and would serve other examples, an outcome on a held-out set
        or in a language that an arm's corpus does not have, a hypothesis on arms that
        are scored on other texts.
    """
    corpora: dict[str, Corpus] = {}
    made: dict[str, MadeArm] = {}
    bases: dict[str, controls.Base] = {}
    for arm in study.arms:
        cfg = arm.config
        folder = cfg.data.corpus
        if folder not in corpora:
            corpora[folder] = open_corpus(Path(folder))
        corpus = corpora[folder]
        check_outcomes(study, arm, corpus)
        if arm.twin:
            key = json.dumps(to_dict(cfg), sort_keys=True)
            if key not in bases:
                bases[key] = controls.plan_base(cfg, corpus)
            cfg = controls.make_arm(arm.twin, bases[key])
        cfg = dataclasses.replace(cfg, name=arm.name)
        plan = make_data_plan(cfg, corpus)
        made[arm.name] = MadeArm(arm, cfg, corpus, plan, measures_of(study))
    for group in study.matched_groups():
        check_exposure([made[a.name] for a in group])
    check_texts(study, made)
    return made


def tasks_of(cfg: Config) -> dict[str, Task]:
    """The tasks that a config's runs are asked, by name."""
    limit = cfg.evaluation.task_items
    tasks = [load_task(n, cfg.languages, limit) for n in cfg.evaluation.tasks]
    return {task.name: task for task in tasks}


def measurable(
    cfg: Config, corpus: Corpus, tasks: Mapping[str, Task]
) -> dict[str, tuple[str, list[str]]]:
    """Name of each set that an arm can be measured on -> its unit, its languages."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, task in tasks.items():
        if task.kind == "multiple_choice":
            found[name] = PER_QUESTION, list(task.languages)
            found[ANSWER + name] = PER_BYTE, list(task.languages)
        elif task.kind != "generation":
            found[name] = PER_BYTE, list(task.languages)
    for name, languages in corpus.heldout_sets().items():
        found[name] = PER_BYTE, languages
        if corpus.manifest["heldout"][name]["parallel"] and len(languages) > 1:
            for layer in (*range(cfg.model.num_layers + 1), "last"):
                found[f"{RETRIEVAL}{name}:{layer}"] = SHARE_MISSED, languages
    return found


def measures_of(study: Study) -> tuple[str, ...]:
    """The measures that a study's outcomes name, each once."""
    names = itertools.chain(*(o.sets for o in study.outcomes))
    return tuple(dict.fromkeys(n for n in names if n.startswith((ANSWER, RETRIEVAL))))


def check_outcomes(study: Study, arm: Arm, corpus: Corpus) -> None:
    """Raise UserError for an outcome that this arm's corpus and tasks don't measure."""
    tasks, texts = tasks_of(arm.config), corpus.heldout_sets()
    if both := tasks.keys() & texts.keys():
        raise UserError(
            f"arm {arm.name}: {min(both)!r} is a held-out set and a task of "
            "evaluation.tasks, and records have one of that name: leave the task out"
        )
    known = measurable(arm.config, corpus, tasks)
    plain = [name for name in known if not name.startswith((ANSWER, RETRIEVAL))]
    for outcome in study.outcomes:
        for name in outcome.sets:
            if name not in known:
                raise UserError(
                    f"outcome {outcome.name!r} is on {name!r}, which is no held-out "
                    f"set of the corpus of arm {arm.name} and no task of its config "
                    f"that has bits; there are {', '.join(plain) or 'none'}, "
                    f"{ANSWER}TASK of multiple choice, and {RETRIEVAL}SET:LAYER of "
                    f"parallel sets (LAYER: 0 to {arm.config.model.num_layers}, last)"
                )
            if not outcome.languages_of(known[name][1]):
                raise UserError(
                    f"outcome {outcome.name!r} is about languages="
                    f"{outcome.languages!r}, and {name!r} has "
                    f"{', '.join(known[name][1])}"
                )
        units = list(dict.fromkeys(known[name][0] for name in outcome.sets))
        if len(units) > 1:
            raise UserError(
                f"outcome {outcome.name!r} is a mean over {', '.join(outcome.sets)}: "
                f"some are measured in {' and some in '.join(units)}; make an outcome "
                "of each"
            )


def check_texts(study: Study, made: Mapping[str, MadeArm]) -> None:
    """Raise UserError for a hypothesis whose arms are scored on other held-out texts or
    questions, which do not compare."""
    for hypothesis in study.hypotheses:
        where = f"hypothesis {hypothesis.name!r}"
        arms = [
            made[study.find(side, where).name]
            for side in (hypothesis.better, hypothesis.than)
        ]
        one, other = (
            arm.corpus.contents()["heldout"]
            | {f"task {k}": task.hash for k, task in tasks_of(arm.cfg).items()}
            | {
                f"evaluation.{k}": getattr(arm.cfg.evaluation, k)
                for k in ("max_units", "task_items")
            }
            for arm in arms
        )
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                raise UserError(
                    f"{where}: arms {arms[0].name} and {arms[1].name} do not have the "
                    f"same held-out texts and tasks ({name}), so that their outcomes "
                    "do not compare: build their corpora with the same held-out sets, "
                    "and ask both the same"
                )


def check_exposure(group: list[MadeArm]) -> None:
    """Raise UserError unless all arms serve the same examples of every source.

    A source is read in one order from one cursor, so that equal counts are equal
    examples, of the same text and length; a stage that restarts its cursors would break
    that.
    """
    first = group[0]
    for made in group:
        pair = f"arms {first.name} and {made.name} are declared matched, but"
        lengths = [m.cfg.data.seq_len for m in (first, made)]
        if lengths[0] != lengths[1]:
            raise UserError(
                f"{pair} their examples have {lengths[0]} and {lengths[1]} tokens "
                "(data.seq_len): use the same, or set Study.matched"
            )
        texts = [m.corpus.contents()["sources"] for m in (first, made)]
        if len(group) > 1 and len(made.plan.runs) > 1:
            raise UserError(
                f"arm {made.name}: a stage restarts its data cursors, so it does not "
                "serve the examples of the arms that it is matched with"
            )
        wanted, served = first.served(), made.served()
        for source in dict.fromkeys([*wanted, *served]):
            if wanted.get(source, 0) != served.get(source, 0):
                raise UserError(
                    f"{pair} serve {wanted.get(source, 0)} and {served.get(source, 0)} "
                    f"examples of source {source!r}: make one a twin of the other, or "
                    "set Study.matched"
                )
            if served.get(source) and texts[0].get(source) != texts[1].get(source):
                raise UserError(
                    f"{pair} {source} has other text in the corpus of {made.name}: "
                    "train them on one corpus, or set Study.matched"
                )


def registration(study: Study, made: Mapping[str, MadeArm]) -> dict[str, Any]:
    """The study's design as plain JSON, with its hash."""
    design = to_dict(study)
    for row in design["arms"]:
        arm = made["-".join(row["levels"].values())]
        row |= {
            "config": portable(arm.cfg),
            "served": arm.served(),
            "corpus": digest(arm.corpus.contents()),
            "tokenizer": arm.corpus.manifest["tokenizer"]["fingerprint"],
        }
        if tasks := tasks_of(arm.cfg):
            row["tasks"] = {name: task.hash for name, task in tasks.items()}
    frozen = {"study": design, "analysis": RULES}
    return {"sha256": digest(frozen), **frozen}


def portable(cfg: Config) -> dict[str, Any]:
    """A config without what is only of one machine: paths, and what a seed replaces."""
    plain = to_dict(cfg)
    del plain["corpus"], plain["seed"], plain["name"], plain["data"]["corpus"]
    tasks = [Path(name).stem for name in plain["evaluation"]["tasks"]]
    plain["evaluation"]["tasks"] = tasks
    return plain


def digest(value: Any) -> str:
    """SHA-256 of plain JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def register(
    folder: Path, study: Study, made: Mapping[str, MadeArm], write: bool = True
) -> str:
    """Freeze the design in a study's folder, or hold it against the frozen one.

    Fields of a config that a later release has added are no change while they are at
    their defaults.

    Args:
      write: whether to freeze it, where that is not done yet.

    Returns:
      the hash.

    Raises:
      UserError: the study has changed since, with the first fields that differ.
    """
    now, path = registration(study, made), folder / FILE
    if not path.exists():
        if write:
            write_json(path, now)
        return now["sha256"]
    former = read_registration(folder)
    fields = ("study", "analysis")
    plain = json.loads(json.dumps({k: now[k] for k in fields}))
    if other := differences(completed({k: former[k] for k in fields}), plain):
        told = "; ".join(f"{k}: {a!r} -> {b!r}"[:200] for k, (a, b) in other.items())
        raise UserError(
            f"the study has changed since it was registered in {path}: {told[:600]}. "
            "Ask a new question in a new folder (--out), or take the change back"
        )
    return former["sha256"]


def completed(frozen: dict[str, Any]) -> dict[str, Any]:
    """A registration with the fields that its configs have in this release."""
    arms = []
    for arm in frozen["study"]["arms"]:
        cfg = decode({**arm["config"], "name": "arm"}, Config, "config")
        arms.append({**arm, "config": json.loads(json.dumps(portable(cfg)))})
    return {**frozen, "study": {**frozen["study"], "arms": arms}}


def read_registration(folder: Path) -> dict[str, Any]:
    """What `register` wrote; UserError for none, or one that was edited."""
    path = folder / FILE
    try:
        frozen = json.loads(path.read_text("utf-8"))
        kept = digest({k: frozen[k] for k in ("study", "analysis")})
    except FileNotFoundError:
        raise UserError(f"{path} is missing: no run of a study began here") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged: take it back from where it is kept"
        ) from None
    if kept != frozen.get("sha256"):
        raise UserError(
            f"{path} was edited after it was frozen: its contents have the hash "
            f"{kept[:16]} and it says {str(frozen.get('sha256'))[:16]}"
        )
    return frozen
