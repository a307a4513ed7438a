"""`cavmae bench autotune RECIPE`: the fields with which a run is fastest on this machine.

One field after the other, each tried for real and kept where it is faster: dtype, micro-batch
(within what the model of memory says), ZeRO stage, compiled blocks, then the loader's processes.
What a run computes stays as it is: the global batch, the seed and the data are not touched.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cavmae.benchmarks.harness.durations import budget_seconds
from cavmae.benchmarks.harness.records import RecordedConfig, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.benchmarks.training.autotune_trial import Fields, Trial, run_trial, with_fields, words
from cavmae.console import print_rows
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.parse import parse
from cavmae.trainer.config.resolve import native_dtype
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.cost_model.memory import Sizes, footprint, model_sizes
from cavmae.trainer.fault_tolerance.host_memory import machine_memory

FASTER = 1.03
"""Smallest speedup that is not taken for noise; below it the value stays as it was."""
CLIPS = 64
"""Clips generated when the run names no data: the largest number of lanes of a run."""
_LEAST_SECONDS = 20.0
"""No trial starts with less time left."""

Outcome = Literal["faster", "not faster", "failed", "no time"]
"""Result of a trial; one that cannot run, or is predicted not to fit in memory, has failed."""


@dataclass(frozen=True)
class AutotuneConfig(RecordedConfig):
    """Find the fields with which a run is fastest on this machine.

    First word: a recipe or a saved config.json; further fields (--field value) are those of the
    run.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a pretraining recipe, or a config.json."""
    budget: str = "5m"
    """Time for all trials: 90s, 10m, 2h."""
    ranks: int = max(1, torch.cuda.device_count())
    """Ranks on this machine."""
    save: str = "runs/autotuned.json"
    """File for the tuned run."""


def main(arguments: list[str]) -> int:
    """Try, print, write the tuned run and the record; returns 1 if no trial succeeded."""
    options, fields = tyro.cli(
        AutotuneConfig, prog="cavmae bench autotune", args=arguments, return_unknown_args=True
    )
    config = parse([options.recipe, *fields], [PretrainConfig], "cavmae bench autotune")
    budget = budget_seconds(options.budget)
    if options.ranks < 1 or config.global_batch % options.ranks:
        raise ValueError(
            f"--ranks is {options.ranks}; use a number that divides global_batch "
            f"{config.global_batch}"
        )
    with work_folder("autotune") as work:
        search = Search(config, options.ranks, work, budget)
        search.run()
    print_rows(("fields", "clips", "samples/s", "memory, GB", "took, s"), _rows(search.trials))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        "fields": search.best,
        "trials": [dataclasses.asdict(trial) for trial in search.trials],
        "skipped": search.skipped,
    }
    configuration = vars(options) | {"run": dataclasses.asdict(config)}
    for line in search.skipped:
        print(f"skipped: {line}")
    if not search.best:
        print("error: no trial succeeded; the table has the reasons", file=sys.stderr)
        return 1
    Path(options.save).parent.mkdir(parents=True, exist_ok=True)
    save_config(with_fields(config, search.best), options.save)
    print(f"fields to use: {words(search.best)}")
    print(f"or: cavmae pretrain {options.save}")
    print(f"record: {write_record(options.out, 'autotune', device, configuration, results)}")
    return 0


def _with_generated_clips(config: PretrainConfig, work: Path) -> PretrainConfig:
    """The run on generated clips of its model's length and size."""
    print("data.train is empty: generating clips ...", file=sys.stderr, flush=True)
    seconds = max(2.0, config.model.audio_frames / 100)
    shards = synthetic_shards(work, CLIPS, size=config.model.image_size, seconds=seconds)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(shards)))


