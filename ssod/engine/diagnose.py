"""What is going wrong, said once, with numbers and a way out."""

from __future__ import annotations

PATIENCE = 3  # log lines in a row


class Starvation:
    """An unsupervised loss of nothing: the teacher has given (almost) no pseudo box for several log lines."""

    def __init__(self, expects_pseudo_boxes: bool) -> None:
        self._waiting = expects_pseudo_boxes
        self._lines = 0

    def look(self, values: dict[str, float]) -> str | None:
        """Read one log line; return the alarm the first time it is due."""
        per_image = values.get("pseudo/per_image")
        if per_image is None or not self._waiting:
            return None
        wanted = values.get("pseudo/labeled_per_image", 1.0)
        self._lines = self._lines + 1 if per_image < 0.02 * wanted else 0
        if self._lines < PATIENCE:
            return None
        self._waiting = False
        return (
            f"WARNING: the teacher gives {per_image:.3f} pseudo boxes an image where the labelled images have "
            f"{wanted:.1f}, so the unlabelled images teach nothing. It finds too little above the threshold "
            f"(mean tau {values.get('pseudo/tau', float('nan')):.2f}): lower strategy.tau or strategy.tau_low, or give "
            "it a longer burn_in."
        )
