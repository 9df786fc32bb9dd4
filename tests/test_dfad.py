"""DFAD: its loss as the paper writes it, against the student; and the frame that methods with one generator share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api, losses
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import override
from fastdfkd_cli.method_config import DFADConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.dfad import DFAD
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.processes import Group
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")


def settings(**changes: Any) -> RunConfig:
    return from_dict(
        {key.replace("__", "."): value for key, value in changes.items()}, base=with_method(config(), "dfad")
    )


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> DFAD:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, DFAD)
    return made


# The loss


@pytest.mark.parametrize("log_discrepancy", [False, True])
def test_the_loss_is_the_papers(log_discrepancy: bool) -> None:
    """The discrepancy and what the generator makes of it in float64, and their gradient in the images."""
    model, student = teacher().double(), teacher(1).double()
    images = torch.rand(5, *SIZE).double().requires_grad_()
    with torch.enable_grad():
        difference = model(images) - student(images)
        discrepancy = sum(abs(difference[i, c]) for i in range(5) for c in range(CLASSES)) / (5 * CLASSES)
        wanted = -torch.log(discrepancy + 1) if log_discrepancy else -discrepancy
        (gradient,) = torch.autograd.grad(wanted, images)
    ours = method(settings(synthesis__log_discrepancy=log_discrepancy))
    varied = images.detach().float().requires_grad_()
    terms, total, logits = ours.terms(varied, teacher(1))
    total.backward()
    assert terms.keys() == {"adversarial"}
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logits.double(), model(images), rtol=1e-5, atol=1e-6)


def test_the_generator_plays_against_the_student() -> None:
    """Given the teacher in the student's place, there would be nothing to play for."""
    images = torch.rand(4, *SIZE)
    model = teacher()
    assert float(method(model=model).terms(images, teacher(1))[1]) < -1e-3
    assert float(method(model=model).terms(images, model)[1]) == 0
    seen: list[nn.Module] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(self)
            return self.inner(x)

    student = Watched()
    before = state_of(student)
    method().synthesize(student)
    assert seen == [student]
    assert_same_state(before, state_of(student))  # asked, not trained


def test_its_steps_raise_the_discrepancy() -> None:
    student, ours = net(1), method(settings(synthesis__batch_size=64, synthesis__lr_generator=0.01))
    figures = [float(ours.synthesize(student).losses["adversarial"]) for _ in range(60)]
    assert sum(figures[-10:]) < sum(figures[:10]) - 0.1


# The frame


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    student = net(1)
    first, second, other = method(), method(), method(seed=1)
    a = [first.synthesize(student) for _ in range(3)]
    b = [second.synthesize(student) for _ in range(3)]
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].images, other.synthesize(student).images)
    third = method(seed=5)
    third.load_state_dict(first.state_dict())
    for _ in range(2):
        x, y = first.synthesize(student), third.synthesize(student)
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
        assert x.losses.keys() == y.losses.keys() == {"adversarial", "total"}
        fed, again = first.training_batch(6), third.training_batch(6)
        assert torch.equal(fed, again)


def test_batches_are_what_the_engine_expects() -> None:
    model = teacher()
    ours = method(model=model)
    batch = ours.synthesize(net(1))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, *SIZE)
    assert torch.equal(batch.labels, batch.labels.clamp(0, CLASSES - 1))
    fed = ours.training_batch(6)
    assert fed.shape == (6, *SIZE)
    assert 0 <= float(fed.min()) <= float(fed.max()) <= 1
    assert not fed.requires_grad


def test_a_lower_rate_holds_also_after_a_state_is_taken_up() -> None:
    ours = method()
    ours.slow_down(0.25)
    again = method()
    again.load_state_dict(ours.state_dict())
    for each in (ours, again):
        assert each.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_generators_rate_follows_the_students(schedule: str) -> None:
    """At full rate against a student that hardly moves any more, the generator would tear the two apart."""
    assert settings().synthesis.lr_schedule == "cosine"
    run_config = settings(schedule__rounds=4, synthesis__lr_schedule=schedule)
    made = method(run_config)
    made.slow_down(0.5)
    rates: list[float] = []
    original = made.synthesize

    def watched(student: nn.Module | None = None) -> Any:
        rates.append(made.optimizer.param_groups[0]["lr"])
        return original(student)

    made.synthesize = watched  # type: ignore[method-assign]
    list(Distillation(run_config, teacher(), net(1), synthesizer=made, image_size=SIZE, device=CPU, amp=False))
    shares = [0, 0.25, 0.5, 0.75] if schedule == "cosine" else [0] * 4
    assert rates == pytest.approx([5e-4 * (1 + math.cos(math.pi * share)) / 2 for share in shares])


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="one process"):
        build_method(
            settings(), teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False,
            group=Group(rank=0, world_size=2, local_rank=0, local_size=2),
        )  # fmt: skip


# A run


