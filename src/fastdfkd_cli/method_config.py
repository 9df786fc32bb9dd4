"""What each method of synthesis is set by: the section ``synthesis`` of a run's settings, a class for each method.

Defaults are those that were published for 32x32 images (see docs/methods.md); a class has a field for what its method
reads, and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastdfkd_cli.errors import UsageError, brief

Method = Literal["fast", "deepinversion", "cmi", "dafl", "zskt", "dfq", "dfad", "nayer", "generative-dfd", "kd", "dfnd"]
Reuse = Literal["none", "sequential", "meta"]
Images = Literal["generator", "pixel"]
MetaGradient = Literal["fomaml", "reptile"]
Latent = Literal["fresh", "meta"]
Adversarial = Literal["agreement-kl", "jsd"]
LearningRateSchedule = Literal["constant", "cosine"]
Augmentation = Literal["crop-flip", "resized-crop-flip", "crop", "none"]
Keep = Literal["best", "last"]


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"{name} must be {expected}, not {brief(value)}.")


def positive(owner: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{section}.{name}", value, "greater than 0")


def at_most(owner: object, section: str, limit: int, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value <= limit, f"{section}.{name}", value, f"{limit:,} or less")


def non_negative(owner: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value >= 0, f"{section}.{name}", value, "0 or more")


def below_one(owner: object, section: str, *names: str) -> None:
    """Adam's betas, momentum and other shares that leave something: in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < 1, f"{section}.{name}", value, "in [0, 1)")


def _weights(owner: object, *names: str) -> None:
    """Weights of loss terms: none negative, and one above 0 at least."""
    non_negative(owner, "synthesis", *names)
    listed = f"synthesis.{', '.join(names[:-1])} and {names[-1]}"
    require(any(getattr(owner, name) for name in names), listed, 0, "not all zero (nothing would be synthesised)")


