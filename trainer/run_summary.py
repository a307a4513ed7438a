"""How an attempt of a run ended; imports nothing heavy, so that launchers can read it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunSummary:
    """How an attempt ended, the same on every rank.

    Attributes:
        run_dir: the run folder.
        step: optimizer steps done.
        steps: optimizer steps of the whole run.
        stopped: why this attempt stopped before the last step, empty if it did not; the same
            command resumes the run.
        skipped_updates: updates of this attempt skipped for a non-finite loss or gradient.
        quarantined: unreadable clips found on this rank.
        seconds: wall time of this attempt's training loop.
        samples_per_second: over this attempt's training loop, everything included.
        scores: metrics of the last validation by name; empty without validation clips.
        times: seconds of this attempt by part, as the metrics of its steps have them.
        tracking_uri, mlflow_run: where MLflow has the run; empty on ranks above 0.
    """

    run_dir: str
    step: int
    steps: int
    stopped: str
    skipped_updates: int
    quarantined: int
    seconds: float
    samples_per_second: float
    scores: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    tracking_uri: str = ""
    mlflow_run: str = ""
