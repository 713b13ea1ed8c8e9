"""Checkpoints that are cut, changed, half deleted, or cannot be written."""

import contextlib
import errno
import json
import random
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meta_of, read_only
from gcsfs.retry import ChecksumError, HttpError

from gamayun_jax import buckets, train
from gamayun_jax.config import UserError
from gamayun_jax.report import read_run
from gamayun_jax.training import checkpoint, checksums, file_errors, run_folder
from gamayun_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    TrainState,
)
from gamayun_jax.training.file_errors import is_refused, of_files
from gamayun_jax.training.run_folder import RunFolder


def quiet(text):
    pass


def leaves(run, step):
    store = Checkpoints(run / "checkpoints", read_only=True)
    meta = store.meta(step)
    store.close()
    return meta.checksums


def records(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


@pytest.fixture(scope="module")
def small(config):
    """A few steps of one stage: what is damaged below."""
    import dataclasses

    return dataclasses.replace(config, evaluation=dataclasses.replace(
        config.evaluation, max_units=2
    ))  # fmt: skip


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    run = tmp_path_factory.mktemp("faults") / "run"
    assert train.train(small, run, log=quiet) == 0
    return run


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def truncate(folder, rng):
    path = max(files(folder / "params"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder, rng):
    """Eight bits in the largest file: the values of the arrays. Of a compressed file
    no value depends on some bits, so that one alone may do no damage."""
    path = max(files(folder / "params"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    for place in rng.sample(range(len(data)), 8):
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_meta(folder, rng):
    path = max(files(folder / "meta"), key=lambda p: p.stat().st_size)
    text = path.read_text()
    at = text.index('"consumed"')
    digit = next(i for i in range(at, len(text)) if text[i].isdigit())
    path.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])


def delete_half(folder, rng):
    for path in files(folder)[::2]:
        path.unlink()


def delete_item(folder, rng):
    shutil.rmtree(folder / "opt_state")


@pytest.mark.parametrize(
    "damage", [truncate, flip, flip_meta, delete_half, delete_item]
)
def test_a_damaged_newest_checkpoint_is_set_aside(small, straight, tmp_path, damage):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    damage(run / "checkpoints" / "13", random.Random(seed))
    said = []
    assert train.train(small, run, log=said.append) == 0
    assert any("checkpoint 13 is damaged" in x and "damaged/13" in x for x in said)
    assert (run / "damaged" / "13").is_dir()
    assert any("going on from step 12" in x for x in said)
    lineage = json.loads((run / "lineage.json").read_text())
    assert [e["step"] for e in lineage["events"] if e["event"] == "damaged"] == [13]
    assert leaves(run, 13) == leaves(straight, 13)
    assert records(run) == records(straight)


@pytest.mark.parametrize("what", ["meta", "read", "verified"])
def test_what_another_process_cannot_read_is_set_aside_by_all(
    tmp_path, monkeypatch, what
):
    """This process, which can, takes no part in anything before it knows that."""
    store = Checkpoints(tmp_path / "checkpoints")
    state = TrainState(jnp.int32(1), {"a": jnp.ones(3)}, {})
    for step in (1, 2):
        store.save(state, meta_of(step))
    store.wait()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    asked = {"meta": 0, "read": 1, "verified": 2}[what]
    calls, summed = [], []

    def gather(value):  # the other process fails the `asked`-th time, at step 2
        calls.append(value)
        if isinstance(value, np.uint32):  # the list of checkpoints
            return np.array([value, value])
        turn = sum(not isinstance(x, np.uint32) for x in calls) - 1
        return np.array([value, int(turn == asked)])

    real = checkpoint.checksums
    monkeypatch.setattr(checkpoint.cluster, "gather", gather)
    monkeypatch.setattr(
        checkpoint, "checksums", lambda x: summed.append(len(calls)) or real(x)
    )
    said = []
    found = store.newest(abstract, lambda *a: None, tmp_path / "damaged", said.append)
    store.close()
    assert found[0].step == 1
    assert "checkpoint 2 is damaged (processes [1] cannot read it)" in said[0]
    assert (tmp_path / "damaged" / "2").is_dir()
    # Together only after all have read: once for step 1, and for step 2 in its turn.
    assert len(summed) == (2 if what == "verified" else 1)


def test_processes_that_do_not_share_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.cluster, "gather", lambda x: np.array([x, x + 1]))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"processes \[1\] do not see the checkpoints"):
        Checkpoints(tmp_path / "checkpoints")


