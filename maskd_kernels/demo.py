"""The demo: a segmenter distilled through receptive tokens, start to end, on real handwritten digits.

Scenes of scikit-learn's 8x8 digits, enlarged, scattered and cluttered, are segmented into ten digits and
background. A teacher is trained; receptive tokens are learned on its pyramid features; students are trained alone and
distilled, three seeds each. Loss weights are chosen on validation scenes; the test scenes, made of digits that
occur nowhere else, are looked at once, at the end. Every finished stage is kept, so that an interrupted demo resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskd_kernels import backends, reference
from maskd_kernels.distill import Distiller, Tap, TokenTrainer, plot_masks
from maskd_kernels.losses import MasKDLoss

CLASSES = 11  # ten digits and, as class 0, the background
CHANNELS = 64  # of every pyramid level


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result; part of every cached stage's name."""

    size: int = 64  # pixels
    train_scenes: int = 4000
    validation_scenes: int = 400
    test_scenes: int = 800
    batch: int = 32
    teacher_steps: int = 1000
    token_steps: int = 150
    student_steps: int = 500
    teacher_learning_rate: float = 3e-3
    student_learning_rate: float = 1e-2
    token_learning_rate: float = 1e-2
    num_tokens: int = 6
    loss_weights: tuple[float, ...] = (0.5, 2.0, 8.0)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Settings(
    train_scenes=96,
    validation_scenes=48,
    test_scenes=48,
    teacher_steps=20,
    token_steps=5,
    student_steps=8,
    loss_weights=(1.0,),
    seeds=(0, 1),
)  # proves that everything runs; its figures mean nothing


# ---- Scenes ------------------------------------------------------------------------------------


def digit_splits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 digits, ``[n, 8, 8]`` in 0..1 with labels, split so that no digit is in two splits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels, classes = torch.from_numpy(images).float().reshape(-1, 8, 8) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    bounds = {"train": order[:1000], "validation": order[1000:1300], "test": order[1300:]}
    return {name: (pixels[chosen], classes[chosen]) for name, chosen in bounds.items()}


