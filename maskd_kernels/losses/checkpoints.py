"""Receptive tokens in the authors' checkpoint formats."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Source = str | os.PathLike[str] | Mapping[str, Any]


def read_state(source: Source) -> dict[str, Tensor]:
    """The parameters in a checkpoint: plain, or nested under ``state_dict``. Nothing in it is executed.

    Args:
        source: a file's path, or a checkpoint already loaded.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: a file that holds no parameters, or that only loads by executing code.
    """
    if isinstance(source, Mapping):
        checkpoint, name = source, "the given mapping"
    else:
        name = os.fspath(source)
        try:
            checkpoint = torch.load(name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"pretrained: no such file: {name}") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"pretrained: expected a checkpoint file, got a folder: {name}") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(
                f"pretrained: {name} cannot be read as a checkpoint of tensors alone (weights_only=True): {error}"
            ) from error
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"pretrained: expected a mapping of names to tensors in {name}, got {type(checkpoint).__name__}"
        )
    return {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def load_tokens(module: nn.Module, source: Source, *, attribute: str) -> None:
    """Loads every parameter under ``module.<attribute>`` strictly, whatever precedes it in the checkpoint's names.

    Args:
        module: the module that owns the tokens.
        source: a file's path, or a checkpoint already loaded.
        attribute: ``mask_modules`` (detection: a list, one per level) or ``mask_module`` (segmentation). A
            checkpoint of a single mask module (its names begin with ``mask_token``) is taken too where one is due.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: missing or surplus parameters, or other shapes, each named.
    """
    state = read_state(source)
    expected = {f"{attribute}.{k}": v for k, v in getattr(module, attribute).state_dict().items()}
    single = f"{attribute}.0." if attribute == "mask_modules" else f"{attribute}."
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        at = key.find(attribute + ".")
        if at >= 0:
            found[key[at:]] = value
        else:
            for start in ("mask_token", "prob."):
                at = key.find(start)
                if at >= 0 and (at == 0 or key[at - 1] == "."):
                    found[single + key[at:]] = value
    where = "the given mapping" if isinstance(source, Mapping) else os.fspath(source)
    if not any(key.endswith("mask_token") for key in found):
        some = ", ".join(list(state)[:3]) or "nothing"
        raise ValueError(f"pretrained: no receptive tokens (mask_token) in {where}, which holds {some}")
    held, wanted = (len({key.split(".")[1] for key in keys}) for keys in (found, expected))
    if attribute == "mask_modules" and held != wanted:
        raise ValueError(f"pretrained: {where} holds {held} level(s), the module has {wanted}")
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or surplus:
        raise ValueError(
            f"pretrained: {where} does not fit the module: missing {', '.join(missing) or 'nothing'};"
            f" not expected {', '.join(surplus) or 'nothing'} (are weight_mask and the number of levels right?)"
        )
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise ValueError(
                f"pretrained: {key}: expected {list(value.shape)}, got {list(found[key].shape)} in {where}"
            )
    getattr(module, attribute).load_state_dict({k[len(attribute) + 1 :]: v for k, v in found.items()}, strict=True)