def test_every_bit_counts(straight, config):
    """Any one flipped bit of the arrays' file is found when it is read, wherever it
    is; what is not found (padding of the file format) leaves every value as it was."""
    rng = np.random.default_rng(7)
    tree = {
        "a": jnp.arange(300, dtype=jnp.float32).reshape(3, 100),
        "b": jnp.bfloat16(2),
    }
    state = TrainState(jnp.int32(5), tree, {})
    folder = Path(str(straight)).parent / "bits"
    store = Checkpoints(folder)
    store.save(state, meta_of(1))
    store.wait()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    paths = [p for item in ("params", "opt_state") for p in files(folder / "1" / item)]
    found = 0
    for _ in range(40):
        path = paths[rng.integers(len(paths))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            back = store.restore(1, abstract)
            np.testing.assert_array_equal(back.params["a"], tree["a"])
            assert back.step == 5
        except DamagedCheckpointError:
            found += 1
        path.write_bytes(good)
    assert found > 5
    store.close()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int32", "int8", "int4", "bool"]
)
def test_checksum_is_the_sum_of_bits_times_odd_places(dtype):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)) * 3, dtype)
    if dtype in ("float32", "bfloat16"):
        unsigned = {4: np.uint32, 2: np.uint16}[x.dtype.itemsize]
        bits = np.asarray(x).view(unsigned).astype(object)
    else:
        bits = np.asarray(x).astype(np.int32).view(np.uint32).astype(object)
    places = 2 * np.arange(60).reshape(3, 4, 5).astype(object) + 1
    expected = int((bits * places).sum() % 2**32)
    assert int(checksums.checksum(x)) == expected
    assert checksums.host_checksum(np.asarray(x)) == expected


@pytest.mark.parametrize("shape", [(), (0,), (checksums.BLOCK + 3,), (5, 40_009)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_checksums_on_a_device_and_on_the_host_are_the_same(shape, dtype):
    """One device's and, of an array that several have, theirs; also beyond a block."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape) * 9, dtype)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = checksums.checksums({"a": {"one": x, "all": jax.device_put(x, parts)}})
    assert found["a"]["one"] == found["a"]["all"]


def test_another_structure_is_not_taken_for_damage(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(TrainState(jnp.int32(1), {"a": jnp.ones(3)}, {}), meta_of(1))
    store.save(TrainState(jnp.int32(2), {"a": jnp.ones(3)}, {}), meta_of(2))
    store.wait()
    other = TrainState(jnp.int32(1), {"b": jnp.ones(3)}, {})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other
    )
    with pytest.raises(UserError, match="holds other params"):
        store.newest(abstract, lambda *a: None, tmp_path / "damaged", quiet)
    assert store.steps() == [1, 2]
    store.close()


def test_the_last_checkpoint_is_never_moved(small, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for path in (run / "checkpoints").iterdir():
        if path.name != "13":
            shutil.rmtree(path)
    delete_half(run / "checkpoints" / "13", None)
    with pytest.raises(UserError, match="There is no other"):
        train.train(small, run, log=quiet)
    assert (run / "checkpoints" / "13").is_dir()


def test_lost_checkpoints_are_no_new_run(small, straight, tmp_path, replace):
    """A folder that was moved, or not mounted: nothing of the run is touched."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    before = {p: p.read_bytes() for p in files(run)}
    for cfg in (small, replace(small, "log.every_steps", 2)):
        with pytest.raises(UserError, match="up to step 13 .*has none.*--fresh"):
            train.train(cfg, run, log=quiet)
    assert {p: p.read_bytes() for p in files(run)} == before
    assert not (run / "checkpoints").exists()  # so that it can be moved back
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    with pytest.raises(UserError, match="checkpoint of step 13: leave --fresh out"):
        train.train(small, run, log=quiet, fresh=True)
    assert train.train(small, run, log=quiet) == 0
    assert records(run) == records(straight)


def test_fresh_moves_the_records_aside(small, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "notes.txt").write_text("mine")
    before = {p.relative_to(run): p.read_bytes() for p in files(run)}
    said = []
    assert train.train(small, run, log=said.append, fresh=True) == 0
    assert f"the records of the former start are in {run}/former/1" in said
    kept = {p.relative_to(run / "former/1"): p for p in files(run / "former")}
    assert {k: p.read_bytes() for k, p in kept.items()} | {
        Path(k): before[Path(k)] for k in (".lock", "notes.txt")
    } == before
    assert records(run) == records(straight)
    assert leaves(run, 13) == leaves(straight, 13)
    assert (run / "notes.txt").read_text() == "mine"


def test_fresh_where_nothing_was_recorded_moves_nothing(small, tmp_path):
    """A start that was refused leaves empty folders."""
    with contextlib.closing(RunFolder(tmp_path / "run")) as folder:
        assert folder.begin_afresh() is None
        assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "eval"]


def test_a_newest_checkpoint_that_is_gone_is_said(small, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "13")
    said = []
    assert train.train(small, run, log=said.append) == 0
    assert "checkpoint 13 is gone: what came after 12 is made again" in said
    events = json.loads((run / "lineage.json").read_text())["events"]
    assert {"event": "gone", "step": 13} in events
    assert records(run) == records(straight)


def test_lineage_lists_checkpoints_that_are_there(small, straight, tmp_path):
    """Whatever a kill leaves: one that is being written is not listed, and a run that
    was killed while it wrote its first begins again."""

    class KilledError(Exception):
        pass

    def killed(self, state, meta):
        save(self, state, meta)
        listed = json.loads((run / "lineage.json").read_text())["checkpoints"]
        assert meta.step not in [c["step"] for c in listed]
        if meta.step == 3:
            self.wait()
            shutil.rmtree(run / "checkpoints" / "3")
            raise KilledError

    run, save = tmp_path / "run", Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KilledError):
            train.train(small, run, log=quiet)
    said = []
    assert train.train(small, run, log=said.append) == 0
    assert not any("is gone" in x for x in said)
    assert records(run) == records(straight)
    listed = json.loads((run / "lineage.json").read_text())["checkpoints"]
    assert [c["step"] for c in listed] == [3, 6, 7, 9, 12, 13]


