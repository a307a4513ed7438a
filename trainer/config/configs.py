"""Every field of a run, and of pretraining; those of fine-tuning are in `finetune_config.py`.

Imports nothing heavy: `--help` answers at once, and `threads_per_rank` can be set before torch is
imported.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cavmae.dataloaders.config import DataConfig
from cavmae.trainer.model.config import ModelConfig


@dataclass(frozen=True)
class MaskConfig:
    """Which patches the encoders do not see (paper section 3.3)."""

    audio_ratio: float = 0.75
    """Share of audio patches removed."""
    video_ratio: float = 0.75
    """Share of image patches removed."""
    audio_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """How audio patches are removed; image patches are always removed without structure."""

    def __post_init__(self) -> None:
        for name in ("audio_ratio", "video_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"mask.{name} is {getattr(self, name)}; use 0 up to below 1")


@dataclass(frozen=True)
class LossConfig:
    """The two losses and their weights; a weight of 0 leaves a loss out (AV-MAE, CAV)."""

    reconstruction_weight: float = 1.0
    """Weight of the masked reconstruction loss (audio plus video)."""
    contrastive_weight: float = 0.01
    """Weight of the contrastive loss."""
    temperature: float = 0.05
    """The cosine similarities are divided by this."""
    bidirectional: bool = False
    """Average both directions; otherwise each video ranks the audio clips, as published."""
    contrastive_group: int = 0
    """Consecutive samples of the global order that rank each other; 0: the global batch."""
    norm_pix: bool = True
    """Reconstruct patches normalised to mean 0 and variance 1 each."""
    scale: float = 1.0
    """The loss is multiplied by this before backward and logged without (the published code sums
    the losses of 4 GPUs)."""

    def __post_init__(self) -> None:
        if self.reconstruction_weight < 0 or self.contrastive_weight < 0:
            raise ValueError(
                "loss.reconstruction_weight and loss.contrastive_weight are "
                f"{self.reconstruction_weight} and {self.contrastive_weight}; use 0 or more"
            )
        if self.reconstruction_weight == 0 and self.contrastive_weight == 0:
            raise ValueError("both loss weights are 0; set one of them above 0")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; use a value above 0")
        if self.contrastive_group < 0:
            raise ValueError(f"loss.contrastive_group is {self.contrastive_group}; use 0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with the published settings."""

    name: Literal["adam", "adamw"] = "adam"
    """`adam` adds the weight decay to the gradient, as published; `adamw` decouples it."""
    learning_rate: float = 5e-5
    """Learning rate after warm-up."""
    beta1: float = 0.95
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 5e-7
    """Weight decay."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "step", "cosine"] = "step"
    """`step` is the published one; `cosine` ends at `min_lr_ratio` of the peak."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    step_start_epochs: int = 10
    """`step`: epoch of the first decay."""
    step_every_epochs: int = 5
    """`step`: epochs between decays."""
    gamma: float = 0.5
    """`step`: the rate is multiplied by this at each decay."""
    min_lr_ratio: float = 0.0
    """`cosine`: the last rate as a share of the peak."""


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed holds and updates the parameters."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over ranks: nothing, optimizer, + gradients, + parameters."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Parameters and activations; the update always happens in fp32. `auto`: bf16 where the
    hardware multiplies it (GPUs, CPUs with AVX512-BF16 or AMX), fp32 elsewhere; a run that goes on
    keeps what it began with."""
    clip_grad_norm: float = 0.0
    """Gradients are scaled down to this norm; 0: never."""
    offload_optimizer: bool = False
    """Keep optimizer state in CPU memory (ZeRO 1 to 3)."""
    compile: bool = False
    """Compile each transformer block with torch.compile (ZeRO 0 to 2)."""
    attention: Literal["auto", "blocks", "sdpa", "flash-attn"] = "auto"
    """`blocks`: a cache-sized block of heads after the other (CPUs); `sdpa`: torch's fused
    attention; `flash-attn`: that package, with one call for the joint encoder's three streams (bf16
    on GPUs). `auto`: `blocks` on a CPU, `sdpa` on a GPU, with `flash-attn` for the joint encoder
    where it is installed."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What the backward pass computes again instead of keeping it. `selective`: the norms and the
    GELU before each matrix product, a third of the activations for hardly any work; `full`: all but
    the input of each transformer block, most of the memory for a third more work."""
    max_skipped_updates: int = 20
    """Updates in a row that may be left out for a non-finite loss or gradient before the run
    stops."""

    def __post_init__(self) -> None:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "engine.compile is on and engine.zero_stage is 3, which runs uncompiled; set "
                "engine.zero_stage to 2 or less, or engine.compile off"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer is on and engine.zero_stage is 0; set engine.zero_stage "
                "to 1 or more"
            )
        if self.clip_grad_norm < 0:
            raise ValueError(
                f"engine.clip_grad_norm is {self.clip_grad_norm}; use 0 (never) or more"
            )
        if self.max_skipped_updates < 1:
            raise ValueError(
                f"engine.max_skipped_updates is {self.max_skipped_updates}; use 1 or more"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where the run is saved and what is kept."""

    every_steps: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept as well; 0: none."""
    grace_seconds: float = 100.0
    """A rank that is asked to leave (SIGTERM, a spot notice) ends after this, saved or not; 0: no
    limit. A cloud takes a spot machine away after 120 s."""
    folder: str = ""
    """Folder that all ranks reach, or URL of an object store (s3://, gs://), of this run alone;
    empty: `checkpoints` in the run folder."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}; use 1 or more")
        if self.grace_seconds < 0:
            raise ValueError(
                f"checkpoint.grace_seconds is {self.grace_seconds}; use seconds, or 0 for no limit"
            )
        if self.keep_every % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}; use a multiple of "
                f"checkpoint.every_steps {self.every_steps}, or 0"
            )