class Search:
    """Runs trials one after the other, within a time budget.

    Args:
        config: the run to tune.
        ranks: on this machine.
        work: folder for the trials, and for clips if the run names no data.
        budget_seconds: for all trials.

    Attributes:
        best: fields to use; empty until a trial succeeds.
        trials: all, in order.
        skipped: what was not tried, and why.
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
        self.skipped: list[str] = []

    def run(self) -> None:
        """Try one field after the other; `best` stays empty if no first trial succeeds.

        Raises:
            ValueError: no micro-batch is predicted to fit.
        """
        start = self._start()
        if not self._config.data.train:
            self._config = _with_generated_clips(self._config, self._work)
        self._end = time.monotonic() + self._budget_seconds
        failed = self._begin(start)
        if not self.best:
            return
        if self._config.engine.dtype == "auto" and not self._gpu:
            self._each("engine.dtype", ["fp32", "bf16"])
        self._micro_batches(failed)
        # Stages 2 and 3 save memory only if there are ranks to share it.
        self._each("engine.zero_stage", [0, 1] if self._ranks == 1 else [0, 1, 2, 3])
        self._each("engine.compile", [True])
        self._rate = 0.0  # with the loader everything is slower
        self._try(dict(self.best), real_data=True)
        self._each("data.reader_workers", [1, 2, 4], real_data=True)
        self._each("data.decode_threads", [8, 16] if self._gpu else [1, 2, 4], real_data=True)
        if self._gpu and self._config.data.train.rstrip("/").endswith("video"):
            self._each("data.video_pipelines", [1, 2], real_data=True)

    def _start(self) -> Fields:
        """Fields of the first trial: the recipe's micro-batch, or the largest below that fits."""
        dtype = self._config.engine.dtype
        fields: Fields = {
            "micro_batch": 1,
            "engine.dtype": native_dtype(gpu=self._gpu) if dtype == "auto" else dtype,
            "engine.zero_stage": self._config.engine.zero_stage,
            "engine.compile": False,
        }
        most = self._config.micro_batch or sys.maxsize
        for micro_batch in reversed(self._divisors):
            fields["micro_batch"] = micro_batch
            if micro_batch <= most and self._fits(fields):
                return fields
        raise ValueError(
            "no micro_batch fits: with 1 the ranks of this machine need "
            f"{self._needed(fields) / 1e9:.3f} GB and {self._available() / 1e9:.3f} GB are free; "
            f"raise --engine.zero-stage (it is {self._config.engine.zero_stage}), set "
            "--engine.activation-checkpointing full, or use a smaller model"
        )

    def _begin(self, start: Fields) -> int:
        """Halve the micro-batch until a trial succeeds; returns the last that failed, or 0."""
        failed, values = 0, [start["micro_batch"]]
        while values and self._try({**start, "micro_batch": values[-1]}) == "failed":
            failed = values[-1]
            values = self._at_most_half(failed)
        return failed

    @property
    def _divisors(self) -> list[int]:
        """Micro-batches that divide a rank's share of the global batch."""
        number = self._config.global_batch // self._ranks
        return [value for value in range(1, number + 1) if number % value == 0]

    def _at_most_half(self, micro_batch: int) -> list[int]:
        return [value for value in self._divisors if value <= micro_batch // 2]

    def _micro_batches(self, failed: int) -> None:
        """Double the micro-batch while that is faster, then try one between the best and the first
        that failed; or halve it, if the first one stays the best.

        Args:
            failed: the smallest that is known to fail; 0: none.
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
            if self.best.get(name, attrgetter(name)(self._config)) != value:
                self._try({**self.best, name: value}, real_data=real_data)

    def _try(self, fields: Fields, *, real_data: bool = False) -> Outcome:
        """Run a trial and keep its fields if it is the fastest; what cannot run has failed."""
        asked, left = words(fields), self._end - time.monotonic()
        if left < _LEAST_SECONDS and self.trials:
            self.skipped.append(f"{asked}: no time")
            return "no time"
        try:
            with_fields(self._config, fields)
        except ValueError as error:
            self.skipped.append(f"{asked}: {error}")
            return "failed"
        if not self._fits(fields):
            self.skipped.append(f"{asked}: predicted not to fit in memory")
            return "failed"
        trial = run_trial(
            self._config,
            fields,
            self._work / str(len(self.trials)),
            ranks=self._ranks,
            real_data=real_data,
            within_seconds=max(left, _LEAST_SECONDS),
        )
        self.trials.append(trial)
        print(f"{asked}: {_result(trial)}", file=sys.stderr, flush=True)
        if trial.problem:
            return "failed"
        if trial.samples_per_second <= self._rate * FASTER:
            return "not faster"
        self.best, self._rate = fields, trial.samples_per_second
        return "faster"

    def _fits(self, fields: Fields) -> bool:
        """Whether the fields are predicted to fit in memory."""
        return self._needed(fields) <= self._available()

    def _needed(self, fields: Fields) -> int:
        """Predicted peak bytes of a step: of one GPU, or of all ranks in the machine's memory."""
        config = with_fields(self._config, fields)
        dtype = config.engine.dtype
        if dtype not in self._sizes:
            self._sizes[dtype] = model_sizes(config)
        needed = footprint(config, self._sizes[dtype], self._ranks, gpu=self._gpu)
        return needed.total if self._gpu else self._ranks * needed.total

    def _available(self) -> int:
        """Bytes of a GPU, or free bytes of the machine's memory."""
        if self._gpu:
            return torch.cuda.get_device_properties(0).total_memory
        return machine_memory().available


def _result(trial: Trial) -> str:
    return trial.problem or f"{trial.samples_per_second:.4g} samples/s"


def _rows(trials: list[Trial]) -> list[tuple[str, ...]]:
    return [
        (
            words(trial.fields),
            "loader" if trial.real_data else "on the device",
            _result(trial).removesuffix(" samples/s"),
            f"{trial.peak_memory_bytes / 1e9:.2f}" if trial.peak_memory_bytes else "",
            f"{trial.seconds:.0f}",
        )
        for trial in trials
    ]