def test_a_checkpoint_under_another_number(small, straight, tmp_path):
    """A copy of an old one as the newest would let the run go on from old values."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "13")
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "13")
    said = []
    assert train.train(small, run, log=said.append) == 0
    assert any(
        "was saved as that of step 6" in x and "damaged/13" in x for x in said
    ), said
    assert records(run) == records(straight)
    assert leaves(run, 13) == leaves(straight, 13)
    (run / "checkpoints" / "13").rename(run / "checkpoints" / "14")
    with pytest.raises(UserError, match="saved as that of step 13"):
        train.train(small, tmp_path / "new", run / "checkpoints" / "14", log=quiet)


def test_foreign_files_in_a_run_folder(small, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "eval" / "notes.json").write_text("{}")
    (run / "eval" / "١٣.json").write_text("not JSON")
    (run / "checkpoints" / "notes").mkdir()
    (run / "checkpoints" / "13.txt").write_text("mine")
    (run / "checkpoints" / "²").mkdir()
    assert train.train(small, run, log=quiet) == 0
    assert (run / "eval" / "notes.json").exists()
    assert (run / "checkpoints" / "13.txt").exists()
    assert [e["step"] for e in read_run.read_run(run).evals] == [0, 7, 13]


@pytest.mark.parametrize("name", ["config.json", "parameters.txt", "a.tex", "data"])
def test_a_folder_of_other_files_is_no_run_folder(tmp_path, name):
    run = tmp_path / "run"
    for empty in ("eval", "checkpoints"):  # what a kill in the first second leaves
        (run / empty).mkdir(parents=True)
    for beside in ("notes.md", "slurm-7.out", ".hidden"):
        (run / beside).write_text("mine")
    RunFolder(run).close()
    (run / name).mkdir() if name == "data" else (run / name).write_text("mine")
    if name == "data":
        (run / name / "a.jsonl").write_text("")
    before = {p: p.read_bytes() for p in files(run)}
    with pytest.raises(
        UserError, match=f"has '{name}' in it, but no run: give another"
    ):
        RunFolder(run)
    assert {p: p.read_bytes() for p in files(run)} == before
    (run / "lineage.json").write_text("{}")
    RunFolder(run).close()


def test_a_finished_run_keeps_the_config_it_was_made_with(
    small, straight, tmp_path, replace
):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {p: p.read_bytes() for p in files(run) if p.suffix == ".json"}
    said = []
    cfg = replace(small, "optimizer.weight_decay", 0.3)
    assert train.train(cfg, run, log=said.append) == 0
    assert any("optimizer.weight_decay: 0.1 -> 0.3" in x for x in said)
    assert any("config.json and lineage.json stay as they were" in x for x in said)
    assert {p: p.read_bytes() for p in files(run) if p.suffix == ".json"} == before
    # Another corpus of the same texts, and a kill just after the last checkpoint.
    shutil.copytree(small.data.corpus, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    manifest["recipe"] = "0" * 64
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    lineage = json.loads((run / "lineage.json").read_text())
    del lineage["checkpoints"][-1]
    (run / "lineage.json").write_text(json.dumps(lineage))
    cfg = replace(small, "data.corpus", str(tmp_path / "corpus"))
    assert train.train(cfg, run, log=quiet) == 0
    assert {p: p.read_bytes() for p in files(run) if p.suffix == ".json"} == before


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"checkpoints": null}',
        '{"checkpoints": [1]}',
        '{"checkpoints": [{"step": "3"}]}',
        '{"rollbacks": null}',
        '{"init_from": 5}',
    ],
)
def test_a_lineage_of_another_kind_is_told(tmp_path, text):
    (tmp_path / "lineage.json").write_text(text)
    told = pytest.raises(UserError, match="lineage.json is not .*restore it")
    with contextlib.closing(RunFolder(tmp_path)) as run, told:
        run.lineage()


def test_checkpoints_that_vanish_under_a_run(straight, tmp_path):
    """A file system that is taken away: one line, like one that is full."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(straight / "checkpoints", folder)
    store = Checkpoints(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot be written .*from the beginning"):
        with of_files(store._unwritten):
            raise FileNotFoundError(2, "No such file or directory", str(folder))
    folder.write_text("")
    with pytest.raises(UserError, match="has no checkpoint"):
        run_folder.find_checkpoint(tmp_path)
    store.close()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_fresh_where_the_checkpoints_are_not_mounted(small, straight, tmp_path, kind):
    """Nothing is moved: what the link leads to may come back."""
    run = tmp_path / "run"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("checkpoints"))
    if kind == "link":
        (run / "checkpoints").symlink_to(tmp_path / "not mounted")
    else:
        (run / "checkpoints").write_text("")
    before = files(run)
    with pytest.raises(UserError, match="a link to what is not there, or a file"):
        train.train(small, run, log=quiet, fresh=True)
    assert files(run) == before


