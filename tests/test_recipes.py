"""Every named recipe against the paper's figures, written here once more by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fastdfkd_cli.config import RunConfig, from_dict, to_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.recipes import RECIPES, get_recipe

CIFAR_SIZE, IMAGENET_SIZE = (3, 32, 32), (3, 224, 224)

PAIRS = ["resnet34-resnet18", "vgg11-resnet18", "wrn402-wrn161", "wrn402-wrn401", "wrn402-wrn162"]
TABLE_1 = [
    f"{dataset}-{pair}-k{k}" for dataset, pair, k in itertools.product(("cifar10", "cifar100"), PAIRS, (2, 5, 10))
]
TABLE_2 = [f"imagenet-resnet50-{student}-k50" for student in ("resnet50", "resnet18", "mobilenetv2")]

#: k: inner rates of the generator and of z, and the meta rate (the first times k).
INNER = {2: (5e-3, 0.015, 0.01), 5: (3e-3, 0.01, 0.015), 10: (2e-3, 0.01, 0.02)}
#: Class and adversarial weight by teacher.
WEIGHTS = {"resnet34": (0.5, 1.33), "vgg11": (0.5, 1.0), "wrn402": (0.4, 1.1)}


def flat(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        found.update(
            {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        )
    return found


def assert_holds(config: RunConfig, expected: dict[str, Any]) -> None:
    found = flat(config)
    assert {key: found[key] for key in expected} == expected


def test_each_row_of_tables_1_and_2_has_a_recipe() -> None:
    assert len(TABLE_1) + len(TABLE_2) == 33
    paper = {name for name, recipe in RECIPES.items() if recipe.source.startswith("Fang et al. 2022, Table")}
    assert paper == {*TABLE_1, *TABLE_2}
    assert {"auto", "smoke", "digits"} <= set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str) -> None:
    _, teacher, _, k = name.split("-")
    steps = int(k.removeprefix("k"))
    lr_generator, lr_latent, meta = INNER[steps]
    class_weight, adversarial = WEIGHTS[teacher]
    config = get_recipe(name).config(CIFAR_SIZE)
    assert config.synthesis.meta_lr == pytest.approx(meta)
    assert_holds(
        config,
        {
            "recipe": name,
            "method": "fast",
            "deterministic": False,
            "pool_size": 0,
            "synthesis.reuse": "meta",
            "synthesis.images": "generator",
            "synthesis.meta_gradient": "fomaml",
            "synthesis.reptile_scale": 67,
            "synthesis.batch_size": 256,
            "synthesis.steps": steps,
            "synthesis.lr_generator": lr_generator,
            "synthesis.lr_latent": lr_latent,
            "synthesis.latent": "fresh",
            "synthesis.generator_reset_after": 120,
            "synthesis.beta1": 0.5,
            "synthesis.beta2": 0.999,
            "synthesis.feature_weight": 10,
            "synthesis.feature_momentum": 0.9,
            "synthesis.class_weight": class_weight,
            "synthesis.adversarial_weight": adversarial,
            "synthesis.adversarial": "agreement-kl",
            "synthesis.adversarial_temperature": 1,
            "synthesis.keep": "best",
            "synthesis.augmentation": "crop-flip",
            "generator.kind": "linear",
            "generator.latent_dim": 256,
            "generator.width": 128,
            "generator.upsamplings": 2,
            "distillation.batch_size": 256,
            "distillation.temperature": 20,
            "distillation.lr": 0.2,
            "distillation.lr_min": 2e-4,
            "distillation.lr_warmup": 0,
            "distillation.momentum": 0.9,
            "distillation.nesterov": False,
            "distillation.weight_decay": 1e-4,
            "distillation.augmentation": "crop-flip",
            "distillation.average": "none",
            "schedule.rounds": 220,
            "schedule.warmup_rounds": 20,
            "schedule.final_rounds": 0,
            "schedule.batches_per_round": 1,
            "schedule.kd_steps_per_round": 400,
            "schedule.time_budget": None,
        },
    )
    assert config.synthetic_images == 56_320
    assert config.kd_steps == 80_000


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name: str) -> None:
    small_student = "-resnet18-" in name
    config = get_recipe(name).config(IMAGENET_SIZE)
    assert_holds(
        config,
        {
            "recipe": name,
            "synthesis.reuse": "meta",
            "synthesis.images": "generator",
            "synthesis.meta_gradient": "reptile",
            "synthesis.reptile_scale": 67,
            "synthesis.batch_size": 100,
            "synthesis.steps": 50,
            "synthesis.lr_generator": 2e-4,
            "synthesis.lr_latent": 0.01,
            "synthesis.meta_lr_generator": 1e-4,
            "synthesis.meta_lr_latent": 5e-3,
            "synthesis.latent": "meta",
            "synthesis.latent_reset_every": 50,
            "synthesis.generator_reset_after": 0,
            "synthesis.feature_weight": 0.1,
            "synthesis.feature_momentum": 0.9,
            "synthesis.class_weight": 0.1,
            "synthesis.adversarial_weight": 0.01 if small_student else 0.1,
            "synthesis.augmentation": "resized-crop-flip",
            "generator.kind": "map",
            "generator.latent_dim": 256,
            "generator.width": 128,
            "generator.upsamplings": 4,
            "distillation.batch_size": 100,
            "distillation.temperature": 5,
            "distillation.lr": 0.01 if small_student else 0.1,
            "distillation.augmentation": "resized-crop-flip",
            "schedule.rounds": 400,
            "schedule.warmup_rounds": 0,
            "schedule.batches_per_round": 10,
            "schedule.kd_steps_per_round": 1000,
        },
    )
    assert config.synthetic_images == 140_000
    assert config.kd_steps == 400_000


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("cifar10-resnet34-resnet18-k2", "92.62"),
        ("cifar10-wrn402-wrn162-k5", "91.96"),
        ("cifar10-vgg11-resnet18-k10", "90.53"),
        ("cifar100-wrn402-wrn161-k2", "41.77"),
        ("cifar100-wrn402-wrn401-k10", "63.91"),
        ("imagenet-resnet50-mobilenetv2-k50", "43.02"),
        ("imagenet-resnet50-resnet18-k50", "53.45"),
    ],
)
def test_descriptions_say_what_the_paper_reached(name: str, figure: str) -> None:
    assert f"{figure} % in the paper" in RECIPES[name].description


SIZES = [(1, 8, 8), (3, 32, 32), (4, 64, 48), (3, 8, 64), (3, 65, 65), (3, 96, 384), (3, 384, 384), (1, 8, 384)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*sorted(set(RECIPES) - {*TABLE_1, *TABLE_2}), *TABLE_1[:2], *TABLE_2[:1]])
def test_every_recipe_can_be_built_for_every_size(name: str, size: tuple[int, int, int]) -> None:
    config = RECIPES[name].config(size)
    assert config.recipe == name
    # The generator's first map keeps a pixel or more of what it has to fill, without large borders to cut.
    scale = 2**config.generator.upsamplings
    assert min(size[1:]) / scale >= 0.5
    # A recipe is no more than settings: a file that holds them all gives the same run.
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("size", SIZES)
def test_auto_is_cifars_up_to_64_pixels_and_imagenets_above(size: tuple[int, int, int]) -> None:
    row = "cifar10-wrn402-wrn162-k5" if max(size[1:]) <= 64 else "imagenet-resnet50-resnet50-k50"
    auto, paper = flat(get_recipe("auto").config(size)), flat(get_recipe(row).config(size))
    assert {**auto, "recipe": row} == paper


@pytest.mark.parametrize("size", SIZES)
def test_smoke_is_tiny(size: tuple[int, int, int]) -> None:
    config = get_recipe("smoke").config(size)
    pixels = size[1] * size[2]
    synthesis = config.synthetic_images * config.synthesis.steps * pixels
    distillation = config.kd_steps * config.distillation.batch_size * pixels
    # Passes over pixels, against the 56,320 images in 5 steps and 80,000 steps of 256 of the paper.
    assert synthesis + distillation <= 45e6
    assert config.quality_images * config.quality_steps * pixels <= 6e6
    assert config.schedule.warmup_rounds >= 1  # every part of a run
    assert config.schedule.kd_rounds >= 1


def test_digits_are_not_mirrored() -> None:
    config = get_recipe("digits").config((1, 8, 8))
    assert config.synthesis.augmentation == config.distillation.augmentation == "crop"


def test_an_unknown_recipe() -> None:
    with pytest.raises(UsageError, match=r"Unknown recipe 'smok'\. Did you mean smoke"):
        get_recipe("smok")
    with pytest.raises(UsageError, match=r"`fastdfkd recipes` lists them all"):
        get_recipe("zzzz")
