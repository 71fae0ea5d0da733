"""A run being built: every option, file and byte of memory checked before the first step; and saved and restored."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from engine import checkpoint, device, llmc_model, ops, shards, tokenizer
from engine.arena import Arena, own_slot
from engine.comm import Communicator, fingerprints, from_rank_0, on_gpus
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.data import Loader, Samples
from engine.device import cuda, eagerly
from engine.errors import CheckpointError, DataError, DesyncError, UsageError
from engine.memory import gradient_dtype, memory_by_class, require_memory
from engine.models import gpt2
from engine.optimizer import AdamW
from engine.shards import Shard
from engine.watchdog import Watchdog
from engine.zero import LATE_TOKENS, Zero

OPTIMIZER_FILE = "optimizer.safetensors"

# What a checkpoint and the run that goes on from it must agree on; the rest may change, and the run says so.
FIXED_OPTIONS = ("T", "seed", "overfit")
# Options that say where or how fast, not what: a change of these is not worth a word.
FREE_OPTIONS = (
    "out_dir",
    "resume",
    "device",
    "recompute",
    "train_data",
    "val_data",
    "model",
    "watchdog",
    "cuda_graph",
    "carrier",
)


@dataclass(eq=False)
class Training:
    """Everything that a run consists of. start: the step that it begins with, steps: the one that it ends before."""

    run: RunConfig
    comm: Communicator
    config: GPT2Config
    device: ModuleType
    ops: ModuleType
    model: gpt2.GPT2
    zero: Zero
    optimizer: AdamW
    loader: Loader
    val: Samples | None
    tokenizer: tokenizer.Tokenizer | None
    steps: int
    start: int
    watchdog: Watchdog
    uploads: tuple[Any, Any]  # of a micro-batch's tokens and targets
    replay: Callable[..., None]  # the device's: calls what is the same in every step
    lane_losses: Any  # (lanes of this rank) float64 on the device: this step's means
    loss: Any  # () float64 on the device: the mean of all lanes
    identity: dict[str, Any]  # of the run, as every checkpoint keeps it

    @property
    def out_dir(self) -> Path | None:
        return Path(self.run.out_dir) if self.run.out_dir else None

    @property
    def val_count(self) -> int:
        """Samples in a validation, by all ranks."""
        assert self.val
        batches, B = self.run.val_batches, self.run.B * self.comm.world
        return len(self.val) if batches == -1 else min(len(self.val), batches * B)

    @property
    def samples_per_step(self) -> int:
        return self.run.samples_per_step(self.comm.world)

    def save(self, step: int) -> Path | None:
        """Commits the checkpoint after `step` updates, and deletes those that -nk does not keep: all on rank 0.

        All ranks call it together, for each may hold a part of the moments. Returns None on the other ranks.
        """
        assert self.out_dir
        parameters, optimizer = (_in_fp32(arrays) for arrays in (self.optimizer.parameters(), self.optimizer.state()))
        if self.comm.rank > 0:
            return None
        path = checkpoint.save(
            self.out_dir,
            step,
            {gpt2.MODEL_FILE: parameters, OPTIMIZER_FILE: optimizer},
            self.identity | {"position": self.loader.position},
        )
        checkpoint.prune(self.out_dir, keep=self.run.keep_checkpoints, every_major=self.run.keep_major)
        return path

    def forget_recorded(self) -> None:
        """The run is over. NCCL ends only after the CUDA graphs with its work, so they go before it does."""
        self.replay = eagerly

    def require_same_parameters(self) -> None:
        """DesyncError if some rank's parameters are not, bit for bit, rank 0's. All ranks call it together."""
        if self.comm.world == 1:
            return
        self.zero.settle()
        digest = blake2b(digest_size=32)
        for view in self.model.params.views.values():
            digest.update(self.device.to_host(view).reshape(-1).view(np.uint8))
        digests = fingerprints(self.comm, digest.digest())
        different = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if different:
            raise DesyncError(
                f"the parameters of rank {', '.join(map(str, different))} are not those of rank 0: suspect the memory "
                "or the processor of those machines (or, with -z 0, processors of different kinds). Go on from a "
                "checkpoint with -y 1"
            )


def _in_fp32(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Nothing with fewer digits than that: so a checkpoint does not depend on the device."""
    return {name: array.astype(np.promote_types(array.dtype, np.float32), copy=False) for name, array in arrays.items()}


