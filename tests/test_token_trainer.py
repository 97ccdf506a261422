"""TokenTrainer: the teacher's own loss, seen through the tokens, teaches them; the teacher never changes."""

import copy

import numpy as np
import pytest
import torch
from helpers import parameters_of_processes
from test_distiller import IMAGE, Net
from torch import nn

from maskd_kernels import MasKDLoss, MasKDSegLoss, TokenTrainer, plot_masks

LABELS = torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(0))


def task_loss(output):
    return nn.functional.cross_entropy(output["logits"], LABELS)


@pytest.mark.parametrize("structure", ["tensor", "list", "tuple", "namedtuple", "dict"])
def test_the_layer_is_replaced(structure):
    """What the rest of the teacher sees is the masked features, in the structure it expects."""
    teacher = Net(8, structure)
    levels = 1 if structure == "tensor" else 2
    trainer = TokenTrainer(teacher, "neck", [8] * levels)
    output, dice = trainer(IMAGE)
    features = teacher.neck(teacher.stem(IMAGE))
    features = [features] if structure == "tensor" else list(features.values() if structure == "dict" else features)
    pairs = [module(level) for module, level in zip(trainer.mask_modules, features, strict=True)]
    torch.testing.assert_close(output["logits"], teacher.head(pairs[0][0]))
    torch.testing.assert_close(dice, sum(d for _, d in pairs))


def test_training_learns_and_leaves_the_teacher_alone():
    teacher = Net(8)
    before = copy.deepcopy(teacher.state_dict())
    trainer = TokenTrainer(teacher, "neck", [8, 8])
    optimizer = torch.optim.Adam(trainer.parameters(), lr=0.01)
    history = []
    for _ in range(60):
        output, dice = trainer(IMAGE)
        loss = task_loss(output) + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), dice.item()))
    assert history[-1][0] < history[0][0] - 0.05
    assert history[-1][1] < history[0][1]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in trainer.mask_modules[0].parameters())
    assert {k.split(".")[0] for k in trainer.state_dict()} == {"mask_modules"}


def test_several_layers_as_one_pyramid():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.head(self.b(self.a(x)))

    teacher = Teacher()
    trainer = TokenTrainer(teacher, ["a", teacher.b], [8, 4])
    output, dice = trainer(IMAGE)
    first, first_dice = trainer.mask_modules[0](teacher.a(IMAGE))
    second, second_dice = trainer.mask_modules[1](teacher.b(first))
    torch.testing.assert_close(output, teacher.head(second))
    torch.testing.assert_close(dice, first_dice + second_dice)


@pytest.mark.parametrize("options", [{"levels": 1}, {"select": lambda output: output[1]}], ids=["levels", "select"])
def test_levels_that_are_left_out_stay_as_they_are(options):
    teacher = Net(8, "list")
    trainer = TokenTrainer(teacher, "neck", 8, **options)
    plain = teacher.neck(teacher.stem(IMAGE))
    masked, expected_dice = trainer.mask_modules[0](plain[1])
    left = []  # what the neck puts out: hooks run in their order, and the trainer's is there only during its call
    teacher.head.register_forward_pre_hook(lambda _m, inputs: left.append(inputs[0]))
    _, dice = trainer(IMAGE)
    assert torch.equal(left[0], plain[0]), "the head reads level 0"
    torch.testing.assert_close(dice, expected_dice)
    assert not torch.equal(masked, plain[1])


def test_token_sequences():
    """The class token is left alone; the patches are masked, as a sequence and, weighted, as the grid they are."""

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.block(x))

    teacher, x = Teacher(), torch.randn(2, 1 + 12, 8)
    for options in ({"weight_mask": False}, {"grid": (3, 4)}):
        trainer = TokenTrainer(teacher, "block", 8, channel_dim=-1, prefix_tokens=1, **options)
        output, dice = trainer(x)
        tokens = teacher.block(x)
        grid = tokens[:, 1:].mT.unflatten(-1, (3, 4))  # [N, C, 3, 4]
        masked, expected_dice = trainer.mask_modules[0](grid)
        expected = teacher.head(torch.cat([tokens[:, :1], masked.flatten(2).mT], 1))
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(dice, expected_dice)


def test_token_sequences_of_channels_first():
    teacher, x = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 5, 1)), torch.randn(2, 8, 1 + 12)
    trainer = TokenTrainer(teacher, "0", 8, prefix_tokens=1, grid=(3, 4))
    output, _ = trainer(x)
    tokens = teacher[0](x)
    masked, _ = trainer.mask_modules[0](tokens[:, :, 1:].unflatten(-1, (3, 4)))
    torch.testing.assert_close(output, teacher[1](torch.cat([tokens[:, :, :1], masked.flatten(2)], 2)))


def test_teacher_in_half_precision():
    trainer = TokenTrainer(Net(8, "tensor").bfloat16(), "neck", 8)
    output, dice = trainer(IMAGE)  # float32, cast to what the teacher takes
    (output["logits"].float().square().mean() + dice).backward()
    assert output["logits"].dtype == torch.bfloat16
    assert trainer.mask_modules[0].mask_token.grad.isfinite().all()


def test_teacher_mode():
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    trainer = TokenTrainer(teacher, "0", 8)
    assert not any(m.training for m in teacher.modules())
    trainer.train()
    assert not any(m.training for m in teacher.modules())
    TokenTrainer(teacher, "0", 8, teacher_training=True)(IMAGE)
    assert teacher.training
    assert not teacher[1].training
    assert not teacher[2].training


