"""Several processes on one machine, for tests: they are forked from one that has torch loaded already.

Run as ``python ranks.py SCENARIO SIZE [SCENARIO SIZE ...]``: each scenario is a function below, run in SIZE processes
that have torchrun's variables in their environment. Prints one JSON object: exit codes, seconds, what each process
returned, and what it wrote to stderr. :data:`ENVIRONMENT` should be set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}
CPU = torch.device("cpu")
SCENARIOS: dict[str, Callable[..., Any]] = {}
#: Seconds after which a scenario's processes are killed.
LIMIT = 60


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


def launch(name: str, size: int) -> dict[str, Any]:
    """Run a scenario in ``size`` forked processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    began = time.monotonic()
    children = []
    for rank in range(size):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )  # fmt: skip
            _run(name, folder / str(rank), children)
        children.append(child)
    codes, seconds = {}, {}
    while len(codes) < size:
        for rank, child in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    seconds[rank] = time.monotonic() - began
                elif time.monotonic() - began > LIMIT:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)

    def read(rank: int, kind: str) -> str:
        path = folder / f"{rank}.{kind}"
        return path.read_text() if path.exists() else ""

    return {
        "codes": [codes[rank] for rank in range(size)],
        "seconds": [seconds[rank] for rank in range(size)],
        "results": [json.loads(read(rank, "json") or "null") for rank in range(size)],
        "stderr": [read(rank, "err") for rank in range(size)],
    }


