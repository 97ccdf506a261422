"""Losses and gradients against those of the authors' own code (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DEVICE

from maskd_kernels import MasKDLoss, MasKDSegLoss, MaskModule, MGDLoss, use_backend

GOLDEN = Path(__file__).parent / "golden"


def load(name, dtype):
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {
            key: torch.from_numpy(archive[key]).to(DEVICE, dtype)
            if archive[key].dtype == np.float64
            else archive[key].item()
            for key in archive.files
        }


def parameters(golden):
    return {key[len("param.") :]: value for key, value in golden.items() if key.startswith("param.")}


def gradients(module, results):
    results.update({f"grad_param.{name}": p.grad for name, p in module.named_parameters()})
    return results


def detection(name, dtype, trained=True):
    golden = load(f"maskd_det_{name}", dtype)
    levels = range(golden["num_levels"])
    student = [golden[f"student.{i}"].requires_grad_() for i in levels]
    teacher = [golden[f"teacher.{i}"].requires_grad_(trained) for i in levels]
    loss_fn = MasKDLoss(
        channels=[s.shape[1] for s in student],
        weight_mask=golden["weight_mask"],
        custom_mask=golden["customize"],
        custom_mask_warmup=0,
        loss_weight=float(golden["loss_weight"]),
        train_tokens=trained,
    ).to(DEVICE, dtype)
    loss_fn.load_state_dict(parameters(golden), strict=True)
    loss = loss_fn(student, teacher)
    loss.backward()
    results = {"loss": loss, **{f"grad_student.{i}": student[i].grad for i in levels}}
    return gradients(loss_fn, results | {f"grad_teacher.{i}": teacher[i].grad for i in levels})


def frozen_detection(name, dtype):
    """As a student is distilled: teacher and tokens fixed, which on a CPU is another kernel."""
    return {k: v for k, v in detection(name, dtype, trained=False).items() if v is not None}


def segmentation(name, dtype, trained=True):
    golden = load(f"maskd_seg_{name}", dtype)
    student, teacher = golden["student"].requires_grad_(), golden["teacher"].requires_grad_(trained)
    loss_fn = MasKDSegLoss(channels=19, num_tokens=8, train_tokens=trained).to(DEVICE, dtype)
    loss_fn.load_state_dict(parameters(golden), strict=True)
    loss = loss_fn(student, teacher)
    loss.backward()
    return gradients(loss_fn, {"loss": loss, "grad_student": student.grad, "grad_teacher": teacher.grad})


def frozen_segmentation(name, dtype):
    """Likewise."""
    return {k: v for k, v in segmentation(name, dtype, trained=False).items() if v is not None}


def mask_module(name, dtype):
    golden = load(f"mask_module_{name}", dtype)
    x = golden["x"].requires_grad_()
    module = MaskModule(channels=x.shape[1], weight_mask=golden["weight_mask"]).to(DEVICE, dtype)
    module.load_state_dict(parameters(golden), strict=True)
    out, dice = module(x)
    torch.autograd.backward([out, dice], [golden["grad_out"], golden["grad_dice"]])
    results = {"out": out, "dice": dice, "masks": module.forward_mask(x), "grad_x": x.grad}
    if golden["weight_mask"]:
        results["weights"] = module.forward_prob(x).flatten(1)
    return gradients(module, results)


def generative(name, dtype):
    golden = load(f"mgd_{name}", dtype)
    student, teacher = golden["student"].requires_grad_(), golden["teacher"].requires_grad_()
    loss_fn = MGDLoss(
        student.shape[1],
        teacher.shape[1],
        alpha_mgd=float(golden["alpha"]),
        lambda_mgd=float(golden["lambda"]),
        mask_on_channel=name == "cls_channel_mask",
    ).to(DEVICE, dtype)
    loss_fn.load_state_dict(parameters(golden), strict=True)
    loss = loss_fn(student, teacher, keep=golden["keep_mask"])
    loss.backward()
    return gradients(loss_fn, {"loss": loss, "grad_student": student.grad, "grad_teacher": teacher.grad})


def errors(results, golden):
    """Largest difference of each result, relative to the largest value of what it should be."""
    found = {}
    for name, value in results.items():
        expected = golden[name]
        assert value.shape == expected.shape, name
        # Softmax is blind to a shift of all its logits: a gradient that is rounding noise there counts against 1.
        scale = expected.abs().max().item()
        found[name] = (value.double() - expected).abs().max().item() / (scale if scale > 1e-12 else 1.0)
    return found


CASES = [
    *((frozen_detection, "maskd_det", n) for n in ("official_init", "unweighted", "weighted", "weighted_customized")),
    *((frozen_segmentation, "maskd_seg", n) for n in ("learned_tokens", "random_tokens")),
    *((detection, "maskd_det", n) for n in ("official_init", "unweighted", "weighted", "weighted_customized")),
    *((segmentation, "maskd_seg", n) for n in ("learned_tokens", "random_tokens")),
    *((mask_module, "mask_module", n) for n in ("1x1", "unweighted", "weighted")),
    *((generative, "mgd", n) for n in ("det_aligned", "det_same_channels", "seg_aligned", "cls_channel_mask")),
]


@pytest.mark.parametrize(
    ("compute", "kind", "name"), CASES, ids=[f"{kind}_{name}_{compute.__name__}" for compute, kind, name in CASES]
)
def test_golden(compute, kind, name, backend):
    """float64 at 1e-10 where the backend has it; else float32, at most twice as far off as PyTorch itself."""
    golden = load(f"{kind}_{name}", torch.float64)
    if backend == "triton":
        found = errors(compute(name, torch.float32), golden)
        with use_backend("reference"):
            eager = errors(compute(name, torch.float32), golden)
        # The weighting's parameters all get their gradients through the same few logits: one measure for them.
        weighting = max((v for k, v in eager.items() if ".prob." in k), default=0.0)
        allowed = {k: max(2 * (weighting if ".prob." in k else v), 2e-6) for k, v in eager.items()}
    else:
        found = errors(compute(name, torch.float64), golden)
        allowed = dict.fromkeys(found, 1e-10)
    gradients_checked = {k for k in golden if k.startswith("grad_") and k not in ("grad_out", "grad_dice")}
    if compute in (frozen_detection, frozen_segmentation):
        gradients_checked = {k for k in gradients_checked if k.startswith("grad_student")}
        assert found.keys() == {"loss", *gradients_checked}
    assert gradients_checked <= found.keys()
    wrong = {k: (v, allowed[k]) for k, v in found.items() if not v <= allowed[k]}
    assert not wrong, f"relative error, allowed: {wrong}"


@pytest.mark.parametrize("name", ["det_aligned", "seg_aligned", "cls_channel_mask"])
def test_mask_inequalities(name, monkeypatch):
    """From the authors' random numbers, their mask."""
    golden = load(f"mgd_{name}", torch.float64)
    loss_fn = MGDLoss(6, golden["teacher"].shape[1], lambda_mgd=golden["lambda"].item(), mask_on_channel="cls" in name)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: golden["uniform"].reshape(size))
    (keep,) = loss_fn._draw([golden["teacher"]], None)
    assert torch.equal(keep.to(golden["keep_mask"]), golden["keep_mask"])


def test_released_tokens_load():
    released = GOLDEN / "maskd_seg_deeplabv3_r101_cityscapes_tokens.pth"
    tokens = MasKDSegLoss(channels=19, pretrained=released).mask_module.mask_token
    golden = load("maskd_seg_learned_tokens", torch.float64)
    torch.testing.assert_close(tokens.double(), golden["param.mask_module.mask_token"].cpu(), rtol=1e-6, atol=1e-7)
