"""Deinterlaces the frames of a video that has interlaced ones, with ffmpeg's yadif."""

from collections import deque
from collections.abc import Iterator

import av
import av.filter
from av.error import BlockingIOError as NothingYet
from av.error import EOFError as NoMore


class Deinterlacer:
    """Returns one progressive frame for each frame, in order; needs the next to finish one.

    Frames that are not marked as interlaced pass unchanged, and at once before the first that is.
    """

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._format: tuple[int, int, str] | None = None
        self._times: deque[tuple[float | None, float]] = deque()

    def frames(
        self, frame: av.VideoFrame, time: float | None, shown_seconds: float
    ) -> Iterator[tuple[av.VideoFrame, float | None, float]]:
        """Yield what is ready, with the times that were given for it."""
        source = (frame.width, frame.height, frame.format.name)
        if self._graph is not None and source != self._format:
            yield from self.rest()
        if self._graph is None:
            if not frame.interlaced_frame:
                yield frame, time, shown_seconds
                return
            self._format, self._graph = source, _yadif(frame)
        self._times.append((time, shown_seconds))
        self._graph.vpush(frame)
        yield from self._ready()

    def rest(self) -> Iterator[tuple[av.VideoFrame, float | None, float]]:
        """Yield what is left at the end of the video."""
        if self._graph is not None:
            self._graph.vpush(None)
            yield from self._ready()
            self._graph = None

    def _ready(self) -> Iterator[tuple[av.VideoFrame, float | None, float]]:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.vpull()
            except (NothingYet, NoMore):
                return
            assert isinstance(frame, av.VideoFrame)
            yield frame, *self._times.popleft()


def _yadif(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    filters = [source, graph.add("yadif", "deint=interlaced"), graph.add("buffersink")]
    graph.link_nodes(*filters).configure()
    return graph