def build(run: RunConfig, comm: Communicator, say: Callable[[str], None]) -> Training:
    """This rank of the run that these options mean, restored from its newest checkpoint with -y 1.

    Raises UserErrors.
    """
    backend = device.choose(run.device, say)
    comm = on_devices(comm, backend, run.carrier, say)
    dev, operations = device.load(backend), ops.load(backend)
    saved = _saved_run(run, say)

    train_shards = [] if run.overfit else _open(run.train_data, "-i")
    wants_val = run.val_every > 0 or run.overfit
    val_shards = _open(run.val_data, "-j", run.overfit) if wants_val else []
    V, tokens = _vocabulary(run, train_shards + val_shards)
    config, weights = _model(run, V)
    for shard in train_shards + val_shards:
        shards.check_tokens(shard, V)
    samples = Samples(val_shards if run.overfit else train_shards, run.T)
    steps = _steps(run, samples, comm.world)
    identity = {
        "model": asdict(config),
        "tokenizer": tokens.name if tokens else None,
        "data": samples.describe(),
        "options": asdict(run),
    }
    _require_same_everywhere(identity, comm)
    if saved:
        _require_same_run(saved, identity, say)
        if saved.step > steps:
            raise UsageError(f"-x {steps} lies behind {saved.path}, which has {saved.step:,} steps: give a larger -x")
    if run.resume:
        say(f"resumed from {saved.path}" if saved else f"no checkpoint in {run.out_dir} yet: starting at step 0")
    if problem := operations.unsupported(run.B, config.C, config.HS):
        raise UsageError(f"-e {run.model}: {problem}. --device cpu runs any size")
    require_memory(run, config, dev, operations, comm.world)

    grad_dtype = gradient_dtype(run, dev)
    dims = config.dims() | {"B": run.B, "T": run.T}
    operations.prepare(dims, run.gelu_fusion, grad_dtype)
    before = saved.state.get("tuning", {}) if saved else {}
    accumulates = run.accumulates(comm.world)
    identity["tuning"] = tune_together(run, comm, operations, dims, grad_dtype, accumulates, before, say)
    model, zero, optimizer = assemble(run, comm, config, dev, operations)
    if saved:
        optimizer.set_parameters(saved.tensors(gpt2.MODEL_FILE))
        optimizer.restore(saved.tensors(OPTIMIZER_FILE))
    else:
        optimizer.set_parameters(weights or initial_parameters(config, run.seed))
    position = saved.state["position"] if saved else 0
    return Training(
        run=run,
        comm=comm,
        config=config,
        device=dev,
        ops=operations,
        model=model,
        zero=zero,
        optimizer=optimizer,
        loader=Loader(
            samples,
            run.B,
            seed=run.seed,
            shuffle=not run.overfit,
            position=position,
            rank=comm.rank,
            world=comm.world,
        ),
        val=Samples(val_shards, run.T) if run.val_every > 0 else None,
        tokenizer=tokens,
        steps=steps,
        start=saved.step if saved else 0,
        watchdog=Watchdog(comm, run.watchdog),
        uploads=(dev.Upload((run.B, run.T), np.int32), dev.Upload((run.B, run.T), np.int32)),
        # Graphs with collectives in them only if they are asked for: they have not proved themselves on all machines.
        replay=dev.replay("off" if run.cuda_graph == "auto" and comm.world > 1 else run.cuda_graph, say),
        lane_losses=dev.zeros((len(model.lanes),), np.float64),
        loss=dev.zeros((), np.float64),
        identity=identity,
    )


