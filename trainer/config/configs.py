"""Every field of a pretraining or fine-tuning run.

Imports nothing heavy: `--help` answers at once, and `threads_per_rank` can be set before torch is
imported.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from cavmae.dataloaders.config import DataConfig
from cavmae.field_checks import (
    CheckedFields,
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    at_least,
)
from cavmae.trainer.model.config import MaskConfig, ModelConfig


@dataclass(frozen=True)
class LossConfig(CheckedFields, section="loss"):
    """The two losses and their weights; a weight of 0 leaves a loss out (AV-MAE, CAV)."""

    reconstruction_weight: NonNegativeFloat = 1.0
    """Weight of the masked reconstruction loss (audio plus video)."""
    contrastive_weight: NonNegativeFloat = 0.01
    """Weight of the contrastive loss."""
    temperature: PositiveFloat = 0.05
    """The cosine similarities are divided by this."""
    bidirectional: bool = False
    """Average both directions; otherwise each video ranks the audio clips, as published."""
    contrastive_group: NonNegativeInt = 0
    """Consecutive samples of the global order that rank each other; 0: the global batch."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's embeddings: `gather` holds those of all ranks on each; `ring`
    passes them on, a rank's at a time, for batches whose embeddings don't fit."""
    norm_pix: bool = True
    """Reconstruct patches normalised to mean 0 and variance 1 each."""
    scale: float = 1.0
    """The loss is multiplied by this before backward and logged without (the published code sums
    the losses of 4 GPUs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction_weight == 0 and self.contrastive_weight == 0:
            raise ValueError("both loss weights are 0; set one of them above 0")


@dataclass(frozen=True)
class OptimizerConfig(CheckedFields, section="optimizer"):
    """Adam with the published settings."""

    name: Literal["adam", "adamw"] = "adam"
    """`adam` adds the weight decay to the gradient, as published; `adamw` decouples it."""
    learning_rate: NonNegativeFloat = 5e-5
    """Learning rate after warm-up."""
    beta1: float = 0.95
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 5e-7
    """Weight decay."""


@dataclass(frozen=True)
class ScheduleConfig(CheckedFields, section="schedule"):
    """The learning rate over the run."""

    name: Literal["constant", "step", "cosine"] = "step"
    """`step` is the published one; `cosine` ends at `min_lr_ratio` of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    step_start_epochs: NonNegativeInt = 10
    """`step`: epoch of the first decay."""
    step_every_epochs: PositiveInt = 5
    """`step`: epochs between decays."""
    gamma: float = 0.5
    """`step`: the rate is multiplied by this at each decay."""
    min_lr_ratio: Fraction = 0.0
    """`cosine`: the last rate as a share of the peak."""


@dataclass(frozen=True)
class EngineConfig(CheckedFields, section="engine"):
    """How DeepSpeed holds and updates the parameters."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over ranks: nothing, optimizer, + gradients, + parameters."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Parameters and activations; the update always happens in fp32. `auto`: bf16 where the
    hardware multiplies it (GPUs, CPUs with AVX512-BF16 or AMX), fp32 elsewhere; a run that goes on
    keeps what it began with."""
    clip_grad_norm: Annotated[float, at_least(0, "never")] = 0.0
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
    max_skipped_updates: PositiveInt = 20
    """Updates in a row that may be left out for a non-finite loss or gradient before the run
    stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True)
class CheckpointConfig(CheckedFields, section="checkpoint"):
    """When and where the run is saved and what is kept."""

    every_steps: PositiveInt = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints at multiples of so many steps are kept as well; 0: none."""
    grace_seconds: Annotated[float, Limit(lambda x: x >= 0, "seconds, or 0 for no limit")] = 100.0
    """A rank that is asked to leave (SIGTERM, a spot notice) ends after this, saved or not; 0: no
    limit. A cloud takes a spot machine away after 120 s."""
    folder: str = ""
    """Folder that all ranks reach, or URL of an object store (s3://, gs://), of this run alone;
    empty: `checkpoints` in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_every % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}; use a multiple of "
                f"checkpoint.every_steps {self.every_steps}, or 0"
            )


@dataclass(frozen=True)
class WatchdogConfig(CheckedFields, section="watchdog"):
    """When a rank without progress is ended, so that the run can be started again."""

    medians: Annotated[float, Limit(lambda x: x == 0 or x >= 2, "0 (never) or 2 or more")] = 20.0
    """A step that takes so many times the median of the steps before is a hang; 0: never."""
    minimum_seconds: Seconds = 300.0
    """Nothing shorter is."""
    max_pause_seconds: Seconds = 3600.0
    """The same for what is no step: the first ones, which compile, an evaluation, a checkpoint, the
    trace of a profile."""
    straggler_ratio: Annotated[float, Limit(lambda x: x == 0 or x > 1, "0 (never) or above 1")] = (
        1.5
    )
    """A rank that works so many times as long as the median rank before it meets the others is
    named, where that costs a tenth of the step; 0: never."""


