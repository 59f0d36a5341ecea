"""The exact index: every dtype against scores summed in double, above all where 8-bit rows are nearly useless."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from stepcredit import _C
from stepcredit.retrieval import _vectors, int8
from stepcredit.retrieval.exact import PATHS, exact_search
from stepcredit.retrieval.index import DenseIndex
from stepcredit.retrieval.int8 import COARSE_LEVELS, COARSE_QUERIES, LEVELS, certified_search, quantize

WIDTH = 37


def exact(queries, vectors, k):
    """Scores and ids of all inner products, by numpy."""
    products = queries.double().numpy() @ vectors.double().numpy().T
    scores = products.astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.take_along_axis(scores, ids, 1)), torch.from_numpy(ids)


def normal(rows, width=WIDTH, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def compressed(rows, width=WIDTH):
    """Cosines between .7 and .9, as E5's are."""
    common = normal(1, width, 9)
    vectors = torch.nn.functional.normalize(common / common.norm() + 0.5 * normal(rows, width) / width**0.5)
    assert 0.7 < (vectors[:100] @ vectors[100:300].T).median() < 0.9
    return vectors


def adversarial():
    base = normal(1, WIDTH, 3)
    near = base + 1e-6 * normal(500)
    return {
        "normal": normal(1000),
        "compressed": compressed(1000),
        "one block": normal(64),
        "one row": normal(1),
        "a row more than a block": normal(65),
        "near duplicates": torch.cat([near, normal(300)]),
        "all the same": base.expand(700, -1).contiguous(),
        "zero rows": torch.cat([torch.zeros(70, WIDTH), normal(30), torch.zeros(70, WIDTH)]),
        "all zero": torch.zeros(70, WIDTH),
        "huge norms": torch.cat([normal(300), 1e6 * normal(10), 1e15 * normal(3), normal(300)]),
        "tiny norms": torch.cat([1e-30 * normal(200), 1e-44 * normal(10), normal(3)]),
        "one huge component": torch.cat([normal(400, WIDTH - 1), 1e4 + normal(400, 1)], 1),
        "sums that overflow": torch.cat([normal(300), 3e19 * normal(100)]),
        "scores below the normal numbers": 1e-25 * normal(200),
        "neighbours in float32": torch.nextafter(base, torch.tensor(math.inf)).expand(90, -1).clone() * (1 + 2**-23),
        "wide": normal(200, 771),
        "narrow": normal(200, 1),
    }


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("name", adversarial())
def test_hits_are_those_of_scores_summed_in_double(name, dtype, monkeypatch):
    monkeypatch.setattr(_vectors, "SLICE", 128)
    vectors = adversarial()[name]
    index = DenseIndex.build(vectors, dtype)
    stored = vectors.to(torch.bfloat16) if dtype == "bfloat16" else vectors
    special = torch.cat([vectors[-1:], 1e-20 * vectors[:1], 0 * vectors[:1]])
    many = torch.cat([normal(15, vectors.shape[1], 7), special])  # a panel and two more, enough for a coarse product
    for queries in (special, many):
        for k in (1, 3, 10, 200):
            hits = index.search(queries, k)
            scores, ids = exact(queries, stored, k)
            assert torch.equal(hits.ids, ids), k
            assert torch.equal(hits.scores, scores), k
            assert (hits.rescored >= min(k, len(vectors))).all()
            assert (hits.rescored <= len(vectors)).all()


@pytest.mark.parametrize("path", LEVELS)
def test_every_way_to_multiply_is_certified(path):
    if path > _C.int8_path:
        pytest.skip("this processor has no such instruction")
    for vectors in adversarial().values():
        all_queries = torch.cat([normal(COARSE_QUERIES + 3, vectors.shape[1], 7), vectors[:1]])
        rows, k = quantize(vectors), min(5, len(vectors))
        for queries in (all_queries, all_queries[-3:]):  # with a coarse product first, and without
            hits = certified_search(queries, rows, vectors, k, path=path)
            scores, ids = exact(queries, vectors, k)
            assert torch.equal(hits.ids, ids)
            assert torch.equal(hits.scores, scores)


@pytest.mark.skipif(not COARSE_LEVELS.keys() <= set(range(_C.int8_path + 1)), reason="no such instruction here")
@pytest.mark.parametrize("path", COARSE_LEVELS)
def test_a_coarse_product_first_changes_no_hit(path, monkeypatch):
    """Over blocks enough for it to be judged useful and useless: to the first queries few passages are near, to the
    others, among which coarse products do not tell much apart, most of them."""
    vectors = compressed(20_000, 100)  # whose groups are no multiple of those that are added at once
    vectors[7000:] = torch.nn.functional.normalize(vectors[7000] + 0.02 * normal(13_000, 100, 5))
    queries = torch.cat([vectors[:30], vectors[-30:]])
    rows = quantize(vectors)
    coarse = certified_search(queries, rows, vectors, 10, path=path)
    monkeypatch.setattr(int8, "COARSE_QUERIES", len(queries) + 1)
    fine = certified_search(queries, rows, vectors, 10, path=path)
    scores, ids = exact(queries, vectors, 10)
    for hits in (coarse, fine):
        assert torch.equal(hits.ids, ids)
        assert torch.equal(hits.scores, scores)