def assemble(
    run: RunConfig, comm: Communicator, config: GPT2Config, dev: ModuleType, operations: ModuleType
) -> tuple[gpt2.GPT2, Zero, AdamW]:
    """What a rank trains with, on this device, without parameters yet."""
    model = gpt2.GPT2(
        config,
        operations,
        dev,
        B=run.B,
        T=run.T,
        recompute=run.recompute,
        dtype=dev.COMPUTE_DTYPE,
        grad_dtype=gradient_dtype(run, dev),
        grad_slots=gpt2.slots_by_turns if run.shards_gradients(comm.world) else own_slot,
        lanes=run.lanes_per_rank(comm.world),
        shares=run.lanes or comm.world,
    )
    zero = Zero(
        *(comm, model.params, model.lanes, run.zero_stage, operations, dev),
        by_library=run.reduce == "nccl",
        late=run.B * run.T >= LATE_TOKENS and comm.local_world == comm.world,
    )
    model.on_need = zero.need
    return model, zero, AdamW(model.params, gpt2.decayed(config), zero, run, operations, dev)


def plan(training: Training) -> str:
    """What will happen, in a few lines."""
    run, config = training.run, training.config
    world = training.comm.world
    memory = memory_by_class(run, config, training.device, training.ops, world)
    lines = [
        f"model      GPT-2, {config.L} layers, {config.NH} heads, {config.C} channels, {config.V:,} tokens "
        f"(padded to {config.Vp:,}): {config.num_parameters:,} parameters",
        f"data       {run.val_data if run.overfit else run.train_data}, tokenizer "
        f"{training.tokenizer.name if training.tokenizer else 'unknown'}",
        f"step       {training.samples_per_step * run.T:,} tokens: "
        + (f"{world} ranks x " if world > 1 else "")
        + f"{run.accumulation(world)} x {run.B} sequences of {run.T}",
        f"run        steps {training.start:,} to {training.steps:,}, learning rate {run.lr:g} ({run.schedule}), "
        f"weight decay {run.weight_decay:g}",
        "memory     "
        + ", ".join(f"{name} {nbytes / 2**20:,.1f}" for name, nbytes in memory.items() if nbytes)
        + f": {sum(memory.values()) / 2**20:,.1f} MiB on {training.device.describe()}"
        + (" for each rank" if world > 1 else ""),
        f"output     {run.out_dir or 'none is kept (-o DIR keeps logs and checkpoints)'}",
    ]
    on_cpu = not training.device.WORKS_ALONE
    idle = [
        flag
        for flag, differs in (
            ("-f", not run.tf32),
            ("-w", on_cpu and not run.master_weights),
            ("-ge", on_cpu and run.gelu_fusion != -1),
            ("--grad-dtype", on_cpu and run.grad_dtype != "bf16"),
            ("--gemm-search", on_cpu and run.gemm_search != "auto"),
            ("-z", run.zero_stage != 0 and world == 1),
            ("--carrier", run.carrier != "auto" and (on_cpu or world == 1)),
            ("-pg", run.gpus_per_node != 8),
        )
        if differs
    ]
    if idle:
        lines.append(f"note       no effect here, on {training.device.NAME}: {' '.join(idle)}")
    return "\n".join(lines)


def write_config(out_dir: Path, identity: dict[str, Any]) -> None:
    """out_dir/config.json: what the run is, for people and programs."""
    try:
        (out_dir / "config.json").write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{out_dir}: cannot write config.json: {error.strerror}") from error