def _run(name: str, path: Path, others: list[int]) -> None:
    """A child's whole life."""
    code = 1
    errors = os.open(path.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    try:
        from fastdfkd_cli.errors import FastDFKDError
        from fastdfkd_cli.processes import from_environment

        try:
            result = SCENARIOS[name](from_environment(), others)
            path.with_suffix(".json").write_text(json.dumps(result))
            code = 0
        except FastDFKDError as error:
            os.write(2, f"error: {error}\n".encode())
            code = error.exit_code
        except KeyboardInterrupt:
            os.write(2, b"interrupted\n")
            code = 130
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


def say(text: str) -> None:
    os.write(2, f"said: {text}\n".encode())


# -- what is equal to one process -------------------------------------------------------------------------------


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def worst(found: Any, expected: Any) -> float:
    """Largest difference of two (lists of) tensors, in the size of the expected values."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    differences = [0.0]
    for a, b in pairs:
        assert a.shape == b.shape, (a.shape, b.shape)
        a, b = a.detach().double(), b.detach().double()
        differences.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)))
    return max(differences)


def part(group: Any, whole: Tensor, dim: int = 0) -> Tensor:
    """This process's rows of what one process has whole."""
    return whole.chunk(group.world_size, dim)[group.rank].clone(memory_format=torch.preserve_format)


def norms() -> dict[str, tuple[nn.Module, tuple[int, ...], torch.dtype, torch.memory_format]]:
    """Layers, the shape of a global batch of 8, its precision and its layout."""
    from timm.layers import BatchNormAct2d

    plain, last = torch.contiguous_format, torch.channels_last
    double, single = torch.float64, torch.float32
    return {
        "vectors": (nn.BatchNorm1d(5), (8, 5), double, plain),
        "signals": (nn.BatchNorm1d(5), (8, 5, 7), double, plain),
        "images": (nn.BatchNorm2d(5), (8, 5, 4, 3), double, plain),
        "channels last": (nn.BatchNorm2d(5), (8, 5, 4, 4), double, last),
        "volumes": (nn.BatchNorm3d(3), (8, 3, 2, 3, 2), double, plain),
        "timm": (BatchNormAct2d(5), (8, 5, 4, 4), double, last),
        "no weights": (nn.BatchNorm2d(5, affine=False), (8, 5, 4, 4), double, plain),
        "no memory": (nn.BatchNorm2d(5, track_running_stats=False), (8, 5, 4, 4), double, plain),
        "cumulative": (nn.BatchNorm2d(5, momentum=None), (8, 5, 4, 4), double, plain),
        "one pixel": (nn.BatchNorm2d(5), (8, 5, 1, 1), double, last),
        "float32": (nn.BatchNorm2d(5), (8, 5, 4, 4), single, last),
        "bf16": (nn.BatchNorm2d(5), (8, 5, 4, 4), torch.bfloat16, last),
    }


def check_norms(group: Any) -> dict[str, float]:
    """Outputs, gradients and running statistics of two steps, against one process with the whole batch."""
    import copy

    from fastdfkd_cli import distributed, synced_norm

    found = {}
    for name, (layer, shape, dtype, layout) in norms().items():
        layer = layer.to(torch.float64 if dtype == torch.float64 else torch.float32).train()
        for index, parameter in enumerate(layer.parameters()):
            nn.init.normal_(parameter, 1.0, 0.5, generator=torch.Generator().manual_seed(index))
        alone = copy.deepcopy(layer)
        names, before = [*layer.state_dict()], type(layer)
        differences = []
        with synced_norm.synced_batch_norm(layer, group):
            assert isinstance(layer, before)
            assert [*layer.state_dict()] == names
            for step in range(2):
                # Processes whose means lie far apart, far from 0: what a sum of squares would lose digits on.
                x = random(*shape, seed=step) + 20 + 5 * torch.arange(8.0).view(-1, *[1] * (len(shape) - 1))
                weights = random(*shape, seed=10 + step).to(dtype)
                x = x.to(dtype)
                if len(shape) == 4:
                    x = x.contiguous(memory_format=layout)
                mine, whole = part(group, x).requires_grad_(), x.clone().requires_grad_()
                output, expected = layer(mine), alone(whole)
                (output * part(group, weights)).sum().backward()
                (expected * weights).sum().backward()
                differences += [worst(output, part(group, expected)), worst(mine.grad, part(group, whole.grad))]
            gradients = [p.grad for p in layer.parameters()]
            distributed.sum_(group, gradients)
            differences += [worst(a, b.grad) for a, b in zip(gradients, alone.parameters(), strict=True)]
            if layer.running_mean is not None:
                differences += [
                    worst(layer.running_mean, alone.running_mean),
                    worst(layer.running_var, alone.running_var),
                ]
                assert int(layer.num_batches_tracked) == 2
            layer.eval(), alone.eval()
            differences.append(worst(layer(x), alone(x)))
        assert type(layer) is before
        assert "_group" not in vars(layer)
        found[name] = max(differences)
    return found


def check_reductions(group: Any) -> dict[str, Any]:
    from fastdfkd_cli import distributed

    size, rank = group.world_size, group.rank
    ones = [torch.full((2, 3), float(rank + 1)), torch.full((), float(rank), dtype=torch.float64)]
    image = torch.full((1, 2, 3, 3), float(rank)).contiguous(memory_format=torch.channels_last)
    distributed.sum_(group, [*ones, image])
    means = [torch.tensor([float(rank), 1.0])]
    distributed.mean_(group, means)
    sent = [torch.full((2,), float(rank)), torch.tensor(rank + 7), torch.tensor([True, rank == 0])]
    distributed.broadcast_(group, sent)
    x = random(size * 6, 4, seed=3) + 100
    mine = part(group, x)
    mean, var = distributed.merged_moments(group, mine.mean(0), mine.var(0, correction=0))
    agreement = distributed.Agreement(group, every=0.0)
    stops = [agreement(15 if rank == size - 1 and step == 3 else 2 * (rank == 0 and step == 3))[0] for step in range(5)]
    often = distributed.Agreement(group, every=0.02)
    asked, answers, clocks = False, [], []
    for step in range(40):
        asked = asked or (rank == 0 and step >= 11)  # a request stays
        time.sleep(0.001 * (1 + rank))
        request, seconds = often(2 * asked)
        answers.append(request)
        clocks.append(seconds)
    try:
        distributed.require_same(group, "recipe", f"{rank == 1}")
        refused = ""
    except distributed.UsageError as error:
        refused = str(error)
    distributed.require_same(group, "recipe", "equal")
    order = Path(tempfile.gettempdir()) / f"order.{os.environ['MASTER_PORT']}"
    with distributed.first_of_machine(group):
        if rank == 0:
            time.sleep(0.05)
            order.write_text("loaded")
        seen = order.exists()
    distributed.wait_for_all(group)
    order.unlink(missing_ok=True)
    return {
        "sum": [t.flatten().tolist() for t in ones],
        "kept": [str(t.dtype) for t in ones] + [image.is_contiguous(memory_format=torch.channels_last)],
        "image": float(image[0, 0, 0, 0]),
        "mean": means[0].tolist(),
        "sent": [t.tolist() for t in sent],
        "moments": max(worst(mean, x.mean(0)), worst(var, x.var(0, correction=0))),
        "stops": stops,
        "answers": answers,
        "clocks": clocks,
        "refused": refused,
        "seen": seen,
        "share": group.share(10),
    }


def check_moments(group: Any) -> float:
    """The feature term's gradient in each process's images, against one process with all of them."""
    from fastdfkd_cli.bn_stats import BatchNormStatistics, moments_of_all
    from tiny import teacher

    model = teacher().double()
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, whole = part(group, x).requires_grad_(), x.clone().requires_grad_()
    with BatchNormStatistics(model, 0.9) as statistics:
        for _ in range(2):  # the second time with accumulated statistics
            logits, moments = statistics.observe(mine)
            moments = moments_of_all(group, moments)
            loss = statistics.loss(moments) + logits.square().mean()
            (gradient,) = torch.autograd.grad(loss / group.world_size, mine)
            statistics.accumulate(moments)
    with BatchNormStatistics(model, 0.9) as statistics:
        for _ in range(2):
            logits, moments = statistics.observe(whole)
            (expected,) = torch.autograd.grad(statistics.loss(moments) + logits.square().mean(), whole)
            statistics.accumulate(moments)
    return worst(gradient, part(group, expected))


SETTINGS: dict[str, dict[str, Any]] = {
    "fomaml": {},
    "reptile": {"synthesis__meta_gradient": "reptile", "synthesis__latent": "meta", "synthesis__keep": "last"},
    "sequential": {"synthesis__reuse": "sequential"},
    "none": {"synthesis__reuse": "none", "synthesis__feature_momentum": 0.0},
    "pixels": {"synthesis__images": "pixel", "synthesis__reuse": "sequential"},
    "micro-batches": {"micro_batch": 1},
    "renewed": {"synthesis__latent": "meta", "synthesis__latent_reset_every": 2, "renew": True},
}


def _hand_over(mine: Any, alone: Any, gathered: Callable[..., Tensor]) -> None:
    """Have ``alone`` draw what all processes have drawn."""
    draw, new_latent = mine._draw, mine._new_latent
    drawn: list[Tensor] = []

    def note_latent() -> Tensor:
        latent = new_latent()
        drawn.append(gathered(latent))
        return latent

    def note_draw() -> None:
        draw()
        alone.labels.copy_(gathered(mine.labels))
        for target, each in zip(alone.draws, mine.draws, strict=True):
            target.copy_(gathered(each, 1))

    def repeat_draw() -> None:
        if alone.shared_latent is None:
            with torch.no_grad():
                alone.z.copy_(drawn.pop(0))

    mine._new_latent, mine._draw = note_latent, note_draw
    alone._new_latent, alone._draw = lambda: drawn.pop(0), repeat_draw
    if alone.shared_latent is not None:
        alone.shared_latent.copy_(gathered(mine.shared_latent))


def check_synthesis(group: Any) -> dict[str, Any]:
    """Three batches of several processes, against one process that is handed the draws of all."""
    import torch.distributed as dist

    from fastdfkd_cli import distributed
    from fastdfkd_cli.acceleration import Acceleration
    from fastdfkd_cli.methods.fast_meta import FastMeta
    from fastdfkd_cli.processes import ALONE
    from tiny import CLASSES, SIZE, config, net, teacher

    def gathered(tensor: Tensor, dim: int = 0) -> Tensor:
        found = [torch.empty_like(tensor) for _ in range(group.world_size)]
        dist.all_gather(found, tensor.contiguous())
        return torch.cat(found, dim)

    results = {}
    for name, given in SETTINGS.items():
        if group.world_size > 2 and name not in ("fomaml", "reptile"):
            continue
        changes = {"synthesis__steps": 3, "synthesis__augmentation": "crop-flip", **given}
        acceleration = Acceleration(micro_batch=changes.pop("micro_batch", 0))
        renews = changes.pop("renew", False)
        keywords = {"image_size": SIZE, "num_classes": CLASSES, "device": CPU, "amp": False, "seed": 5}
        each = 8 // group.world_size
        mine = FastMeta(
            config(synthesis__batch_size=each, **changes), teacher(), group=group, acceleration=acceleration, **keywords
        )
        alone = FastMeta(config(synthesis__batch_size=8, **changes), teacher(), group=ALONE, **keywords)
        _hand_over(mine, alone, gathered)
        student = net(seed=7)
        pixels, losses, gradients, made_here = 0, [], [], []
        for batch in range(3):
            if renews and batch == 1:
                mine.renew()
                # One process draws from one state for everything; here only the weights are compared.
                alone.shared.load_state_dict(mine.shared.state_dict())
            if alone.batches and mine.config.reuse == "none":
                alone.common_rng.set_state(mine.common_rng.get_state())
            made = mine.synthesize(student if batch else None)
            expected = alone.synthesize(student if batch else None)
            difference = made.images.int() - part(group, expected.images).int()
            pixels = max(pixels, int(difference.abs().max()))
            assert torch.equal(made.labels, part(group, expected.labels))
            made_here.append(made.images)
            # Adam hides a factor on them.
            gradients.append(worst(mine.z.grad, part(group, alone.z.grad)))
            losses.append(worst([*made.losses.values()], [expected.losses[key] for key in made.losses]))
        # The bias in front of a BatchNorm has no gradient but rounding, of which Adam makes full steps.
        weights = {k: v.detach() for k, v in mine.shared.named_parameters() if k != "stem.bias"}
        theirs = dict(alone.shared.named_parameters())
        moved = max((float((theirs[k].detach() - v).abs().max()) for k, v in weights.items()), default=0.0)
        same = distributed.fingerprint(mine.shared.parameters())
        accumulated = worst([*mine.statistics.state_dict().values()], [*alone.statistics.state_dict().values()])
        latent = 0.0
        if mine.shared_latent is not None:
            latent = worst(mine.shared_latent, part(group, alone.shared_latent))
        mine.close(), alone.close()
        results[name] = {
            "pixels": pixels,
            "losses": max(losses),
            "gradients": max(gradients),
            "weights": moved,
            "statistics": accumulated,
            "latent": latent,
            "same": same,
            "images": distributed.fingerprint(made_here),
        }
    return results


def check_training(group: Any) -> dict[str, Any]:
    """KD steps with synchronised BatchNorm and averaged gradients, against one process with the whole batch."""
    from fastdfkd_cli import distributed, losses, synced_norm
    from tiny import net, teacher

    judge = teacher(seed=3).double()
    mine, alone = net(seed=1).double().train(), net(seed=1).double().train()

    def step(student: nn.Module, optimizer: Any, images: Tensor, *, several: bool) -> None:
        optimizer.zero_grad()
        losses.distillation(judge(images), student(images), 4.0).backward()
        if several:
            distributed.mean_(group, [p.grad for p in student.parameters()])
        optimizer.step()

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for m in (mine, alone)]
    with synced_norm.synced_batch_norm(mine, group):
        for index in range(5):
            images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            step(mine, optimizers[0], part(group, images), several=True)
            step(alone, optimizers[1], images, several=False)
    state, expected = mine.state_dict(), alone.state_dict()
    # losses are float32 inside, so that a mean of means is another rounding
    return {
        "difference": worst([*state.values()], [*expected.values()]),
        "same": distributed.fingerprint(state.values()),
    }


