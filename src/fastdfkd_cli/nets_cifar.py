"""The paper's networks for small images, registered with timm.

Importing this module adds ``fastdfkd_resnet18``, ``fastdfkd_resnet34``, ``fastdfkd_vgg11`` and the
``fastdfkd_wrn{depth}_{width}`` family to timm's registry, so that
``timm.create_model("fastdfkd_wrn16_1")`` and ``timm.create_model("local-dir:STUDENT", pretrained=True)``
work like for any timm model. On the command line the same networks are written ``cifar/wrn16_1``.

Sources: ResNet, He et al. 2016 (with the 3x3 stride-1 stem that CIFAR work uses); VGG, Simonyan & Zisserman
2015 (with BatchNorm and a single linear classifier); wide ResNet, Zagoruyko & Komodakis 2016. The tensor names
are the ones most public CIFAR checkpoints carry, so that such checkpoints load without renaming.
All take ``[B, in_chans, H, W]`` of any size from 8x8 up, square or not, and return logits ``[B, num_classes]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

REGISTRY_PREFIX = "fastdfkd_"
#: Depth and width of the registered wide ResNets (depth = 6n + 4).
WIDE_RESNETS = ((10, 1), (10, 2), (16, 1), (16, 2), (16, 4), (28, 1), (28, 2), (28, 10), (40, 1), (40, 2), (40, 4))


def _he_init(module: nn.Module) -> None:
    """He et al.'s initialisation, as the original training code of all three families uses."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


class _CifarNet(nn.Module):
    """What timm expects of a classifier, shared by the three families.

    Subclasses set ``classifier_name`` and implement :meth:`forward_features` ``[B, C, H, W] -> [B, D, h, w]``.
    """

    classifier_name: str

    def __init__(self, *, num_classes: int, in_chans: int, num_features: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a new head for ``num_classes`` (0 or less: none). Only average pooling is offered."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', not {global_pool!r}")
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        setattr(self, self.classifier_name, head)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _WideBlock(nn.Module):
    """Pre-activation block; where the width changes, the shortcut branches off after the first activation."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class _WideGroup(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, depth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(_WideBlock(planes if i else in_planes, planes, 1 if i else stride) for i in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(_CifarNet):
    """WRN-``depth``-``width``: three groups of (depth - 4) / 6 pre-activation blocks."""

    classifier_name = "fc"

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_chans: int = 3) -> None:
        if (depth - 4) % 6:
            raise ValueError(f"a wide ResNet's depth is 6n + 4, not {depth}")
        planes = (16, 16 * width, 32 * width, 64 * width)
        super().__init__(num_classes=num_classes, in_chans=in_chans, num_features=planes[3])
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, planes[0], 3, 1, 1, bias=False)
        self.block1 = _WideGroup(planes[0], planes[1], 1, blocks)
        self.block2 = _WideGroup(planes[1], planes[2], 2, blocks)
        self.block3 = _WideGroup(planes[2], planes[3], 2, blocks)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        _he_init(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x))


class _BasicBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(_CifarNet):
    """ResNet of basic blocks with a 3x3 stride-1 stem and no max-pool."""

    classifier_name = "linear"

    def __init__(self, depths: tuple[int, ...], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, num_features=512)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_planes = 64
        for stage, depth in enumerate(depths, start=1):
            planes = 32 * 2**stage
            blocks = []
            for i in range(depth):
                blocks.append(_BasicBlock(in_planes, planes, 2 if stage > 1 and i == 0 else 1))
                in_planes = planes
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, num_classes)
        _he_init(self)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


class CifarVGG(_CifarNet):
    """VGG with BatchNorm: five blocks of convolutions, a max-pool between blocks, one linear classifier."""

    classifier_name = "classifier"

    def __init__(self, blocks: tuple[tuple[int, ...], ...], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, num_features=blocks[-1][-1])
        self.num_blocks = len(blocks)
        planes = in_chans
        for index, widths in enumerate(blocks):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(planes, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                planes = width
            self.add_module(f"block{index}", nn.Sequential(*layers))
        self.classifier = nn.Linear(planes, num_classes)
        _he_init(self)

    def forward_features(self, x: Tensor) -> Tensor:
        for index in range(self.num_blocks):
            if index:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = self.get_submodule(f"block{index}")(x)
        return x


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "first_conv": first_conv,
        "classifier": classifier,
    }


_NETWORKS: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "resnet18": (partial(CifarResNet, (2, 2, 2, 2)), "conv1", "linear"),
    "resnet34": (partial(CifarResNet, (3, 4, 6, 3)), "conv1", "linear"),
    "vgg11": (
        partial(CifarVGG, ((64,), (128,), (256, 256), (512, 512), (512, 512))),
        "block0.0",
        "classifier",
    ),
}
for _depth, _width in WIDE_RESNETS:
    _NETWORKS[f"wrn{_depth}_{_width}"] = (partial(WideResNet, _depth, _width), "conv1", "fc")

default_cfgs = generate_default_cfgs(
    {f"{REGISTRY_PREFIX}{name}": _cfg(conv, head) for name, (_, conv, head) in _NETWORKS.items()}
)


def _register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make one network known to timm under its prefixed name."""
    registry_name = f"{REGISTRY_PREFIX}{name}"

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(lambda **model_kwargs: factory(**model_kwargs), registry_name, pretrained, **kwargs)

    entrypoint.__name__ = registry_name
    entrypoint.__doc__ = f"``cifar/{name}``: see :mod:`fastdfkd_cli.nets_cifar`."
    entrypoint.__module__ = __name__
    register_model(entrypoint)


for _name, (_factory, _, _) in _NETWORKS.items():
    _register(_name, _factory)


def cifar_names() -> tuple[str, ...]:
    """The names that may follow ``cifar/`` in a model reference."""
    return tuple(_NETWORKS)


__all__ = ["REGISTRY_PREFIX", "CifarResNet", "CifarVGG", "WideResNet", "cifar_names"]
