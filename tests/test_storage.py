"""Paths on this machine and in buckets are read and written alike."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import bucket_server as servers
import pytest
from etils import epath

from gamayun_jax.config import UserError
from gamayun_jax.data import files
from gamayun_jax.storage import as_path, is_bucket, listed_once, move, remove_tree


def test_addresses(bucket):
    assert as_path("runs/x") == Path("runs/x")
    assert type(as_path(Path("gs-like/x"))) is type(Path())
    for given in ("gs://runs/a/b", Path("gs://runs/a/b"), "gs://runs//a/b/"):
        path = as_path(given)  # pathlib takes one slash away
        assert str(path) == "gs://runs/a/b"
        assert is_bucket(path)
        assert path.absolute() == path.resolve() == path
        assert str(path.parent.parent / "c.json") == "gs://runs/c.json"
        assert as_path(path) == path
        assert type(epath.Path("gs://runs/a/b")) is type(path)  # JAX's and Orbax's, too
    assert as_path("gs://runs").name == "runs"
    with pytest.raises(
        UserError, match=r"--out hdfs://x/y is an address.*gs://, s3://"
    ):
        as_path("hdfs://x/y", "--out ")
    with pytest.raises(UserError, match=r"gs://a/x: 'a' is no bucket's name"):
        as_path("gs://a/x")


def test_a_missing_package_is_named():
    code = """
import sys
sys.modules["gcsfs"] = None
from gamayun_jax.storage import as_path
as_path("gs://runs/a", "--workdir ")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "gamayun_jax.fields.UserError: --workdir gs://runs/a: " in run.stderr
    assert "pip install 'gamayun_jax[buckets]'" in run.stderr


