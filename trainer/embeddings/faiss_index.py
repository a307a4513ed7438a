"""Nearest neighbours among many unit vectors by cosine; the only file that imports Faiss.

Exact search reads every vector, a piece at a time, and keeps nothing. An HNSW graph (Malkov and
Yashunin, 2018) answers from a part of them: it is built once, in memory, and then mapped from its
file, so that a query reads only the pages it visits. Equal vectors (silence, copies of a clip) are
one node: they would link to each other alone, and cut the rest off.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cavmae.atomic_write import atomic_write, write_json

LINKS = 32
"""Of a vector in each layer of the graph; twice as many in the lowest."""
BUILD_CANDIDATES, SEARCH_CANDIDATES = 200, 256
"""Smallest candidate lists (efConstruction and efSearch of HNSW)."""
EQUAL_STEPS = 1 << 12
"""Vectors are equal if their values are, rounded to one part in this: a clip that is embedded
twice differs by 1e-7, and the cosines of vectors that are merged by 1e-5 at most."""
RECALL_TOP, RECALL_QUERIES = 10, 200
"""Recall is measured among the nearest ten of this many vectors."""

Ranked = list[tuple[int, float]]
"""Row and cosine, best first."""

_faiss: Any = faiss  # completed when it is imported, which pyright does not see


def nearest(vectors: Iterable[np.ndarray], query: np.ndarray, top: int) -> Ranked:
    """Find the rows with the largest cosines among all vectors.

    Args:
        vectors: pieces of (rows, width) float32, of length 1.
        query: (width,) float32, of length 1.
        top: rows to find; there are as many or more.
    """
    best, first = _faiss.ResultHeap(1, top, keep_max=True), 0
    for some in vectors:
        cosines, rows = _faiss.knn(
            query[None], some, min(top, len(some)), _faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(cosines, rows + first)
        first += len(some)
    best.finalize()
    return _ranked(best.D, best.I)


def build_graph(
    vectors: Iterable[np.ndarray],
    width: int,
    path: Path,
    queries: Iterable[np.ndarray] | None = None,
) -> None:
    """Build the graph of vectors and measure its recall; it holds them in half precision.

    Three files are written atomically: the graph, `.npy` with the node of each row, and, last,
    `.json` with the number of rows and nodes and the recall.

    Args:
        vectors: pieces of (rows, width) float32, of length 1.
        width: of them.
        path: of the graph; its folder is made.
        queries: pieces like `vectors`, of what will be looked for; None: the vectors themselves.

    Raises:
        OSError: a file can't be written.
    """
    # Cosines of vectors in half precision are off by 1e-3 at most.
    graph = _faiss.IndexHNSWSQ(
        width, _faiss.ScalarQuantizer.QT_fp16, LINKS, _faiss.METRIC_INNER_PRODUCT
    )
    graph.hnsw.efConstruction = BUILD_CANDIDATES
    graph.is_trained = True  # half precision has nothing to learn
    node_of: dict[bytes, int] = {}
    nodes: list[int] = []
    for some in vectors:
        rounded = np.rint(some * EQUAL_STEPS).astype(np.int16)
        names = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rounded]
        some_nodes, first = np.unique(
            [node_of.setdefault(name, len(node_of)) for name in names], return_index=True
        )
        graph.add(some[first[some_nodes >= graph.ntotal]])
        nodes += [node_of[name] for name in names]
    recall = _recall(graph, queries)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(nodes))
    with atomic_write(path) as temporary:
        temporary.touch()  # Faiss does not say why it cannot open a file
        _faiss.write_index(graph, str(temporary))
    write_json(
        path.with_suffix(".json"),
        {"rows": len(nodes), "nodes": graph.ntotal, "recall_at_10": recall},
    )


def _recall(graph: Any, queries: Iterable[np.ndarray] | None) -> float:
    """Measure the share of the nearest nodes that the graph finds; ties count as found."""
    if queries is None:
        step = max(1, graph.ntotal // RECALL_QUERIES)
        sample = np.stack([graph.reconstruct(node) for node in range(0, graph.ntotal, step)])
    else:
        sample = np.concatenate([some[:: max(1, len(some) // RECALL_QUERIES)] for some in queries])
        sample = sample[:: max(1, len(sample) // RECALL_QUERIES)]
    top = min(RECALL_TOP, graph.ntotal)
    graph.hnsw.efSearch = SEARCH_CANDIDATES
    exact, _ = graph.storage.search(sample, top)
    found, _ = graph.search(sample, top)
    return float(np.mean(found >= exact[:, -1:] - 1e-6))


def nearest_by_graph(path: Path, query: np.ndarray, top: int) -> Ranked:
    """Find rows with large cosines by the graph; rows that are equal have the same cosine.

    Args:
        path: of a graph that `build_graph` wrote.
        query: (width,) float32, of length 1.
        top: rows to find.

    Raises:
        ValueError: a file is damaged.
    """
    try:
        graph = _faiss.read_index(str(path), _faiss.IO_FLAG_MMAP_IFC)
        nodes = np.load(path.with_suffix(".npy"))
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} or its .npy is damaged; remove {path.parent}, and it is built again"
        ) from error
    graph.hnsw.efSearch = max(SEARCH_CANDIDATES, 2 * top)
    ranked: Ranked = []
    for node, cosine in _ranked(*graph.search(query[None], top)):
        rows = np.flatnonzero(nodes == node)[: top - len(ranked)]
        ranked += [(row, cosine) for row in rows.tolist()]
    return ranked


def _ranked(cosines: np.ndarray, rows: np.ndarray) -> Ranked:
    """Convert (1, top) arrays; Faiss pads with row -1."""
    pairs = zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
    return [(row, cosine) for row, cosine in pairs if row >= 0]
