"""Models and runs as values: frozen, checked once, printed, and kept in every checkpoint. No device, no files."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from engine.errors import UsageError

VOCABULARY_MULTIPLE = 128  # the vocabulary is padded to this in memory: the classifier's matrix multiply wants it
BEHIND = 16  # a one and zeros behind a row of channels: as many as leave rows of bf16 aligned to 32 bytes


@dataclass(frozen=True)
class GPT2Config:
    """The size of a GPT-2: maxT positions, V tokens, L layers, NH heads, C channels."""

    maxT: int
    V: int
    L: int
    NH: int
    C: int

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise UsageError(f"-e: a model needs {item.name} >= 1, not {getattr(self, item.name)}")
        if self.C % self.NH:
            raise UsageError(
                f"-e: {self.C} channels do not divide into {self.NH} heads; take a multiple of {self.NH} channels"
            )

    @property
    def Vp(self) -> int:
        """The padded vocabulary."""
        return math.ceil(self.V / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def HS(self) -> int:
        """The size of a head."""
        return self.C // self.NH

    def dims(self) -> dict[str, int]:
        """What the letters in the model's tables stand for."""
        return asdict(self) | {"Vp": self.Vp, "Cx": self.C + BEHIND}

    @property
    def num_parameters(self) -> int:
        """All parameters, the embeddings and the padding of the vocabulary included, as llm.c counts them."""
        layer = 12 * self.C**2 + 13 * self.C
        return (self.Vp + self.maxT) * self.C + self.L * layer + 2 * self.C

    def flops_per_token(self, T: int, *, causal: bool) -> int:
        """Forward and backward: 6N + 6LCT with the causal half of attention counted, else 6N + 12LCT."""
        return 6 * self.num_parameters + (6 if causal else 12) * self.L * self.C * T


# layers: (channels, heads), 1,024 positions
GPT2_SIZES = {
    6: (384, 6),
    12: (768, 12),
    24: (1024, 16),
    36: (1280, 20),
    48: (1600, 25),
    60: (1920, 30),
    72: (2880, 30),
    84: (3456, 36),
}
# channels: (layers, head size), 2,048 positions (Brown et al. 2020, arXiv 2005.14165, table 2.1; the first is llm.c's)
GPT3_SIZES = {
    384: (6, 64),
    768: (12, 64),
    1024: (24, 64),
    1536: (24, 96),
    2048: (24, 128),
    2560: (32, 80),
    4096: (32, 128),
    5140: (40, 128),
    12288: (96, 128),
}


