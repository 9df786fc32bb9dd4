"""CMI: its loss as the paper writes it, its memory, and what a batch begins with."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api, losses
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import Augmentation, CMIConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.cmi import CMI, MemoryBank, view_features
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.plan import timed_steps
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, TinyNet, assert_same_state, config, hooks_on, net, state_of, teacher

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 3, 1, 1, 2])
#: Channels of all BatchNorm layers of a TinyNet.
WIDTH = 12


def settings(**changes: Any) -> RunConfig:
    few = {"synthesis.steps": 3, "synthesis.bank_size": 32, "synthesis.negatives": 6, "synthesis.head_dim": 8}
    return from_dict(
        {**few, **{key.replace("__", "."): value for key, value in changes.items()}},
        base=with_method(config(), "cmi"),
    )


class Unvaried(CMI):
    """Views without draws: the image itself, and its upper left quarter, doubled."""

    def _view(self, images: Tensor, kind: Augmentation) -> Tensor:
        if not kind.startswith("resized"):
            return images
        quarter = images[:, :, : images.shape[2] // 2, : images.shape[3] // 2]
        return quarter.repeat_interleave(2, 2).repeat_interleave(2, 3)


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0, kind: type[CMI] = CMI) -> CMI:
    if kind is CMI:
        made = build_method(
            run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False,
            seed=seed,
        )  # fmt: skip
        assert isinstance(made, CMI)
        return made
    return kind(run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False,
                seed=seed)  # fmt: skip


# The loss


def inputs_of_norms(model: TinyNet, images: Tensor) -> tuple[list[Tensor], Tensor]:
    first = model.conv1(images)
    second = model.conv2(torch.relu(model.bn1(first)))
    logits = model.fc(torch.relu(model.bn2(second)).mean((2, 3)))
    return [first, second], logits


def transcribed(images: Tensor, model: TinyNet, student: nn.Module, head: nn.Module, earlier: Tensor) -> list[Tensor]:
    """The terms in float64, one image at a time: class, feature, adversarial, contrastive."""
    quarter = images[:, :, : SIZE[1] // 2, : SIZE[2] // 2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    given, logits = inputs_of_norms(model, images)
    given_local, _ = inputs_of_norms(model, quarter)
    count = len(images)
    cross_entropy = -sum(logits.log_softmax(1)[i, c] for i, c in enumerate(LABELS)) / count
    feature = torch.zeros((), dtype=torch.float64)
    for layer, x in zip((model.bn1, model.bn2), given, strict=True):
        rows = x.movedim(1, 0).flatten(1)
        mean = rows.sum(1) / rows.shape[1]
        variance = ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
        feature = feature + ((mean - layer.running_mean) ** 2).sum().sqrt()
        feature = feature + ((variance - layer.running_var) ** 2).sum().sqrt()
    p, q = logits.softmax(1), student(images).softmax(1)
    agreed = [i for i in range(count) if p[i].argmax() == q[i].argmax()]
    assert 0 < len(agreed) < count
    adversarial = -sum((p[i] * (p[i] / q[i]).log()).sum() for i in agreed) / count
    local, whole = (torch.cat([x.mean((2, 3)) for x in views], 1) for views in (given_local, given))
    local, whole = torch.cat([local, earlier[:, 0]]), torch.cat([whole, earlier[:, 1]])
    queries, keys = head(local), head(whole).detach()
    queries, keys = queries / queries.norm(dim=1, keepdim=True), keys / keys.norm(dim=1, keepdim=True)
    each = []
    for i in range(len(local)):
        similar = torch.stack([(queries[i] * keys[j]).sum() / 0.2 for j in range(len(local))]).exp()
        each.append(-(similar[i] / similar.sum()).log())
    contrastive = sum(each[:count]) / count
    if len(earlier):
        contrastive = contrastive + sum(each[count:]) / len(earlier)
    return [cross_entropy, feature, adversarial, contrastive]


@pytest.mark.parametrize("remembered", [0, 4])
def test_the_loss_is_the_papers(remembered: int) -> None:
    """Value, and gradient in the images and in the head; with an empty memory and with one."""
    ours = method(settings(synthesis__adversarial_weight=3.0), kind=Unvaried)
    assert ours.bank is not None
    assert ours.head is not None
    earlier = torch.randn(remembered, 2, WIDTH).bfloat16()
    if remembered:
        ours.bank.add(earlier)
    torch.manual_seed(3)
    images = torch.rand(5, *SIZE) * torch.rand(5, 3, 1, 1)
    narrow, wide = images.clone().requires_grad_(), images.double().requires_grad_()
    terms, features = ours.terms(narrow, LABELS, teacher(2))
    terms["total"].backward()
    of_head = [parameter.grad.double() for parameter in ours.head.parameters() if parameter.grad is not None]
    head = ours.head.double()
    found = transcribed(wide, teacher().double(), teacher(2).double(), head, earlier.double())
    wanted = sum(weight * term for weight, term in zip((1.0, 1.0, 3.0, 0.8), found, strict=True))
    gradient, *wanted_of_head = torch.autograd.grad(wanted, [wide, *head.parameters()])
    for name, term in zip(("class", "feature", "adversarial", "contrastive"), found, strict=True):
        assert float(terms[name].detach()) == pytest.approx(float(term.detach()), rel=1e-4), name
    assert float(terms["total"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert narrow.grad is not None
    torch.testing.assert_close(narrow.grad.double(), gradient, rtol=1e-3, atol=1e-6)
    assert len(of_head) == len(wanted_of_head) == 4
    for one, other in zip(of_head, wanted_of_head, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert features is not None
    assert features.shape == (5, 2, WIDTH)


def test_the_images_compete_with_the_student() -> None:
    """Given the teacher in the student's place, there would be nothing to play for."""
    model, images = teacher(), torch.rand(16, *SIZE)
    labels = torch.zeros(16, dtype=torch.int64)
    assert float(method(model=model, kind=Unvaried).terms(images, labels, teacher(2))[0]["adversarial"]) < -1e-4
    assert float(method(model=model, kind=Unvaried).terms(images, labels, model)[0]["adversarial"]) == 0
    student = net(1)
    seen: list[int] = []
    student.fc.register_forward_hook(lambda *_: seen.append(1))
    before = state_of(student)
    found = method().synthesize(student)
    assert len(seen) == 3
    assert "adversarial" in found.losses
    assert_same_state(before, state_of(student))  # asked, not trained
    assert "adversarial" not in method().synthesize(None).losses


