"""Files by a stranger: one line says what is wrong, nothing is written, nothing grows.

Config files are code. Everything else is data: corpus folders, documents,
checkpoints, run folders, Hugging Face folders.
"""

import ast
import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import meta_of, syntax_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gamayun_jax.config import SourceConfig, UserError, from_json, to_json
from gamayun_jax.data import documents, inputs
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.files import read_json
from gamayun_jax.evaluate import tasks
from gamayun_jax.interop import huggingface
from gamayun_jax.training import checkpoint

FUZZ = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,  # the same examples in every session
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x),
    max_leaves=12,
)
KINDS = ("jsonl", "txt", "jsonl.gz", "jsonl.zst", "txt.zst", "parquet")
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
OUTSIDE = ("../../secret.safetensors", "/etc/passwd", "a/../../b.safetensors")
DEEP = "[" * 200_000 + "]" * 200_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000


def quietly(action, *args):
    """Only a UserError may come out of it, of one line."""
    try:
        return action(*args)
    except UserError as e:
        said = str(e)
    assert said
    assert "\n" not in said
    return None


def places(data, at=()):
    """Paths to every value inside of JSON data."""
    yield at
    if isinstance(data, dict):
        for k in data:
            yield from places(data[k], (*at, k))
    elif isinstance(data, list):
        for i in range(len(data)):
            yield from places(data[i], (*at, i))


def put(data, at, value):
    if not at:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[at[0]] = put(copy[at[0]], at[1:], value)
    return copy


@settings(FUZZ, max_examples=100)
@pytest.mark.slow
@given(data=st.data())
def test_manifests(data, config, tmp_path):
    folder = tmp_path / "corpus"
    if not folder.exists():
        shutil.copytree(config.data.corpus, folder)
    good = json.loads((Path(config.data.corpus) / "manifest.json").read_text())
    at = data.draw(st.sampled_from(sorted(places(good), key=str)))
    bad = put(good, at, data.draw(JSON))
    (folder / "manifest.json").write_text(json.dumps(bad))
    corpus = quietly(open_corpus, folder)
    if corpus is not None:
        quietly(corpus.examples, 64)
        quietly(corpus.tokenizer)
        for name in list(corpus.sources)[:1]:
            quietly(lambda name=name: corpus.records(name)[0])
        quietly(lambda: [corpus.heldout("udhr", k) for k in ("en", "ru")])


@pytest.mark.parametrize("text", [DEEP, DEEP_OBJECT, "", "[]", "1" * 10_000, "\0"])
def test_json_of_every_bad_kind(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError):
        read_json(path, "build again")
    with pytest.raises(UserError):
        from_json(text)


@FUZZ
@given(data=st.data())
def test_configs(data, config):
    good = json.loads(to_json(config))
    at = data.draw(st.sampled_from(sorted(places(good), key=str)))
    quietly(from_json, json.dumps(put(good, at, data.draw(JSON))))


@FUZZ
@given(body=st.binary(max_size=300), kind=st.sampled_from(KINDS))
@example(body=DEEP.encode(), kind="jsonl")
@example(body=b'{"text": "\\ud800"}\n', kind="jsonl")
@example(body=b"PAR1" + b"\xff" * 100 + b"PAR1", kind="parquet")
def test_documents(body, kind, tmp_path):
    for number, content in enumerate(
        (body, gzip.compress(body), zstandard.compress(body))
    ):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(content)
        found = quietly(
            lambda path=path: list(
                inputs.read_documents(SourceConfig("en/x", (str(path),)))
            )
        )
        for d in found or ():
            assert isinstance(d, documents.Document | documents.BadDocument)


def run_adversarial(*words, seconds):
    """No text takes longer than its size allows; what does is the last one printed."""
    script = [sys.executable, "-m", "tests.faults.adversarial", *words]
    try:
        run = subprocess.run(script, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as e:
        pytest.fail(f"not done in {seconds} s: {(e.stdout or b'').splitlines()[-1:]}")
    assert run.returncode == 0, run.stdout[-200:] + run.stderr[-2000:]
    assert run.stdout.endswith("done\n")


def test_texts_that_took_for_ever():
    """Each of these was quadratic: from a minute to days for a megabyte."""
    pairs = ("clean:spaces", "clean:marks", "normalise:half-width marks")
    more = ("normalised:full stops", "man:fonts of roff", "repeated_word:words")
    run_adversarial(*pairs, *more, seconds=120)


@pytest.mark.slow
def test_texts_of_every_adversarial_kind():
    run_adversarial(seconds=1800)


BOMB = """
import resource, sys
from gamayun_jax.data import inputs
from gamayun_jax.config import SourceConfig
soft = 3 << 30
resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
found = list(inputs.read_documents(SourceConfig("en/x", (sys.argv[1],))))
assert [type(d).__name__ for d in found] == ["BadDocument"], found
assert found[0].reason == "too long"
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_decompression_bombs(kind, tmp_path):
    """Two GB of one line in a few MB or KB: read in blocks, its beginning kept."""
    path = tmp_path / f"bomb.jsonl.{kind}"
    block = bytes(1 << 24)
    if kind == "gz":
        with gzip.open(path, "wb", compresslevel=1) as f:
            for _ in range(30):
                f.write(b"x" * len(block))
    else:
        packer = zstandard.ZstdCompressor(level=1)
        with open(path, "wb") as f, packer.stream_writer(f) as out:
            for _ in range(125):
                out.write(b"x" * len(block))
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small LLaMA folder, as others write it."""
    import jax
    import jax.numpy as jnp

    from gamayun_jax.config import ModelConfig
    from gamayun_jax.interop.hf_config import config_to_hf
    from gamayun_jax.interop.hf_weights import find_tensors, write_weights

    cfg = ModelConfig(
        vocab_size=32, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1,
        head_dim=4, d_ff=16, max_seq_len=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg)))

    from gamayun_jax.model.weights import abstract_params

    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(cfg))
    write_weights(params, cfg, folder, 10**9, "float32")
    assert find_tensors(folder)
    return folder


