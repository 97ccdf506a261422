"""Distilling with the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskd_kernels.distill import Distiller, Tap

try:
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.utils.generic import can_return_loss, find_labels
except ImportError as error:
    raise ImportError(
        "maskd_kernels.integrations.transformers needs transformers 5 or newer and accelerate: "
        "pip install 'transformers[torch]>=5'"
    ) from error

DISTILLATION_FILE = "distillation.pt"  # of a checkpoint: what is neither the student's nor the Trainer's


class DistilledOutput(NamedTuple):
    """What a training step's forward returns."""

    student: Any
    losses: dict[str, Tensor]


class DistilledModel(nn.Module):
    """The student as the Trainer sees it: in training it returns a ``DistilledOutput``, with the distillation losses.

    In eval mode it is the student, and the teacher does not run. Whatever a Trainer asks of a model (``config``,
    ``save_pretrained``, activation checkpointing) the student answers.

    Args:
        distiller: of both models.
        model_kwargs: keywords of both models' calls in training, beside the batch.
    """

    # The losses are means over a batch, whatever the student would do with the number of items: the Trainer is to
    # divide by its gradient accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, distiller: Distiller, model_kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.distiller = distiller
        self.model_kwargs = dict(model_kwargs)

    @property
    def student(self) -> nn.Module:
        """The model that is trained."""
        return self.distiller.student

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "distiller":  # while unpickled
                raise
            return getattr(self.distiller.student, name)

    def forward(self, **inputs: Any) -> Any:
        """The student's output; in training, beside it, the distillation losses by name."""
        if not self.training:
            return self.student(**inputs)
        return DistilledOutput(*self.distiller(**{**inputs, **self.model_kwargs}))


class _StudentCall(nn.Module):
    """A model that is being trained, as the Trainer's own loss computation calls it; keeps the distillation losses."""

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.name = student._get_name()
        self.losses: dict[str, Tensor] = {}

    def _get_name(self) -> str:
        """By which Trainer chooses the loss of smoothed labels."""
        return self.name

    def forward(self, **inputs: Any) -> Any:
        """The student's output, with a ``loss`` of 0 in training if it has none."""
        output = self.model(**inputs)
        if not isinstance(output, DistilledOutput):
            return output
        output, self.losses = output
        if not isinstance(output, dict):
            raise TypeError(f"model: expected a ModelOutput from its forward, got {type(output).__name__}")
        if output.get("loss") is None:  # without labels the distillation is all there is
            output["loss"] = next(iter(self.losses.values())).new_zeros(())
        return output


