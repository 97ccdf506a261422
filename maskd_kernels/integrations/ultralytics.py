"""Distilling YOLO detectors in Ultralytics' own trainer, and training receptive tokens on one.

Ultralytics (AGPL-3.0) must be installed; nothing of it is in this file. Its trainer, its checkpoints and its validation
stay as they are: the model under training is given another ``loss``, and a copy or a pickle of it is a plain student.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskd_kernels.distill import Distiller, Layer, Tap, TokenTrainer
from maskd_kernels.functional import masked_mse
from maskd_kernels.losses import AMDLoss, MasKDLoss, MGDLoss
from maskd_kernels.losses.checkpoints import Source
from maskd_kernels.validation import check_count

try:
    from ultralytics import YOLO
    from ultralytics.engine.model import Model
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.modules.head import Detect
    from ultralytics.utils import LOGGER, TQDM
except ImportError as error:
    raise ImportError(
        f"maskd_kernels.integrations.ultralytics needs Ultralytics: pip install 'ultralytics>=8.4' ({error})"
    ) from error

METHODS = ("maskd", "mgd", "amd", "scores")
LOSS_NAME = "dis_loss"  # as Ultralytics calls it, so that whatever reads its logs finds it


@dataclass(frozen=True)
class Settings:
    """What :func:`trainer` was called with."""

    teacher: str | Path | nn.Module
    method: str
    tokens: Source | None
    weight: float | None
    align: str
    options: Mapping[str, Any]


def trainer(
    teacher: str | Path | nn.Module,
    method: str = "maskd",
    *,
    tokens: Source | None = None,
    weight: float | None = None,
    align: str | None = None,
    base: type[Any] = DetectionTrainer,
    **options: Any,
) -> type[Any]:
    """A trainer class for ``YOLO(...).train(..., trainer=...)`` that distils the neck's features into the student.

    Everything else is Ultralytics' own: data, EMA, AMP, ``multi_scale``, several GPUs, validation. The checkpoints hold
    plain students, which load without this package. To go on with a run, give the same trainer again:
    ``YOLO("last.pt").train(resume=True, trainer=trainer(...))``; the distillation's own parameters, and the tokens, are
    in the checkpoint until the run has ended.

    Args:
        teacher: a trained detector: a file or name that ``YOLO`` takes, a ``YOLO``, or its model. It runs in eval
            mode, and only up to the layers that are compared; a given model is copied.
        method: ``"maskd"``, ``"mgd"``, ``"amd"``, or ``"scores"``: the loss of Ultralytics' ``distill_model``, which
            needs the whole teacher.
        tokens: for ``"maskd"``: tokens learned on this teacher, as :func:`train_tokens` writes them.
        weight: factor on the loss, which is multiplied by the batch size too, as Ultralytics' losses are. None: its
            setting ``dis`` (6) for ``"maskd"`` and ``"scores"``, 1 for the others. None of these is tuned.
        align: how student features get the teacher's channels: ``"linear"``, a 1x1 convolution where they differ, or
            ``"mlp"``, Ultralytics' 1x1 convolution, ReLU, 1x1 convolution. None: ``"mlp"`` for ``"scores"``, else
            ``"linear"``.
        base: Ultralytics' trainer of the student's task: ``SegmentationTrainer``, ``PoseTrainer``, ``OBBTrainer``.
        options: of ``MasKDLoss``, ``MGDLoss`` or ``AMDLoss``, such as ``alpha_mgd``.

    Raises:
        ValueError: an unknown method or align, tokens for another method than ``"maskd"``, options for ``"scores"``.

    Example:
        >>> from ultralytics import YOLO
        >>> from maskd_kernels.integrations.ultralytics import trainer
        >>> YOLO("yolo26n.yaml").train(data="coco8.yaml", trainer=trainer("yolo26s.pt", "mgd"))  # doctest: +SKIP
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if align not in (None, "linear", "mlp"):
        raise ValueError(f"align: expected 'linear', 'mlp' or None, got {align!r}")
    if tokens is not None and method != "maskd":
        raise ValueError(f"tokens: expected none for method={method!r}; they belong to 'maskd'")
    if options and method == "scores":
        raise ValueError(f"options: expected none for method='scores', got {', '.join(options)}")
    align = align or ("mlp" if method == "scores" else "linear")
    settings = Settings(teacher, method, tokens, weight, align, options)
    return type(f"Distillation{base.__name__}", (Distillation, base), {"settings": settings})


