"""The engine behind ``fastdfkd train``: a network from scratch on labelled images, the paper's "Teacher" and "Scratch".

It takes a network and uint8 images that are already loaded, yields :class:`~fastdfkd_cli.records.Record` while it
works, and draws and writes nothing. No held-out image decides anything: what is exported are the last weights, or
their moving average.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli.augment import augment
from fastdfkd_cli.config import learning_rate
from fastdfkd_cli.data import EvaluationData
from fastdfkd_cli.divergence import broken_weight
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.models import InputSpec
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.records import Record
from fastdfkd_cli.runtime import synchronize
from fastdfkd_cli.training_config import TrainingConfig

#: Seconds between two records.
RECORD_EVERY = 1.0
#: How often a run whose figures stopped being finite is put back to the start of its epoch, and what the rate falls to.
RETRIES = 3
SLOWER = 0.25
#: Images that are read, counted and judged at a time.
CHUNK = 256


class Diverged(FastDFKDError):
    """A figure or a weight stopped being finite."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; nothing was exported. Lower lr, or use --no-amp.")
        self.what = what


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy to (1 - s) one-hot(label) + s / C (Szegedy et al., CVPR 2016, section 7), in float32.

    Args:
        logits: ``[B, C]``.
        labels: int64 ``[B]``.
        smoothing: s, in [0, 1).
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


