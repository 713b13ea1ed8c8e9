"""Which examples a checkpoint is asked about, and what their loss is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax import cli, train
from gamayun_jax.config import UserError
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.curriculum import Curriculum, Phase
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import CurriculumRun, DataPlan
from gamayun_jax.evaluate import forgetting
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, unembedding
from gamayun_jax.report.forgetting import curve, read_forgetting, unseen_of
from gamayun_jax.report.read_run import read_run
from gamayun_jax.report.report import write_report

SIZES = {"en/a": 9, "ru/a": 40, "ru/b": 30}


def plan_of(restarts=False, start=None):
    """40 steps of 4 examples in two stages; the first source is passed over thrice."""
    first = {"en/a": 0.25, "ru/a": 0.5, "ru/b": 0.25}
    last = {"en/a": 0.1, "ru/b": 0.9}
    phases = [Phase("one", 80, first), Phase("two", 80, last)]
    runs = [CurriculumRun(0, Curriculum(tuple(phases), SIZES, 3, 16, start or {}))]
    if restarts:
        runs = [
            CurriculumRun(80 * k, Curriculum((phase,), SIZES, k, 16))
            for k, phase in enumerate(phases)
        ]
    return DataPlan(tuple(SIZES), (0, 1, 1), (), tuple(runs), 4, 40)


class Order:
    """Position -> example, another order in every pass."""

    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __getitem__(self, position):
        turn, place = divmod(position, self.size)
        rng = np.random.default_rng([self.seed, turn])
        return int(rng.permutation(self.size)[place])


def orders(plan):
    return [Order(n, SIZES[s]) for n, s in enumerate(plan.sources * len(plan.runs))]


PLANS = [plan_of(), plan_of(restarts=True), plan_of(start={"en/a": 4, "ru/a": 7})]


def served_one_by_one(plan, source):
    """(dataset, position, step) of the examples of a source, in order."""
    dataset, position = plan.lookup(np.arange(160))
    mine = dataset % len(SIZES) == plan.sources.index(source)
    steps = np.arange(160) // 4 + 1
    return list(
        zip(
            dataset[mine].tolist(),
            position[mine].tolist(),
            steps[mine].tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", SIZES)
def test_places_and_steps_are_those_of_the_mapping(plan, source):
    served = served_one_by_one(plan, source)
    assert len(served) == plan.served(40)[source]
    for number, (*where, step) in enumerate(served):
        assert list(plan.place(source, number)) == where
        assert plan.step_of(source, number) == step
    with pytest.raises(IndexError):
        plan.place(source, len(served))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("step", [20, 33, 40])
def test_probes_are_even_and_known_by_their_last_time(plan, source, step):
    order = orders(plan)
    served = [w for w in served_one_by_one(plan, source) if w[2] <= step]
    last = {order[dataset][position]: at for dataset, position, at in served}
    probes = forgetting.served_probes(plan, order, source, step, 6)
    ids = [order[p.dataset][p.position] for p in probes]
    assert len(set(ids)) == len(ids) <= 6
    assert [p.step for p in probes] == [last[i] for i in ids]
    start = int(plan.runs[0].curriculum.offsets[plan.sources.index(source)])
    if start + len(served) <= SIZES[source] and len(plan.runs) == 1:
        numbers = [served.index(tuple(p)) for p in probes]
        np.testing.assert_allclose(np.diff(numbers), len(served) / 6, atol=1)
    # What was never served, by this run or those before it.
    seen = {order[d][p] for d, p, _ in served}
    seen |= {order[plan.sources.index(source)][p] for p in range(start)}
    unseen = forgetting.unseen_probes(plan, source, step, 6)
    new = [order[p.dataset][p.position] for p in unseen]
    assert not seen & set(new)
    assert len(set(new)) == len(new)
    if len(plan.runs) == 1:
        left = SIZES[source] - start - len(served)
        assert len(new) == min(6, max(0, left))


def test_a_language_s_count_is_divided_over_its_sources():
    assert forgetting.shared_out(10, {"a": 90, "b": 9, "c": 0}) == {"a": 9, "b": 1}
    assert forgetting.shared_out(10, {"a": 0}) == {}


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run, and what its checkpoints were asked on the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.train(config, folder, log=lambda text: None) == 0
    assert cli.main(["forgetting", str(folder), "--examples", "9"]) == 0
    return folder


@pytest.mark.slow
def test_losses_are_those_of_the_examples(run, config):
    """Of each checkpoint and example, by the logits of the whole batch."""
    told = read_forgetting(read_run(run))
    assert [t["step"] for t in told] == [7, 13]
    corpus = open_corpus(Path(config.data.corpus))
    cfg, params, meta, mesh = load_params(run / "checkpoints" / "13")
    plan = forgetting.plan_of(meta, corpus)
    data = LocalBatches(cfg, corpus, plan, np.arange(8))
    found = told[1]["languages"]
    assert set(found) == {"en", "ru", "tr"}
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model, by_example = Transformer(cfg.model, cfg.compute), []
        for step in range(13):
            b = data[step]
            x = model.apply(
                {"params": params}, b["inputs"], b["positions"], b["segment_ids"]
            )
            logits = jnp.einsum("BTD,VD->BTV", x, unembedding(params))
            logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
            picked = np.take_along_axis(
                np.asarray(logprobs), b["targets"][..., None], -1
            )
            nll = -(picked[..., 0] * b["loss_mask"]).sum(1)
            for row in range(8):
                since = (13 - step - 1) * cfg.tokens_per_step
                language = config.languages[b["language"][row, 0]]
                targets = int(b["loss_mask"][row].sum())
                by_example.append((language, since, round(float(nll[row]), 1), targets))
    for language, row in found.items():
        assert len(row["examples"]) == 9
        for since, nll, targets in row["examples"]:
            close = [
                e for e in by_example
                if (e[0], e[1], e[3]) == (language, since, targets)
                and abs(e[2] - nll) < 0.11
            ]  # fmt: skip
            assert close, (language, since, nll)
        assert row["last_seen"] == min(e[1] for e in by_example if e[0] == language)
        nll, targets = row["unseen"]
        assert 1 < nll / targets < np.log(cfg.model.vocab_size) + 1


def test_the_report_has_a_figure(run, tmp_path):
    page = write_report([run], tmp_path).read_text("utf-8")
    assert "Loss on training examples by tokens since" in page
    told = read_forgetting(read_run(run))[1]
    points = curve(told, "ru")
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    rows = told["languages"]["ru"]["examples"]
    mean = sum(r[1] for r in rows) / sum(r[2] for r in rows)
    assert min(y for _, y in points) <= mean <= max(y for _, y in points)
    assert unseen_of(told, "ru") > 1


def test_what_cannot_be_asked(run, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 5; there are"):
        forgetting.forgetting(run, 4, [5])
    with pytest.raises(UserError, match="has no checkpoint"):
        forgetting.forgetting(tmp_path, 4)
    text = (run / forgetting.FILE).read_text("utf-8")
    try:
        (run / forgetting.FILE).write_text("{", "utf-8")
        with pytest.raises(UserError, match="is damaged"):
            read_forgetting(read_run(run))
        row = {"examples": [[1], "x", [1, 2, 0]], "unseen": ["a", 1]}
        odd = {"checkpoints": [{"languages": {"ru": row}}, 3]}
        (run / forgetting.FILE).write_text(json.dumps(odd), "utf-8")
        write_report([run], tmp_path)
    finally:
        (run / forgetting.FILE).write_text(text, "utf-8")