class Distillation:
    """Mixed into a trainer of Ultralytics by :func:`trainer`: its student is distilled from a teacher."""

    settings: ClassVar[Settings]
    args: Any
    model: Any
    loss_names: Any
    loss_items: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "distill_model", None) is not None:
            raise ValueError("distill_model: expected none with this trainer, which has a teacher of its own")
        if getattr(self.args, "quantize", None) == 8:
            raise ValueError("quantize: expected no quantisation-aware training (8) with this trainer")
        if self.args.task != "detect" and type(self).__bases__[-1] is DetectionTrainer:
            raise ValueError(
                f"base: expected Ultralytics' trainer of the task {self.args.task!r}, got DetectionTrainer"
            )

    def set_model_attributes(self) -> None:
        """Called once the model is on its device, before it is compiled, wrapped or given to an optimizer."""
        super().set_model_attributes()  # type: ignore[misc]
        if self.args.compile:
            LOGGER.warning("compile is turned off: a student that is distilled here runs eagerly.")
            self.args.compile = False
        weight = self.settings.weight
        if weight is None:
            weight = getattr(self.args, "dis", 6.0) if self.settings.method in ("maskd", "scores") else 1.0
        _distil(self.model, _distiller(self.model, self.settings, weight))

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; what the distillation has learned travels in its state, which is in checkpoints to resume."""
        optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[misc]
        model = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        learned = nn.ModuleDict({"aligns": model.distiller.aligns, "losses": model.distiller.losses})

        def save(_optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "distillation": {key: value.cpu() for key, value in learned.state_dict().items()}}

        def load(_optimizer: Any, state: dict[str, Any]) -> None:
            if "distillation" not in state:
                raise ValueError("resume: expected the checkpoint of a distillation, got one of a plain training")
            learned.load_state_dict(state["distillation"])

        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_pre_hook(load)
        return optimizer

    def get_validator(self) -> Any:
        """The validator; releases before loss items had names take the names from here."""
        validator = super().get_validator()  # type: ignore[misc]
        if self.loss_names:
            self.loss_names = (*self.loss_names, LOSS_NAME)
        return validator

    def validate(self) -> Any:
        """Validates the moving average, a plain student: without the distillation's loss."""
        if isinstance(self.loss_items, Tensor):  # releases before loss items had names
            self.loss_items = self.loss_items[:-1]
        return super().validate()  # type: ignore[misc]


# ---- The student under training ----------------------------------------------------------------


class _Student:
    """Mixed into the student's class while it is trained."""

    distiller: Distiller
    training: bool

    def loss(self, batch: dict[str, Any], preds: Any = None) -> tuple[Tensor, Any]:
        """Ultralytics' loss and items, the distillation's behind them."""
        if not self.training or preds is not None:
            return super().loss(batch, preds)  # type: ignore[misc]
        preds, losses = self.distiller(batch["img"])
        loss, items = super().loss(batch, preds)  # type: ignore[misc]
        value = losses[LOSS_NAME]
        shown = value.detach()
        items = {**items, LOSS_NAME: shown} if isinstance(items, Mapping) else torch.cat([items, shown[None]])
        return torch.cat([loss.reshape(-1), (value * len(batch["img"])).reshape(1)]), items

    # The moving average, checkpoints and copies are plain students.

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (_plain(self),)  # of the plain class's module alone, so that it loads anywhere

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return _plain(self).state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return _plain(self).load_state_dict(*args, **kwargs)


def _plain(student: Any) -> Any:
    """The student as it was, with the same parameters and layers."""
    base: Any = type(student).__bases__[-1]
    plain = base.__new__(base)
    plain.__dict__.update(student.__dict__)
    del plain.__dict__["distiller"]
    plain._modules = {name: module for name, module in student._modules.items() if name != "distillation"}
    return plain


def _distil(student: Any, distiller: Distiller) -> None:
    """Gives the student another loss, and the parameters that come with it."""
    learning = [m for m in (*distiller.aligns, *distiller.losses) if any(p.requires_grad for p in m.parameters())]
    object.__setattr__(student, "distiller", distiller)  # which has the student in it
    student.distillation = nn.ModuleList(learning)
    base = type(student)
    student.__class__ = type(f"Distilled{base.__name__}", (_Student, base), {})