def test_features_are_the_means_of_what_norms_are_given() -> None:
    model, images = teacher(), torch.rand(3, *SIZE)
    before = hooks_on(model)
    with view_features([model.bn1, model.bn2]) as features:
        model(images)
    given, _ = inputs_of_norms(model, images)
    torch.testing.assert_close(features(), torch.cat([x.mean((2, 3)) for x in given], 1))
    assert hooks_on(model) == before
    ours = method(model=model)
    ours.synthesize()
    ours.close()
    assert hooks_on(model) == before


def test_info_nce_knows_partners_from_others() -> None:
    eye = torch.eye(4)
    assert float(losses.info_nce(eye, eye, 0.05).max()) < 1e-6
    assert float(losses.info_nce(eye, eye.roll(1, 0), 0.05).min()) > 10
    one = torch.ones(6, 1)
    torch.testing.assert_close(losses.info_nce(one, one, 0.2), torch.full((6,), 6.0).log())


# Views


@pytest.mark.parametrize("flip", [True, False])
def test_views_are_mirrored_where_that_is_allowed(flip: bool) -> None:
    ours = method(settings(synthesis__flip=flip, synthesis__local_scale=0.9))
    ramp = torch.linspace(0, 1, SIZE[2]).expand(64, *SIZE).contiguous()
    for kind in ("crop-flip" if flip else "crop", "resized-crop-flip"):
        seen = ours._view(ramp, kind)[:, 0, SIZE[1] // 2, 2:-2]
        falling = (seen[:, 1:] < seen[:, :-1]).any(1)
        assert bool(falling.any()) is flip
        assert not bool(falling.all())


def test_a_local_view_shows_a_quarter_or_more() -> None:
    wide, close = method(settings(synthesis__local_scale=1.0)), method(settings(synthesis__local_scale=0.05))
    ramp = torch.linspace(0, 1, SIZE[2]).expand(64, *SIZE).contiguous()

    def spans(ours: CMI) -> Tensor:
        seen = ours._view(ramp, "resized-crop-flip")[:, 0, 0]
        return seen.amax(1) - seen.amin(1)

    assert float(spans(wide).mean()) > 0.85
    assert float(spans(close).mean()) < 0.8


# The memory


def test_a_bank_forgets_the_oldest() -> None:
    bank = MemoryBank(5, 2, CPU)
    rng = torch.Generator().manual_seed(0)

    def held() -> list[int]:
        local, whole = bank.sample(5, rng)
        assert torch.equal(local, -whole)
        return sorted(int(value) for value in local[:, 0])

    def batch(*numbers: int) -> Tensor:
        local = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 2)
        return torch.stack([local, -local], dim=1)

    bank.add(batch(1, 2, 3))
    assert len(bank) == 3
    assert held() == [1, 2, 3]
    bank.add(batch(4, 5, 6))
    assert held() == [2, 3, 4, 5, 6]
    bank.add(batch(7, 8))
    assert held() == [4, 5, 6, 7, 8]
    bank.add(batch(11, 12, 13, 14, 15, 16, 17))
    assert held() == [13, 14, 15, 16, 17]
    bank.add(batch(18))
    assert held() == [14, 15, 16, 17, 18]
    assert len(bank.sample(2, rng)[0]) == 2


