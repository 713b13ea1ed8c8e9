"""Copies of a corpus folder, to a bucket, from one, or to another disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.data.corpus import read_manifest
from gamayun_jax.data.files import (
    atomic,
    check_new,
    file_sha256,
    first_line,
    write_text,
)
from gamayun_jax.storage import (
    as_path,
    download_file,
    is_bucket,
    sizes_below,
    upload_file,
)

MANIFEST, COPYING = "manifest.json", "copying.json"
FILES_AT_ONCE = 8


def copy_corpus(
    folder: AnyPath, out: AnyPath, log: Callable[[str], None] = print
) -> int:
    """Copy a corpus folder; go on where a copy of it was interrupted.

    Every file with a SHA-256 in the manifest is compared with it on the way, sizes in
    the end, and the manifest comes last: until then there is no corpus in `out`, only
    the manifest's text as copying.json, by which the next start knows what it goes on
    with. Files of the right size are there: each is written whole or not at all.

    Returns:
      bytes of the corpus.

    Raises:
      UserError: no corpus, a damaged file, something else in `out`.
    """
    folder, out = as_path(folder, "corpus "), as_path(out)
    if is_bucket(folder) and is_bucket(out):
        raise UserError(
            f"{folder} -> {out}: between buckets copies `gcloud storage cp -r`, or "
            "`aws s3 sync`, which move nothing through this machine"
        )
    hashes = known_hashes(read_manifest(folder))
    text = (folder / MANIFEST).read_text("utf-8")
    sizes = file_sizes(folder)
    del sizes[MANIFEST]
    begin_copy(out, text)
    there = file_sizes(out)
    missing = [name for name, size in sizes.items() if there.get(name) != size]
    total, done, said = sum(sizes[n] for n in missing), 0, 0
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        copies = pool.map(
            lambda name: copy_file(folder / name, out / name, hashes.get(name)),
            missing,
        )
        for name, _ in zip(missing, copies, strict=True):
            done += sizes[name]
            if 10 * done // max(total, 1) > said:
                said = 10 * done // total
                log(f"{done:,} of {total:,} bytes are copied")
    there = file_sizes(out)
    if wrong := [name for name, size in sizes.items() if there.get(name) != size]:
        raise UserError(
            f"{out / wrong[0]} has not the size that was written: does another process "
            "write there? Run the same command again"
        )
    write_text(out / MANIFEST, text)
    (out / COPYING).unlink(missing_ok=True)
    return sum(sizes.values())


def known_hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """File of a corpus -> its SHA-256."""
    hashes = {
        row["file"]: row["sha256"]
        for source in manifest["sources"].values()
        for row in source["shards"]
    }
    return hashes | {
        f"heldout/{name}.{language}.jsonl": row["sha256"]
        for name, held in manifest["heldout"].items()
        for language, row in held["languages"].items()
    }


def file_sizes(folder: Path) -> dict[str, int]:
    """File below a folder -> bytes; without hidden files, which builds leave."""
    if is_bucket(folder):
        found = sizes_below(folder)
    else:
        found = {str(p): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    names = {path[len(str(folder)) + 1 :]: size for path, size in found.items()}
    return {
        name: size
        for name, size in sorted(names.items())
        if name != COPYING and not any(p.startswith(".") for p in name.split("/"))
    }


def begin_copy(out: Path, manifest: str) -> None:
    """Write down what is copied to `out`; UserError if something else is there."""
    for name in (COPYING, MANIFEST):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if (out / name).read_text("utf-8") != manifest:
                raise UserError(
                    f"there is another corpus in {out}, or a part of one: give a new "
                    "folder, or delete it"
                )
            break
    else:
        check_new(out)
    write_text(out / COPYING, manifest)


def copy_file(source: Path, target: Path, sha256: str | None) -> None:
    """Copy a file whole or not at all; UserError if its bytes are not its hash's."""
    try:
        if is_bucket(target):
            check_hash(source, source, sha256)
            upload_file(source, target)
            return
        with atomic(target) as temporary:
            if is_bucket(source):
                download_file(source, temporary)
            else:
                shutil.copyfile(source, temporary)
            check_hash(temporary, source, sha256)
    except OSError as e:
        raise UserError(
            f"{source} -> {target}: {e.strerror or first_line(e)}: run the same "
            "command again, it goes on"
        ) from e


def check_hash(path: Path, source: Path, sha256: str | None) -> None:
    """Raise UserError, which names `source`, if a file has not this SHA-256."""
    if sha256 not in (None, file_sha256(path)):
        raise UserError(
            f"{source} has another SHA-256 than its manifest says: build the corpus "
            "again, or copy it from where it is whole"
        )
