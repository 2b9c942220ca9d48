"""Optimizer and learning rate: both are functions of the config and the step number, so there is no state to resume
besides the optimizer's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssod.modes import TrainConfig
from ssod.nn.backbone import Backbone


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters; norms and biases (1-D) are not decayed.

    Each group carries its `share` of the run's learning rate: `lr_backbone` for the backbone, 1 for the rest.
    """
    body = {id(p) for net in module.modules() if isinstance(net, Backbone) for p in net.parameters()}
    groups: list[dict[str, Any]] = []
    for share, inside in ((1.0, False), (config.lr_backbone, True)):
        chosen = [p for p in module.parameters() if p.requires_grad and (id(p) in body) == inside]
        for decay, matrices in ((config.weight_decay, True), (0.0, False)):
            params = [p for p in chosen if (p.ndim > 1) == matrices]
            groups.append({"params": params, "weight_decay": decay, "share": share, "lr": config.lr0 * share})
    groups = [g for g in groups if g["params"]]
    # One kernel over all parameters reads and writes each number once: a fifth of the time of `foreach` on a CPU.
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr0, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr0, betas=(config.momentum, 0.999), fused=True)


def put_back(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load what `state_dict` gave, also of a run in another number format, or of an optimizer that was not fused.

    Fused kernels go through memory: on a CPU they would, without a word, pair the numbers of a parameter with others of
    a momentum in another layout. (A gradient has its parameter's: autograd sees to that.)
    """
    groups = [{**group, "foreach": None, "fused": True} for group in saved["param_groups"]]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                state[key] = torch.empty_like(p, requires_grad=False).copy_(value)


def lr_at(step: int, iters: int, config: TrainConfig) -> float:
    """Learning rate of a step: linear warm-up from a thousandth, then constant, multistep or cosine."""
    warmup = min(config.warmup_iters, iters // 10)
    factor = 1.0
    if config.schedule == "multistep":
        factor = 0.1 ** sum(step >= round(m * iters) for m in config.milestones)
    elif config.schedule == "cosine":
        factor = 0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / iters))))
    if step < warmup:
        factor *= 0.001 + 0.999 * step / warmup
    return config.lr0 * factor


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
