"""The training loop. It knows steps, files and signals; what a step learns is the strategy's."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssod import dist
from ssod.checkpoint import save_checkpoint
from ssod.config import to_yaml
from ssod.data.loader import StepLoader, build_loader
from ssod.data.views.device import Painter, divide
from ssod.data.views.transforms import pipeline
from ssod.deploy.infer import Inference, pick_device
from ssod.detectors.base import Detector
from ssod.engine.callbacks import Callbacks
from ssod.engine.draws import seed_step
from ssod.engine.evaluate import Metrics, evaluate
from ssod.engine.finish import finish
from ssod.engine.log import Averages, Logger, over_ranks
from ssod.engine.memory import memory_fault, ran_out, resident
from ssod.engine.optim import build_optimizer, lr_at, set_lr
from ssod.engine.pulse import Pulse
from ssod.engine.rollback import SLOWER, Diverged, Divergence, roll_back
from ssod.engine.run import environment, new_run, resumed_run, unlock_run
from ssod.engine.saved import content_of, refuse_finished, restore
from ssod.engine.setup import build, build_data, check_options
from ssod.engine.signals import SignalWatch, Stopped
from ssod.engine.watch.diagnosis.clock import DataClock
from ssod.engine.watch.observers import build_observers
from ssod.errors import Fault, UserError
from ssod.modes import TrainConfig
from ssod.nn.compiled import begin_step, compile_networks
from ssod.nn.held import Before, running_statistics
from ssod.nn.precision import amp_dtype, autocast, lay_out
from ssod.structures import SemiBatch

SKIPS = 20  # steps in a row without finite gradients before the run stops


class SemiTrainer:
    """Train a student on labelled and unlabelled images by the strategy that the config names.

    folder: the run folder (args.yaml, env.txt, results.csv, metrics.json, plots, weights/{last,best}.pt).
    callbacks: the user's functions, see ssod.engine.callbacks.
    Raises UserError for anything the user can mend, before the first step where possible.
    """

    def __init__(self, config: TrainConfig, callbacks: Callbacks | None = None) -> None:
        self.callbacks = callbacks or Callbacks()
        folder, resumed, config = resumed_run(config)
        self.config = config
        self.step = 0  # steps done
        self.best: dict[str, Any] = {"AP": -1.0, "step": 0, "use": "student"}
        self.history: list[dict[str, Any]] = []  # one entry a validation
        self.bad: dict[str, str] = {}  # training images that could not be read: path -> reason
        self.bad_val: dict[str, str] = {}  # validation images, likewise
        self.signals = SignalWatch()
        self.since_best = 0  # validations without a better AP
        self.rollbacks = 0  # times the run went back to a checkpoint, as it diverged
        self._saved = -1  # step of last.pt
        self._torn = False  # while the weights move: what is there is of no step
        self.log: Logger | None = None  # while it trains
        try:
            self._prepare()
            self.observers = build_observers(self)
            if resumed is not None and folder is not None:
                refuse_finished(self, resumed, folder)
                restore(self, resumed)
        except BaseException:
            if folder is not None:
                unlock_run(folder)
            raise
        self.folder = folder or dist.from_main(self._new_folder)
        for observer in reversed(self.observers):
            self.callbacks.precede(observer.events())

    def _new_folder(self) -> Path:
        folder = new_run(self.config.project, "train", self.config.name, self.config.exist_ok)
        (folder / "weights").mkdir(exist_ok=True)
        return folder

    def _prepare(self) -> None:
        """Data, networks, optimizer, number format: everything that the config alone decides."""
        config = self.config
        check_options(config)
        self.device = dist.init(pick_device(config.device))
        torch.manual_seed(config.seed)
        torch.backends.cudnn.deterministic = config.deterministic
        torch.backends.cudnn.benchmark = not config.deterministic
        self.data = build_data(config)
        strategy, self.note = build(config, self.data)
        self.plan = strategy.plan
        self.strategy = strategy.to(self.device)
        self.dtype = amp_dtype(config.amp, self.device, self.strategy)
        lay_out(self.strategy, self.dtype)
        if config.compile:
            detectors = [m for m in self.strategy.modules() if isinstance(m, Detector)]
            compile_networks(detectors, self.device, graphs=config.compile == "graphs")
        self.optimizer = build_optimizer(self.strategy, config)
        self.statistics = running_statistics(self.strategy)
        self.before = Before(self.strategy)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.strong = pipeline(config.augment.strong, config.imgsz, "strong")
        self.painter: Painter | None = None
        if config.augment_on == "device":
            self.strong, paintings = divide(self.strong)
            self.painter = Painter(paintings, config.seed, dist.rank(), dist.world())

    # -- the loop

    def train(self) -> dict[str, Any]:
        """Run to the end and return the summary that metrics.json holds. Raises Stopped when asked to stop."""
        try:
            return self.run()
        finally:
            dist.close()

    def run(self) -> dict[str, Any]:
        """As `train`, and the processes of the run stay together for another one."""
        if dist.is_main():
            (self.folder / "args.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            (self.folder / "env.txt").write_text(environment(), encoding="utf-8")
        self.log = log = Logger(self.folder, self.plan.iters, self.step, active=dist.is_main())
        try:
            with self.signals, Pulse() as pulse:
                self._all_steps(log, pulse)
            summary = finish(self, log)
            if self.config.baseline == "auto":
                from ssod.engine.baseline import run_baseline  # which is made of this file

                summary["baseline"] = run_baseline(self)
            if self.config.plots:
                from ssod.engine.report import report_at_end

                dist.from_main(lambda: report_at_end(self))
            self.callbacks("on_train_end", self)
            return summary
        finally:
            log.close()
            self.log = None
            unlock_run(self.folder)

    def say(self, text: str) -> None:
        """A line for the user, above the progress bar while there is one."""
        if self.log is not None:
            self.log.say(text)
        elif dist.is_main():
            print(text)

    def _all_steps(self, log: Logger, pulse: Pulse) -> None:
        for line in [*self.config.notes, *self.data.notes, str(self.note), self._headline()]:
            log.say(line)
        wrapped = dist.wrap(self.strategy, self.device)
        self.callbacks("on_train_start", self)
        while True:
            try:
                return self._loop(wrapped, log, pulse)
            except Diverged as error:
                roll_back(self, log, error)

    def _loop(self, wrapped: torch.nn.Module, log: Logger, pulse: Pulse) -> None:
        config, plan = self.config, self.plan
        averages, skipped = Averages(), 0
        every = max(1, min(50, plan.iters // 100))
        started, clock, divergence = time.monotonic(), DataClock(), Divergence()
        try:
            if self.step and self._is_due() and (not self.history or self.history[-1]["step"] != self.step):
                self._evaluate(log, pulse)  # what the run that goes on here failed in
            for batches in clock.over(self._batches()):
                first, end = plan.stage(self.step)
                if self.step == first > 0:
                    self.optimizer.state.clear()  # the student of stage two starts as from a file: without momentum
                    self.since_best = 0
                lr = lr_at(self.step - first, end - first, config) * SLOWER**self.rollbacks
                set_lr(self.optimizer, lr)
                finite = self._step(wrapped, batches, averages)
                skipped = 0 if finite else skipped + 1
                if skipped >= SKIPS:
                    raise Fault(
                        f"the gradients were not finite for {SKIPS} steps up to step {self.step}. The last good "
                        f"weights are in {self.folder / 'weights'}; go on from them with a lower lr0 or amp=false."
                    )
                log.step(self.step)
                self.step += 1
                pulse.step()
                self.callbacks.step_end(self)
                if self.step % every == 0 or self.step == plan.iters:
                    values = over_ranks(averages.read()) | {"lr": lr, "seconds": time.monotonic() - started}
                    values |= {"time/data": clock.read()} | resident()
                    log.row(self.step, values)
                    self.callbacks.figures("on_log", self, values)
                    divergence.look(self, values)
                if self._is_due():
                    self._evaluate(log, pulse)
                    clock.restart()
                    if 0 < config.patience <= self.since_best and end == plan.iters:
                        log.say(f"stopped at step {self.step}: no better AP in {config.patience} validations")
                        break
                if self.step % config.save_interval == 0:
                    self._save("last.pt")
                if config.save_period and self.step % config.save_period == 0:
                    self._save(f"step{self.step}.pt")
                if asked := dist.agree(self.signals.asked or 0, self.device):  # all ranks stop after the same step
                    raise Stopped(asked)
        except BaseException as error:
            no_memory = ran_out(error)
            if self.step and skipped == 0 and not self._torn and not isinstance(error, Diverged):
                self._save("last.pt")
            if no_memory:
                raise memory_fault(config, self.step, self.folder) from error
            raise
        self._save("last.pt")

    def _step(self, wrapped: torch.nn.Module, batches: list[SemiBatch], averages: Averages) -> bool:
        """One optimizer step over its micro-batches; False when it was skipped because it was not finite."""
        self.before.keep()
        try:
            self._gradients(wrapped, batches, averages)
        except BaseException:
            self.before.put_back()  # so that what is saved now is the step before, to the last bit
            raise
        self._torn = True
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), limit, foreach=True)
        finite = bool(torch.isfinite(norm))  # the same on all ranks: gradients are already averaged
        if finite or self.scaler.is_enabled():  # the scaler skips by itself and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if finite:
            averages.add({"grad_norm": norm})
            self.strategy.after_step(self.step)
        else:
            self.before.put_back()  # statistics of what was not finite stay so for ever
        self.optimizer.zero_grad(set_to_none=True)
        self._torn = False
        return finite

    def _gradients(self, wrapped: torch.nn.Module, batches: list[SemiBatch], averages: Averages) -> None:
        """Losses of the micro-batches, and what they say to each weight, the same on all ranks."""
        self.strategy.train()
        seed_step(self.config.seed, self.step)
        if self.config.compile == "graphs":
            begin_step()
        for i, batch in enumerate(batches):
            self._note_bad(batch.bad)
            moved = batch.to(self.device, non_blocking=True)
            if self.painter is not None and batch.strong is not None and moved.strong is not None:
                moved.strong = self.painter(moved.strong, batch.strong.sizes, self.step * len(batches) + i)
            with autocast(self.dtype, self.device):
                out = wrapped(moved, self.step)
            total = torch.stack([v.float() for v in out.losses.values()]).sum() / len(batches)
            self.scaler.scale(total).backward()
            averages.add({**out.losses, **out.stats})
            self.callbacks.note(self, moved, out)
            for observer in self.observers:
                observer.note(moved, out)
        dist.average(self.statistics)

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _batches(self) -> Iterator[list[SemiBatch]]:
        """Micro-batches of every step still to do. Unlabelled images are not even read during burn-in."""
        for first, last, per_step in (
            (0, self.plan.burn_in, 0),
            (self.plan.burn_in, self.plan.iters, self.config.unlabeled_per_step if self.data.unlabeled else 0),
        ):
            start = max(first, self.step)
            if start < last:
                n = self.config.accumulate
                loader = iter(self._loader(start * n, last * n, per_step))
                for _ in range(start, last):
                    yield [next(loader) for _ in range(n)]

    def _loader(self, start: int, end: int, unlabeled_per_step: int) -> StepLoader:
        c = self.config
        world = dist.world()
        for name, size in (("batch", c.batch), ("batch_unlabeled", unlabeled_per_step)):
            if size % world:
                raise UserError(f"{name}={size} does not divide over {world} processes.")
        return build_loader(
            self.data.labeled,
            self.data.unlabeled,
            batch=c.batch // world,
            batch_unlabeled=unlabeled_per_step // world,
            imgsz=c.imgsz,
            labeled_view=pipeline(c.augment.labeled, c.imgsz, "labeled"),
            weak=pipeline(c.augment.weak, c.imgsz, "weak"),
            strong=self.strong,
            seed=c.seed,
            start_step=start,
            steps=end,
            workers=c.workers,
            rank=dist.rank(),
            world=world,
            cache=c.cache,
            pin=self.device.type == "cuda",
        )

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        """Count images that cannot be read; stop above `max_bad` of the training images."""
        self.bad.update(dict(bad))
        total = len(self.data.labeled) + len(self.data.unlabeled)
        if bad and len(self.bad) > self.config.max_bad * total:
            path, reason = bad[0]
            raise UserError(
                f"{len(self.bad)} of {total} training images cannot be read, more than max_bad={self.config.max_bad}; "
                f"the last one: {path}: {reason}. `ssod check` lists them all."
            )

    # -- validation and files

    def _is_due(self) -> bool:
        interval = self.config.val_interval or max(1, self.plan.iters // 10)
        last_of_burn_in = self.step == self.plan.burn_in
        return self.step % interval == 0 or last_of_burn_in or self.step == self.plan.iters

    def _evaluate(self, log: Logger, pulse: Pulse) -> None:
        pulse.rest()
        self._validate(log)
        if self.step == self.plan.burn_in and self.data.unlabeled:
            self.callbacks("on_burn_in_end", self)

    def _validate(self, log: Logger) -> None:
        """Score the networks; the better one of the best validation becomes best.pt."""
        how = Inference(
            imgsz=self.config.imgsz,
            device=self.device,
            dtype=self.dtype,
            batch=self.config.batch,
            workers=0,
            conf=self.config.conf,
            iou=self.config.iou,
            max_det=self.config.max_det,
        )
        networks: dict[str, Detector] = self.strategy.networks()
        if self.config.eval_on in networks:
            networks = {self.config.eval_on: networks[self.config.eval_on]}
        elif self.step < self.plan.burn_in:
            networks = {"student": self.strategy.student}  # the teacher has not begun
        bad: list[tuple[str, str]] = []
        scores: dict[str, Metrics] = {
            name: evaluate(network, self.data.val, self.data.names, how, bad)
            for name, network in (networks | self.strategy.together()).items()
        }
        for path, reason in dict(bad).items():
            if path not in self.bad_val:
                log.say(f"WARNING: {path} cannot be read ({reason}); validation counts it as without detections.")
        self.bad_val.update(bad)
        self._record(scores, log)
        if dist.is_main():
            self.callbacks("on_val_end", self)
        dist.barrier()

    def _record(self, scores: dict[str, Metrics], log: Logger) -> None:
        figures = {f"val/{n}/{k}": v for n, m in scores.items() for k, v in m.figures.items()}
        log.row(self.step, figures)
        entry = {"step": self.step} | {n: {**m.figures, "per_class": m.per_class} for n, m in scores.items()}
        by_class = {n: dict(zip(self.data.names, v.tolist(), strict=True)) for n, v in self.strategy.by_class().items()}
        self.history.append(entry | ({"by_class": by_class} if by_class else {}))
        log.say(
            f"step {self.step}: "
            + ", ".join(f"{n} AP {m.figures['AP']:.4f} AP50 {m.figures['AP50']:.4f}" for n, m in scores.items())
        )
        use = max((n for n in scores if n in self.strategy.networks()), key=lambda n: scores[n].ap)
        self.since_best += 1
        if scores[use].ap > self.best["AP"]:
            self.best = {"AP": scores[use].ap, "step": self.step, "use": use}
            self.since_best = 0
            self._save("best.pt")

    def _save(self, name: str) -> None:
        """best.pt holds the networks; any other name also holds all that resuming needs."""
        if not dist.is_main() or (name == "last.pt" and self._saved == self.step):
            return
        weights, content = self.folder / "weights", content_of(self, whole=name != "best.pt")
        save_checkpoint(content, weights / name, keep=weights / "previous.pt" if name == "last.pt" else None)
        if name == "last.pt":
            self._saved = self.step
        self.callbacks("on_save", self, file=weights / name)

    def _headline(self) -> str:
        c, plan = self.config, self.plan
        text = f"{plan.iters} steps of {c.batch} labelled"
        if self.data.unlabeled:
            text += f" + {c.unlabeled_per_step} unlabelled images, {plan.burn_in} of them supervised first"
            text += ", with a schedule of their own" if plan.two_stages and plan.burn_in else ""
        precision = str(self.dtype).removeprefix("torch.") if self.dtype else "float32"
        return f"{text}; {c.strategy.name}, {precision} on {self.device}, into {self.folder}"
