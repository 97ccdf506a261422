"""Distilling in mmengine's Runner, and so with the models of mmdetection 3.x and mmsegmentation 1.x.

``custom_imports = dict(imports=["maskd_kernels.integrations.mmengine"])`` in a config registers in mmengine's root
registry, where every package's registry looks: the losses ``MasKDLoss``, ``MasKDSegLoss``, ``MGDLoss``, ``AMDLoss`` and
``PyramidSmoothL1Loss``, the connector ``AlignConnector``, the model ``FeatureDistillation`` and the hook
``TokenTrainingHook``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler

from maskd_kernels.distill import Distiller, Layer, Tap, TokenTrainer
from maskd_kernels.losses import AMDLoss, MasKDLoss, MasKDSegLoss, MaskModule, MGDLoss
from maskd_kernels.losses.generation import Channels
from maskd_kernels.validation import Levels, as_features, check_channels, check_count, match_count, match_features

try:
    from mmengine.config import Config
    from mmengine.hooks import Hook
    from mmengine.hub import get_config
    from mmengine.logging import print_log
    from mmengine.model import BaseModel, is_model_wrapper, revert_sync_batchnorm
    from mmengine.registry import HOOKS, MODELS, OPTIMIZERS
    from mmengine.runner.checkpoint import CheckpointLoader
except ImportError as error:
    raise ImportError(
        f"maskd_kernels.integrations.mmengine needs mmengine: pip install 'mmengine>=0.10' ({error})"
    ) from error

for _loss in (MasKDLoss, MasKDSegLoss, MGDLoss, AMDLoss):
    MODELS.register_module(module=_loss)

_STUDENT = "distiller.student."  # what checkpoints leave out of the student's names


@MODELS.register_module()
class PyramidSmoothL1Loss(nn.Module):
    """Smooth L1 between the levels of two pyramids, summed over the levels: for regressed boxes.

    Args:
        beta: from which difference on it is linear.
        loss_weight: factor on the loss.
    """

    def __init__(self, beta: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, y_s: Levels, y_t: Levels) -> Tensor:
        """A scalar, of tensors ``[N, C, *spatial]`` or lists of them, of equal shapes."""
        student, teacher = as_features(y_s, "y_s", 1), as_features(y_t, "y_t", 1)
        match_features(student, teacher, "y_s", "y_t")
        levels = [F.smooth_l1_loss(s, t, beta=self.beta) for s, t in zip(student, teacher, strict=True)]
        return self.loss_weight * torch.stack(levels).sum()


@MODELS.register_module()
class AlignConnector(nn.ModuleList):
    """A 1x1 convolution per level, from the student's channels to the teacher's: for connectors, and a tap's ``align``.

    Args:
        student_channels: channels of each level; one number for a single map.
        teacher_channels: likewise.

    Raises:
        ValueError: channels below 1, level counts that do not match.
    """

    def __init__(self, student_channels: Channels, teacher_channels: Channels) -> None:
        student = check_channels(student_channels, "student_channels")
        teacher = check_channels(teacher_channels, "teacher_channels")
        match_count(student, "student_channels", teacher, "teacher_channels")
        super().__init__(nn.Conv2d(s, t, kernel_size=1) for s, t in zip(student, teacher, strict=True))

    def forward(self, feature: Levels) -> Levels:
        """A tensor ``[N, C, H, W]`` or the levels of a pyramid, aligned."""
        if isinstance(feature, Tensor):
            return self[0](feature)
        match_count(list(feature), "feature", list(self), "student_channels")
        return [align(x) for align, x in zip(self, feature, strict=True)]


@MODELS.register_module()
class FeatureDistillation(BaseModel):
    """A student and a teacher of any OpenMMLab package, and the losses between their layers, for mmengine's Runner.

    Training adds ``distill.loss_<name>`` of each tap to the student's losses; validation and testing run the student
    alone. A checkpoint names the student's parameters as the student does, so that it loads into the student's own
    config, and a student's checkpoint loads into this model; aligns and losses with their warm-up counters are under
    ``distiller.``, the teacher is in none. The teacher is called with ``mode="tensor"``, so without need of labels, and
    ends after its last tap.

    Args:
        student: the student's config, or the path of a config file that has it as ``model``
            (``"mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"``), or the model.
        teacher: likewise.
        taps: the losses: a list of what ``Tap`` takes, with ``loss`` and ``align`` as configs:
            ``dict(student="neck", teacher="neck", loss=dict(type="MasKDLoss", channels=[256] * 5), name="maskd")``.
            Without ``align`` nothing is aligned.
        teacher_ckpt: the teacher's checkpoint, a path or whatever mmengine loads, with all of its parameters. None: the
            teacher's own ``init_cfg``.
        inherit: layers of the student that start with the teacher's parameters: ``["neck", "bbox_head"]``.
        data_preprocessor: None: the student's.
        init_cfg: kept for mmengine.

    Raises:
        ValueError: a checkpoint or inherited layers that do not fit; as ``Distiller``.
        TypeError: as ``Distiller`` and ``Tap``.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        taps: Sequence[Mapping[str, Any]],
        teacher_ckpt: str | None = None,
        inherit: Sequence[str] = (),
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ) -> None:
        student, teacher = _built(student), _teacher(teacher, teacher_ckpt)
        super().__init__(data_preprocessor or student.data_preprocessor, init_cfg)
        made = [_tap(tap) for tap in ([taps] if isinstance(taps, Mapping) else taps)]
        call = functools.partial(_as_tensors, inspect.signature(teacher.forward))
        self.distiller = Distiller(student, teacher, made, teacher_inputs=call)
        self.inherit = [inherit] if isinstance(inherit, str) else list(inherit)
        self._teacher_is_loaded = teacher_ckpt is not None
        self._register_state_dict_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_in)

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureDistillation:
        """A copy that shares the teacher, for moving averages."""
        memo[id(self.distiller.teacher)] = self.distiller.teacher
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def init_weights(self) -> None:
        """Initialises the student, and a teacher without ``teacher_ckpt``, as their configs say; then inherits."""
        student, teacher = self.distiller.student, self.distiller.teacher
        if not self._teacher_is_loaded:
            teacher.init_weights()  # type: ignore[operator]
        student.init_weights()  # type: ignore[operator]
        for name in self.inherit:
            try:
                student.get_submodule(name).load_state_dict(teacher.get_submodule(name).state_dict())
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"inherit: {name!r} of the teacher does not fit the student: {error}") from error
        self._is_init = True

    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Losses of the student and of the taps in mode ``loss``; what the student returns in all others."""
        if mode != "loss":
            return self.distiller.student(*args, mode=mode, **kwargs)
        losses, distilled = self.distiller(*args, mode=mode, **kwargs)
        return {**losses, **{f"distill.loss_{name}": value for name, value in distilled.items()}}


@HOOKS.register_module()
class TokenTrainingHook(Hook):
    """Before distillation begins, learns the tokens of those MasKD losses of a ``FeatureDistillation`` that have none.

    On the Runner's own training batches, by the teacher's own losses under the masks and the masks' Dice coefficient,
    with a learning rate that falls to ``min_lr`` as a cosine. Nothing happens where tokens have been loaded, by
    ``pretrained`` or from a checkpoint, so that a resumed run goes on at once.

    Args:
        iterations: steps for each loss, 1 or more; the authors take 2,000 in detection, 10,000 in segmentation.
        optimizer: the optimizer's config: the authors take ``dict(type="Adam", lr=0.01, weight_decay=0.001)`` in
            detection, the default, and ``dict(type="SGD", lr=0.1)`` in segmentation.
        min_lr: the last step's learning rate.
        out: file to write the tokens to, for ``pretrained`` in later runs; with several losses, one each, their names
            before the ending. None: none.
        interval: steps between lines in the log.
    """

    def __init__(
        self,
        iterations: int = 2000,
        optimizer: Mapping[str, Any] | None = None,
        min_lr: float = 1e-6,
        out: str | None = None,
        interval: int = 50,
    ) -> None:
        self.iterations = check_count(iterations, "iterations")
        self.min_lr, self.out, self.interval = min_lr, out, interval
        self.optimizer = dict(optimizer or {"type": "Adam", "lr": 0.01, "weight_decay": 0.001})

    def before_train(self, runner: Any) -> None:
        """Learns what is to be learned."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, FeatureDistillation):
            raise TypeError(
                f"TokenTrainingHook: expected model=dict(type='FeatureDistillation', ...), got a {type(model).__name__}"
            )
        due = [(pair.label, tap) for pair, tap in zip(model.distiller._pairs, model.distiller.taps, strict=True)]
        due = [(label, tap) for label, tap in due if any(not m.learned for m in _mask_modules(tap.loss))]
        for label, tap in due:
            modules, layer = _mask_modules(tap.loss), tap.side(tap.teacher)
            channels: Any = [module.mask_token.shape[1] for module in modules]
            tokens, weighted = modules[0].mask_token.shape[0], modules[0].weight_mask
            teacher = model.distiller.teacher
            with TokenTrainer(teacher, layer, channels, num_tokens=tokens, weight_mask=weighted) as trainer:
                trainer.to(modules[0].mask_token.device)
                self._learn(runner, model, trainer, label)
                for module, learned in zip(modules, trainer.mask_modules, strict=True):
                    module.load_state_dict(learned.state_dict())
                if self.out and runner.rank == 0:
                    root, ending = os.path.splitext(self.out)
                    trainer.save(self.out if len(due) == 1 else f"{root}.{label}{ending}")

    def _learn(self, runner: Any, model: FeatureDistillation, trainer: TokenTrainer, label: str) -> None:
        distributed = nn.parallel.DistributedDataParallel(trainer) if runner.distributed else trainer
        call = functools.partial(distributed, mode="loss")
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": list(trainer.parameters())})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations, self.min_lr)
        for step, batch in enumerate(itertools.islice(_batches(runner), self.iterations), 1):
            data = model.data_preprocessor(batch, True)
            output, dice = call(**data) if isinstance(data, dict) else call(*data)
            loss, values = model.parse_losses({**output, "loss_dice": dice})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % self.interval == 0 or step == self.iterations:
                line = ", ".join(f"{name}: {value.item():.4f}" for name, value in values.items())
                print_log(f"tokens of {label} [{step}/{self.iterations}] {line}", logger="current")