def test_the_student_learns_by_l1_from_the_generator_itself() -> None:
    run_config = settings(schedule__rounds=4)
    made = method(run_config)
    student = net(1)
    run = Distillation(run_config, teacher(), student, synthesizer=made, image_size=SIZE, device=CPU, amp=False)
    assert run.label_views == 0
    drawn: list[Tensor] = []
    original = made.training_batch

    def watched(count: int) -> Tensor:
        found = original(count)
        drawn.append(found)
        return found

    made.training_batch = watched  # type: ignore[method-assign]
    records = list(run)
    assert len(drawn) == run.steps_taken == 4 * 5
    assert run.images_made == 4 * 4
    assert len({float(each.sum()) for each in drawn}) == len(drawn)  # new ones each time
    assert records[-1].values["loss"] > 0
    assert len(run.pool) == run_config.synthesis.batch_size  # for the report's pictures alone
    images = torch.rand(3, *SIZE)
    trained = run.student
    fresh = net(1)
    again = type(trained)(fresh, run_config.distillation, CPU, amp=False)
    loss, _ = again.learn(teacher(), images, 0)
    with torch.no_grad():
        assert float(loss) == pytest.approx(float((teacher()(images) - net(1).train()(images)).abs().mean()), rel=1e-5)


def test_a_whole_run_ends_with_a_student_that_says_how(tmp_path: Any) -> None:
    report = api.distill(
        net(), net(1), teacher_options=ModelOptions(input_size=SIZE), config=config(), overrides={"method": "dfad"},
        output=tmp_path / "student", device="cpu", amp=False,
    ).report  # fmt: skip
    assert report["config"]["method"] == "dfad"
    assert report["config"]["distillation"]["loss"] == "l1"
    assert report["kd_steps"] == 3 * 3 // 5 * 5
    assert report["quality"]["images"] == 8  # images of DeepInversion, whatever the method


def test_a_set_needs_a_student_to_play_against(tmp_path: Any) -> None:
    call: dict[str, Any] = {
        "num_images": 8, "output": tmp_path / "set", "teacher_options": ModelOptions(input_size=SIZE),
        "config": config(), "overrides": {"method": "dfad"}, "device": "cpu", "amp": False,
    }  # fmt: skip
    with pytest.raises(UsageError, match="The method dfad makes its images against a student"):
        api.synthesize(net(), **call)
    assert list(tmp_path.iterdir()) == []
    made = api.synthesize(net(), student=net(1), student_options=ModelOptions(input_size=SIZE), **call)
    assert made.manifest["num_images"] == 8
    assert made.manifest["header"]["config"]["schedule"]["burn_in_batches"] == 200


# Settings


def test_another_method_keeps_the_budget() -> None:
    quick = get_recipe("quick").config((3, 32, 32))
    found = with_method(quick, "dfad")
    assert isinstance(found.synthesis, DFADConfig)
    assert found.synthesis.batch_size == quick.synthesis.batch_size
    assert found.kd_steps == quick.kd_steps
    assert found.schedule.kd_steps_per_round == 5
    assert (found.distillation.lr, quick.distillation.lr) == (0.1, 0.5)  # published; what a chase can stand
    assert found.distillation.loss == "l1"
    assert with_method(found, "dfad") is found


@pytest.mark.parametrize("budget", [{"rounds": 30}, {"images": 3200}])
def test_a_budget_means_the_same_steps_with_every_method(budget: dict[str, int]) -> None:
    quick = get_recipe("quick").config((3, 32, 32))
    alone = override(quick, budget)
    found = override(quick, {"method": "dfad", **budget, "synthesis.batch_size": 32})
    assert found.schedule.kd_steps_per_round == 5
    assert found.kd_steps == alone.kd_steps // 5 * 5
    assert found.synthesis.batch_size == 32
    # What is said of the schedule itself is the method's own.
    assert override(quick, {"method": "dfad", "schedule.rounds": 7}).kd_steps == 35
    # A budget stands above it, as with fast: --config report.json --rounds 3.
    assert override(quick, {"method": "dfad", "schedule.rounds": 7, **budget}).kd_steps == found.kd_steps


def test_settings_of_one_method_are_not_anothers() -> None:
    zskt = with_method(get_recipe("quick").config((3, 32, 32)), "zskt")
    with pytest.raises(UsageError, match="settings of the method zskt, and not those of dfad: begin with a"):
        override(zskt, {"method": "dfad"})
    assert override(zskt, {"method": "zskt"}) == zskt


def test_a_pool_is_no_setting_of_a_method_that_keeps_no_images() -> None:
    with pytest.raises(UsageError, match="pool_size must be 0 with the method dfad"):
        settings(pool_size=64)
    assert with_method(config(pool_size=64), "dfad").pool_size == 0
    assert with_method(config(pool_size=64), "cmi").pool_size == 64


def test_a_setting_of_another_method_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"synthesis.reuse is no setting of the method dfad, which has batch_size, lr_gen"
    ):
        settings(synthesis__reuse="none")
    with pytest.raises(UsageError, match=r"synthesis.log_discrepancy is no setting of the method fast"):
        override(config(), {"synthesis.log_discrepancy": True})
    with pytest.raises(UsageError, match="Unknown method 'deepinvertion'. Did you mean deepinversion"):
        override(config(), {"method": "deepinvertion"})
    with pytest.raises(UsageError, match="Unknown method"):
        override(config(), {"method": ["dfad"]})
    for changes in ({"lr_generator": 0}, {"beta1": 1.0}, {"batch_size": 1}):
        with pytest.raises(UsageError):
            DFADConfig(**changes)


def test_logit_l1_is_zero_where_the_two_agree() -> None:
    logits = torch.randn(3, 4, dtype=torch.bfloat16)
    assert float(losses.logit_l1(logits, logits)) == 0
    assert losses.logit_l1(logits, -logits).dtype == torch.float32
