"""The exported folder gives the student back to a stranger, and says truthfully where it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from fastdfkd_cli import pictures
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.export import export_student, model_card, plain_module, verify_export, write_samples
from fastdfkd_cli.models import InputSpec, LoadedModel, load_student, load_teacher

REPORT: dict[str, Any] = {
    "config": {"recipe": "smoke", "seed": 7, "synthesis": {"steps": 5}},
    "images": 512,
    "kd_steps": 40,
    "seconds": {"synthesis": 1.5, "total": 3.25},
    "quality": {"agreement": 0.91, "statistics_distance": None},
    "evaluation": None,
}


class Mine(nn.Module):
    """A user's network: no timm attributes, more than logits in its output, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.twin = nn.Linear(4, 5)
        self.twin.weight = self.fc.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.conv(x)).mean((2, 3))
        return {"logits": self.fc(features) + self.twin(features), "features": features}


def model(module: nn.Module, **facts: Any) -> LoadedModel:
    spec = InputSpec(size=(3, 16, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic")
    values = {"reference": "teacher.pth", "name": "teacher.pth", "source": "file", "input": spec, "num_classes": 5}
    return LoadedModel(module=module, **{**values, **facts})


@pytest.fixture
def teacher() -> LoadedModel:
    torch.manual_seed(0)
    return model(nn.Identity(), class_names=("a", "b", "c", "d", "é"), weights_sha256="ab" * 32)


@pytest.fixture
def student(teacher: LoadedModel) -> LoadedModel:
    found = load_student("cifar/wrn10_1", like=teacher)
    trained(found)
    return found


def trained(found: LoadedModel) -> None:
    """Give the BatchNorm layers statistics of their own, as training would."""
    found.module.train()
    with torch.no_grad():
        found.module(torch.randn(8, *found.input.size))


def images(count: int = 4, size: tuple[int, int, int] = (3, 16, 12)) -> Tensor:
    return torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def card_facts(card: str) -> dict[str, Any]:
    facts = yaml.safe_load(card.removeprefix("---\n").split("\n---\n")[0])
    assert isinstance(facts, dict)
    return facts


# Weights and config


def test_timm_opens_the_folder_in_a_process_of_its_own(
    tmp_path: Path, teacher: LoadedModel, student: LoadedModel
) -> None:
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert verify_export(tmp_path, student, images()) == 0.0
    code = (
        "import sys, timm, torch, fastdfkd_cli.nets_cifar\n"
        "m = timm.create_model(f'local-dir:{sys.argv[1]}', pretrained=True).eval()\n"
        "x = torch.load(sys.argv[2])\n"
        "mean, std = (torch.tensor(m.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ('mean', 'std'))\n"
        "torch.save((m((x / 255 - mean) / std), m.pretrained_cfg), sys.argv[3])\n"
    )
    torch.save(images(), tmp_path / "x")
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "x"), str(tmp_path / "y")]
    subprocess.run(command, check=True, timeout=120)
    logits, config = torch.load(tmp_path / "y")
    student.module.eval()
    assert torch.equal(logits, student.normalized()(images()))
    assert config["label_names"] == ["a", "b", "c", "d", "é"]
    assert (config["interpolation"], config["crop_pct"], config["input_size"]) == ("bicubic", 1.0, [3, 16, 12])


def test_the_loaders_of_this_package_read_folder_and_file(
    tmp_path: Path, teacher: LoadedModel, student: LoadedModel
) -> None:
    """The weights file alone says what is needed, too."""
    export_student(student, tmp_path, teacher=replace(teacher, license="mit"), report=REPORT)
    expected = student.normalized().eval()(images())
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    for reference in (tmp_path, tmp_path / "alone.safetensors"):
        again = load_teacher(str(reference))
        assert torch.equal(again.normalized()(images()), expected)
        assert again.input == student.input
        assert (again.class_names, again.license) == (teacher.class_names, "mit")


def test_the_weights_file_says_where_it_comes_from(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    export_student(student, tmp_path, teacher=replace(teacher, revision="c0ffee"), report=REPORT)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["format"], facts["seed"], facts["recipe"]) == ("pt", "7", "smoke")
    assert (facts["teacher"], facts["teacher_revision"], facts["teacher_sha256"]) == (teacher.name, "c0ffee", "ab" * 32)
    assert json.loads(facts["config"]) == REPORT["config"]
    assert facts["architecture"] == "fastdfkd_wrn10_1"


