"""FastDFKD's synthesiser against Algorithm 1, redone by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.generators import Pixels
from fastdfkd_cli.methods import METHODS, build_method
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.pool import to_uint8
from tiny import CLASSES, SIZE, assert_same_state, config, hooks_on, net, state_of, teacher

CPU = torch.device("cpu")
#: A loop without draws in it can be redone by hand.
PLAIN = {"synthesis__augmentation": "none", "synthesis__steps": 3}


def method(settings: RunConfig, model: nn.Module | None = None, *, seed: int = 0, amp: bool = False) -> FastMeta:
    found = build_method(
        settings, model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=amp, seed=seed
    )
    assert isinstance(found, FastMeta)
    return found


@dataclass
class ByHand:
    """What k inner steps should come to."""

    gradients: list[Tensor]  # summed over the steps: of the generator's weights, then of z
    adapted: list[Tensor]
    images: list[Tensor]
    losses: list[float]
    terms: list[dict[str, float]]


def feature_by_hand(
    model: nn.Module, inputs: dict[str, Tensor], accumulated: dict[str, Any], momentum: float
) -> Tensor:
    total = torch.zeros(())
    for name, layer in batch_norm_layers(model).items():
        var, mean = torch.var_mean(inputs[name], dim=(0, 2, 3), correction=0)
        if name in accumulated:
            mean = momentum * accumulated[name][0] + (1 - momentum) * mean
            var = momentum * accumulated[name][1] + (1 - momentum) * var
        inputs[name] = torch.stack([mean, var]).detach()
        total = total + (mean - layer.running_mean).norm() + (var - layer.running_var).norm()  # type: ignore[operator]
    return total


def by_hand(
    settings: RunConfig,
    generator: nn.Module,
    z: Tensor,
    labels: Tensor,
    model: nn.Module,
    student: nn.Module | None = None,
    accumulated: dict[str, Any] | None = None,
) -> ByHand:
    """Algorithm 1, lines 6 to 9, with torch's own parts; ``accumulated`` holds Eq. 14's statistics and is moved on."""
    s = settings.synthesis
    generator = copy.deepcopy(generator)
    z = z.detach().clone().requires_grad_()
    weights = list(generator.parameters())
    groups = [{"params": weights, "lr": s.lr_generator}] if weights else []
    optimizer = torch.optim.Adam([*groups, {"params": [z], "lr": s.lr_latent}], betas=(s.beta1, s.beta2))
    variables = [*weights, z]
    found = ByHand([torch.zeros_like(v) for v in variables], [], [], [], [])
    accumulated = {} if accumulated is None else accumulated
    inputs: dict[str, Tensor] = {}
    for _ in range(s.steps):
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
            for name, layer in batch_norm_layers(model).items()
        ]
        images = generator(z)
        logits = model(images)
        for handle in handles:
            handle.remove()
        terms: dict[str, Tensor] = {}
        if s.feature_weight:
            terms["feature"] = feature_by_hand(model, inputs, accumulated, s.feature_momentum)
        if s.class_weight:
            terms["class"] = nn.functional.cross_entropy(logits, labels)
        if student is not None and s.adversarial_weight:
            terms["adversarial"] = losses.ADVERSARIAL[s.adversarial](logits, student(images), s.adversarial_temperature)
        weight = {"feature": s.feature_weight, "class": s.class_weight, "adversarial": s.adversarial_weight}
        total = sum(weight[name] * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        for target, gradient in zip(found.gradients, torch.autograd.grad(total, variables), strict=True):
            target += gradient
            variables[[id(t) for t in found.gradients].index(id(target))].grad = gradient
        optimizer.step()
        found.images.append(images.detach())
        found.losses.append(float(total.detach()))
        found.terms.append({name: float(term.detach()) for name, term in terms.items()})
    if s.feature_momentum:
        accumulated.update(inputs)
    found.adapted = [v.detach() for v in variables]
    return found


class Spy:
    """Notes what a method starts a batch from, and what its meta optimiser is given."""

    def __init__(self, watched: FastMeta) -> None:
        self.watched = watched
        self.latents: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        self._latent, self._update = watched._new_latent, watched._update_shared
        watched._new_latent = self._note_latent  # type: ignore[method-assign]
        self.watch_optimizer()

    def _note_latent(self) -> Tensor:
        self.latents.append(self._latent())
        return self.latents[-1]

    def watch_optimizer(self) -> None:
        optimizer = self.watched.meta_optimizer
        if optimizer is not None:
            optimizer.register_step_pre_hook(
                lambda o, *_: self.gradients.append([p.grad.clone() for g in o.param_groups for p in g["params"]])
            )


def close(a: list[Tensor], b: list[Tensor], *, rtol: float = 1e-3) -> bool:
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=rtol, atol=1e-5 * float(y.abs().max()) + 1e-8) for x, y in zip(a, b, strict=True)
    )


def shared(found: FastMeta) -> list[Tensor]:
    return [p.detach().clone() for p in found.shared.parameters()]


# The meta gradient


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fomaml_is_the_sum_of_the_inner_gradients_applied_by_one_adam(momentum: float) -> None:
    settings = config(**PLAIN, synthesis__feature_momentum=momentum)
    model = teacher()
    found = method(settings, model)
    spy = Spy(found)
    hand = copy.deepcopy(found.shared)
    optimizer = torch.optim.Adam(hand.parameters(), lr=3 * settings.synthesis.lr_generator, betas=(0.5, 0.999))
    accumulated: dict[str, Any] = {}
    for index in range(3):  # the meta optimiser lives over the whole run
        batch = found.synthesize()
        redone = by_hand(settings, hand, spy.latents[index], batch.labels, model, accumulated=accumulated)
        assert close(spy.gradients[index], redone.gradients[:-1])
        for parameter, gradient in zip(hand.parameters(), redone.gradients, strict=False):
            parameter.grad = gradient
        optimizer.step()
        assert close(shared(found), [p.detach() for p in hand.parameters()], rtol=1e-2)
    found.close()


def test_reptile_is_the_scaled_parameter_difference() -> None:
    settings = config(**PLAIN, synthesis__meta_gradient="reptile", synthesis__reptile_scale=7)
    model = teacher()
    found = method(settings, model)
    spy = Spy(found)
    before = shared(found)
    hand = copy.deepcopy(found.shared)
    batch = found.synthesize()
    adapted = [p.detach() for p in found.adapted.parameters()]
    assert close(spy.gradients[0], [7 * (b - a) for b, a in zip(before, adapted, strict=True)])
    redone = by_hand(settings, hand, spy.latents[0], batch.labels, model)
    assert close(adapted, redone.adapted[:-1])
    moved = [p - b for p, b in zip(shared(found), before, strict=True)]
    # Towards the adapted weights.
    assert sum(float((m * (a - b)).sum()) for m, a, b in zip(moved, adapted, before, strict=True)) > 0


def test_the_meta_rate_is_the_inner_one_times_k_unless_it_is_stated() -> None:
    def rates(**changes: Any) -> list[float]:
        optimizer = method(config(**changes)).meta_optimizer
        assert optimizer is not None
        assert all(group["betas"] == (0.5, 0.999) for group in optimizer.param_groups)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates(synthesis__steps=5, synthesis__lr_generator=3e-3) == [pytest.approx(0.015)]
    assert rates(synthesis__meta_lr_generator=1e-4) == [1e-4]
    meta = rates(synthesis__meta_lr_generator=1e-4, synthesis__latent="meta", synthesis__meta_lr_latent=7e-3)
    assert meta == [1e-4, 7e-3]


# The three kinds of reuse


def test_sequential_reuse_carries_theta_over() -> None:
    settings = config(**PLAIN, synthesis__reuse="sequential")
    model = teacher()
    found = method(settings, model)
    spy = Spy(found)
    assert found.meta_optimizer is None
    accumulated: dict[str, Any] = {}
    for index in range(2):
        start = copy.deepcopy(found.shared)
        batch = found.synthesize()
        redone = by_hand(settings, start, spy.latents[index], batch.labels, model, accumulated=accumulated)
        assert close(shared(found), redone.adapted[:-1])
        assert not close(shared(found), [p.detach() for p in start.parameters()])
    assert not torch.equal(*spy.latents)  # z is new for each batch


def test_without_reuse_each_batch_starts_anew() -> None:
    settings = config(**PLAIN, synthesis__reuse="none")
    model = teacher()
    found = method(settings, model)
    spy = Spy(found)
    starts = []
    accumulated: dict[str, Any] = {}
    for index in range(3):
        batch = found.synthesize()
        starts.append(copy.deepcopy(found.shared))
        # The generator that this batch started from is the shared one: nothing has moved it.
        redone = by_hand(settings, starts[-1], spy.latents[index], batch.labels, model, accumulated=accumulated)
        assert close([p.detach() for p in found.adapted.parameters()], redone.adapted[:-1])
    stems = [start.stem.weight for start in starts]  # type: ignore[union-attr]
    assert not torch.equal(stems[0], stems[1])  # type: ignore[arg-type]
    assert not torch.equal(stems[1], stems[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("reuse", ["none", "sequential", "meta"])
def test_pixels_know_every_kind_of_reuse(reuse: str, momentum: float) -> None:
    settings = config(
        **PLAIN, synthesis__images="pixel", synthesis__reuse=reuse, synthesis__feature_momentum=momentum,
        synthesis__lr_latent=0.1,
    )  # fmt: skip
    model = teacher()
    found = method(settings, model)
    assert isinstance(found.shared, Pixels)
    spy = Spy(found)
    hand = None if found.shared_latent is None else found.shared_latent.detach().clone().requires_grad_()
    assert (hand is None) == (reuse == "none")
    optimizer = None
    if reuse == "meta":
        optimizer = torch.optim.Adam([hand], lr=settings.synthesis.meta_lr_latent, betas=(0.5, 0.999))
    accumulated: dict[str, Any] = {}
    for index in range(3):
        batch = found.synthesize()
        start = spy.latents[index] if hand is None else hand
        redone = by_hand(settings, found.shared, start, batch.labels, model, accumulated=accumulated)
        best = min(range(3), key=redone.losses.__getitem__)
        assert (batch.images.int() - to_uint8(redone.images[best]).int()).abs().max() <= 1
        assert batch.images.shape == (4, *SIZE)
        if reuse == "none":
            assert len(spy.latents) == index + 1
            continue
        assert hand is not None
        assert found.shared_latent is not None
        with torch.no_grad():
            if optimizer is None:
                hand.copy_(redone.adapted[0])
            else:
                hand.grad = redone.gradients[0]
                optimizer.step()
        assert close([found.shared_latent.detach()], [hand.detach()], rtol=1e-2)
        assert not spy.latents


def test_a_meta_learned_latent_moves_and_starts_anew_after_its_period() -> None:
    settings = config(
        **PLAIN, synthesis__latent="meta", synthesis__latent_reset_every=2, synthesis__meta_gradient="reptile"
    )
    model = teacher()
    found = method(settings, model)
    spy = Spy(found)
    assert found.shared_latent is not None
    assert found.meta_optimizer is not None
    start = found.shared_latent.clone()
    redone_start = copy.deepcopy(found.shared)
    batch = found.synthesize()
    redone = by_hand(settings, redone_start, start, batch.labels, model)
    assert close(spy.gradients[0][-1:], [67 * (start - redone.adapted[-1])])
    moved = found.shared_latent.clone()
    assert 0 < (moved - start).abs().max() < 0.1
    found.synthesize()
    assert (found.shared_latent - moved).abs().max() < 0.1
    theta, before = shared(found), found.shared_latent.clone()
    assert not spy.latents
    found.synthesize()
    assert len(spy.latents) == 1
    assert (found.shared_latent - before).abs().mean() > 0.5
    steps = {int(entry["step"]) for entry in found.meta_optimizer.state_dict()["state"].values()}
    assert steps == {1}
    # theta^ goes on: a first Adam step of the new optimiser moves no weight by more than the rate.
    for earlier, after in zip(theta, shared(found), strict=True):
        assert (earlier - after).abs().max() <= settings.synthesis.meta_lr * 1.01
    found.synthesize()
    found.synthesize()
    assert len(spy.latents) == 2


def test_without_a_period_a_meta_learned_latent_stays() -> None:
    found = method(config(synthesis__latent="meta"))
    spy = Spy(found)
    for _ in range(5):
        found.synthesize()
    assert not spy.latents


# Which images


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_iterate(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps so long that the loss falls and rises.
    settings = config(
        **{**PLAIN, "synthesis__steps": 6}, synthesis__keep=keep, synthesis__lr_latent=10, synthesis__lr_generator=2
    )
    found = method(settings)
    iterates: list[tuple[Tensor, dict[str, Tensor], Tensor | None]] = []
    descend = found._descend

    def note(*arguments: Any) -> Any:
        iterates.append(descend(*arguments))
        return iterates[-1]

    monkeypatch.setattr(found, "_descend", note)
    batch = found.synthesize()
    totals = [float(terms["total"].detach()) for _, terms, _ in iterates]
    best = min(range(6), key=totals.__getitem__)
    assert best not in (0, 5)
    images, terms, _ = iterates[best if keep == "best" else 5]
    # Algorithm 1, line 10: the last images are those behind the last update, which no loss has seen.
    assert torch.equal(batch.images, to_uint8(images)) == (keep == "best")
    assert not torch.equal(batch.images, to_uint8(iterates[5 if keep == "best" else best][0]))
    assert set(batch.losses) == {"feature", "class", "total"}
    assert all(torch.equal(batch.losses[name], terms[name].detach()) for name in terms)


def test_labels_are_uniform_and_images_are_uint8() -> None:
    found = method(config(synthesis__batch_size=400, synthesis__steps=1))
    batch = found.synthesize()
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (400, *SIZE)
    assert batch.labels.dtype == torch.int64
    counts = batch.labels.bincount()
    assert counts.shape == (CLASSES,)
    assert counts.min() > 60


def test_terms_that_are_switched_off_are_not_computed() -> None:
    found = method(config(synthesis__feature_weight=0, synthesis__adversarial_weight=0), teacher(norm=False))
    batch = found.synthesize(net(1))
    assert set(batch.losses) == {"class", "total"}
    found = method(config(synthesis__class_weight=0))
    assert set(found.synthesize().losses) == {"feature", "total"}
    assert set(found.synthesize(net(1)).losses) == {"feature", "adversarial", "total"}


# The adversarial term


@pytest.mark.parametrize("kind", ["jsd", "agreement-kl"])
def test_the_adversarial_term_plays_against_the_student(kind: str) -> None:
    # Given the teacher in the student's place, the term would be 0 and so would its gradient.
    settings = config(
        **PLAIN, synthesis__adversarial=kind, synthesis__class_weight=0, synthesis__feature_weight=0,
        synthesis__adversarial_temperature=2.0, synthesis__batch_size=16,
    )  # fmt: skip
    model, student = teacher(), teacher()
    with torch.no_grad():
        student.fc.weight.mul_(0.5)  # the same order of classes, with less confidence
    found = method(settings, model)
    spy = Spy(found)
    hand = copy.deepcopy(found.shared)
    batch = found.synthesize(student)
    redone = by_hand(settings, hand, spy.latents[0], batch.labels, model, student)
    assert batch.losses["adversarial"].item() == pytest.approx(min(t["adversarial"] for t in redone.terms), rel=1e-3)
    assert batch.losses["adversarial"] < -3e-5
    assert close(spy.gradients[0], redone.gradients[:-1], rtol=1e-2)
    assert sum(float(g.abs().sum()) for g in spy.gradients[0]) > 0
    against_itself = method(settings, model).synthesize(teacher())
    assert against_itself.losses["adversarial"].abs() < 1e-6


def test_the_adversarial_term_drives_the_two_apart() -> None:
    settings = config(
        synthesis__augmentation="none", synthesis__adversarial="jsd", synthesis__class_weight=0,
        synthesis__feature_weight=0, synthesis__batch_size=16, synthesis__keep="last", synthesis__steps=20,
    )  # fmt: skip
    model, student = teacher(), teacher(1)
    found = method(settings, model)
    first = found.synthesize(student).losses["adversarial"]
    for _ in range(3):
        batch = found.synthesize(student)
    assert batch.losses["adversarial"] < 1.5 * first  # more negative


def test_the_adversarial_term_alone_waits_for_its_student() -> None:
    # Warm-up rounds have none: there is nothing to descend then, and nothing to fall over.
    found = method(config(synthesis__class_weight=0, synthesis__feature_weight=0))
    before = shared(found)
    batch = found.synthesize()
    assert batch.images.shape == (4, *SIZE)
    assert all(torch.equal(a, b) for a, b in zip(before, shared(found), strict=True))
    found.synthesize(net(1))
    assert not all(torch.equal(a, b) for a, b in zip(before, shared(found), strict=True))


@pytest.mark.parametrize("broken", [False, True])
def test_the_student_is_frozen_meanwhile_and_as_before_afterwards(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = net(1, dropout=0.5)
    student.train()
    student.bn2.eval()
    student.conv1.weight.requires_grad_(False)
    before = state_of(student)
    seen = []

    def look(module: nn.Module, _: Any) -> None:
        seen.append((module.training, [p.requires_grad for p in module.parameters()]))
        if broken:
            raise RuntimeError("out of something")

    handle = student.fc.register_forward_pre_hook(look)
    found = method(config())
    if broken:
        with pytest.raises(RuntimeError, match="out of something"):
            found.synthesize(student)
    else:
        found.synthesize(student)
    handle.remove()
    assert seen
    assert all(not training and not any(wanted) for training, wanted in seen)
    assert_same_state(before, state_of(student))


# What the teacher sees, and what is left on it


def test_the_teacher_stays_as_it_is() -> None:
    model = teacher()
    before = state_of(model)
    found = method(config(), model)
    assert hooks_on(model) == 2
    for _ in range(2):
        found.synthesize(net(1))
    found.close()
    assert_same_state(before, state_of(model))
    found.close()  # twice is as good as once


def test_statistics_accumulate_once_per_batch_after_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = method(config(synthesis__steps=4))
    assert found.statistics is not None
    events: list[str] = []
    loss, accumulate = found.statistics.loss, found.statistics.accumulate
    monkeypatch.setattr(found.statistics, "loss", lambda m: (events.append("loss"), loss(m))[1])
    monkeypatch.setattr(found.statistics, "accumulate", lambda m: (events.append("accumulate"), accumulate(m))[1])
    found.synthesize()
    found.synthesize()
    assert events == [*["loss"] * 4, "accumulate"] * 2


def test_bf16_networks_with_float32_losses() -> None:
    model = teacher()
    dtypes = []
    model.conv1.register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    found = method(config(), model, amp=True)
    batch = found.synthesize(net(1))
    assert set(dtypes) == {torch.bfloat16}
    assert {value.dtype for value in batch.losses.values()} == {torch.float32}
    assert all(torch.isfinite(value) for value in batch.losses.values())
    assert all(p.dtype == torch.float32 for p in found.shared.parameters())


# Draws and state


def test_a_seed_decides_everything_and_the_global_state_nothing() -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        found = method(config(synthesis__latent="meta", synthesis__latent_reset_every=1), seed=3)
        runs.append([found.synthesize().images for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    other = method(config(synthesis__latent="meta", synthesis__latent_reset_every=1), seed=4)
    assert not torch.equal(other.synthesize().images, runs[0][0])


VARIANTS: dict[str, dict[str, Any]] = {
    "fomaml": {},
    "reptile, meta-learned z": {
        "synthesis__meta_gradient": "reptile", "synthesis__latent": "meta", "synthesis__latent_reset_every": 3
    },
    "sequential": {"synthesis__reuse": "sequential"},
    "none": {"synthesis__reuse": "none"},
    "pixel, meta": {"synthesis__images": "pixel", "synthesis__latent_reset_every": 3},
    "pixel, sequential": {"synthesis__images": "pixel", "synthesis__reuse": "sequential"},
    "pixel, none": {"synthesis__images": "pixel", "synthesis__reuse": "none"},
    "without features": {"synthesis__feature_weight": 0, "generator__kind": "map"},
}  # fmt: skip


@pytest.mark.parametrize("taken_at", [0, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_taken_up_again_it_goes_on_as_if_nothing_had_happened(variant: str, taken_at: int) -> None:
    settings = config(**VARIANTS[variant])
    student = net(1)
    whole = method(settings)
    expected = [whole.synthesize(student) for _ in range(5)]
    first = method(settings)
    for _ in range(taken_at):
        first.synthesize(student)
    state = first.state_dict()
    first.synthesize(student)  # the state is a copy: what comes after does not touch it
    second = method(settings, seed=99)
    second.load_state_dict(state)
    for batch in expected[taken_at:]:
        found = second.synthesize(student)
        assert torch.equal(found.images, batch.images)
        assert torch.equal(found.labels, batch.labels)
        assert all(torch.equal(found.losses[name], batch.losses[name]) for name in batch.losses)


def test_the_state_survives_renewal() -> None:
    settings = config()
    first = method(settings)
    first.synthesize()
    before = shared(first)
    first.renew()
    names = [name for name, _ in first.shared.named_parameters()]
    pairs = zip(names, before, shared(first), strict=True)
    assert {name.split(".")[0] for name, a, b in pairs if not torch.equal(a, b)} == {"stem"}
    second = method(settings, seed=99)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.synthesize().images, second.synthesize().images)
    method(config(synthesis__images="pixel")).renew()  # nothing to renew, and no harm done


def test_the_methods_by_name() -> None:
    assert METHODS["fast"] is FastMeta
    settings = config(seed=5)
    named = build_method(settings, teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    assert torch.equal(named.synthesize().images, method(settings, seed=5).synthesize().images)
