"""The teacher ends at its last tap: every feature is that of a whole forward, and everything else is left as it was."""

import copy
import threading
import warnings

import pytest
import torch
from helpers import parameters_of_processes
from test_distiller import IMAGE, Net, mse
from torch import nn

from maskd_kernels import Distiller, MasKDLoss, Tap
from maskd_kernels.distill.features import unwrap
from maskd_kernels.distill.recording import Recorder

DETECTOR = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 96}


def ran(model):
    """Names of the modules that start in the next forwards. No hooks: those would make it run whole."""
    names = []

    def noted(name, forward):
        return lambda *args, **kwargs: names.append(name) or forward(*args, **kwargs)

    for name, module in model.named_modules():
        module.forward = noted(name, module.forward)
    return names


def assert_ends(teacher, taps, *inputs, without=(), ends=True):
    """Learns, runs again, and compares bitwise with a whole forward; ``without`` are modules that must not run."""
    teacher.eval()
    with torch.no_grad():
        output, expected = Recorder(teacher, "teacher", taps).run(teacher, inputs, {})
        recorder = Recorder(teacher, "teacher", taps)
        assert recorder.run(teacher, inputs, {}, output=False)[0] is not None  # whole
        names = ran(teacher)
        for _ in range(2):
            output, got = recorder.run(teacher, inputs, {}, output=False)
            assert (output is None) == ends
            assert got.keys() == expected.keys()
            for name, runs in expected.items():
                assert_equal(got[name], runs)
    assert not set(without) & set(names)
    assert not any(m._forward_hooks for m in teacher.modules())


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def neck_loss(d, x=IMAGE):
    """The loss between the necks, by hand."""
    student, teacher = d.student, unwrap(d.teacher)
    return mse(student.neck(student.stem(x)), teacher.neck(teacher.stem(x)))


def images():
    return [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]


@pytest.mark.parametrize(
    ("taps", "without"),
    [
        (["backbone"], ["head", "anchor_generator"]),
        (["backbone.fpn", "backbone.body"], ["head"]),
        (["backbone.body.layer2", "backbone.fpn", "backbone.body.conv1"], ["head"]),
        (["head.regression_head.conv.0"], ["anchor_generator"]),  # runs for five levels
    ],
)
def test_retinanet(taps, without):
    from torchvision.models.detection import retinanet_resnet50_fpn

    assert_ends(retinanet_resnet50_fpn(**DETECTOR), taps, images(), without=without)


def test_faster_rcnn():
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    teacher = fasterrcnn_mobilenet_v3_large_320_fpn(**DETECTOR)
    assert_ends(copy.deepcopy(teacher), ["backbone"], images(), without=["rpn", "roi_heads"])
    assert_ends(teacher, ["rpn.head.conv", "backbone.fpn"], images(), without=["roi_heads"])


def test_deeplab():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    teacher = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    x = torch.rand(2, 3, 64, 64)
    assert_ends(copy.deepcopy(teacher), ["backbone"], x, without=["classifier", "aux_classifier"])
    assert_ends(teacher, ["classifier.4", "backbone"], x, without=["aux_classifier"])


class Levels(nn.Module):
    """A head that runs for each level, in a module of its own or in the model itself."""

    def __init__(self, levels=2, own=True):
        super().__init__()
        self.stem, self.levels, self.own = nn.Conv2d(3, 4, 3), levels, own
        self.neck = Shared()
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x, again=False):
        x = self.stem(x)
        if self.own:
            x = self.neck(x, self.levels)
        else:
            x = [self.neck.conv(x) for _ in range(self.levels)]
        return [self.after(y) for y in x]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x, levels):
        return [self.conv(x * (i + 1)) for i in range(levels)]


