"""Receptive tokens in the authors' checkpoint formats, and in those of this package's losses.

========================  ==========================================================================================
``detection``             the authors' detection code and ``TokenTrainer.save``: ``mask_modules.{level}.mask_token`` and
                          ``.prob.*``, nested under ``state_dict``
``segmentation``          the authors' segmentation code: one level, ``mask_token`` alone
``loss``                  ``MasKDLoss.state_dict()``: ``mask_modules.*`` and the warm-up counter ``_iter``
``segmentation-loss``     ``MasKDSegLoss.state_dict()``: ``mask_module.mask_token``
========================  ==========================================================================================
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FORMATS = ("detection", "segmentation", "loss", "segmentation-loss")
_PARAMETER = re.compile(r"(.*\.|)(mask_token|prob\.[02]\.(?:weight|bias))$")  # of a module, whose name comes first
_LEVEL = re.compile(r"(?:^|\.)mask_modules\.(\d+)\.$")

Source = str | os.PathLike[str] | Mapping[str, Any]


def read_state(source: Source, argument: str = "pretrained") -> dict[str, Tensor]:
    """The parameters in a checkpoint: plain, or nested under ``state_dict``. Nothing in it is executed.

    Args:
        source: a file's path, or a checkpoint already loaded.
        argument: what messages call it.

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
            raise FileNotFoundError(f"{argument}: no such file: {name}") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"{argument}: expected a checkpoint file, got a folder: {name}") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(
                f"{argument}: {name} cannot be read as a checkpoint of tensors alone (weights_only=True): "
                f"{str(error) or type(error).__name__}"
            ) from error
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{argument}: expected a mapping of names to tensors in {name}, got {type(checkpoint).__name__}"
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
        raise _without_tokens("pretrained", where, state)
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


def read_tokens(source: Source) -> list[dict[str, Tensor]]:
    """The parameters of each level in a checkpoint of any of ``FORMATS``, whatever precedes them in its names.

    Returns:
        Per level ``mask_token`` ``[K, C]``, and where masks are weighted ``prob.0.weight`` ``[C, C, 3, 3]``,
        ``prob.0.bias`` ``[C]``, ``prob.2.weight`` ``[K, C, 1, 1]`` and ``prob.2.bias`` ``[K]``.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: a file that holds no tokens, several of one level, or parameters that do not fit each other.
    """
    where = "the given mapping" if isinstance(source, Mapping) else os.fspath(source)
    state = read_state(source, "tokens")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _PARAMETER.match(key)
        if match is not None:
            modules.setdefault(match[1], {})[match[2]] = value
    tokens: dict[int, dict[str, Tensor]] = {}
    for name, module in modules.items():
        numbered = _LEVEL.search(name)
        number = int(numbered[1]) if numbered else 0
        if "mask_token" in module and number in tokens:
            raise ValueError(f"tokens: {where} holds several tokens of level {number}, {name}mask_token among them")
        if "mask_token" in module:
            tokens[number] = module
    if not tokens:
        raise _without_tokens("tokens", where, state)
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError(f"tokens: expected levels from 0 on in {where}, got {', '.join(map(str, sorted(tokens)))}")
    levels = [tokens[number] for number in range(len(tokens))]
    for number, level in enumerate(levels):
        _check_level(level, f"tokens: level {number} of {where}")
    return levels


def _without_tokens(argument: str, where: str, state: Mapping[str, Tensor]) -> ValueError:
    some = ", ".join(list(state)[:3]) or "no tensors at its top level or under state_dict"
    return ValueError(f"{argument}: no receptive tokens (mask_token) in {where}, which holds {some}")


def _check_level(level: Mapping[str, Tensor], where: str) -> None:
    tokens = level["mask_token"]
    if tokens.dim() != 2 or not tokens.numel() or not tokens.is_floating_point() or tokens.layout != torch.strided:
        found = f"{list(tokens.shape)}, {str(tokens.dtype)[6:]}, {str(tokens.layout)[6:]}"
        raise ValueError(f"{where}: expected mask_token [K, C], floating, strided, got {found}")
    k, c = level["mask_token"].shape
    weighting = {
        "prob.0.weight": [c, c, 3, 3],
        "prob.0.bias": [c],
        "prob.2.weight": [k, c, 1, 1],
        "prob.2.bias": [k],
    }
    for key, shape in weighting.items() if len(level) > 1 else ():
        if key not in level:
            raise ValueError(f"{where}: {key} is missing beside {', '.join(sorted(level))}")
        if list(level[key].shape) != shape:
            got = list(level[key].shape)
            raise ValueError(f"{where}: {key}: expected {shape} for {k} tokens of {c} channels, got {got}")


def as_checkpoint(levels: list[dict[str, Tensor]], form: str) -> dict[str, Any]:
    """What ``torch.save`` writes for levels of ``read_tokens``, in one of ``FORMATS``.

    Raises:
        ValueError: no such format; several levels or a weighting in a format that has no place for it.
    """
    if form not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if form in ("segmentation", "segmentation-loss"):
        if len(levels) != 1:
            raise ValueError(f"format: {form} holds one level, got {len(levels)}")
        if len(levels[0]) > 1:
            raise ValueError(f"format: {form} has no weighting of masks, these tokens were learned with one")
        prefix = "mask_module." if form == "segmentation-loss" else ""
        return {prefix + "mask_token": levels[0]["mask_token"]}
    state = {f"mask_modules.{number}.{key}": x for number, level in enumerate(levels) for key, x in level.items()}
    if form == "loss":
        return {**state, "_iter": torch.zeros((), dtype=torch.int64)}
    return {"state_dict": state}