@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_multiply_floats_is_exact(path):
    if path > _C.float_path:
        pytest.skip("this processor has no such instruction")
    for vectors in adversarial().values():
        queries, k = torch.cat([normal(40, vectors.shape[1], 7), vectors[:1]]), min(5, len(vectors))
        hits = exact_search(queries, vectors, float(vectors.double().norm(dim=1).max()), k, path=path)
        scores, ids = exact(queries, vectors, k)
        assert torch.equal(hits.ids, ids)
        assert torch.equal(hits.scores, scores)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_more_candidates_than_may_wait_are_scored_on_the_way(dtype):
    """All rows may be hits by their bounds; the best come last, and many of them are equal."""
    base = torch.nn.functional.normalize(normal(1, WIDTH, 3))
    vectors = base * (1 + 1e-6 * torch.arange(20_000)[:, None] / 20_000)
    vectors[15_000:] = vectors[15_000]
    vectors = vectors.bfloat16() if dtype == "bfloat16" else vectors
    index = DenseIndex.build(vectors, dtype)
    for queries in (base, torch.cat([base] * 9), 0 * base):
        scores, ids = exact(queries[:1], vectors, 7)
        hits = index.search(queries, 7)
        assert torch.equal(hits.ids, ids.expand(len(queries), -1))
        assert torch.equal(hits.scores, scores.expand(len(queries), -1))
        assert (hits.rescored > 4096).all()


def test_float32_scores_few_rows_twice():
    vectors, queries = compressed(20_000, 384), compressed(20_300, 384)[-16:]
    for some in (queries, queries[:1]):
        assert DenseIndex.build(vectors).search(some, 3).rescored.max() < 40


