"""MoM: several Gated DeltaNet memories, each fed by the tokens a router sends to it, beside one that sees all.

Du et al., "MoM: Linear Sequence Modeling with Mixture-of-Memories", 2502.13685.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.delta_rule import delta_rule
from flame.models.context import Context
from flame.models.delta import DeltaHeadsConfig, DeltaMixer, init_decay, log_decay, write_strength
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.mixers.rwkv6 import XavierLinear
from flame.models.modules import GatedRMSNorm, RMSNorm, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class MomConfig(DeltaHeadsConfig):
    """Every token goes to `topk` of `num_memories`; capacity and use_layer_wise_balance change nothing."""

    model_type: ClassVar[str] = "mom"

    num_hidden_layers: int = 24
    num_heads: int = 4
    expand_v: float = 1.0
    use_output_gate: bool = True
    num_memories: int = 4
    topk: int = 2
    capacity: float = 1.0
    use_layer_wise_balance: bool = True
    aux_loss_scale: float = 0.01
    shared_mem: bool = True
    single_kv_proj: bool = False
    mom_backend: Literal["gated_deltanet"] = "gated_deltanet"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.use_short_conv, "use_short_conv", "must be true: MoM is defined with it")
        self.require(0 < self.topk <= self.num_memories, "topk", f"must be 1 to num_memories = {self.num_memories}")


@dataclass(frozen=True)
class Routing:
    """Tokens sorted by memory, then sequence, then time: the memories' inputs packed into one row of B T topk tokens.

    token, memory [B T topk] int64; weight [B T topk, 1, 1]; cu_seqlens [memories * sequences + 1], empty runs included.
    """

    token: Tensor
    memory: Tensor
    weight: Tensor
    cu_seqlens: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [1, B T topk, C]."""
        return x.flatten(0, 1)[self.token].unsqueeze(0)

    def pack_own(self, per_memory: list[Tensor]) -> Tensor:
        """Each memory's [B, T, C] -> [1, B T topk, C], every row from the memory that it goes to."""
        return torch.stack(per_memory, 2).flatten(0, 1)[self.token, self.memory].unsqueeze(0)


