"""Builds an index directory: the passage store first, then the vectors, then BM25's files; resumable throughout."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from stepcredit.retrieval._corpus import open_corpus
from stepcredit.retrieval._manifest import (
    ENCODER_FIELDS,
    MANIFEST,
    UNFINISHED,
    GrowingFile,
    Manifest,
    check_size,
    locked,
    new_manifest,
    read_manifest,
    sha256_of,
    sync_directory,
    sync_file,
    write_json,
)
from stepcredit.retrieval._pace import progress_task
from stepcredit.retrieval.directory import BM25_DIRECTORY, VECTORS, check_vectors, map_vectors
from stepcredit.retrieval.store import PassageStore, write_store
from stepcredit.train.progress import Reporter

if TYPE_CHECKING:
    from stepcredit.retrieval.encoder import Encoder

#: Passages encoded between two points from which an interrupted build can go on.
_SLICE = 4096
_START_OVER = "Delete the directory to start over, or choose another"


def build_index(
    corpus: str | Path,
    directory: str | Path,
    *,
    encoder: Encoder | None = None,
    dtype: str = "float32",
    bm25: bool = False,
    replace_invalid: bool = False,
    reporter: Reporter | None = None,
) -> Manifest:
    """Build the index of a corpus, or go on where an earlier call was interrupted, even by a kill.

    What the directory holds already is kept: a second call adds vectors to a store, a complete index is left as it is.
    Neither passages nor vectors are ever in memory as a whole; the words of BM25 are, until its files are written.

    Args:
        corpus: a JSON Lines or parquet file; `_corpus.py` has the fields.
        directory: made when missing.
        encoder: gives every passage a vector; None leaves the vectors out.
        dtype: of the stored vectors, "float32" or "bfloat16": half the size, each number rounded to 8 bits.
        bm25: index the words too, with `bm25s`.
        replace_invalid: text that is not UTF-8 becomes U+FFFD and is counted, instead of an error.
        reporter: shows progress; None shows nothing.

    Returns:
        The manifest: what the index holds, and what was odd about the passages and how often.

    Raises:
        ValueError: a bad record (file and line named); a corpus or settings other than those the directory was begun
            with; a file that changed since; a vector that is not finite.
        OSError: the corpus is missing, the disk is too small, or another process builds in the directory.
        ImportError: a package is missing; the message has the pip command.
    """
    if dtype not in VECTORS:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(VECTORS)}")
    path = Path(corpus)
    if not path.is_file():
        raise FileNotFoundError(f"corpus {str(path)!r} is not a file")
    if bm25:
        from stepcredit.retrieval.bm25 import require_bm25s

        require_bm25s()
    build = _Build(path, Path(directory), reporter or Reporter(Console(quiet=True)))
    with locked(build.directory):
        build.begin(replace_invalid)
        begun = build.manifest.get("vectors")
        if encoder is None and begun and not begun["complete"]:
            raise ValueError(f"encoder is None, and the vectors of {begun['encoder']} in {directory} are not complete")
        store = build.store()
        if encoder is not None:
            build.vectors(store, encoder, dtype)
        if bm25:
            build.bm25(store)
        build.finish()
    return build.manifest


class _Build:
    """The steps of one build, and the manifest of what is on disk so far."""

    def __init__(self, corpus: Path, directory: Path, reporter: Reporter) -> None:
        self.corpus = corpus
        self.directory = directory
        self.reporter = reporter
        self.manifest: Manifest = {}
        self.stamp = _stamp(corpus)

    def begin(self, replace_invalid: bool) -> None:
        """Read or make the manifest; refuse another corpus than the one that the directory was begun with."""
        with progress_task(self.reporter, f"checksum of {self.corpus.name}", self.stamp[0], "bytes") as pace:
            digest = sha256_of(self.corpus, pace)
        source = {"bytes": self.stamp[0], "sha256": digest, "replace_invalid": replace_invalid}
        name = next((name for name in (UNFINISHED, MANIFEST) if (self.directory / name).exists()), None)
        if name is None:
            self.manifest = new_manifest({"name": self.corpus.name, **source})
            return
        self.manifest = read_manifest(self.directory, name)
        begun = self.manifest["source"]
        for field, value in source.items():
            if begun[field] != value:
                raise ValueError(
                    f"{self.corpus} has {field}={value}, and {self.directory} was begun with {begun['name']}, "
                    f"which had {field}={begun[field]}. {_START_OVER}"
                )

    def save(self) -> None:
        write_json(self.directory / UNFINISHED, self.manifest)

    def finish(self) -> None:
        """The last step: the manifest takes its name."""
        if (self.directory / UNFINISHED).exists():
            (self.directory / UNFINISHED).replace(self.directory / MANIFEST)
            sync_directory(self.directory)

    def store(self) -> PassageStore:
        """The passage store, written now as far as it is missing."""
        passages = self.manifest["passages"]
        if not passages["complete"]:
            replace_invalid = self.manifest["source"]["replace_invalid"]
            corpus = open_corpus(self.corpus, replace_invalid=replace_invalid, **passages.get("cursor", {}))
            with progress_task(self.reporter, "passages", corpus.size, corpus.unit, corpus.position) as pace:
                write_store(corpus, self.directory, self.manifest, self.save, pace)
            if _stamp(self.corpus) != self.stamp:
                raise ValueError(f"{self.corpus} changed while it was read. {_START_OVER}")
            passages["complete"] = True
            self.save()
        return PassageStore(self.directory, self.manifest)

    def vectors(self, store: PassageStore, encoder: Encoder, dtype: str) -> None:
        """The vectors, encoded now as far as they are missing."""
        name, _, element = VECTORS[dtype]
        section, files = self._section(encoder, dtype), self.manifest["files"]
        if section["complete"]:
            check_size(self.directory, self.manifest, name)
            return
        missing = (len(store) - section["count"]) * encoder.width * element.itemsize
        free = shutil.disk_usage(self.directory).free
        if free < missing:
            raise OSError(errno.ENOSPC, f"{missing} bytes of vectors are to be written and {free} are free", name)
        with (
            GrowingFile(self.directory / name, files.get(name)) as file,
            progress_task(self.reporter, "vectors", len(store), "passages", section["count"]) as pace,
        ):
            if section["count"]:
                check_vectors(self.directory, encoder, store, map_vectors(file.path, dtype, encoder.width))
            while section["count"] < len(store):
                start, cut = section["count"], encoder.truncated
                passages = store[start : start + _SLICE]
                vectors = encoder.encode_passages(passages, pace)
                bad = vectors.isfinite().all(dim=1).logical_not().nonzero()
                if len(bad):
                    row = int(bad[0])
                    raise ValueError(f"passage {start + row} ({passages[row].id!r}) gets a vector with NaN or infinity")
                file.write(vectors.to("cpu", element).contiguous().view(torch.uint8).numpy().tobytes())
                files[name] = file.sync()
                section["count"] += len(passages)
                section["truncated"] += encoder.truncated - cut
                section["complete"] = section["count"] == len(store)
                self.save()

    def _section(self, encoder: Encoder, dtype: str) -> dict[str, Any]:
        """What the manifest says of the vectors; refuses other settings than those they were begun with."""
        settings = {
            "encoder": encoder.name,
            "dtype": dtype,
            **{field: getattr(encoder, field) for field in (*ENCODER_FIELDS, "max_length")},
        }
        section: dict[str, Any] = self.manifest.setdefault(
            "vectors", {**settings, "count": 0, "truncated": 0, "complete": False}
        )
        for field, value in settings.items():
            if section[field] != value:
                raise ValueError(
                    f"{field} is {value!r}, and the vectors in {self.directory} were begun with {section[field]!r}. "
                    + _START_OVER
                )
        return section

    def bm25(self, store: PassageStore) -> None:
        """The files of BM25; one that was interrupted starts over."""
        if "bm25" in self.manifest:
            return
        from stepcredit.retrieval.bm25 import BM25Retriever

        folder = self.directory / BM25_DIRECTORY
        shutil.rmtree(folder, ignore_errors=True)
        with progress_task(self.reporter, "BM25", len(store), "passages") as pace:
            retriever = BM25Retriever(store)
            retriever.save(folder)
            for file in sorted(folder.iterdir()):
                self.manifest["files"][f"{BM25_DIRECTORY}/{file.name}"] = sync_file(file)
            pace(len(store))
        self.manifest["bm25"] = {"language": retriever.language, "stemmed": retriever.stemmed}
        self.save()


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