def _batches(runner: Any) -> Iterator[Any]:
    """The Runner's training batches without end, each pass in an order of its own."""
    config = runner._train_dataloader
    if not isinstance(config, Mapping):
        raise TypeError(f"TokenTrainingHook: expected train_dataloader as a config, got a {type(config).__name__}")
    # Not the Runner's own loader: an InfiniteSampler that has been stopped puts out nothing more.
    loader = runner.build_dataloader(config, seed=runner.seed)
    for epoch in itertools.count():
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, Sampler) and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        yield from loader


def _mask_modules(loss: Any) -> list[MaskModule]:
    """A loss's tokens, as far as they are to be learned before it is used."""
    modules = list(loss.modules()) if isinstance(loss, (MasKDLoss, MasKDSegLoss)) else []
    return [m for m in modules if isinstance(m, MaskModule) and not m.mask_token.requires_grad]


def _built(model: Any) -> Any:
    """A model of its config, of the path of a config file, or as it is."""
    if isinstance(model, str):
        config = get_config(model) if "::" in model else Config.fromfile(model)
        model = {"_scope_": config.get("default_scope"), **config.model}
    if isinstance(model, Mapping):
        model = MODELS.build(dict(model))
    if not isinstance(model, BaseModel):
        raise TypeError(f"student, teacher: expected a BaseModel of mmengine or its config, got {type(model).__name__}")
    return model


