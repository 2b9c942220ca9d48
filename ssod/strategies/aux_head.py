"""A second classifier on a detector: everything else, backbone, neck and box regression, is shared with the first."""

from __future__ import annotations

import copy

from torch import nn

from ssod.detectors.base import Detector


def copied_classifier(detector: Detector) -> nn.ModuleDict:
    """Copies of the modules that `detector.classifier` names, by these names, with weights of their own."""
    return copy.deepcopy(nn.ModuleDict({name: getattr(detector, name) for name in detector.classifier}))


def with_classifier(detector: Detector, classifier: nn.ModuleDict) -> Detector:
    """The detector with another classifier: its verbs compute with the very modules of `detector`, but for these.

    To be made where it is used and not kept: a strategy that stored it would register, copy and save the shared modules
    twice, and hold the old ones after a copy of itself. Making it copies one small dict and no tensor.
    """
    twin = copy.copy(detector)
    twin._modules = detector._modules | dict(classifier.items())
    return twin
