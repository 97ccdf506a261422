"""Models of the frameworks that people train with: small, random weights; ``make test-models`` brings the packages."""

import copy

import pytest
import torch
from torch import nn

from maskd_kernels import AMDLoss, Distiller, Layer, MasKDLoss, MGDLoss, Tap, TokenTrainer, prepare_teacher

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features_of(distiller, *args, **kwargs):
    """What the only tap's loss was called with: levels of the student, levels of the teacher."""
    seen = []
    distiller.taps[0].loss = lambda s, t: seen.append((s, t)) or s[0].new_zeros(())
    distiller(*args, **kwargs)
    return seen[0]


# ---- transformers ------------------------------------------------------------------------------


def segformer(hidden_sizes):
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": [1, 2, 4, 8], "depths": [1] * 4}
    config = transformers.SegformerConfig(
        hidden_sizes=hidden_sizes,
        num_labels=5,
        decoder_hidden_size=32,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        **heads,
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("loss", ["maskd", "mgd", "amd"])
def test_segformer_hidden_states(loss):
    widths = [16, 32, 64, 128]
    teacher, student = segformer(widths), segformer([8, 16, 32, 64])
    losses = {"maskd": MasKDLoss(widths), "mgd": MGDLoss(widths, widths), "amd": AMDLoss(widths, widths)}
    tap = Tap("segformer", "segformer", losses[loss], levels="hidden_states", name="kd")
    call = {"pixel_values": PIXELS, "labels": torch.zeros(2, 64, 64, dtype=torch.int64), "output_hidden_states": True}
    distiller = Distiller(student, teacher, tap, example_inputs=call)
    output, values = distiller(**call)
    (output.loss + values["kd"]).backward()
    assert all(p.grad is not None for p in distiller.trainable_parameters() if p.requires_grad)
    expected = teacher.eval()(**call).hidden_states
    for got, wanted in zip(features_of(distiller, **call)[1], expected, strict=True):
        assert torch.equal(got, wanted)


def vit(width):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=width, image_size=64, patch_size=16, **size))


@pytest.mark.parametrize("resized", [False, True])
def test_vit_of_transformers(resized):
    """The class token left out, the patches a grid; a teacher at half the resolution takes ``resize``."""
    teacher, student = vit(32), vit(16)
    last = {"channel_dim": -1, "prefix_tokens": 1, "grid": "input", "levels": "last_hidden_state"}
    tap = Tap("", "", MasKDLoss(32), resize=resized, name="kd", **last)

    def halved(pixel_values):
        return {"pixel_values": nn.functional.avg_pool2d(pixel_values, 2), "interpolate_pos_encoding": True}

    options = {"teacher_inputs": halved} if resized else {}
    distiller = Distiller(student, teacher, tap, example_inputs={"pixel_values": PIXELS}, **options)
    output, losses = distiller(pixel_values=PIXELS)
    losses["kd"].backward()
    assert output.last_hidden_state.shape == (2, 17, 16)
    s, t = features_of(distiller, pixel_values=PIXELS)
    given = halved(PIXELS) if resized else {"pixel_values": PIXELS}
    side = 2 if resized else 4
    expected = teacher.eval()(**given).last_hidden_state[:, 1:].mT.unflatten(-1, (side, side))
    assert torch.equal(t, expected)
    assert s.shape == t.shape


# ---- timm --------------------------------------------------------------------------------------


def timm_vit(width):
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(64, 16, embed_dim=width, depth=2, num_heads=2, num_classes=5, reg_tokens=2)


@pytest.mark.parametrize(
    "loss", [MasKDLoss(32), MGDLoss(32, 32), AMDLoss(32, 32), MasKDLoss(32, weight_mask=False)], ids=type
)
def test_timm_vit_with_registers(loss):
    teacher, student = timm_vit(32), timm_vit(16)
    tap = Tap("blocks.1", "blocks.1", loss, channel_dim=-1, prefix_tokens=3, grid="input", name="kd")
    distiller = Distiller(student, teacher, tap, example_inputs=PIXELS)
    logits, losses = distiller(PIXELS)
    (logits.square().mean() + losses["kd"]).backward()
    assert torch.equal(distiller.eval()(PIXELS)[0], student(PIXELS))
    assert all(p.grad is not None for p in distiller.aligns.parameters())