def _teacher(teacher: Any, checkpoint: str | None) -> Any:
    """The teacher, with the parameters of its checkpoint; one without is not refused, but told."""
    teacher = revert_sync_batchnorm(_built(teacher))  # it never trains, and may run on a CPU
    if checkpoint is None:
        if teacher.init_cfg is None:
            print_log("the teacher has neither teacher_ckpt nor init_cfg: is it trained?", "current", 30)
        return teacher
    try:
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"teacher_ckpt: PyTorch 2.6 and newer refuse to unpickle what mmengine keeps in {checkpoint} beside the "
            "parameters; if you trust the file, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
        ) from error
    state = loaded.get("state_dict", loaded)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        missing = teacher.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f"teacher_ckpt: {checkpoint} does not fit the teacher: {error}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"teacher_ckpt: {checkpoint} lacks {len(missing)} of the teacher's values: {', '.join(missing[:3])}, ..."
        )
    return teacher


def _layer(layer: Any) -> Any:
    return Layer(**layer) if isinstance(layer, Mapping) else layer


def _tap(config: Tap | Mapping[str, Any]) -> Tap:
    """A Tap of a config's dict, or as it is."""
    if isinstance(config, Tap):
        tap = config
    else:
        options = {"align": None, **config}
        for side in ("student", "teacher"):
            if side in options:
                options[side] = _layer(options[side])
        for part in ("loss", "align"):
            if isinstance(options.get(part), Mapping):
                options[part] = MODELS.build(dict(options[part]))
        tap = Tap(**options)
    if tap.builds_align:
        raise ValueError(
            "align: expected None or dict(type='AlignConnector', student_channels=..., teacher_channels=...): the "
            "optimizer is made before any image could show the channels"
        )
    return tap


def _as_tensors(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The teacher's call: the student's, for its bare output."""
    return dict(signature.bind(*args, **{**kwargs, "mode": "tensor"}).arguments)


def _leave_out(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Checkpoints name the student's parameters as the student does."""
    for key in [key for key in state if key.startswith(prefix + _STUDENT)]:
        state[prefix + key[len(prefix + _STUDENT) :]] = state.pop(key)


def _put_in(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + "distiller.")]:
        state[prefix + _STUDENT + key[len(prefix) :]] = state.pop(key)