def test_removing_gives_the_teacher_back():
    teacher = Net(8, "tensor")
    teacher.head.requires_grad_(False)
    teacher.eval()
    plain = teacher(IMAGE)["logits"]
    with TokenTrainer(teacher, "neck", 8) as trainer:
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not torch.equal(trainer(IMAGE)[0]["logits"], plain)
        assert torch.equal(teacher(IMAGE)["logits"], plain)  # called by somebody else: not masked
    assert torch.equal(teacher(IMAGE)["logits"], plain)
    assert all(p.requires_grad for p in teacher.stem.parameters())
    assert not any(p.requires_grad for p in teacher.head.parameters())
    with pytest.raises(RuntimeError, match="hook has been removed"):
        trainer(IMAGE)


def test_files(tmp_path):
    trainer = TokenTrainer(Net(8), "neck", [8, 8], num_tokens=4)
    trainer.save(tmp_path / "tokens.pth")
    assert set(torch.load(tmp_path / "tokens.pth", weights_only=True)) == {"state_dict"}
    other = TokenTrainer(Net(8), "neck", [8, 8], num_tokens=4)
    other.load(tmp_path / "tokens.pth")
    loss_fn = MasKDLoss([8, 8], num_tokens=4, pretrained=tmp_path / "tokens.pth")
    for module in (other, loss_fn):
        for key, value in trainer.mask_modules.state_dict().items():
            assert torch.equal(module.mask_modules.state_dict()[key], value)
    with pytest.raises(ValueError, match=r"mask_modules.0.mask_token: expected \[6, 8\], got \[4, 8\]"):
        TokenTrainer(Net(8), "neck", [8, 8]).load(tmp_path / "tokens.pth")


def test_files_for_segmentation(tmp_path):
    trainer = TokenTrainer(Net(8), "head", 5, num_tokens=8, weight_mask=False)
    trainer(IMAGE)
    trainer.save(tmp_path / "tokens.pth")
    loss_fn = MasKDSegLoss(5, pretrained=tmp_path / "tokens.pth")
    assert torch.equal(loss_fn.mask_module.mask_token, trainer.mask_modules[0].mask_token)


def test_bad_input():
    with pytest.raises(ValueError, match="layer: no layer 'nek' in Net; near it: neck"):
        TokenTrainer(Net(8), "nek", 8)
    with pytest.raises(ValueError, match="channels: expected one per level that 'neck' puts out, 2, got 1"):
        TokenTrainer(Net(8), "neck", 8)(IMAGE)
    with pytest.raises(ValueError, match=r"tokens: expected \[K, 8\] for a teacher of \[2, 8, 16, 16\], got \[6, 4\]"):
        TokenTrainer(Net(8, "tensor"), "neck", 4, weight_mask=False)(IMAGE)
    with pytest.raises(ValueError, match="select: expected tensors of the output, as they are"):
        TokenTrainer(Net(8, "tensor"), "neck", 8, select=torch.relu)(IMAGE)
    with pytest.raises(RuntimeError, match="layer: 'never' did not run"):
        TokenTrainer(Net(8), "never", 8)(IMAGE)
    with pytest.raises(TypeError, match=r"channels: expected a positive whole number, got 8\.0"):
        TokenTrainer(Net(8), "neck", 8.0)
    with pytest.raises(ValueError, match="channels: expected at least one level"):
        TokenTrainer(Net(8), "neck", [])


def train_tokens_in_ddp(rank):
    torch.manual_seed(0)
    trainer = TokenTrainer(Net(8, "tensor"), "neck", 8)
    ddp = nn.parallel.DistributedDataParallel(trainer)
    optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(2):
        output, dice = ddp(torch.randn(2, 3, 16, 16))
        optimizer.zero_grad()
        (task_loss(output) + dice).backward()
        optimizer.step()
    return list(trainer.parameters())


def test_ddp(tmp_path):
    first, second = parameters_of_processes(train_tokens_in_ddp, tmp_path)
    assert torch.equal(first, second)


def test_plot_masks(tmp_path):
    pytest.importorskip("matplotlib")
    plot_masks(torch.rand(3, 32, 48), torch.rand(6, 8, 12), tmp_path / "masks.png", title="six tokens")
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    plot_masks(torch.randint(0, 255, (1, 16, 16), dtype=torch.uint8), torch.rand(1, 4, 4), tmp_path / "one.png")
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    plot_masks(picture, np.ones((2, 8, 12), dtype=np.float32), tmp_path / "numpy.png")
    assert (tmp_path / "numpy.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"masks: expected \[K, h, w\], got \[1, 6, 8, 12\]"):
        plot_masks(torch.rand(3, 32, 48), torch.rand(1, 6, 8, 12), tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"image: expected \[3, H, W\] or \[1, H, W\], got \[4, 8, 8\]"):
        plot_masks(torch.rand(4, 8, 8), torch.rand(6, 8, 12), tmp_path / "bad.png")


def test_tokens_are_saved_into_a_new_folder(tmp_path):
    """They are saved at the end of hours."""
    trainer = TokenTrainer(nn.Sequential(nn.Conv2d(3, 8, 3)), "0", channels=8)
    trainer.save(tmp_path / "new" / "folder" / "tokens.pth")
    again = MasKDLoss(8, pretrained=tmp_path / "new" / "folder" / "tokens.pth")
    assert torch.equal(again.mask_modules[0].mask_token, trainer.mask_modules[0].mask_token)