def test_a_full_disk_leaves_the_former_checkpoints_whole(small, straight, tmp_path):
    """A file size limit makes every write of the arrays fail, as a full disk does."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in (12, 13):
        shutil.rmtree(run / "checkpoints" / str(step))
    before = {p: p.read_bytes() for p in files(run / "checkpoints" / "9")}
    import signal

    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*from step 9"):
            train.train(small, run, log=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert {p: p.read_bytes() for p in files(run / "checkpoints" / "9")} == before
    assert train.train(small, run, log=quiet) == 0
    assert leaves(run, 13) == leaves(straight, 13)
    assert records(run) == records(straight)


def fill(store, state):
    for step in range(3, 6):
        store.save(state, meta_of(step))
        store.wait()


# Orbax's writing thread tells of its end, besides raising it here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_small_file_system_that_fills_up(tmp_path):
    """A real full file system, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        store = Checkpoints(folder / "checkpoints")
        rng = np.random.default_rng(0)
        state = TrainState(
            jnp.int32(1), {"a": rng.normal(size=250_000).astype("f4")}, {}
        )
        store.save(state, meta_of(1))
        store.wait()
        store.save(state, meta_of(2))
        store.wait()
        with pytest.raises(UserError, match=r"No space left.*from step [23]$"):
            fill(store, state)
        store.close()
        store = Checkpoints(folder / "checkpoints", read_only=True)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jnp.ones(1).sharding
            ),
            state,
        )
        for step in store.steps():
            store.restore(step, abstract)
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_kept_forever(replace, config):
    few = replace(config, "checkpoint.keep_every_steps", 6)
    assert checkpoint.kept_forever(few) == [6, 7, 12, 13]
    step = config.tokens_per_step
    tokens = replace(config, "checkpoint.keep_every_tokens", 4 * step)
    # 4, 8 and 12 steps, each at the next multiple of 3; and the stages' ends.
    assert checkpoint.kept_forever(tokens) == [6, 7, 9, 12, 13]
    # Fewer than a step has, of 2T: a loop over the tokens would not end.
    each = replace(tokens, "checkpoint.keep_every_tokens", 1)
    long = replace(each.stages[1], "tokens", 2 * 10**12)
    each = replace(each, "stages", (each.stages[0], long))
    each = replace(each, "data.batch_size", 2**15)
    each = replace(each, "checkpoint.every_steps", 10**5)
    each = replace(each, "checkpoint.keep_every_steps", 0)
    assert checkpoint.kept_forever(each)[1:4] == [10**5, 2 * 10**5, 3 * 10**5]
    with pytest.raises(UserError, match="not a multiple"):
        replace(config, "checkpoint.keep_every_steps", 4)