def _descends(owner: object, *names: str) -> None:
    listed = ", ".join(names[:-1]) + f" and {names[-1]}"
    some = any(getattr(owner, name) > 0 for name in names)
    require(some, f"synthesis.{listed}", 0, "not all zero (nothing would be synthesised)")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method has; the others are its own."""

    #: Whether it makes images; otherwise it distils on those that are given.
    makes_images: ClassVar[bool] = True
    #: Whether those that are given are chosen from an unlabelled set.
    selects: ClassVar[bool] = False
    #: Whether it makes nothing without a student to play against.
    needs_student: ClassVar[bool] = False
    #: Whether the student learns from images that are made for each KD step, and not from a pool.
    feeds: ClassVar[bool] = False
    #: Whether several processes can carry it out together.
    scales: ClassVar[bool] = False
    #: Whether a batch that does not fit the memory can be made in parts.
    splits: ClassVar[bool] = False
    #: Batches that a set is better without, where the recipe has no warm-up.
    burn_in: ClassVar[int] = 10

    #: Images per synthesised batch.
    batch_size: int = 256

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "synthesis.batch_size", self.batch_size, "2 or more (batch statistics)")
        at_most(self, "synthesis", 2**31, "batch_size")

    @property
    def inner_steps(self) -> int:
        """Gradient steps for each batch."""
        return int(getattr(self, "steps", 1))

    @property
    def needs_statistics(self) -> bool:
        """Whether the teacher must have BatchNorm layers."""
        return float(getattr(self, "feature_weight", 0.0)) > 0

    @property
    def momentum_of_statistics(self) -> float:
        """Weight of earlier batches in the feature term, where the method has one."""
        return float(getattr(self, "feature_momentum", 0.0))

    @property
    def renewal(self) -> int:
        """Rounds after the warm-up until the generator's one renewal (0: never)."""
        return int(getattr(self, "generator_reset_after", 0))


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig(MethodConfig):
    """FastDFKD, ``--method fast``: how a batch of images is made (the paper's Algorithm 1, lines 4 to 14).

    The three switches of the paper's Table 5 are ``reuse``, ``images`` and ``feature_momentum``.
    """

    scales: ClassVar[bool] = True
    splits: ClassVar[bool] = True

    #: What a new batch starts from: nothing, the previous batch's result, or the meta-learned initialisation.
    reuse: Reuse = "meta"
    #: What the inner loop optimises: a copy of the generator and its latents, or the pixels themselves.
    images: Images = "generator"
    #: First-order MAML (the sum of the inner gradients) or Reptile (the parameter difference, Eq. 10).
    meta_gradient: MetaGradient = "fomaml"
    #: Factor on Reptile's parameter difference (published runs: 67; the paper's Eq. 10: 1).
    reptile_scale: float = 67.0
    #: k, the inner gradient steps per batch.
    steps: int = 5
    #: Inner Adam's learning rate for the generator's copy.
    lr_generator: float = 3e-3
    #: Inner Adam's learning rate for z (or for the pixels).
    lr_latent: float = 1e-2
    #: The meta optimiser's learning rate; unset: ``lr_generator * steps``.
    meta_lr_generator: float | None = None
    #: The meta optimiser's learning rate for a meta-learned z.
    meta_lr_latent: float = 5e-3
    #: A new z ~ N(0, I) per batch, or one meta-learned batch of z.
    latent: Latent = "fresh"
    #: Re-initialise a meta-learned z and the meta optimiser every so many batches (0: never).
    latent_reset_every: int = 0
    #: Re-initialise the generator's first layer once, so many rounds after the warm-up (0: never).
    generator_reset_after: int = 0
    #: Adam's betas, inner and meta.
    beta1: float = 0.5
    beta2: float = 0.999
    #: Weight of the feature term (Eq. 13 or 15); 0 switches it off.
    feature_weight: float = 10.0
    #: Weight of the accumulated statistics in the feature term; 0 is Eq. 13's term without momentum.
    feature_momentum: float = 0.9
    #: Weight of the class term.
    class_weight: float = 0.4
    #: Weight of the adversarial term; it counts only once the student is being trained.
    adversarial_weight: float = 1.1
    #: Eq. 13's negative JSD, or the published runs' negative KL where teacher and student agree.
    adversarial: Adversarial = "agreement-kl"
    #: Softening of both outputs in the adversarial term.
    adversarial_temperature: float = 1.0
    #: Which images are kept: the iterate with the lowest loss (published runs), or G(z; theta) behind the last step
    #: (Algorithm 1, line 10).
    keep: Keep = "best"
    #: What stands between an image and the teacher.
    augmentation: Augmentation = "crop-flip"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "steps", "lr_generator", "lr_latent", "meta_lr_latent", "reptile_scale")
        positive(self, "synthesis", "adversarial_temperature")
        if self.meta_lr_generator is not None:
            positive(self, "synthesis", "meta_lr_generator")
        non_negative(self, "synthesis", "feature_weight", "class_weight", "adversarial_weight")
        non_negative(self, "synthesis", "latent_reset_every", "generator_reset_after")
        at_most(self, "synthesis", 2**31, "steps")
        below_one(self, "synthesis", "beta1", "beta2", "feature_momentum")
        require(
            self.feature_weight + self.class_weight + self.adversarial_weight > 0,
            "synthesis.feature_weight, class_weight and adversarial_weight",
            0,
            "not all zero (nothing would be synthesised)",
        )

    @property
    def meta_lr(self) -> float:
        """The meta optimiser's learning rate for the generator."""
        return self.lr_generator * self.steps if self.meta_lr_generator is None else self.meta_lr_generator


