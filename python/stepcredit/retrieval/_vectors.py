"""The vectors of an index: taken slice by slice, checked, kept in memory or in files that are mapped.

A folder holds `vectors.bin` (P x D, row-major, little-endian), for 8-bit rows also `rows.bin` and `bounds.bin` (scale,
error, norm, centre), and, written last, `dense.json`, which says what they hold, with a checksum for each.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from stepcredit.retrieval.int8 import Int8Rows

#: Rows that are converted, checked or written at a time: 200 MB of float32 at a width of 768.
SLICE = 1 << 16

FORMAT = 1
VECTORS, ROWS, BOUNDS, MANIFEST = "vectors.bin", "rows.bin", "bounds.bin", "dense.json"


class Vectors(NamedTuple):
    """Vectors [P, D] and the length of the longest of them."""

    data: Tensor
    longest: float


def parts(vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Slices of a tensor with their first rows."""
    for first in range(0, len(vectors), SLICE):
        yield first, vectors[first : first + SLICE]


def gather(vectors: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], kind: torch.dtype) -> Vectors:
    """In memory; what is of this dtype already is kept, not copied."""
    if isinstance(vectors, (Tensor, np.ndarray)):
        whole = _tensor(vectors)
        longest = max((_longest(part, first) for first, part in parts(whole)), default=0.0)
    else:
        slices = list(_slices(vectors, kind))
        longest = max((length for _, length in slices), default=0.0)
        whole = torch.cat([part for part, _ in slices]) if slices else torch.empty(0, 0)
    _require_rows(len(whole))
    return Vectors(whole.to(kind).contiguous(), longest)


def write(folder: Path, vectors: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], kind: torch.dtype) -> Vectors:
    """Into `vectors.bin`, mapped. Without a manifest, which `finish` writes, the folder is no index yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} already holds an index: {folder / MANIFEST} exists")
    rows, width, longest = 0, 0, 0.0
    with open(folder / VECTORS, "wb") as file:
        for part, length in _slices(vectors, kind):
            file.write(_bytes(part))
            rows, width, longest = rows + len(part), part.shape[1], max(longest, length)
    _require_rows(rows)
    return Vectors(_mapped(folder / VECTORS, kind, (rows, width)), longest)


def finish(folder: Path, vectors: Vectors, rows: Int8Rows | None) -> Int8Rows | None:
    """Writes the 8-bit rows, if there are any, and the manifest; returns the rows mapped."""
    if rows is not None:
        (folder / ROWS).write_bytes(_bytes(rows.rows))
        (folder / BOUNDS).write_bytes(b"".join(map(_bytes, (rows.scale, rows.error, rows.norm, rows.centre))))
    files = [VECTORS] if rows is None else [VECTORS, ROWS, BOUNDS]
    manifest = {
        "format": FORMAT,
        "rows": len(vectors.data),
        "width": vectors.data.shape[1],
        "dtype": str(vectors.data.dtype).removeprefix("torch."),
        "longest": vectors.longest,
        "sha256": {name: _checksum(folder / name) for name in files},
    }
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(folder / MANIFEST)
    return read(folder)[1]


def read(folder: Path) -> tuple[Vectors, Int8Rows | None]:
    """What `finish` finished, mapped."""
    from stepcredit.retrieval.int8 import BLOCK, GROUP, Int8Rows

    manifest = _manifest(folder)
    count, width = manifest["rows"], manifest["width"]
    data = _mapped(folder / VECTORS, getattr(torch, manifest["dtype"]), (count, width))
    vectors = Vectors(data, manifest["longest"])
    if ROWS not in manifest["sha256"]:
        return vectors, None
    blocks, groups = -(-count // BLOCK), -(-width // GROUP)
    rows = _mapped(folder / ROWS, torch.uint8, (blocks, groups, BLOCK, GROUP))
    bounds = _mapped(folder / BOUNDS, torch.float32, (3 * blocks * BLOCK + width,))
    scale, error, norm, centre = bounds.split([blocks * BLOCK] * 3 + [width])
    return vectors, Int8Rows(rows, scale, error, norm, centre, count)


def verify(folder: Path) -> None:
    """Raises ValueError naming a file that is not what was written."""
    for name, expected in _manifest(folder)["sha256"].items():
        if (found := _checksum(folder / name)) != expected:
            raise ValueError(f"{folder / name} is corrupt: its SHA-256 is {found}, {MANIFEST} says {expected}")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no index: {path} does not exist")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of an index: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}; this version of StepCredit reads {FORMAT}")
    return manifest


def _mapped(path: Path, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    expected = math.prod(shape) * kind.itemsize
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        size = "is missing" if found is None else f"has {found} bytes"
        raise ValueError(f"{path} {size}; an index of shape {shape} in {kind} has {expected}")
    # Not shared: what a caller writes to it stays out of the file.
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=kind).view(shape)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data


def _slices(
    vectors: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], kind: torch.dtype
) -> Iterator[tuple[Tensor, float]]:
    """Slices in this dtype, checked, and the length of each one's longest vector."""
    given = [vectors] if isinstance(vectors, (Tensor, np.ndarray)) else vectors
    rows, width = 0, None
    for one in given:
        tensor = _tensor(one, rows)
        if width is not None and tensor.shape[1] != width:
            raise ValueError(f"vectors from row {rows} have width {tensor.shape[1]}, those before {width}")
        width = tensor.shape[1]
        for first, part in parts(tensor):
            yield part.to(kind), _longest(part, rows + first)
        rows += len(tensor)


def _tensor(vectors: Tensor | np.ndarray, row: int = 0) -> Tensor:
    """As a tensor [n, D]; of arrays one that shares their memory where it can."""
    where = f"vectors from row {row}" if row else "vectors"
    if isinstance(vectors, np.ndarray):
        if not np.issubdtype(vectors.dtype, np.floating):
            raise TypeError(f"{where} have dtype {vectors.dtype}; it must be floating")
        with warnings.catch_warnings():
            # Of arrays that cannot be written to, such as mapped files; nothing here writes.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            vectors = torch.from_numpy(np.ascontiguousarray(vectors))
    if not vectors.is_floating_point():
        raise TypeError(f"{where} have dtype {vectors.dtype}; it must be floating")
    if vectors.dim() != 2:
        raise ValueError(f"{where} have shape {tuple(vectors.shape)}; it must be [P, D]")
    return vectors.detach()


def _longest(part: Tensor, first: int) -> float:
    lengths = part.double().norm(dim=1) if len(part) else part.new_zeros(1)
    if not bool(lengths.isfinite().all()):
        raise ValueError(f"vectors[{first + int((~lengths.isfinite()).nonzero()[0])}] is not finite")
    return float(lengths.max())


def _require_rows(count: int) -> None:
    if not count:
        raise ValueError("vectors is empty: an index needs at least one row")
