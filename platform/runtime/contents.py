"""What files hold, told by a hash: a run's inputs (launcher/resume.py), and a checkpoint, whose manifest is written
last and verified before anything of it is used.

    checkpoint.write ── write_manifest ──► step_N/manifest.json ──► damage_of ──► launcher: go on, or refuse by name

XXH3 of 128 bits finds damage and exchange; it is no defence against somebody who wants it to find nothing. Streamed,
several files at a time: reading costs more than hashing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
PIECE = 1 << 22
THREADS = 4


def digest(file: Path) -> str:
    """XXH3-128 of a file's bytes, 32 hexadecimal digits. OSError where it cannot be read."""
    state = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as data:
        while piece := data.read(PIECE):
            state.update(piece)
    return state.hexdigest()


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """``digest`` of each, side by side."""
    listed = list(files)
    with ThreadPoolExecutor(THREADS, "digest") as pool:
        return dict(zip(listed, pool.map(digest, listed), strict=True))


def write_manifest(folder: Path) -> None:
    """List every file of a folder, with its size and hash, in its manifest.json."""
    found = digests(sorted(path for path in folder.rglob("*") if path.is_file()))
    files = {str(path.relative_to(folder)): [path.stat().st_size, said] for path, said in found.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": files, "checksum": _of_list(files)}), encoding="utf-8")


def damage_of(folder: Path) -> str:
    """What is wrong with a folder that has a manifest, in words that name the file; "" where all is as it was written.

    Files that the manifest does not list say nothing.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {folder / name: (int(size), str(said)) for name, (size, said) in manifest["files"].items()}
        whole = manifest["checksum"] == _of_list(manifest["files"])
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read ({type(error).__name__})"
    if not whole:
        return f"{folder / MANIFEST} is not as it was written"
    for path, (size, _) in files.items():
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} bytes and was written with {size:,}"
    found = digests(files)
    return next((f"{path} is not as it was written" for path in files if found[path] != files[path][1]), "")


def cut_short(file: Path) -> str:
    """What is wrong with the length of a safetensors file; "" where its header and its bytes agree."""
    size = file.stat().st_size
    with file.open("rb") as data:
        try:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(length)) if length < size else {"": {"data_offsets": [0, length]}}
            ends = [told["data_offsets"][1] for name, told in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, struct.error):
            return f"{file} has no safetensors header"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"{file} has {size:,} bytes, its header tells of {expected:,}"


def _of_list(files: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
