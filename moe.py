"""A Mixture-of-Experts transformer with the Qwen3-MoE architecture (arXiv 2505.09388), small.

One layer:   x = x + attention(norm(x));   x = x + experts(norm(x))

    attention   grouped queries, RMSNorm on every query and key head, rotary positions, no biases
    router      p = softmax(W x) over all E experts, in fp32; the K largest are active
    gates       g_e = p_e / sum of the K active p          (so they sum to 1)
    experts     y = sum over active e of g_e * down_e(silu(gate_e x) * up_e x)

What is left out, because it would make the log-prob of a response depend on its batch mates or on
chance, and the ratio of GSPO is a ratio of log-probs: dropout, router noise, expert capacity (no
token is ever dropped). Qwen3 has no shared expert, so neither has this.

Routing is data: the chosen experts come out of a forward pass as a tensor and can be given back to
a later one (routing replay). Nothing is remembered in the modules between two calls.

The letters in shape comments:
    P prompts   G responses per prompt   B = P*G rows   T tokens   S cache slots (= positions)
    L layers    E experts                K active       D width    F expert width   V vocabulary
    H query heads   J key/value heads    C head width   N = B*T tokens in one list
"""
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class MoEConfig:
    vocab_size: int
    max_length: int = 64        # longest prompt + response, in tokens
    n_layer: int = 3
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int = 2          # query heads share key/value heads in groups of n_head / n_kv_head
    n_expert: int = 8
    n_active: int = 2
    d_expert: int = 64
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


class Output(NamedTuple):
    logits: torch.Tensor        # (B, T, V), or (M, V) if `keep` chose M positions
    routes: torch.Tensor        # (L, B, T, K) active experts, most probable first
    balance_loss: torch.Tensor  # scalar, 1 if all experts are used alike, E if only one is