def test_head_shared_by_levels():
    assert_ends(Levels(3), ["neck.conv", "stem"], IMAGE, without=["after"])
    assert_ends(Levels(3, own=False), ["neck.conv", "stem"], IMAGE, ends=False)
    assert_ends(Levels(1), ["neck.conv"], IMAGE, without=["after"])


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_number_of_runs_that_changes(levels):
    """All runs are recorded in the call that changes it already, and the teacher runs whole from then on."""
    teacher = Levels(3).eval()
    recorder = Recorder(teacher, "teacher", ["neck.conv"])
    with torch.no_grad():
        for count, ends in ((3, False), (3, True), (levels, False), (3, False), (3, False)):
            teacher.levels = count
            output, got = recorder.run(teacher, (IMAGE,), {}, output=False)
            assert (output is None) == ends
            assert_equal(got["neck.conv"], teacher.neck(teacher.stem(IMAGE), count))


def test_building_again_learns_again():
    teacher = Levels(2).eval()
    recorder = Recorder(teacher, "teacher", ["neck.conv"])
    recorder.run(teacher, (IMAGE,), {}, output=False)
    teacher.levels = 3
    assert recorder.run(teacher, (IMAGE,), {}, learn=True, output=False)[0] is not None
    output, got = recorder.run(teacher, (IMAGE,), {}, output=False)
    assert output is None
    assert len(got["neck.conv"]) == 3


