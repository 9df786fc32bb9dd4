"""Settings check themselves: reachable by name, refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdfkd_cli import config as module
from fastdfkd_cli.config import (
    DistillationConfig,
    GeneratorConfig,
    RunConfig,
    ScheduleConfig,
    SynthesisConfig,
    field_names,
    from_dict,
    full_key,
    parse_value,
    to_dict,
    with_overrides,
)
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import SETTINGS

SECTIONS = {
    "generator": GeneratorConfig,
    "distillation": DistillationConfig,
    "schedule": ScheduleConfig,
}
#: A value in range, other than the default, for the numbers whose range is narrow.
OTHER: dict[str, Any] = {
    "synthesis.embeddings": "texts.safetensors",
    "synthesis.feature_momentum": 0.25,
    "synthesis.beta1": 0.25,
    "synthesis.beta2": 0.25,
    "distillation.momentum": 0.25,
    "distillation.lr_min": 0.1,
    "distillation.lr_warmup": 0.25,
    "distillation.average_decay": 0.25,
    "distillation.noise_accuracy": 0.5,
    "distillation.mixup": 0.25,
    "distillation.cutmix": 0.25,
    "pool_size": 4096,
}


#: Settings of each method to start from.
BASES = {method: from_dict({"method": method}) for method in SETTINGS}


def has(config: RunConfig, key: str) -> bool:
    section, _, name = key.rpartition(".")
    return hasattr(getattr(config, section), name) if section else True


def hint(base: RunConfig, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return typing.get_type_hints(type(getattr(base, section)) if section else RunConfig)[name]


def value_of(config: RunConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def others(base: RunConfig, key: str) -> list[Any]:
    """Allowed values other than the default."""
    default, kind = value_of(base, key), hint(base, key)
    if key in OTHER:
        return [OTHER[key]]
    if typing.get_origin(kind) is Literal:
        return [choice for choice in typing.get_args(kind) if choice != default]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if bool in options:
        return [not default]
    if str in options:
        return ["another"]
    return [(default or 4) + 1 if int in options else (default or 1.0) * 1.5]


#: Every key with each method that has it; what is outside of `synthesis` with one of them.
KEYS = [
    (method, key)
    for method, base in BASES.items()
    for key in field_names()
    if key != "method" and has(base, key) and (key.startswith("synthesis.") or method == "fast")
]


def test_every_field_has_a_key() -> None:
    count = len(dataclasses.fields(RunConfig)) - len(SECTIONS) - 2  # `synthesis`, and `method`, which changes its class
    count += sum(len(dataclasses.fields(section)) for section in (*SECTIONS.values(), *SETTINGS.values()))
    assert len(KEYS) == len(set(KEYS)) == count
    assert {"seed", "synthesis.steps", "schedule.time_budget", "method"} <= set(field_names())


@pytest.mark.parametrize(("method", "key"), KEYS)
def test_every_field_can_be_set_in_every_way(method: str, key: str) -> None:
    base = BASES[method]
    for value in others(base, key):
        dotted = from_dict({key: value}, base=base)
        assert value_of(dotted, key) == value != value_of(base, key)
        section, _, name = key.rpartition(".")
        assert from_dict({section: {name: value}} if section else {name: value}, base=base) == dotted
        text = value if isinstance(value, str) else json.dumps(value)
        assert with_overrides(base, {key: text}) == dotted
        # Nothing else has changed.
        own = [other for other in field_names() if has(base, other)]
        assert [other for other in own if value_of(dotted, other) != value_of(base, other)] == [key]
        # And every field survives the way through JSON.
        assert from_dict(json.loads(json.dumps(to_dict(dotted)))) == dotted


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_brings_its_own_section(method: str) -> None:
    base = RunConfig(synthesis=SynthesisConfig(batch_size=10))
    found = from_dict({"method": method}, base=base)
    assert type(found.synthesis) is SETTINGS[method]
    assert found.synthesis.batch_size == 10
    assert from_dict({"method": method}, base=found) == found
    for other in SETTINGS.values():
        if other is not SETTINGS[method]:
            with pytest.raises(TypeError, match="does not go with the method"):
                dataclasses.replace(found, synthesis=other())


@pytest.mark.parametrize(("method", "key"), KEYS)
@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, math.nan, 1e308, -1, 10**400, [], {}, "nonsense", None, True, 1.5]
)
def test_any_value_is_taken_or_refused_by_the_fields_name(method: str, key: str, value: Any) -> None:
    refused, found = "", BASES[method]
    try:
        found = from_dict({key: value}, base=BASES[method])
    except UsageError as error:
        refused = str(error)
    if refused:
        assert key.rpartition(".")[2] in refused
        assert "\n" not in refused
    else:
        kept = value_of(found, key)
        assert kept == ("none" if value is None and kept == "none" else value)
        if isinstance(kept, float):
            assert math.isfinite(kept)


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "1e999"])
@pytest.mark.parametrize("key", ["seed", "synthesis.steps", "distillation.lr", "schedule.time_budget"])
def test_numbers_without_an_end_are_refused(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"{key} must be a"):
        with_overrides(RunConfig(), {key: text})


OUT_OF_RANGE = {
    "synthesis.batch_size": [0, 1, -4, 2**62],
    "synthesis.steps": [0, -1, 2**62],
    "synthesis.lr_generator": [0, -1e-3],
    "synthesis.lr_latent": [0],
    "synthesis.meta_lr_generator": [0, -1],
    "synthesis.meta_lr_latent": [0],
    "synthesis.reptile_scale": [0],
    "synthesis.latent_reset_every": [-1],
    "synthesis.generator_reset_after": [-1],
    "synthesis.beta1": [-0.1, 1],
    "synthesis.beta2": [1, 1.5],
    "synthesis.feature_weight": [-1],
    "synthesis.feature_momentum": [-0.1, 1],
    "synthesis.class_weight": [-1],
    "synthesis.adversarial_weight": [-1],
    "synthesis.adversarial_temperature": [0],
    "generator.latent_dim": [0, 2**62],
    "generator.width": [1, 2**62],
    "generator.upsamplings": [0, 7],
    "distillation.batch_size": [1, 2**62],
    "distillation.temperature": [0],
    "distillation.lr": [0],
    "distillation.lr_min": [-1, 0.3],
    "distillation.lr_warmup": [-0.1, 1],
    "distillation.momentum": [-0.1, 1],
    "distillation.weight_decay": [-1],
    "distillation.average_decay": [1],
    "distillation.label_views": [-1, 2**62],
    "distillation.mixup": [-0.1, 1.1],
    "distillation.cutmix": [-0.1, 1.1],
    "schedule.rounds": [0, 20],
    "schedule.warmup_rounds": [-1, 220],
    "schedule.batches_per_round": [0, 2**62],
    "schedule.kd_steps_per_round": [0, 2**62],
    "schedule.final_rounds": [-1],
    "schedule.time_budget": [0, -1],
    "seed": [-1, 2**63],
    "pool_size": [-1, 255],
    "quality_images": [-1],
    "quality_steps": [0, -1, 2**62],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_values_out_of_range(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{key.rpartition('.')[2]}.* must be .*not {value}"):
        from_dict({key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"synthesis.feature_weight": 0, "synthesis.class_weight": 0, "synthesis.adversarial_weight": 0}, "all zero"),
        ({"distillation.nesterov": True, "distillation.momentum": 0}, "off without momentum"),
        ({"distillation.lr": 0.01, "distillation.lr_min": 0.02}, "at most distillation.lr"),
        (
            {"distillation.label_views": 2, "distillation.augmentation": "none"},
            "distillation.label_views must be at most 1 with distillation.augmentation=none",
        ),
        ({"distillation.mixup": 0.6, "distillation.cutmix": 0.5}, "at most 1 less distillation.mixup"),
        ({"distillation.mixup": 0.5, "distillation.label_views": 2}, "each mixture is new, and labelled anew"),
        ({"deterministic": True, "schedule.time_budget": 60}, "not repeatable"),
        ({"schedule.rounds": 10, "schedule.warmup_rounds": 6, "schedule.final_rounds": 4}, "less than schedule.rounds"),
        ({"pool_size": 100, "synthesis.batch_size": 101}, "at least synthesis.batch_size"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(values)


def test_values_that_only_go_together_are_checked_together() -> None:
    found = from_dict({"schedule": {"warmup_rounds": 300, "rounds": 400}, "distillation": {"lr_min": 0.4, "lr": 0.5}})
    assert found.schedule.kd_rounds == 100
    assert found.distillation.lr_min == 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"synthesis.setps": 3}, r"Unknown setting 'synthesis.setps'\. Did you mean synthesis.steps"),
        ({"synthesis": {"lr_latnet": 3}}, r"Did you mean synthesis.lr_latent"),
        ({"sede": 3}, r"Did you mean seed"),
        ({"zzzzzz": 3}, r"Unknown setting 'zzzzzz'\. `fastdfkd recipes"),
        ({"synthesis": 3}, r"synthesis must be a section"),
        ({"synthesis.reuse": "mta"}, r"must be one of none, sequential, meta, not 'mta'\. Did you mean meta"),
        ({"method": "fats"}, r"Did you mean fast"),
        ({"synthesis.steps": 2.5}, r"synthesis.steps must be a whole number, not 2.5"),
        ({"synthesis.steps": "many"}, r"must be a whole number, not 'many'"),
        ({"synthesis.steps": True}, r"must be a whole number, not True"),
        ({"distillation.lr": "high"}, r"must be a number, not 'high'"),
        ({"distillation.nesterov": 1}, r"must be true or false, not 1"),
        ({"schedule.time_budget": "soon"}, r"must be a number or none"),
        ({"recipe": 3}, r"must be text"),
    ],
)
def test_misspelt_keys_and_wrong_types(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(values)


def test_whole_numbers_pass_as_either_kind() -> None:
    found = from_dict({"synthesis.steps": 3.0, "distillation.temperature": 4})
    assert type(found.synthesis.steps) is int
    assert type(found.distillation.temperature) is float


def test_none_is_the_choice_of_that_name_or_no_value() -> None:
    # YAML and JSON write null, the command line none, and both may mean the word.
    found = from_dict({"synthesis.reuse": None, "distillation.average": None, "schedule.time_budget": None})
    assert (found.synthesis.reuse, found.distillation.average, found.schedule.time_budget) == ("none", "none", None)
    assert with_overrides(RunConfig(), {"synthesis.augmentation": "none"}).synthesis.augmentation == "none"
    with pytest.raises(UsageError, match="one of generator, pixel, not None"):
        from_dict({"synthesis.images": None})


def test_short_keys() -> None:
    assert full_key("steps") == full_key("synthesis.steps") == "synthesis.steps"
    assert with_overrides(RunConfig(), {"steps": "2", "seed": "7"}).synthesis.steps == 2
    with pytest.raises(UsageError, match=r"'batch_size' is ambiguous: write synthesis.batch_size or distillation"):
        full_key("batch_size")
    with pytest.raises(UsageError, match="Did you mean temperature"):
        full_key("tempratur")


def test_values_on_the_command_line() -> None:
    words = ["3", "2.5", "true", "False", "none", "None", "jsd", '"3"']
    assert [parse_value(word) for word in words] == [3, 2.5, True, False, None, None, "jsd", "3"]
    for word in ("9" * 5000, "[" * 100_000):
        assert parse_value(word) == word


def test_a_base_is_changed_and_not_replaced() -> None:
    base = from_dict({"synthesis.steps": 9, "seed": 4})
    found = from_dict({"synthesis": {"lr_latent": 0.5}}, base=base)
    assert (found.synthesis.steps, found.synthesis.lr_latent, found.seed) == (9, 0.5, 4)
    assert base.synthesis.lr_latent == 0.01


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 3  # type: ignore[misc]


@given(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20), st.integers(1, 5), st.integers(1, 9))
def test_a_schedule_adds_up(rounds: int, warmup: int, final: int, batches: int, steps: int) -> None:
    rounds += warmup + final
    schedule = ScheduleConfig(
        rounds=rounds, warmup_rounds=warmup, final_rounds=final, batches_per_round=batches, kd_steps_per_round=steps
    )
    config = RunConfig(schedule=schedule, synthesis=SynthesisConfig(batch_size=10))
    assert config.synthetic_images == (rounds - final) * batches * 10
    assert config.kd_steps == (rounds - warmup) * steps


def test_the_papers_meta_rate() -> None:
    assert SynthesisConfig(lr_generator=2e-3, steps=10).meta_lr == pytest.approx(0.02)
    assert SynthesisConfig(lr_generator=2e-3, meta_lr_generator=1e-4).meta_lr == 1e-4


def test_what_is_public() -> None:
    assert all(hasattr(module, name) for name in module.__all__)
    assert {"full_key", "parse_value"} <= set(module.__all__)


@pytest.mark.parametrize("key", ["seed", "method", "synthesis.steps", "synthesis"])
def test_a_value_is_quoted_only_so_far(key: str) -> None:
    """YAML and pickles can hold one list a billion times in a few bytes."""
    value: Any = ["x" * 1000]
    for _ in range(30):
        value = [value] * 10
    with pytest.raises(UsageError, match=key) as caught:
        from_dict({key: value})
    assert len(str(caught.value)) < 1000
