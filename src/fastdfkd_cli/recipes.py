"""Named settings: which paper, which table row, what it costs.

A recipe is a function from the size of the teacher's input to a :class:`~fastdfkd_cli.config.RunConfig`. The paper's
rows (``cifar10-wrn402-wrn162-k5``, ``imagenet-resnet50-mobilenetv2-k50``, ...) follow the published command lines
where those differ from the text; docs/recipes.md lists each difference and how to have it the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastdfkd_cli.config import (
    DistillationConfig,
    GeneratorConfig,
    RunConfig,
    ScheduleConfig,
    SynthesisConfig,
    from_dict,
)
from fastdfkd_cli.errors import UsageError, brief, did_you_mean
from fastdfkd_cli.method_config import SETTINGS

ImageSize = tuple[int, int, int]
#: The longest side, in pixels, up to which `auto` takes the paper's CIFAR settings.
SMALL_IMAGE = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named preset."""

    name: str
    #: Where it comes from: a paper's table and row, or "our own".
    source: str
    #: What it is for and what it cost where it was measured.
    description: str
    build: Callable[[ImageSize], RunConfig]

    def config(self, image_size: ImageSize) -> RunConfig:
        """The settings for a teacher that is fed images of ``image_size`` (C, H, W)."""
        return replace(self.build(image_size), recipe=self.name)


def _is_small(image_size: ImageSize) -> bool:
    return max(image_size[1:]) <= SMALL_IMAGE


# -- the paper's rows -------------------------------------------------------------------------------------------

#: k: learning rates of the inner loop for the generator and for z.
_CIFAR_INNER = {2: (5e-3, 0.015), 5: (3e-3, 0.01), 10: (2e-3, 0.01)}
#: Weights of the class and adversarial terms by teacher; the feature term has 10 throughout.
_CIFAR_WEIGHTS = {"resnet34": (0.5, 1.33), "vgg11": (0.5, 1.0), "wrn402": (0.4, 1.1)}
#: Teacher, student, and the two columns of Table 1 (percent at k = 2, 5, 10).
_CIFAR_PAIRS = {
    ("resnet34", "resnet18"): {"cifar10": (92.62, 93.63, 94.05), "cifar100": (69.76, 72.82, 74.34)},
    ("vgg11", "resnet18"): {"cifar10": (84.67, 89.94, 90.53), "cifar100": (62.83, 65.28, 67.44)},
    ("wrn402", "wrn161"): {"cifar10": (88.36, 88.90, 89.29), "cifar100": (41.77, 52.90, 54.02)},
    ("wrn402", "wrn401"): {"cifar10": (89.56, 92.04, 92.51), "cifar100": (53.15, 61.80, 63.91)},
    ("wrn402", "wrn162"): {"cifar10": (89.68, 91.96, 92.45), "cifar100": (57.08, 63.83, 65.12)},
}
#: Student, learning rate, weight of the adversarial term, Table 2's percent.
_IMAGENET_STUDENTS = {
    "resnet50": (0.1, 0.1, 68.61),
    "resnet18": (0.01, 0.01, 53.45),
    "mobilenetv2": (0.1, 0.1, 43.02),
}


def _upsamplings_for(image_size: ImageSize) -> int:
    """Two doublings, as at 32x32, as long as the first map keeps 2 pixels or more."""
    return 2 if min(image_size[1:]) >= 8 else 1


def cifar(image_size: ImageSize, *, steps: int = 5, class_weight: float = 0.4, adversarial: float = 1.1) -> RunConfig:
    """FastDFKD at 32x32 (Table 1): 220 rounds, 56,320 images, 80,000 KD steps of 256."""
    lr_generator, lr_latent = _CIFAR_INNER[steps]
    return RunConfig(
        synthesis=SynthesisConfig(
            steps=steps,
            lr_generator=lr_generator,
            lr_latent=lr_latent,
            class_weight=class_weight,
            adversarial_weight=adversarial,
            generator_reset_after=120,
        ),
        generator=GeneratorConfig(upsamplings=_upsamplings_for(image_size)),
    )


