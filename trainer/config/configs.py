"""Every field of a pretraining or fine-tuning run.

Imports nothing heavy: `--help` answers at once, and `threads_per_rank` can be set before torch is
imported.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import Modalities
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

_OF_MODE: dict[str, Modalities] = {"multimodal": "both", "audioonly": "audio", "videoonly": "video"}
"""What a classifier of each mode reads."""


@dataclass(frozen=True)
class LossConfig(CheckedFields, section="loss"):
    """The two losses and their weights; a weight of 0 disables a loss (AV-MAE, CAV)."""

    reconstruction_weight: NonNegativeFloat = 1.0
    """Weight of the masked reconstruction loss (audio plus video)."""
    contrastive_weight: NonNegativeFloat = 0.01
    """Weight of the contrastive loss."""
    temperature: PositiveFloat = 0.05
    """Cosine similarities are divided by this."""
    bidirectional: bool = False
    """Average both directions; otherwise only video ranks audio, as published."""
    contrastive_group: NonNegativeInt = 0
    """Number of consecutive samples that are negatives of each other; 0: the global batch."""
    norm_pix: bool = True
    """Reconstruct patches normalised to mean 0 and variance 1 each."""
    scale: float = 1.0
    """Loss multiplier for the backward pass, not for logging (the published code sums the losses of
    4 GPUs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction_weight == 0 and self.contrastive_weight == 0:
            raise ValueError("both loss weights are 0; set one of them above 0")


@dataclass(frozen=True)
class OptimizerConfig(CheckedFields, section="optimizer"):
    """Adam; the defaults are the published settings."""

    name: Literal["adam", "adamw"] = "adam"
    """`adam` adds the weight decay to the gradient, as published; `adamw` decouples it."""
    learning_rate: NonNegativeFloat = 5e-5
    """Learning rate after warm-up."""
    beta1: float = 0.95
    """Decay rate of the first moment, the mean of gradients."""
    beta2: float = 0.999
    """Decay rate of the second moment, the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: NonNegativeFloat = 5e-7
    """Weight decay coefficient."""


@dataclass(frozen=True)
class ScheduleConfig(CheckedFields, section="schedule"):
    """Learning rate schedule."""

    name: Literal["constant", "step", "cosine"] = "step"
    """`step` is the published one; `cosine` decays to `min_lr_ratio` of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0."""
    step_start_epochs: NonNegativeInt = 10
    """`step`: epoch of the first decay."""
    step_every_epochs: PositiveInt = 5
    """`step`: epochs between decays."""
    gamma: float = 0.5
    """`step`: factor of each decay."""
    min_lr_ratio: Fraction = 0.0
    """`cosine`: final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class EngineConfig(CheckedFields, section="engine"):
    """DeepSpeed, precision and kernels."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage, what is sharded over ranks: nothing, optimizer, + gradients, + parameters."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of parameters and activations; updates are always in fp32. `auto`: bf16 where the
    hardware has bf16 matrix multiplication (GPUs, CPUs with AVX512-BF16 or AMX), else fp32. A run
    that resumes keeps its dtype."""
    clip_grad_norm: Annotated[float, at_least(0, "never")] = 0.0
    """Maximum gradient norm; 0: no clipping."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory (ZeRO 1 to 3)."""
    compile: bool = False
    """Compile each transformer block with torch.compile (ZeRO 0 to 2)."""
    attention: Literal[
        "auto", "blocks", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash-attn"
    ] = "auto"
    """`blocks`: one cache-sized block of heads at a time (CPUs); `sdpa`: torch's fused attention,
    whose kernels `sdpa-flash`, `sdpa-cudnn` and `sdpa-efficient` name one by one (GPUs);
    `flash-attn`: that package, in one call for the joint encoder's three streams (GPUs, bf16).
    `auto`: `blocks` on a CPU; on a GPU the fastest for this model, timed when the run starts and
    kept by its resumes, or one that is deterministic where `deterministic` asks."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What the backward pass recomputes. `selective`: the norm and the GELU of each MLP, and no
    product, which saves more than a quarter of the activations at almost no cost; `full`: all but
    the input of each transformer block, which saves most of them for a third more compute."""
    max_skipped_updates: PositiveInt = 20
    """Consecutive updates that may be skipped for a non-finite loss or gradient before the run
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
    """When and where checkpoints are written, and which are kept."""

    every_steps: PositiveInt = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep the checkpoints at multiples of this many steps; 0: none."""
    grace_seconds: Annotated[float, Limit(lambda x: x >= 0, "seconds, or 0 for no limit")] = 25.0
    """Time after which a preempted rank (SIGTERM, a spot notice) exits, saved or not; 0: no limit.
    torchrun and DeepSpeed kill 30 s after SIGTERM, as do some clouds; others give 120 s."""
    folder: str = ""
    """Shared folder, or URL of an object store (s3://, gs://), for this run alone; empty:
    `checkpoints` in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_every % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}; use a multiple of "
                f"checkpoint.every_steps {self.every_steps}, or 0"
            )


@dataclass(frozen=True)
class WatchdogConfig(CheckedFields, section="watchdog"):
    """When a hung rank is killed, so that the run can restart, and when a straggler is reported."""

    hang_ratio: Annotated[float, Limit(lambda x: x == 0 or x >= 2, "0 (never) or 2 or more")] = 20.0
    """A step this many times as long as the median step is a hang; 0: never."""
    min_seconds: Seconds = 300.0
    """Steps shorter than this are never a hang."""
    max_pause_seconds: Seconds = 3600.0
    """Limit for everything else: the first steps, which compile, validation, checkpoints, profiler
    traces."""
    straggler_ratio: Annotated[float, Limit(lambda x: x == 0 or x > 1, "0 (never) or above 1")] = (
        1.5
    )
    """Report a rank that computes this many times as long as the median rank before each
    synchronization, where that costs a tenth of the step; 0: never."""


@dataclass(frozen=True)
class ValidationConfig(CheckedFields, section="validation"):
    """Validation during the run."""

    every_steps: PositiveInt = 1000
    """Optimizer steps between validations; the last step is always followed by one."""
    clips: PositiveInt = 1000
    """Maximum number of validation clips: the first ones in packing order."""


@dataclass(frozen=True)
class TrackingConfig(CheckedFields, section="tracking"):
    """MLflow tracking and logging."""

    uri: str = ""
    """MLflow tracking URI; empty: `sqlite:///<runs folder>/mlflow.db` beside the run folder."""
    experiment: str = "cavmae"
    """MLflow experiment name."""
    every_steps: PositiveInt = 10
    """Optimizer steps between log lines and logged metrics."""
    peak_tflops: Annotated[float, at_least(0, "the data sheet's")] = 0.0
    """Matrix rate of a rank's device, in TFLOP/s, that MFU is relative to, such as one that `cavmae
    bench step` measured; 0: that of the GPU's data sheet, and no MFU where it is unknown."""


@dataclass(frozen=True)
class ProfileConfig(CheckedFields, section="profile"):
    """Profiler traces of some steps on every rank, for https://ui.perfetto.dev."""

    steps: Annotated[int, at_least(0, "none")] = 0
    """Optimizer steps traced in each attempt; 0: none, at no cost."""
    after_steps: PositiveInt = 10
    """Optimizer steps of each attempt before the trace, as warm-up."""


@dataclass(frozen=True)
class RunConfig(CheckedFields):
    """Fields of every run.

    Attributes:
        FIXED: fields and sections that decide what a run computes, so that it cannot resume with
            other values.

    Raises:
        ValueError: a field is out of range, or does not fit another one.
    """

    FIXED: ClassVar[tuple[str, ...]] = (
        *("model", "seed", "global_batch", "lanes", "initial_weights", "average_from_epoch"),
        *("data.frame_choice", "data.log_mel_mean", "data.log_mel_std", "data.shuffle_window"),
        *("data.mixture", "data.sampling", "data.window_seconds", "data.augmentation"),
        "data.modality",
    )

    run_dir: str = "runs/run"
    """Folder of the run: configuration, checkpoints, pictures, weights. An existing run resumes."""
    initial_weights: str = ""
    """Checkpoint to initialize from; empty: random."""
    steps: NonNegativeInt = 0
    """Total optimizer steps; 0: as many as `epochs` needs."""
    epochs: float = 25.0
    """Passes over the training set, used where `steps` is 0."""
    average_from_epoch: Annotated[int, at_least(0, "none")] = 0
    """Average the weights at the ends of the epochs from this one (counted from 1) to the last;
    0: no averaging."""
    global_batch: PositiveInt = 48
    """Samples per optimizer step, over all ranks and accumulation."""
    micro_batch: NonNegativeInt = 12
    """Maximum samples per rank in one forward pass; gradients of the rest are accumulated. A rank's
    share is cut into micro-batches of equal size, or one sample less. 0: the most that are
    predicted to fit in memory, chosen when the run starts; a run that resumes keeps it."""
    lanes: NonNegativeInt = 0
    """Contiguous parts into which each epoch is cut, fixed for the whole run; they divide the
    global batch, and ranks own whole ones where their number allows it. 0: the largest divisor of
    the global batch up to 64 or the first rank count, one that the ranks share evenly if there
    is."""
    seed: int = 0
    """Seed of initialization, order, masks and frames."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs too, which is slower; CPUs always do."""
    threads_per_rank: NonNegativeInt = 0
    """CPU threads of each rank; 0: the cores of the machine divided by its ranks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
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
        ValueError: a field is out of range, or does not fit another one.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "new_decoder", "mask", "loss")

    run_dir: str = "runs/pretrain"
    """Folder of the run: configuration, checkpoints, pictures, weights. An existing run resumes."""
    initial_weights: str = ""
    """ImageNet MAE or published CAV-MAE checkpoint to initialize from, of any audio length, image
    size and number of mel bins; empty: random."""
    new_decoder: bool = False
    """Begin the decoder at random, whatever `initial_weights` holds of one: for checkpoints with a
    decoder of another kind or size, and for those with the encoder alone."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pictures: PositiveInt = 4
    """Validation clips shown masked, reconstructed and original at each validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.loss.contrastive_group
        if group and self.global_batch % group:
            raise ValueError(
                f"loss.contrastive_group is {group}, which does not divide "
                f"global_batch {self.global_batch}"
            )
        if self.loss.contrastive_weight > 0 and self.data.modality != "both":
            raise ValueError(
                f"data.modality is {self.data.modality} and loss.contrastive_weight "
                f"{self.loss.contrastive_weight}, which needs pairs of sound and picture; set "
                "loss.contrastive_weight to 0"
            )


@dataclass(frozen=True)
class ClassifierConfig(CheckedFields, section="classifier"):
    """The classes, and how they are learned (paper section 4.2)."""

    labels: str = ""
    """CSV file of the classes with the columns index, mid, display_name, as published; clips are
    labelled by mid. Empty: the labels of the training set, sorted by name."""
    allow_empty_classes: bool = False
    """Train even if the training set has no clip of some classes of the label file."""
    mode: Literal["multimodal", "audioonly", "videoonly"] = "multimodal"
    """Input modalities: audio and video, or one of them, and then nothing is read of the other."""
    loss: Literal["bce", "cross_entropy"] = "bce"
    """`bce` for clips of several labels (AudioSet), `cross_entropy` for clips of one (VGGSound)."""
    label_smoothing: Annotated[float, Limit(lambda x: 0 <= x < 1, "0 (none) up to below 1")] = 0.1
    """Fraction of a target that is spread over all classes; 0: none."""
    head_lr_mult: PositiveFloat = 1.0
    """Learning rate multiplier of the new classifier head."""
    train_encoders: bool = True
    """Train the whole model; otherwise only the head, on frozen features (linear probe)."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run.

    Raises:
        ValueError: a field is out of range, or does not fit another one.
    """

    FIXED: ClassVar[tuple[str, ...]] = (*RunConfig.FIXED, "classifier")

    run_dir: str = "runs/finetune"
    """Folder of the run: configuration, checkpoints, labels, weights. An existing run resumes."""
    initial_weights: str = ""
    """Weights of a pretraining run, or a published CAV-MAE checkpoint, to initialize from, of any
    audio length, image size and number of mel bins; empty: random."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        mode = self.classifier.mode
        modality = _OF_MODE[mode]
        if self.data.modality not in ("both", modality):
            raise ValueError(
                f"data.modality is {self.data.modality} and classifier.mode {mode}, which decides "
                f"what is read; set data.modality to {modality}"
            )
        object.__setattr__(self, "data", replace(self.data, modality=modality))