def _as_one(mine: Any, alone: Any, gathered: Callable[..., Tensor]) -> None:
    """Have ``alone``, a run of one process, draw what all processes have drawn in theirs, which comes first."""
    batches: list[dict[str, Any]] = []
    steps: list[tuple[Tensor, Tensor | None]] = []
    method, single = mine.synthesizer, alone.synthesizer
    draw, new_latent, sample = method._draw, method._new_latent, mine.pool.sample
    latents: list[Tensor] = []

    def note_latent() -> Tensor:
        latents.append(new_latent())
        return latents[-1]

    def note_draw() -> None:
        latents.clear()
        draw()
        drawn = {"labels": gathered(method.labels), "draws": [gathered(each, 1) for each in method.draws]}
        batches.append(drawn | {"z": gathered(latents[0])})

    def repeat_draw() -> None:
        drawn = batches.pop(0)
        single.labels.copy_(drawn["labels"])
        for target, each in zip(single.draws, drawn["draws"], strict=True):
            target.copy_(each)
        with torch.no_grad():
            single.z.copy_(drawn["z"])

    def note_sample(*given: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        images, logits = sample(*given, **more)
        steps.append((gathered(images), None if logits is None else gathered(logits)))
        return images, logits

    method._new_latent, method._draw, mine.pool.sample = note_latent, note_draw, note_sample
    single._draw, alone.pool.sample = repeat_draw, lambda *_, **__: steps.pop(0)


def check_run(group: Any) -> dict[str, Any]:
    """Whole runs, against one process that is handed the draws of all."""
    import torch.distributed as dist

    from fastdfkd_cli import distributed
    from fastdfkd_cli.distillation import Distillation
    from fastdfkd_cli.job import divided
    from fastdfkd_cli.methods import build_method
    from fastdfkd_cli.processes import ALONE
    from fastdfkd_cli.synced_norm import synced_batch_norm
    from tiny import CLASSES, SIZE, config, net, teacher

    def gathered(tensor: Tensor, dim: int = 0) -> Tensor:
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.world_size)]
        dist.all_gather(found, tensor.contiguous())
        return torch.cat(found, dim)

    def run(settings: Any, student: nn.Module, of: Any) -> Distillation:
        shape: dict[str, Any] = {"image_size": SIZE, "device": CPU, "amp": False, "group": of}
        method = build_method(settings, teacher(), num_classes=CLASSES, **shape)
        return Distillation(settings, teacher(), student, synthesizer=method, **shape)

    count, results = group.world_size, {}
    for name, changes in {
        "plain": {},
        "labelled": {"distillation__augmentation": "none", "distillation__average": "ema"},
    }.items():
        each = 8 // count
        whole = config(
            synthesis__batch_size=each, distillation__batch_size=each, schedule__rounds=4 * count,
            schedule__warmup_rounds=count, **changes,
        )  # fmt: skip
        batch = config(synthesis__batch_size=8, distillation__batch_size=8, **changes)
        student, expected = net(1), net(1)
        with synced_batch_norm(student, group):
            mine, alone = run(divided(whole, count), student, group), run(batch, expected, ALONE)
            _as_one(mine, alone, gathered)
            records = list(mine)
            list(alone)
        made = alone.pool.images.unflatten(0, (-1, count, each))[:, group.rank].flatten(0, 1)
        results[name] = {
            "difference": worst([*student.state_dict().values()], [*expected.state_dict().values()]),
            "moved": worst([*net(1).state_dict().values()], [*expected.state_dict().values()]),
            "pixels": int((mine.pool.images.int() - made.int()).abs().max()),
            "same": distributed.fingerprint(student.state_dict().values()),
            "images": [len(mine.pool), mine.images_made, whole.synthetic_images],
            "steps": [mine.steps_taken, alone.steps_taken],
            "last": [records[-1].progress, records[-1].values["loss"], float(alone._step_figures["loss"])],
        }
        mine.synthesizer.close(), alone.synthesizer.close()
    return results