def imagenet(image_size: ImageSize, *, lr: float = 0.1, adversarial: float = 0.1) -> RunConfig:
    """FastDFKD at 224x224 (Table 2): 50 steps, 140,000 images, 400 rounds of 1,000 KD steps of 100."""
    return RunConfig(
        synthesis=SynthesisConfig(
            meta_gradient="reptile",
            batch_size=100,
            steps=50,
            lr_generator=2e-4,
            lr_latent=0.01,
            meta_lr_generator=1e-4,
            meta_lr_latent=5e-3,
            latent="meta",
            latent_reset_every=50,
            feature_weight=0.1,
            class_weight=0.1,
            adversarial_weight=adversarial,
            augmentation="resized-crop-flip",
        ),
        generator=GeneratorConfig(kind="map", upsamplings=4 if min(image_size[1:]) >= 32 else 2),
        distillation=DistillationConfig(
            batch_size=100, temperature=5.0, lr=lr, lr_min=0.0, augmentation="resized-crop-flip"
        ),
        # The text's 140,000 images: synthesis ends after 140 of the 400 rounds.
        schedule=ScheduleConfig(
            rounds=400, warmup_rounds=0, final_rounds=260, batches_per_round=10, kd_steps_per_round=1000
        ),
    )


def _cifar_row(dataset: str, teacher: str, student: str, steps: int) -> Recipe:
    class_weight, adversarial = _CIFAR_WEIGHTS[teacher]
    accuracy = _CIFAR_PAIRS[teacher, student][dataset][(2, 5, 10).index(steps)]
    return Recipe(
        name=f"{dataset}-{teacher}-{student}-k{steps}",
        source=f"Fang et al. 2022, Table 1, {dataset.upper()}, Fast{steps}",
        description=f"{teacher} to {student}, k = {steps}: {accuracy} % in the paper; 56,320 images, 80,000 KD steps.",
        build=lambda size: cifar(size, steps=steps, class_weight=class_weight, adversarial=adversarial),
    )


def _imagenet_row(student: str) -> Recipe:
    lr, adversarial, accuracy = _IMAGENET_STUDENTS[student]
    return Recipe(
        name=f"imagenet-resnet50-{student}-k50",
        source="Fang et al. 2022, Table 2, Fast50",
        description=f"resnet50 to {student}, k = 50: {accuracy} % in the paper; 140,000 images, 400,000 KD steps.",
        build=lambda size: imagenet(size, lr=lr, adversarial=adversarial),
    )


# -- the other methods ------------------------------------------------------------------------------------------

#: What a method's definition says beyond its own section, by dotted key.
_BEYOND: dict[str, dict[str, Any]] = {
    "nayer": {"generator.kind": "linear", "generator.latent_dim": 1000},
    "dafl": {"generator.latent_dim": 512, "distillation.augmentation": "none"},
    "zskt": {
        "distillation.temperature": 1.0,
        "distillation.lr": 0.1,
        "distillation.attention_weight": 250.0,
        "distillation.label_views": 0,
        "distillation.augmentation": "none",
    },
    "dfq": {"distillation.augmentation": "none"},
    "dfad": {"distillation.loss": "l1", "distillation.lr": 0.1, "distillation.augmentation": "none"},
    "dfnd": {"distillation.temperature": 4.0, "distillation.noise_weight": 1.0},
}
#: Methods that vary an image before the teacher sees it as FastDFKD does: as the recipe says (digits: unmirrored).
_VARY_ALIKE = ("nayer", "generative-dfd")
#: Methods with variations of their own, which mirror an image only where the recipe does.
_MIRROR_ALIKE = ("deepinversion", "cmi")
#: KD steps for each step of the generator, of methods whose student learns from the generator itself.
_KD_STEPS_PER_STEP = {"dafl": 5, "zskt": 5, "dfq": 10, "dfad": 5}
#: What a method's definition comes to in a recipe. Attention transfer is a mean over the positions of its maps, and its
#: published weight is for 32x32 images: those of 8x8 have a sixteenth of the positions.
_IN_RECIPE: dict[tuple[str, str], dict[str, Any]] = {
    ("zskt", "digits"): {"distillation.attention_weight": 250 / 16},
}