def test_tokens_learned_on_a_vit():
    teacher = timm_vit(32)
    trainer = TokenTrainer(teacher, Layer("blocks.0", channel_dim=-1, prefix_tokens=3, grid="input"), 32)
    logits, dice = trainer(PIXELS)
    (logits.square().mean() + dice).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.parameters())


def test_timm_feature_pyramid():
    timm = pytest.importorskip("timm")
    make = {"pretrained": False, "features_only": True, "out_indices": (1, 2, 3)}
    teacher, student = timm.create_model("resnet34", **make), timm.create_model("resnet18", **make)
    widths = teacher.feature_info.channels()
    distiller = Distiller(student, teacher, Tap("", "", MasKDLoss(widths), name="kd"), example_inputs=PIXELS)
    _, losses = distiller(PIXELS)
    losses["kd"].backward()
    assert all(
        torch.equal(a, b) for a, b in zip(features_of(distiller, PIXELS)[1], teacher.eval()(PIXELS), strict=True)
    )


# ---- Ultralytics -------------------------------------------------------------------------------

NECK = ["model.16", "model.19", "model.22"]
BATCH = {
    "img": PIXELS,
    "batch_idx": torch.tensor([0.0, 1.0]),
    "cls": torch.tensor([[1.0], [2.0]]),
    "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.4, 0.3, 0.5]]),
}


def yolo(scale):
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    from ultralytics.cfg import get_cfg

    model = tasks.DetectionModel(f"yolo26{scale}.yaml", nc=5, verbose=False)
    model.args = get_cfg()
    return model.train()


def distilled_yolo():
    torch.manual_seed(0)
    student, teacher = yolo("n"), yolo("s")
    tap = Tap(NECK, NECK, MGDLoss([128, 256, 512], [128, 256, 512]), name="mgd")
    return Distiller(student, teacher, tap, example_inputs=(BATCH,), teacher_inputs=lambda batch: batch["img"])


def test_yolo_neck_is_one_pyramid():
    distiller = distilled_yolo()
    (loss, _), losses = distiller(BATCH)
    (loss.sum() + losses["mgd"]).backward()
    seen = {}
    layers = dict(distiller.teacher.named_modules())
    handles = [layers[n].register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out})) for n in NECK]
    distiller.teacher(PIXELS)
    for handle in handles:
        handle.remove()
    for got, name in zip(features_of(distiller, BATCH)[1], NECK, strict=True):
        assert torch.equal(got, seen[name])


def test_yolo_is_folded_throughout():
    teacher = yolo("n").eval()
    prepared = prepare_teacher(teacher, taps=NECK, example_inputs=(PIXELS,))
    assert len(prepared.preparation.folded) > 100
    assert not prepared.preparation.left
    assert max(prepared.preparation.errors.values()) < 1e-5


def test_yolo_checkpoints_hold_nothing_of_the_distiller(tmp_path):
    """Whole modules are pickled: the student's, and its moving average made while it trains."""
    distiller = distilled_yolo()
    from ultralytics.utils.torch_utils import ModelEMA

    average = ModelEMA(distiller.student)
    distiller(BATCH)
    average.update(distiller.student)
    torch.save({"model": copy.deepcopy(distiller.student).half(), "ema": average.ema}, tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=False)
    with torch.no_grad():
        got, wanted = state["ema"].eval()(PIXELS), copy.deepcopy(distiller.student).eval()(PIXELS)
    assert got[0].shape == wanted[0].shape
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in state["model"].modules())


def test_yolo_resumes():
    def steps(distiller, optimizer, count):
        for _ in range(count):
            torch.manual_seed(1)
            (loss, _), losses = distiller(BATCH)
            optimizer.zero_grad()
            (loss.sum() + losses["mgd"]).backward()
            optimizer.step()

    def fresh():
        distiller = distilled_yolo()
        return distiller, torch.optim.SGD(distiller.trainable_parameters(), lr=1e-4, momentum=0.9)

    whole, optimizer = fresh()
    steps(whole, optimizer, 2)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    steps(whole, optimizer, 2)
    resumed, optimizer = fresh()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    steps(resumed, optimizer, 2)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
