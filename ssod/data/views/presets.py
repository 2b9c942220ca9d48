"""Views and recipes by name. docs/augmentation.md says where each number stands, and which are ours.

A view is one list of operations. A recipe is a paper's set of three: the views of labelled images (a list of
views, since some papers learn from two), of the teacher (weak) and of the student (strong).
"""

from __future__ import annotations

Entries = list[object]

BASE: Entries = [{"resize": {}}, {"flip": 0.5}]  # the weak view, unless the run says otherwise
_RANGE: Entries = [{"resize": {"scale": [0.5, 1.5]}}, {"flip": 0.5}]  # short side 400 .. 1200 around 800
_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
_BLUR = {"blur": {"sigma": [0.1, 2.0], "p": 0.5}}
_ERASE: Entries = [
    {"erase": {"p": 0.7, "area": [0.05, 0.2], "ratio": [0.3, 3.3]}},
    {"erase": {"p": 0.5, "area": [0.02, 0.2], "ratio": [0.1, 6.0]}},
    {"erase": {"p": 0.3, "area": [0.02, 0.2], "ratio": [0.05, 8.0]}},
]

VIEWS: dict[str, Entries] = {
    "weak": ["weak"],
    # Liu et al., Unbiased Teacher, ICLR 2021
    "strong": ["weak", {"color": {**_JITTER, "gray": 0.2}}, _BLUR, *_ERASE],
    # Xu et al., Soft Teacher, ICCV 2021
    "strong_geo": [
        *_RANGE,
        "one_color",
        {"one_affine": {"translate": 0.1, "rotate": 30, "shear": 30}},
        {"cutout": {"count": [1, 4], "side": 0.2}},
    ],
    # Li et al., Rethinking Pseudo Labels, AAAI 2022: colour jitter, blur, Cutout
    "rpl": ["weak", {"color": _JITTER}, _BLUR, *_ERASE],
    # Wang et al., Co-mining, AAAI 2021
    "comining": ["weak", {"color": {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "p": 0.8}}],
    "comining_blur": ["weak", _BLUR],
    # Ghiasi et al., Simple Copy-Paste, CVPR 2021
    "lsj": [{"resize": {"scale": [0.1, 2.0]}}, "window", {"flip": 0.5}],
    # Bochkovskiy et al., YOLOv4, 2020: the square of 2 imgsz, at half to full scale, cut to imgsz
    "mosaic_view": ["mosaic", {"resize": {"scale": [1.0, 2.0]}}, "window", {"flip": 0.5}],
}
VIEWS["unbiased_teacher"], VIEWS["soft_teacher"] = VIEWS["strong"], VIEWS["strong_geo"]

WEAK_VIEWS = ("weak", "lsj", "mosaic_view")  # names that a teacher's view may have

RECIPES: dict[str, dict[str, list[Entries]]] = {
    "unbiased_teacher": {"labeled": [["weak"], VIEWS["strong"]], "weak": [["weak"]], "strong": [VIEWS["strong"]]},
    "soft_teacher": {"labeled": [[*_RANGE, "one_color"]], "weak": [_RANGE], "strong": [VIEWS["strong_geo"]]},
    "rpl": {"labeled": [["weak"]], "weak": [["weak"]], "strong": [VIEWS["rpl"]]},
    "comining": {"labeled": [["weak"], VIEWS["comining"]], "weak": [["weak"]], "strong": [VIEWS["comining"]]},
    "comining_blur": {
        "labeled": [["weak"], VIEWS["comining_blur"]],
        "weak": [["weak"]],
        "strong": [VIEWS["comining_blur"]],
    },
}
