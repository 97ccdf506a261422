"""MasKD's modules: checkpoints, the warm-up counter, compilation."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, assert_close, features

from maskd_kernels import MasKDLoss, MasKDSegLoss, MaskModule, reference

RELEASED = Path(__file__).parent / "golden" / "maskd_seg_deeplabv3_r101_cityscapes_tokens.pth"
KEYS = ["mask_token", "prob.0.weight", "prob.0.bias", "prob.2.weight", "prob.2.bias"]


def pyramid(batch=2, channels=10):
    return [features((batch, channels, size, size + 1)) for size in (8, 4, 2)]


def test_state_dict_is_the_authors():
    assert list(MaskModule(10).state_dict()) == KEYS
    assert list(MaskModule(10, weight_mask=False).state_dict()) == ["mask_token"]
    keys = set(MasKDLoss([10, 10]).state_dict())
    assert keys == {f"mask_modules.{i}.{key}" for i in range(2) for key in KEYS} | {"_iter"}
    assert list(MasKDSegLoss(19).state_dict()) == ["mask_module.mask_token"]


def test_initialisation_is_the_authors():
    module = MaskModule(256, 64)
    assert 0.0095 < module.mask_token.std() < 0.0105
    assert module.prob[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert module.prob[2].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    assert module.prob[0].bias.abs().max() == 0


def test_tokens_are_frozen_unless_asked():
    assert not any(p.requires_grad for p in MasKDLoss([10] * 3).parameters())
    assert all(p.requires_grad for p in MasKDLoss([10] * 3, train_tokens=True).parameters())
    loss_fn = MasKDLoss([10] * 3, custom_mask_warmup=0, train_tokens=True).to(DEVICE)
    loss_fn(pyramid(), pyramid()).backward()
    assert all(p.grad is not None for p in loss_fn.parameters())


def test_a_single_level_needs_no_list():
    student, teacher = features((2, 10, 7, 9)), features((2, 10, 7, 9))
    loss_fn = MasKDLoss(10).to(DEVICE)
    assert torch.equal(loss_fn(student, teacher), loss_fn([student], [teacher]))


def test_warmup():
    """Exactly ``custom_mask_warmup`` calls with the teacher's masks; then the student's join in."""
    student, teacher = features((2, 10, 7, 9)), features((2, 10, 7, 9))
    loss_fn = MasKDLoss(10, custom_mask_warmup=3, loss_weight=2.0).to(DEVICE)
    (module,) = loss_fn.mask_modules
    torch.nn.init.normal_(module.mask_token)
    plain, customized = (
        2 * reference.published_maskd_loss(student, teacher, module.mask_token, module.weighting, customize)
        for customize in (False, True)
    )
    losses = [loss_fn(student, teacher) for _ in range(5)]
    for i, loss in enumerate(losses):
        assert_close(loss, plain if i < 3 else customized, 2e-6, f"call {i}")
    assert not torch.allclose(plain, customized, rtol=1e-3)


def test_warmup_counter_is_saved_and_restored():
    loss_fn = MasKDLoss(10, custom_mask_warmup=2).to(DEVICE)
    for _ in range(2):
        loss_fn(features((2, 10, 7, 9)), features((2, 10, 7, 9)))
    resumed = MasKDLoss(10, custom_mask_warmup=2).to(DEVICE)
    resumed.load_state_dict(loss_fn.state_dict())
    assert resumed._iter.item() == 2
    student, teacher = features((2, 10, 7, 9)), features((2, 10, 7, 9))
    assert torch.equal(resumed(student, teacher), loss_fn(student, teacher))


def test_no_counter_without_customized_masks():
    loss_fn = MasKDLoss(10, custom_mask=False).to(DEVICE)
    loss_fn(features((2, 10, 7, 9)), features((2, 10, 7, 9)))
    assert loss_fn._iter.item() == 0


def test_authors_state_without_counter_loads_strictly():
    state = MasKDLoss([10, 10]).state_dict()
    del state["_iter"]
    loss_fn = MasKDLoss([10, 10])
    loss_fn.load_state_dict(state, strict=True)
    wrapped = torch.nn.ModuleDict({"loss": MasKDLoss([10, 10])})
    wrapped.load_state_dict({f"loss.{k}": v for k, v in state.items()}, strict=True)
    assert torch.equal(wrapped["loss"].mask_modules[1].mask_token, state["mask_modules.1.mask_token"])
    del state["mask_modules.1.mask_token"]
    with pytest.raises(RuntimeError, match=r"Missing key.*mask_modules.1.mask_token"):
        loss_fn.load_state_dict(state, strict=True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "distiller.losses.loss_maskd."])
def test_pretrained(tmp_path, nested, prefix):
    source = MasKDLoss([10, 10])
    state = {prefix + k: v for k, v in source.state_dict().items()}
    state["backbone.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "tokens.pth")
    loaded = MasKDLoss([10, 10], pretrained=tmp_path / "tokens.pth")
    for key, value in source.mask_modules.state_dict().items():
        assert torch.equal(loaded.mask_modules.state_dict()[key], value)


def test_pretrained_of_a_single_mask_module(tmp_path):
    module = MaskModule(10)
    torch.save(module.state_dict(), tmp_path / "tokens.pth")
    loaded = MasKDLoss(10, pretrained=tmp_path / "tokens.pth")
    assert torch.equal(loaded.mask_modules[0].prob[0].weight, module.prob[0].weight)


def test_pretrained_for_segmentation(tmp_path):
    assert MasKDSegLoss(19, pretrained=RELEASED).mask_module.mask_token.shape == (8, 19)
    torch.save({"state_dict": MasKDSegLoss(19).state_dict()}, tmp_path / "own.pth")
    MasKDSegLoss(19, pretrained=tmp_path / "own.pth")
    MasKDSegLoss(19, pretrained=torch.load(RELEASED, map_location="cpu", weights_only=True))


class Hostile:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_bad_checkpoints(tmp_path, capsys):
    def saved(content):
        torch.save(content, tmp_path / "file.pth")
        return tmp_path / "file.pth"

    with pytest.raises(FileNotFoundError, match=r"pretrained: no such file: .*missing.pth"):
        MasKDLoss(10, pretrained=tmp_path / "missing.pth")
    with pytest.raises(IsADirectoryError, match="pretrained: expected a checkpoint file, got a folder: "):
        MasKDLoss(10, pretrained=tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint of tensors alone \(weights_only=True\)"):
        MasKDLoss(10, pretrained=saved({"state_dict": Hostile()}))
    assert "must not run" not in capsys.readouterr().out
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        MasKDLoss(10, pretrained=tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r"expected a mapping of names to tensors .* got Tensor"):
        MasKDLoss(10, pretrained=saved(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"no receptive tokens \(mask_token\) in .* which holds backbone.weight"):
        MasKDLoss(10, pretrained=saved({"backbone.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"mask_modules.0.mask_token: expected \[6, 10\], got \[6, 9\]"):
        MasKDLoss(10, pretrained=saved(MasKDLoss(9).state_dict()))
    with pytest.raises(ValueError, match=r"missing mask_modules.0.prob.0.bias, .*are weight_mask"):
        MasKDLoss(10, pretrained=saved(MasKDLoss(10, weight_mask=False).state_dict()))
    with pytest.raises(ValueError, match=r"holds 2 level\(s\), the module has 1"):
        MasKDLoss(10, pretrained=saved(MasKDLoss([10, 10]).state_dict()))
    with pytest.raises(ValueError, match=r"mask_module.mask_token: expected \[8, 21\], got \[8, 19\]"):
        MasKDSegLoss(21, pretrained=RELEASED)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_tokens: expected a positive whole number, got 0"):
        MasKDLoss(10, num_tokens=0)
    with pytest.raises(ValueError, match="channels: expected a positive whole number, got -1"):
        MaskModule(-1)
    with pytest.raises(ValueError, match="channels: expected at least one level"):
        MasKDLoss([])
    with pytest.raises(ValueError, match=r"custom_mask_warmup: .* got -5"):
        MasKDLoss(10, custom_mask_warmup=-5)
    with pytest.raises(ValueError, match=r"student: expected 3 level\(s\) like teacher, got 2"):
        MasKDLoss([10] * 3)(pyramid()[:2], pyramid())
    with pytest.raises(RuntimeError, match=r"weight_mask=False"):
        MaskModule(10, weight_mask=False).forward_prob(torch.randn(1, 10, 3, 3))


def test_compiles_whole_without_recompiling():
    """fullgraph, and the counter is a tensor: going on past the warm-up recompiles nothing."""
    torch._dynamo.reset()
    compilations = []

    def counting(graph, inputs):
        compilations.append(1)
        return graph.forward

    student, teacher = pyramid(), pyramid()
    eager, other = (
        MasKDLoss([10] * 3, custom_mask_warmup=2).to(DEVICE),
        MasKDLoss([10] * 3, custom_mask_warmup=2).to(DEVICE),
    )
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend=counting)
    for _ in range(4):
        a, b = eager(student, teacher), compiled(student, teacher)
        assert_close(b, a, 1e-6, "loss")
        for x, y in zip(torch.autograd.grad(a, student), torch.autograd.grad(b, student), strict=True):
            assert_close(y, x, 1e-5, "gradient")
    assert len(compilations) == 1


def test_inductor_agrees():
    torch._dynamo.reset()
    student, teacher = pyramid(), pyramid()
    loss_fn = MasKDLoss([10] * 3, custom_mask=False).to(DEVICE)
    a = loss_fn(student, teacher)
    b = torch.compile(loss_fn, fullgraph=True)(student, teacher)
    assert_close(b, a, 2e-6, "loss")
    for x, y in zip(torch.autograd.grad(a, student), torch.autograd.grad(b, student), strict=True):
        assert_close(y, x, 1e-5, "gradient")


def test_memory_is_one_gradient():
    """Frozen tokens: what the loss allocates beyond the student's gradient is small, and no [N, K, C, H, W] exists."""
    student, teacher = features((2, 64, 50, 84)), features((2, 64, 50, 84), grad=False)
    loss_fn = MasKDLoss(64).to(DEVICE)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                    largest = max(largest, x.numel())
            return result

    known = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with Watch():
        loss_fn(student, teacher).backward()
    assert largest <= student.numel()