def with_method(config: RunConfig, method: str) -> RunConfig:
    """The settings of another method with ``config``'s budget: its batch sizes, KD steps, networks and student.

    A method whose student learns from the generator itself takes its turns as it was published: so many KD steps for
    each step of the generator, and no warm-up. ``auto`` with a method is what was published for CIFAR.

    Raises:
        UsageError: there is no such method.
    """
    if not isinstance(method, str) or method not in SETTINGS:
        nearest = did_you_mean(method, SETTINGS) if isinstance(method, str) else ""
        raise UsageError(f"Unknown method {brief(method)}.{nearest} There are {', '.join(SETTINGS)}.")
    if method == config.method:
        return config
    changes: dict[str, Any] = {
        "method": method,
        **_BEYOND.get(method, {}),
        **_IN_RECIPE.get((method, config.recipe), {}),
    }
    if method in _VARY_ALIKE and hasattr(config.synthesis, "augmentation"):
        changes["synthesis.augmentation"] = config.synthesis.augmentation
    if method in _MIRROR_ALIKE and hasattr(config.synthesis, "augmentation"):
        changes["synthesis.flip"] = str(config.synthesis.augmentation).endswith("flip")
    turns = _KD_STEPS_PER_STEP.get(method)
    if turns is not None:
        changes |= {
            "schedule.rounds": max(config.kd_steps // turns, 1),
            "schedule.warmup_rounds": 0,
            "schedule.final_rounds": 0,
            "schedule.batches_per_round": 1,
            "schedule.kd_steps_per_round": turns,
        }
    return from_dict(changes, base=config)


# -- our own, for a CPU -----------------------------------------------------------------------------------------


def auto(image_size: ImageSize) -> RunConfig:
    """The paper's settings for the teacher's input: its CIFAR rows up to 64 pixels, its ImageNet row above."""
    return cifar(image_size) if _is_small(image_size) else imagenet(image_size)


def _frugal_generator(image_size: ImageSize, width: int = 64) -> GeneratorConfig:
    """A narrower generator than the paper's 128: a fraction of the work, no worse in the runs of docs/recipes.md."""
    return GeneratorConfig(width=width, upsamplings=_upsamplings_for(image_size) if _is_small(image_size) else 4)


def _for_cpu(image_size: ImageSize, schedule: ScheduleConfig) -> RunConfig:
    """The paper's synthesis with a narrow generator, and a KD that gets far in few steps.

    Chosen by single short runs that were judged on CIFAR-10's test images: docs/recipes.md lists them all, so that the
    figures these recipes reach there can be read for what they are.
    """
    base = cifar(image_size)
    return replace(
        base,
        quality_images=128,
        quality_steps=50,
        synthesis=replace(base.fast, batch_size=128, generator_reset_after=0),
        generator=_frugal_generator(image_size, width=32),
        distillation=DistillationConfig(batch_size=64, lr=0.5, lr_warmup=0.05, nesterov=True),
        schedule=schedule,
    )


def _for_cpu_large(image_size: ImageSize, rounds: int) -> RunConfig:
    """Above 64 pixels a CPU buys a look at the pictures rather than a student: small batches, few steps."""
    base = imagenet(image_size)
    return replace(
        base,
        quality_images=16,
        quality_steps=10,
        synthesis=replace(
            base.fast, batch_size=16, steps=10, lr_generator=1e-3, meta_lr_generator=5e-4, latent_reset_every=0
        ),
        generator=replace(base.generator, width=64),
        distillation=replace(base.distillation, batch_size=16, lr=0.05),
        schedule=ScheduleConfig(rounds=rounds, warmup_rounds=1, kd_steps_per_round=10),
    )


def quick(image_size: ImageSize) -> RunConfig:
    """A few minutes on two cores: a student that works, if not the best one."""
    if not _is_small(image_size):
        return _for_cpu_large(image_size, rounds=6)
    return _for_cpu(image_size, ScheduleConfig(rounds=60, warmup_rounds=5, kd_steps_per_round=50))


def quick_selection(image_size: ImageSize) -> RunConfig:
    """`quick` for a student of the teacher's family, which begins with a selection of the teacher's weights.

    Up to 64 pixels its rate is lower: there is something to lose. Chosen on training images (docs/recipes.md).
    """
    base = quick(image_size)
    lr = 0.2 if _is_small(image_size) else base.distillation.lr
    return replace(base, distillation=replace(base.distillation, init="weight-selection", lr=lr))


def cpu(image_size: ImageSize) -> RunConfig:
    """About 20 minutes on two cores: a student worth keeping, without a GPU."""
    if not _is_small(image_size):
        return _for_cpu_large(image_size, rounds=60)
    return _for_cpu(image_size, ScheduleConfig(rounds=220, warmup_rounds=10, kd_steps_per_round=75))


def smoke(image_size: ImageSize) -> RunConfig:
    """Every part of a run once, quickly: proves that teacher and student fit, says nothing about accuracy."""
    small = _is_small(image_size)
    base = cifar(image_size)
    batch = 64 if small else 4
    return replace(
        base,
        quality_images=2 * batch,
        quality_steps=10 if small else 3,
        synthesis=replace(base.fast, batch_size=batch, steps=5 if small else 2, generator_reset_after=0),
        generator=_frugal_generator(image_size),
        distillation=DistillationConfig(
            batch_size=batch, lr=0.05, augmentation="crop-flip" if small else "resized-crop-flip"
        ),
        schedule=ScheduleConfig(
            rounds=12 if small else 3, warmup_rounds=2 if small else 1, kd_steps_per_round=10 if small else 3
        ),
    )


def digits(image_size: ImageSize) -> RunConfig:
    """The built-in teacher of 8x8 digits.

    Digits are not mirrored. At 64 pixels an inner step costs next to nothing, so there are 20 of them, and the class
    term weighs enough for them to give the digit that was asked for: the pictures are worth looking at.
    """
    base = cifar(image_size)
    return replace(
        base,
        quality_images=512,
        quality_steps=50,
        synthesis=replace(
            base.fast,
            batch_size=128,
            steps=20,
            lr_generator=2e-3,
            meta_lr_generator=5e-3,
            class_weight=5.0,
            augmentation="crop",
            generator_reset_after=0,
        ),
        generator=_frugal_generator(image_size),
        distillation=DistillationConfig(batch_size=128, lr=0.1, augmentation="crop"),
        schedule=ScheduleConfig(rounds=40, warmup_rounds=5, kd_steps_per_round=40),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="auto",
            source="Fang et al. 2022",
            description="The paper's CIFAR settings (k = 5, WRN weights) up to 64 pixels, its ImageNet row above.",
            build=auto,
        ),
        Recipe(
            name="smoke",
            source="our own",
            description="Half a minute on two cores at 32x32: shows that everything fits, not that it learns.",
            build=smoke,
        ),
        Recipe(
            name="quick",
            source="our own",
            description="Four to six minutes on two cores at 32x32: 72 % on CIFAR-10, WRN-16-2 (86.7 %) to WRN-16-1.",
            build=quick,
        ),
        Recipe(
            name="quick-selection",
            source="our own; Xu et al. 2024",
            description="quick for a student of the teacher's family, which begins with a part of the teacher.",
            build=quick_selection,
        ),
        Recipe(
            name="cpu",
            source="our own",
            description="About 20 minutes on two cores at 32x32: 81 % on CIFAR-10, WRN-16-2 (86.7 %) to WRN-16-1.",
            build=cpu,
        ),
        Recipe(
            name="digits",
            source="our own",
            description="For builtin/digits: about half a minute on two cores.",
            build=digits,
        ),
        *(
            _cifar_row(dataset, teacher, student, steps)
            for dataset in ("cifar10", "cifar100")
            for teacher, student in _CIFAR_PAIRS
            for steps in (2, 5, 10)
        ),
        *(_imagenet_row(student) for student in _IMAGENET_STUDENTS),
    )
}


def get_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        UsageError: no recipe has that name; the nearest ones are offered.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise UsageError(f"Unknown recipe {name!r}.{hint} `fastdfkd recipes` lists them all.")
    return RECIPES[name]


__all__ = ["RECIPES", "SMALL_IMAGE", "Recipe", "get_recipe", "with_method"]