def test_the_bank_is_bounded_in_images_and_in_bytes() -> None:
    bank = method(settings(synthesis__bank_size=10_000_000, synthesis__bank_mib=1)).bank
    assert bank is not None
    assert 2**20 - 2 * WIDTH * 2 < bank.features.nbytes <= 2**20
    bank = method().bank
    assert bank is not None
    assert bank.features.shape == (32, 2, WIDTH)


def test_each_batch_is_remembered_as_it_was_kept() -> None:
    """The features of the images handed out; later batches are told from them."""
    found: list[tuple[float, Tensor]] = []

    class Watched(CMI):
        def terms(self, *given: Any) -> tuple[dict[str, Tensor], Tensor | None]:
            terms, features = super().terms(*given)
            assert features is not None
            found.append((float(terms["total"].detach()), features.detach()))
            return terms, features

    ours = method(settings(synthesis__steps=6), kind=Watched)
    batch = ours.synthesize()
    lowest, features = min(found, key=lambda pair: pair[0])
    assert float(batch.losses["total"]) == pytest.approx(lowest)
    assert ours.bank is not None
    assert torch.equal(ours.bank.features[:4], features.bfloat16())
    assert not ours.bank.features[4:].any()
    assert float(ours.synthesize().losses["contrastive"]) > float(batch.losses["contrastive"])


# A batch


def test_each_batch_begins_anew_and_the_head_goes_on() -> None:
    ours = method()
    assert ours.head is not None
    ours._begin_anew()
    fresh = {name: tensor.clone() for name, tensor in ours.generator.named_parameters()}
    for name, tensor in fresh.items():
        assert float(tensor.detach().abs().max()) < 0.15 or "weight" in name, name
    before = [parameter.detach().clone() for parameter in ours.head.parameters()]
    ours.synthesize()
    assert not any(torch.equal(a, b) for a, b in zip(before, ours.head.parameters(), strict=True))
    ours._begin_anew()
    stem = ours.generator.stem.weight
    assert not torch.equal(stem, fresh["stem.weight"])
    assert float(stem.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert all(not value.any() for state in ours.optimizer.state.values() for value in state.values())


def test_its_steps_bring_the_loss_down() -> None:
    weights = {"synthesis__batch_size": 16, "synthesis__feature_weight": 0.1}
    run = settings(synthesis__steps=60, synthesis__lr_generator=0.02, **weights)
    few = settings(synthesis__steps=1, **weights)
    after, first = method(run).synthesize(), method(few).synthesize()
    assert float(after.losses["total"]) < 0.9 * float(first.losses["total"])


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    student = net(1)
    first, second, other = method(), method(), method(seed=1)
    a = [first.synthesize(student) for _ in range(3)]
    b = [second.synthesize(student) for _ in range(3)]
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].images, a[1].images)
    assert not torch.equal(a[0].images, other.synthesize(student).images)
    first.slow_down(0.5)
    third = method(seed=5)
    third.synthesize(student)  # what it has remembered and learnt must not matter
    third.load_state_dict(first.state_dict())
    for _ in range(9):  # past the end of the bank
        x, y = first.synthesize(student), third.synthesize(student)
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
        assert all(torch.equal(x.losses[name], y.losses[name]) for name in x.losses)
    assert [each.param_groups[0]["lr"] for each in third.optimizers()] == pytest.approx([5e-4, 5e-4])
    shapes = {name: tensor.shape for name, tensor in method().state_dict().items() if "optimizer" not in name}
    later = first.state_dict()
    assert all(later[name].shape == shape for name, shape in shapes.items())


