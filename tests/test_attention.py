"""Attention transfer: its maps and loss, the layers that it compares, and KD steps with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api, losses
from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.attention import AttentionPairs, attention_maps, last_layers
from fastdfkd_cli.config import DistillationConfig, from_dict
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.labels import label_views
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import ModelOptions, load_student, load_teacher
from fastdfkd_cli.nets_cifar import WideResNet
from fastdfkd_cli.recipes import with_method
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, TinyNet, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")
WITH = DistillationConfig(batch_size=4, temperature=2.0, lr=0.05, attention_weight=30.0)


def map64(x: Tensor) -> Tensor:
    """Zagoruyko & Komodakis' map, entry by entry."""
    found = torch.zeros(len(x), x.shape[2] * x.shape[3], dtype=torch.float64)
    for i in range(len(x)):
        flat = [sum(x[i, c, h, w].double() ** 2 for c in range(x.shape[1])) / x.shape[1]
                for h in range(x.shape[2]) for w in range(x.shape[3])]  # fmt: skip
        norm = sum(value**2 for value in flat) ** 0.5
        found[i] = torch.stack([value / norm for value in flat])
    return found


def test_maps_and_loss_are_the_published_ones() -> None:
    teachers = [torch.randn(2, 5, 3, 4), torch.randn(2, 7, 2, 2)]
    students = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 2, 2)]
    for x in teachers:
        torch.testing.assert_close(losses.attention_map(x).double(), map64(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(losses.attention_map(-7 * x), losses.attention_map(x))  # where, not how much
    wanted = sum(((map64(a) - map64(b)) ** 2).mean() for a, b in zip(teachers, students, strict=True))
    maps = [[losses.attention_map(x) for x in each] for each in (teachers, students)]
    assert float(losses.attention_transfer(*maps)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(losses.attention_transfer(maps[0], maps[0])) == 0
    dead = torch.zeros(1, 2, 2, 2, requires_grad=True)
    losses.attention_map(dead).sum().backward()
    assert dead.grad is not None
    assert torch.isfinite(dead.grad).all()


# Which layers


def test_a_wide_resnet_is_compared_at_its_three_groups() -> None:
    """As the paper has it: not at the normalisation that follows the last group."""
    model = WideResNet(10, 1)
    found = last_layers(model, torch.rand(2, 3, 32, 32))
    groups = [model.block1.layer, model.block2.layer, model.block3.layer]
    assert list(found) == [(32, 32), (16, 16), (8, 8)]
    outputs: list[Tensor] = []
    for group in groups:
        group.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    with attention_maps(found) as maps:
        model(torch.rand(2, 3, 32, 32))
    for output, size in zip(outputs, found, strict=True):
        assert torch.equal(maps[size], losses.attention_map(output))


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/convnext_atto", "timm/mobilenetv3_small_050",
                                  "torchvision/resnet18", "cifar/vgg11"])  # fmt: skip
def test_other_families_have_a_pair_for_each_size_in_common(name: str) -> None:
    like = load_teacher(net(), ModelOptions(input_size=(3, 64, 64)))
    model = load_student(name, ModelOptions(), like=like).normalized()
    other = load_student("cifar/wrn10_1", ModelOptions(), like=like).normalized()
    before = state_of(model)
    pairs = AttentionPairs(model, other, torch.rand(2, 3, 64, 64))
    assert_same_state(before, state_of(model))
    assert pairs.sizes
    assert set(pairs.sizes) <= {(64, 64), (32, 32), (16, 16)}
    model.train()
    with pairs.compared() as attention:
        model(torch.rand(2, 3, 64, 64))
        other(torch.rand(2, 3, 64, 64))
    assert 0 < float(attention().detach()) < 2 * len(pairs.sizes)
    assert state_of(model)["hooks"] == 0


class Shared(nn.Module):
    """One activation function at two sizes, as many networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.first, self.second = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.second(self.act(self.first(x))))
        return self.head(x.mean((2, 3)))


def test_a_layer_that_runs_at_two_sizes_is_read_at_both() -> None:
    model, images = Shared(), torch.rand(2, *SIZE)
    layers = last_layers(model, images)
    assert layers == {(8, 8): model.act, (4, 4): model.act}
    with attention_maps(layers) as maps:
        model(images)
    first = torch.relu(model.first(images))
    torch.testing.assert_close(maps[8, 8], losses.attention_map(first))
    torch.testing.assert_close(maps[4, 4], losses.attention_map(torch.relu(model.second(first))))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_networks_without_a_size_in_common_are_refused_in_one_line(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"no activations of equal height and width \(8x8, 4x4; none\).*weight=0"):
        AttentionPairs(net(), Flat(), torch.rand(2, *SIZE))
    with pytest.raises(UsageError, match="--set distillation.attention_weight=0"):
        api.distill(
            net(), Flat(), teacher_options=ModelOptions(input_size=SIZE), config=config(), output=tmp_path / "out",
            overrides={"distillation.attention_weight": 1.0}, device="cpu", amp=False,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# A KD step


def by_hand(model: TinyNet, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    first = model.conv1(images)
    second = model.conv2(torch.relu(model.bn1(first)))
    logits = model.fc(torch.relu(model.bn2(second)).mean((2, 3)))
    return logits, [losses.attention_map(first), losses.attention_map(second)]


def test_a_kd_step_descends_on_both_terms() -> None:
    images, model = torch.rand(4, *SIZE), teacher()
    student, reference = net(1), net(1).train()
    trained = Student(student, WITH, CPU, amp=False)
    before = state_of(model)
    loss, _ = trained.learn(model, images, 0)
    assert_same_state(before, state_of(model))
    assert state_of(student)["hooks"] == 0
    logits, maps = by_hand(model, images)
    own, own_maps = by_hand(reference, images)
    wanted = losses.distillation(logits, own, 2.0) + 30 * losses.attention_transfer(maps, own_maps)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    for (name, parameter), other in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_the_student_comes_to_look_where_the_teacher_looks() -> None:
    images, model = torch.rand(16, *SIZE), teacher()
    student = net(1, width=6)
    trained = Student(student, replace(WITH, attention_weight=1000.0, lr=0.02), CPU, amp=False)

    def apart() -> float:
        with torch.no_grad():
            return float(losses.attention_transfer(by_hand(model, images)[1], by_hand(student, images)[1]))

    first = apart()
    for step in range(60):
        trained.learn(model, images, step)
    student.eval()
    assert apart() < 0.7 * first


def test_it_takes_part_in_any_method() -> None:
    settings = config(distillation__attention_weight=50.0)
    losses_of = []
    for weight in (50.0, 0.0):
        run_config = from_dict({"distillation.attention_weight": weight}, base=settings)
        synthesizer = build_method(
            run_config, teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=0
        )
        run = Distillation(
            run_config, teacher(), net(1), synthesizer=synthesizer, image_size=SIZE, device=CPU, amp=False
        )
        run.prepare()
        losses_of.append([record.values["loss"] for record in run if record.phase == "distillation"][-1])
        synthesizer.close()
    assert losses_of[0] != losses_of[1]


# What it does not go with


def test_kept_labels_are_refused() -> None:
    with pytest.raises(UsageError, match=r"distillation.label_views must be 0 with distillation.attention_weight"):
        from_dict({"distillation.label_views": 2, "distillation.attention_weight": 1.0})
    with pytest.raises(UsageError, match=r"distillation.attention_weight must be 0 or more"):
        from_dict({"distillation.attention_weight": -1.0})
    once = replace(WITH, augmentation="none")
    assert label_views(once, images=8, kd_steps=1000) == 0
    assert label_views(replace(once, attention_weight=0.0), images=8, kd_steps=1000) == 1
    with pytest.raises(ValueError, match="no attention maps"):
        Student(net(1), WITH, CPU, amp=False).learn(torch.randn(4, CLASSES), torch.rand(4, *SIZE), 0)


def test_compile_is_left_out_with_a_remark() -> None:
    said: list[str] = []
    trained = Student(net(1), WITH, CPU, amp=False, acceleration=Acceleration(compile=True, say=said.append))
    trained.prepare(teacher(), SIZE)
    assert said == ["KD steps run as they are: --compile does not go with attention transfer"]
    loss, _ = trained.learn(teacher(), torch.rand(4, *SIZE), 0)
    assert torch.isfinite(loss)


def test_a_step_that_does_not_fit_ends_the_run_rather_than_lose_the_maps() -> None:
    class Cut(TinyNet):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            raise AssertionError("would keep no activations to compare")

    student = Cut()
    settings = from_dict({}, base=with_method(config(), "zskt"))
    synthesizer = build_method(settings, teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    run = Distillation(settings, teacher(), student, synthesizer=synthesizer, image_size=SIZE, device=CPU, amp=False)

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    run.student.descend = full  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        list(run)


# How often a run that takes short turns looks back


def test_short_turns_are_looked_at_once_in_50_steps_and_gone_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.distillation.RECORD_EVERY", 1e9)
    settings = from_dict({"schedule.rounds": 24}, base=with_method(config(), "dfad"))
    synthesizer = build_method(settings, teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    run = Distillation(settings, teacher(), net(1), synthesizer=synthesizer, image_size=SIZE, device=CPU, amp=False)
    noted: list[int] = []
    remember, descend, calls = run._remember, run.student.descend, 0

    def watched() -> None:
        noted.append(run.position.round)
        remember()

    def broken(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, agreement = descend(*given)
        if calls == 65:  # in the 13th round: the weights, so that every later loss is not finite either
            with torch.no_grad():
                run.student.net.fc.weight.fill_(torch.nan)
        return loss, agreement

    run._remember = watched  # type: ignore[method-assign]
    run.student.descend = broken  # type: ignore[method-assign]
    list(run)
    assert noted == [0, 10, 10, 20]
    assert [retry["round"] for retry in run.retries] == [10]
    assert run.steps_taken == 24 * 5
    assert all(torch.isfinite(each).all() for each in run.student.net.state_dict().values())