class MixtureOfMemories(DeltaMixer):
    """o_t = sum over the chosen memories m of w_{t,m} o^m_t, plus the shared memory's output; each a Gated DeltaNet.

    A memory neither writes nor decays for tokens it is not sent. The convolutions restart at every memory's sequence, in
    training too, and the sort is stable, so that packed, cached and plain forwards agree. Every memory's projections run
    over all tokens and the rows that are routed there are kept: fixed shapes, nothing waits for the router on the host.
    """

    config_class = MomConfig
    context_parallel = True

    def __init__(self, config: MomConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, dim = self.config, self.config.hidden_size
        widths = {"k": c.key_dim, "v": c.value_dim, "b": c.num_heads, "a": c.num_heads}
        self.gate = XavierLinear(dim, c.num_memories)
        self.q_proj = XavierLinear(dim, c.key_dim)
        for name, width in widths.items():
            if not c.single_kv_proj:
                own = nn.ModuleList(XavierLinear(dim, width) for _ in range(c.num_memories))
                self.add_module(f"{name}_proj", own)
            if c.shared_mem or c.single_kv_proj:
                self.add_module(f"shared_{name}", XavierLinear(dim, width))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.q_conv1d = ShortConvolution(c.key_dim, c.conv_size)
        self.k_conv1d = ShortConvolution(c.key_dim, c.conv_size)
        self.v_conv1d = ShortConvolution(c.value_dim, c.conv_size)
        self.o_norm: nn.Module = (GatedRMSNorm if c.use_output_gate else RMSNorm)(c.value_head_dim, c.norm_eps)
        if c.use_output_gate:
            self.g_proj: nn.Module = XavierLinear(dim, c.value_dim)
        self.o_proj = XavierLinear(c.value_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_decay(self.A_log, self.dt_bias)
        bound = self.config.conv_size**-0.5
        for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            nn.init.uniform_(conv.weight, -bound, bound)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        routing = self.route(x, ctx)
        packed = {"q": routing.pack(self.q_proj(x))}
        for name in ("k", "v", "b", "a"):
            if self.config.single_kv_proj:
                packed[name] = routing.pack(getattr(self, f"shared_{name}")(x))
            else:
                packed[name] = routing.pack_own([project(x) for project in getattr(self, f"{name}_proj")])
        streams = self.config.num_memories * x.shape[0]
        shard = None if ctx.shard is None else replace(ctx.shard, streams=streams)
        rows = self.remembered(packed, replace(ctx, cu_seqlens=routing.cu_seqlens, shard=shard), "")
        weighted = rows.squeeze(0) * routing.weight.to(rows.dtype)
        o = weighted.new_zeros(x.shape[0] * x.shape[1], *weighted.shape[1:])
        o = o.index_add(0, routing.token, weighted).view(*x.shape[:2], *weighted.shape[1:])
        if self.config.shared_mem:
            shared = {name: getattr(self, f"shared_{name}")(x) for name in ("k", "v", "b", "a")}
            o = o + self.remembered({"q": self.q_proj(x), **shared}, ctx, "shared_")
        return self.output(o, x)

    def route(self, x: Tensor, ctx: Context) -> Routing:
        """Choose each token's memories and sort; adds this layer's share to the balance loss in `ctx.carried`."""
        c, tokens = self.config, x.shape[0] * x.shape[1]
        probability = self.gate(x).float().softmax(-1).flatten(0, 1)  # [B T, M]
        weight, choice = probability.topk(c.topk, -1)
        self.balance(probability, choice, ctx)
        weight = weight / weight.sum(-1, keepdim=True)
        index = torch.arange(tokens, device=x.device)
        if ctx.cu_seqlens is None:
            sequence, sequences = index // x.shape[1], x.shape[0]
        else:
            sequence = torch.searchsorted(ctx.cu_seqlens[1:].contiguous(), index, right=True)
            sequences = ctx.cu_seqlens.numel() - 1
        memory, order = choice.flatten().sort(stable=True)
        token = order // c.topk
        lengths = torch.zeros(c.num_memories * sequences, dtype=torch.int64, device=x.device)
        lengths = lengths.scatter_add(0, memory * sequences + sequence[token], torch.ones_like(token))
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        return Routing(token, memory, weight.flatten()[order].view(-1, 1, 1), bounds)

    def balance(self, probability: Tensor, choice: Tensor, ctx: Context) -> None:
        """Running means over layers and tokens of the router's choices [topk, M] and probabilities [M]; the loss is
        M times the sum of their products, so it belongs to all layers together and every layer renews it."""
        c = self.config
        chosen = F.one_hot(choice, c.num_memories).float().mean(0)
        means = torch.cat([chosen, probability.mean(0)[None]])
        if ctx.shard is not None:  # the product below needs the means over whole rows
            means = ctx.shard.mean(means)
        sums = {
            "router_choices": means[:-1],
            "router_probability": means[-1],
            "router_layers": chosen.new_ones(()),
        }
        for name, share in sums.items():
            ctx.carried[name] = ctx.carried[name] + share if name in ctx.carried else share
        layers = ctx.carried["router_layers"]
        match = (ctx.carried["router_choices"] / layers * (ctx.carried["router_probability"] / layers)).sum()
        ctx.carried["router_loss"] = c.aux_loss_scale * c.num_memories * match

    def remembered(self, rows: dict[str, Tensor], ctx: Context, prefix: str) -> Tensor:
        """Convolutions and recurrence over projected rows [B, T, C]; `prefix` names the state in the cache."""
        c = self.config
        q, k, v = (getattr(self, f"{name}_conv1d")(rows[name], ctx, f"{prefix}{name}_conv") for name in ("q", "k", "v"))
        o, state = delta_rule(
            split_heads(q, c.num_heads),
            split_heads(k, c.num_heads),
            split_heads(v, c.num_heads),
            write_strength(rows["b"], doubled=False),
            scalar_decay=log_decay(rows["a"], self.A_log, self.dt_bias),
            normalize=True,
            initial_state=cached(ctx, f"{prefix}state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, f"{prefix}state", state)
        return o

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        names = [*(f"{n}_proj" for n in "qkvbag"), *(f"shared_{n}" for n in "kvba"), *(f"{n}_conv1d" for n in "qkv")]
        return Plan({**rows(self, c.num_heads, *names, "A_log", "dt_bias"), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Recurrences of the chosen memories and the shared one, less the projections of memories not chosen, which the
        count of Linear weights includes."""
        c = self.config
        recurrences = (c.topk + c.shared_mem) * c.state_flops(steps=1, decay=True)
        if c.single_kv_proj:
            return recurrences
        per_memory = 2.0 * c.hidden_size * (c.key_dim + c.value_dim + 2 * c.num_heads)
        return recurrences - (c.num_memories - c.topk) * per_memory


register(System(MomConfig, MixtureOfMemories))
