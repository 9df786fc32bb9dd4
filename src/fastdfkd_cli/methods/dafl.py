"""DAFL: Chen et al., "Data-Free Learning of Student Networks", ICCV 2019 (arXiv:1904.01186).

A generator makes what the teacher takes for its training images; no student takes part. It descends on

    L_oh = 1/B sum_i CE(f_t(x_i), argmax f_t(x_i))    one-hot: the teacher is sure of some class
    L_a  = -1/B sum_i |features(x_i)|_1               activation: its last layer responds
    L_ie = -H(1/B sum_i softmax f_t(x_i))             information entropy: all classes are as frequent

and the student learns from its images by KL, 5 steps for each step of the generator.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdfkd_cli import losses
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import DAFLConfig
from fastdfkd_cli.methods.base import OneGenerator


class DAFL(OneGenerator[DAFLConfig]):
    """The generator. See :func:`fastdfkd_cli.methods.build_method` for the arguments.

    Raises:
        UsageError: the teacher has no classifier layer whose input could be read for the activation term.
    """

    settings = DAFLConfig

    def __init__(self, config: RunConfig, teacher: nn.Module, **keywords: Any) -> None:
        super().__init__(config, teacher, **keywords)
        self._features = ClassifierInput(teacher, self.num_classes) if self.config.activation_weight else None

    def terms(self, images: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The weighted sum of the three at ``images``; a term of weight 0 is not computed."""
        config = self.config
        if self._features is not None:
            with self.autocast():
                teacher_logits, features = self._features.observe(images)
        else:
            teacher_logits, _ = self.observe(images)
        terms, total = {}, teacher_logits.new_zeros((), dtype=teacher_logits.float().dtype)
        if config.class_weight:
            terms["class"] = losses.classification(teacher_logits, teacher_logits.detach().argmax(1))
            total = total + config.class_weight * terms["class"]
        if self._features is not None:
            terms["activation"] = losses.activation(features)
            total = total + config.activation_weight * terms["activation"]
        if config.balance_weight:
            terms["balance"] = losses.information_entropy(teacher_logits)
            total = total + config.balance_weight * terms["balance"]
        return terms, total, teacher_logits

    def close(self) -> None:
        super().close()
        if self._features is not None:
            self._features.close()


class ClassifierInput:
    """Reads a network's features: the input of its classifier, the last layer in a pass that gives the class scores.

    A classifier is a linear layer or a convolution of kernel 1 with as many outputs as there are classes.

    Args:
        model: images -> logits; hooks stand on it until :meth:`close`.
        num_classes: as many outputs.

    Raises:
        UsageError: there is no such layer.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        self.model = model
        self._latest: list[Tensor] | None = None  # only while a call is observed: KD's own are not of interest
        layers = [layer for layer in model.modules() if _outputs(layer) == num_classes]
        if not layers:
            raise _no_classifier()
        self._handles: list[RemovableHandle] = [layer.register_forward_pre_hook(self._read) for layer in layers]

    def _read(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._latest is not None:
            self._latest.append(inputs[0])

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and features ``[B, D]`` or ``[B, D, h, w]``.

        Raises:
            UsageError: no classifier took part.
        """
        latest: list[Tensor] = []
        self._latest = latest
        try:
            logits = self.model(images)
        finally:
            self._latest = None
        if not latest:
            raise _no_classifier()
        return logits, latest[-1]

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _outputs(layer: nn.Module) -> int | None:
    """The outputs of a layer that may be a classifier."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.out_channels
    return None


def _no_classifier() -> UsageError:
    return UsageError(
        "The teacher has no linear layer (or convolution of kernel 1) that gives its class scores, whose input DAFL's "
        "activation term needs. Switch the term off: --set synthesis.activation_weight=0."
    )


__all__ = ["DAFL", "ClassifierInput"]
