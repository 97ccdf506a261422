"""The receptive tokens of maskd_retinanet.py alone: the run ends when they are written."""

_base_ = ["./maskd_retinanet.py"]
train_cfg = dict(max_epochs=0)
