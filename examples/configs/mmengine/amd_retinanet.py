"""AMD for mmdetection 3.x: mgd_retinanet.py with masks where the teacher attends.

    python tools/train.py amd_retinanet.py

AMD's authors have released no code: alpha is MGD's, the rest the defaults of ``AMDLoss``, which says what is inferred.
"""

_base_ = ["./mgd_retinanet.py"]

model = dict(
    taps=[
        dict(
            student="neck",
            teacher="neck",
            loss=dict(type="AMDLoss", student_channels=[256] * 5, teacher_channels=[256] * 5, alpha_amd=2e-5),
            name="amd",
        ),
    ],
)