# ---- What is compared --------------------------------------------------------------------------


class ScoreWeightedLoss(nn.Module):
    """The loss of Ultralytics' ``distill_model``: the squared error under the teacher's class scores, one per pixel.

    ``sum_levels sum_{n,p} score |S - T|^2 / (C * sum_{n,p} score + 1e-9)``, where ``score`` is the sigmoid of the
    largest class logit; an end-to-end head's two logits are averaged. The sums are over the whole batch.
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            student: levels ``[N, C, H, W]``, then anything.
            teacher: levels of the same shapes, then the scores of all levels' pixels ``[N, 1, sum of H * W]``.
        """
        *features, _ = student
        *targets, scores = teacher
        masks, weights = [], []
        for score, target in zip(scores.float().split([t[0, 0].numel() for t in targets], -1), targets, strict=True):
            # masked_mse squares its masks, divides each image's error by C times its mask's sum, and takes the mean.
            mask = score.sqrt()
            masks.append(mask.unflatten(-1, target.shape[-2:]))
            weights.append(len(target) * mask.sum(-1) / (score.sum() + 1e-9 / target.shape[1]))
        return masked_mse(features, targets, masks, weights=weights)


def _level_or_scores(output: Any) -> Tensor:
    """A neck's level as it is; of a head's output, in whichever mode, the scores of all pixels ``[N, 1, P]``."""
    if isinstance(output, Tensor):
        return output
    raw = output[-1] if isinstance(output, tuple) else output
    branches = [raw["one2many"], raw["one2one"]] if "one2one" in raw else [raw]
    logits = torch.stack([branch["scores"].detach() for branch in branches]).mean(0)
    return logits.amax(1, keepdim=True).sigmoid()


@dataclass(frozen=True)
class _Neck:
    """The layers that a detector's head reads."""

    names: list[str]
    head: str
    channels: list[int]


def _example(model: Any) -> Tensor:
    side = 2 * int(max(model.stride))
    return torch.zeros(1, model.yaml.get("channels", 3), side, side, device=next(model.parameters()).device)


@torch.no_grad()
def _neck(model: Any, role: str) -> _Neck:
    """A detector's neck.

    Raises:
        ValueError: no detector.
    """
    head: Any = next((layer for layer in getattr(model, "model", []) if isinstance(layer, Detect)), None)
    if head is None:
        raise ValueError(f"{role}: expected a detector of Ultralytics, got a {type(model).__name__} without its head")
    levels: list[int] = []
    mode = model.training
    with head.register_forward_pre_hook(lambda _head, inputs: levels.extend(x.shape[1] for x in inputs[0])):
        model.eval()(_example(model))
    model.train(mode)
    return _Neck([f"model.{i}" for i in head.f], f"model.{head.i}", levels)


def _loaded(teacher: Any, device: torch.device) -> Any:
    """A teacher of our own, in eval mode."""
    if isinstance(teacher, (str, Path)):
        model = YOLO(teacher).model
    else:
        model = copy.deepcopy(teacher.model if isinstance(teacher, Model) else teacher)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"teacher: expected a PyTorch model, got {type(model).__name__}: an exported one has no features"
        )
    return model.float().to(device).eval().requires_grad_(False)


def _distiller(student: Any, settings: Settings, weight: float) -> Distiller:
    """The distiller of a student that is on its device.

    Raises:
        ValueError: models that do not fit each other.
    """
    teacher = _loaded(settings.teacher, next(student.parameters()).device)
    source, target = _neck(student, "student"), _neck(teacher, "teacher")
    image, wanted = _example(student), teacher.yaml.get("channels", 3)
    if image.shape[1] != wanted:
        raise ValueError(f"teacher: expected one of {image.shape[1]} image channels like the student's, got {wanted}")
    if len(source.channels) != len(target.channels):
        raise ValueError(
            f"teacher: expected {len(source.channels)} levels like the student's, got {len(target.channels)}"
        )
    loss = _loss(settings, source, target)
    student_side, teacher_side, align = Layer(source.names), Layer(target.names), _aligns(settings, source, target)
    if settings.method == "scores":
        student_side, teacher_side = (Layer([*n.names, n.head], select=_level_or_scores) for n in (source, target))
        align = align if align == "auto" else [*align, nn.Identity()]
    else:
        teacher.fuse(verbose=False)  # batch norms into convolutions; a head that is not read may lose a branch
    tap = Tap(student_side, teacher_side, loss, align=align, name=LOSS_NAME, weight=weight)
    distiller: Any = Distiller(student, teacher, tap, example_inputs=(image,))
    kernel = next(p for p in student.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1)
    last = kernel.is_contiguous(memory_format=torch.channels_last)  # as Ultralytics lays the student on CUDA
    return distiller.to(image.device, memory_format=torch.channels_last if last else torch.contiguous_format)