def check_together(group: Any) -> dict[str, Any]:
    """What clocks and figures decide is decided alike: a time budget, and a return after a loss that is none."""
    from fastdfkd_cli import distributed
    from fastdfkd_cli.distillation import Distillation
    from fastdfkd_cli.methods import build_method
    from fastdfkd_cli.synced_norm import synced_batch_norm
    from tiny import CLASSES, SIZE, config, net, teacher

    results = {}
    for name, changes in {"timed": {"schedule__time_budget": 1.0}, "broken": {}}.items():
        settings, student = config(**changes), net(1, dropout=0.2)
        shape: dict[str, Any] = {"image_size": SIZE, "device": CPU, "amp": False, "group": group}
        torch.manual_seed(group.seed(0))
        with synced_batch_norm(student, group):
            method = build_method(settings, teacher(), num_classes=CLASSES, **shape)
            run = Distillation(settings, teacher(), student, synthesizer=method, **shape)
            sample, seen = run.pool.sample, []

            def poisoned(*given: Any, sample: Any = sample, seen: list[int] = seen, **more: Any) -> Any:
                images, logits = sample(*given, **more)
                seen.append(1)
                if len(seen) == 5 and group.rank == group.world_size - 1:
                    images = images.float() * float("nan")
                return images, logits

            if name == "broken":
                run.pool.sample = poisoned  # type: ignore[method-assign]
            time.sleep(0.1 * group.rank)  # clocks of their own
            list(run)
        results[name] = {
            "same": distributed.fingerprint([*student.state_dict().values()]),
            "steps": run.steps_taken,
            "rounds": [run.clock.rounds, run.clock.batches_per_round, run.clock.kd_steps_per_round],
            "retries": len(run.retries),
            "elapsed": run.clock.elapsed,
        }
        method.close()
    return results