def compose_scenes(digits: tuple[Tensor, Tensor], count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` scenes ``[count, 3, size, size]`` and their labels ``[count, size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = digits

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    scenes = torch.empty(count, 3, size, size)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for scene, label in zip(scenes, labels, strict=True):
        coarse = torch.rand(1, 3, 5, 5, generator=generator) * uniform(0.1, 0.5)
        scene.copy_(F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)[0])
        for clutter in [True] * draw(0, 3) + [False] * draw(3, 6):
            which, side = draw(0, len(pixels)), draw(20, 33)
            digit = F.interpolate(pixels[which][None, None], size=(side, side), mode="bicubic", align_corners=False)
            shape = digit[0, 0].clamp(0, 1)
            if clutter:  # a torn piece of a digit: strokes that mean nothing
                shape = shape.rot90(draw(1, 4))[: side // 2, : side // 2]
            height, width = shape.shape
            top, left = draw(0, size - height + 1), draw(0, size - width + 1)
            window = scene[:, top : top + height, left : left + width]
            colour = torch.rand(3, 1, 1, generator=generator) * 0.8 + 0.2
            window.copy_(window * (1 - shape) + colour * shape)
            if not clutter:
                region = label[top : top + height, left : left + width]
                region[shape > 0.4] = classes[which] + 1
        scene += 0.05 * torch.randn(scene.shape, generator=generator)
    return scenes - 0.5, labels


# ---- Models ------------------------------------------------------------------------------------


class PyramidSegmenter(nn.Module):
    """A torchvision backbone, torchvision's feature pyramid, and a convolutional head on its finest level.

    Teacher and student share the shapes of pyramid features and head, so that a student can start from the teacher's
    head (the papers' inheriting strategy).
    """

    def __init__(self, backbone: nn.Module, channels: list[int]) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(channels, CHANNELS)
        self.head = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, CLASSES, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 11, H, W]`` of images ``[N, 3, H, W]``."""
        levels = self.fpn(self.backbone(images))
        logits = self.head(levels["0"])
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def build_teacher() -> PyramidSegmenter:
    """ResNet-18, pyramid levels at strides 4, 8 and 16."""
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter

    backbone = IntermediateLayerGetter(resnet18(weights=None), {"layer1": "0", "layer2": "1", "layer3": "2"})
    return PyramidSegmenter(backbone, [64, 128, 256])


def build_student() -> PyramidSegmenter:
    """MobileNetV2 at 0.35 of its width, the same strides."""
    from torchvision.models import mobilenet_v2
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {"features.3": "0", "features.6": "1", "features.13": "2"}
    backbone = create_feature_extractor(mobilenet_v2(weights=None, width_mult=0.35), nodes)
    with torch.no_grad():
        channels = [level.shape[1] for level in backbone.eval()(torch.zeros(1, 3, 64, 64)).values()]
    return PyramidSegmenter(backbone.train(), channels)


# ---- Training ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """Scenes and labels of one split, on the device."""

    scenes: Tensor
    labels: Tensor

    def batches(self, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` shuffled batches."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.scenes), generator=generator)])
            chosen, order = order[:size].to(self.scenes.device), order[size:]
            yield self.scenes[chosen], self.labels[chosen]


@torch.no_grad()
def mean_iou(model: nn.Module, data: Data) -> float:
    """Mean over the classes of intersection over union, in percent."""
    model.eval()
    confusion = torch.zeros(CLASSES * CLASSES, dtype=torch.int64, device=data.labels.device)
    for scenes, labels in zip(data.scenes.split(100), data.labels.split(100), strict=True):
        predicted = model(scenes).argmax(1)
        confusion += torch.bincount((labels * CLASSES + predicted).flatten(), minlength=CLASSES * CLASSES)
    matrix = confusion.reshape(CLASSES, CLASSES).double()
    hit = matrix.diagonal()
    return float((hit / (matrix.sum(0) + matrix.sum(1) - hit).clamp_min(1)).mean() * 100)


def progress(iterable: Any, total: int, text: str) -> Any:
    """A progress bar."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=f"{text:32s}", leave=False, mininterval=0.5)


def fit(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    parameters: list[nn.Parameter],
    data: Data,
    settings: Settings,
    steps: int,
    seed: int,
    text: str,
    learning_rate: float,
) -> list[float]:
    """AdamW under a one-cycle schedule; ``step`` returns the task loss and what is to be added to it.

    Returns the task loss of each step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    curve = []
    for scenes, labels in progress(data.batches(settings.batch, steps, seed), steps, text):
        task, extra = step(scenes, labels)
        optimizer.zero_grad(set_to_none=True)
        (task + extra).backward()
        optimizer.step()
        schedule.step()
        curve.append(task.detach())
    return torch.stack(curve).tolist()


class Demo:
    """The stages, each kept under ``out`` once finished."""

    def __init__(self, out: Path, settings: Settings, device: torch.device) -> None:
        self.out, self.settings, self.device = out, settings, device
        self.out.mkdir(parents=True, exist_ok=True)
        splits = digit_splits()
        counts = {
            "train": settings.train_scenes,
            "validation": settings.validation_scenes,
            "test": settings.test_scenes,
        }
        self.data = {}
        for seed, (name, count) in enumerate(counts.items()):
            scenes, labels = compose_scenes(splits[name], count, settings.size, seed)
            scenes = scenes.to(device).to(memory_format=torch.channels_last)
            self.data[name] = Data(scenes, labels.to(device))

    def stage(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a stage, from its file where it has been computed under these settings."""
        source = Path(__file__).read_bytes() + repr(dataclasses.astuple(self.settings)).encode()
        path = self.out / "stages" / f"{name}-{hashlib.sha256(source).hexdigest()[:12]}.pt"
        if path.exists():
            return torch.load(path, map_location=self.device, weights_only=True)
        start = time.perf_counter()
        result = compute()
        result["seconds"] = time.perf_counter() - start
        path.parent.mkdir(exist_ok=True)
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        return result

    def ready(self, model: nn.Module) -> nn.Module:
        """The model on the device, channels-last."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def teacher(self) -> PyramidSegmenter:
        """The trained teacher."""

        def compute() -> dict[str, Any]:
            torch.manual_seed(0)
            model = self.ready(build_teacher())

            def step(scenes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                model.train()
                return F.cross_entropy(model(scenes), labels), torch.zeros((), device=self.device)

            s = self.settings
            fit(
                step,
                list(model.parameters()),
                self.data["train"],
                s,
                s.teacher_steps,
                0,
                "teacher",
                s.teacher_learning_rate,
            )
            return {"model": model.state_dict(), "validation": mean_iou(model, self.data["validation"])}

        model = self.ready(build_teacher())
        model.load_state_dict(self.stage("teacher", compute)["model"])
        assert isinstance(model, PyramidSegmenter)
        return model.eval()

    def tokens(self, teacher: PyramidSegmenter) -> Path:
        """The file of the receptive tokens learned on the teacher's pyramid."""
        path = self.out / "tokens.pth"

        def trainer() -> TokenTrainer:
            return TokenTrainer(teacher, "fpn", [CHANNELS] * 3, num_tokens=self.settings.num_tokens).to(self.device)

        def compute() -> dict[str, Any]:
            torch.manual_seed(0)
            with trainer() as tokens:

                def step(scenes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                    logits, dice = tokens(scenes)
                    return F.cross_entropy(logits, labels), dice

                s, parameters = self.settings, list(tokens.parameters())
                curve = fit(step, parameters, self.data["train"], s, s.token_steps, 0, "tokens", s.token_learning_rate)
                return {"tokens": tokens.mask_modules.state_dict(), "curve": curve}

        state = self.stage("tokens", compute)["tokens"]
        with trainer() as tokens:
            tokens.mask_modules.load_state_dict(state)
            tokens.save(path)
        return path

    def student(
        self, teacher: PyramidSegmenter, method: str, loss: nn.Module | None, weight: float, seed: int
    ) -> dict[str, Any]:
        """A student trained with the loss times the weight, or alone; its head starts from the teacher's."""

        def compute() -> dict[str, Any]:
            torch.manual_seed(seed)
            model = self.ready(build_student())
            assert isinstance(model, PyramidSegmenter)
            model.head.load_state_dict(teacher.head.state_dict())
            s, data = self.settings, self.data["train"]
            name = f"{method} seed {seed}" + (f" weight {weight:g}" if loss else "")

            def alone(scenes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                model.train()
                return F.cross_entropy(model(scenes), labels), torch.zeros((), device=self.device)

            if loss is None:
                curve = fit(
                    alone, list(model.parameters()), data, s, s.student_steps, seed, name, s.student_learning_rate
                )
            else:
                tap = Tap("fpn", "fpn", loss, name=method, weight=weight)
                example = data.scenes[:1]
                with Distiller(model, teacher, [tap], example_inputs=(example,)).to(self.device) as distiller:

                    def distilled(scenes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                        distiller.train()
                        logits, losses = distiller(scenes)
                        return F.cross_entropy(logits, labels), losses[method]

                    parameters = distiller.trainable_parameters()
                    curve = fit(distilled, parameters, data, s, s.student_steps, seed, name, s.student_learning_rate)
            validation = mean_iou(model, self.data["validation"])
            return {"model": model.state_dict(), "curve": curve, "validation": validation}

        return self.stage(f"{method}-{weight:g}-{seed}", compute)

    def maskd(self, tokens: Path) -> MasKDLoss:
        """A fresh MasKD loss over the pyramid."""
        return MasKDLoss(
            [CHANNELS] * 3,
            self.settings.num_tokens,
            custom_mask_warmup=self.settings.student_steps // 2,
            pretrained=tokens,
        )

    def test_iou(self, result: dict[str, Any]) -> float:
        """A finished student on the test scenes."""
        return mean_iou(self.loaded(result), self.data["test"])

    def loaded(self, result: dict[str, Any]) -> nn.Module:
        """The student of a stage."""
        model = self.ready(build_student())
        model.load_state_dict(result["model"])
        return model.eval()


# ---- What it shows -----------------------------------------------------------------------------


def time_loss(demo: Demo, teacher: PyramidSegmenter, student: nn.Module, loss: MasKDLoss) -> dict[str, float]:
    """Milliseconds, forward and backward, of the fused loss and of the published formula on this demo's features."""
    scenes = demo.data["train"].scenes[: demo.settings.batch]
    with torch.no_grad():
        t = list(teacher.fpn(teacher.backbone(scenes)).values())
        assert isinstance(student, PyramidSegmenter)
        s = [level.requires_grad_() for level in student.fpn(student.backbone(scenes)).values()]
    modules: list[Any] = list(loss.mask_modules)

    def fused() -> Tensor:
        return loss(s, t)

    def published() -> Tensor:
        levels = zip(s, t, modules, strict=True)
        return torch.stack(
            [reference.published_maskd_loss(a, b, m.mask_token, m.weighting, customize=True) for a, b, m in levels]
        ).sum()

    times: dict[str, list[float]] = {"fused": [], "published": []}
    for _ in range(25):
        for name, function in (("fused", fused), ("published", published)):
            if demo.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(function(), s)
            if demo.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def draw_predictions(demo: Demo, models: OrderedDict[str, nn.Module], path: Path, count: int = 6) -> None:
    """A PNG of test scenes, their labels, and what each model predicts."""
    from matplotlib.figure import Figure

    scenes, labels = demo.data["test"].scenes[:count], demo.data["test"].labels[:count]
    with torch.no_grad():
        rows = OrderedDict(label=labels, **{name: model(scenes).argmax(1) for name, model in models.items()})
    figure = Figure(figsize=(1.7 * count, 1.75 * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots(len(rows) + 1, count)
    for column in range(count):
        axes[0, column].imshow((scenes[column].permute(1, 2, 0).cpu() + 0.5).clamp(0, 1).numpy())
        for row, (name, values) in enumerate(rows.items(), 1):
            axes[row, column].imshow(
                values[column].cpu().numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest"
            )
            axes[row, 0].set_ylabel(name, fontsize=9)
    axes[0, 0].set_ylabel("scene", fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=140, format="png")


def draw_curves(curves: dict[str, list[float]], path: Path) -> None:
    """A PNG of the students' task losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        window = max(len(curve) // 40, 1)
        smooth = torch.tensor(curve).unfold(0, window, 1).mean(-1)
        axis.plot(range(window - 1, len(curve)), smooth, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("training cross entropy")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140, format="png")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Markdown."""
    head = ("model", "loss weight", "test mIoU, %", "against student alone")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * 4, *rows))


def statistics(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) if len(values) > 1 else 0.0


def run(out: Path, settings: Settings | None = None) -> dict[str, Any]:
    """The whole demo; prints its table and writes ``results.json``, ``results.md`` and the PNGs under ``out``."""
    settings = settings or Settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = backends.resolve(device, torch.float32)
    print(f"device {device}, kernels {backend}, results in {out}")
    start = time.perf_counter()
    demo = Demo(out, settings, device)
    teacher = demo.teacher()
    tokens = demo.tokens(teacher)

    alone = [demo.student(teacher, "alone", None, 0.0, seed) for seed in settings.seeds]
    trials = {
        w: demo.student(teacher, "maskd", demo.maskd(tokens), w, settings.seeds[0]) for w in settings.loss_weights
    }
    weight = max(trials, key=lambda w: trials[w]["validation"])
    distilled = [demo.student(teacher, "maskd", demo.maskd(tokens), weight, seed) for seed in settings.seeds]

    iou = {
        "teacher": [mean_iou(teacher, demo.data["test"])],
        "student alone": [demo.test_iou(r) for r in alone],
        "MasKD": [demo.test_iou(r) for r in distilled],
    }
    base, _ = statistics(iou["student alone"])
    rows = []
    for name, values in iou.items():
        mean, deviation = statistics(values)
        spread = f" ± {deviation:.2f}" if len(values) > 1 else ""
        gain = f"{mean - base:+.2f}" if name != "student alone" else ""
        rows.append((name, f"{weight:g}" if name == "MasKD" else "", f"{mean:.2f}{spread}", gain))
    student = demo.loaded(distilled[0])
    loss_ms = time_loss(demo, teacher, student, demo.maskd(tokens).to(device))
    minutes = (time.perf_counter() - start) / 60

    shapes = f"batch {settings.batch}, {CHANNELS} channels, 16x16, 8x8 and 4x4 pixels"
    text = "\n".join(
        [
            table(rows),
            "",
            f"Mean and standard deviation over {len(settings.seeds)} seeds; students start with the teacher's head.",
            f"Loss weight chosen on validation scenes from {', '.join(f'{w:g}' for w in settings.loss_weights)}.",
            f"The loss, forward and backward ({shapes}): {loss_ms['fused']:.2f} ms fused ({backend}), "
            f"{loss_ms['published']:.2f} ms as published: {loss_ms['published'] / loss_ms['fused']:.1f} times.",
        ]
    )
    scenes = demo.data["test"].scenes[:3]
    modules: list[Any] = list(demo.maskd(tokens).to(device).mask_modules)
    with torch.no_grad():
        finest = teacher.fpn(teacher.backbone(scenes))["0"]
        for i, masks in enumerate(modules[0].forward_mask(finest)):
            plot_masks(
                scenes[i] + 0.5, masks, out / f"masks_{i}.png", title="receptive tokens on the teacher's stride-4 level"
            )
    models = OrderedDict([("teacher", teacher), ("student alone", demo.loaded(alone[0])), ("MasKD", student)])
    draw_predictions(demo, models, out / "predictions.png")
    draw_curves({"student alone": alone[0]["curve"], "MasKD": distilled[0]["curve"]}, out / "curves.png")
    results = {
        "settings": dataclasses.asdict(settings),
        "device": str(device),
        "backend": backend,
        "test_miou": iou,
        "validation_miou": {
            "teacher": demo.stage("teacher", dict)["validation"],
            "MasKD by loss weight": {f"{w:g}": r["validation"] for w, r in trials.items()},
            "student alone": [r["validation"] for r in alone],
            "MasKD": [r["validation"] for r in distilled],
        },
        "loss_weight": weight,
        "loss_ms": loss_ms,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "results.md").write_text(text + "\n")
    print(f"\n{text}\n\n{minutes:.1f} minutes; pictures and results.json in {out}")
    return results
