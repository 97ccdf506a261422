"""MasKD for mmsegmentation 1.x: DeepLabV3-R101 teaches DeepLabV3-R18 on Cityscapes, by the logits.

    python tools/train.py maskd_deeplabv3.py

Tokens, their training and the loss (with its factor of 0.5) are the authors' released settings; data and schedule are
mmsegmentation's (80,000 iterations of 8 images, not 40,000 of 16), and so are the teacher's weights.
"""

_base_ = ["mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"]
custom_imports = dict(imports=["maskd_kernels.integrations.mmengine"])

model = dict(
    _delete_=True,
    type="FeatureDistillation",
    student=_base_.model,
    teacher="mmseg::deeplabv3/deeplabv3_r101-d8_4xb2-80k_cityscapes-512x1024.py",
    teacher_ckpt="https://download.openmmlab.com/mmsegmentation/v0.5/deeplabv3/deeplabv3_r101-d8_512x1024_80k_cityscapes/"
    "deeplabv3_r101-d8_512x1024_80k_cityscapes_20200606_113503-9e428899.pth",
    taps=[
        dict(
            student="decode_head.conv_seg",  # mmsegmentation calls its head's forward, which no hook sees
            teacher="decode_head.conv_seg",
            loss=dict(type="MasKDSegLoss", channels=19, num_tokens=8, loss_weight=0.5),
            name="maskd",
        ),
    ],
)

custom_hooks = [
    dict(
        type="TokenTrainingHook",
        iterations=10000,
        optimizer=dict(type="SGD", lr=0.1),
        out="tokens_deeplabv3_r101.pth",
    )
]