def on_devices(comm: Communicator, backend: str, carrier: str, say: Callable[[str], None]) -> Communicator:
    """The ranks as this device's arrays need them, each with its GPU. carrier: from one GPU to the others, as RunConfig
    has it. UsageError if they can't train together.
    """
    if comm.world == 1:
        return comm
    on_gpu = comm.gather(np.array([backend == "cuda"], np.float64))[:, 0]
    if on_gpu.min() < on_gpu.max():
        raise UsageError(
            f"rank {on_gpu.argmax()} has a GPU to train on, rank {on_gpu.argmin()} has none: --device cuda says what "
            f"it lacks, {device.DOCTOR}; --device cpu does without GPUs"
        )
    if backend == "numpy":
        return comm
    name, count = cuda.take(comm.local_rank)
    names = fingerprints(comm, sha256(name).digest())
    counts = comm.gather(np.array([comm.local_world, count], np.float64)).astype(int)
    shared = next((rank for rank, found in enumerate(names) if found in names[:rank]), None)
    if shared is not None:
        local_world, count = counts[shared]
        raise UsageError(
            f"rank {shared} and rank {names.index(names[shared])} would share a GPU: {local_world} ranks run on their "
            f"machine and see {count} GPU{'s' if count > 1 else ''}. Start as many ranks as there are GPUs (-np, or "
            "-ppn for each machine), show them more in CUDA_VISIBLE_DEVICES, or take --device cpu"
        )
    return on_gpus(comm, carrier, say)


