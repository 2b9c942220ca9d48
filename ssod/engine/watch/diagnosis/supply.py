"""The pseudo boxes in number: none, hardly any that arrive, far too many. Read from the log's lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from ssod.engine.watch.diagnosis.alarm import PATIENCE, Alarm
from ssod.engine.watch.diagnosis.probe import Scores
from ssod.strategies.base import Plan

HUNGRY = 0.02  # pseudo boxes of an image, as a share of the labelled boxes of an image: below it there are none
STARVED = 0.1  # share of the steps after burn-in without pseudo boxes ...
STARVED_LINES = 10  # ... and at least so many log lines
LOST = 0.1  # share of the boxes above the threshold that arrive in the strong view
WORTH = 0.1  # pseudo boxes of an image, as above, from which on it matters how many arrive
FLOOD = 5.0  # times the labelled boxes of an image


@dataclass
class Supply:
    """Counts log lines in a row; what it counted so far is all of its state.

    hungry, lost, flooded  lines in a row in which there was nothing, nothing arrived, there was too much
    since                  step of the first of the hungry lines
    """

    hungry: int = 0
    lost: int = 0
    flooded: int = 0
    since: int = 0

    def look(
        self, values: dict[str, float], step: int, plan: Plan, wanted: float, options: BaseModel, judge: Judge
    ) -> Iterator[Alarm]:
        """Alarms that a log line makes due; those that go on are due again.

        values   of the line
        wanted   labelled boxes of an image, where the line does not say
        options  of the strategy, that a way out is sought in
        judge    gives the teacher's scores; called for an alarm only
        """
        mined = values.get("mined/unlabeled/per_image", values.get("mined/per_image"))
        given = values.get("pseudo/per_image", mined)
        if given is None:
            return
        wanted = values.get("pseudo/labeled_per_image", wanted)
        found = values.get("pseudo/above_per_image", given)  # in the weak view
        hungry = mined is None and found < HUNGRY * wanted  # where mining finds nothing, nothing may be missing
        self.since = step if hungry and not self.hungry else self.since
        self.hungry = self.hungry + 1 if hungry else 0
        self.lost = self.lost + 1 if found >= WORTH * wanted and given < LOST * found else 0
        self.flooded = self.flooded + 1 if given > FLOOD * max(wanted, 1.0) else 0
        figures = {"per_image": given, "labelled_per_image": wanted, "tau": values.get("pseudo/tau", float("nan"))}
        if self.hungry >= PATIENCE:
            long = self.hungry >= STARVED_LINES and step - self.since >= STARVED * (plan.iters - plan.burn_in)
            yield from nothing(figures, options, judge, plan, step - self.since if long else None)
        if self.lost >= PATIENCE:
            yield clipped(given, found)
        if self.flooded >= PATIENCE:
            yield flood(figures, options, judge if mined is None else None)


Judge = Callable[[], Scores]


def nothing(figures: dict[str, float], options: BaseModel, judge: Judge, plan: Plan, long: int | None) -> list[Alarm]:
    """Nothing above the threshold; long: for how many steps, where it is for long."""
    scores, tau = judge(), figures["tau"]
    one, name = scores.threshold(1.0), threshold_option(options)
    if one is None:
        way = f"It hardly finds anything at all: give it a longer supervised start than burn_in={plan.burn_in} steps"
    else:
        way = f"{name}={one:g} would keep one box an image; a longer burn_in than {plan.burn_in} steps makes it surer"
    text = (
        f"the teacher gives {figures['per_image']:.3f} pseudo boxes an image where the labelled images have "
        f"{figures['labelled_per_image']:.1f}, so the unlabelled images teach nothing. Its best box of an image scores "
        f"{scores.median_best:.3f} (median of {len(scores.best)} images), the threshold is {tau:.2f}. {way}."
    )
    numbers = figures | {"median_best": scores.median_best}
    if one is not None:
        numbers["tau_for_one"] = one
    alarms = [Alarm("nothing_above_threshold", "warning", text, numbers)]
    if long is not None:
        alarms.append(Alarm("starved", "error", f"for {long} steps now {text}", numbers | {"steps": long}))
    return alarms


def clipped(given: float, found: float) -> Alarm:
    return Alarm(
        "pseudo_boxes_clipped",
        "warning",
        f"of {found:.1f} pseudo boxes an image above the threshold {given:.2f} arrive in the strong view; the others "
        "lie outside of it. Weaken the crop, window, affine or resize in augment.strong; `ssod check "
        "augment=...` draws both views.",
        {"above_per_image": found, "per_image": given},
    )


def flood(figures: dict[str, float], options: BaseModel, judge: Judge | None) -> Alarm:
    """judge: None where the boxes are mined, by the student and for the student."""
    given, wanted = figures["per_image"], figures["labelled_per_image"]
    if judge is None:
        way = "Set strategy.mine_from to the step by which the student knows the classes, or raise strategy.tau"
    else:
        tau = judge().threshold(max(wanted, 1.0))
        name = threshold_option(options)
        way = f"Raise {name}" if tau is None or not tau > figures["tau"] else f"{name}={tau:g} would keep as many"
        way += ", or give the teacher a longer burn_in"
    return Alarm(
        "flood",
        "warning",
        f"there are {given:.1f} pseudo boxes an image where the labelled images have {wanted:.1f}: most of them cannot "
        f"be objects. {way}.",
        figures,
    )


def threshold_option(options: BaseModel) -> str:
    """The option that moves the threshold: tau, or the floor of one that is found by itself."""
    return "strategy.tau_low" if getattr(options, "tau", None) == "auto" else "strategy.tau"
