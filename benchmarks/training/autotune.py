"""`cavmae bench autotune RECIPE`: the fields with which a run is fastest on this machine.

One field after the other, each tried for real and kept where it is faster: dtype, micro-batch
(within what the model of memory says), ZeRO stage, compiled blocks, then the loader's processes.
What a run computes stays as it is: the global batch, the seed and the data are not touched.
"""

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from cavmae.benchmarks.harness.processes import unwind_on_sigterm
from cavmae.benchmarks.harness.records import write_record
from cavmae.benchmarks.report.suite import budget_seconds
from cavmae.benchmarks.training.autotune_trial import Fields, Trial, run_trial, with_fields, words
from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.resolve import native_dtype
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes
from cavmae.trainer.fault_tolerance.host_memory import machine_memory

FASTER = 1.03
"""What is less than this faster is not told from noise: the value before stays."""
CLIPS = 64
"""Generated where there is no data; as many as a run has lanes at most."""
_LEAST_SECONDS = 20.0
"""No trial is begun with less than this left."""

Outcome = Literal["faster", "not faster", "failed", "no time"]
"""What came of a trial; one that cannot run, or does not fit by the model of memory, has failed."""


def parser() -> argparse.ArgumentParser:
    """The command line; words that it does not know are fields of the run."""
    gpus = torch.cuda.device_count()
    arguments = argparse.ArgumentParser(
        prog="cavmae bench autotune",
        description="The fields with which a run is fastest on this machine. First word: a recipe "
        "or a saved config.json; further fields (--field value) are those of the run.",
    )
    arguments.add_argument("recipe", help="name of a pretraining recipe, or a config.json")
    arguments.add_argument("--budget", default="5m", help="time for all trials: 90s, 10m, 2h")
    arguments.add_argument("--ranks", type=int, default=max(1, gpus), help="on this machine")
    arguments.add_argument("--save", default="runs/autotuned.json", help="file for the tuned run")
    arguments.add_argument("--out", default="benchmarks/results", help="folder of the record")
    return arguments


def main(argv: list[str]) -> int:
    """Try, print, write the tuned run and the record; returns 1 where nothing could be run."""
    flags, fields = parser().parse_known_args(argv)
    config = parse([flags.recipe, *fields], [PretrainConfig], "cavmae bench autotune")
    budget = budget_seconds(flags.budget)
    if flags.ranks < 1 or config.global_batch % flags.ranks:
        raise ValueError(
            f"--ranks is {flags.ranks}; use a number that divides global_batch "
            f"{config.global_batch}"
        )
    unwind_on_sigterm()
    work = Path(tempfile.mkdtemp(prefix="cavmae-autotune-"))
    try:
        search = Search(config, flags.ranks, work, budget)
        search.run()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    Console(width=120).print(_table(search.trials))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        "fields": search.best,
        "trials": [dataclasses.asdict(trial) for trial in search.trials],
        "left_out": search.left_out,
    }
    configuration = vars(flags) | {"run": dataclasses.asdict(config)}
    for line in search.left_out:
        print(f"left out: {line}")
    if not search.best:
        print("error: no trial ended well; the table has the reasons", file=sys.stderr)
        return 1
    Path(flags.save).parent.mkdir(parents=True, exist_ok=True)
    save_config(with_fields(config, search.best), flags.save)
    print(f"fields to use: {words(search.best)}")
    print(f"or: cavmae pretrain {flags.save}")
    print(f"record: {write_record(flags.out, 'autotune', device, configuration, results)}")
    return 0


def _with_generated_clips(config: PretrainConfig, work: Path) -> PretrainConfig:
    """The run with clips as long and as large as its model takes."""
    print("data.train is empty: clips are generated ...", file=sys.stderr, flush=True)
    seconds, side = max(2.0, config.model.audio_frames / 100), config.model.image_size
    listing = generate(work / "videos", CLIPS, seed=0, size=side, seconds=seconds)
    pack(PackConfig(str(listing), str(work / "shards"), tiers="frames"), Console(quiet=True))
    data = dataclasses.replace(config.data, train=str(work / "shards" / "frames"))
    return dataclasses.replace(config, data=data)