def _saved_run(run: RunConfig, say: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from. Refuses to start anew on top of another run's checkpoints."""
    if not run.out_dir:
        return None
    saved = checkpoint.load_latest(run.out_dir, say)
    if saved and not run.resume:
        raise UsageError(
            f"{run.out_dir} holds checkpoints up to step {saved.step:,}: -y 1 goes on from there; "
            "to start anew give another -o, or delete the directory"
        )
    return saved


def _open(pattern: str, flag: str, overfit: bool = False) -> list[Shard]:
    if not pattern:
        what = "validate (-v) and overfit (-a)" if flag == "-j" else "train"
        remedy = "; -v 0 does without validation" if flag == "-j" and not overfit else ""
        raise UsageError(f"{flag} is missing: it names the token shards to {what} on{remedy}")
    return [shards.open_shard(path) for path in shards.expand(pattern)]


def _vocabulary(run: RunConfig, opened: list[Shard]) -> tuple[int, tokenizer.Tokenizer | None]:
    """The number of tokens there are, and the tokenizer, if it is known which one wrote the shards."""
    sizes = {shard.vocab_size: shard.path for shard in opened}
    if len(sizes) > 1:
        listed = ", ".join(f"{path} ({size or 'unsaid'})" for size, path in sizes.items())
        raise DataError(f"shards of different vocabularies: {listed}. Prepare them with one tokenizer")
    (size,) = sizes
    name = tokenizer.for_vocab_size(size) if run.tokenizer == "auto" else run.tokenizer
    if name is None:
        if run.sample_every:
            raise UsageError(
                f"the shards were written with a vocabulary of {size:,} tokens, which belongs to no tokenizer known "
                "here: text can't be generated. Train without, with -s 0"
            )
        return size, None
    tokens = tokenizer.load(name)
    if size not in (0, tokens.vocab_size):
        raise UsageError(
            f"--tokenizer {name} has {tokens.vocab_size:,} tokens, but {sizes[size]} was written with a vocabulary of "
            f"{size:,}. Leave --tokenizer out, or prepare the data with it"
        )
    return tokens.vocab_size, tokens


def _model(run: RunConfig, V: int) -> tuple[GPT2Config, dict[str, np.ndarray]]:
    """The model's size, and its parameters if -e names a file of llm.c's."""
    weights: dict[str, np.ndarray] = {}
    if run.model.endswith(".bin"):
        dims, stacked = llmc_model.read(run.model)
        config = GPT2Config(maxT=dims["max_seq_len"], V=dims["V"], L=dims["L"], NH=dims["NH"], C=dims["C"])
        weights = gpt2.from_stacked(config, stacked)
        if config.V != V:
            raise UsageError(
                f"-e {run.model} has {config.V:,} tokens, the data {V:,}: it was tokenized for another model"
            )
    else:
        config = model_from_descriptor(run.model, V, run.T)
    if run.T > config.maxT:
        raise UsageError(f"-t {run.T} is more than the {config.maxT} positions of -e {run.model}; take at most that")
    return config, weights


def _steps(run: RunConfig, samples: Samples, world: int) -> int:
    steps = run.steps if run.steps != -1 else len(samples) // run.samples_per_step(world)
    if steps == 0:
        raise DataError(
            f"an epoch is {len(samples):,} samples of {run.T} tokens, a step takes {run.samples_per_step(world):,}: "
            "not one step. Give -x, a smaller -b or -d, or more data"
        )
    return steps


def tune_together(
    run: RunConfig,
    comm: Communicator,
    operations: ModuleType,
    dims: dict[str, int],
    grad_dtype: Any,
    accumulates: bool,
    before: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What rank 0 chooses by timing, or takes from the table `before`, and all ranks use: the same bits everywhere."""
    chosen = {}
    if run.gemm_search != "off" and comm.rank == 0:
        thorough = run.gemm_search == "full"
        chosen = operations.tune(dims, run.gelu_fusion, grad_dtype, accumulates, before, say, thorough=thorough)
    table = json.loads(from_rank_0(comm, json.dumps(chosen).encode()))
    operations.use_tuning(table)
    return table


def initial_parameters(config: GPT2Config, seed: int) -> dict[str, np.ndarray]:
    """In fp32, by name. UsageError for a model too small to have them."""
    host = Arena(gpt2.parameter_tensors(config, np.float32), lambda shape, dtype: np.zeros(shape, dtype))
    try:
        gpt2.initialize(config, host.views, seed)
    except ValueError as error:
        raise UsageError(f"-e is too small a model: {error}") from error
    return host.views


def _require_same_everywhere(identity: dict[str, Any], comm: Communicator) -> None:
    """UsageError if some rank was given other options, or sees other data, than rank 0."""
    digests = fingerprints(comm, sha256(json.dumps(identity, sort_keys=True).encode()).digest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise UsageError(
            f"rank {different[0]} was started with other options, or sees other data, than rank 0: start all ranks "
            "with one command, on machines that see the same files"
        )


def _require_same_run(saved: checkpoint.Checkpoint, identity: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuses to go on with another model, tokenizer, data set or data order; tells what else has changed."""
    before, now = saved.state, identity
    differing = _differences(
        {**before["model"], "tokenizer": before["tokenizer"]}, {**now["model"], "tokenizer": now["tokenizer"]}
    )
    options = _differences(before["options"], now["options"])
    differing += [(f"{RunConfig.flag(n)} ({n})", a, b) for n, a, b in options if n in FIXED_OPTIONS]
    if differing:
        raise UsageError(
            f"{saved.path} belongs to another run:\n"
            + "\n".join(f"  {name}: {old} there, {new} now" for name, old, new in differing)
            + "\n  give the options it was started with, or another -o"
        )
    if before["data"] != now["data"]:
        raise DataError(
            f"the training data is not what {saved.path} was trained on: {_summary(before['data'])} there, "
            f"{_summary(now['data'])} now; the first that differs is {_first_difference(before['data'], now['data'])}. "
            "Give the same shards, or another -o"
        )
    changed = [line for line in options if line[0] not in (*FIXED_OPTIONS, *FREE_OPTIONS)]
    if changed:
        say("changed since the checkpoint: " + ", ".join(f"{name} {old} -> {new}" for name, old, new in changed))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names: Iterable[str] = now
    return [(name, before.get(name), now[name]) for name in names if before.get(name) != now[name]]


def _summary(description: list[list[Any]]) -> str:
    return f"{len(description)} shards of {sum(count for _, count, _ in description):,} tokens"


def _first_difference(before: list[list[Any]], now: list[list[Any]]) -> str:
    """The name of the first shard that is not the same on both sides, or that one side lacks."""
    pairs = zip_longest(before, now, fillvalue=["none"])
    old, new = next((a, b) for a, b in pairs if a != b)
    return f"{old[0]} there, {new[0]} now" if old[0] != new[0] else f"{new[0]}, whose content has changed"
