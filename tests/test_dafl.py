"""DAFL: its loss as the paper writes it, and the features that it reads before the teacher's classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api, losses
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import DAFLConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.dafl import DAFL, ClassifierInput
from fastdfkd_cli.models import ModelOptions, load_student, load_teacher
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")


def settings(**changes: Any) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return from_dict({"generator.latent_dim": 6, **changed}, base=with_method(config(), "dafl"))


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> DAFL:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, DAFL)
    return made


# The loss


def test_the_loss_is_the_papers() -> None:
    """L_oh, L_a and L_ie in float64, and their gradient in the images."""
    model = teacher().double()
    images = torch.rand(5, *SIZE).double().requires_grad_()
    x = torch.relu(model.bn1(model.conv1(images)))
    features = torch.relu(model.bn2(model.conv2(x))).mean((2, 3))
    logits = model.fc(features)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    one_hot = -sum(p[i].max().log() for i in range(5)) / 5
    active = -sum(abs(features[i, d]) for i in range(5) for d in range(features.shape[1])) / 5
    mean = p.mean(0)
    entropy = sum(mean[c] * mean[c].log() for c in range(CLASSES))
    wanted = 0.7 * one_hot + 0.1 * active + 3 * entropy
    (gradient,) = torch.autograd.grad(wanted, images)
    weights = {"class_weight": 0.7, "activation_weight": 0.1, "balance_weight": 3}
    ours = method(settings(**{f"synthesis__{name}": value for name, value in weights.items()}))
    varied = images.detach().float().requires_grad_()
    terms, total, given = ours.terms(varied, None)
    total.backward()
    for name, term in (("class", one_hot), ("activation", active), ("balance", entropy)):
        assert float(terms[name].detach()) == pytest.approx(float(term.detach()), rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(given.double(), logits.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_term_of_weight_0_is_left_out() -> None:
    images = torch.rand(4, *SIZE)
    terms, total, _ = method(settings(synthesis__activation_weight=0, synthesis__class_weight=0)).terms(images, None)
    assert terms.keys() == {"balance"}
    assert float(total) == pytest.approx(20 * float(terms["balance"]))


def test_the_balance_is_lowest_where_all_classes_are_as_frequent() -> None:
    sure = 100 * torch.eye(4)
    assert float(losses.information_entropy(sure)) == pytest.approx(-torch.log(torch.tensor(4.0)).item(), abs=1e-5)
    one = sure[:1].repeat(4, 1).requires_grad_()
    found = losses.information_entropy(one)
    assert float(found.detach()) == pytest.approx(0, abs=1e-5)
    found.backward()
    assert one.grad is not None
    assert torch.isfinite(one.grad).all()
    dense = torch.randn(2, 4, 3, 5)
    assert float(losses.information_entropy(dense)) == pytest.approx(
        float(losses.information_entropy(dense.permute(0, 2, 3, 1).reshape(-1, 4))), rel=1e-5
    )


def test_its_steps_lower_the_loss() -> None:
    ours = method(settings(synthesis__batch_size=64, synthesis__lr_generator=0.01))
    figures = [float(ours.synthesize().losses["total"]) for _ in range(60)]
    assert sum(figures[-10:]) < sum(figures[:10]) - 0.5


# The features


class Pooled(nn.Module):
    """SqueezeNet's kind: a convolution gives a map of class scores, which are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, CLASSES)
        self.body = nn.Conv2d(3, 6, 3)
        self.attention = nn.Linear(6, 6)
        self.classifier = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x)).mean((2, 3))


def test_features_are_the_classifiers_input() -> None:
    images = torch.rand(3, *SIZE)
    model = Pooled()
    features = ClassifierInput(model, CLASSES)
    logits, found = features.observe(images)
    assert torch.equal(found, model.body(images))
    assert torch.equal(logits, model(images))
    found = found.detach()
    assert float(losses.activation(found)) == pytest.approx(-float(found.abs().sum(1).mean()), rel=1e-6)
    features.close()
    before = state_of(model)
    assert before["hooks"] == 0


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050",
                                  "timm/convnext_atto", "torchvision/squeezenet1_1"])  # fmt: skip
