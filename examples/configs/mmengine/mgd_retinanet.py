"""MGD for mmdetection 3.x: RetinaNet-X101 teaches RetinaNet-R50 on COCO, with the authors' released settings.

python tools/train.py mgd_retinanet.py
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"]
custom_imports = dict(imports=["maskd_kernels.integrations.mmengine"])

model = dict(
    _delete_=True,
    type="FeatureDistillation",
    student=_base_.model,
    teacher="mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_1x_coco/"
    "retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth",
    inherit=["neck", "bbox_head"],
    taps=[
        dict(
            student="neck",
            teacher="neck",
            loss=dict(
                type="MGDLoss",
                student_channels=[256] * 5,
                teacher_channels=[256] * 5,
                alpha_mgd=2e-5,
                lambda_mgd=0.65,
            ),
            name="mgd",
        ),
    ],
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