def test_random_tokens_are_warned_of(tmp_path):
    x, y = [torch.randn(1, 8, 4, 4)], [torch.randn(1, 8, 4, 4)]

    def warned(loss, *features):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                loss(*(features or (x, y)))
        return [str(w.message) for w in found]

    loss = MasKDLoss(8)
    (message,) = warned(loss)
    assert "MasKDLoss: the receptive tokens are random" in message
    assert "TokenTrainer" in message
    (message,) = warned(MasKDSegLoss(8), x[0], y[0])
    assert "MasKDSegLoss" in message
    torch.save(loss.state_dict(), tmp_path / "tokens.pth")
    loaded = MasKDLoss(8)
    loaded.load_state_dict(loss.state_dict())
    inside = torch.nn.ModuleList([MasKDLoss(8)])
    inside.load_state_dict({f"0.{name}": value for name, value in loss.state_dict().items()})
    shared = MasKDLoss(8)
    shared.mask_modules[0](x[0])  # as TokenTrainer calls it
    for quiet in (
        loaded,
        inside[0],
        shared,
        MasKDLoss(8, pretrained=tmp_path / "tokens.pth"),
        MasKDLoss(8, train_tokens=True),
    ):
        assert not warned(quiet)


def test_tokens_of_another_number_of_levels(tmp_path):
    torch.save(MasKDLoss([8] * 3).state_dict(), tmp_path / "tokens.pth")
    with pytest.raises(ValueError, match=r"tokens.pth holds 3 level\(s\), the module has 5"):
        MasKDLoss([8] * 5, pretrained=tmp_path / "tokens.pth")


def test_functorch_leaves_the_warm_up_counter():
    """functorch's transforms let nothing be changed that they did not make."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    loss = MasKDLoss(8, custom_mask_warmup=1)
    got = torch.func.grad(lambda x: loss(x, teacher))(student)
    assert loss._iter == 0
    student.requires_grad_()
    (expected,) = torch.autograd.grad(loss(student, teacher), student)
    torch.testing.assert_close(got, expected)
    assert loss._iter == 1