@scenario
def equal(group: Any, _: list[int]) -> dict[str, Any]:
    from fastdfkd_cli.distributed import joined

    results: dict[str, Any] = {}
    for name in ("norms", "moments", "synthesis", "training", "run", "together", "reductions"):
        with joined(group, CPU, say=say):  # again and again: one process may carry out several runs
            results[name] = globals()[f"check_{name}"](group)
    return results


# -- stopped and gone on with ------------------------------------------------------------------------------------

#: Of all scenarios of one call.
FOLDER = Path(tempfile.gettempdir())
RUNS: dict[str, dict[str, Any]] = {
    "made": {"distillation__augmentation": "none", "distillation__average": "ema", "schedule__rounds": 8},
    "latent": {"synthesis__latent": "meta", "schedule__rounds": 8, "pool_size": 24},
    "given": {"distillation__augmentation": "crop-flip", "distillation__label_views": 2, "schedule__rounds": 8},
}


def _given_images() -> Path:
    """Three classes of images, made by rank 0 of whoever comes first."""
    from PIL import Image

    folder = FOLDER / "images"
    if not folder.exists():
        staged = FOLDER / f"images-{os.getpid()}"
        for index in range(24):
            path = staged / f"c{index % 4}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random(8, 8, 3, seed=index).clamp(0, 1).mul(255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
        try:
            staged.rename(folder)
        except OSError:  # another process was first
            import shutil

            shutil.rmtree(staged)
    return folder