def _loss(settings: Settings, source: _Neck, target: _Neck) -> nn.Module:
    if settings.method == "maskd":
        return MasKDLoss(target.channels, pretrained=settings.tokens, **settings.options)
    if settings.method == "scores":
        return ScoreWeightedLoss()
    block = MGDLoss if settings.method == "mgd" else AMDLoss
    given = source.channels if settings.align == "linear" else target.channels  # the loss aligns, or is given aligned
    return block(given, target.channels, **settings.options)


def _aligns(settings: Settings, source: _Neck, target: _Neck) -> Any:
    """What a tap is told to align with."""
    if settings.align == "linear":
        return "auto"
    return [
        nn.Sequential(nn.Conv2d(s, t, kernel_size=1), nn.ReLU(inplace=True), nn.Conv2d(t, t, kernel_size=1))
        for s, t in zip(source.channels, target.channels, strict=True)
    ]


# ---- Receptive tokens --------------------------------------------------------------------------


def train_tokens(
    teacher: str | Path | nn.Module,
    data: str | Path,
    save: str | Path | None = None,
    *,
    iterations: int = 2000,
    num_tokens: int = 6,
    weight_mask: bool = True,
    lr: float = 0.01,
    weight_decay: float = 0.001,
    **arguments: Any,
) -> Path:
    """Learns receptive tokens on a trained detector's neck, by its own loss, with Ultralytics' data pipeline.

    One process, in float32; Adam, as the authors of MasKD do.

    Args:
        teacher: a file or name that ``YOLO`` takes, a ``YOLO``, or its model; trained on the classes of ``data``.
        data: a data set's YAML file.
        save: where the tokens are written; None: ``tokens.pth`` in the run's folder.
        iterations: steps.
        num_tokens: receptive tokens per level.
        weight_mask: whether masks are weighted per image; ``trainer(..., weight_mask=...)`` must say the same.
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay.
        arguments: of Ultralytics' ``train``: ``imgsz``, ``batch``, ``device``, ``workers``, augmentation.

    Returns:
        The tokens' file, for ``trainer(..., tokens=...)``.

    Raises:
        ValueError: no detector of boxes alone, or one of other classes than the data's; no iterations.
    """
    check_count(iterations, "iterations")
    defaults = {"model": "yolo26n.yaml", "name": "tokens", "deterministic": False}
    run = DetectionTrainer(overrides={**defaults, **arguments, "data": str(data)})
    model = _loaded(teacher, run.device)
    neck = _neck(model, "teacher")
    if getattr(model, "task", "detect") != "detect":
        raise ValueError(f"teacher: expected a model of the task 'detect', got one of {model.task!r}")
    if model.yaml["nc"] != run.data["nc"]:
        raise ValueError(f"teacher: expected one of {run.data['nc']} classes like the data's, got {model.yaml['nc']}")
    model.args, model.criterion = run.args, None
    run.model, run.stride = model, max(int(max(model.stride)), 32)
    loader = run.get_dataloader(run.data["train"], batch_size=run.batch_size, rank=-1, mode="train")
    path = Path(save) if save is not None else run.save_dir / "tokens.pth"
    with TokenTrainer(
        model, neck.names, neck.channels, num_tokens=num_tokens, weight_mask=weight_mask, teacher_training=True
    ) as tokens:
        tokens.to(run.device)
        optimizer = torch.optim.Adam(tokens.parameters(), lr=lr, weight_decay=weight_decay)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        bar = TQDM(range(iterations))
        for _, batch in zip(bar, batches, strict=False):
            batch = run.preprocess_batch(batch)
            (task, _), dice = tokens(batch)
            task = task.sum() / len(batch["img"])
            optimizer.zero_grad()
            (task + dice).backward()
            optimizer.step()
            bar.set_description(f"task {task.item():.4g}, dice {dice.item():.4g}")
        tokens.save(path)
    return path