class DistillationTrainer(Trainer):
    """A ``transformers.Trainer`` that distils a teacher into the model.

    The student is trained on its own loss plus those of the taps; parameters of aligns and losses are in the optimizer,
    and under DDP. A checkpoint is the student's, as ``from_pretrained`` loads it, beside ``distillation.pt`` with
    aligns, losses and their warm-up counters, from which ``train(resume_from_checkpoint=...)`` goes on; the teacher is
    in none. Evaluation and prediction run the student alone. Each loss is logged as ``loss_<name>`` and the student's
    own as ``loss_task``: means over the steps since the last log and over all processes. All of them are means over a
    batch, and over those that are accumulated.

    The teacher gets the batch without labels, and of the rest what its forward takes. Without labels in the batch the
    student learns from the distillation alone.

    Args:
        model: the student.
        args: ``TrainingArguments``.
        teacher: the model to learn from, loaded and in whatever dtype; it runs in eval mode and without gradients.
        taps: the losses: a Tap or several.
        model_kwargs: keywords of both models' calls in training, such as ``{"output_hidden_states": True}``.
        teacher_inputs: called with the keywords of a call, returns the teacher's, in place of the above.
        example_inputs: a batch of one to build aligns with; by default the first of ``train_dataset``, collated.
        **trainer_kwargs: of ``Trainer``: ``train_dataset``, ``data_collator``, ``compute_metrics``, ...

    Raises:
        ValueError: as ``Distiller``; several GPUs in one process (DataParallel), FSDP or DeepSpeed: DDP by ``torchrun``
            is what trains aligns and losses on several; a ``model_init``.
        TypeError: as ``Distiller``.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module,
        taps: Tap | Sequence[Tap],
        model_kwargs: Mapping[str, Any] | None = None,
        teacher_inputs: Any = None,
        example_inputs: Mapping[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if trainer_kwargs.get("model_init") is not None:
            raise ValueError("model_init: expected None: the aligns belong to one student; pass it as model")
        if args is not None:
            _check_strategy(args)
            if args.ddp_find_unused_parameters is None:
                # The default for models that are no PreTrainedModel breaks activation checkpointing.
                args.ddp_find_unused_parameters = not args.activation_checkpointing
        if any(tap.name == "task" for tap in ([taps] if isinstance(taps, Tap) else taps)):
            raise ValueError("taps: expected another name than 'task', which is that of the student's own loss")
        labels = list(getattr(args, "label_names", None) or find_labels(type(model)))
        distiller = Distiller(model, teacher, taps, teacher_inputs=teacher_inputs or _without(labels, teacher))
        super().__init__(DistilledModel(distiller, model_kwargs or {}), args, **trainer_kwargs)
        self.distiller = distiller
        self.label_names = labels
        self.can_return_loss = can_return_loss(type(model))
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        batch = self._example() if example_inputs is None else example_inputs
        if batch is not None:
            distiller.build(**{**self._prepare_inputs(dict(batch)), **self.model.model_kwargs})
        if self.optimizer is not None:
            _check_optimizer(self.optimizer, distiller)

    def _example(self) -> Any:
        """The first sample as a batch, with random numbers as they were before."""
        if self.train_dataset is None:
            return None
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with torch.random.fork_rng():
            sample = self.train_dataset[0] if hasattr(self.train_dataset, "__len__") else next(iter(self.train_dataset))
            return collate([sample])

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            with self._as_student():
                super()._set_signature_columns_if_needed()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The student's own loss, as Trainer computes it, plus the distillation losses in training."""
        call = _StudentCall(model, self.distiller.student)
        loss, outputs = super().compute_loss(call, inputs, True, num_items_in_batch)
        if call.losses:
            # Trainer takes a compute_loss_func's value for one over all accumulated batches; these are means over one.
            share = self.current_gradient_accumulation_steps if self.compute_loss_func else 1
            self._note({"loss_task": loss * share, **{f"loss_{name}": value for name, value in call.losses.items()}})
            added = torch.stack([value.to(loss.device) for value in call.losses.values()]).sum()
            loss = loss + added / share
        return (loss, outputs) if return_outputs else loss

    def _note(self, losses: Mapping[str, Tensor]) -> None:
        self._batches += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the mean of each loss beside that of their sum."""
        if "loss" in logs and self._batches:
            means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / self._batches, "mean").tolist()
            logs = {**logs, **dict(zip(self._sums, means, strict=True))}
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)

    @contextmanager
    def _as_student(self) -> Iterator[None]:
        """For Trainer's own methods that save, load and inspect the student."""
        model = self.model
        self.model = model.student
        try:
            yield
        finally:
            self.model = model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._as_student():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            state = {k: v.cpu() for k, v in self.distiller.state_dict().items() if not k.startswith("student.")}
            torch.save(state, os.path.join(output_dir or self.args.output_dir, DISTILLATION_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(
            resume_from_checkpoint,
            lambda: super(DistillationTrainer, self)._load_from_checkpoint(resume_from_checkpoint, model),
        )

    def _load_best_model(self) -> None:
        self._load(str(self.state.best_model_checkpoint), super()._load_best_model)

    def _load(self, checkpoint: str, load_student: Callable[[], None]) -> None:
        path = os.path.join(checkpoint, DISTILLATION_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"checkpoint: expected {DISTILLATION_FILE}, of a DistillationTrainer, in it, got none: {path}"
            )
        student = self.distiller.student
        if isinstance(student, PreTrainedModel):
            # Trainer would look for the model's own names in files that have those of the hub, and load what it finds.
            loaded, info = type(student).from_pretrained(checkpoint, config=student.config, output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"]:
                raise ValueError(f"checkpoint: {checkpoint} does not fit the student: {info}")
            student.load_state_dict(loaded.state_dict())
        else:
            with self._as_student():
                load_student()
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = {k: v for k, v in self.distiller.state_dict().items() if k.startswith("student.")}
        self.distiller.load_state_dict({**own, **state})


def _without(labels: Sequence[str], teacher: nn.Module) -> Callable[..., dict[str, Any]]:
    """From a batch's keywords, the teacher's: no labels, and nothing that its forward does not take."""
    parameters = inspect.signature(teacher.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return functools.partial(_chosen, frozenset(labels), None if takes_all else frozenset(parameters))


def _chosen(left_out: frozenset[str], taken: frozenset[str] | None, **inputs: Any) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in left_out and (taken is None or k in taken)}


def _check_strategy(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected one GPU a process, got {args.n_gpu}, over which Trainer would split batches "
            "(DataParallel); start with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if args.fsdp or args.deepspeed:
        raise ValueError("args: DistillationTrainer trains in one process or by DDP, and got fsdp or deepspeed")


def _check_optimizer(optimizer: torch.optim.Optimizer, distiller: Distiller) -> None:
    """One of the caller's must have the distillation's parameters too, or they stay as they were drawn."""
    has = {id(p) for group in optimizer.param_groups for p in group["params"]}
    students = {id(p) for p in distiller.student.parameters()}
    own = [p for p in distiller.parameters() if p.requires_grad and id(p) not in students]
    if any(id(p) not in has for p in own):
        raise ValueError(
            "optimizers: expected one with the parameters of aligns and losses, which this has not; leave it to the "
            "Trainer (TrainingArguments), or pass optimizer_cls_and_kwargs"
        )
