"""What the examples share: processes and devices, checkpoints, the training loop with its log."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

Losses = Mapping[str, Tensor]


# ---- command line --------------------------------------------------------------------------------------------------


def training_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command takes that trains."""
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"))
    parser.add_argument("--milestones", type=int, nargs="*", help="epochs after which the rate falls to a tenth")
    parser.add_argument("--clip", type=float, default=10.0, help="largest norm of the gradient; 0: any")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")


def fill(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Sets what was not given; a default may depend on the command."""
    for key, value in vars(args).items():
        if value is None and key in defaults:
            given = defaults[key]
            setattr(args, key, given.get(args.command) if isinstance(given, dict) else given)


def decisive(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide a result, as the checkpoint keeps them."""
    free = {"run", "out", "runs", "resume", "workers", "device", "data", "teacher", "tokens", "remember"}
    return {k: v if not isinstance(v, (Path, list)) else str(v) for k, v in vars(args).items() if k not in free}


# ---- processes and devices -----------------------------------------------------------------------------------------


def start(device: str | None) -> torch.device:
    """This process's device; joins the others where ``torchrun`` (or SLURM through it) has started several."""
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def stop() -> None:
    """Leaves the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, under DistributedDataParallel where there are several processes."""
    if world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def gathered(values: list[Any]) -> list[Any]:
    """The values of all processes, one process after the other."""
    if world_size() == 1:
        return values
    shares: list[Any] = [None] * world_size()
    dist.all_gather_object(shares, values)
    return [value for share in shares for value in share]


class EpochSampler(Sampler[tuple[int, float]]):
    """Indices of this process, each with a number in 0..1 that decides the picture's augmentation.

    What is drawn depends on seed and epoch alone: a resumed run sees what an uninterrupted one does, and N processes
    see together, batch by batch, what one process sees. The last, incomplete batch of an epoch is left out.

    Args:
        length: of the data set.
        batch: pictures per step, of all processes together.
        seed: of the order.
    """

    def __init__(self, length: int, batch: int, seed: int) -> None:
        if batch % world_size():
            raise ValueError(f"--batch: expected a multiple of the {world_size()} processes, got {batch}")
        if length < batch:
            raise ValueError(f"--batch: expected at most the {length} pictures there are, got {batch}")
        self.length, self.batch, self.seed, self.epoch = length, batch, seed, 0

    def __len__(self) -> int:
        return self.length // self.batch * self.batch // world_size()

    def __iter__(self) -> Iterator[tuple[int, float]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        draws = torch.rand(self.length, generator=generator).tolist()
        share = self.batch // world_size()
        for first in range(0, self.length - self.batch + 1, self.batch):
            mine = first + rank() * share
            yield from zip(order[mine : mine + share], draws[mine : mine + share], strict=True)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint whole or not at all: a full disk leaves the previous one as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def load_model(
    build: Callable[[dict[str, Any], str], nn.Module], path: Path, device: torch.device, classes: list[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint as ``build(architecture, backbone)`` makes it, in eval mode, and its settings.

    Raises:
        ValueError: it was trained on other classes, or holds no model but tokens.
    """
    state = load(path, device=device)
    settings = state["settings"]
    if "backbone" not in settings:
        raise ValueError(f"{path}: expected a model's checkpoint, got one of the command {settings['command']!r}")
    found = settings["architecture"]["classes"]
    if classes is not None and list(found) != list(classes):
        raise ValueError(f"{path} knows {len(found)} classes ({', '.join(found[:5])} ...), --data has {len(classes)}")
    model = build(settings["architecture"], settings["backbone"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), settings


def load(path: Path, expected: Mapping[str, Any] | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of ``save``.

    Args:
        path: the file.
        expected: settings that the checkpoint must have been made with.
        device: where its tensors go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of these examples, or one made with other settings, each named with both values.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict) or "settings" not in state or "model" not in state:
        held = ", ".join(list(state)[:6]) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected a checkpoint of these examples (model, settings, ...), found {held}")
    found = state["settings"]
    wrong = [
        f"{key}: expected {value!r}, found {found.get(key)!r}"
        for key, value in (expected or {}).items()
        if found.get(key) != value
    ]
    if wrong:
        raise ValueError(f"{path} was made with other settings: {'; '.join(wrong)}")
    return state


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ---- training ------------------------------------------------------------------------------------------------------


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int, last: float = 0.0) -> Any:
    """A linear warm-up, then a cosine down to ``last`` times the learning rate."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(steps - warmup, 1)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def milestones(optimizer: torch.optim.Optimizer, at: list[int], warmup: int) -> Any:
    """A linear warm-up, then a tenth of the learning rate from each of these steps on."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)) * 0.1 ** sum(step >= m for m in at)
    )


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], steps: int) -> tuple[Any, Any]:
    """Optimizer and schedule, per step, of teachers and students."""
    warmup = min(500, steps // 10)
    optimizer: Any
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-3)
    if args.milestones:
        return optimizer, milestones(optimizer, [m * steps // args.epochs for m in args.milestones], warmup)
    return optimizer, cosine(optimizer, steps, warmup)


def make_token_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], steps: int) -> tuple[Any, Any]:
    """Adam and a cosine, as the authors train tokens in 2,000 iterations."""
    optimizer = torch.optim.Adam(parameters, args.lr, weight_decay=1e-3)
    return optimizer, cosine(optimizer, steps, 0, 1e-6 / args.lr if args.lr else 1.0)


class Trainer:
    """The loop that teacher, tokens and students share: AMP, clipping, a bar with the losses by name, TensorBoard,
    and a checkpoint after every epoch from which ``resume`` goes on bit for bit (on a CPU).

    Args:
        out: folder of ``last.pth`` and of TensorBoard's files.
        settings: everything that decides the result: kept in the checkpoint, compared on resuming.
        model: what is trained; checkpointed as ``model``.
        module: everything that has a state, the model's included where it is a part; its own part of the checkpoint
            (losses, aligns, the MasKD warm-up counter). None: the model alone.
        parameters: what the optimizer gets.
    """

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        *,
        module: nn.Module | None = None,
        device: torch.device,
        amp: str = "off",
        clip: float = 0.0,
    ) -> None:
        self.out, self.settings, self.model, self.module = out, dict(settings), model, module
        self.optimizer, self.schedule, self.device, self.clip = optimizer, schedule, device, clip
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.epoch, self.history = 0, []  # type: int, list[dict[str, float]]
        out.mkdir(parents=True, exist_ok=True)

    def state(self) -> dict[str, Any]:
        """The checkpoint."""
        random = [_random_state()]
        if world_size() > 1:
            random = [{} for _ in range(world_size())]
            dist.all_gather_object(random, _random_state())
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "module": None if self.module is None else _without(self.module, self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "epoch": self.epoch,
            "history": self.history,
        }

    def resume(self) -> None:
        """Goes on from ``last.pth``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with other settings, or by another number of processes.
        """
        path = self.out / "last.pth"
        state = load(path, self.settings, self.device)
        if len(state["random"]) != world_size():
            raise ValueError(f"{path}: expected {world_size()} processes, was made by {len(state['random'])}")
        self.model.load_state_dict(state["model"])
        if self.module is not None:
            self.module.load_state_dict(state["module"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        _set_random_state(state["random"][rank()])
        self.epoch, self.history = state["epoch"], state["history"]

    def run(self, step: Callable[[Any], Losses], loader: Any, epochs: int, text: str) -> None:
        """Trains up to so many epochs.

        Args:
            step: the losses of a batch, by name; their sum is minimised. Names that begin with ``_`` are shown only.
            loader: a DataLoader over an ``EpochSampler``.
            epochs: in all, those before a resumption included.
            text: what the bar is called.
        """
        from tqdm import tqdm

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with _writer(self.out) as write:
            while self.epoch < epochs:
                loader.sampler.epoch = self.epoch
                sums: dict[str, Tensor] = {}
                bar = tqdm(loader, f"{text} {self.epoch + 1}/{epochs}", disable=rank() > 0, leave=False, mininterval=1)
                for i, batch in enumerate(bar):
                    with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                        losses = step(batch)
                    total = torch.stack([v.float() for k, v in losses.items() if not k.startswith("_")]).sum()
                    self.optimizer.zero_grad(set_to_none=True)
                    self.scaler.scale(total).backward()
                    self.scaler.unscale_(self.optimizer)
                    if self.clip:
                        nn.utils.clip_grad_norm_(parameters, self.clip)
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.schedule.step()
                    for name, value in {**losses, "total": total}.items():
                        sums[name] = sums.get(name, 0) + value.detach()
                    if i % 20 == 19:  # reading losses makes the host wait for the device
                        bar.set_postfix({k: f"{float(v) / (i + 1):.4g}" for k, v in sums.items()})
                means = {k.lstrip("_"): float(v) / len(loader) for k, v in sums.items()}
                if not math.isfinite(means["total"]):
                    raise FloatingPointError(f"the loss is not finite in epoch {self.epoch + 1}: {means}")
                self.epoch += 1
                self.history.append(means)
                write(means, self.epoch)
                state = self.state()
                if rank() == 0:
                    save(state, self.out / "last.pth")


def _without(module: nn.Module, part: nn.Module) -> dict[str, Tensor]:
    """The module's state without that of one of its parts."""
    owned = {f"{name}." for name, child in module.named_modules() if child is part}
    return {k: v for k, v in module.state_dict().items() if not any(k.startswith(o) for o in owned)}


@contextlib.contextmanager
def _writer(out: Path) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """Writes to TensorBoard where it is installed; the checkpoint keeps the same figures."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if SummaryWriter is None or rank() > 0:
        yield lambda values, step: None
        return
    with SummaryWriter(str(out)) as writer:
        yield lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()]


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """A PNG of each loss over the epochs."""
    from matplotlib.figure import Figure

    names = list(history[-1]) if history else []
    figure = Figure(figsize=(3.2 * max(len(names), 1), 2.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False)[0], names, strict=False):
        axis.plot(range(1, len(history) + 1), [epoch[name] for epoch in history], marker=".")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
