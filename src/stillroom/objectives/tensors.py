"""Targets on a device: numpy arrays, as a store gives them, become torch tensors once per batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from stillroom.targets.kinds import (
    Array,
    DrawnTargets,
    FullTargets,
    HiddenTargets,
    SampledTargets,
    Targets,
    TeacherHead,
    TextTargets,
    TopKTargets,
)

T = TypeVar("T", bound=Targets)

# The last head that was moved, so that a store's one head is not moved again for every batch: (what it was made from, device, the tensors).
_last_head: tuple[TeacherHead, torch.device, TeacherHead] | None = None


def as_tensors(targets: T, device: torch.device | str) -> T:
    """The same targets with every array a torch tensor on `device`; ids become int64, states stored as uint16 become bfloat16.

    Tensors that are already there are not copied, and neither are writable numpy arrays on the CPU: they must not be written to afterwards.
    """
    place = torch.device(device)
    match targets:
        case TextTargets():
            return replace(targets, token_ids_R=_ids(targets.token_ids_R, place))
        case SampledTargets():
            return replace(targets, token_ids_R=_ids(targets.token_ids_R, place), log_probs_R=as_tensor(targets.log_probs_R, place))
        case DrawnTargets():
            return replace(
                targets,
                offsets_R1=_ids(targets.offsets_R1, place),
                ids_U=_ids(targets.ids_U, place),
                counts_U=as_tensor(targets.counts_U, place),
                entropy_R=as_tensor(targets.entropy_R, place),
            )
        case TopKTargets():
            return replace(
                targets,
                ids_RK=_ids(targets.ids_RK, place),
                log_probs_RK=as_tensor(targets.log_probs_RK, place),
                tail_log_mass_R=as_tensor(targets.tail_log_mass_R, place),
            )
        case HiddenTargets():
            return replace(targets, states_RD=as_tensor(targets.states_RD, place), head=_head(targets.head, place))
        case FullTargets():
            return replace(targets, log_probs_RV=as_tensor(targets.log_probs_RV, place))


def as_arrays(targets: T) -> T:
    """The same targets with every array in numpy, as a store takes them; bfloat16 becomes uint16, its bits."""
    match targets:
        case TextTargets():
            return replace(targets, token_ids_R=_array(targets.token_ids_R))
        case SampledTargets():
            return replace(targets, token_ids_R=_array(targets.token_ids_R), log_probs_R=_array(targets.log_probs_R))
        case DrawnTargets():
            return replace(
                targets,
                offsets_R1=_array(targets.offsets_R1),
                ids_U=_array(targets.ids_U),
                counts_U=_array(targets.counts_U),
                entropy_R=_array(targets.entropy_R),
            )
        case TopKTargets():
            return replace(
                targets,
                ids_RK=_array(targets.ids_RK),
                log_probs_RK=_array(targets.log_probs_RK),
                tail_log_mass_R=_array(targets.tail_log_mass_R),
            )
        case HiddenTargets():
            return replace(targets, states_RD=_array(targets.states_RD), head=head_as_arrays(targets.head))
        case FullTargets():
            return replace(targets, log_probs_RV=_array(targets.log_probs_RV))


def head_as_arrays(head: TeacherHead) -> TeacherHead:
    """The same head in numpy."""
    return replace(head, weight_VD=_array(head.weight_VD), bias_V=None if head.bias_V is None else _array(head.bias_V))


def head_logits_RV(states_RD: Tensor, head: TeacherHead, dtype: torch.dtype) -> Tensor:
    """The teacher's logits in `dtype`; weights of another type are widened a block at a time, but where `product_dtype` says that they need not be."""
    states_RD = states_RD.to(product_dtype(head, dtype))
    if states_RD.dtype != dtype:
        logits_RV: Tensor = torch.cat([(states_RD @ block.T).to(dtype) for block in head.weight_VD.split(16_384)], dim=1)
    elif head.weight_VD.dtype == dtype:
        logits_RV = states_RD @ head.weight_VD.T
    else:
        logits_RV = torch.cat([states_RD @ block.to(dtype).T for block in head.weight_VD.split(16_384)], dim=1)
    if head.bias_V is not None:
        logits_RV = logits_RV + head.bias_V.to(dtype)
    if head.softcap is not None:
        logits_RV = head.softcap * torch.tanh(logits_RV / head.softcap)
    return logits_RV * head.scale if head.scale != 1.0 else logits_RV


def product_dtype(head: TeacherHead, dtype: torch.dtype) -> torch.dtype:
    """What a teacher's states are multiplied with its head in, for logits in `dtype`: bfloat16 where a teacher computed in it, and float32 is asked for.

    Such a teacher's own logits are no more exact: its product rounds them to 2^-9 of themselves. float64 is asked for by what checks others.
    """
    return torch.bfloat16 if head.weight_VD.dtype == torch.bfloat16 and dtype == torch.float32 else dtype


def as_tensor(array: Array, device: torch.device) -> Tensor:
    """One array as a tensor on `device`, as in `as_tensors`."""
    if isinstance(array, numpy.ndarray):
        # torch has no read-only tensors, so what is read-only (memory-mapped) is copied.
        array = torch.from_numpy(numpy.require(array, requirements=["C", "W"]))
    tensor: Tensor = array
    if tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.detach().to(device)


def _array(array: Array) -> Array:
    if not isinstance(array, Tensor):
        return array
    array = array.detach().cpu()
    return array.view(torch.uint16).numpy() if array.dtype == torch.bfloat16 else array.numpy()


def _ids(array: Array, device: torch.device) -> Tensor:
    ids = as_tensor(array, device).long()
    # Autograd keeps the ids that it gathers by, and refuses to keep what was made in inference mode.
    return ids.clone() if ids.is_inference() else ids


def _is_same(one: TeacherHead, other: TeacherHead) -> bool:
    """Whether two are the same head: a live teacher, whose weights do not change, makes a new object of it for every batch."""
    if one is other:
        return True
    ours, theirs = one.weight_VD, other.weight_VD
    shared = isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape
    return shared and (one.scale, one.softcap) == (other.scale, other.softcap)


def _head(head: TeacherHead, device: torch.device) -> TeacherHead:
    global _last_head
    if isinstance(head.weight_VD, Tensor) and head.weight_VD.device == device:
        return head
    if _last_head is None or _last_head[1] != device or not _is_same(_last_head[0], head):
        bias_V = None if head.bias_V is None else as_tensor(head.bias_V, device)
        _last_head = (head, device, replace(head, weight_VD=as_tensor(head.weight_VD, device), bias_V=bias_V))
    return _last_head[2]