@dataclass(frozen=True, kw_only=True)
class DeepInversionConfig(MethodConfig):
    """DeepInversion, ``--method deepinversion``; with a student, Adaptive DeepInversion."""

    burn_in: ClassVar[int] = 0

    #: Adam's steps for each batch.
    steps: int = 1000
    #: Adam's learning rate for the pixels, in units of a normalised image.
    lr_pixels: float = 0.1
    #: Adam's betas.
    beta1: float = 0.5
    beta2: float = 0.99
    #: Weight of the feature term.
    feature_weight: float = 10.0
    #: Weight of the class term.
    class_weight: float = 1.0
    #: Weight of the adversarial term; it counts only once the student is being trained.
    adversarial_weight: float = 1.0
    #: Weight of the total variation.
    tv_weight: float = 1e-3
    #: Weight of the pixels' L2 norm.
    l2_weight: float = 0.0
    #: The largest shift before the teacher, as a share of the image's side.
    jitter: float = 0.125
    #: Whether the teacher sees mirrored images half of the time; digits and text should not be mirrored.
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "steps", "lr_pixels")
        at_most(self, "synthesis", 2**31, "steps")
        non_negative(self, "synthesis", "feature_weight", "class_weight", "adversarial_weight", "tv_weight")
        non_negative(self, "synthesis", "l2_weight")
        _descends(self, "feature_weight", "class_weight", "adversarial_weight")
        below_one(self, "synthesis", "beta1", "beta2", "jitter")


@dataclass(frozen=True, kw_only=True)
class CMIConfig(MethodConfig):
    """CMI, ``--method cmi``."""

    burn_in: ClassVar[int] = 0

    #: Adam's steps for each batch.
    steps: int = 200
    #: Adam's learning rate for the generator and z.
    lr_generator: float = 1e-3
    #: Adam's learning rate for the projection head.
    lr_head: float = 1e-3
    #: Adam's betas for the generator and z; the head's are 0.9 and 0.999.
    beta1: float = 0.5
    beta2: float = 0.999
    #: Weight of the feature term.
    feature_weight: float = 1.0
    #: Weight of the class term.
    class_weight: float = 1.0
    #: Weight of the adversarial term; it counts only once the student is being trained.
    adversarial_weight: float = 0.5
    #: Weight of the contrastive term.
    contrastive_weight: float = 0.8
    #: Softening in the contrastive term.
    contrastive_temperature: float = 0.2
    #: Earlier images that the memory bank holds.
    bank_size: int = 40_960
    #: The largest memory bank in MiB; it holds fewer images where their features are long.
    bank_mib: int = 256
    #: Earlier images, drawn from the bank in each step, that the batch is told from.
    negatives: int = 4096
    #: Numbers that the projection head makes of an image.
    head_dim: int = 256
    #: The head's hidden layer is as wide as the teacher's features, up to so many units.
    head_hidden: int = 4096
    #: Smallest share of the image that a local view shows.
    local_scale: float = 0.25
    #: Whether views are mirrored half of the time; digits and text should not be.
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "steps", "lr_generator", "lr_head", "contrastive_temperature", "bank_size")
        positive(self, "synthesis", "bank_mib", "negatives", "head_dim", "head_hidden")
        non_negative(self, "synthesis", "feature_weight", "class_weight", "adversarial_weight", "contrastive_weight")
        at_most(self, "synthesis", 2**31, "steps", "bank_size", "negatives")
        at_most(self, "synthesis", 2**20, "bank_mib")
        at_most(self, "synthesis", 2**16, "head_dim", "head_hidden")
        _descends(self, "feature_weight", "class_weight", "adversarial_weight", "contrastive_weight")
        below_one(self, "synthesis", "beta1", "beta2")
        require(0 < self.local_scale <= 1, "synthesis.local_scale", self.local_scale, "in (0, 1]")

    @property
    def needs_statistics(self) -> bool:
        """The contrastive term, too, reads the inputs of BatchNorm layers."""
        return self.feature_weight > 0 or self.contrastive_weight > 0