def test_one_student_is_one_file(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    report = {"config": {"recipe": "smoke", "seed": 3}}
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        export_student(student, tmp_path / str(number), teacher=replace(teacher, name="schön"), report=report)
    first, *others = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(5)]
    assert all(other == first for other in others)
    with safe_open(tmp_path / "0" / "model.safetensors", "pt") as file:
        assert file.metadata()["teacher"] == "schön"
        assert file.metadata()["seed"] == "3"


@pytest.mark.parametrize("wrap", ["parallel", "channels-last", "half", "double", "compiled"])
def test_a_wrapped_student_is_exported_plain(
    tmp_path: Path, teacher: LoadedModel, student: LoadedModel, wrap: str
) -> None:
    plain = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    module = student.module
    if wrap == "parallel":
        module = nn.DataParallel(module)
    elif wrap == "compiled":
        module = torch.compile(module)  # type: ignore[assignment]
    elif wrap == "channels-last":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        module = module.half() if wrap == "half" else module.double()
    wrapped = replace(student, module=module)
    export_student(wrapped, tmp_path, teacher=teacher, report=REPORT)
    assert verify_export(tmp_path, wrapped, images()) == 0.0
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert written.keys() == plain.keys()
    for name, tensor in written.items():
        assert tensor.dtype == plain[name].dtype
        assert torch.allclose(tensor, plain[name], atol=1e-2 if wrap == "half" else 0)
    kind = {"half": torch.float16, "double": torch.float64}.get(wrap, torch.float32)
    assert next(module.parameters()).dtype == kind  # the student itself is left as it was
    assert module.training


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "resnet10t"])
def test_timm_students_of_other_sizes_come_back(tmp_path: Path, teacher: LoadedModel, name: str) -> None:
    """test_vit is built for one image size, which has to travel with it."""
    spec = replace(teacher.input, size=(1, 64, 32), mean=(0.5,), std=(0.25,))
    student = load_student(name, like=replace(teacher, input=spec))
    trained(student)
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert verify_export(tmp_path, student, images(2, (1, 64, 32))) == 0.0
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (opened.num_classes, tuple(opened.pretrained_cfg["input_size"])) == (5, (1, 64, 32))
    # Nothing of timm's own checkpoint of that name is claimed.
    stated = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert not {"url", "hf_hub_id", "tag", "license", "origin_url", "paper_ids"} & stated.keys()


def test_a_users_network_is_written_with_its_own_names(tmp_path: Path, teacher: LoadedModel) -> None:
    torch.manual_seed(1)
    student = load_student(Mine(), like=teacher)
    trained(student)
    assert type(student.module) is not Mine  # the loader adapted its output
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert verify_export(tmp_path, student, images()) == 0.0
    fresh = Mine()
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] is None
    assert config["fastdfkd"]["reference"] == "Mine"
    card = (tmp_path / "README.md").read_text()
    assert "load_state_dict" in card
    assert "library_name" not in card_facts(card)


def test_torchvisions_network_loads_from_its_weights_file(tmp_path: Path, teacher: LoadedModel) -> None:
    spec = replace(teacher.input, size=(3, 32, 32))
    student = load_student("torchvision/squeezenet1_1", like=replace(teacher, input=spec))
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert verify_export(tmp_path, student, images(2, (3, 32, 32))) == 0.0
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    again = load_teacher(str(tmp_path / "alone.safetensors")).normalized()
    assert torch.equal(again(images(2, (3, 32, 32))), student.normalized().eval()(images(2, (3, 32, 32))))
    assert "torchvision.models.get_model('squeezenet1_1', num_classes=5)" in (tmp_path / "README.md").read_text()


# The proof notices


