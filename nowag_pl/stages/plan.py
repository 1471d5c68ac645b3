"""The plan of a run, made before anything is computed: the settings of each stage, or None if it is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import Budget
from nowag_pl.functional.ranges import check_real, check_whole

# Sequences that pass through a block together where nothing else is asked for.
DEFAULT_BATCH = 8
ExportFormat = Literal["packed", "dense", "exl3"]
CalibrationMode = Literal["dense", "propagated", "corrected"]


@dataclass(frozen=True)
class GuidanceSettings:
    """Weights of calibration tokens by the final loss.

    Attributes:
        labels: labels of the loss: "text" for the next tokens of the text; "model" for tokens drawn from the model
            itself, for which squared gradients are the Fisher information.
        power: exponent of the squared gradients; smaller values make the weights of tokens more equal.
    """

    labels: Literal["text", "model"] = "text"
    power: float = 1.0

    def __post_init__(self) -> None:
        check_real("calibration.guidance.power", self.power, most=2.0, above=True)


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings for gathering second moments.

    Attributes:
        num_sequences: calibration sequences.
        seed: seed of the places in the calibration text.
        mode: as for :class:`~callbacks.calibration.ModelCalibration`.
        batch_size: sequences that pass through a block together on each device.
        guidance: weights of tokens by the final loss; None: all tokens have equal weight.
        expert_shrinkage: tokens that the moments over all tokens of a block count for in those of an expert, which
            sees only the tokens that are routed to it.
    """

    num_sequences: int = 128
    seed: int = 0
    mode: CalibrationMode = "dense"
    batch_size: int = 8
    guidance: GuidanceSettings | None = None
    expert_shrinkage: float = 128.0

    def __post_init__(self) -> None:
        for name, least in {"num_sequences": 1, "batch_size": 1, "seed": 0}.items():
            check_whole(f"calibration.{name}", getattr(self, name), least)
        check_real("calibration.expert_shrinkage", self.expert_shrinkage)


@dataclass(frozen=True)
class RotationSettings:
    """Settings for rotating the model before it is compressed.

    Attributes:
        kind: as for :class:`~callbacks.rotation.ModelRotation`, but for "none".
        stream: whether the residual stream is rotated, by one matrix for the whole model.
        values: whether the values of attentions are rotated, head by head.
        num_steps: steps of learning each matrix.
        learning_rate: learning rate of Adam at the first step.
        blocks_per_step: blocks on which the matrix of the stream is learned at each step.
        seed: seed of the signs of "hadamard", and of the blocks of each step.
    """

    kind: Literal["learned", "hadamard"] = "learned"
    stream: bool = True
    values: bool = True
    num_steps: int = 100
    learning_rate: float = 1e-2
    blocks_per_step: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"num_steps": 0, "blocks_per_step": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"Expected rotation.{name} of at least {least}, but got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise ValueError(f"Expected rotation.learning_rate above 0, but got {self.learning_rate}.")