def test_features_of_other_families(name: str) -> None:
    size = (3, 224, 224) if "vit" in name else (3, 64, 64)
    like = load_teacher(net(), ModelOptions(input_size=size))
    model = load_student(name, ModelOptions(), like=like).normalized().eval()
    features = ClassifierInput(model, CLASSES)
    logits, found = features.observe(torch.rand(2, *size))
    assert logits.shape == (2, CLASSES)
    assert found.shape[0] == 2
    assert found.shape[1] > CLASSES
    features.close()


def test_a_pass_that_is_not_observed_leaves_nothing_behind_and_close_takes_the_hooks_off() -> None:
    model = teacher()
    before = state_of(model)
    ours = method(model=model)
    assert state_of(model)["hooks"] == before["hooks"] + 1
    model(torch.rand(2, *SIZE))
    assert ours._features is not None
    assert ours._features._latest is None
    ours.synthesize()
    ours.close()
    assert_same_state(before, state_of(model))


class Headless(nn.Module):
    """Compares with a vector for each class: no layer gives the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.prototypes.T


def test_a_teacher_without_a_classifier_layer_is_refused_in_one_line(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="--set synthesis.activation_weight=0"):
        method(model=Headless())
    unused = Pooled()
    unused.forward = lambda x: x.mean((2, 3)) @ torch.ones(3, CLASSES)  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="no linear layer"):
        method(model=unused).synthesize()
    found = method(settings(synthesis__activation_weight=0), model=Headless()).synthesize()
    assert found.losses.keys() == {"class", "balance", "total"}
    with pytest.raises(UsageError, match="no linear layer"):
        api.distill(
            Headless(), net(1), teacher_options=ModelOptions(input_size=SIZE), config=config(quality_images=0),
            overrides={"method": "dafl"}, output=tmp_path / "out", device="cpu", amp=False,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# The method


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    first, second, other = method(), method(), method(seed=1)
    a, b = ([each.synthesize() for _ in range(3)] for each in (first, second))
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].images, other.synthesize().images)
    third = method(seed=5)
    third.load_state_dict(first.state_dict())
    for _ in range(2):
        x, y = first.synthesize(), third.synthesize()
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
        assert x.losses["total"] == y.losses["total"]
        assert torch.equal(first.training_batch(6), third.training_batch(6))


def test_a_whole_run_and_a_set_without_a_student(tmp_path: Any) -> None:
    student = net(1)
    before = student.fc.weight.detach().clone()
    call: dict[str, Any] = {
        "teacher_options": ModelOptions(input_size=SIZE), "config": config(), "overrides": {"method": "dafl"},
        "device": "cpu", "amp": False,
    }  # fmt: skip
    report = api.distill(net(), student, output=tmp_path / "student", **call).report
    assert report["config"]["method"] == "dafl"
    assert report["config"]["generator"]["latent_dim"] == 512
    assert not torch.equal(before, student.fc.weight)
    assert all(torch.isfinite(each).all() for each in student.state_dict().values())
    made = api.synthesize(net(), num_images=8, output=tmp_path / "set", **call)
    assert made.manifest["num_images"] == 8


def test_published_settings() -> None:
    found = with_method(get_recipe("auto").config((3, 32, 32)), "dafl")
    assert found.synthesis == DAFLConfig(batch_size=256)
    assert found.generator.latent_dim == 512
    assert (found.schedule.kd_steps_per_round, found.kd_steps) == (5, 80_000)
    for changes in (
        {"class_weight": -1},
        {"activation_weight": -1e-3},
        {"class_weight": 0, "activation_weight": 0, "balance_weight": 0},
        {"lr_generator": 0},
    ):
        with pytest.raises(UsageError, match="synthesis"):
            DAFLConfig(**changes)
