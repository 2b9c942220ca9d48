"""Deformable DETR checkpoints of Hugging Face transformers: their names, shapes and config in our words.

Names of version 5 (`backbone.model`, `mlp.fc1`, `o_proj`) and of those before it (`backbone.conv_encoder.model`, `fc1`,
`out_proj`) are read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssod.errors import UserError

DEFAULT_POINTS, DEFAULT_QUERIES = 4, 300  # what transformers' configs leave out where it is the default
FIRST_STRIDE = 8  # of a pyramid; a single level has stride 32

# Applied in turn to each name; the older names first become the newer ones.
RENAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^model\.", ""),
    (r"^backbone\.conv_encoder\.", "backbone."),
    (r"^backbone\.model\.", "backbone.net."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"(layers\.\d+)\.(fc[12])\.", r"\1.mlp.\2."),
    # the ResNet of transformers has timm's layers under other names
    (r"^backbone\.net\.embedder\.embedder\.convolution\.", "backbone.net.conv1."),
    (r"^backbone\.net\.embedder\.embedder\.normalization\.", "backbone.net.bn1."),
    (r"^backbone\.net\.encoder\.stages\.(\d)\.layers\.", lambda m: f"backbone.net.layer{int(m[1]) + 1}."),
    (r"(layer\d\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
    (r"(layer\d\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
    (r"(layer\d\.\d+)\.layer\.(\d)\.convolution\.", lambda m: f"{m[1]}.conv{int(m[2]) + 1}."),
    (r"(layer\d\.\d+)\.layer\.(\d)\.normalization\.", lambda m: f"{m[1]}.bn{int(m[2]) + 1}."),
    # the transformer
    (r"^encoder\.layers\.", "encoder."),
    (r"^decoder\.layers\.", "decoder."),
    (r"^(encoder\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.\d+)\.self_attn_layer_norm\.", r"\1.norm."),
    (r"^(decoder\.\d+)\.encoder_attn\.", r"\1.attention."),
    (r"^(decoder\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm."),
    (r"^(decoder\.\d+)\.self_attn_layer_norm\.", r"\1.self_norm."),
    (r"^(decoder\.\d+)\.self_attn\.v_proj\.", r"\1.self_attention.value."),
    (r"^(decoder\.\d+)\.self_attn\.o_proj\.", r"\1.self_attention.output."),
    (r"\.attention\.sampling_offsets\.", ".attention.offsets."),
    (r"\.attention\.attention_weights\.", ".attention.weights."),
    (r"\.attention\.(value|output)_proj\.", r".attention.\1."),
    (r"\.mlp\.fc1\.", ".feed_forward.inner."),
    (r"\.mlp\.fc2\.", ".feed_forward.outer."),
    (r"\.final_layer_norm\.", ".feed_forward.norm."),
    (r"^reference_points\.", "reference."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^enc_output\.", "memory.0."),
    (r"^enc_output_norm\.", "memory.1."),
    (r"^pos_trans\.", "query.0."),
    (r"^pos_trans_norm\.", "query.1."),
    # the heads, of which the decoder may hold the same once more
    (r"^(decoder\.)?class_embed\.", r"\1cls_heads."),
    (r"^(decoder\.)?bbox_embed\.(\d+)\.layers\.(\d)\.", lambda m: f"{m[1] or ''}box_heads.{m[2]}.{2 * int(m[3])}."),
]
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def from_transformers(
    state: dict[str, Tensor], config: dict[str, Any] | None
) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """A transformers Deformable DETR as (options of `deformable_detr`, num_classes, state dict in our names).

    config  its parsed config.json; without it everything is read off the shapes, with 4 points per head assumed

    The options are the architecture's alone; `loss_options` has those of the loss. All class rows are kept, also those
    of a 91-class COCO model that no category uses. Raises UserError for another model and for parts not offered here.
    """
    named = {_renamed(k): v for k, v in state.items()}
    if "level_embed" not in named or "encoder.0.attention.offsets.weight" not in named:
        first = next(iter(state), "")
        raise UserError(f"These are no weights of a transformers Deformable DETR: the first tensor is '{first}'.")
    _refuse_unknown_parts(config or {})

    levels, width = named.pop("level_embed").shape
    options: dict[str, Any] = {
        "levels": levels,
        "width": width,
        "encoder_layers": _count(named, "encoder"),
        "decoder_layers": _count(named, "decoder"),
        "feed_forward": len(named["encoder.0.feed_forward.inner.weight"]),
        "two_stage": "memory.0.weight" in named,
    }
    options["box_refine"] = options["two_stage"] or _refines(named, config)
    both = len(named["encoder.0.attention.weights.weight"]) // levels  # heads times points
    options["points"] = (config or {}).get("encoder_n_points", DEFAULT_POINTS)
    options["heads"] = both // options["points"]
    if "query_embed.weight" in named:
        options["queries"] = len(named["query_embed.weight"])
    else:
        options["queries"] = (config or {}).get("two_stage_num_proposals", DEFAULT_QUERIES)
    if config is not None:
        options["dropout"] = float(config.get("dropout", 0.1))

    strides = [FIRST_STRIDE << i for i in range(levels)] if levels > 1 else [32]
    embeds = next(v for k, v in state.items() if k.endswith("level_embed"))
    ours = {f"level_embed.{s}": embeds[i] for i, s in enumerate(strides)}
    ours |= _heads(named, options)
    for name, value in named.items():
        if re.match(r"(decoder\.)?(cls|box)_heads\.", name):
            continue
        if match := re.match(r"(decoder\.\d+)\.self_attn\.q_proj\.(weight|bias)$", name):
            key = named[name.replace("q_proj", "k_proj")]
            ours[f"{match[1]}.self_attention.query_key.{match[2]}"] = torch.cat([value, key])
        elif match := re.match(r"input_proj\.(\d+)\.(.*)", name):
            ours[f"project.{strides[int(match[1])]}.{match[2]}"] = value
        elif ".self_attn.k_proj." not in name:
            ours[name] = value
            if name.startswith("backbone.") and name.endswith(".running_mean"):  # which frozen norms do not save
                ours[name.replace("running_mean", "num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    return options, len(ours["cls_heads.0.weight"]), ours


def loss_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options under which our loss is transformers' own for a config. It has none for the proposals."""
    return {
        "cls_coef": 1.0,
        "l1_coef": float(config.get("bbox_loss_coefficient", 5)),
        "giou_coef": float(config.get("giou_loss_coefficient", 2)),
        "aux_coef": float(bool(config.get("auxiliary_loss", False))),
        "encoder_coef": 0.0,
        "cls_cost": float(config.get("class_cost", 1)),
        "l1_cost": float(config.get("bbox_cost", 5)),
        "giou_cost": float(config.get("giou_cost", 2)),
        "focal_alpha": float(config.get("focal_alpha", 0.25)),
    }


