"""Nearest neighbours among many unit vectors by cosine; the only file that imports Faiss.

Exact search reads every vector, a piece at a time, and keeps nothing. An HNSW graph (Malkov and
Yashunin, 2018) answers from a part of them: it is built once, in memory, and then mapped from its
file, so that a query reads only the pages it visits.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from cavmae.atomic_write import atomic_write

LINKS = 32
"""Of a vector in each layer of the graph; twice as many in the lowest."""
BUILD_CANDIDATES, SEARCH_CANDIDATES = 200, 256
"""Smallest candidate lists (efConstruction and efSearch of HNSW)."""

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


def build_graph(vectors: Iterable[np.ndarray], width: int, path: Path) -> None:
    """Build the graph of vectors and write it atomically; it holds them in half precision.

    Args:
        vectors: pieces of (rows, width) float32, of length 1.
        width: of them.
        path: of the graph; its folder is made.

    Raises:
        OSError: it can't be written.
    """
    # Cosines of vectors in half precision are off by 1e-3 at most.
    graph = _faiss.IndexHNSWSQ(
        width, _faiss.ScalarQuantizer.QT_fp16, LINKS, _faiss.METRIC_INNER_PRODUCT
    )
    graph.hnsw.efConstruction = BUILD_CANDIDATES
    graph.is_trained = True  # half precision has nothing to learn
    for some in vectors:
        graph.add(some)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.touch()  # Faiss does not say why it cannot open a file
        _faiss.write_index(graph, str(temporary))


def nearest_by_graph(path: Path, query: np.ndarray, top: int) -> Ranked:
    """Find rows with large cosines by the graph.

    Args:
        path: of a graph that `build_graph` wrote.
        query: (width,) float32, of length 1.
        top: rows to find.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        graph = _faiss.read_index(str(path), _faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged; remove it, and it is built again") from error
    graph.hnsw.efSearch = max(SEARCH_CANDIDATES, 2 * top)
    return _ranked(*graph.search(query[None], top))


def _ranked(cosines: np.ndarray, rows: np.ndarray) -> Ranked:
    """Convert (1, top) arrays; Faiss pads with row -1."""
    pairs = zip(rows[0].tolist(), cosines[0].tolist(), strict=True)
    return [(row, cosine) for row, cosine in pairs if row >= 0]