@dataclass(frozen=True)
class CompressionSettings:
    """The linears to compress, and their methods.

    Attributes:
        compressor: the method.
        budget: spreads its bits over the linears; None: the same settings everywhere.
        targets: patterns of the linears to compress; None: every linear of every decoder block.
        ignore: patterns of linears that stay dense even if a target matches them.
        overrides: for each pattern, another method, or settings that differ from the method's.
        head: bits of each weight of the head, which is put on a trellis; None: it stays dense.
    """

    compressor: Compressor
    budget: Budget | None = None
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, Compressor | Mapping[str, Any]] = field(default_factory=dict)
    head: int | None = None

    def __post_init__(self) -> None:
        if self.head is not None:
            check_whole("compression.head", self.head, 1, 8)


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings for finetuning blocks.

    Attributes:
        num_sequences: training sequences.
        num_held_out: sequences that choose the epoch.
        targets: "block" for the dense block's outputs on the same inputs; "parts" for those of its attention and its
            MLP, each for itself; "model" for the hidden states of the dense model.
        max_epochs: largest number of passes over the training sequences.
        learning_rate: learning rate of AdamW at the start.
        batch_size: sequences per step on all devices together.
        accumulate_grad_batches: batches whose gradients are added up before a step.
        gradient_clip_val: largest norm of a gradient.
        plateau_patience: epochs without a lower held-out error before the learning rate is halved.
        stop_patience: epochs without a lower held-out error before training of a block ends.
        seed: seed of the places of the sequences in the text, and of their order.
        activations: place of the hidden states while they are used: "memory" for host memory, "disk" for mapped files.
        precision: precision of the computation; "auto" for bf16-mixed if the device supports it, else 32-true.
    """

    num_sequences: int = 96
    num_held_out: int = 32
    targets: Literal["block", "parts", "model"] = "block"
    max_epochs: int = 5
    learning_rate: float = 1e-4
    batch_size: int = 8
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 1.0
    plateau_patience: int = 0
    stop_patience: int = 3
    seed: int = 0
    activations: Literal["memory", "disk"] = "memory"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"

    def __post_init__(self) -> None:
        least_of = dict.fromkeys(("num_sequences", "num_held_out", "max_epochs", "batch_size"), 1)
        least_of |= {"accumulate_grad_batches": 1, "stop_patience": 1, "plateau_patience": 0, "seed": 0}
        for name, least in least_of.items():
            check_whole(f"finetuning.{name}", getattr(self, name), least)
        for name in ("learning_rate", "gradient_clip_val"):
            check_real(f"finetuning.{name}", getattr(self, name), above=True)

    @property
    def num_streams(self) -> int:
        """Sets of hidden states that are on disk at once: inputs, targets, and those of the next block."""
        return 3 if self.targets == "block" else 4

    @property
    def num_held(self) -> int:
        """Sets of hidden states that a block is trained with: inputs and targets."""
        return 3 if self.targets == "parts" else 2


@dataclass(frozen=True)
class ExportSettings:
    """The folders to write.

    Attributes:
        format: "packed" linears, an ordinary "dense" checkpoint, or an "exl3" folder.
    """

    format: ExportFormat = "packed"

    @property
    def dense(self) -> bool:
        """Whether linears are reconstructed."""
        return self.format == "dense"


PROMPTS = ("The capital of France is", "Explain in two sentences why the sky is blue.", "Write a haiku about the sea.")


@dataclass(frozen=True)
class PromptSettings:
    """The prompts that the dense and the compressed model continue in the report.

    Attributes:
        prompts: plain texts; a user's turn where the model has a chat template.
        max_new_tokens: longest continuation.
    """

    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"Expected report.max_new_tokens of at least 1, but got {self.max_new_tokens}.")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("Expected report.prompts that are not empty; [] leaves them out.")


@dataclass(frozen=True)
class ReportSettings:
    """Settings for comparing with the dense model.

    Attributes:
        batch_size: windows of the evaluation texts that pass through a block together.
        samples: the prompts to continue.
        damage_windows: evaluation windows on which the damage after each block is measured; 0: none.
    """

    batch_size: int = 8
    samples: PromptSettings = field(default_factory=PromptSettings)
    damage_windows: int = 2

    def __post_init__(self) -> None:
        check_whole("report.batch_size", self.batch_size, 1)
        check_whole("report.damage_windows", self.damage_windows, 0)


@dataclass
class Plan:
    """The stages of a run. Callbacks enter theirs before any of them is set up, and read those of the others.

    Attributes:
        calibration: second moments; None if nothing is compressed.
        compression: linears; None to train or measure a model without compressing it.
        finetuning: blocks, one after the other.
        export: model folders.
        report: comparison with the dense model.
        free_batches: names of the stages whose batch size was not given, so that a smaller one may take its place.
        rotation: of the model before anything else; None to compress the model as it is.
    """

    calibration: CalibrationSettings | None = None
    compression: CompressionSettings | None = None
    finetuning: FinetuningSettings | None = None
    export: ExportSettings | None = None
    report: ReportSettings | None = None
    free_batches: set[str] = field(default_factory=set)
    rotation: RotationSettings | None = None
