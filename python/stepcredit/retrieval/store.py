"""The passages of a corpus on disk: one data file and its offsets, memory-mapped.

`passages.bin` holds one record a passage: the byte lengths of id and title (two little-endian uint32), then id, title
and text in UTF-8. `passages.offsets` holds where each record begins and, last, where the file ends, as little-endian
int64 [P + 1]. `manifest.json` beside them has their sizes and checksums.
"""

from __future__ import annotations

import mmap
import operator
import struct
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np

from stepcredit.retrieval import Passage
from stepcredit.retrieval._corpus import Corpus, open_corpus
from stepcredit.retrieval._manifest import GrowingFile, Manifest, check_size, read_manifest

DATA = "passages.bin"
OFFSETS = "passages.offsets"

_HEADER = struct.Struct("<II")
#: Bytes of records between two points from which an interrupted build can go on.
_DURABLE_EVERY = 64 << 20
#: Passages between two calls of a progress callback.
_REPORT_EVERY = 4096


class PassageStore(Sequence[Passage]):
    """The passages of an index directory, read from disk when asked for; a slice is a list.

    Opening takes the same milliseconds whatever the size. Ids are unique: the build saw to it. Threads may share it.
    It may be pickled; the copy opens the files anew.

    Args:
        directory: what `python -m stepcredit.retrieval build` wrote.
        manifest: its manifest, where that is at hand; None reads it.

    Raises:
        FileNotFoundError: no index there, or an unfinished one.
        ValueError: a file is missing or has another size than when it was written; on access, a damaged record.
    """

    def __init__(self, directory: str | Path, manifest: Manifest | None = None) -> None:
        self.directory = Path(directory)
        if manifest is None:
            manifest = read_manifest(self.directory)
        count = manifest["passages"]["count"]
        with (
            open(check_size(self.directory, manifest, DATA), "rb") as data,
            open(check_size(self.directory, manifest, OFFSETS), "rb") as offsets,
        ):
            self._data = mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ)
            ends = mmap.mmap(offsets.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = np.frombuffer(ends, dtype="<i8")
        if len(self) != count or self._offsets[0] != 0 or self._offsets[-1] != len(self._data):
            raise ValueError(f"{self.directory / OFFSETS} is damaged: it does not divide {DATA} into {count} passages")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self._passage(position) for position in range(*index.indices(len(self)))]
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"passage {position} of {len(self)}")
        return self._passage(position % len(self))

    def _passage(self, position: int) -> Passage:
        start, stop = self._offsets[position : position + 2].tolist()
        record = self._data[start:stop] if 0 <= start <= stop else b""
        try:
            id_bytes, title_bytes = _HEADER.unpack_from(record)
            title, text = _HEADER.size + id_bytes, _HEADER.size + id_bytes + title_bytes
            if text > len(record) or stop > len(self._data):
                raise ValueError("its fields are longer than the record")
            return Passage(record[_HEADER.size : title].decode(), record[title:text].decode(), record[text:].decode())
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"{self.directory / DATA}: passage {position} (bytes {start} to {stop}) is damaged: {error}. "
                "`python -m stepcredit.retrieval inspect --verify` compares the checksums"
            ) from error

    def __reduce__(self) -> tuple[type[PassageStore], tuple[Path]]:
        return PassageStore, (self.directory,)


def write_store(
    corpus: Corpus,
    directory: Path,
    manifest: Manifest,
    save: Callable[[], None],
    progress: Callable[[int], None],
) -> None:
    """Stream a corpus into the store of `directory`, or go on with that where an earlier call was interrupted.

    Args:
        corpus: unchanged since the store was begun, and opened at `manifest`'s cursor where there is one.
        directory: exists.
        manifest: gets the store's counts and files; where it has some already, the store goes on behind them.
        save: called whenever all that `manifest` says is on disk.
        progress: called now and then with the corpus' units read since.

    Raises:
        ValueError: a bad record, no record at all, or an id that occurs twice; file and lines are named.
    """
    passages, files = manifest["passages"], manifest["files"]
    passages.setdefault("empty_texts", 0)
    with (
        GrowingFile(directory / DATA, files.get(DATA)) as data,
        GrowingFile(directory / OFFSETS, files.get(OFFSETS)) as offsets,
    ):
        if not offsets.bytes:
            offsets.write(struct.pack("<q", 0))
        hashes = array("q")
        if passages["count"]:
            hashes.extend(_hash(passage.id) for passage in PassageStore(directory, manifest))
        records: list[bytes] = []
        ends = array("q")
        end = data.bytes
        reported = corpus.position

        def flush() -> None:
            data.write(b"".join(records))
            offsets.write(np.array(ends, dtype="<i8").tobytes())
            passages["count"] += len(records)
            passages["cursor"] = corpus.cursor
            files[DATA], files[OFFSETS] = data.sync(), offsets.sync()
            save()
            records.clear()
            del ends[:]

        for passage in corpus:
            record = pack(passage)
            records.append(record)
            end += len(record)
            ends.append(end)
            hashes.append(_hash(passage.id))
            passages["empty_texts"] += not passage.text.strip()
            if end - data.bytes >= _DURABLE_EVERY:
                flush()
            if len(hashes) % _REPORT_EVERY == 0:
                progress(corpus.position - reported)
                reported = corpus.position
        flush()
        progress(corpus.position - reported)
    if not passages["count"]:
        raise ValueError(f"{corpus.path}: the corpus has no passages")
    _refuse_duplicates(hashes, PassageStore(directory, manifest), corpus)
    del passages["cursor"]
    passages |= {"blank_lines": corpus.line - passages["count"], "replaced_invalid": corpus.replaced}


def pack(passage: Passage) -> bytes:
    """A passage as a record of `passages.bin`."""
    identity, title = passage.id.encode(), passage.title.encode()
    return b"".join((_HEADER.pack(len(identity), len(title)), identity, title, passage.text.encode()))


#: 64 bits of an id, for this process only.
_hash: Callable[[str], int] = hash


def _refuse_duplicates(hashes: array[int], store: PassageStore, corpus: Corpus) -> None:
    """ValueError when an id occurs twice. Memory: 30 bytes a passage, and 24 for each that repeats."""
    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    values = values[order]
    later = np.flatnonzero(values[1:] == values[:-1]) + 1
    for at in later[np.argsort(order[later])]:  # in file order, so that the first repetition is named
        identity = store[order[at]].id
        before = at - 1
        while before >= 0 and values[before] == values[at]:
            if store[order[before]].id == identity:
                first, second = _lines(corpus, [int(order[before]), int(order[at])])
                raise ValueError(f"{corpus.path}:{second}: field 'id' repeats {identity!r} of line {first}")
            before -= 1


def _lines(corpus: Corpus, positions: Sequence[int]) -> list[int]:
    """The lines of passages, which only a corpus without blank lines has in their positions."""
    again = open_corpus(corpus.path, replace_invalid=corpus.replace_invalid)
    wanted = set(positions)
    return [again.line for position, _ in enumerate(islice(again, max(wanted) + 1)) if position in wanted]