def test_what_is_around_all_runs_may_itself_run_again():
    """All runs were in the first of two runs of a module: then what has it in turn is awaited."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck, self.counts = Shared(), (2, 0)

        def forward(self, x):
            return [y for count in self.counts for y in self.neck(x, count)]

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.twice, self.after = nn.Conv2d(3, 4, 3), Twice(), nn.Identity()

        def forward(self, x):
            return self.after(self.twice(self.stem(x)))

    teacher = Teacher().eval()
    recorder = Recorder(teacher, "teacher", ["twice.neck.conv"])
    for counts, ends in (((2, 0), False), ((2, 0), True), ((2, 1), False)):
        teacher.twice.counts = counts
        output, got = recorder.run(teacher, (IMAGE,), {}, output=False)
        assert (output is None) == ends
        assert len(got["twice.neck.conv"]) == sum(counts)


def test_each_form_of_inputs_is_learned_by_itself():
    """Layers that run once for every image of a list."""

    class PerImage(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, images, flip=False):
            return [self.head(self.stem(x)) for x in images]

    teacher = PerImage().eval()
    recorder = Recorder(teacher, "teacher", ["stem"])
    for count in (1, 2, 1, 3, 2):
        inputs = [torch.randn(3, 8 + i, 8) for i in range(count)]
        _, got = recorder.run(teacher, (inputs,), {}, output=False)
        assert_equal(got["stem"], [teacher.stem(x) for x in inputs])
        batch = torch.stack([torch.randn(3, 8, 8)] * count)
        assert_equal(recorder.run(teacher, (batch,), {}, output=False)[1]["stem"], [teacher.stem(x) for x in batch])
    assert not recorder._whole
    for ends in (False, True):  # sizes are no form, but each of the first ones is looked at
        assert (recorder.run(teacher, ([torch.randn(3, 16, 20)],), {}, output=False)[0] is None) == ends


def test_flags_decide_how_often_layers_run():
    """A layer that has run once ends the forward, so nothing would show that it is to run again."""

    class Iterates(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x, count=1, mode="once", options={}):  # noqa: B006
            x = self.stem(x)
            for _ in range(count + (mode == "again") + options.get("again", False)):
                x = self.block(x)
            return self.head(x)

    teacher = Iterates().eval()
    recorder = Recorder(teacher, "teacher", ["block"])
    for _ in range(2):
        for args, kwargs, runs in (
            ((1,), {}, 1),
            ((2,), {}, 2),
            ((), {"count": 1}, 1),
            ((), {"count": 3}, 3),
            ((), {"mode": "once"}, 1),
            ((), {"mode": "again"}, 2),
            ((), {"options": {"again": False}}, 1),
            ((), {"options": {"again": True}}, 2),
        ):
            _, got = recorder.run(teacher, (IMAGE, *args), kwargs, output=False)
            assert len(got["block"]) == runs
    assert not recorder._whole


def test_annotations_are_no_form():
    """Masks and keypoints come in another number for every image."""
    teacher = Net(4).eval()
    teacher.forward = lambda x, targets=None: Net.forward(teacher, x)
    recorder = Recorder(teacher, "teacher", ["neck"])
    recorder.run(teacher, (IMAGE, [{"masks": torch.ones(1, 4, 4)}] * 2), {}, output=False)
    for count in range(2, 5):
        targets = [{"masks": torch.ones(count, 4, 4), "keypoints": torch.ones(count, 17, 3)}, {}]
        keypoints = {"targets": targets}
        recorder.run(teacher, (IMAGE,), keypoints, output=False)
    assert recorder.run(teacher, (IMAGE,), keypoints, output=False)[0] is None
    assert len(recorder._plans) == 2
    for count in range(100):  # what changes in every call is not remembered for ever
        recorder.run(teacher, (IMAGE[:, :, :2, :2], count), {}, output=False)
    assert len(recorder._plans) == 64


def test_tap_of_the_output_and_tap_that_never_runs():
    assert_ends(Net(4), [""], IMAGE, ends=False)
    assert_ends(Net(4), ["head", "neck"], IMAGE, ends=True)
    with pytest.raises(RuntimeError, match="teacher: the layer 'never' did not run in this forward"):
        Distiller(Net(4), Net(4), [Tap("neck", "neck", mse), Tap("stem", "never", mse)], example_inputs=IMAGE)


def test_layer_that_stops_running():
    class Skips(Net):
        skip = False

        def forward(self, x):
            x = self.stem(x)
            return x if self.skip else self.head(self.neck(x))

    teacher = Skips(4, "tensor")
    d = Distiller(Net(4, "tensor"), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    d(IMAGE)
    teacher.skip = True
    with pytest.raises(RuntimeError, match="teacher: the layer 'neck' did not run in this forward"):
        d(IMAGE)


def test_teacher_of_two_distillers():
    teacher = Net(8).eval()
    a = Distiller(Net(8), teacher, Tap("stem", "stem", mse), example_inputs=IMAGE)
    b = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    names = ran(teacher)
    for _ in range(2):
        torch.testing.assert_close(a(IMAGE)[1]["stem"], mse(a.student.stem(IMAGE), teacher.stem(IMAGE)))
        torch.testing.assert_close(b(IMAGE)[1]["neck"], neck_loss(b))
    assert "head" not in names


def test_student_runs_whole_even_as_its_own_teacher():
    model = Net(8)
    output, losses = Distiller(model, model, Tap("neck", "neck", mse), example_inputs=IMAGE).eval()(IMAGE)
    assert output["logits"].requires_grad
    assert losses["neck"] == 0


def test_teacher_output():
    teacher = Net(8)
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE, teacher_output=True)
    for _ in range(2):
        d(IMAGE)
        assert_equal(d.teacher_output, teacher(IMAGE))
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    d(IMAGE)
    assert d.teacher_output is None
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse))
    d(IMAGE)  # whole, to learn
    assert d.teacher_output is None


def test_hooks_of_others_run():
    """Those on what runs, and those on what would have been cut off: then it runs whole."""
    teacher = Net(8).eval()
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    names, seen = ran(teacher), []
    teacher.stem.register_forward_hook(lambda *_: seen.append("stem"))
    teacher.neck.register_forward_hook(lambda _m, _i, output: [x + 1 for x in output])
    _, losses = d(IMAGE)
    assert seen == ["stem"]
    assert "head" not in names
    torch.testing.assert_close(losses["neck"], neck_loss(d))
    anywhere = nn.modules.module
    for register, expected in (
        (teacher.head.register_forward_hook, teacher.head),
        (teacher.register_forward_hook, teacher),
        (teacher.head.register_forward_pre_hook, teacher.head),
        (anywhere.register_module_forward_hook, teacher),
        (anywhere.register_module_forward_pre_hook, teacher.head),
    ):
        handle = register(lambda module, *_: seen.append(module))
        seen.clear()
        d(IMAGE)
        handle.remove()
        assert expected in seen
    for module in (teacher, teacher.stem):  # what runs anyway
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
    names.clear()
    d(IMAGE)
    assert "head" not in names
    teacher.head._hf_hook = object()  # how Accelerate hooks: in place of the module's forward
    d(IMAGE)
    assert "head" in names


@pytest.mark.parametrize("wrap", [nn.DataParallel, "ddp"])
def test_wrappers(wrap, tmp_path):
    if wrap == "ddp":
        first, second = parameters_of_processes(end_in_ddp, tmp_path)
        assert torch.equal(first, second)
        return
    teacher = Net(8)
    names = ran(teacher)
    d = Distiller(Net(8), wrap(teacher), Tap("neck", "neck", mse), example_inputs=IMAGE)
    names.clear()
    _, losses = d(IMAGE)
    assert "neck" in names
    assert "head" not in names
    torch.testing.assert_close(losses["neck"], neck_loss(d))
    outputs = []
    d.teacher.register_forward_hook(lambda *args: outputs.append(args[-1]))
    d(IMAGE)
    assert len(outputs) == 1
    wrapper = wrap(Net(8))
    wrapper.device_ids = [0, 1]
    with pytest.raises(ValueError, match="teacher: DataParallel splits features over devices"):
        Distiller(Net(8), wrapper, Tap("neck", "neck", mse))


def end_in_ddp(rank):
    torch.manual_seed(0)
    teacher = Net(8)
    names = ran(teacher)
    wrapped = nn.parallel.DistributedDataParallel(teacher)
    d = Distiller(Net(8), wrapped, Tap("neck", "neck", mse), example_inputs=IMAGE)
    names.clear()
    x = torch.ones(2, 3, 16, 16)
    losses = [d(x)[1]["neck"] for _ in range(3)]
    assert "head" not in names
    torch.testing.assert_close(losses[-1], neck_loss(d, x))
    wrapped.train()
    wrapped(x)["logits"].sum().backward()  # its state is not left inside a forward
    return list(teacher.parameters())


class Wrapped(Net):
    """Contexts and decorators that the end has to leave."""

    @torch.inference_mode()
    def inner(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            return super().forward(x)

    def forward(self, x):
        try:
            return self.inner(x)
        except Exception:  # as careless models do
            return None
        finally:
            self.left = True


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inference_and_gradient_mode_are_left_as_found(outside):
    def state():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
        )

    teacher = Wrapped(8)
    d = Distiller(Net(8), teacher, Tap("neck", "neck", MasKDLoss([8, 8])), example_inputs=IMAGE)
    names = ran(teacher)
    with torch.autocast("cpu", dtype=torch.float16, enabled=outside):
        before = state()
        _, losses = d(IMAGE)
        assert state() == before
    assert "head" not in names
    assert teacher.left
    assert not d._teacher_recorder._whole
    losses["neck"].backward()
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0


class Fails(Net):
    def forward(self, x):
        self.stem(x)
        if self.fails:
            raise self.fails
        return super().forward(x)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine"), StopIteration("mine")])
def test_exceptions_of_the_model_pass(error):
    teacher = Fails(8)
    teacher.fails = None
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    expected = d(IMAGE)[1]["neck"]
    for _ in range(2):
        teacher.fails = error
        with pytest.raises(type(error), match="mine") as caught:
            d(IMAGE)
        assert caught.value is error
        assert not any(m._forward_hooks for m in teacher.modules())
        assert d._teacher_recorder._records is None
        teacher.fails = None
        torch.testing.assert_close(d(IMAGE)[1]["neck"], expected)


def test_exceptions_that_the_model_catches():
    """Layers within that have no end do not hide the ends of those around them."""

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right, self.after = nn.Conv2d(5, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            try:
                return self.after(self.wrong(x))
            except RuntimeError:
                return self.after(self.right(x))

    assert_ends(nn.Sequential(Tries(), nn.Conv2d(4, 4, 1)), ["0", "0.right"], IMAGE, without=["1"])


def test_layer_that_was_taken_out():
    teacher = Net(8)
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    del teacher.head
    teacher.head = lambda x: x
    for _ in range(2):
        torch.testing.assert_close(d(IMAGE)[1]["neck"], neck_loss(d))


class NeedsItsEnd(Net):
    """Models that do not bear the end: one swallows it, one breaks when it cleans up."""

    def forward(self, x):
        self.logits = None
        try:
            self.logits = super().forward(x)
        except BaseException:
            if self.swallows:
                return {}
            raise
        finally:
            if not self.swallows:
                self.logits["logits"]
        return self.logits


@pytest.mark.parametrize("swallows", [True, False])
def test_models_that_do_not_bear_it_run_whole(swallows):
    teacher = NeedsItsEnd(8)
    teacher.swallows = swallows
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    names = ran(teacher)
    for _ in range(3):
        names.clear()
        _, losses = d(IMAGE)
        torch.testing.assert_close(losses["neck"], neck_loss(d))
        names = names[: names.index("head") + 1] if "head" in names else names
    assert d._teacher_recorder._whole


def test_end_of_another_forward_passes():
    """A distiller inside a teacher: each takes its own end."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = nn.Conv2d(3, 4, 1)
            object.__setattr__(self, "inner", Distiller(Net(8), Net(8), Tap("neck", "neck", mse), example_inputs=IMAGE))

        def forward(self, x):
            self.loss = self.inner(x)[1]["neck"]
            return self.neck(x)

    teacher = Inner()
    assert_ends(nn.Sequential(teacher, nn.Conv2d(4, 4, 1)), ["0.neck"], IMAGE, without=["1"])
    assert teacher.loss > 0

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Distiller(Net(8), Net(8), Tap("neck", "neck", mse), example_inputs=IMAGE)
            self.after = nn.Identity()

        def forward(self, x):
            return self.after(self.inner(x)[0]["logits"])

    assert_ends(Outer(), ["inner.student.neck"], IMAGE, without=["inner.student.head", "after"])


