"""NAYER: its loss as the paper writes it, its noisy layers, its embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdfkd_cli import api
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.method_config import NAYERConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.nayer import NAYER, NoisyLayers
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, hooks_on, net, state_of, teacher

CPU = torch.device("cpu")
SMALL = {
    "method": "nayer",
    "generator.latent_dim": 6,
    "synthesis.batch_size": 10,
    "synthesis.steps": 3,
    "synthesis.embedding_dim": 8,
}


def settings(**changes: Any) -> RunConfig:
    return from_dict({**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}, base=config())


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> NAYER:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, NAYER)
    return made


def rand(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def pupil() -> nn.Module:
    """A student that agrees with ``teacher()`` on some random images and not on others."""
    found = teacher()
    found.fc.bias[3] -= 0.15  # what the teacher sees in nearly all of them
    return found


# The loss


def logits_and_norm_inputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[nn.BatchNorm2d, Tensor]]]:
    """Of a TinyNet, in the order of its layers."""
    first = model.conv1(images)
    second = model.conv2(torch.relu(model.bn1(first)))
    last = torch.relu(model.bn2(second)).mean((2, 3))
    return model.fc(last), [(model.bn1, first), (model.bn2, second)]


@pytest.mark.parametrize("with_student", [False, True])
def test_the_loss_is_the_papers(with_student: bool) -> None:
    """The loss in float64, and its gradient in the images, of a batch behind another (so that there is momentum)."""
    model, student = teacher().double(), pupil().double()
    earlier, images = rand(7).double(), rand(16, 1).double().requires_grad_()
    labels = torch.arange(16) % CLASSES
    weights = {"feature_weight": 7.0, "class_weight": 0.3, "adversarial_weight": 2.0, "feature_momentum": 0.8}
    with torch.enable_grad():
        answers, inputs = logits_and_norm_inputs(model, images)
        _, inputs_then = logits_and_norm_inputs(model, earlier)
        statistics = 0.0
        for (norm, x), (_, then) in zip(inputs, inputs_then, strict=True):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            mean = 0.8 * then.mean((0, 2, 3)) + 0.2 * mean
            var = 0.8 * then.var((0, 2, 3), unbiased=False) + 0.2 * var
            statistics = statistics + (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
        log_p, log_q = answers.log_softmax(1), student(images).log_softmax(1)
        wanted = 7 * statistics - 0.3 * log_p[range(16), labels].mean()
        same = log_p.argmax(1) == log_q.argmax(1)
        assert 0 < int(same.sum()) < 16  # where they agree, and only there
        if with_student:
            wanted = wanted - 2 * ((log_p.exp() * (log_p - log_q)).sum(1) * same).mean()
        (gradient,) = torch.autograd.grad(wanted, images)
    ours = method(settings(**{f"synthesis__{name}": value for name, value in weights.items()}))
    _, moments = ours.observe(earlier.float())
    assert ours.statistics is not None
    assert moments is not None
    ours.statistics.accumulate(moments)
    varied = images.detach().float().requires_grad_()
    terms, _ = ours.terms(varied, labels, pupil() if with_student else None)
    terms["total"].backward()
    assert float(terms["total"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-3, atol=1e-6)
    assert ("adversarial" in terms) == with_student


def test_the_generator_plays_against_the_student() -> None:
    model, images, labels = teacher(), rand(16), torch.arange(16) % CLASSES
    ours = method(model=model)
    assert float(ours.terms(images, labels, pupil())[0]["adversarial"]) < -1e-4
    assert float(ours.terms(images, labels, model)[0]["adversarial"]) == 0  # nothing to play for
    student = net(1)
    before = state_of(student)
    assert "adversarial" in ours.synthesize(student).losses
    assert_same_state(before, state_of(student))


# The noisy layers


def test_each_noisy_layer_serves_every_class_once() -> None:
    layers = NoisyLayers(10, CLASSES, 8, 5)
    layers.redraw(torch.Generator().manual_seed(0))
    assert layers.weight.shape == (3, 8, 5)
    embeddings = torch.randn(10, 8)
    x = (embeddings - embeddings.mean(0)) / (embeddings.var(0, unbiased=False) + 1e-5).sqrt()
    wanted = torch.stack([x[i] @ layers.weight[i // CLASSES] for i in range(10)])
    torch.testing.assert_close(layers(embeddings), wanted)
    assert NoisyLayers(3, CLASSES, 8, 5)(embeddings[:3]).shape == (3, 5)  # fewer images than classes
    assert layers.weight.std().item() == pytest.approx(1, abs=0.2)


def test_a_batch_has_all_classes_alike_and_no_image_twice() -> None:
    batch = method().synthesize()
    assert batch.labels[:8].tolist() == [0, 1, 2, 3] * 2
    assert len(set(batch.labels[8:].tolist())) == 2
    assert batch.images.shape == (10, *SIZE)
    assert len({tuple(image.flatten().tolist()) for image in batch.images}) == 10


def test_noisy_layers_are_drawn_for_each_batch_and_the_generator_lives_on() -> None:
    ours = method(settings(synthesis__generator_life=2, synthesis__lr_generator=1e-9))
    seen, generators = [], []
    for _ in range(3):
        ours.synthesize()
        seen.append(ours.noise.weight.detach().clone())
        generators.append(ours.generator)
    assert not torch.allclose(seen[0], seen[1], atol=0.1)
    assert generators[0] is generators[1]
    assert generators[1] is not generators[2]


def test_its_steps_make_images_that_the_teacher_recognises() -> None:
    run = settings(
        synthesis__steps=80, synthesis__batch_size=16, synthesis__feature_weight=0.0, synthesis__lr_generator=0.02
    )
    ours = method(run)
    labels = ours._draw_classes()
    ours.noise.redraw(ours.rng)
    first = ours.terms(ours.generator(ours.noise(ours.embeddings[labels])), labels, None)[0]["class"]
    assert float(ours.synthesize().losses["class"]) < float(first.detach()) - 0.2


# Embeddings


def test_embeddings_are_orthogonal_or_random_and_stay() -> None:
    ours = method()
    torch.testing.assert_close(ours.embeddings @ ours.embeddings.T, torch.eye(CLASSES), atol=1e-5, rtol=0)
    before = ours.embeddings.clone()
    ours.synthesize()
    assert torch.equal(before, ours.embeddings)
    short = method(settings(synthesis__embedding_dim=3)).embeddings  # more classes than dimensions
    assert short.shape == (CLASSES, 3)
    torch.testing.assert_close(short.T @ short, torch.eye(3), atol=1e-5, rtol=0)
    drawn = method(settings(synthesis__embeddings="random")).embeddings
    assert float((drawn @ drawn.T - torch.eye(CLASSES)).abs().max()) > 0.5


def test_embeddings_of_texts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.safetensors"

    def of(tensors: dict[str, Tensor]) -> NAYER:
        safetensors.torch.save_file(tensors, path)
        return method(settings(synthesis__embeddings=str(path)))

    texts = torch.randn(CLASSES, 5)
    ours = of({"texts": texts.half()})
    assert torch.equal(ours.embeddings, texts.half().float())
    ours.synthesize()
    for tensors in ({"a": texts, "b": texts + 1}, {"a": texts[:3]}, {"a": texts[0]}, {}):
        with pytest.raises(UsageError, match=r"must hold one tensor \[4, dim\], and holds"):
            of({name: tensor.clone() for name, tensor in tensors.items()})
    for odd in (texts.long(), texts * float("nan")):
        with pytest.raises(UsageError, match="no finite floats"):
            of({"a": odd})
    path.write_bytes(b"nothing")
    model = teacher()
    with pytest.raises(UnavailableError, match=r"synthesis.embeddings=.* cannot be read"):
        method(settings(synthesis__embeddings=str(path)), model)
    assert hooks_on(model) == 0
    with pytest.raises(UsageError, match="orthogonal, random or a .safetensors file, not 'clip'"):
        settings(synthesis__embeddings="clip")


# The protocol


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    student = net(1)
    run = settings(synthesis__generator_life=2)
    first, second, other = method(run), method(run), method(run, seed=1)
    a, b = [[each.synthesize(student).images for _ in range(3)] for each in (first, second)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], other.synthesize(student).images)
    third = method(run, seed=5)
    third.load_state_dict(first.state_dict())
    for _ in range(3):  # over a new generator
        x, y = first.synthesize(student), third.synthesize(student)
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
        assert x.losses == y.losses
    with pytest.raises(ValueError, match="another run's"):
        method(settings(synthesis__embedding_dim=9)).load_state_dict(first.state_dict())


def test_a_lower_rate_is_part_of_the_state() -> None:
    ours, again = method(), method()
    ours.slow_down(0.25)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(ours.synthesize().images, again.synthesize().images)
    assert not torch.equal(again.synthesize().images, method().synthesize().images)
    assert again.rate == 0.25


def test_a_whole_run_and_a_set(tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "teacher_options": ModelOptions(input_size=SIZE), "config": settings(), "device": "cpu", "amp": False
    }  # fmt: skip
    student = net(1)
    before = state_of(student)["tensors"]
    report = api.distill(net(), student, output=tmp_path / "student", **call).report
    assert report["config"]["method"] == "nayer"
    assert report["images"] == 4 * 10
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    made = api.synthesize(net(), num_images=15, output=tmp_path / "set", **call)
    assert made.manifest["num_images"] == 15


def test_settings() -> None:
    found = with_method(config(), "nayer")
    assert isinstance(found.synthesis, NAYERConfig)
    assert (found.generator.latent_dim, found.synthesis.batch_size, found.kd_steps) == (1000, 4, config().kd_steps)
    digits = with_method(get_recipe("digits").config((1, 8, 8)), "nayer")
    assert digits.synthesis.augmentation == "crop"  # type: ignore[attr-defined]
    for changes in ({"steps": 0}, {"embedding_dim": 0}, {"beta1": 1.0}, {"feature_weight": 0, "class_weight": 0}):
        with pytest.raises(UsageError):
            NAYERConfig(**changes)
    with pytest.raises(UsageError, match=r"synthesis.reuse is no setting of the method nayer"):
        settings(synthesis__reuse="none")