@dataclass(frozen=True, kw_only=True)
class OneGeneratorConfig(MethodConfig):
    """What methods have in common that train one generator over the whole run."""

    feeds: ClassVar[bool] = True
    burn_in: ClassVar[int] = 200

    #: Adam's learning rate for the generator.
    lr_generator: float = 1e-3
    #: How that rate goes on: as it is, or by a cosine to 0 while the student is trained. A generator that plays against
    #: a student at full rate wins in the end, when the student's rate is almost 0.
    lr_schedule: LearningRateSchedule = "constant"
    #: Adam's betas.
    beta1: float = 0.5
    beta2: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "lr_generator")
        below_one(self, "synthesis", "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class DAFLConfig(OneGeneratorConfig):
    """DAFL, ``--method dafl``."""

    #: Weight of the one-hot term: the cross-entropy of the teacher's output with its own answer.
    class_weight: float = 1.0
    #: Weight of the activation term: minus the L1 norm of the features before the teacher's classifier.
    activation_weight: float = 1e-3
    #: Weight of the information entropy term: minus the entropy of the batch's classes.
    balance_weight: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _weights(self, "class_weight", "activation_weight", "balance_weight")


@dataclass(frozen=True, kw_only=True)
class ZSKTConfig(OneGeneratorConfig):
    """ZSKT, ``--method zskt``; its attention transfer is ``distillation.attention_weight``."""

    needs_student: ClassVar[bool] = True

    lr_schedule: LearningRateSchedule = "cosine"
    #: Softening of both outputs in the divergence that the generator climbs.
    adversarial_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "adversarial_temperature")


@dataclass(frozen=True, kw_only=True)
class DFQConfig(OneGeneratorConfig):
    """DFQ, ``--method dfq``."""

    needs_student: ClassVar[bool] = True

    #: Weight of the adversarial term: minus the divergence of the student from the teacher.
    adversarial_weight: float = 1.0
    #: Softening of both outputs in the adversarial term.
    adversarial_temperature: float = 1.0
    #: Weight of the feature term: the distance from the statistics of the teacher's BatchNorm layers.
    feature_weight: float = 1.0
    #: Weight of the class term: the cross-entropy of the teacher's output with its own answer.
    class_weight: float = 1.0
    #: Weight of the balance term: minus the entropy of the batch's classes.
    balance_weight: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "adversarial_temperature")
        _weights(self, "adversarial_weight", "feature_weight", "class_weight", "balance_weight")


@dataclass(frozen=True, kw_only=True)
class DFADConfig(OneGeneratorConfig):
    """DFAD, ``--method dfad``."""

    needs_student: ClassVar[bool] = True

    lr_schedule: LearningRateSchedule = "cosine"
    #: Descend on -log(D + 1) instead of -D, so that a large discrepancy pulls less.
    log_discrepancy: bool = False


@dataclass(frozen=True, kw_only=True)
class NAYERConfig(MethodConfig):
    """NAYER, ``--method nayer``: the settings of the published CIFAR-100 runs."""

    #: What stands for a class: fixed ``orthogonal`` or ``random`` vectors, or the rows of a .safetensors file (the
    #: paper: a text encoder's for the class names), whose one tensor is ``[classes, dim]``.
    embeddings: str = "orthogonal"
    #: Length of orthogonal and random embeddings.
    embedding_dim: int = 512
    #: Gradient steps for each batch (published: 40, and 30 for CIFAR-10).
    steps: int = 40
    #: Adam's learning rate, for the generator and the noisy layers.
    lr_generator: float = 4e-3
    #: Adam's betas.
    beta1: float = 0.5
    beta2: float = 0.999
    #: Batches after which the generator begins anew (0: never; published: 10 rounds of 2).
    generator_life: int = 20
    #: Weight of the feature term; 0 switches it off.
    feature_weight: float = 10.0
    #: Weight of the accumulated statistics in the feature term.
    feature_momentum: float = 0.9
    #: Weight of the class term.
    class_weight: float = 0.5
    #: Weight of the adversarial term; it counts only once the student is being trained.
    adversarial_weight: float = 1.33
    #: What stands between an image and the teacher.
    augmentation: Augmentation = "crop-flip"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.embeddings in ("orthogonal", "random") or self.embeddings.endswith(".safetensors")
        require(known, "synthesis.embeddings", self.embeddings, "orthogonal, random or a .safetensors file")
        positive(self, "synthesis", "embedding_dim", "steps", "lr_generator")
        at_most(self, "synthesis", 2**16, "embedding_dim")
        at_most(self, "synthesis", 2**31, "steps", "generator_life")
        non_negative(self, "synthesis", "generator_life", "feature_weight", "class_weight", "adversarial_weight")
        below_one(self, "synthesis", "beta1", "beta2", "feature_momentum")
        # Rounds that only synthesise have no student, and so no adversarial term.
        require(
            self.feature_weight + self.class_weight > 0,
            "synthesis.feature_weight and class_weight",
            0,
            "not both zero (nothing would be synthesised without a student)",
        )