def model_from_descriptor(descriptor: str, V: int, T: int) -> GPT2Config:
    """The model that a size descriptor names: d12, gpt2:d12, gpt3:c768, or any size as l4h4c128 (for T positions).

    Raises UsageError, with the sizes there are, for one that names none.
    """
    if match := re.fullmatch(r"(?:gpt2:)?d(\d+)", descriptor):
        L = int(match[1])
        if L in GPT2_SIZES:
            C, NH = GPT2_SIZES[L]
            return GPT2Config(maxT=1024, V=V, L=L, NH=NH, C=C)
    elif match := re.fullmatch(r"gpt3:c(\d+)", descriptor):
        C = int(match[1])
        if C in GPT3_SIZES:
            L, HS = GPT3_SIZES[C]
            if C % HS:
                raise UsageError(
                    f"-e {descriptor}: the published {C} channels do not divide into heads of {HS}. "
                    f"For a model that fits take e.g. -e l{L}h{C // HS}c{C // HS * HS}"
                )
            return GPT2Config(maxT=2048, V=V, L=L, NH=C // HS, C=C)
    elif match := re.fullmatch(r"l(\d+)h(\d+)c(\d+)", descriptor):
        L, NH, C = map(int, match.groups())
        return GPT2Config(maxT=T, V=V, L=L, NH=NH, C=C)
    raise UsageError(
        f"-e {descriptor}: not a model size. There are "
        + ", ".join(f"d{L}" for L in GPT2_SIZES)
        + "; "
        + ", ".join(f"gpt3:c{C}" for C in GPT3_SIZES if C % GPT3_SIZES[C][1] == 0)
        + "; any other as l4h4c128 (4 layers, 4 heads, 128 channels); and a .bin file of llm.c"
    )


def option(default: Any, flags: str, text: str, *, choices: tuple = (), unit: str = "") -> Any:
    """A field that is also a command-line option: flags as "--batch-size -b"."""
    return field(default=default, metadata={"flags": flags.split(), "help": text, "choices": choices, "unit": unit})


SCHEDULES = ("cosine", "linear", "constant", "wsd")
LATER = "comes with a later version of Backhand"


@dataclass(frozen=True)
class RunConfig:
    """A training run: every field is an option of train.py, with llm.c's letter as its alias."""

    # data
    train_data: str = option("", "--train-data -i", "token shards to train on (a glob)", unit="files")
    val_data: str = option("", "--val-data -j", "token shards to validate on (a glob)", unit="files")
    tokenizer: str = option(
        "auto", "--tokenizer", "auto: what the shards say, else GPT-2's", choices=("auto", "bytes", "gpt2")
    )
    # model
    model: str = option(
        "d12", "--model -e", "size (d12, gpt3:c768, l4h4c128, ...) or llm.c model file (.bin) to start from"
    )
    # output
    out_dir: str = option("", "--out-dir -o", "where logs and checkpoints go; none are kept without it")
    device: str = option(
        "auto", "--device", "where to run; auto: on the GPU, if there is one", choices=("auto", "cpu", "cuda")
    )
    gpu_log_every: int = option(-1, "--gpu-log-every -lg", "log the GPU's state every so many steps", unit="steps")
    checkpoint_every: int = option(
        0, "--checkpoint-every -n", "save every so many steps, and at the end; 0: never", unit="steps"
    )
    keep_checkpoints: int = option(0, "--keep-checkpoints -nk", "keep only the newest so many; 0: all")
    keep_major: int = option(
        0, "--keep-major -nm", "but never delete those of steps divisible by this; 0: none", unit="steps"
    )
    resume: bool = option(False, "--resume -y", "1: go on from the newest checkpoint in --out-dir; 0: start anew")
    # batch
    B: int = option(4, "--batch-size -b", "micro-batch B on each device", unit="sequences")
    T: int = option(1024, "--sequence-length -t", "tokens in a sequence, T", unit="tokens")
    total_batch: int = option(
        -1,
        "--total-batch -d",
        "tokens in an optimizer step, by accumulation; -1: one micro-batch of each rank",
        unit="tokens",
    )
    steps: int = option(-1, "--steps -x", "optimizer steps; -1: one epoch", unit="steps")
    overfit: bool = option(
        False, "--overfit -a", "1: train on one and the same batch of the validation data, unshuffled"
    )
    # optimizer
    schedule: str = option("cosine", "--schedule -k", "learning-rate schedule", choices=SCHEDULES)
    lr: float = option(3e-4, "--learning-rate -l", "peak learning rate")
    warmup: int = option(0, "--warmup -u", "linear warm-up of the learning rate", unit="steps")
    final_lr: float = option(1.0, "--final-lr-fraction -q", "learning rate at the end, as a fraction of the peak")
    weight_decay: float = option(0.0, "--weight-decay -c", "weight decay, of matrices only")
    beta1: float = option(0.9, "--beta1", "AdamW's decay of the first moment")
    beta2: float = option(0.95, "--beta2", "AdamW's decay of the second moment")
    eps: float = option(1e-8, "--eps", "AdamW's epsilon")
    max_norm: float = option(1.0, "--clip", "clip the gradient to this global norm; 0: off")
    max_loss_z: float = option(
        0.0, "--skip-loss-z -sl", "skip the update where the loss's z-score exceeds this; 0: off"
    )
    max_norm_z: float = option(
        0.0, "--skip-norm-z -sg", "skip the update where the gradient norm's z-score exceeds this; 0: off"
    )
    seed: int = option(42, "--seed", "of the initial values, the data order and the samples")
    # evaluation
    val_every: int = option(20, "--val-every -v", "validate every so many steps and at the end; 0: off", unit="steps")
    val_batches: int = option(
        20, "--val-batches -m", "micro-batches of each rank in a validation; -1: the whole split", unit="batches"
    )
    sample_every: int = option(
        20, "--sample-every -s", "generate text every so many steps and at the end; 0: off", unit="steps"
    )
    sample_tokens: int = option(64, "--sample-tokens -g", "tokens to generate", unit="tokens")
    temperature: float = option(1.0, "--temperature", "of generation; 0 takes the most likely token")
    hellaswag: bool = option(False, "--hellaswag -h", "1: score HellaSwag at each validation")
    # memory and speed
    recompute: int = option(1, "--recompute -r", "in backward: 0 nothing, 1 GELU, 2 layernorms too", choices=(0, 1, 2))
    tf32: bool = option(True, "--tf32 -f", "TF32 matrix multiplies where parameters are fp32 on a GPU")
    master_weights: bool = option(
        True, "--master-weights -w", "keep fp32 masters of bf16 parameters; 0: round the parameters at random instead"
    )
    grad_dtype: str = option(
        "bf16", "--grad-dtype", "in which gradients of bf16 parameters are accumulated", choices=("bf16", "fp32")
    )
    gelu_fusion: int = option(
        -1,
        "--gelu-fusion -ge",
        "GELU inside the GPU's matrix multiply: 0 no, 1 forward, 2 both; -1: what is timed fastest, with --gemm-search "
        "off 2 from Hopper on, else 0",
        choices=(-1, 0, 1, 2),
    )
    gemm_search: str = option(
        "auto",
        "--gemm-search",
        "auto: time cublasLt's algorithms for each matrix multiply, and -ge -1, once for a GPU; full: and hundreds of "
        "variants, which takes up to a minute; off: take its first",
        choices=("auto", "full", "off"),
    )
    cuda_graph: str = option(
        "auto",
        "--cuda-graph",
        "launch a step's kernels by CUDA graphs, recorded in the first steps; auto: on one GPU, where that works",
        choices=("auto", "on", "off"),
    )
    # several ranks
    zero_stage: int = option(0, "--zero-stage -z", "ZeRO stage", choices=(0, 1, 2))
    lanes: int = option(
        0, "--lanes", "gradients kept apart, for the same bits on any number of ranks that divides this; 0: one a rank"
    )
    reduce: str = option(
        "owner",
        "--reduce",
        "who adds up the ranks' gradients: owner, in fp32 and in a fixed order; nccl, NCCL (on CPUs MPI) on the way",
        choices=("owner", "nccl"),
    )
    carrier: str = option(
        "auto",
        "--carrier",
        "what carries gradients and parameters from GPU to GPU: nccl; copies, by the GPUs' copy engines, with the same "
        "bits; auto: copies where all GPUs reach each other's memory",
        choices=("auto", "nccl", "copies"),
    )
    watchdog: float = option(
        300.0, "--watchdog", "end the job when no rank gets on for so long; 0: never", unit="seconds"
    )
    num_processes: int = option(1, "--num-processes -pn", "ranks, where no MPI starts them")
    process_rank: int = option(0, "--process-rank -pr", "this process's rank, where no MPI starts it")
    gpus_per_node: int = option(8, "--gpus-per-node -pg", "GPUs of a node, where no MPI says")
    init_method: str = option("mpi", "--init-method -pi", "how ranks find each other", choices=("mpi", "tcp", "fs"))
    server_ip: str = option("", "--server-ip -ps", "address of rank 0, for --init-method tcp")
    fs_path: str = option("", "--fs-path -pf", "shared folder, for --init-method fs")

    def __post_init__(self) -> None:
        problems = [*self._out_of_range(), *self._contradictions(), *self._not_yet()]
        if problems:
            raise UsageError("\n".join(problems))

    def _out_of_range(self) -> list[str]:
        """What no run could mean, whatever the other options."""
        rules = [
            (self.B >= 1, "-b", "at least 1 sequence", self.B),
            (self.T >= 1, "-t", "at least 1 token", self.T),
            (self.steps == -1 or self.steps >= 1, "-x", "at least 1 step, or -1 for one epoch", self.steps),
            (
                self.total_batch == -1 or self.total_batch >= 1,
                "-d",
                "a number of tokens, or -1",
                self.total_batch,
            ),
            (self.checkpoint_every >= 0, "-n", "0 or more", self.checkpoint_every),
            (self.keep_checkpoints >= 0, "-nk", "0 or more", self.keep_checkpoints),
            (self.keep_major >= 0, "-nm", "0 or more", self.keep_major),
            (self.val_every >= 0, "-v", "0 or more", self.val_every),
            (
                self.val_batches == -1 or self.val_batches >= 1,
                "-m",
                "at least 1, or -1 for all",
                self.val_batches,
            ),
            (self.sample_every >= 0, "-s", "0 or more", self.sample_every),
            (self.sample_tokens >= 1, "-g", "at least 1", self.sample_tokens),
            (self.temperature >= 0, "--temperature", "0 or more", self.temperature),
            (self.lr >= 0, "-l", "0 or more", self.lr),
            (self.warmup >= 0, "-u", "0 or more", self.warmup),
            (0 <= self.final_lr <= 1, "-q", "between 0 and 1", self.final_lr),
            (self.weight_decay >= 0, "-c", "0 or more", self.weight_decay),
            (0 <= self.beta1 < 1, "--beta1", "in [0, 1)", self.beta1),
            (0 <= self.beta2 < 1, "--beta2", "in [0, 1)", self.beta2),
            (self.eps > 0, "--eps", "more than 0", self.eps),
            (self.max_norm >= 0, "--clip", "0 or more", self.max_norm),
            (self.max_loss_z >= 0, "-sl", "0 or more", self.max_loss_z),
            (self.max_norm_z >= 0, "-sg", "0 or more", self.max_norm_z),
            (self.watchdog == 0 or self.watchdog >= 3, "--watchdog", "at least 3 seconds, or 0 for off", self.watchdog),
            (self.lanes >= 0, "--lanes", "0 or more", self.lanes),
            (self.num_processes >= 1, "-pn", "at least 1", self.num_processes),
            (0 <= self.seed < 2**32, "--seed", "between 0 and 2^32 - 1", self.seed),
        ]
        problems = [f"{flag} must be {allowed}, not {value}" for fine, flag, allowed, value in rules if not fine]
        told = " ".join(problems)
        floats = [item.name for item in fields(self) if isinstance(item.default, float)]
        problems += [
            f"{self.flag(name)} must be a finite number, not {getattr(self, name)}"
            for name in floats
            if not math.isfinite(getattr(self, name)) and f"{self.flag(name)} must" not in told
        ]
        return problems

    def _contradictions(self) -> list[str]:
        """Options that are fine alone but not together."""
        problems = self._indivisible(world=1)
        if self.lanes and self.zero_stage == 2:
            problems.append(f"--lanes {self.lanes} keeps whole gradients apart, and -z 2 does not keep them; take -z 1")
        if self.lanes and self.reduce == "nccl":
            problems.append(f"--lanes {self.lanes} are added up in a fixed order, and --reduce nccl has its own")
        if self.resume and not self.out_dir:
            problems.append("-y 1 goes on from a checkpoint in -o, which is not given")
        if self.checkpoint_every and not self.out_dir:
            problems.append(f"-n {self.checkpoint_every} keeps checkpoints in -o, which is not given")
        if (self.keep_checkpoints or self.keep_major) and not self.checkpoint_every:
            problems.append("-nk and -nm choose among checkpoints, of which there are none without -n")
        if self.keep_major and not self.keep_checkpoints:
            problems.append("-nm exempts checkpoints from -nk, which is not given: all are kept anyway")
        return problems

    def _not_yet(self) -> list[str]:
        """Options whose feature does not exist yet: refused, never ignored."""
        problems = []
        if self.hellaswag:
            problems.append(f"-h 1: scoring HellaSwag {LATER}")
        if self.gpu_log_every > 0:
            problems.append(f"-lg: logging a GPU's state {LATER}")
        if self.num_processes > 1 or self.process_rank != 0:
            problems.append(f"-pn {self.num_processes} -pr {self.process_rank}: ranks without MPI {LATER}; use mpirun")
        if self.init_method != "mpi" or self.server_ip or self.fs_path:
            problems.append(f"-pi {self.init_method}, -ps, -pf: ranks without MPI {LATER}; use mpirun")
        return problems

    def shards_gradients(self, world: int) -> bool:
        """Whether each of `world` ranks keeps the gradients of its own shares only."""
        return self.zero_stage == 2 and world > 1

    def accumulates(self, world: int) -> bool:
        """Whether backward adds some micro-batches' gradients to those of others, in the same memory."""
        return not self.shards_gradients(world) and self.accumulation(world) > self.lanes_per_rank(world)

    @classmethod
    def flag(cls, name: str) -> str:
        """The shortest spelling of a field's option."""
        return {item.name: item.metadata["flags"][-1] for item in fields(cls)}[name]

    def _indivisible(self, world: int) -> list[str]:
        """What is wrong if the tokens of a step do not divide into micro-batches of all ranks."""
        tokens = world * self.B * self.T
        if self.B < 1 or self.T < 1 or self.total_batch < 1 or self.total_batch % tokens == 0:
            return []
        nearest = max(tokens, round(self.total_batch / tokens) * tokens)
        ranks = f"{world} ranks x " if world > 1 else ""
        return [
            f"-d {self.total_batch} tokens do not divide into micro-batches of {ranks}-b {self.B} x -t {self.T} = "
            f"{tokens} tokens; the nearest that do: -d {nearest}"
        ]

    def accumulation(self, world: int) -> int:
        """Micro-batches of each rank in an optimizer step. UsageError if they do not divide the step."""
        if problems := self._indivisible(world):
            raise UsageError(*problems)
        return max(1, self.total_batch // (world * self.B * self.T))

    def lanes_per_rank(self, world: int) -> int:
        """Gradients that each rank keeps apart. UsageError if lanes, ranks and micro-batches do not fit together."""
        lanes = self.lanes or world
        if lanes % world:
            raise UsageError(f"--lanes {lanes} cannot be shared out equally among {world} ranks")
        batches = self.accumulation(world) * world
        if batches % lanes:
            raise UsageError(
                f"--lanes {lanes} do not divide the {batches} micro-batches of a step: give a -d that is a multiple of "
                f"{lanes} x -b {self.B} x -t {self.T} = {lanes * self.B * self.T} tokens"
            )
        return lanes // world

    def samples_per_step(self, world: int) -> int:
        """Sequences in an optimizer step."""
        return self.accumulation(world) * self.B * world
