"""Real images: what opens, in which order of classes, as which pixels; and what is refused, with which words."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from fastdfkd_cli.data import EvaluationData, evaluation_input, open_evaluation_data
from fastdfkd_cli.dataset import DatasetWriter
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.models import InputSpec
from hostile import POSTSCRIPT, tar_member

RGB_8 = InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
SHAPES = ((40, 30), (31, 57), (24, 24))
CLASSES = ("ant", "bee", "class2", "class10")


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, classes: Sequence[str] = CLASSES, per_class: int = 2) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            (root / name / f"{index}.png").write_bytes(png(picture(100 * number + index)))
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def folder_files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.png"))}


def everything(data: EvaluationData, spec: InputSpec = RGB_8, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(data.batches([spec], batch_size=3, **options))
    return torch.cat([views[0] for views, _ in batches]), torch.cat([labels for _, labels in batches])


# ---------------------------------------------------------------------------------------------------- what opens


def test_class_folders_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    data = open_evaluation_data(data_dir=root)
    assert data.class_names == CLASSES  # natural order: class2 before class10
    assert timm.data.create_dataset("", root=str(root)).reader.class_to_idx == {
        name: index for index, name in enumerate(CLASSES)
    }
    images, labels = everything(data)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert images.dtype == torch.uint8
    assert images.shape == (8, 3, 8, 8)
    expected = torch.from_numpy(np.asarray(picture(201)).copy()).permute(2, 0, 1)
    assert torch.equal(images[5], expected)


def test_tar_shards_and_folder_hold_the_same_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    files = folder_files(root)
    names = list(files)
    one = write_tar(tmp_path / "one.tar", files)
    write_tar(tmp_path / "shards" / "train-00000.tar", {name: files[name] for name in names[::2]})
    write_tar(tmp_path / "shards" / "train-00001.tar", {name: files[name] for name in names[1::2]})
    per_class = {name: {} for name in CLASSES}
    for name, content in files.items():
        per_class[Path(name).parent.name][Path(name).name] = content
    nested = {}
    for name, content in per_class.items():
        write_tar(tmp_path / "classes" / f"{name}.tar", content)
        nested[f"{name}.tar"] = (tmp_path / "classes" / f"{name}.tar").read_bytes()
    write_tar(tmp_path / "nested.tar", nested)

    wanted = everything(open_evaluation_data(data_dir=root))
    for path in (one, tmp_path / "shards", tmp_path / "classes", tmp_path / "nested.tar"):
        data = open_evaluation_data(data_dir=path)
        assert data.class_names == CLASSES, path
        images, labels = everything(data)
        # File names repeat between the tars of "classes", so that only the pairs are comparable.
        pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
        assert len(pairs) == 8
        assert pairs == {(image.numpy().tobytes(), int(label)) for image, label in zip(*wanted, strict=True)}, path
    assert open_evaluation_data(data_dir=tmp_path / "shards").split == "train"


def test_a_manifest_names_classes_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-00000.tar", {"0001_bee/0.png": png(picture(0))})
    manifest = {"classes": ["0000_wasp", "0001_bee", "0002_ant"], "class_names": ["wasp", "bee", "ant"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = open_evaluation_data(data_dir=tmp_path)
    assert data.class_names == ("wasp", "bee", "ant")
    assert everything(data)[1].tolist() == [1]
    assert everything(data.aligned(3, ("ant", "wasp", "bee")))[1].tolist() == [2]
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "class_names": None}))
    assert open_evaluation_data(data_dir=tmp_path).class_names == tuple(manifest["classes"])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UnavailableError, match=r"manifest\.json is no readable manifest"):
        open_evaluation_data(data_dir=tmp_path)


def test_a_set_that_synthesize_writes_opens_with_its_labels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    with DatasetWriter(
        tmp_path / "set", class_names=None, num_classes=4, input_size=(3, 8, 8), shard_size=4, header={}
    ) as writer:
        writer.add(images, labels, torch.zeros(6, 4))
        writer.flush_shard()
        writer.close()
    data = open_evaluation_data(data_dir=tmp_path / "set")
    read, found = everything(data.aligned(4, None))
    pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    assert pairs == {(image.numpy().tobytes(), int(label)) for image, label in zip(read, found, strict=True)}


def test_a_split_is_found_under_its_usual_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "val", ("a", "b"))
    write_folder(tmp_path / "train", ("a", "b"), per_class=5)
    data = open_evaluation_data(data_dir=tmp_path)
    assert (data.split, data.size) == ("val", 4)
    assert open_evaluation_data(data_dir=tmp_path, split="train").size == 10
    with pytest.raises(UsageError, match=r"no split 'test': it has train, val"):
        open_evaluation_data(data_dir=tmp_path, split="test")
    with pytest.raises(UsageError, match="no folder 'tset': leave --split out"):
        open_evaluation_data(data_dir=tmp_path / "val", split="tset")


def test_shards_of_several_splits_are_kept_apart(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 1)):
        files = {f"{name}/{split}{i}.png": png(picture(i)) for name in ("a", "b") for i in range(count)}
        write_tar(tmp_path / f"{split}-00000.tar", files)
    assert open_evaluation_data(data_dir=tmp_path).size == 2
    assert open_evaluation_data(data_dir=tmp_path, split="train").size == 6
    with pytest.raises(UsageError, match="its tars are of train, validation"):
        open_evaluation_data(data_dir=tmp_path, split="test")


def test_what_computers_leave_between_images_is_passed_over(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("a", "b"))
    write_folder(root / ".ipynb_checkpoints", ("c",))
    (root / "a" / "._0.png").write_bytes(b"resource fork")
    (root / "a" / "notes.txt").write_text("no image")
    data = open_evaluation_data(data_dir=root)
    assert (data.class_names, data.size) == (("a", "b"), 4)
    files = {**folder_files(root / "a"), "._0.png": b"resource fork"}
    tar = write_tar(tmp_path / "x.tar", {f"a/{Path(name).name}": content for name, content in files.items()})
    assert open_evaluation_data(data_dir=tar).size == 2


def test_builtin_digits_need_no_files() -> None:
    for asked in ({"dataset": "builtin/digits"}, {"data_dir": "builtin/digits", "split": "test"}):
        data = open_evaluation_data(**asked)
        assert (data.name, data.split, data.size) == ("builtin/digits", "test", 450)
        assert data.class_names == tuple("0123456789")
    grey = InputSpec(size=(1, 8, 8), mean=(0.3,), std=(0.4,))
    images, labels = everything(data, grey)
    assert images.shape == (450, 1, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))
    stored = np.stack([np.asarray(data.source.open(index)[0]) for index in range(450)])
    assert np.array_equal(images[:, 0].numpy(), stored)  # at the native size nothing is resampled
    with pytest.raises(UsageError, match="only its test images"):
        open_evaluation_data(dataset="builtin/digits", split="train")


def test_torchvision_cifar10_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set's own pickles, in miniature: the checksums are the only thing that is replaced."""
    import pickle

    import torchvision.datasets

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    labels = list(range(10))
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    (base / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).exists())
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    data = open_evaluation_data(dataset="torch/cifar10", data_dir=tmp_path)
    assert (data.split, data.size, data.class_names) == ("test", 10, tuple(names))
    spec = InputSpec(size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    images, found = everything(data, spec)
    assert found.tolist() == labels
    assert np.array_equal(images.numpy().reshape(10, -1), pixels)


# ------------------------------------------------------------------------------------------- pixels are timm's pixels


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(24, 24), (16, 24)])
def test_pixels_equal_timms_validation_transform(tmp_path: Path, crop_mode: str, size: tuple[int, int]) -> None:
    for index, shape in enumerate(SHAPES):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{index}.png").write_bytes(png(picture(index, shape)))
    spec = InputSpec(
        size=(3, *size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.875,
        crop_mode=crop_mode,
    )
    images, _ = everything(open_evaluation_data(data_dir=tmp_path), spec)
    transform = timm.data.create_transform(
        input_size=spec.size,
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        std=spec.std,
    )
    expected = torch.stack([transform(picture(index, shape)) for index, shape in enumerate(SHAPES)])
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (spec.mean, spec.std))
    torch.testing.assert_close((images.float() / 255 - mean) / std, expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_are_read_in_the_models_channels(tmp_path: Path, channels: int, mode: str) -> None:
    (tmp_path / "a").mkdir()
    source = picture(0, (8, 8), "RGBA")
    source.save(tmp_path / "a" / "0.png")
    spec = InputSpec(size=(channels, 8, 8), mean=(0.5,) * channels, std=(0.5,) * channels)
    images, _ = everything(open_evaluation_data(data_dir=tmp_path), spec)
    expected = np.asarray(source.convert(mode)).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(images[0].numpy(), expected)


def test_a_fourth_channel_is_resized_like_the_others(tmp_path: Path) -> None:
    """PIL would multiply colours by it first, and lose them where it is zero."""
    (tmp_path / "a").mkdir()
    source = picture(0, (16, 16), "RGBA")
    source.putalpha(0)
    source.save(tmp_path / "a" / "0.png")
    spec = InputSpec(size=(4, 8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    images, _ = everything(open_evaluation_data(data_dir=tmp_path), spec)
    colour, _ = everything(open_evaluation_data(data_dir=tmp_path))
    assert torch.equal(images[:, :3], colour)
    assert int(images[:, :3].max()) > 0


def test_two_inputs_are_served_from_one_reading(tmp_path: Path) -> None:
    data = open_evaluation_data(data_dir=write_folder(tmp_path / "set"))
    grey = InputSpec(size=(1, 4, 4), mean=(0.5,), std=(0.5,))
    other_norm = InputSpec(size=(3, 8, 8), mean=(0.1,) * 3, std=(0.2,) * 3)
    views, _ = next(data.batches([RGB_8, grey, other_norm], batch_size=2))
    assert [tuple(view.shape) for view in views] == [(2, 3, 8, 8), (2, 1, 4, 4), (2, 3, 8, 8)]
    assert views[0] is views[2]  # normalisation is the model's affair: the pixels are the same


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    files = folder_files(write_folder(tmp_path / "set"))
    data = open_evaluation_data(data_dir=write_tar(tmp_path / "x.tar", files))
    alone, shared = everything(data), everything(data, workers=2)
    assert torch.equal(alone[0], shared[0])
    assert torch.equal(alone[1], shared[1])


# ----------------------------------------------------------------------------------------------------- classes


def test_classes_are_matched_by_name_where_the_model_names_them(tmp_path: Path) -> None:
    data = open_evaluation_data(data_dir=write_folder(tmp_path / "set", ("ant", "bee"), 1))
    assert data.aligned(2, ("ant", "bee")) is data
    assert data.aligned(2) is data
    swapped = data.aligned(2, ("bee", "ant"))
    assert everything(swapped)[1].tolist() == [1, 0]
    assert "by name" in swapped.notes[0]
    assert swapped.aligned(2, ("bee", "ant")) == swapped
    partial = data.aligned(3, ("bee", "cat", "ant"))
    assert everything(partial)[1].tolist() == [2, 0]
    assert "1 of the model's 3 classes have no images" in partial.notes[0]
    other = data.aligned(2, ("x", "y"))
    assert everything(other)[1].tolist() == [0, 1]
    assert "by position" in other.notes[0]
    numbered = open_evaluation_data(data_dir=write_folder(tmp_path / "numbered", ("00", "01"), 1))
    assert numbered.aligned(2, ("x", "y")).notes == ()
    with pytest.raises(UsageError, match=r"has 2 classes \(ant, bee\) and the model 5"):
        data.aligned(5)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, UsageError, "--data-dir or --dataset"),
        ({"data_dir": "nowhere"}, UnavailableError, "no folder or file nowhere"),
        ({"dataset": "cifar10"}, UsageError, "Did you mean torch/cifar10?"),
        ({"dataset": "hfsd/mnist"}, UsageError, "Did you mean hfds"),
        ({"dataset": "torch/cifar11"}, UsageError, "Did you mean cifar10"),
        ({"dataset": "torch/imagenet"}, UsageError, "needs --data-dir"),
        ({"dataset": "torch/cifar10", "data_dir": "nowhere"}, UnavailableError, "no folder nowhere"),
        ({"dataset": "torch/cifar10", "split": "tset"}, UsageError, "no split 'tset'"),
        ({"dataset": "builtin/letters"}, UsageError, "builtin/digits"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: dict[str, str], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words.replace("?", r"\?")) as caught:
        open_evaluation_data(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hfds", "hfids", "tfds", "wds"])
def test_a_missing_package_is_named_before_timm_prints(
    kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install"):
        open_evaluation_data(dataset=f"{kind}/mnist")
    assert capfd.readouterr().out == ""


def test_absent_torchvision_files_are_reported_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnavailableError, match="torch/cifar10 cannot be opened in") as caught:
        open_evaluation_data(dataset="torch/cifar10", data_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_a_place_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "cat" / "readme.txt").write_text("nothing")
    write_tar(tmp_path / "empty.tar", {})
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "noise.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "set.zip").write_bytes(b"PK")
    for name, error, words in (
        ("empty", UnavailableError, "holds no images"),
        ("empty.tar", UnavailableError, "holds no images"),
        ("zero.tar", UnavailableError, "cannot be read as an uncompressed tar"),
        ("noise.tar", UnavailableError, "cannot be read as an uncompressed tar"),
        ("set.zip", UsageError, "neither a folder nor a .tar"),
    ):
        with pytest.raises(error, match=words) as caught:
            open_evaluation_data(data_dir=tmp_path / name)
        assert name in str(caught.value)


def test_a_truncated_tar_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    whole = write_tar(tmp_path / "x.tar", {"a/0.png": png(picture(0)), "a/1.png": noise}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    with pytest.raises(UnavailableError, match="cut.tar cannot be read"):
        open_evaluation_data(data_dir=tmp_path / "cut.tar")


def test_images_outside_class_folders_are_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("a", "b"))
    (root / "stray.png").write_bytes(png(picture(0)))
    with pytest.raises(UnavailableError, match=r"1 of 5 images \(stray.png, ...\) are in no class folder"):
        open_evaluation_data(data_dir=root)
    with pytest.raises(UnavailableError, match="in no class folder"):
        open_evaluation_data(data_dir=write_tar(tmp_path / "x.tar", {"./0.png": png(picture(0))}))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_image_is_named_and_not_skipped(tmp_path: Path, damage: str, workers: int) -> None:
    root = write_folder(tmp_path / "set", ("a", "b"))
    whole = png(picture(0, (64, 64)))
    content = {"cut": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b""}[damage]
    (root / "b" / "1.png").write_bytes(content)
    data = open_evaluation_data(data_dir=root)
    with pytest.raises(UnavailableError, match=r"b/1\.png: not a readable image") as caught:
        everything(data, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_stream_counts_every_image_once_and_names_a_damaged_one() -> None:
    """What timm's streaming readers give: pictures and labels to iterate over, of unknown number."""

    def stream(broken: bool) -> Iterator[tuple[Image.Image, int]]:
        yield from ((picture(index), index % 2) for index in range(5))
        if broken:
            raise OSError("image file is truncated")

    data = EvaluationData(name="hfids/x", split="test", class_names=("a", "b"), source=stream(broken=False))
    assert data.size is None
    images, labels = everything(data, workers=2)
    assert len(images) == 5
    assert labels.tolist() == [0, 1, 0, 1, 0]
    broken = EvaluationData(name="hfids/x", split="test", class_names=None, source=stream(broken=True))
    with pytest.raises(UnavailableError, match=r"hfids/x: image 5: cannot be read \(image file is truncated\)"):
        everything(broken)
    unlabelled = EvaluationData(name="hfids/x", split="test", class_names=None, source=[(picture(0), -1)])
    with pytest.raises(UnavailableError, match="image 0: its label is -1: this split has no usable labels"):
        everything(unlabelled)


def test_values_out_of_range(tmp_path: Path) -> None:
    data = open_evaluation_data(data_dir=write_folder(tmp_path / "set"))
    with pytest.raises(UsageError, match="batch size"):
        next(data.batches([RGB_8], batch_size=0))
    with pytest.raises(UsageError, match="workers"):
        next(data.batches([RGB_8], batch_size=1, workers=-1))
    with pytest.raises(UsageError, match="1 to 4 channels; the model takes 5"):
        next(data.batches([InputSpec(size=(5, 8, 8), mean=(0.5,) * 5, std=(0.5,) * 5)], batch_size=1))
    with pytest.raises(UsageError, match="--crop-pct"):
        evaluation_input(RGB_8, crop_pct=1.5)
    with pytest.raises(UsageError, match="--img-size"):
        evaluation_input(RGB_8, img_size=0)


def test_evaluation_takes_the_authors_test_size_unless_asked() -> None:
    spec = InputSpec(size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, test_size=(3, 12, 12), test_crop_pct=0.95)
    assert (evaluation_input(spec).size, evaluation_input(spec).crop_pct) == ((3, 12, 12), 0.95)
    asked = evaluation_input(spec, img_size=16, crop_pct=0.9)
    assert (asked.size, asked.crop_pct) == ((3, 16, 16), 0.9)
    assert evaluation_input(RGB_8) == RGB_8


# ------------------------------------------------------------------------------------------- files that mean no good


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (tar_member(b"a/0.png", b"", size=2**62), "cannot be read"),
        (tar_member(b"a/0.png", b"", size=-512), "cannot be read"),
        (tar_member(b"a/0.png", b"", size=-(2**40)), "cannot be read"),
        (tar_member(b"a/0.png", b"", size=2**80), "cannot be read"),
        (tar_member(b"x", b"", size=2**40, kind=b"x"), "cannot be read"),
        (tar_member(b"x", b"", size=2**62, kind=b"L"), "cannot be read"),
        (tar_member(b"x", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", kind=b"x"), "cannot be read|sparse"),
        (tar_member(b"x", b"20 GNU.sparse.map=a\n", kind=b"x"), "cannot be read"),
        (tar_member(b"a/0.png", png(picture(0)), kind=b"S"), "sparse file"),
        (tar_member(b"a/0.png", b"", kind=b"3"), "is a link or a device"),
        (tar_member(b"a/0.png", b"", kind=b"2", link=b"../../x"), "is a link or a device"),
    ],
)
def test_a_tar_whose_headers_lie_is_refused(tmp_path: Path, member: bytes, words: str) -> None:
    """Older readers of Python's go round in circles over some of them, and reserve memory for others."""
    whole = tar_member(b"a/1.png", png(picture(0)))
    (tmp_path / "x.tar").write_bytes(whole + member + whole + bytes(1024))
    with pytest.raises(UnavailableError, match=f"x.tar.*({words})"):
        open_evaluation_data(data_dir=tmp_path / "x.tar")


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    names = ("../../evil/0.png", "/evil/1.png", "evil/../../evil/2.png")
    tar = write_tar(tmp_path / "in" / "x.tar", {name: png(picture(index)) for index, name in enumerate(names)})
    images, labels = everything(open_evaluation_data(data_dir=tar))
    assert len(images) == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.tar"]


def test_what_is_no_file_and_no_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    for place in (tmp_path / "x.tar", Path(os.devnull)):
        with pytest.raises(UsageError, match="neither a folder nor a .tar"):
            open_evaluation_data(data_dir=place)


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    """With two of them there would be a billion billion ways through the folder."""
    root = write_folder(tmp_path / "set", ("a", "b"))
    for name in ("up", "again"):
        (root / "a" / name).symlink_to("..")
        (root / "b" / name).symlink_to(".")
    (root / "c").symlink_to("a")  # one that leads sideways counts, as timm counts it
    assert open_evaluation_data(data_dir=root).class_names == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_what_an_image_is_stands_in_it_and_not_in_its_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    picture(0).save(tmp_path / "a" / "0.jpg", kind)
    assert len(everything(open_evaluation_data(data_dir=tmp_path))[0]) == 1


def test_postscript_goes_to_no_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL would start Ghostscript for it, whatever the file is called."""
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("starts a program"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(POSTSCRIPT)
    with pytest.raises(UnavailableError, match="a/0.png: not a readable image"):
        everything(open_evaluation_data(data_dir=tmp_path))


def test_torchvisions_sets_read_the_same_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "no-such-program")
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    (folder / "0.JPEG").write_bytes(POSTSCRIPT)

    def imagenet(name: str, root: str, **options: Any) -> Any:
        import torchvision

        return torchvision.datasets.ImageFolder(os.path.join(root, "val"))

    monkeypatch.setattr("fastdfkd_cli.data.sources.create_dataset", imagenet)
    data = open_evaluation_data(dataset="torch/imagenet", data_dir=tmp_path)
    with pytest.raises(UnavailableError, match="not a readable image"):
        everything(data)
    (folder / "0.JPEG").write_bytes(png(picture(0)))
    assert len(everything(data)[0]) == 1


def test_what_torchvision_unpacks_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its older versions leave that to Python, whose older versions extract anything anywhere."""
    archive = write_tar(tmp_path / "in" / "set.tar", {"../outside": b"evil"})

    def unpacking(name: str, root: str, **options: Any) -> Any:
        with tarfile.open(archive) as opened:
            opened.extractall(root)

    monkeypatch.setattr("fastdfkd_cli.data.sources.create_dataset", unpacking)
    with pytest.raises(UnavailableError, match="torch/imagenet cannot be opened"):
        open_evaluation_data(dataset="torch/imagenet", data_dir=tmp_path / "in")
    assert not (tmp_path / "outside").exists()
    assert tarfile.TarFile.extraction_filter is None


@pytest.mark.parametrize("dataset", ["torch/cifar10", "torch/mnist", "tfds/mnist"])
def test_offline_no_set_is_fetched(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for function in ("download_url", "download_and_extract_archive"):
        for module in ("utils", "cifar", "mnist"):
            name = f"torchvision.datasets.{module}.{function}"
            monkeypatch.setattr(name, lambda *a, **k: pytest.fail("downloads"), raising=False)
    with pytest.raises(UnavailableError, match=f"{dataset} would have to be downloaded, and HF_HUB_OFFLINE is set"):
        open_evaluation_data(dataset=dataset)


@pytest.mark.parametrize("place", ["pipe:touch x", "https://example.org/shards", "gs://bucket", ""])
def test_shards_are_files_and_not_addresses_or_commands(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("fastdfkd_cli.data.sources.create_dataset", lambda *a, **k: pytest.fail("opens it"))
    with pytest.raises(UsageError, match="wds/x needs --data-dir, the folder of its shards"):
        open_evaluation_data(dataset="wds/x", data_dir=place)
    with pytest.raises(UsageError, match="wds/x has no split 'pipe:touch x.tar'"):
        open_evaluation_data(dataset="wds/x", data_dir=".", split="pipe:touch x.tar")