@dataclass(frozen=True)
class WatchdogConfig:
    """When a rank without progress is ended, so that the run can be started again."""

    medians: float = 20.0
    """A step that takes so many times the median of the steps before is a hang; 0: never."""
    minimum_seconds: float = 300.0
    """Nothing shorter is."""
    max_pause_seconds: float = 3600.0
    """The same for what is no step: the first ones, which compile, an evaluation, a checkpoint, the
    trace of a profile."""
    straggler_ratio: float = 1.5
    """A rank that works so many times as long as the median rank before it meets the others is
    named, where that costs a tenth of the step; 0: never."""

    def __post_init__(self) -> None:
        if self.medians and self.medians < 2:
            raise ValueError(f"watchdog.medians is {self.medians}; use 0 (never) or 2 or more")
        if self.straggler_ratio and self.straggler_ratio <= 1:
            raise ValueError(
                f"watchdog.straggler_ratio is {self.straggler_ratio}; use 0 (never) or above 1"
            )
        for name in ("minimum_seconds", "max_pause_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"watchdog.{name} is {getattr(self, name)}; use seconds above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out scores during the run."""

    every_steps: int = 1000
    """Optimizer steps between evaluations; the last step is always evaluated."""
    clips: int = 1000
    """Held-out clips used at most, the first ones in packing order."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; use 1 or more")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty: `sqlite:///<runs folder>/mlflow.db` beside the run folder."""
    experiment: str = "cavmae"
    """MLflow experiment name."""
    every_steps: int = 10
    """Optimizer steps between logged metrics and log lines."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"tracking.every_steps is {self.every_steps}; use 1 or more")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps on every rank, for https://ui.perfetto.dev."""

    steps: int = 0
    """Optimizer steps that are traced in each start; 0: none, which costs nothing."""
    after_steps: int = 10
    """Optimizer steps of a start that go before them, for warm-up."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"profile.steps is {self.steps}; use 0 (none) or more")
        if self.after_steps < 1:
            raise ValueError(f"profile.after_steps is {self.after_steps}; use 1 or more")


@dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever it trains.

    Attributes:
        FIXED: fields that decide what a run computes: one that goes on keeps them.

    Raises:
        ValueError: batch sizes that do not divide, with the nearest that do.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        *("model", "seed", "global_batch", "lanes", "initial_weights", "average_from_epoch"),
    )

    run_dir: str = "runs/run"
    """Folder of the run: configuration, checkpoints, pictures, weights. An existing run goes on."""
    initial_weights: str = ""
    """Checkpoint to start from; empty: random."""
    steps: int = 0
    """Optimizer steps in all; 0: as many as `epochs` needs."""
    epochs: float = 25.0
    """ActivationTimeline over the training set, used where `steps` is 0."""
    average_from_epoch: int = 0
    """The result is the mean of the weights at the ends of the epochs from this one, counted from
    1, to the last; 0: the last weights."""
    global_batch: int = 48
    """Samples per optimizer step over all ranks and accumulation."""
    micro_batch: int = 12
    """Samples per rank in one forward pass at most; the rest is accumulated."""
    lanes: int = 0
    """Fixed parts of the global batch that ranks share out, fixed when a run starts; the rank
    count must divide it. 0: the largest divisor of the global batch up to 64."""
    seed: int = 0
    """Seed of weights, order, masks and frames."""
    deterministic: bool = False
    """Bit-equal repetition on a GPU as well (slower there; on CPU it always holds)."""
    threads_per_rank: int = 0
    """CPU threads of each rank; 0: cores of the machine divided by its ranks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"steps is 0 and epochs is {self.epochs}; set one of them above 0")
        if self.average_from_epoch < 0:
            raise ValueError(
                f"average_from_epoch is {self.average_from_epoch}; use 0 (none) or more"
            )
        if self.lanes and self.global_batch % self.lanes:
            raise ValueError(
                f"lanes is {self.lanes}, which does not divide global_batch {self.global_batch}"
            )
        if self.data.frames_per_clip != 1:
            raise ValueError(
                f"data.frames_per_clip is {self.data.frames_per_clip}; this model sees 1 frame"
            )


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run.

    Raises:
        ValueError: batch sizes that do not divide, with the nearest that do.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "mask", "loss")

    run_dir: str = "runs/pretrain"
    """Folder of the run: configuration, checkpoints, pictures, weights. An existing run goes on."""
    initial_weights: str = ""
    """ImageNet MAE or published CAV-MAE checkpoint to start from; empty: random."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pictures: int = 4
    """Held-out clips shown masked, reconstructed and original at each evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 1:
            raise ValueError(f"pictures is {self.pictures}; use 1 or more")
        group = self.loss.contrastive_group
        if group and self.global_batch % group:
            raise ValueError(
                f"loss.contrastive_group is {group}, which does not divide "
                f"global_batch {self.global_batch}"
            )
