"""Several processes learn what one process learns on the same global batch: gloo, on a CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import parameters_of_processes
from torch import Tensor, nn

from maskd_kernels import Distiller, MasKDLoss, Tap, TokenTrainer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without distributed")

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def distiller() -> Distiller:
    """Levels to align, masks customised from the second step on."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    loss = MasKDLoss(16, num_tokens=3, custom_mask_warmup=1, loss_weight=7.0)
    return Distiller(student, teacher, [Tap("0", "0", loss)], example_inputs=(IMAGES[:1],))


def trainer() -> TokenTrainer:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    return TokenTrainer(teacher, "0", 16, num_tokens=3)


def trained(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Parameters after three steps, the last gradients and, first, the last losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(3):
        output, extra = model(images)
        extra = sum(extra.values()) if isinstance(extra, dict) else extra
        loss = output.square().mean() + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values = [loss, *parameters, *(p.grad for p in parameters)]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """FSDP2: the student's layers in groups of their own, aligns and losses with the distiller."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    assert isinstance(model, Distiller)
    for layer in (model.student[0], model.student[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def student_sharded(model: Distiller) -> Distiller:
    """What must be refused: each process would train its own aligns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.student, mesh=init_device_mesh("cpu", (2,)))
    return model


CASES = {"distiller, DDP": (distiller, ddp), "tokens, DDP": (trainer, ddp), "distiller, FSDP2": (distiller, fsdp)}


def share_of(rank: int) -> list[Tensor]:
    """Of every case, what one process has learned of its half of the batch; the loss averaged over the processes."""
    torch.set_num_threads(1)
    found: list[Tensor] = []
    for build, wrap in CASES.values():
        loss, *rest = trained(wrap(build()), IMAGES[2 * rank : 2 * rank + 2])
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        found += [mean / 2, *rest]
    with pytest.raises(ValueError, match="shard the distiller too"):
        trained(student_sharded(distiller()), IMAGES[:2])
    return found


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """By process and case: starting processes takes longer than everything they do."""
    sizes = [sum(v.numel() for v in trained(build(), IMAGES)) for build, _ in CASES.values()]
    found = parameters_of_processes(share_of, tmp_path_factory.mktemp("processes"))
    return [dict(zip(CASES, values.split(sizes), strict=True)) for values in found]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, shares: list[dict[str, Tensor]]) -> None:
    expected = torch.cat([v.detach().flatten() for v in trained(CASES[case][0](), IMAGES)])
    for share in shares:
        torch.testing.assert_close(share[case], expected, rtol=2e-5, atol=2e-6)
