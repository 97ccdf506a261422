"""MasKD for mmdetection 3.x: RetinaNet-R101 teaches RetinaNet-R50 on COCO, with the authors' released settings.

    python tools/train.py maskd_retinanet.py

Receptive tokens come first, into the file that ``out`` names. ``pretrained=<that file>`` in the loss spares later runs
the learning; tokens_retinanet.py does nothing else.
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"]  # the student, its data and its schedule
custom_imports = dict(imports=["maskd_kernels.integrations.mmengine"])

model = dict(
    _delete_=True,
    type="FeatureDistillation",
    student=_base_.model,
    teacher="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/"
    "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",
    inherit=["neck", "bbox_head"],
    taps=[
        dict(
            student="neck",
            teacher="neck",
            loss=dict(type="MasKDLoss", channels=[256] * 5, num_tokens=6, custom_mask_warmup=7000, loss_weight=7.0),
            align=dict(type="AlignConnector", student_channels=[256] * 5, teacher_channels=[256] * 5),
            name="maskd",
        ),
        dict(
            student="bbox_head.retina_reg",
            teacher="bbox_head.retina_reg",
            loss=dict(type="PyramidSmoothL1Loss", loss_weight=1.0),
            name="boxes",
        ),
    ],
)

# Adam, lr 0.01 and weight decay 0.001 are the hook's defaults.
custom_hooks = [dict(type="TokenTrainingHook", iterations=2000, out="tokens_retinanet_r101.pth")]
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
