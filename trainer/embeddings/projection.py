"""Puts embeddings into a plane, once: t-SNE of their first principal components.

openTSNE runs FIt-SNE (Linderman et al., 2019), which takes time in proportion to the points, and
says after each step how far it is; it needs no compiler at run time. With principal components as
the start it keeps what is far apart as UMAP does (Kobak and Linderman, 2021).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cavmae.atomic_write import atomic_write
from cavmae.console import Bar

COMPONENTS = 50
PERPLEXITY = 30
EARLY_STEPS, STEPS = 250, 500
REPORT_STEPS = 10
FEW = 10_000
"""Points below this take seconds on one core; more cores would wait for each other."""
FEWEST = 10
"""Points below this have too few neighbours: they lie on a circle, as equal ones do."""


def projection(vectors: np.ndarray, path: Path, report: Callable[[float], object]) -> np.ndarray:
    """Read the places of points from a file, or compute them and write it.

    Args:
        vectors: (points, width) float32.
        path: the .npy file; its folder is made.
        report: is called with the share that is done.

    Returns:
        (points, 2) float32, from -1 to 1.

    Raises:
        ValueError: the file is damaged.
        OSError: it can't be written.
    """
    if path.exists():
        try:
            places = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it") from error
        if places.shape != (len(vectors), 2):
            raise ValueError(f"{path} has places for other clips; remove it")
        return places
    places = _computed(vectors, report)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, places)
    return places


def _computed(vectors: np.ndarray, report: Callable[[float], object]) -> np.ndarray:
    report(0.0)  # neighbours are found before the first step
    from openTSNE import TSNE
    from sklearn.decomposition import PCA

    if np.ptp(vectors, axis=0).max() == 0 or len(vectors) < FEWEST:
        angle = 2 * np.pi * np.arange(len(vectors)) / len(vectors)
        return _centred(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    size = min(COMPONENTS, *vectors.shape)
    components = PCA(size, svd_solver="randomized", random_state=0).fit_transform(vectors)
    start = np.zeros((len(vectors), 2))
    start[:, : min(2, size)] = components[:, :2]
    steps = 0

    with Bar("projecting", EARLY_STEPS + STEPS, "steps") as bar:

        def count(*_: object) -> None:
            nonlocal steps
            steps += REPORT_STEPS
            bar.count(REPORT_STEPS)
            report(steps / (EARLY_STEPS + STEPS))

        noise = np.random.default_rng(0).normal(size=start.shape)  # moves equal clips apart
        made = TSNE(
            perplexity=min(PERPLEXITY, (len(vectors) - 1) // 3),
            initialization=(start / start[:, 0].std() + 0.01 * noise) * 1e-4,
            early_exaggeration_iter=EARLY_STEPS,
            n_iter=STEPS,
            n_jobs=1 if len(vectors) < FEW else -1,
            random_state=0,
            callbacks=count,
            callbacks_every_iters=REPORT_STEPS,
        ).fit(components)
    return _centred(np.asarray(made))


def _centred(places: np.ndarray) -> np.ndarray:
    centre = (places.min(0) + places.max(0)) / 2
    return ((places - centre) / (np.abs(places - centre).max() or 1.0)).astype(np.float32)