def test_a_read_only_run_folder(small, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {p: p.read_bytes() for p in files(run)}
    with read_only(run), pytest.raises(UserError, match="Read-only file system"):
        train.train(small, run, log=quiet)
    assert {p: p.read_bytes() for p in files(run)} == before


def test_a_meta_that_changes_while_it_is_written(tmp_path, monkeypatch):
    """The lineage of a run goes on while its checkpoint is on the way to the disk."""
    meta = meta_of(1, lineage={"events": [{"event": "begun"}]})
    write = checkpoint.ocp.JsonCheckpointHandler._save_fn

    def slowly(self, *args):
        meta.lineage["events"].append({"event": "later"})
        return write(self, *args)

    monkeypatch.setattr(checkpoint.ocp.JsonCheckpointHandler, "_save_fn", slowly)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(TrainState(jnp.int32(1), {"x": jnp.ones(3)}, {}), meta)
    store.wait()
    assert len(meta.lineage["events"]) == 2
    assert store.meta(1).lineage["events"] == [{"event": "begun"}]
    store.close()


# What passes by itself, or where a limit is raised: no word of the file.
PASSING = (
    errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT,
    errno.ESTALE, errno.EBUSY, errno.ENOLCK, errno.EHOSTUNREACH, errno.ENOTCONN,
)  # fmt: skip


def of_bucket(cause):
    """The error that buckets.os_errors makes of a package's."""

    @buckets.os_errors
    def call(path):
        raise cause

    with pytest.raises(OSError) as caught:
        call("gs://b/x")
    return caught.value


def while_handling(first, text):
    """An error that is raised, with these words, while another is handled."""
    error = ValueError(text)
    error.__context__ = first
    return error


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (ValueError("UNAVAILABLE: Error reading gs://b/x [source=tensorstore]"), True),
        (ValueError("PERMISSION_DENIED: Error opening x [tensorstore]"), True),
        (
            ValueError("DATA_LOSS: Error reading x: CRC-32C checksum [tensorstore]"),
            False,
        ),
        (ValueError("NOT_FOUND: Error opening x [tensorstore]"), False),
        (ValueError("a value is UNAVAILABLE: in a file"), False),
        (PermissionError(13, "Permission denied", "/run/x"), True),
        (OSError(5, "503", "gs://b/x"), True),
        (FileNotFoundError(2, "no such object", "gs://b/x"), False),
        (OSError(5, "Input/output error", "/run/x"), False),
        *((OSError(number, "", "/run/x"), True) for number in PASSING),
        *((OSError(number, "", "/run/x"), False) for number in file_errors.LOST),
        (OSError("a file's own words"), False),
        (TimeoutError(), True),
        (ValueError("UNKNOWN: CURL error SSL peer certificate was not OK"), True),
        *(
            (ValueError(f"{text} [http_response_code='{code}']"), refused)
            for text in ("Bad Request", "UNKNOWN: Error reading gs://b/x")
            for code, refused in (
                *((c, True) for c in (400, 402, 403, 405, 407, 429, 451, 500, 503)),
                *((c, False) for c in (404, 410, 412, 416)),
            )
        ),
        *(
            (of_bucket(HttpError({"code": code})), refused)
            for code, refused in ((400, True), (403, True), (503, True), (416, False))
        ),
        *(
            # TensorStore's status of a disk's error says less than its number.
            (ValueError(f"{code}: x [os_error_code='{number}' tensorstore]"), refused)
            for code, number, refused in (
                ("FAILED_PRECONDITION", errno.EBUSY, True),
                ("FAILED_PRECONDITION", errno.ENOTCONN, True),
                ("UNKNOWN", errno.EIO, False),
                ("UNKNOWN", errno.EBADMSG, False),
                ("NOT_FOUND", errno.ENOENT, False),
            )
        ),
        (of_bucket(ChecksumError("md5")), False),
        (of_bucket(IsADirectoryError("b/x")), False),
        (
            while_handling(
                PermissionError(13, "x", "/run/y"), "DATA_LOSS: tensorstore"
            ),
            False,
        ),
        (while_handling(PermissionError(13, "x", "/run/y"), "cannot open"), True),
    ],
)
def test_what_is_refused_is_not_damaged(error, refused):
    assert is_refused(error) == refused
    outer = ValueError("Failed to restore")
    outer.__cause__ = error
    assert is_refused(outer) == refused
    with pytest.raises(UserError, match="refused" if refused else "damaged"):
        with of_files(
            lambda reason: UserError("damaged"), lambda reason: UserError("refused")
        ):
            raise outer


def test_an_error_that_is_its_own_cause_ends():
    error = ValueError("UNAVAILABLE? no: a file")
    error.__cause__ = error
    assert not is_refused(error)
    assert not checkpoint.cluster.is_loss(error)
    assert buckets.status_of(error) is None