def test_compiled_teacher_runs_whole_and_says_so_once():
    torch._dynamo.reset()
    teacher = Net(8).eval()
    d = Distiller(Net(8), torch.compile(teacher, backend="eager"), Tap("neck", "neck", mse))
    with pytest.warns(UserWarning, match="teacher: under torch.compile it runs whole, as 'neck' is inside"):
        d(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, losses = d(IMAGE)
    torch.testing.assert_close(losses["neck"], neck_loss(d))


def test_teacher_with_a_compiled_part_ends():
    torch._dynamo.reset()
    teacher = Net(8).eval()
    teacher.neck = torch.compile(teacher.neck, backend="eager")
    d = Distiller(Net(8), teacher, Tap("neck", "neck", mse), example_inputs=IMAGE)
    names = []
    head = teacher.head.forward
    teacher.head.forward = lambda x: names.append("head") or head(x)
    for _ in range(2):
        _, losses = d(IMAGE)
        torch.testing.assert_close(losses["neck"], neck_loss(d))
    assert not names


def test_in_place_operations_and_the_end():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)).eval()
    assert_ends(teacher, ["0", "1"], IMAGE, without=["2", "3"])


def test_threads_with_a_teacher_each():
    """Nothing of the end is shared by the process."""
    distillers = [Distiller(Net(8), Net(8), Tap("neck", "neck", mse), example_inputs=IMAGE) for _ in range(2)]
    expected = [d(IMAGE)[1]["neck"].item() for d in distillers]
    results = [[], []]

    def run(i):
        results[i] += [distillers[i](IMAGE)[1]["neck"].item() for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[expected[0]] * 5, [expected[1]] * 5]


