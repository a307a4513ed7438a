"""The faults of clips, and of what ranks write while they train: a clip that never ends in a
reader, journals that a power cut tore, a log that blocks.
"""

import dataclasses
import io
import json
import os
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cavmae.atomic_write import read_json, write_json
from cavmae.benchmarks.faults.faulted_run import FaultedRun
from cavmae.benchmarks.faults.injection import quarantined
from cavmae.benchmarks.faults.observed_rank import order_nan
from cavmae.benchmarks.faults.outcome import NOTICED_WITHIN_SECONDS, Row
from cavmae.benchmarks.faults.runs import CLIPS, INTERVAL, Bench
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.dataloaders.loading.quarantine import journal_folder
from cavmae.dataloaders.loading.reader import DECODE_SECONDS
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.writer import ShardWriter
from cavmae.trainer.config.configs import WatchdogConfig

ENDLESS_FRAMES = 200_000
ENDLESS_SIDE = 4096
"""Pixels of the picture that each of those frames repeats; a core takes 1.4 ms or more for one, and
minutes for all."""
QUICK = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
TIMESCALE = 100_000_000
"""Of its time stamps: all frames come within two milliseconds, before any that can be drawn."""
SOUND_HZ = 16000


def clip_hangs_reader(bench: Bench, name: str) -> Row:
    """Put a clip that takes many minutes to decode among videos that readers decode; each reader
    has its time limit, and the clip is tried alone for twice as long before it is blamed."""
    tier = synthetic_shards(bench.work / "originals", CLIPS, tier="original")
    endless = replace_first_video(tier, endless_video())
    data = dataclasses.replace(bench.config(name).data, train=str(tier))
    config = bench.config(name, data=data, watchdog=WatchdogConfig())
    run = FaultedRun(bench, config, bench.plain)
    run.fault_is_now()
    run.wait_until_noticed(lambda: quarantined(run.run_dir))
    run.attempt.finish()
    return run.row(
        resumes=False,
        expected=bench.without((endless,), data=data),
        noticed_allowed=NOTICED_WITHIN_SECONDS + 3 * DECODE_SECONDS,
    )


def endless_video() -> bytes:
    """Encode a still picture, and repeat the packet that says that nothing has changed."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libvpx-vp9", options=QUICK)
        assert isinstance(video, av.VideoStream)
        video.width = video.height = ENDLESS_SIDE
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = Fraction(1, TIMESCALE)
        sound = container.add_stream("aac", rate=SOUND_HZ, layout="mono")
        assert isinstance(sound, av.AudioStream)
        gray = np.full((ENDLESS_SIDE * 3 // 2, ENDLESS_SIDE), 128, np.uint8)
        packets = []
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(gray, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, TIMESCALE)
            packets += video.encode(frame)
        first, unchanged = [bytes(packet) for packet in (packets + video.encode(None))[:2]]
        for number in range(ENDLESS_FRAMES):
            packet = av.Packet(unchanged if number else first)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, TIMESCALE), video
            packet.is_keyframe = not number
            container.mux(packet)
        silence = np.zeros((1, 2 * SOUND_HZ), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        samples.sample_rate = SOUND_HZ
        container.mux([*sound.encode(samples), *sound.encode(None)])
    return file.getvalue()


def replace_first_video(tier: Path, video: bytes) -> str:
    """Put a video in place of that of a set's first clip; returns the clip's id.

    Args:
        tier: packed originals.
        video: bytes of a file.
    """
    shards = ShardSet(tier)
    writer = ShardWriter(tier, shards.shard_id(0))
    for sample in range(shards.sizes[0]):
        members = {name: shards.member(0, sample, name) for name in shards.members}
        if sample == 0:
            members["source"] = video
            description = json.loads(members["json"])
            description["crc32"]["source"] = zlib.crc32(video)
            members["json"] = json.dumps(description).encode()
        writer.add(shards.sample_id(0, sample).rpartition("/")[2], members)
    entry = writer.finish()
    assert entry is not None
    index = read_json(tier / "index.json")
    index["shards"][0] = dataclasses.asdict(entry)
    write_json(tier / "index.json", index)
    return shards.sample_id(0, 0)


def journal_torn(bench: Bench, name: str) -> Row:
    """Kill all ranks, tear their journals as a power cut does, and run the same command again."""
    run = FaultedRun(bench, bench.config(name), bench.plain)
    run.wait_for_checkpoint(2 * INTERVAL)
    run.attempt.kill()
    run.fault_is_now()
    torn = tear_journals(run.run_dir)
    run.launch()
    run.wait_until_noticed(run.resume)
    return run.row(said=f"resumed by hand, with {torn} torn journals")


def tear_journals(run_dir: Path) -> int:
    """Tear the journals of a run that has ended, as a power cut does; returns how many."""
    journals = list(journal_folder(run_dir).iterdir())
    for path in journals:
        path.write_bytes(bytes(64) + b"\n" + path.read_bytes()[:-10])
    return len(journals)


def log_blocks(bench: Bench, name: str) -> Row:
    """Make a rank's log a pipe that is full, and have the rank log an update that is skipped. The
    pipe is gone once the ranks were ended."""
    config = bench.config(name)
    log = Path(config.run_dir) / "logs" / "rank-1.log"
    log.parent.mkdir(parents=True)
    os.mkfifo(log)
    pipe = os.open(log, os.O_RDWR | os.O_NONBLOCK)
    run = FaultedRun(bench, config, bench.on_ray)
    run.wait_for_checkpoint(2 * INTERVAL)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(pipe, bytes(size))
    run.fault_is_now()
    order_nan(run.run_dir, rank=1, step=0)
    run.wait_until_noticed(run.failure)
    log.unlink()
    os.close(pipe)
    return run.row()