def test_verification_notices_any_other_weight(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    path = tmp_path / "model.safetensors"
    good = safetensors.torch.load_file(path)
    for name, change in (("fc.bias", 1e-3), ("block1.layer.0.conv1.weight", 1e-3), ("bn1.running_mean", 1e-2)):
        bad = {**good, name: good[name] + change}
        safetensors.torch.save_file(bad, path)
        with pytest.raises(FastDFKDError, match="gives other logits"):
            verify_export(tmp_path, student, images())
    safetensors.torch.save_file({name: tensor for name, tensor in good.items() if name != "fc.bias"}, path)
    with pytest.raises(FastDFKDError, match="cannot be opened"):
        verify_export(tmp_path, student, images())
    path.unlink()
    with pytest.raises(FastDFKDError, match="cannot be opened"):
        verify_export(tmp_path, student, images())


def test_verification_notices_another_normalisation(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FastDFKDError, match="reads another mean"):
        verify_export(tmp_path, student, images())


def test_verification_notices_a_missing_tensor_of_a_users_network(tmp_path: Path, teacher: LoadedModel) -> None:
    student = load_student(Mine(), like=teacher)
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "conv.bias": tensors["conv.bias"] + 1}, path)
    with pytest.raises(FastDFKDError, match="gives other logits"):
        verify_export(tmp_path, student, images())
    del tensors["conv.bias"]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(FastDFKDError, match=r"cannot be opened.*conv\.bias"):
        verify_export(tmp_path, student, images())


def test_verification_leaves_the_run_as_it_was(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    export_student(student, tmp_path, teacher=teacher, report=REPORT)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in student.module.state_dict().items()}
    student.module.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify_export(tmp_path, student, images()) == 0.0
    assert torch.equal(torch.get_rng_state(), before)
    assert student.module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.module.state_dict().items())


