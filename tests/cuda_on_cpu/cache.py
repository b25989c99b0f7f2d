"""What compilers make, kept until a file of the project that went into it changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_once(
    folder: Path, name: str, made_by: str, suffix: str, make: Callable[[Path, Path], None]
) -> Path:
    """The product of an earlier build if all that went into it is the same, else of a new one.

    Args:
        folder: where products are kept.
        name: of the product; it gets a part for its content, since the dynamic loader takes files
            of one name for one library.
        made_by: all but the files of the project that decides what comes out.
        suffix: of the product.
        make: writes a product to the first path and, as ``-MMD`` does, what went into it to the
            second.
    """
    record = folder / f"{name}.inputs.json"
    if record.exists():
        facts = json.loads(record.read_text())
        product = folder / facts["product"]
        same = facts["made_by"] == made_by and facts["digest"] == _digest(facts["inputs"])
        if same and product.exists():
            return product
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        target, listing = Path(room, f"product{suffix}"), Path(room, "product.d")
        inputs = _make_of_files_at_rest(make, target, listing)
        digest = _digest(inputs)
        product = folder / f"{name}-{digest[:12]}{suffix}"
        for old in folder.glob(f"{name}-????????????{suffix}"):
            old.unlink(missing_ok=True)
        os.replace(target, product)
        facts = {"product": product.name, "made_by": made_by, "inputs": inputs, "digest": digest}
        Path(room, record.name).write_text(json.dumps(facts, indent=1))
        os.replace(Path(room, record.name), record)
    return product


def _make_of_files_at_rest(
    make: Callable[[Path, Path], None], target: Path, listing: Path
) -> list[str]:
    """What went into a product; made again where a file was saved in the meantime."""
    while True:
        started = time.time()
        make(target, listing)
        inputs = _own_files(listing.read_text())
        if not any((ROOT / name).stat().st_mtime >= started for name in inputs):
            return inputs


def _digest(inputs: list[str]) -> str:
    """Of the contents of files, or of the lack of one."""
    contents = hashlib.sha256()
    for name in inputs:
        path = ROOT / name
        contents.update(name.encode() + (path.read_bytes() if path.exists() else b"\0missing"))
    return contents.hexdigest()


def _own_files(listing: str) -> list[str]:
    """Files of this project in what ``-MMD`` lists."""
    words = re.findall(r"(?:\\ |\S)+", listing.replace("\\\n", " ").partition(": ")[2])
    paths = [Path(word.replace("\\ ", " ")).resolve() for word in words]
    return sorted({str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)})