class Reading:
    """All images of a set, decoded once. Iterate over it, then take :attr:`images` and :attr:`labels`.

    Args:
        data: the set, aligned with the network's classes.
        spec: the size they are brought to, as for evaluation.
        num_classes: C.
        workers: processes that read (0: this one).

    Raises:
        UsageError: a label that is no class.
        UnavailableError: no images, or one that cannot be read.
    """

    def __init__(self, data: EvaluationData, spec: InputSpec, num_classes: int, *, workers: int = 0) -> None:
        self.data = data
        self.spec = spec
        self.num_classes = num_classes
        self.workers = workers
        #: uint8 ``[N, C, H, W]`` and int64 ``[N]``, on the CPU.
        self.images = torch.empty(0, *spec.size, dtype=torch.uint8)
        self.labels = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[Record]:
        began = reported = time.perf_counter()
        total, read = self.data.size, 0
        # Of a stream nobody knows the length: it grows by halves.
        images = torch.empty(total or 1024, *self.spec.size, dtype=torch.uint8)
        labels: list[Tensor] = []
        for (views,), batch_labels in self.data.batches([self.spec], batch_size=CHUNK, workers=self.workers):
            low, high = int(batch_labels.min()), int(batch_labels.max())
            if low < 0 or high >= self.num_classes:
                raise UsageError(
                    f"{self.data.name} has the class number {high if high >= self.num_classes else low} and "
                    f"{self.num_classes} classes, 0 to {self.num_classes - 1}: they must agree."
                )
            if read + len(views) > len(images):
                images = torch.cat([images[:read], torch.empty_like(images[: max(len(images) // 2, len(views))])])
            images[read : read + len(views)] = views
            labels.append(batch_labels)
            read += len(views)
            now = time.perf_counter()
            if now - reported >= RECORD_EVERY:
                reported = now
                yield self._record(read, total, now - began)
        if not read:
            raise UnavailableError(f"{self.data.name} holds no images to train on.")
        self.images, self.labels = images[:read], torch.cat(labels)
        yield self._record(read, read, time.perf_counter() - began)

    @staticmethod
    def _record(read: int, total: int | None, elapsed: float) -> Record:
        rate = read / max(elapsed, 1e-9)
        return Record(phase="reading", step=read, total=total, unit="images", progress=0.0, elapsed=elapsed, rate=rate)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images ``[N, C, H, W]``, in [0, 1], to four decimals.

    A channel that never changes gets the deviation 1.
    """
    channels = images.shape[1]
    # Counted, not summed: exact, and the same whatever the size of a chunk.
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for chunk in images.split(CHUNK):
        for channel in range(channels):
            counts[channel] += torch.bincount(chunk[:, channel].reshape(-1).cpu().int(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = ((share @ values.square()) - mean.square()).clamp_min(0).sqrt()
    deviations = (round(float(each), 4) for each in std)
    return tuple(round(float(each), 4) for each in mean), tuple(each or 1.0 for each in deviations)


def _optimizer(net: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW, with weight decay on what has more than one dimension: not on biases and norms."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = device.type == "cuda"
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


class Training:
    """One run. Iterate over it to carry it out::

        run = Training(config, net, images, labels, device=..., amp=...)
        for record in run:
            ...
        run.net, run.steps_taken, run.validation_top1

    Args:
        config: the run's settings.
        net: images in [0, 1] -> logits ``[B, classes]``, on ``device``; trained in place.
        images: uint8 ``[N, C, H, W]``, N at least 2. They are kept on ``device``.
        labels: int64 ``[N]``.
        amp: bf16 autocast in the network.
        say: takes one-line remarks.

    Raises:
        FastDFKDError: a loss or a weight stopped being finite, again and again at lower rates.
    """

    def __init__(
        self,
        config: TrainingConfig,
        net: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        device: torch.device,
        amp: bool,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.net = net
        self.device = device
        self.amp = amp
        self.say = say
        self.images, self.labels = images.to(device), labels.to(device)
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed + 2))
        held_out = round(config.validation * len(images))
        #: Indices of the images that are only looked at, and of those that are trained on.
        self.held_out, self.learned = shuffled[:held_out], shuffled[held_out:].sort().values
        if len(self.learned) < 2:
            raise UsageError(f"{len(self.learned)} image(s) to train on: batch statistics need 2 or more.")
        self.batch_size = min(config.batch_size, len(self.learned))
        self.steps_per_epoch = len(self.learned) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = _optimizer(net, config, device)
        self.average = None
        if config.average == "ema":
            self.average = ModelEmaV3(net, decay=config.average_decay, use_warmup=True)
        self.rng = torch.Generator().manual_seed(config.seed + 1)
        self.order = self.learned.clone()
        self.epoch = self.step = self.steps_taken = 0
        #: Factor on the schedule's rate.
        self.rate = 1.0
        #: The returns to the start of an epoch: why, and which.
        self.retries: list[dict[str, Any]] = []
        self.seconds = 0.0
        #: Per cent of the held-out images, after the last epoch that ended.
        self.validation_top1: float | None = None
        #: Called after each step, where the run can be saved and gone on with.
        self.at_border: Callable[[], None] = lambda: None
        self._sums = torch.zeros(3, device=device)  # of this epoch: loss, hits, images
        self._lr = 0.0
        self._last_record = 0.0

    def __iter__(self) -> Iterator[Record]:
        self._remember()
        while True:
            try:
                yield from self._epochs()
                self.finish()
                break
            except Diverged as error:
                self._slow_down(error)
        yield self._record(self.steps_taken / max(self.seconds, 1e-9))

    def _epochs(self) -> Iterator[Record]:
        while self.epoch < self.config.epochs:
            if not self.step:
                self.order = self.learned[torch.randperm(len(self.learned), generator=self.rng)]
                self._sums.zero_()
            began, steps_then, spent = time.perf_counter(), self.steps_taken, self.seconds
            while self.step < self.steps_per_epoch:
                self.learn()
                self.seconds = spent + time.perf_counter() - began
                self.at_border()
                now = time.perf_counter()
                if now - self._last_record >= RECORD_EVERY:
                    self._last_record = now
                    yield self._record((self.steps_taken - steps_then) / max(now - began, 1e-9))
            synchronize(self.device)
            self.seconds = spent + time.perf_counter() - began
            self.check()
            self.epoch, self.step = self.epoch + 1, 0
            if len(self.held_out):
                self.validation_top1 = self._judge()
                yield self._record((self.steps_taken - steps_then) / max(self.seconds - spent, 1e-9))
            self._remember()

    def learn(self) -> None:
        """Take one step on the epoch's next batch; the device may still be at work on it."""
        config = self.config
        self.net.train()
        chosen = self.order[self.step * self.batch_size : (self.step + 1) * self.batch_size].to(self.device)
        images = to_float(augment(self.images[chosen], self.rng, config.augmentation))
        labels = self.labels[chosen]
        self._lr = self.rate * learning_rate(config, self.steps_taken / self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            logits = self.net(images)
        loss = label_loss(logits, labels, config.label_smoothing)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.net, step=self.steps_taken)
        hits = (logits.detach().argmax(1) == labels).sum()
        self._sums += torch.stack([loss.detach() * len(labels), hits.float(), hits.new_tensor(len(labels)).float()])
        self.step += 1
        self.steps_taken += 1

    @torch.no_grad()
    def _judge(self) -> float:
        """Per cent of the held-out images that are recognised, by the average where one is kept."""
        net = self.average.module if self.average is not None else self.net
        net.eval()
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        for chosen in self.held_out.to(self.device).split(CHUNK):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                logits = net(to_float(self.images[chosen]))
            hits += (logits.argmax(1) == self.labels[chosen]).sum()
        return 100 * int(hits) / len(self.held_out)

    def finish(self) -> None:
        """Put the averaged weights and statistics, where an average is kept, into the network itself."""
        if self.average is not None:
            self.net.load_state_dict(self.average.module.state_dict())
        self.net.eval()
        self.check()

    def check(self) -> None:
        """Look at the epoch's loss so far, and at all weights and statistics.

        Raises:
            Diverged: one of them is not finite.
        """
        if not math.isfinite(float(self._sums[0])):
            raise Diverged(f"The loss stopped being finite by step {self.steps_taken}")
        if (name := broken_weight(self.net)) is not None:
            raise Diverged(f"The network's {name} is not finite at step {self.steps_taken}")

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the rest of the run depends on but the images, at a border.

        The tensors are the run's own: they have to be copied before it goes on.
        """
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        for index, parameter in enumerate(self.net.parameters()):
            held = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{index}.{n}": t for n, t in held.items() if isinstance(t, Tensor)}
        tensors |= {"order": self.order, "sums": self._sums}
        tensors |= {"rng.draws": self.rng.get_state(), "rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "rate": self.rate,
            "retries": self.retries,
            "seconds": self.seconds,
            "validation_top1": self.validation_top1,
        }
        return tensors, values

    def take_up(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            ValueError, LookupError, TypeError, RuntimeError: it is another run's.
        """
        epoch, step, rate = values["epoch"], values["step"], values["rate"]
        if type(epoch) is not int or not 0 <= epoch <= self.config.epochs:
            raise ValueError(f"its epoch is {epoch!r}")
        if type(step) is not int or not 0 <= step <= (self.steps_per_epoch if epoch < self.config.epochs else 0):
            raise ValueError(f"its step is {step!r}")
        if rate not in [SLOWER**times for times in range(RETRIES + 1)]:
            raise ValueError(f"its rate is {rate!r}")
        if not isinstance(values["retries"], list) or len(values["retries"]) > RETRIES:
            raise ValueError("its returns are not a short list")
        if not torch.equal(tensors["order"].sort().values, self.learned):
            raise ValueError("its order is not one of these images")
        top1 = values["validation_top1"]
        self.retries = list(values["retries"])
        self.seconds = float(values["seconds"])
        self.validation_top1 = None if top1 is None else float(top1)
        self._put_back(tensors, values)

    def _put_back(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        if self.average is not None:
            self.average.module.load_state_dict(part("average."))
        parameters = list(self.net.parameters())
        self.optimizer.state.clear()
        for name, tensor in part("optimizer.").items():
            index, _, kind = name.partition(".")
            parameter = parameters[int(index)]
            if kind == "step":  # a number: AdamW keeps it beside the weights only where it is fused
                device = self.device if self.device.type == "cuda" else torch.device("cpu")
                self.optimizer.state[parameter][kind] = tensor.clone().to(device)
                continue
            if tensor.shape != parameter.shape:
                raise ValueError(f"its optimizer.{name} has another shape")
            self.optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(tensor).detach()
        self.order = tensors["order"].clone()
        self._sums.copy_(tensors["sums"])
        self.rng.set_state(tensors["rng.draws"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.epoch, self.step, self.rate = values["epoch"], values["step"], float(values["rate"])
        self.steps_taken = self.epoch * self.steps_per_epoch + self.step

    def _remember(self) -> None:
        """Note where to go back to if the next epoch breaks."""
        tensors, values = self.state()
        self._good = {name: tensor.detach().clone() for name, tensor in tensors.items()}, copy.deepcopy(values)

    def _slow_down(self, error: Diverged) -> None:
        """Go back to the start of the epoch, or to where the run was taken up, and on from there at a lower rate.

        Raises:
            FastDFKDError: that has been done often enough.
        """
        if len(self.retries) >= RETRIES:
            raise FastDFKDError(
                f"{error.what}, after {RETRIES} returns to an earlier epoch with a lower rate each; nothing was "
                "exported. Lower lr, or use --no-amp."
            ) from error
        rate = self.rate * SLOWER
        tensors, values = self._good
        self._put_back(tensors, values)
        self.rate = rate
        self.retries.append({"reason": error.what, "epoch": self.epoch})
        self.say(
            f"{error.what}: back to epoch {self.epoch + 1} with a quarter of lr "
            f"({len(self.retries)} of {RETRIES} times)"
        )
        self._remember()

    def _record(self, rate: float) -> Record:
        loss, hits, seen = self._sums.tolist()
        if not math.isfinite(loss):
            raise Diverged(f"The loss stopped being finite by step {self.steps_taken}")
        values = {"epoch": float(self.epoch + (self.step > 0)), "lr": self._lr}
        if seen:
            values |= {"loss": loss / seen, "top1": 100 * hits / seen}
        if self.validation_top1 is not None:
            values["validation_top1"] = self.validation_top1
        return Record(
            phase="training",
            step=self.steps_taken,
            total=self.total_steps,
            unit="steps",
            progress=self.steps_taken / self.total_steps,
            elapsed=self.seconds,
            remaining=(self.total_steps - self.steps_taken) / rate if rate else None,
            rate=rate,
            values=values,
        )


__all__ = ["Reading", "Training", "channel_statistics", "label_loss"]
