"""The Hugging Face Trainer that distils: its own training loop, on data made here; by ``make test-models``."""

import copy
import json
import os

import pytest
import torch
from helpers import parameters_of_processes
from torch import nn

transformers = pytest.importorskip("transformers", reason="by `make test-models`")
pytest.importorskip("accelerate", reason="by `make test-models`")

from maskd_kernels import MasKDLoss, MGDLoss, Tap  # noqa: E402
from maskd_kernels.integrations.transformers import DistillationTrainer  # noqa: E402

WIDTHS = [16, 32, 48, 64]
HIDDEN = {"output_hidden_states": True}


def segformer(widths, **options):
    settings = {"depths": [1] * 4, "num_attention_heads": [1, 2, 4, 8], "num_labels": 5, "decoder_hidden_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0}
    still["classifier_dropout_prob"] = 0.0
    config = transformers.SegformerConfig(hidden_sizes=widths, **settings, **still, **options)
    return transformers.SegformerForSemanticSegmentation(config)


def pictures(count=8, labels=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        label = torch.randint(0, 5, (4, 4), generator=generator).repeat_interleave(16, 0).repeat_interleave(16, 1)
        pixels = torch.rand(3, 64, 64, generator=generator) + label
        made.append({"pixel_values": pixels, "labels": label} if labels else {"pixel_values": pixels})
    return made


def maskd(**options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = MasKDLoss(WIDTHS, train_tokens=True, **options)
    return Tap("segformer", "segformer", loss, levels="hidden_states", name="maskd", weight=2.0)


def trainer(tmp_path, taps=None, *, student=None, teacher=None, data=None, kwargs=HIDDEN, extra=None, **arguments):
    torch.manual_seed(0)
    teacher = teacher or segformer(WIDTHS)
    student = student or segformer([8, 16, 24, 32])
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    settings.update(report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant")
    arguments = transformers.TrainingArguments(str(tmp_path), **{**settings, **arguments})
    data = pictures() if data is None else data
    taps = maskd() if taps is None else taps
    return DistillationTrainer(
        student, arguments, teacher=teacher, taps=taps, model_kwargs=kwargs, train_dataset=data, **(extra or {})
    )


def state(trained):
    return copy.deepcopy(trained.distiller.state_dict())


def without_statistics(student):
    """Batch norm would tell one large batch from several small ones."""
    student.decode_head.batch_norm = nn.Identity()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_it_trains_student_aligns_and_losses(tmp_path):
    made = trainer(tmp_path)
    before, teacher = state(made), copy.deepcopy(made.distiller.teacher.state_dict())
    made.train()
    after = state(made)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"aligns.0.3.weight", "losses.0.mask_modules.0.mask_token", "losses.0._iter"} <= moved
    assert any(name.startswith("student.decode_head") for name in moved)
    assert_equal(teacher, made.distiller.teacher.state_dict())
    assert all(p.grad is None for p in made.distiller.teacher.parameters())
    first, *_, summary = made.state.log_history
    assert first["loss"] == pytest.approx(first["loss_task"] + first["loss_maskd"], rel=1e-5)
    assert first["loss_maskd"] > 0
    assert summary["train_loss"] > 0


def test_first_step_is_that_of_a_loop_of_ones_own(tmp_path):
    made = trainer(tmp_path, max_steps=1, weight_decay=0.1, max_grad_norm=0.0, optim="sgd")
    own = copy.deepcopy(made.distiller).train()
    seen = []
    made.distiller.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    made.train()
    output, losses = own(**seen[0])
    (output.loss + losses["maskd"]).backward()
    for (name, p), after in zip(own.named_parameters(), made.distiller.parameters(), strict=True):
        decay = 0.1 if name in made.get_decay_parameter_names(own) else 0.0
        torch.testing.assert_close(after, p - 1e-3 * (p.grad + decay * p), rtol=1e-5, atol=1e-7, msg=name)


def test_accumulated_batches_are_one_batch(tmp_path):
    """Whatever the student would do with the number of items in a batch; the warm-up counts calls."""
    options = {"optim": "sgd", "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 0.1}
    taps = [maskd(custom_mask=False) for _ in range(2)]
    whole = trainer(tmp_path, taps[0], per_device_train_batch_size=4, **options)
    parts = trainer(tmp_path, taps[1], gradient_accumulation_steps=4, per_device_train_batch_size=1, **options)
    for made in (whole, parts):
        without_statistics(made.distiller.student)
        made.train()
    a, b = state(whole), state(parts)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    for one, other in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        for name in ("loss", "loss_task", "loss_maskd"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_resumes_bit_for_bit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    taps = [maskd(custom_mask_warmup=3) for _ in range(2)]  # customised masks begin after the resumption
    whole = trainer(tmp_path / "whole", taps[0], **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", taps[1], seed=5, data_seed=42, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.distiller.losses[0]._iter == 4
    assert_equal(state(whole), state(resumed))


def test_checkpoints_are_the_students(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=4)
    made.train()
    made.save_model(str(tmp_path / "final"))
    pixels = torch.stack([picture["pixel_values"] for picture in pictures(2)])
    expected = made.distiller.student.eval()(pixels).logits
    for folder in ("checkpoint-4", "final"):
        loaded, info = transformers.SegformerForSemanticSegmentation.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(loaded.eval()(pixels).logits, expected)
        assert json.loads((tmp_path / folder / "config.json").read_text())["hidden_sizes"] == [8, 16, 24, 32]
    size = sum(p.numel() for p in made.distiller.student.parameters())
    assert (tmp_path / "final" / "model.safetensors").stat().st_size < 4.5 * size + 20_000  # no teacher in it


def test_evaluation_is_the_students_alone(tmp_path):
    made = trainer(
        tmp_path,
        extra={"eval_dataset": pictures(4, seed=3)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    calls = []
    made.distiller.teacher.register_forward_pre_hook(lambda *_: calls.append(made.distiller.training))
    made.train()
    assert len(calls) == 4
    assert all(calls)
    best = min(log["eval_loss"] for log in made.state.log_history if "eval_loss" in log)
    assert made.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)  # of the best checkpoint, loaded
    prediction = made.predict(pictures(2, seed=3))
    assert prediction.predictions.shape == (2, 5, 16, 16)


def test_labels_are_not_needed(tmp_path):
    tap = Tap("segformer", "segformer", MGDLoss([8, 16, 24, 32], WIDTHS), levels="hidden_states", name="mgd")
    made = trainer(tmp_path, tap, data=pictures(labels=False))
    before = state(made)
    made.train()
    after = state(made)
    assert not torch.equal(before["losses.0.generation.0.0.weight"], after["losses.0.generation.0.0.weight"])
    encoder = [name for name in before if name.startswith("student.segformer")]
    assert not any(torch.equal(before[name], after[name]) for name in encoder if name.endswith("proj.weight"))
    assert made.state.log_history[0]["loss_task"] == 0


def test_the_teacher_gets_no_labels(tmp_path):
    """One with fewer classes than the labels have would fail in its loss."""
    teacher = segformer(WIDTHS)
    teacher.decode_head.classifier = nn.Conv2d(32, 2, 1)
    seen = []
    teacher.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer(tmp_path, teacher=teacher, max_steps=1).train()
    assert seen
    assert all(keys == {"pixel_values", "output_hidden_states"} for keys in seen)


def test_any_iterable_of_samples(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(pictures())

    made = trainer(tmp_path, data=Stream(), max_steps=2)
    assert [type(align) for align in made.distiller.aligns[0]] == [nn.Conv2d] * 4
    made.train()
    assert made.state.log_history[0]["loss_maskd"] > 0


def test_a_loss_function_of_ones_own(tmp_path):
    """Its value counts for all accumulated batches; the distillation's for one each. The log has both as means."""

    def constant(output, labels, num_items_in_batch):  # of all batches together: what Trainer adds up
        return 0.0 * output.logits.mean() + len(output.logits) / 4

    given = {"compute_loss_func": constant}
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.1}
    results = []
    for steps in (1, 4):
        size = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 4 // steps}
        made = trainer(tmp_path, maskd(custom_mask=False), extra=given, **size, **options)
        without_statistics(made.distiller.student)
        made.train()
        results.append(state(made))
        logged = next(entry for entry in made.state.log_history if "loss_task" in entry)
        assert logged["loss_task"] == pytest.approx(1.0)
        assert logged["loss"] == pytest.approx(logged["loss_task"] + logged["loss_maskd"], rel=1e-3)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_label_smoothing(tmp_path):
    """Trainer computes this loss itself, and asks the model for its name."""
    vit = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    teacher, student = (
        transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=c, intermediate_size=32, **vit))
        for c in (32, 16)
    )
    data = [{"pixel_values": torch.rand(3, 64, 64), "labels": i % 3} for i in range(4)]
    layer = next(name for name, _ in student.named_modules() if name.endswith("layers.1") or name.endswith("layer.1"))
    tap = Tap(
        layer, layer, MasKDLoss(32, train_tokens=True), channel_dim=-1, prefix_tokens=1, grid="input", name="maskd"
    )
    made = trainer(tmp_path, tap, student=student, teacher=teacher, data=data, kwargs=None, label_smoothing_factor=0.1)
    before = state(made)
    made.train()
    assert made.state.log_history[0]["loss_maskd"] > 0
    assert not torch.equal(before["aligns.0.0.weight"], made.distiller.aligns[0][0].weight)


def test_activation_checkpointing(tmp_path):
    """Layers that run again in the backward pass are not recorded again, and gradients are the same."""
    results = []
    for checkpointing in (False, True):
        made = trainer(tmp_path, maskd(), activation_checkpointing=checkpointing, max_steps=2)
        made.train()
        assert made.distiller.student.is_activation_checkpointing == checkpointing
        results.append(state(made))
    assert_equal(*results)


def test_bfloat16(tmp_path):
    made = trainer(tmp_path, bf16=True, max_steps=3)
    dtypes = set()
    made.distiller.aligns[0][0].register_forward_hook(lambda _m, _a, output: dtypes.add(output.dtype))
    made.train()
    assert dtypes == {torch.bfloat16}
    log = made.state.log_history
    assert log[0]["loss"] == pytest.approx(log[0]["loss_task"] + log[0]["loss_maskd"], rel=1e-4)


def test_a_teacher_in_bfloat16(tmp_path):
    made = trainer(tmp_path, teacher=segformer(WIDTHS).bfloat16(), max_steps=2)
    made.train()
    assert next(made.distiller.teacher.parameters()).dtype == torch.bfloat16
    assert made.state.log_history[0]["loss_maskd"] > 0


def rt_detr(widths, width):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=widths, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    encoder = {"encoder_in_channels": widths[1:], "encoder_hidden_dim": width, "encoder_ffn_dim": 32}
    decoder = {"d_model": 32, "num_queries": 10, "decoder_layers": 1, "decoder_ffn_dim": 32, "num_denoising": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 3}
    config = transformers.RTDetrConfig(
        backbone_config=backbone, decoder_in_channels=[width] * 3, hidden_expansion=0.5, **encoder, **decoder, **heads
    )
    return transformers.RTDetrForObjectDetection(config)


def test_a_detector(tmp_path):
    """Labels that are lists of dicts; the pyramid within the encoder's output."""
    pytest.importorskip("scipy", reason="RT-DETR matches boxes with it")
    torch.manual_seed(0)
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
    data = [{"pixel_values": torch.rand(3, 64, 64), "labels": box} for _ in range(4)]

    def collate(samples):
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}

    tap = Tap("model.encoder", "model.encoder", MGDLoss([32] * 3, [64] * 3), levels="last_hidden_state", name="mgd")
    models = {"student": rt_detr([8, 16, 24, 32], 32), "teacher": rt_detr([16, 32, 48, 64], 64)}
    made = trainer(
        tmp_path,
        tap,
        data=data,
        kwargs=None,
        extra={"data_collator": collate, "eval_dataset": data},
        gradient_accumulation_steps=2,
        max_steps=2,
        **models,
    )
    made.train()
    assert made.state.log_history[0]["loss_mgd"] > 0
    assert made.evaluate()["eval_loss"] > 0


def one_of_two(rank, folder, size):
    """The parameters after training with a share of the batch, or alone with the whole one."""
    if size == 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29511", ACCELERATE_USE_CPU="true")
    taps = maskd(custom_mask_warmup=2)
    options = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "per_device_train_batch_size": size}
    made = trainer(folder, taps, max_steps=3, ddp_backend="gloo" if size == 1 else None, **options)
    without_statistics(made.distiller.student)
    made.train()
    logs = torch.tensor([log["loss_maskd"] for log in made.state.log_history if "loss_maskd" in log])
    return [logs, *(p for p in made.distiller.parameters())]


class Share:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        return one_of_two(rank, self.folder, 1)


def test_two_processes_are_one(tmp_path):
    first, second = parameters_of_processes(Share(tmp_path), tmp_path)
    assert torch.equal(first, second)
    alone = torch.cat([p.detach().flatten() for p in one_of_two(0, tmp_path, 2)])
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def test_what_does_not_work_is_said(tmp_path):
    with pytest.raises(ValueError, match="model_init: expected None"):
        trainer(tmp_path, extra={"model_init": lambda: segformer(WIDTHS)})
    with pytest.raises(ValueError, match=r"segformer: the loss cannot take .*16, 16, 16"):
        trainer(tmp_path, Tap("segformer", "segformer", MasKDLoss([8] * 4), levels="hidden_states", align=None))
    with pytest.raises(ValueError, match=r"no layer 'backbone'"):
        trainer(tmp_path, Tap("backbone", "backbone", MasKDLoss(WIDTHS)))
    with pytest.raises(ValueError, match="taps: expected another name than 'task'"):
        trainer(tmp_path, Tap("segformer", "segformer", MasKDLoss(WIDTHS), levels="hidden_states", name="task"))
    student = segformer([8, 16, 24, 32])
    with pytest.raises(ValueError, match="optimizers: expected one with the parameters of aligns and losses"):
        trainer(tmp_path, student=student, extra={"optimizers": (torch.optim.SGD(student.parameters()), None)})
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="one GPU a process, got 2"):
        DistillationTrainer(segformer(WIDTHS), arguments, teacher=segformer(WIDTHS), taps=maskd())
    made = trainer(tmp_path)
    made.distiller.student.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"expected distillation.pt"):
        made.train(resume_from_checkpoint=str(tmp_path / "alone"))
