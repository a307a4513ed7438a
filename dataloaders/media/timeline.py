"""Gives the packets of a file one timeline, whose stamps a recording or a muxer may have broken.

Files joined byte by byte, and recordings whose clock wraps, start their time anew in the middle:
what follows is laid end to end, with one offset for all streams, so that sound and picture stay
together (as ffmpeg's command line does for formats with discontinuous time). A single stamp that is
far from those around it says nothing, and is taken off the packet.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
import av.container
import av.stream
from av.error import FFmpegError
from av.format import Flags

from cavmae.dataloaders.media.errors import error_text

BACKWARD_SECONDS = 0.1
"""Decoding times that go back by more have started anew (ffmpeg's limit)."""
FORWARD_SECONDS = 10.0
"""Times of all streams that jump ahead by more have started anew; a shorter jump is a pause."""
ODD_SECONDS = 0.5
"""A stamp further than this from its neighbours', which continue each other, is odd."""
LOOKED_AHEAD_PACKETS = 400
"""Packets read to see whether a jump stays, and where the other stream jumps."""
ODD_PACKETS = 8
"""Most packets in a row that an odd stamp can have."""
PROBES = 32
"""Positions in a file at which its time is looked at before a seek by time is trusted."""


@dataclass
class _Clock:
    """Time of one stream, in seconds."""

    expected: float | None = None
    """Decoding time of the next packet in the file's stamps."""
    end: float = 0.0
    """Latest presentation end on the continuous timeline."""
    offset: float = 0.0
    """Continuous time minus the file's stamps."""
    epoch: int = 0


@dataclass
class Timeline:
    """Reads the packets of some streams of a container, with continuous stamps.

    Args:
        container: open, at its start or where it was sought to.
        streams: those that are read.
    """

    container: av.container.InputContainer
    streams: Sequence[av.VideoStream | av.AudioStream]
    errors: list[str] = field(default_factory=list)
    """The error that ended reading before the end of the file, if one did."""
    joins: list[float] = field(default_factory=list)
    """Seconds on the continuous timeline at which time started anew."""
    odd_stamps: list[float] = field(default_factory=list)
    """Seconds, likewise, of packets whose stamps were taken off."""

    def __post_init__(self) -> None:
        self._clocks = {stream.index: _Clock() for stream in self.streams}
        self._ahead: deque[av.Packet] = deque()
        self._source = self._demuxed()
        self._offset = self._jump = 0.0

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets in the order of the file; an error that ends them is in `errors`."""
        while (packet := self._next()) is not None:
            self._place(packet)
            yield packet

    def _demuxed(self) -> Iterator[av.Packet]:
        read = -1
        while read != 0:  # After an error, what follows it may be readable.
            read = 0
            try:
                for packet in self.container.demux(*self.streams):
                    if packet.size or packet.dts is not None:  # The others flush decoders.
                        read += 1
                        yield packet
                return
            except FFmpegError as error:
                self.errors.append(error_text(error))
            except IndexError:  # PyAV knows only the streams that were there at the start.
                pass

    def _next(self) -> av.Packet | None:
        return self._ahead.popleft() if self._ahead else next(self._source, None)

    def _place(self, packet: av.Packet) -> None:
        stamp, clock = decoding_seconds(packet), self._clocks[packet.stream.index]
        if stamp is not None and clock.expected is not None:
            step = stamp - clock.expected
            if not -BACKWARD_SECONDS <= step <= ODD_SECONDS:
                self._look_ahead()
                if self._is_odd(packet, clock.expected):
                    self.odd_stamps.append(clock.expected + clock.offset)
                    packet.pts = packet.dts = None
                    clock.expected += packet_seconds(packet, packet.duration)
                    return
                self._follow_jump(packet, clock, step)
        ticks = round(clock.offset / float(packet.time_base or 1))
        packet.pts = None if packet.pts is None else packet.pts + ticks
        packet.dts = None if packet.dts is None else packet.dts + ticks
        if stamp is not None:
            clock.expected = stamp + packet_seconds(packet, packet.duration)
            clock.end = max(clock.end, _presentation_end(packet))

    def _look_ahead(self) -> None:
        while len(self._ahead) < LOOKED_AHEAD_PACKETS:
            if (packet := next(self._source, None)) is None:
                return
            self._ahead.append(packet)

    def _following(self, index: int) -> "_Stamped":
        """Decoding times and packets of a stream that were read ahead."""
        return [
            (stamp, packet)
            for packet in self._ahead
            if packet.stream.index == index and (stamp := decoding_seconds(packet)) is not None
        ]

    def _is_odd(self, packet: av.Packet, expected: float) -> bool:
        """Whether one of the next packets continues the time from before this one."""
        stamp = decoding_seconds(packet) or 0.0
        duration = packet_seconds(packet, packet.duration)
        for number, (later, _) in enumerate(self._following(packet.stream.index)[:ODD_PACKETS], 1):
            old = abs(later - expected - number * duration)
            if old < ODD_SECONDS and old < abs(later - stamp - number * duration):
                return abs(stamp - expected) > ODD_SECONDS
        return False

    def _follow_jump(self, packet: av.Packet, clock: _Clock, jump: float) -> None:
        """Start a new epoch if the other streams' time jumps alike, or join one that has begun."""
        if clock.epoch < len(self.joins):
            if _alike(jump, self._jump):
                clock.epoch, clock.offset = len(self.joins), self._offset
            return
        if 0 < jump <= FORWARD_SECONDS:
            return  # A pause, or a picture that is shown for long.
        own, _ = _until_jump(self._following(packet.stream.index), _decoding_end(packet), jump)
        ends, starts = [clock.end], [_presentation_start(later) for later in (packet, *own)]
        for index, other in self._clocks.items():
            if index == packet.stream.index:
                continue
            following = self._following(index)
            before, after = _until_jump(following, other.expected, jump)
            ends += [other.end, *(_presentation_end(later) + other.offset for later in before)]
            if not after:
                if following or jump > 0:
                    return  # Only this stream's time jumps: an overlap, or wrong stamps.
                continue
            last = before[-1] if before else None
            came_from = other.expected if last is None else _decoding_end(last)
            if came_from is None or not _alike(jump, after[0][0] - came_from):
                return  # Frames in decoding order, shortly before the time starts anew.
            new, _ = _until_jump(after, None, jump)
            starts += [_presentation_start(later) for later in new]
        self.joins.append(max(ends))
        self._jump, self._offset = jump, max(ends) - min(starts)
        clock.epoch, clock.offset = len(self.joins), self._offset


_Stamped = list[tuple[float, av.Packet]]


def _until_jump(
    following: _Stamped, expected: float | None, jump: float
) -> tuple[list[av.Packet], _Stamped]:
    """The packets up to one whose time jumps like another stream's, and the rest from there."""
    packets = []
    for number, (stamp, packet) in enumerate(following):
        if expected is not None and _alike(stamp - expected, jump):
            return packets, following[number:]
        packets.append(packet)
        expected = _decoding_end(packet)
    return packets, []


def _alike(step: float, jump: float) -> bool:
    """Whether a step has the direction of a jump, and half its size: frames that are stored in
    decoding order step back, too."""
    return step * jump > 0 and abs(step) > abs(jump) / 2


def flush_packet(stream: av.VideoStream | av.AudioStream) -> av.Packet:
    """A packet that makes the decoder give what it holds."""
    packet = av.Packet()
    packet.stream = stream
    if stream.time_base is not None:
        packet.time_base = stream.time_base
    return packet


def decoding_seconds(packet: av.Packet) -> float | None:
    """Decoding time of a packet in seconds; of sound also its presentation time."""
    stamp = packet.dts
    if stamp is None and packet.stream.type == "audio":
        stamp = packet.pts
    return None if stamp is None or packet.time_base is None else float(stamp * packet.time_base)


def time_starts_anew(
    container: av.container.InputContainer, stream: av.VideoStream | av.AudioStream
) -> bool:
    """Whether a seek by time cannot be trusted, since a format that is searched by its stamps has
    stamps that do not ascend.

    Leaves the container at another position.
    """
    if not container.format.flags & Flags.ts_discont.value:
        return False
    last = float("-inf")
    for probe in range(PROBES):
        try:
            container.seek(container.size * probe // PROBES, unsupported_byte_offset=True)
            packet = next(container.demux(stream), None)
        except FFmpegError:
            return True
        stamp = None if packet is None else decoding_seconds(packet)
        if stamp is not None:
            if stamp < last - BACKWARD_SECONDS:
                return True
            last = max(last, stamp)
    return False


def packet_seconds(packet: av.Packet, ticks: int | None) -> float:
    """Ticks of a packet's time base in seconds; unknown ones are 0."""
    return float((ticks or 0) * (packet.time_base or 0))


def _decoding_end(packet: av.Packet) -> float:
    return (decoding_seconds(packet) or 0.0) + packet_seconds(packet, packet.duration)


def _presentation_start(packet: av.Packet) -> float:
    return packet_seconds(packet, packet.dts if packet.pts is None else packet.pts)


def _presentation_end(packet: av.Packet) -> float:
    return _presentation_start(packet) + packet_seconds(packet, packet.duration)