def test_a_search_starts_no_more_threads_than_torch_may_use():
    """What multiplies has no threads of its own beside OpenMP's: one worker more a thread allowed, of each of the two
    runtimes of OpenMP, torch's and ours."""
    code = """
import os, torch
from stepcredit.retrieval.index import DenseIndex
vectors = torch.randn(2000, 64)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in ("float32", "int8", "bfloat16"):
        for queries in (1, 64):
            DenseIndex.build(vectors, dtype).search(vectors[:queries], 3)
    print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one, two = map(int, done.stdout.split())
    assert one == 0
    assert two <= 2


def test_bounds_hold_and_are_not_idle():
    """What is rescored is no more than what the certificate needs, and little of a corpus."""
    vectors, queries = compressed(20_000, 384), compressed(20_300, 384)[-16:]
    hits = DenseIndex.build(vectors, "int8").search(queries, 3)
    assert torch.equal(hits.ids, exact(queries, vectors, 3)[1])
    assert hits.rescored.max() < (400 if LEVELS[_C.int8_path] == 127 else 1000)  # queries of 8 or 7 bits
    rows = quantize(vectors)
    assert rows.nbytes < 0.3 * vectors.nbytes
    left_out = vectors.double() - rows.centre.double()
    whole = rows.rows.permute(0, 2, 1, 3).reshape(-1, 384)[: len(vectors)].double() - 128
    left_out -= whole * rows.scale[: len(vectors), None].double()
    assert (left_out.norm(dim=1) <= rows.error[: len(vectors)].double()).all()
    assert (left_out.norm(dim=1) > 0.99 * rows.error[: len(vectors)].double()).all()


def test_approximate_hits_only_when_allowed():
    vectors, queries = compressed(5000), compressed(5100)[-50:]
    index = DenseIndex.build(vectors, "int8")
    rough = index.search(queries, 10, allow_approximate=True)
    assert not rough.rescored.any()
    sure = index.search(queries, 10)
    assert not torch.equal(rough.scores, sure.scores)
    torch.testing.assert_close(rough.scores, sure.scores, atol=0.02, rtol=0)


@pytest.mark.parametrize("number", [1, 9, COARSE_QUERIES + 4])
def test_threads_change_nothing(number):
    vectors, queries = compressed(3000), normal(number)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([DenseIndex.build(vectors, dtype).search(queries, 7) for dtype in ("int8", "float32")])
    finally:
        torch.set_num_threads(threads)
    for one in found:
        for hits, first in zip(one, found[0], strict=True):
            assert torch.equal(hits.ids, first.ids)
            assert torch.equal(hits.scores, first.scores)
            if number < COARSE_QUERIES:  # which blocks coarse products leave out depends on where threads begin
                assert torch.equal(hits.rescored, first.rescored)


def test_more_ties_than_can_be_looked_at_in_one_go():
    vectors = torch.cat([normal(1, WIDTH, 2).expand(3000, -1), normal(100)])
    query = normal(1, WIDTH, 2)
    hits = DenseIndex.build(vectors).search(query, 5)
    assert hits.ids.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_streams_maps_and_folders_are_one(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(_vectors, "SLICE", 128)
    vectors, queries = normal(500), normal(4, seed=5)
    expected = DenseIndex.build(vectors, dtype).search(queries, 9)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(vectors.numpy().tobytes())
    mapped = np.memmap(raw, np.float32, "r", shape=(500, WIDTH))
    stream = [vectors[:200].numpy(), vectors[200:201], vectors[201:]]
    for number, source in enumerate((mapped, iter(stream), vectors.numpy(), vectors.double())):
        for path in (None, tmp_path / f"{number}"):
            again = iter(stream) if number == 1 else source
            index = DenseIndex.build(again, dtype, path)
            hits = index.search(queries, 9)
            assert torch.equal(hits.ids, expected.ids)
            assert torch.equal(hits.scores, expected.scores)
            assert (len(index), index.width, index.dtype) == (500, WIDTH, dtype)
        opened = DenseIndex.open(tmp_path / f"{number}")
        assert opened.dtype == dtype
        assert torch.equal(opened.search(queries, 9).ids, expected.ids)
        DenseIndex.verify(tmp_path / f"{number}")


def test_arrays_are_not_copied():
    vectors = normal(100)
    assert DenseIndex.build(vectors, "int8").vectors.data_ptr() == vectors.data_ptr()
    assert DenseIndex.build(vectors.numpy()).vectors.data_ptr() == vectors.data_ptr()


@pytest.fixture
def folder(tmp_path):
    DenseIndex.build(normal(100), "int8", tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("name", ["vectors.bin", "rows.bin", "bounds.bin"])
def test_truncated_and_corrupt_files_are_named(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(whole) - 1} bytes; it had {len(whole)} bytes and sha256 "):
        DenseIndex.open(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        DenseIndex.open(folder)
    (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    DenseIndex.open(folder)
    with pytest.raises(ValueError, match=f"{name} is damaged: it has sha256 .*; what was written had sha256 "):
        DenseIndex.verify(folder)


def test_manifests_are_checked(folder):
    manifest = folder / "manifest.json"
    good = manifest.read_text()
    for text, message in [
        (good.replace('"version": 2', '"version": 7'), r"is of format \('stepcredit-index', 7\)"),
        ("{", "is not the manifest of an index"),
        ("[]", "is not the manifest of an index"),
        (json.dumps({"rows": 3}), "is not the manifest of an index"),
        (good.replace('"vectors"', '"vector"'), "holds no vectors"),
        (good.replace('"longest"', '"longer"'), "does not describe its vectors: KeyError"),
        (good.replace('"int8"', '"int4"'), "does not describe its vectors: KeyError"),
        (
            good.replace('"count": 100', '"count": 99'),
            "vectors.bin has 14800 bytes; 99x37 numbers of torch.float32 have",
        ),
        (
            good.replace('"block": 64', '"block": 32'),
            "rows.bin has the layout .*32.* reads .*64.*: build the index again",
        ),
        (good.replace('"bounds.bin"', '"bound.bin"'), "lists no file bounds.bin"),
    ]:
        assert text != good
        manifest.write_text(text)
        with pytest.raises(ValueError, match=message):
            DenseIndex.open(folder)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="holds no index"):
        DenseIndex.open(folder)


def test_a_folder_is_not_overwritten(folder):
    with pytest.raises(ValueError, match="already holds an index"):
        DenseIndex.build(normal(3), path=folder)


def test_bad_vectors_are_named(tmp_path):
    broken = normal(300)
    broken[257, 3] = math.nan
    for source in (broken, iter([broken[:200], broken[200:]])):
        with pytest.raises(ValueError, match=r"vectors\[257\] is not finite"):
            DenseIndex.build(source)
    for vectors, error, message in [
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "dtype torch.int64; it must be floating"),
        (np.zeros((3, 4), np.int32), TypeError, "dtype int32; it must be floating"),
        (torch.zeros(0, 4), ValueError, "vectors is empty"),
        (iter(()), ValueError, "vectors is empty"),
        (torch.zeros(4), ValueError, r"shape \(4,\); it must be \[P, D\]"),
        (iter([normal(3), normal(3, 5)]), ValueError, "from row 3 have width 5, those before 37"),
    ]:
        with pytest.raises(error, match=message):
            DenseIndex.build(vectors)
    with pytest.raises(ValueError, match="vectors is empty"):
        DenseIndex.build(iter(()), path=tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int4'; it must be one of"):
        DenseIndex.build(normal(3), "int4")


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_bad_queries_are_named(dtype):
    index, queries = DenseIndex.build(normal(100), dtype), normal(3)
    assert index.search(queries[:0], 3).ids.shape == (0, 3)
    assert index.search(queries, 1000).ids.shape == (3, 100)
    infinite, undefined = queries.clone(), queries.clone()
    infinite[1, 2], undefined[2, 0] = math.inf, math.nan
    for wrong, k, message in [
        (queries.double(), 3, "queries has dtype torch.float64"),
        (queries[:, 1:], 3, r"queries has shape \(3, 36\); it must be \[Q, 37\]"),
        (queries[0], 3, r"queries has shape \(37,\)"),
        (infinite, 3, r"queries\[1\] is not finite"),
        (undefined, 3, r"queries\[2\] is not finite"),
        (queries, 0, "k is 0; it must be at least 1 and at most 1024"),
        (queries, 1025, "k is 1025"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(wrong, k)