def _distil(group: Any, name: str, output: Path, seed: int, **more: Any) -> Any:
    from fastdfkd_cli import api
    from fastdfkd_cli.models import ModelOptions
    from tiny import CLASSES, SIZE, config, net, teacher

    changes = {"schedule__kd_steps_per_round": 6, **RUNS[name]}
    given = {"data_dir": _given_images()} if name == "given" else {}
    return api.distill(
        teacher(), net(seed, dropout=0.2), teacher_options=ModelOptions(input_size=SIZE, num_classes=CLASSES),
        config=config(**changes), output=output, device="cpu", amp=False, group=group, fail=say, **given, **more,
    )  # fmt: skip


def _stopping_at(step: int, victim: bool) -> Any:
    """Have a signal come to one process before its KD step of that number."""
    from unittest import mock

    from fastdfkd_cli import stopping
    from fastdfkd_cli.distillation import Distillation

    take = Distillation.kd_step

    def kd_step(self: Distillation) -> None:
        if self.steps_taken == step and victim:
            stopping.ask(signal.SIGTERM)
        take(self)

    return mock.patch.object(Distillation, "kd_step", kd_step)


@scenario
def left(group: Any, _: list[int]) -> dict[str, Any]:
    """Runs that are stopped, go on, and end as if they had not been; and copies of what they left."""
    import shutil
    from unittest import mock

    from fastdfkd_cli import distributed
    from fastdfkd_cli.resume import checkpoint_folder

    results = {}
    for name in RUNS:
        here = FOLDER / f"{name} {group.world_size}"
        whole = _distil(group, name, here / "whole", 1)
        ended, notes = "", []
        said: list[str] = []
        try:
            # Often enough that one stands before the last.
            with _stopping_at(5, group.rank == group.world_size - 1), mock.patch("fastdfkd_cli.resume.SHARE", 1e9):
                _distil(group, name, here / "parts", 1, checkpoint_every=0.01)
        except KeyboardInterrupt as stop:
            ended, notes = type(stop).__name__, stop.__notes__
        except SystemExit as stop:
            ended = f"SystemExit: {stop.code}"
        folder = checkpoint_folder(here / "parts")
        if group.leads:
            for other in (1, 2, 3):
                shutil.copytree(folder, checkpoint_folder(here / f"to {other}"))
        parts = _distil(group, name, here / "parts", 2, resume="auto", on_message=said.append)
        results[name] = {
            "students": [distributed.fingerprint(each.student.state_dict().values()) for each in (whole, parts)],
            "ended": ended,
            "notes": notes,
            "folder": str(folder),
            "at": next(line.removeprefix("going on after ") for line in said if "going on" in line),
            "left_behind": group.leads and folder.exists(),
        }
    return results