@dataclass(frozen=True, kw_only=True)
class GenerativeDFDConfig(MethodConfig):
    """Generative DFD, ``--method generative-dfd``."""

    burn_in: ClassVar[int] = 0

    #: Gradient steps for each class's generator, which is trained when its class is first asked for.
    steps: int = 500
    #: Adam's learning rate for a generator.
    lr_generator: float = 1e-3
    #: Adam's betas.
    beta1: float = 0.5
    beta2: float = 0.999
    #: Weight of the feature term; 0 switches it off.
    feature_weight: float = 1.0
    #: Weight of the class term; the statistics, of all classes together, pull the images of one away from it.
    class_weight: float = 5.0
    #: Classes that share a batch.
    classes_per_batch: int = 1
    #: Trained generators that are kept in memory and in checkpoints, in MiB; the others go to a temporary folder.
    memory_mib: int = 256
    #: What stands between an image and the teacher while a generator is trained.
    augmentation: Augmentation = "crop-flip"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "steps", "lr_generator", "classes_per_batch")
        non_negative(self, "synthesis", "feature_weight", "class_weight", "memory_mib")
        at_most(self, "synthesis", 2**31, "steps")
        at_most(self, "synthesis", 2**20, "memory_mib")
        require(
            self.classes_per_batch <= self.batch_size // 2,
            "synthesis.classes_per_batch",
            self.classes_per_batch,
            f"at most half of synthesis.batch_size ({self.batch_size})",
        )
        below_one(self, "synthesis", "beta1", "beta2")
        require(
            self.feature_weight + self.class_weight > 0,
            "synthesis.feature_weight and class_weight",
            0,
            "not both zero (nothing would be synthesised)",
        )


@dataclass(frozen=True, kw_only=True)
class KDConfig(MethodConfig):
    """Plain distillation on given images, ``--method kd`` (Hinton, Vinyals & Dean 2015): nothing is synthesised.

    ``batch_size`` is that of the quality signal's images, at most.
    """

    makes_images: ClassVar[bool] = False
    scales: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DFNDConfig(MethodConfig):
    """DFND, ``--method dfnd``: images chosen from an unlabelled set; its noisy loss is ``distillation.noise_weight``.

    ``batch_size`` is that of the images that the teacher scores at a time, and of the quality signal's.
    """

    makes_images: ClassVar[bool] = False
    selects: ClassVar[bool] = True

    #: Images kept: those of which the teacher is surest (published, of ImageNet's 1.28 million for CIFAR: 600,000).
    images_kept: int = 600_000

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "synthesis", "images_kept")
        at_most(self, "synthesis", 2**31, "images_kept")


#: The section's class by method.
SETTINGS: dict[str, type[MethodConfig]] = {
    "fast": SynthesisConfig,
    "deepinversion": DeepInversionConfig,
    "cmi": CMIConfig,
    "dafl": DAFLConfig,
    "zskt": ZSKTConfig,
    "dfq": DFQConfig,
    "dfad": DFADConfig,
    "nayer": NAYERConfig,
    "generative-dfd": GenerativeDFDConfig,
    "kd": KDConfig,
    "dfnd": DFNDConfig,
}

__all__ = [
    "SETTINGS",
    "Adversarial",
    "Augmentation",
    "CMIConfig",
    "DAFLConfig",
    "DFADConfig",
    "DFNDConfig",
    "DeepInversionConfig",
    "DFQConfig",
    "GenerativeDFDConfig",
    "KDConfig",
    "LearningRateSchedule",
    "Method",
    "MethodConfig",
    "NAYERConfig",
    "OneGeneratorConfig",
    "SynthesisConfig",
    "ZSKTConfig",
    "at_most",
    "below_one",
    "non_negative",
    "positive",
    "require",
]