@pytest.mark.parametrize("there", ["here", "bucket", "amazon_bucket"])
def test_files_and_folders(there, tmp_path, request):
    root = tmp_path if there == "here" else as_path(request.getfixturevalue(there))
    folder, path = root / "a", root / "a" / "x.json"
    assert not path.exists()
    assert not path.is_file()
    assert not folder.is_dir()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    with pytest.raises(UserError, match="is missing"):
        files.read_json(path)
    files.write_json(path, {"a": "é"})
    assert files.read_json(path) == {"a": "é"}
    assert path.read_text("utf-8") == '{\n "a": "é"\n}\n'
    assert files.file_sha256(path) == files.file_sha256(str(path))
    assert path.is_file()
    assert not path.is_dir()
    assert folder.is_dir()
    with path.open("rb") as f:
        f.seek(2)
        assert f.read(3) == b' "a'
    with contextlib.suppress(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": "é"}
    with pytest.raises(UserError, match="exists already"):
        files.check_new(folder)
    with files.new_folder(root / "b") as temporary:
        (temporary / "items").mkdir()
        (temporary / "items" / "1.jsonl").write_text("{}\n")
        (temporary / "config.json").write_text("{}")
    assert sorted(p.name for p in (root / "b").iterdir()) == ["config.json", "items"]
    found = [p.name for p in (root / "b").rglob("*.json*") if p.is_file()]
    assert sorted(found) == ["1.jsonl", "config.json"]
    (root / "c").mkdir(parents=True, exist_ok=True)
    move(root / "b", root / "c" / "d")
    assert (root / "c" / "d" / "items" / "1.jsonl").read_bytes() == b"{}\n"
    assert not (root / "b").exists()
    assert [p.name for p in (root / "c" / "d").glob("*.json")] == ["config.json"]
    path.unlink()
    path.unlink(missing_ok=True)
    assert not path.exists()
    remove_tree(root / "c")
    remove_tree(root / "c")
    assert not (root / "c").exists()


def test_what_completes_a_folder_comes_last(bucket, bucket_server):
    out = as_path(bucket) / "model"
    with files.new_folder(out) as temporary:
        for name in ("config.json", "a/1.bin", "z.txt", "manifest.json"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text("x")
    written = [Path(name).name for kind, name in bucket_server.log if kind == "write"]
    assert set(written[:2]) == {"1.bin", "z.txt"}
    assert set(written[2:]) == {"config.json", "manifest.json"}


def test_a_folder_is_listed_once_in_a_block(bucket, bucket_server):
    """By that it is known what is there and what is not, until it is changed; other
    processes' changes are seen again after the block."""
    root = as_path(bucket) / "d"
    other = type(root.fs)(skip_instance_cache=True, **root.fs.storage_options)
    (root / "a").write_text("a")
    (root / "b" / "c").write_text("c")

    def look():
        return (
            [(root / name).exists() for name in ("a", "b", "b/c", "x", "b/x", "x/y")],
            [(root / name).is_dir() for name in ("", "a", "b")],
            sorted(p.name for p in root.iterdir()),
            (root / "a").size(),
            (root / "a").read_text(),
        )

    alone = look()
    assert alone[0] == [True, True, True, False, False, False]
    with listed_once(root):
        assert look() == alone
        bucket_server.reset()
        assert look() == alone
        assert sum(bucket_server.counts.values()) <= 3  # "x" is no folder; and "a"
        with listed_once(root / "b"):
            (root / "x").write_text("x")
            (root / "b" / "c").unlink()
        assert (root / "x").exists()
        assert not (root / "b" / "c").exists()
        remove_tree(root / "b")
        move(root / "x", root / "y")
        assert sorted(p.name for p in root.iterdir()) == ["a", "y"]
        other.pipe_file(str(root / "z"), b"z")
    assert (root / "z").exists()
    with pytest.raises(ValueError, match="inside"), listed_once(root):
        raise ValueError("inside")
    other.rm_file(str(root / "z"))
    assert not (root / "z").exists()


MARKED = """
import json, os, urllib.parse, urllib.request
from gamayun_jax.buckets import listed_sizes
from gamayun_jax.storage import as_path
from gamayun_jax.training.run_folder import RunFolder, check_folder, steps_in

root = as_path("gs://runs/new")
for name in ("new/", "new/checkpoints/", "new/new/"):
    where = os.environ["STORAGE_EMULATOR_HOST"] + "/upload/storage/v1/b/runs/o"
    url = f"{where}?uploadType=media&name={urllib.parse.quote(name, safe='')}"
    urllib.request.urlopen(urllib.request.Request(url, b"", method="POST")).close()
found = [[str(p) for p in root.iterdir()], steps_in(root / "checkpoints")]
check_folder(root)
RunFolder(root).close()
(root / "x").write_text("x")
found += [sorted(str(p) for p in root.rglob("*")), list(listed_sizes(root))]
print(json.dumps(found))
"""


def test_an_empty_folder_that_the_console_made(tmp_path):
    """It is an object of no bytes, which is no file of the folder."""
    with servers.bucket_server(tmp_path, "memory") as proxy:
        env = {**os.environ, **servers.environment(proxy.url)}
        words = [sys.executable, "-c", MARKED]
        run = subprocess.run(words, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names, steps, below, sizes = json.loads(run.stdout)
    assert names == ["gs://runs/new/checkpoints", "gs://runs/new/new"]
    assert steps == []
    assert below == sizes == ["gs://runs/new/x"]


WAITS = """
import sys, time
from pathlib import Path
from gamayun_jax.storage import process_folder
(process_folder() / "half").write_text("x")
print(process_folder(), flush=True)
if sys.argv[1:]:
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path):
    """And nothing of one that lives, or of one that starts at the same moment."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", WAITS]

    def start():
        command = [*words, "waits"]
        life = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        return life, life.stdout

    lives = [start() for _ in range(4)]
    folders = [Path(out.readline().strip()) for _, out in lives]
    assert len(set(folders)) == 4
    assert all((folder / "half").exists() for folder in folders)
    lives[0][0].send_signal(signal.SIGKILL)
    lives[0][0].wait()
    assert folders[0].exists()
    run = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert not folders[0].exists()
    assert all((folder / "half").exists() for folder in folders[1:])
    assert not Path(run.stdout.strip()).exists()  # it ended well
    for life, out in lives:
        life.kill()
        life.wait()
        out.close()
    subprocess.run(words, env=env, capture_output=True, check=True)
    assert [list(root.iterdir()) for root in tmp_path.iterdir()] == [[]]


@pytest.mark.parametrize("what", ["folder", "nothing", "file"])
def test_a_folder_that_is_somebody_elses_is_not_used(tmp_path, what):
    """Nor what a link leads to, nor one that leads nowhere, nor a file."""
    ours = tmp_path / f"gamayun-{os.getuid()}-{platform.node()}"
    if what == "file":
        ours.write_text("")
    else:
        ours.symlink_to(tmp_path / "other")
    if what == "folder":
        (tmp_path / "other").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", WAITS]
    run = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    used = Path(run.stdout.strip()).parent
    assert used.name.startswith("gamayun-")
    assert used != ours
    assert not used.exists()  # it ended well
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").iterdir())
