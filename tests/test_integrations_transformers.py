"""The Hugging Face Trainer that distils: its own training loop, on data made here; by ``make test-models``."""

import copy
import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="by `make test-models`")
pytest.importorskip("accelerate", reason="by `make test-models`")

from maskd_kernels import MasKDLoss, MGDLoss, Tap
from maskd_kernels.integrations.transformers import DistillationTrainer

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
        for module in made.distiller.modules():  # batches of one have other statistics
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.track_running_stats = 0.0, False
                module.forward = lambda x: x
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
