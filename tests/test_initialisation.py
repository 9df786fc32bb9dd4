"""A student that begins with a selection of its teacher's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.initialisation import select_weights
from fastdfkd_cli.models import InputSpec, LoadedModel, LogitsOnly, ModelOptions, load_student

SPEC = InputSpec(size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


def model(module: nn.Module, **more: object) -> LoadedModel:
    return LoadedModel(
        module=module, reference="m", name="m", source="module", input=SPEC, num_classes=4, **more  # type: ignore[arg-type]
    )  # fmt: skip


def pair(*widths: int) -> list[nn.Sequential]:
    return [
        nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 4))
        for width in widths
    ]


def test_rows_and_columns_are_spaced_evenly_and_belong_together() -> None:
    large, small = pair(7, 4)
    large[1].running_mean.copy_(torch.arange(7.0))  # type: ignore[union-attr,operator]
    assert select_weights(model(small), model(large)) == 1
    places = [0, 2, 4, 6]
    assert torch.equal(small[0].weight, large[0].weight[places])  # type: ignore[index]
    assert torch.equal(small[0].bias, large[0].bias[places])  # type: ignore[index]
    assert small[1].running_mean.tolist() == [0, 2, 4, 6]  # type: ignore[union-attr,operator]
    assert torch.equal(small[3].weight, large[3].weight[:, places])  # type: ignore[index]
    assert torch.equal(small[3].bias, large[3].bias)  # type: ignore[arg-type]
    # Its own memory, to be trained without the teacher.
    with torch.no_grad():
        small[3].bias.zero_()  # type: ignore[operator,union-attr]
    assert large[3].bias.abs().sum() > 0  # type: ignore[operator,union-attr]


def test_a_layer_is_taken_whole_or_not_at_all() -> None:
    (large,) = pair(7)
    torch.manual_seed(0)
    for name, tensor in large.state_dict().items():
        if name.startswith("1.") and tensor.dim():
            tensor.uniform_(1, 2)
    # A larger kernel, and more classes, than the teacher's; the Conv2d's bias alone would fit.
    small = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    floats = [tensor for tensor in before.values() if tensor.is_floating_point()]
    assert select_weights(model(small), model(large)) == pytest.approx(16 / sum(tensor.numel() for tensor in floats))
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}


def test_a_narrow_network_of_the_papers_begins_as_a_part_of_the_wide_one() -> None:
    teacher = model(load_student("cifar/wrn16_2", ModelOptions(), like=model(nn.Identity())).module)
    student = load_student("cifar/wrn16_1", ModelOptions(), like=teacher)
    assert select_weights(student, teacher) == 1
    # Stages of a deeper teacher that a student has too are the first of each.
    deep = model(load_student("cifar/wrn40_2", ModelOptions(), like=teacher).module)
    assert select_weights(student, deep) == 1
    wrapped = model(LogitsOnly(teacher.module))
    assert select_weights(student, wrapped) == 1


def test_what_a_run_begins_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = load_student("cifar/wrn10_2", ModelOptions(), like=model(nn.Identity())).module.eval()
    options = ModelOptions(num_classes=4, input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    said: list[str] = []

    def run(name: str, student: str | nn.Module, **settings: object) -> api.DistillResult:
        overrides = {
            "distillation.init": "weight-selection", "rounds": 1, "schedule.kd_steps_per_round": 1,
            "distillation.lr": 1e-9, "distillation.lr_min": 0.0, "quality_images": 0, **settings,
        }  # fmt: skip
        return api.distill(
            teacher, student, teacher_options=options, recipe="smoke", overrides=overrides, output=tmp_path / name,
            device="cpu", amp=False, on_message=said.append,
        )  # fmt: skip

    expected = load_student("cifar/wrn10_1", ModelOptions(), like=model(teacher))
    select_weights(expected, model(teacher))
    found = run("a", "cifar/wrn10_1")
    for name, tensor in expected.module.named_parameters():
        assert torch.allclose(dict(found.student.named_parameters())[name], tensor, atol=1e-6), name
    assert "student cifar/wrn10_1, 100 % of its weights selected from the teacher's" in said
    assert found.report["config"]["distillation"]["init"] == "weight-selection"
    with pytest.raises(UsageError, match="a.* comes with weights, which would be overwritten: --set distillation.init"):
        run("b", str(tmp_path / "a"))

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    with pytest.raises(UsageError, match="No layer of the student Other has a namesake in the teacher"):
        run("c", Other())
    assert not (tmp_path / "c").exists()
    run("c", Other(), **{"distillation.init": "random"})