def attempt_import(folder, tmp_path):
    """Import it; nothing but the named folder may appear beside it."""
    out = tmp_path / "out"
    before = {p.name for p in tmp_path.iterdir()}
    result = quietly(huggingface.import_hf, folder, out)
    assert {p.name for p in tmp_path.iterdir()} - before <= {"out"}
    shutil.rmtree(out, ignore_errors=True)
    return result


@settings(FUZZ, max_examples=100)
@pytest.mark.slow
@given(data=st.data())
def test_hugging_face_configs(data, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    good = json.loads((model_folder / "config.json").read_text())
    at = data.draw(st.sampled_from(sorted(places(good), key=str)))
    bad = put(good, at, data.draw(JSON))
    (folder / "config.json").write_text(json.dumps(bad))
    attempt_import(folder, tmp_path)


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_safetensors(data, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    (path,) = folder.glob("*.safetensors")
    good = next(model_folder.glob("*.safetensors")).read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    kind = data.draw(st.sampled_from(["cut", "header", "length", "noise"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "length":
        bad = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + good[8:]
    elif kind == "noise":
        bad = data.draw(st.binary(max_size=200))
    else:
        header = json.loads(good[8 : 8 + size])
        at = data.draw(st.sampled_from(sorted(places(header), key=str)))
        text = json.dumps(put(header, at, data.draw(JSON))).encode()
        bad = struct.pack("<Q", len(text)) + text + good[8 + size :]
    path.write_bytes(bad)
    attempt_import(folder, tmp_path)


TASK = {
    "name": "t", "kind": "multiple_choice", "data": "t.{language}.jsonl",
    "prompt": "{question}", "choice": " {choice}", "shots": 1, "stop": ["x"],
}  # fmt: skip
ITEM = {"id": 1, "question": "a", "choices": ["b", "c"], "answer": 0}


def task_folder(folder, description, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "t.yaml").write_bytes(description)
    rows = [json.dumps({**ITEM, "split": "shots"}).encode(), *lines]
    (folder / "t.en.jsonl").write_bytes(b"\n".join(rows))
    return folder / "t.yaml"


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_descriptions_of_tasks(data, tmp_path):
    key = data.draw(st.sampled_from([*TASK, "metric", "unconditional", "baseline"]))
    braces = st.text("{}!:.[]_a*/\0\n", max_size=8)
    value = data.draw(JSON | braces | st.sampled_from(["{language}", "../t.jsonl"]))
    bad = json.dumps({**TASK, key: value}, ensure_ascii=False).encode(errors="replace")
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(bad) - 1))
        bad = bad[:at] + data.draw(st.binary(max_size=3)) + bad[at + 1 :]
    task = quietly(tasks.load_task, task_folder(tmp_path / "t", bad, b""))
    if task is not None:
        assert not set(task.name) & set("/\0")


ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        DEEP, ALIASES, "name: t\n" + MERGES, "name: 0x" + "f" * 20_000, "\0", "- 1",
        "name: 2001-99-99", "!!python/object/apply:os.mkdir [owned]", "? [a]\n: b",
        "#" * (2 << 20),
    ],
)  # fmt: skip
def test_descriptions_of_every_bad_kind(text, tmp_path):
    path = task_folder(tmp_path / "t", text.encode(), b"")
    with pytest.raises(UserError) as e:
        tasks.load_task(path)
    assert len(str(e.value)) < 1000
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["../x", "/tmp/x", "a/../../x", "..", "", "x/y"])
def test_the_results_of_a_task_stay_in_their_folder(value, tmp_path):
    """A task's name is that of the file of its results."""
    text = json.dumps({**TASK, "name": value})
    with pytest.raises(UserError, match="name is"):
        tasks.load_task(task_folder(tmp_path / "t", text.encode(), b""))