def test_without_the_contrastive_term_there_is_no_memory() -> None:
    ours = method(settings(synthesis__contrastive_weight=0))
    assert ours.head is ours.bank is None
    batch = ours.synthesize()
    assert batch.losses.keys() == {"class", "feature", "total"}
    assert not any(name.startswith("own.") for name in ours.state_dict())
    bare = method(settings(synthesis__contrastive_weight=0, synthesis__feature_weight=0), teacher(norm=False))
    assert bare.synthesize().losses.keys() == {"class", "total"}
    only = method(settings(synthesis__feature_weight=0))
    assert only.synthesize().losses.keys() == {"class", "contrastive", "total"}


# A run


def test_a_whole_run_changes_the_student(tmp_path: Any) -> None:
    student = net(1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    done = api.distill(
        net(), student, teacher_options=ModelOptions(input_size=SIZE), config=settings(), device="cpu", amp=False,
        output=tmp_path / "student",
    )  # fmt: skip
    assert done.report["config"]["method"] == "cmi"
    assert done.report["kd_steps"] == 3 * 3
    assert any(not torch.equal(before[name], tensor) for name, tensor in done.student.state_dict().items())
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in done.student.state_dict().values())


def test_what_a_teacher_without_batch_norm_is_told_to_switch_off_is_enough() -> None:
    call: dict[str, Any] = {"teacher_options": ModelOptions(input_size=SIZE), "device": "cpu", "amp": False}
    bare, few = net(norm=False), settings(quality_images=0)
    with pytest.raises(UsageError, match="the feature term and the contrastive term need") as refused:
        api.distill(bare, net(1), config=few, **call)
    words = str(refused.value).split()
    told = {word.split("=")[0]: 0 for before, word in pairwise(words) if before == "--set"}
    assert len(told) == 2
    assert api.distill(bare, net(1), config=few, overrides=told, **call).report["config"]["method"] == "cmi"


# Settings


def test_recipes_keep_their_student_and_their_mirror() -> None:
    digits = get_recipe("digits").config((1, 8, 8))
    found = with_method(digits, "cmi")
    assert found.distillation == digits.distillation
    assert found.schedule == digits.schedule
    assert found.generator == digits.generator
    assert isinstance(found.synthesis, CMIConfig)
    assert not found.synthesis.flip
    assert with_method(get_recipe("quick").config((3, 32, 32)), "cmi").synthesis == CMIConfig(batch_size=128)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"lr_head": 0}, {"contrastive_weight": -1}, {"contrastive_temperature": 0}, {"bank_size": 0},
        {"bank_mib": 0}, {"negatives": 0}, {"local_scale": 0}, {"local_scale": 1.5}, {"beta1": 1.0},
        {"feature_weight": 0, "class_weight": 0, "adversarial_weight": 0, "contrastive_weight": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CMIConfig(**changes)


def test_a_teacher_without_norms_is_refused_for_either_term() -> None:
    assert CMIConfig(feature_weight=0).needs_statistics
    with pytest.raises(ValueError, match="running statistics"):
        method(settings(synthesis__feature_weight=0), teacher(norm=False))


def test_a_plan_times_a_batch_that_is_told_from_a_full_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batches find little in the bank, and are faster than the rest of a run."""
    sizes: list[int] = []
    original = losses.info_nce

    def watched(queries: Tensor, *others: Any) -> Tensor:
        sizes.append(len(queries))
        return original(queries, *others)

    monkeypatch.setattr(losses, "info_nce", watched)
    run = settings(synthesis__steps=10, synthesis__negatives=20)
    costs = timed_steps(
        run, teacher(), net(1), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, trains=False
    )
    assert sizes == [4, 4, 24, 24]
    assert costs["synthesis_batch"] > 0