@scenario
def taken(group: Any, _: list[int]) -> dict[str, Any]:
    """Another number of processes goes on."""
    from unittest import mock

    from fastdfkd_cli import distributed
    from fastdfkd_cli.distillation import Distillation

    results = {}
    for name in RUNS:
        for source in (1, 2):
            if source == group.world_size:
                continue
            here = FOLDER / f"{name} {source}"
            runs: list[Any] = []
            found: list[int] = []
            take_up = Distillation.take_up

            def noted(self: Any, *given: Any) -> None:
                take_up(self, *given)  # noqa: B023
                runs.append(self)  # noqa: B023
                total = torch.tensor(len(self.pool))
                distributed.sum_(group, [total])
                found.extend([int(total), self.images_made])  # noqa: B023

            with mock.patch.object(Distillation, "take_up", noted):
                result = _distil(group, name, here / f"to {group.world_size}", 2, resume="auto")
            results[f"{name} {source}"] = {
                "student": distributed.fingerprint(result.student.state_dict().values()),
                "report": result.report,
                "pool": len(runs[0].pool),
                "found": found,
            }
    return results


# -- how a run ends ---------------------------------------------------------------------------------------------


def work(group: Any) -> None:
    """Messages until something goes wrong: gradients, and one in a backward pass."""
    from fastdfkd_cli import distributed, synced_norm

    layer = nn.BatchNorm2d(3)
    with synced_norm.synced_batch_norm(layer, group):
        while True:
            layer(torch.rand(2, 3, 4, 4, requires_grad=True)).square().sum().backward()
            distributed.mean_(group, [p.grad for p in layer.parameters()])


def ending(group: Any, at: Callable[[], None], victim: int, **keywords: Any) -> None:
    from fastdfkd_cli import distributed
    from fastdfkd_cli.distributed import joined

    with joined(group, CPU, say=say, beat=0.1, **keywords):
        distributed.wait_for_all(group)
        if group.rank == victim:
            import threading

            threading.Timer(0.3, at).start()
        work(group)


@scenario
def killed(group: Any, _: list[int]) -> None:
    ending(group, lambda: os.kill(os.getpid(), signal.SIGKILL), victim=1)


@scenario
def leader_killed(group: Any, _: list[int]) -> None:
    ending(group, lambda: os.kill(os.getpid(), signal.SIGKILL), victim=0)


@scenario
def hanging(group: Any, _: list[int]) -> None:
    """A process that is stopped, not ended: no connection breaks off."""
    if group.rank == 1 and os.fork() == 0:
        # Somebody has to kill it in the end.
        time.sleep(8)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    ending(group, lambda: os.kill(os.getpid(), signal.SIGSTOP), victim=1, patience=8, grace=0.5)


@scenario
def failing(group: Any, _: list[int]) -> None:
    from fastdfkd_cli.distributed import joined
    from fastdfkd_cli.errors import UnavailableError

    with joined(group, CPU, say=say, beat=0.1):
        if group.rank == 1:
            time.sleep(0.2)
            raise UnavailableError("the file is gone")
        work(group)


@scenario
def all_failing(group: Any, _: list[int]) -> None:
    from fastdfkd_cli.distributed import joined
    from fastdfkd_cli.errors import UsageError

    with joined(group, CPU, say=say, beat=0.1):
        time.sleep(0.05 * group.rank)
        raise UsageError("that cannot be done")


@scenario
def interrupted(group: Any, _: list[int]) -> None:
    """All are told to stop at one step, and say so once."""
    from fastdfkd_cli.distributed import Agreement, joined

    with joined(group, CPU, say=say, beat=0.1):
        agreement = Agreement(group, every=0.01)
        for step in range(1000):
            time.sleep(0.001)
            request, _ = agreement(signal.SIGINT if group.rank == 1 and step > 20 else 0)
            if request:
                raise KeyboardInterrupt


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    import fastdfkd_cli.methods.fast_meta  # noqa: F401 (for all children at once)

    FOLDER = Path(tempfile.mkdtemp())
    todo = zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True)
    json.dump({f"{name} {size}": launch(name, size) for name, size in todo}, sys.stdout)