def backbone_name(state: dict[str, Tensor], config: dict[str, Any] | None) -> str | None:
    """timm's name of the backbone in a transformers Deformable DETR; None where neither config nor shapes tell."""
    config = config or {}
    inner = config.get("backbone_config") or {}
    name = inner.get("backbone") or config.get("backbone")
    if name:
        return str(name)
    parts = [re.match(r"backbone\.net\.layer(\d)\.(\d+)\.(conv3)?", _renamed(k)) for k in state]
    blocks = {(int(m[1]), int(m[2])) for m in parts if m}
    depths = tuple(sum(stage == s for stage, _ in blocks) for s in (1, 2, 3, 4))
    bottleneck = any(m[3] for m in parts if m)
    return next((n for known, n in RESNETS.items() if known == (depths, bottleneck)), None)


def _renamed(name: str) -> str:
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    return name


def _count(named: dict[str, Tensor], part: str) -> int:
    return 1 + max(int(m[1]) for m in (re.match(rf"{part}\.(\d+)\.", k) for k in named) if m)


def _refines(named: dict[str, Tensor], config: dict[str, Any] | None) -> bool:
    if config is not None:
        return bool(config.get("with_box_refine", False))
    return any(k.startswith("decoder.box_heads.") for k in named)


def _heads(named: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The heads each layer uses. A file may leave out those that equal another: the decoder's copy, or layers > 0."""
    count = options["decoder_layers"] + options["two_stage"] if options["box_refine"] else 1
    found: dict[str, Tensor] = {}
    for part in ("cls_heads", "box_heads"):
        tails = {m[1] for m in (re.match(rf"(?:decoder\.)?{part}\.\d+\.(.*)", k) for k in named) if m}
        for layer in range(count):
            for tail in tails:
                choices = [f"{where}{part}.{i}.{tail}" for i in (layer, 0) for where in ("", "decoder.")]
                found[f"{part}.{layer}.{tail}"] = next(named[c] for c in choices if c in named)
    return found


def _refuse_unknown_parts(config: dict[str, Any]) -> None:
    wanted = {"position_embedding_type": "sine", "activation_function": "relu", "dilation": False}
    for key, only in wanted.items():
        if config.get(key, only) != only:
            raise UserError(f"This Deformable DETR has {key}={config[key]!r}; only {only!r} can be loaded.")
    for part, usual in {"n_points": DEFAULT_POINTS, "attention_heads": 8, "ffn_dim": 1024}.items():
        one, other = config.get(f"encoder_{part}", usual), config.get(f"decoder_{part}", usual)
        if one != other:
            raise UserError(
                f"This Deformable DETR has encoder_{part}={one} and decoder_{part}={other}; "
                "only equal ones can be loaded."
            )