class KVCache:
    """Keys and values of B rows, one slot per position: slot s of row b holds position s."""

    def __init__(self, config, n_rows, n_slots, device, dtype):
        shape = (config.n_layer, 2, n_rows, config.n_kv_head, n_slots,
                 config.d_model // config.n_head)                        # (L, 2, B, J, S, C)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer, positions, k, v):
        """Put k, v (B, J, T, C) into the slots `positions` (B, T); return all slots (B, J, S, C)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        # Indexing with (B, T) tensors around a slice puts their axes first: (B, T, J, C).
        self.kv[layer, 0][rows, :, positions] = k.transpose(1, 2)
        self.kv[layer, 1][rows, :, positions] = v.transpose(1, 2)
        return self.kv[layer, 0], self.kv[layer, 1]


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i+C/2}) by its angle. x (B, *, T, C), cos (B, 1, T, C)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, self.layer = config.d_model, layer
        self.H, self.J, self.C = config.n_head, config.n_kv_head, D // config.n_head
        self.q = nn.Linear(D, self.H * self.C, bias=False)
        self.k = nn.Linear(D, self.J * self.C, bias=False)
        self.v = nn.Linear(D, self.J * self.C, bias=False)
        self.o = nn.Linear(self.H * self.C, D, bias=False)
        self.q_norm = RMSNorm(self.C, config.norm_eps)
        self.k_norm = RMSNorm(self.C, config.norm_eps)

    def forward(self, x, cos, sin, positions, cache):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.H, self.C).transpose(1, 2)        # (B, H, T, C)
        k = self.k(x).view(B, T, self.J, self.C).transpose(1, 2)        # (B, J, T, C)
        v = self.v(x).view(B, T, self.J, self.C).transpose(1, 2)        # (B, J, T, C)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is None:
            # Rows are padded on the right, so the causal mask alone hides all padding.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # A slot past its row's position holds padding or nothing yet: it must not be seen.
            k, v = cache.write(self.layer, positions, k, v)             # (B, J, S, C)
            seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))              # (B, T, D)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, D, width = config.n_expert, config.d_model, config.d_expert
        self.K = config.n_active
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * width, D))       # both halves in one product
        self.down = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x, routes):
        """x (N, D) -> y (N, D), routes (N, K), balance_loss. Given `routes` are replayed."""
        N, E = len(x), len(self.down)
        probs = self.router(x).float().softmax(-1)                      # (N, E)
        if routes is None:
            routes = probs.topk(self.K).indices                         # (N, K)
        # The gates are live even if the routes are replayed: the router keeps learning.
        gates = probs.gather(1, routes)                                 # (N, K)
        gates = (gates / gates.sum(-1, keepdim=True)).to(x.dtype)

        # Bring the N*K (token, expert) pairs into the order of their experts, so that each expert
        # works on one contiguous block. `counts` is the one transfer to the host in this layer.
        expert_of = routes.flatten()                                    # (N*K,)
        order = expert_of.argsort(stable=True)
        token_of = order // self.K
        counts = torch.bincount(expert_of, minlength=E)                 # (E,)
        blocks = x[token_of].split(counts.tolist())
        outputs = []
        for block, gate_up, down in zip(blocks, self.gate_up, self.down):
            gate, up = (block @ gate_up.T).chunk(2, dim=-1)             # (n_e, F) each
            outputs.append((F.silu(gate) * up) @ down.T)                # (n_e, D)
        weighted = torch.cat(outputs) * gates.flatten()[order, None]    # (N*K, D)
        y = torch.zeros_like(x).index_add(0, token_of, weighted)        # (N, D)

        # Switch Transformer (2101.03961) Eq. 4-6: E * sum_e (share of pairs) * (mean probability).
        balance_loss = E * (counts / (N * self.K) * probs.mean(0)).sum()
        return y, routes, balance_loss


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.experts_norm = RMSNorm(config.d_model, config.norm_eps)
        self.experts = Experts(config)

    def forward(self, x, cos, sin, positions, cache, routes):
        x = x + self.attention(self.attention_norm(x), cos, sin, positions, cache)
        flat = self.experts_norm(x).flatten(0, 1)                       # (N, D)
        y, routes, balance_loss = self.experts(flat, routes)
        return x + y.view_as(x), routes, balance_loss


class MoETransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        C = config.d_model // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, C, 2) / C)   # (C/2,)
        angle = torch.arange(config.max_length)[:, None] * frequency    # (max_length, C/2)
        angle = torch.cat((angle, angle), dim=-1)                       # (max_length, C)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=1.0)

    def forward(self, tokens, routes=None, keep=None, positions=None, cache=None):
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]   # (B, 1, T, C)
        x = self.embed(tokens)                                          # (B, T, D)
        all_routes, balance_loss = [], 0.0
        for i, layer in enumerate(self.layers):
            replayed = None if routes is None else routes[i].flatten(0, 1).long()   # (N, K)
            x, chosen, balance = layer(x, cos, sin, positions, cache, replayed)
            all_routes.append(chosen.view(B, T, -1))
            balance_loss = balance_loss + balance / len(self.layers)
        if keep is not None:
            x = x[keep]                                                 # (M, D)
        return Output(self.unembed(self.norm(x)), torch.stack(all_routes), balance_loss)


@dataclass
class Rollout:
    """What the sampler hands to the trainer: B = P*G responses, the G of one prompt side by side.

    Prompts [[3, 10], [4, 5, 10]], G = 2, pad = 0, end = 9 might give

        tokens  7 9 0        routes has a column for every position of prompt + response:
                7 7 9            3 10 7 9 .  .        "." is padding
                5 9 0            3 10 7 7 9  .
                6 6 6            4 5 10 5 9  .
        mask    1 1 0            4 5 10 6 6  6
                1 1 1        The last row was cut at max_new_tokens = 3: it has no end.
                1 1 0
                1 1 1        lengths 2 3 2 3: the end counts, padding does not.
    """
    prompts: list           # P lists of token ids
    tokens: torch.Tensor    # (B, T) responses
    logp: torch.Tensor      # (B, T) log-prob of each token when it was sampled; 0 in padding
    mask: torch.Tensor      # (B, T) True for response tokens
    routes: torch.Tensor    # (L, B, S, K) active experts
    lengths: torch.Tensor   # (B,) response tokens

    def select(self, rows):
        """The chosen rows as the trainer wants them: prompt and response in one line, no gap.

        Returns tokens (b, S); `keep` (b, S), True where the *next* token is a response token, so
        that the logits there score it; mask (b, T); routes (L, b, S, K)."""
        G = len(self.tokens) // len(self.prompts)
        lines, keep, T = [], [], int(self.lengths[rows].max())
        for row in rows.tolist():
            prompt, n = self.prompts[row // G], int(self.lengths[row])
            lines.append(torch.tensor(prompt + self.tokens[row, :n].tolist()))
            keep.append(torch.arange(len(lines[-1])) >= len(prompt) - 1)
            keep[-1][-1] = False
        pad = nn.utils.rnn.pad_sequence
        tokens, keep = pad(lines, batch_first=True), pad(keep, batch_first=True)
        return tokens, keep, self.mask[rows, :T], self.routes[:, rows, :tokens.shape[1]]


@torch.inference_mode()
def generate(model, prompts, group_size, max_new_tokens, temperature=1.0, eos_id=None, pad_id=0,
             generator=None, greedy=False):
    """Sample `group_size` responses to each prompt (a list of token lists) -> Rollout."""
    config, device = model.config, model.embed.weight.device
    P, G, T = len(prompts), group_size, max_new_tokens
    B, start = P * G, torch.tensor([len(p) for p in prompts])
    S = int(start.max()) + T
    if S > config.max_length:
        raise ValueError(f"prompt + max_new_tokens = {S} > max_length = {config.max_length}")
    # One uniform number per token, drawn at once: a row's luck does not depend on its mates.
    luck = torch.rand(B, T, generator=generator).to(device)
    tokens = torch.full((B, T), pad_id, device=device)
    logp = torch.zeros(B, T, device=device)
    routes = torch.arange(config.n_active, dtype=torch.uint8, device=device)
    routes = routes.repeat(config.n_layer, B, S, 1)                     # (L, B, S, K)

    # The prompts run once each, then their cache is copied to all G rows of the group.
    padded = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True,
                                       padding_value=pad_id).to(device)  # (P, longest)
    last = (start - 1).to(device)                                       # (P,)
    cache = KVCache(config, P, S, device, model.embed.weight.dtype)
    keep = torch.arange(padded.shape[1], device=device) == last[:, None]
    positions = torch.arange(padded.shape[1], device=device).expand_as(padded)
    out = model(padded, keep=keep, positions=positions, cache=cache)
    cache.kv = cache.kv.repeat_interleave(G, dim=2)
    logits = out.logits.repeat_interleave(G, dim=0)                     # (B, V)
    routes[:, :, :padded.shape[1]] = out.routes.repeat_interleave(G, dim=1).to(torch.uint8)
    position = last.repeat_interleave(G)                                # (B,)
    alive = torch.arange(B, device=device)                              # rows still being written

    for t in range(T):
        log_probs = (logits.float() / temperature).log_softmax(-1)      # (b, V)
        if greedy:
            new = log_probs.argmax(-1)                                  # (b,)
        else:
            # The first token at which the cumulative probability exceeds the row's number.
            cumulative = log_probs.exp().cumsum(-1)
            threshold = luck[alive, t, None] * cumulative[:, -1:]
            new = (cumulative <= threshold).sum(-1)                     # (b,)
            new = new.clamp(max=log_probs.shape[-1] - 1)
        tokens[alive, t] = new
        logp[alive, t] = log_probs.gather(1, new[:, None])[:, 0]
        if t == T - 1:
            break
        if eos_id is not None:
            going = (new != eos_id).nonzero()[:, 0]
            if len(going) == 0: break
            if len(going) < len(alive):
                alive, new, position = alive[going], new[going], position[going]
                cache.kv = cache.kv[:, :, going]
        position = position + 1
        out = model(new[:, None], positions=position[:, None], cache=cache)
        logits = out.logits[:, 0]
        routes[:, alive, position] = out.routes[:, :, 0].to(torch.uint8)

    ended = tokens == eos_id if eos_id is not None else torch.zeros_like(tokens, dtype=torch.bool)
    mask = ended.cumsum(1) - ended.long() == 0                          # up to and with the first end
    lengths = mask.sum(1)
    T = int(lengths.max())
    return Rollout(prompts, tokens[:, :T], logp[:, :T], mask[:, :T], routes[:, :, :S], lengths)