def test_a_student_that_is_not_finite_is_not_exported(
    tmp_path: Path, teacher: LoadedModel, student: LoadedModel
) -> None:
    with torch.no_grad():
        plain_module(student.module).get_parameter("fc.bias")[0] = float("inf")
    with pytest.raises(FastDFKDError, match=r"fc\.bias is not finite"):
        export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_not_json_are_refused(tmp_path: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    student.model_args["act_layer"] = nn.ReLU
    with pytest.raises(FastDFKDError, match="not JSON"):
        export_student(student, tmp_path, teacher=teacher, report=REPORT)
    assert list(tmp_path.iterdir()) == []


# The card


def test_the_card_claims_no_licence_and_no_base_that_is_not_known(teacher: LoadedModel, student: LoadedModel) -> None:
    card = model_card(student, teacher, REPORT)
    facts = card_facts(card)
    assert facts["library_name"] == "timm"
    assert not {"license", "base_model"} & facts.keys()
    assert "licence is not known" in card
    assert "import fastdfkd_cli.nets_cifar" in card
    assert "Not measured" in card
    assert "| agreement | 0.91 |" in card


@pytest.mark.parametrize(
    ("source", "name", "license", "expected"),
    [
        ("timm", "timm/resnet50.a1_in1k", "mit", {"base_model": "timm/resnet50.a1_in1k", "license": "mit"}),
        ("hub", "hf-hub:owner/net@c0ffee", "cc-by-nc-4.0", {"base_model": "owner/net", "license": "cc-by-nc-4.0"}),
        ("hub", "hf-hub:owner/net", "My Terms: v1", {"license": "other", "license_name": "My Terms: v1"}),
        ("local-dir", "local-dir:/home/me/net", None, {"base_model": None, "license": None}),
        ("file", "cifar/wrn16_2 (a.pth)", None, {"base_model": None}),
    ],
)
def test_the_card_names_what_the_teacher_is(
    teacher: LoadedModel, student: LoadedModel, source: Any, name: str, license: str | None, expected: dict[str, Any]
) -> None:
    known = replace(teacher, source=source, name=name, license=license, pretrained=True)
    facts = card_facts(model_card(student, known, REPORT))
    assert {key: facts.get(key) for key in expected} == expected


def test_two_licences_are_both_named_and_neither_is_claimed(teacher: LoadedModel, student: LoadedModel) -> None:
    started = replace(student, pretrained=True, source="hub", name="hf-hub:me/start@1", license="gpl-3.0")
    card = model_card(started, replace(teacher, license="mit"), REPORT)
    assert "license" not in card_facts(card)
    assert "`mit`" in card
    assert "`gpl-3.0`" in card
    assert card_facts(card)["base_model"] == "me/start"


def test_names_from_elsewhere_cannot_write_the_card(teacher: LoadedModel, student: LoadedModel) -> None:
    bad = "x\n---\nlicense: mit\n# Heading <script>alert(1)</script> | [a](http://b) `"
    report = {**REPORT, "data": {"path": bad, "synthetic": True}, "evaluation": {"dataset": bad, "top1": 93.125}}
    card = model_card(replace(student, name=bad), replace(teacher, name=bad, license=bad), report)
    assert card_facts(card)["license"] == "other"
    assert "\n# Heading" not in card
    assert card.count("\n---\n") == 1  # the end of the front matter
    outside = [part for index, part in enumerate(card.split("```")) if index % 2 == 0]
    for line in "".join(outside).splitlines():
        if "<script>" in line:
            assert line.count("`") >= 4 or line.startswith("license_name")  # in a code span, or in the front matter
    assert "| top1 | 93.125 |" in card


@given(st.text(st.characters(), max_size=30))
def test_no_name_makes_the_card_act(name: str) -> None:
    """On a terminal, or as another line, a link, a tag or a table's column."""
    net = Mine()
    student, teacher = (model(net, name=name, reference=name, license=name) for _ in range(2))
    plain, card = (
        model_card(each, each, {"data": {"path": said, "synthetic": True}, "evaluation": {"dataset": said}})
        for each, said in ((replace(student, name="x", reference="x", license="x"), "x"), (teacher, name))
    )
    body, plain_body = (text.split("\n---\n", 1)[1] for text in (card, plain))
    assert len(body.splitlines()) == len(plain_body.splitlines())
    assert all(char == "\n" or char.isprintable() for char in card)
    for line, usual in zip(body.splitlines(), plain_body.splitlines(), strict=True):
        assert line[:1] == usual[:1]
        if usual.startswith("|"):
            assert line.replace(r"\|", "").count("|") == usual.count("|")


def test_a_name_that_is_not_utf8_is_written_with_escapes(tmp_path: Path, student: LoadedModel) -> None:
    odd = replace(student, name="x (\udcff.pth)", class_names=tuple("abcd\udcff"))
    export_student(odd, tmp_path, teacher=odd, report={"data": {"path": "\udcff", "synthetic": True}})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["teacher"] == "x (\\udcff.pth)"
    assert json.loads(metadata["classes"])[-1] == "\udcff"
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["label_names"][-1] == "\udcff"


def test_the_card_claims_no_synthesis_for_a_folder_of_pictures(teacher: LoadedModel, student: LoadedModel) -> None:
    card = model_card(student, teacher, {**REPORT, "data": {"path": "photos", "synthetic": False, "header": None}})
    assert "Images: `photos`." in card
    assert "no real image" not in card
    assert "without its data" not in card.split("## ")[0]


# Pictures


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_samples_show_a_row_a_class(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "samples.png"
    labels = torch.tensor([2, 0, 2, 2, 9])
    write_samples(
        path, images(5, (channels, 8, 8)), labels, ["zero", "one", "two is a very long name, longer than that"]
    )
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        rows, columns = 3, 3
        assert picture.height == rows * 66 + 2
        margin = picture.width - (columns * 66 + 2)
        assert 100 < margin <= 162  # the long name is cut
        # The blank at the end of a short row is white, and the first tile is not.
        assert picture.getpixel((picture.width - 30, 30)) == (255, 255, 255)
        tile = picture.crop((margin + 2, 2, margin + 2 + 64, 2 + 64))
        assert len(tile.getcolors() or []) > 4


def test_many_classes_are_sampled_evenly_and_names_are_optional(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.png", images(100, (3, 8, 8)), list(range(100)), rows=4)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 4 * 66 + 2
    write_samples(tmp_path / "samples.png", images(2), [0, 1], ["猫\n", "b"], rows=1)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 6 * 16  # one class: a single tile, its 16 rows enlarged six times


def test_tiles_are_readable_at_any_size() -> None:
    small = pictures.tiles(images(1, (1, 8, 8)))
    assert small.shape == (1, 3, 64, 64)
    assert torch.equal(small[:, :1, ::8, ::8], images(1, (1, 8, 8)))
    assert pictures.tiles(images(1, (3, 448, 224))).shape == (1, 3, 224, 112)
    assert pictures.tiles(images(1, (3, 2, 200))).shape == (1, 3, 2, 200)
    two = pictures.as_rgb(images(1, (2, 4, 4)))
    assert torch.equal(two[:, 1], two[:, 2])
    with pytest.raises(ValueError, match="not 5"):
        pictures.as_rgb(torch.zeros(1, 5, 4, 4, dtype=torch.uint8))
