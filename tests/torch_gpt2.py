"""GPT-2 in PyTorch, written apart from the engine, as a peer to compare with: initial values, speed, whole runs.

The gradient oracle is transformers' GPT2LMHeadModel (tests/test_oracle.py); this one is the plain trainer that a user
would write. `python -m tests.torch_gpt2` takes train.py's options and makes the run that train.py makes of them: the
same initial values, batches, schedule and validation samples, written down in the same log.
"""

import math
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.data import Loader, Samples
from engine.errors import exit_on_user_error
from engine.log import RunLog
from engine.optimizer import learning_rate
from engine.shards import expand, open_shard

# The options of train.py that the peer knows too.
TAKEN = (
    *("train_data", "val_data", "model", "out_dir", "B", "T", "steps", "schedule", "lr", "warmup", "final_lr"),
    *("weight_decay", "beta1", "beta2", "eps", "max_norm", "seed", "val_every", "val_batches"),
)
STEPS_BETWEEN_FETCHES = 10  # losses stay on the device until then: to read one is to wait for the device


class Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.NH = config.NH
        self.ln_1 = nn.LayerNorm(config.C)
        self.c_attn = nn.Linear(config.C, 3 * config.C)
        self.attn_proj = nn.Linear(config.C, config.C)
        self.ln_2 = nn.LayerNorm(config.C)
        self.c_fc = nn.Linear(config.C, 4 * config.C)
        self.mlp_proj = nn.Linear(4 * config.C, config.C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.NH, C // self.NH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        att = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(att.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):
    """Tied embeddings, GPT-2's initial values from a generator of its own with this seed.

    padded: the classifier multiplies with a vocabulary of Vp, the rest of which the loss does not see. A GPU's matrix
    multiply is faster for it.
    """

    def __init__(self, config: GPT2Config, seed: int = 42, padded: bool = False):
        super().__init__()
        self.V, self.padding = config.V, config.Vp - config.V if padded else 0
        self.wte = nn.Embedding(config.V, config.C)
        self.wpe = nn.Embedding(config.maxT, config.C)
        self.h = nn.ModuleList(Block(config) for _ in range(config.L))
        self.ln_f = nn.LayerNorm(config.C)
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02 / math.sqrt(2 * config.L) if name.endswith("proj") else 0.02
                nn.init.normal_(module.weight, 0.0, std, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, inp: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(inp) + self.wpe(torch.arange(inp.shape[1], device=inp.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if self.padding:
            logits = (x @ F.pad(self.wte.weight, (0, 0, 0, self.padding)).T)[..., : self.V]
        else:
            logits = x @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(config: GPT2Config, inp: np.ndarray, targets: np.ndarray) -> Callable[[], float]:
    """A training step on one batch (int32 arrays (B,T)): forward, backward, clip, AdamW. Returns the loss."""
    model = TorchGPT2(config)
    x, y = torch.from_numpy(inp).long(), torch.from_numpy(targets).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def train(run: RunConfig, device: torch.device, *, compiled: bool = True) -> None:
    """The run that train.py makes of these options, logged into run.out_dir.

    On a GPU as PyTorch's users train there: fp32 parameters, bfloat16 by autocast, TF32 for what is left of fp32, fused
    AdamW, and torch.compile if `compiled`. On a CPU eager, in float32.
    """
    gpu = device.type == "cuda"
    train_shards, val_shards = ([open_shard(p) for p in expand(data)] for data in (run.train_data, run.val_data))
    config = model_from_descriptor(run.model, train_shards[0].vocab_size, run.T)
    val = Samples(val_shards, run.T)
    out_dir = Path(run.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    if gpu:
        torch.set_float32_matmul_precision("high")
    eager = TorchGPT2(config, run.seed, padded=gpu).to(device)
    model = torch.compile(eager, dynamic=False) if gpu and compiled else eager
    matrices = [p for p in eager.parameters() if p.dim() >= 2]
    vectors = [p for p in eager.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": run.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=run.lr,
        betas=(run.beta1, run.beta2),
        eps=run.eps,
        fused=gpu,
    )
    now, seconds_between = clock(device)

    def loss_of(batch: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        inp, targets = (upload(tokens, device) for tokens in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            return model(inp, targets)

    @torch.no_grad()
    def validation_loss() -> float:
        """As engine.evaluate: the mean over the tokens of the first samples."""
        count = len(val) if run.val_batches == -1 else min(len(val), run.val_batches * run.B)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, count, run.B):
            indices = np.arange(start, min(start + run.B, count))
            total += loss_of(val.read(indices)).double() * len(indices)
        return total.item() / count

    def flush() -> None:
        """Logs the pending steps."""
        if not pending:
            return
        values = torch.stack([torch.stack([loss, norm]).float() for _, _, loss, norm, _, _ in pending]).tolist()
        for (step, lr, _, _, began, ended), (loss, norm) in zip(pending, values, strict=True):
            log.train(
                step,
                loss=loss,
                lr=lr,
                norm=norm,
                loss_z=math.nan,
                norm_z=math.nan,
                skipped=False,
                tokens=run.B * run.T,
                seconds=seconds_between(began, ended),
            )
        pending.clear()

    pending: list[tuple[int, float, torch.Tensor, torch.Tensor, Any, Any]] = []
    log = RunLog(out_dir, 0, run.steps)
    with Loader(Samples(train_shards, run.T), run.B, seed=run.seed) as loader:
        for step in range(run.steps + 1):
            last = step == run.steps
            if run.val_every and (step % run.val_every == 0 or last):
                flush()
                log.validation(step, validation_loss())
            if last:
                break
            began = now()
            lr = learning_rate(step, run.steps, run)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(loader.next())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(eager.parameters(), run.max_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append((step, lr, loss.detach(), norm, began, now()))
            if len(pending) == STEPS_BETWEEN_FETCHES or step + 1 == run.steps:
                flush()
    log.close()


def upload(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """tokens on the device, as the long integers that PyTorch indexes with. No host waits for it."""
    host = torch.from_numpy(tokens)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True).long()


def clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """(now, seconds between two nows) in the device's own time: taking it makes no host wait."""

    def event() -> Any:
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment

    if device.type == "cuda":
        return event, lambda began, ended: began.elapsed_time(ended) / 1000
    return time.perf_counter, lambda began, ended: ended - began


def as_train_py(command: Callable) -> Callable:
    """Gives a command the options TAKEN, with train.py's names and defaults."""
    for item in fields(RunConfig):
        if item.name in TAKEN:
            option = click.option(
                *item.metadata["flags"], item.name, default=item.default, help=item.metadata["help"], show_default=True
            )
            command = option(command)
    return command


@click.command()
@as_train_py
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="torch.compile, on a GPU.")
@exit_on_user_error
def main(device: str, compiled: bool, **options: Any) -> None:
    """The run that train.py makes of the same options, in PyTorch. -i, -j, -x and -o must be given."""
    for flag, given in (
        ("-i", options["train_data"]),
        ("-j", options["val_data"]),
        ("-x", options["steps"] > 0),
        ("-o", options["out_dir"]),
    ):
        if not given:
            raise click.UsageError(f"{flag} is missing")
    train(RunConfig(**options), torch.device(device), compiled=compiled)


if __name__ == "__main__":
    main()