@FUZZ
@given(data=st.data())
@example(data=None)
def test_items_of_tasks(data, tmp_path):
    """Each line is an item, or set aside with its reason; a model can be asked all."""
    kinds = (b"\xff", b'{"id": 1, "question": "\\ud800"}', DEEP.encode(), b"1" * 9999)
    lines = list(kinds)
    if data is not None:
        at = data.draw(st.sampled_from(sorted(places(ITEM), key=str)))
        lines = [
            json.dumps(put(ITEM, at, data.draw(JSON))).encode(),
            data.draw(st.binary(max_size=60)).replace(b"\n", b""),
        ]
    text = json.dumps({**TASK, "shots": 1}).encode()
    task = quietly(tasks.load_task, task_folder(tmp_path / "t", text, *lines))
    if task is not None:
        items = [i for v in task.items.values() for i in v]
        aside = sum(map(len, task.set_aside.values()))
        assert len(items) + aside == sum(bool(x.strip()) for x in lines)
        for item in items:
            tasks.prompt_of(task, item).encode()
            tasks.with_choice(task, item, item["choices"][0]).encode()


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("text", [DEEP_OBJECT, "[]", "{", '{"model": {"vocab": []}}'])
def test_hugging_face_json(name, text, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if name == "tokenizer_config.json":
        (folder / "tokenizer.json").write_text("{}")
    (folder / name).write_text(text)
    with pytest.raises(UserError):
        huggingface.import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", OUTSIDE)
def test_an_index_that_points_elsewhere(target, model_folder, tmp_path):
    folder = tmp_path / "a" / "model"
    shutil.copytree(model_folder, folder)
    (path,) = folder.glob("*.safetensors")
    shutil.move(path, tmp_path / "secret.safetensors")
    weights = {"weight_map": {"model.embed_tokens.weight": target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(UserError):
        huggingface.import_hf(folder, tmp_path / "out")


@settings(FUZZ, max_examples=15)
@given(data=st.data())
def test_checkpoint_meta(data, tmp_path):
    import jax.numpy as jnp

    folder = tmp_path / "run" / "checkpoints"
    if not folder.exists():
        store = checkpoint.Checkpoints(folder)
        state = checkpoint.TrainState(jnp.int32(1), {"a": jnp.ones(3)}, {})
        store.save(state, meta_of(1))
        store.wait()
        store.close()
        path = max((folder / "1" / "meta").iterdir(), key=lambda p: p.stat().st_size)
        (tmp_path / "good").write_bytes(path.read_bytes())
    path = max((folder / "1" / "meta").iterdir(), key=lambda p: p.stat().st_size)
    good = (tmp_path / "good").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "json", "deep"]))
    path.write_bytes(
        {
            "flip": good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :],
            "cut": good[:at],
            "json": json.dumps(data.draw(JSON)).encode(),
            "deep": DEEP.encode(),
        }[kind]
    )
    store = checkpoint.Checkpoints(folder, read_only=True)
    with pytest.raises(UserError):
        store.meta(1)
    store.close()


def test_a_run_folder_that_is_a_link_elsewhere(config, tmp_path):
    """What a record's file points to is replaced, not written through."""
    from gamayun_jax.training.run_folder import RunFolder

    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "lineage.json", "metrics.jsonl", "parameters.txt"):
        os.symlink(victim, run / name)
    folder = RunFolder(run)
    folder.write("config.json", to_json(config))
    folder.write("lineage.json", {"a": 1})
    folder.write("parameters.txt", "x")
    folder.start_metrics(0)
    folder.add({"step": 1})
    folder.close()
    assert victim.read_text() == "precious"


def test_no_pickle():
    """Nothing in the package can unpickle a file."""
    for path in Path("gamayun_jax").rglob("*.py"):
        tree = syntax_of(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(a.name for a in node.names)}
                roots = {n.split(".")[0] for n in names if n}
                bad = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
                assert not roots & bad, path
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                assert not re.search(r"allow_pickle\s*=\s*True|torch\.load\(", text)
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "os.system"), (path, text)


def test_a_pickle_in_the_place_of_counts(config, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(config.data.corpus, folder)
    corpus = open_corpus(folder)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = folder / "sources" / "en/help" / "token_counts.npy"
    np.save(path, np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(UserError, match="counts.npy is damaged"):
        corpus.token_counts("en/help")
    assert not (tmp_path / "owned").exists()


def test_the_report_escapes(tmp_path):
    """Whatever a run folder says comes out as text."""
    from gamayun_jax.report import report

    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"name": evil, "languages": [evil]}))
    lineage = {
        "run": evil, "device": evil, "versions": {evil: evil},
        "events": [{evil: evil, "event": evil}],
        "checkpoints": [{"step": 1, "reason": evil, "stage": evil, "tokens": 1}],
        "stages": [{"name": evil, "start_tokens": 0, "end_tokens": 10}],
    }  # fmt: skip
    (run / "lineage.json").write_text(json.dumps(lineage))
    record = {"kind": "train", "step": 1, "tokens": 5, "stage": evil, "loss": 1.0,
              "nll": 1.0, "lr": 1e-3, "grad_norm": 1.0,
              "languages": {evil: {"nll": 1.0, "targets": 1, "tokens": 1}}}  # fmt: skip
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    quietly(report.write_report, [run], tmp_path / "out")
    page = tmp_path / "out" / "index.html"
    if page.exists():
        text = page.read_text()
        assert "<script>alert" not in text
        assert "<img src=x" not in text