@dataclass(frozen=True)
class EvaluationConfig(CheckedFields, section="evaluation"):
    """Held-out scores during the run."""

    every_steps: PositiveInt = 1000
    """Optimizer steps between evaluations; the last step is always evaluated."""
    clips: PositiveInt = 1000
    """Held-out clips used at most, the first ones in packing order."""


@dataclass(frozen=True)
class TrackingConfig(CheckedFields, section="tracking"):
    """MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty: `sqlite:///<runs folder>/mlflow.db` beside the run folder."""
    experiment: str = "cavmae"
    """MLflow experiment name."""
    every_steps: PositiveInt = 10
    """Optimizer steps between logged metrics and log lines."""


@dataclass(frozen=True)
class ProfileConfig(CheckedFields, section="profile"):
    """A trace of some steps on every rank, for https://ui.perfetto.dev."""

    steps: Annotated[int, at_least(0, "none")] = 0
    """Optimizer steps that are traced in each start; 0: none, which costs nothing."""
    after_steps: PositiveInt = 10
    """Optimizer steps of a start that go before them, for warm-up."""


@dataclass(frozen=True)
class RunConfig(CheckedFields):
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
    steps: NonNegativeInt = 0
    """Optimizer steps in all; 0: as many as `epochs` needs."""
    epochs: float = 25.0
    """ActivationTimeline over the training set, used where `steps` is 0."""
    average_from_epoch: Annotated[int, at_least(0, "none")] = 0
    """The result is the mean of the weights at the ends of the epochs from this one, counted from
    1, to the last; 0: the last weights."""
    global_batch: PositiveInt = 48
    """Samples per optimizer step over all ranks and accumulation."""
    micro_batch: PositiveInt = 12
    """Samples per rank in one forward pass at most; the rest is accumulated."""
    lanes: NonNegativeInt = 0
    """Fixed parts of the global batch that ranks share out, fixed when a run starts; the rank
    count must divide it. 0: the largest divisor of the global batch up to 64."""
    seed: int = 0
    """Seed of weights, order, masks and frames."""
    deterministic: bool = False
    """Bit-equal repetition on a GPU as well (slower there; on CPU it always holds)."""
    threads_per_rank: NonNegativeInt = 0
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
        super().__post_init__()
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"steps is 0 and epochs is {self.epochs}; set one of them above 0")
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
    pictures: PositiveInt = 4
    """Held-out clips shown masked, reconstructed and original at each evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.loss.contrastive_group
        if group and self.global_batch % group:
            raise ValueError(
                f"loss.contrastive_group is {group}, which does not divide "
                f"global_batch {self.global_batch}"
            )


@dataclass(frozen=True)
class ClassifierConfig(CheckedFields, section="classifier"):
    """The classes, and how they are learned (paper section 4.2).

    Raises:
        ValueError: a number out of its range.
    """

    labels: str = ""
    """CSV file of the classes with the columns index, mid, display_name, as published; clips are
    labelled by mid. Empty: the labels of the training set, by name."""
    allow_empty_classes: bool = False
    """Train although the label file has classes of which the training set has no clip."""
    mode: Literal["multimodal", "audioonly", "videoonly"] = "multimodal"
    """What is classified by: sound and picture, or one alone."""
    loss: Literal["bce", "cross_entropy"] = "bce"
    """`bce` for clips of several labels (AudioSet), `cross_entropy` for clips of one (VGGSound)."""
    label_smoothing: Annotated[float, Limit(lambda x: 0 <= x < 1, "0 (none) up to below 1")] = 0.1
    """Share of a target that is spread over all classes; 0: none."""
    head_lr_mult: PositiveFloat = 1.0
    """The learning rate of the classifier, which is new, as a multiple of the encoders'."""
    train_encoders: bool = True
    """Train all; otherwise the classifier alone, on frozen features (linear probe)."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run.

    Raises:
        ValueError: batch sizes that do not divide, with the nearest that do.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "classifier")

    run_dir: str = "runs/finetune"
    """Folder of the run: configuration, checkpoints, labels, weights. An existing run goes on."""
    initial_weights: str = ""
    """Weights of a pretraining run, or a published CAV-MAE checkpoint, to start from; empty:
    random."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