class Windows(nn.Module):
    """Runs its body once for each window of 8 pixels, and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return [self.head(self.body(window)) for window in x.split(8, -1)]


def runs_of(recorder, teacher, width):
    """Whether it ran whole, and how often its body did, for images of this width."""
    with torch.no_grad():
        output, got = recorder.run(teacher, (torch.rand(2, 3, 8, width),), {}, output=False)
    return output is not None, len(got["body"])


def test_sizes_that_decide_how_often_a_layer_runs():
    """No call loses a window, neither the one that shows it nor those after it."""
    teacher = Windows().eval()
    recorder = Recorder(teacher, "teacher", ["body"])
    assert [runs_of(recorder, teacher, width) for width in (8, 8)] == [(True, 1), (False, 1)]
    assert [runs_of(recorder, teacher, width) for width in (24, 8, 16)] == [(True, 3), (True, 1), (True, 2)]


def test_sizes_that_decide_how_often_a_layer_runs_inside_another():
    """What is awaited is the same module; how often the layer has run when it ends is not."""
    teacher = nn.Sequential(Windows(), nn.Identity()).eval()
    recorder = Recorder(teacher, "teacher", ["0.body"])
    counts = []
    with torch.no_grad():
        for width in (16, 16, 24, 16):
            output, got = recorder.run(teacher, (torch.rand(2, 3, 8, width),), {}, output=False)
            counts.append((output is not None, len(got["0.body"])))
    assert counts == [(True, 2), (False, 2), (True, 3), (True, 2)]


def test_clips_of_another_length():
    class Clip(Windows):
        def forward(self, x):
            return [self.head(self.body(frame)) for frame in x.unbind(1)]

    teacher = Clip().eval()
    recorder = Recorder(teacher, "teacher", ["body"])
    for frames in (1, 1, 4, 2):
        _, got = recorder.run(teacher, (torch.rand(2, frames, 3, 8, 8),), {}, output=False)
        assert len(got["body"]) == frames


def test_sizes_are_checked_eight_times():
    teacher = Windows().eval()
    recorder = Recorder(teacher, "teacher", ["body"])
    whole = [runs_of(recorder, teacher, width)[0] for width in (1, 2, 3, 4, 5, 6, 7, 8, 1)]
    assert whole == [True] * 8 + [False]
    with torch.no_grad():
        assert recorder.run(teacher, (torch.rand(2, 3, 9, 8),), {}, output=False)[0] is None  # a ninth is trusted


def test_threads_that_share_a_teacher():
    """What one forward records and where it ends is none of the other's business."""
    teacher, entered, go_on = Net(8).eval(), threading.Event(), threading.Event()
    recorder = Recorder(teacher, "teacher", ["neck"])
    images = torch.rand(2, *IMAGE.shape[1:])
    for _ in range(2):  # the second ends
        output, expected = recorder.run(teacher, (IMAGE,), {}, output=False)
    assert output is None

    def wait(_module, _inputs, _output):
        if threading.current_thread() is not threading.main_thread():
            return
        entered.set()
        assert go_on.wait(60)

    others = []

    def other():
        assert entered.wait(60)
        others.append(teacher(images))  # between the main thread's stem and neck
        go_on.set()

    def other_or_not():
        try:
            other()
        finally:
            go_on.set()

    thread = threading.Thread(target=other_or_not)
    teacher.stem.register_forward_hook(wait)
    thread.start()
    output, got = recorder.run(teacher, (IMAGE,), {}, output=False)
    thread.join()
    assert output is None
    assert_equal(got["neck"], expected["neck"])
    go_on.set()
    assert_equal(others[0], teacher(images))


def test_inference_mode_first():
    """Nothing learned in inference mode, which shows no change of a tensor, is taken for other calls."""

    def net():
        layers = (
            nn.Conv2d(3, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 1),
        )
        return nn.Sequential(*layers)

    distiller = Distiller(net(), net(), [Tap("0", "0", mse, align=None), Tap("2", "2", mse, align=None)]).eval()
    with torch.inference_mode():
        expected = distiller(IMAGE)[1]
    distiller.train()
    for name, loss in distiller(IMAGE)[1].items():
        assert loss.item() == expected[name].item()