class Search:
    """Trials one after the other, within a time.

    Args:
        config: the run that is tuned.
        ranks: on this machine.
        work: folder for the trials, and for clips where the run names none.
        budget_seconds: for all trials.

    Attributes:
        best: fields to use, empty until a trial has ended well.
        trials: all, in order.
        left_out: what was not tried, and why.
    """

    def __init__(
        self, config: PretrainConfig, ranks: int, work: Path, budget_seconds: float
    ) -> None:
        self._config, self._ranks, self._work = config, ranks, work
        self._gpu = torch.cuda.is_available()
        self._budget_seconds = budget_seconds
        self._rate = 0.0
        self._sizes: dict[str, Sizes] = {}
        self.best: Fields = {}
        self.trials: list[Trial] = []
        self.left_out: list[str] = []

    def run(self) -> None:
        """Try one field after the other; `best` stays empty where no first trial ends well.

        Raises:
            ValueError: no micro-batch fits, by the model of memory.
        """
        start = self._start()
        if not self._config.data.train:
            self._config = _with_generated_clips(self._config, self._work)
        self._end = time.monotonic() + self._budget_seconds
        failed = self._begin(start)
        if not self.best:
            return
        self._each("engine.dtype", self._dtypes())
        self._micro_batches(failed)
        self._each("engine.zero_stage", self._stages())
        self._each("engine.compile", [True])
        self._rate = 0.0  # with the loader everything is slower
        self._try(dict(self.best), real_data=True)
        for name, values in self._loader():
            self._each(name, values, real_data=True)

    def _start(self) -> Fields:
        """Where the search begins: the recipe's micro-batch, or the next smaller one that fits."""
        dtype = self._config.engine.dtype
        fields: Fields = {
            "micro_batch": 1,
            "engine.dtype": native_dtype(gpu=self._gpu) if dtype == "auto" else dtype,
            "engine.zero_stage": self._config.engine.zero_stage,
            "engine.compile": False,
        }
        for micro_batch in reversed(self._divisors):
            fields["micro_batch"] = micro_batch
            if micro_batch <= self._config.micro_batch and self._fits(fields):
                return fields
        raise ValueError(
            "no micro_batch fits: with 1 the ranks of this machine take "
            f"{self._needed(fields) / 1e9:.3f} GB and {self._there() / 1e9:.3f} GB are there; "
            f"raise --engine.zero-stage (it is {self._config.engine.zero_stage}), set "
            "--engine.activation-checkpointing full, or use a smaller model"
        )

    def _begin(self, start: Fields) -> int:
        """Halve the micro-batch until a trial ends well; returns the last that did not, or 0."""
        failed, value = 0, start["micro_batch"]
        while self._try({**start, "micro_batch": value}) == "failed":
            failed = value
            smaller = self._at_most_half(value)
            if not smaller:
                break
            value = smaller[-1]
        return failed

    @property
    def _per_rank(self) -> int:
        return self._config.global_batch // self._ranks

    @property
    def _divisors(self) -> list[int]:
        """What a micro-batch may be."""
        number = self._per_rank
        return [value for value in range(1, number + 1) if number % value == 0]

    def _at_most_half(self, micro_batch: int) -> list[int]:
        return [value for value in self._divisors if value <= micro_batch // 2]

    def _dtypes(self) -> list[str]:
        if self._gpu or self._config.engine.dtype != "auto":
            return []
        return ["fp32", "bf16"]

    def _stages(self) -> list[int]:
        """Another stage than 0 or 1 saves memory where there are ranks to share it."""
        return [0, 1] if self._ranks == 1 else [0, 1, 2, 3]

    def _loader(self) -> Iterator[tuple[str, list[int]]]:
        yield "data.reader_workers", [1, 2, 4]
        yield "data.decode_threads", [1, 2, 4]
        if self._gpu and self._config.data.train.rstrip("/").endswith("video"):
            yield "data.video_pipelines", [1, 2, 4, 7]

    def _micro_batches(self, failed: int) -> None:
        """Doubling up from the first one while it gets faster, then between the best and what did
        not fit; or down, where the first one stays the best.

        Args:
            failed: the least that is known to fail, which is more than the first one; 0: none is.
        """
        first = last = self.best["micro_batch"]
        larger = [value for value in self._divisors if first < value < (failed or sys.maxsize)]
        while larger:
            value = next((one for one in larger if one >= 2 * last), larger[-1])
            outcome = self._try({**self.best, "micro_batch": value})
            if outcome == "no time":
                return
            if outcome == "failed":
                between = [one for one in larger if one < value]
                if between:
                    self._try({**self.best, "micro_batch": between[len(between) // 2]})
                break
            if outcome == "not faster":
                break
            last, larger = value, [one for one in larger if one > value]
        smaller = self._at_most_half(first)
        if self.best["micro_batch"] == first and smaller:
            self._try({**self.best, "micro_batch": smaller[-1]})

    def _each(self, name: str, values: list[Any], *, real_data: bool = False) -> None:
        for value in values:
            if self.best.get(name, _field(self._config, name)) != value:
                self._try({**self.best, name: value}, real_data=real_data)

    def _try(self, fields: Fields, *, real_data: bool = False) -> Outcome:
        """Run a trial, and keep its fields where it is the fastest; what cannot run has failed."""
        asked, left = words(fields), self._end - time.monotonic()
        if left < _LEAST_SECONDS and self.trials:
            self.left_out.append(f"{asked}: no time")
            return "no time"
        try:
            with_fields(self._config, fields)
        except ValueError as error:
            self.left_out.append(f"{asked}: {error}")
            return "failed"
        if not self._fits(fields):
            self.left_out.append(f"{asked}: does not fit, by the model of memory")
            return "failed"
        trial = run_trial(
            self._config,
            fields,
            self._work / str(len(self.trials)),
            ranks=self._ranks,
            gpus=self._gpu,
            real_data=real_data,
            within_seconds=max(left, _LEAST_SECONDS),
        )
        self.trials.append(trial)
        print(f"{asked}: {_came_of(trial)}", file=sys.stderr, flush=True)
        if trial.problem:
            return "failed"
        if trial.samples_per_second <= self._rate * FASTER:
            return "not faster"
        self.best, self._rate = fields, trial.samples_per_second
        return "faster"

    def _fits(self, fields: Fields) -> bool:
        """Whether the model of memory says so."""
        return self._needed(fields) <= self._there()

    def _needed(self, fields: Fields) -> int:
        """Bytes at the peak of a step: of one GPU, or of all ranks in the machine's memory."""
        config = with_fields(self._config, fields)
        dtype = config.engine.dtype
        if dtype not in self._sizes:
            self._sizes[dtype] = model_sizes(config)
        needed = footprint(config, self._sizes[dtype], self._ranks, gpu=self._gpu)
        return needed.total if self._gpu else self._ranks * needed.total

    def _there(self) -> int:
        """Bytes of a GPU, or those free in the machine's memory."""
        if self._gpu:
            return torch.cuda.get_device_properties(0).total_memory
        return machine_memory().available


def _field(config: PretrainConfig, name: str) -> Any:
    """The value of a dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _came_of(trial: Trial) -> str:
    return trial.problem or f"{trial.samples_per_second:.4g} samples/s"


def _table(trials: list[Trial]) -> Table:
    table = Table("fields", "clips", "samples/s", "memory, GB", "took, s")
    for trial in trials:
        table.add_row(
            words(trial.fields),
            "loader" if trial.real_data else "on the device",
            _came_of(trial).removesuffix(" samples/s"),
            f"{trial.peak_memory_bytes / 1e9:.2f}" if trial.peak_memory_bytes else "",
            f"{trial.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
