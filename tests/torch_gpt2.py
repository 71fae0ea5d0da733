"""GPT-2 in PyTorch, written apart from the engine, as a peer to compare with: speed, and initial values.

The gradient oracle is transformers' GPT2LMHeadModel (tests/test_oracle.py); this one is the plain eager trainer that
a user would write.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from engine.config import GPT2Config


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
    """Tied embeddings, GPT-2's initial values from a generator of its own with this seed."""

    def __init__(self, config: GPT2Config, seed: int = 42):
        super().__init__()
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
        x = self.wte(inp) + self.wpe(torch.arange(inp.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T
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
