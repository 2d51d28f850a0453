"""A folder that is either whole or not there: checksums of its files, and a rename at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


class Damaged(Exception):
    """A folder is not what was written; the message names the file."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Folder to write into, which gets its name when all of it is on the disk.

    A process killed meanwhile leaves ``folder.partial`` behind, until the next folder beside it is
    written; an error not even that. A folder of the same name is replaced.
    """
    for left in folder.parent.glob("*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        write_manifest(partial)
        for path in (*partial.iterdir(), partial):
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        flush(folder.parent)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path) -> None:
    """``manifest.json``: size in bytes and SHA-256 of every file of a folder."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def check_manifest(folder: Path) -> None:
    """Raise Damaged, with the reason, where a folder is not as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                raise Damaged(
                    f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
                )
            if _fingerprint(path) != expected:
                raise Damaged(f"{path} has been altered: its SHA-256 is another")
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder / MANIFEST} cannot be understood: {error}") from error


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    flush(partial)
    partial.replace(path)


def flush(path: Path) -> None:
    """Put a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
