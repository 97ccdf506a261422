"""The stages of the demo, each kept under its folder once finished."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskd_kernels.demo.models import CHANNELS, PyramidSegmenter, Remembered, build_student, build_teacher
from maskd_kernels.demo.scenes import compose_scenes, digit_splits
from maskd_kernels.demo.training import Data, fit, mean_iou
from maskd_kernels.distill import Distiller, Tap, TokenTrainer
from maskd_kernels.losses import MGD_PRESETS, AMDLoss, MasKDLoss, MGDLoss

METHODS = {"mse": "feature MSE", "maskd": "MasKD", "mgd": "MGD", "amd": "AMD"}  # the first is the control


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result; part of every cached stage's name."""

    size: int = 64  # pixels
    train_scenes: int = 4000
    validation_scenes: int = 400
    test_scenes: int = 800
    batch: int = 16
    teacher_steps: int = 750
    token_steps: int = 600  # on the head alone, a tenth of a student's step each
    student_steps: int = 260
    trial_steps: int = 100  # of the students that choose a loss weight
    teacher_learning_rate: float = 3e-3
    student_learning_rate: float = 1e-2
    block_learning_rate: float = 1e-3  # of MGD's and AMD's generation blocks: at a student's, they die in some runs
    token_learning_rate: float = 1e-2
    num_tokens: int = 6
    mgd_lambda: float = 0.3  # share of pixels masked: less than as released, as levels have 4x4 to 16x16 of them
    amd_threshold: float = 2.0  # of attention; 1, the average pixel's, masks most of a digit
    loss_weights: tuple[float, ...] = (0.5, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Settings(
    train_scenes=96,
    validation_scenes=48,
    test_scenes=48,
    teacher_steps=20,
    token_steps=5,
    student_steps=8,
    trial_steps=4,
    loss_weights=(1.0,),
    seeds=(0, 1),
)  # proves that everything runs; its figures mean nothing


class FeatureMSE(nn.Module):
    """The control: the mean squared error of the features, summed over the levels, without any mask."""

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The loss of pyramid levels ``[N, C, H, W]``."""
        return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


class Demo:
    """Data on the device, and the stages: teacher, tokens, students."""

    def __init__(self, out: Path, settings: Settings, device: torch.device) -> None:
        self.out, self.settings, self.device = out, settings, device
        self.out.mkdir(parents=True, exist_ok=True)
        self.source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        splits = digit_splits()
        counts = {
            "train": settings.train_scenes,
            "validation": settings.validation_scenes,
            "test": settings.test_scenes,
        }
        self.data: dict[str, Data] = {}
        self.memory: Remembered | None = None
        for seed, (name, count) in enumerate(counts.items()):
            scenes, labels = compose_scenes(splits[name], count, settings.size, seed)
            scenes = scenes.to(device).to(memory_format=torch.channels_last)
            self.data[name] = Data(scenes, labels.to(device))

    def stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage, from its file where it has been computed by this code under these settings."""
        key = self.source + repr(dataclasses.astuple(self.settings)).encode()
        path = self.out / "stages" / f"{name}-{hashlib.sha256(key).hexdigest()[:12]}.pt"
        if path.exists():
            stored: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            return stored
        start = time.perf_counter()
        result = compute()
        result["seconds"] = time.perf_counter() - start
        path.parent.mkdir(exist_ok=True)
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        return result

    def ready(self, model: nn.Module) -> nn.Module:
        """The model on the device, channels-last."""
        converted: nn.Module = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return converted

    def teacher(self) -> PyramidSegmenter:
        """The trained teacher."""

        def compute() -> dict[str, Any]:
            torch.manual_seed(0)
            model = self.ready(build_teacher())

            def step(scenes: Tensor, labels: Tensor, _numbers: Tensor) -> tuple[Tensor, Tensor]:
                model.train()
                return F.cross_entropy(model(scenes), labels), torch.zeros((), device=self.device)

            s, parameters = self.settings, {self.settings.teacher_learning_rate: list(model.parameters())}
            fit(step, parameters, self.data["train"], s.batch, s.teacher_steps, 0, "teacher")
            return {"model": model.state_dict(), "validation": mean_iou(model, self.data["validation"])}

        model = self.ready(build_teacher())
        model.load_state_dict(self.stage("teacher", compute)["model"])
        assert isinstance(model, PyramidSegmenter)
        return model.eval()

    def tokens(self, teacher: PyramidSegmenter) -> Path:
        """The file of the receptive tokens learned on the teacher's pyramid."""
        path = self.out / "tokens.pth"

        def trainer() -> TokenTrainer:
            # Unweighted, as the authors do for segmentation: a learned weighting favours the token that covers all.
            settings: dict[str, Any] = {"num_tokens": self.settings.num_tokens, "weight_mask": False}
            return TokenTrainer(self.remembered(teacher), "fpn", [CHANNELS] * 3, **settings).to(self.device)

        def compute() -> dict[str, Any]:
            torch.manual_seed(0)
            remembered = self.remembered(teacher)
            with trainer() as tokens:

                def step(scenes: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
                    remembered.numbers = numbers
                    logits, dice = tokens(scenes)
                    return F.cross_entropy(logits, labels), dice

                s, parameters = self.settings, {self.settings.token_learning_rate: list(tokens.parameters())}
                curve = fit(step, parameters, self.data["train"], s.batch, s.token_steps, 0, "tokens")
                return {"tokens": tokens.mask_modules.state_dict(), "curve": curve}

        state = self.stage("tokens", compute)["tokens"]
        with trainer() as tokens:
            tokens.mask_modules.load_state_dict(state)
            tokens.save(path)
        return path

    def remembered(self, teacher: PyramidSegmenter) -> Remembered:
        """The teacher's pyramids on the training scenes."""
        if self.memory is None:
            self.memory = Remembered(teacher, self.data["train"].scenes)
        return self.memory

    def loss(self, method: str) -> nn.Module:
        """A fresh distillation loss over the pyramid."""
        channels, tokens = [CHANNELS] * 3, self.settings.num_tokens
        if method == "mse":
            return FeatureMSE()
        if method == "maskd":
            return MasKDLoss(channels, tokens, weight_mask=False, custom_mask=False, pretrained=self.out / "tokens.pth")
        if method == "mgd":
            preset = {**MGD_PRESETS["segmentation"], "lambda_mgd": self.settings.mgd_lambda}
            return MGDLoss(channels, channels, **preset)
        return AMDLoss(channels, channels, threshold=self.settings.amd_threshold)

    def student(
        self, teacher: PyramidSegmenter, method: str, weight: float, seed: int, trial: bool = False
    ) -> dict[str, Any]:
        """A student trained alone, or with a method's loss times the weight; its head starts from the teacher's."""
        s, data = self.settings, self.data["train"]
        steps = s.trial_steps if trial else s.student_steps
        name = f"{'trial-' * trial}{method}-{weight:g}-{seed}"

        def compute() -> dict[str, Any]:
            torch.manual_seed(seed)
            model = self.ready(build_student())
            assert isinstance(model, PyramidSegmenter)
            model.head.load_state_dict(teacher.head.state_dict())

            def alone(scenes: Tensor, labels: Tensor, _numbers: Tensor) -> tuple[Tensor, Tensor]:
                model.train()
                return F.cross_entropy(model(scenes), labels), torch.zeros((), device=self.device)

            own = {s.student_learning_rate: list(model.parameters())}
            if method == "alone":
                curve = fit(alone, own, data, s.batch, steps, seed, name)
            else:
                tap = Tap("fpn", "fpn", self.loss(method), name=method, weight=weight)
                remembered = self.remembered(teacher)
                remembered.numbers = torch.zeros(1, dtype=torch.int64, device=self.device)
                example = data.scenes[:1]
                with Distiller(model, remembered, [tap], example_inputs=(example,)).to(self.device) as distiller:

                    def distilled(scenes: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
                        distiller.train()
                        remembered.numbers = numbers
                        logits, losses = distiller(scenes)
                        return F.cross_entropy(logits, labels), losses[method]

                    students = {id(p) for p in model.parameters()}
                    added = [p for p in distiller.trainable_parameters() if id(p) not in students]
                    parameters = own | ({s.block_learning_rate: added} if added else {})
                    curve = fit(distilled, parameters, data, s.batch, steps, seed, name)
            result = {"model": model.state_dict(), "curve": curve}
            return result | ({"validation": mean_iou(model, self.data["validation"])} if trial else {})

        return self.stage(name, compute)

    def loaded(self, result: dict[str, Any]) -> nn.Module:
        """The student of a stage."""
        model = self.ready(build_student())
        model.load_state_dict(result["model"])
        return model.eval()
