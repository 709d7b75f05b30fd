"""A Mixture-of-Experts transformer with the Qwen3-MoE architecture (arXiv 2505.09388), small.

One layer:   x = x + attention(norm(x))
             x = x + experts(norm(x))

    attention   grouped queries, RMSNorm on every query and key head, rotary positions, no biases
    router      p = softmax(W x) over all E experts, the softmax in fp32; the K most probable are
                active, and weigh p_e / (sum of the K active p): their weights sum to 1
    experts     y = sum over the active e of weight_e * down_e(silu(gate_e x) * up_e x)

Dropout, router noise and expert capacity are left out. With them the log-prob of a response would
be random or depend on its batch mates, and the ratio of GSPO is a ratio of log-probs. Qwen3 has no
shared expert, so this model has none either.

Routing is data: the active experts come out of a forward pass as a tensor (`routes`), and a later
pass takes them in and activates them again (routing replay). No module remembers anything between
two calls.

The sampler and the trainer work on the same rectangle of tokens, see `Rollout`. Attention needs the
rectangle; between two attentions a layer computes only the real tokens, as one flat list: see
`unpad` and `pad`.

The letters in shape comments:
    P prompts    G responses to each prompt    B = P*G rows, one for each response
    S columns: W of the prompts, then T of the responses
    `new` columns of a call: all S, or those that a cache has not seen yet
    N real tokens of a call: those that are not padding
    L layers     E experts    K active experts    D width of the model    H query heads of width C
"""
import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MoEConfig:
    """The sizes of a model. ValueError for sizes that cannot be built."""
    vocab_size: int
    max_length: int = 64        # longest prompt + response, in tokens
    n_layer: int = 3
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int = 2          # n_head / n_kv_head query heads share one key/value head
    n_expert: int = 8
    n_active: int = 2           # with 1 the only weight is always 1: the router cannot learn
    d_expert: int = 64          # width inside an expert
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        def require(condition: bool, name: str, remedy: str):
            if not condition:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {remedy}")
        for name in vars(self):
            require(getattr(self, name) > 0, name, "above 0")
        require(self.d_model % (2 * self.n_head) == 0, "d_model", "a multiple of 2 * n_head")
        require(self.n_head % self.n_kv_head == 0, "n_kv_head", "a divisor of n_head")
        require(self.n_active <= self.n_expert, "n_active", f"at most n_expert, {self.n_expert}")
        require(self.n_expert <= 256, "n_expert", "at most 256: rollouts keep routes in one byte")


# ---------------------------------------------------------------------------- the model

def unpad(x: Tensor, places: Tensor) -> Tensor:
    """The rectangle x (B, new, ...) -> the flat list of its real tokens (N, ...), row after row.

    `places` (N,) are the positions of the real tokens if you number the rectangle's cells row after
    row, from 0. The "." is padding:

        x    .  3 10  7       cells   0  1  2  3      places   1 2 3 4 5 6
             4  5 10  .               4  5  6  7      result   3 10 7 4 5 10
    """
    return x.flatten(0, 1).index_select(0, places)


def pad(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of unpad: x (N, ...) -> the rectangle (B, new, ...), with 0 in padding."""
    B, new = shape
    cells = x.new_zeros(B * new, *x.shape[1:])
    return cells.index_copy(0, places, x).unflatten(0, (B, new))


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotary positions (2104.09864): read each pair of neighbours in x (N, heads, C) as a complex
    number and turn it by the angle that freqs_cis (N, 1, C/2) has for its position. (The released
    Qwen3 pairs numbers half a head apart: the same model, with q and k in another order.)"""
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))      # (N, heads, C/2)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


class KVCache:
    """What the sampler keeps of the columns so far, so that each pass computes only new ones."""
    def __init__(self):
        self.mask = None        # (B, S), True for real tokens
        self.layers = {}        # Attention -> its keys and its values, (B, n_kv_head, S, C) each

    def append(self, attention: "Attention", keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the new columns -> those of all S columns."""
        if attention in self.layers:
            old_keys, old_values = self.layers[attention]
            keys = torch.cat((old_keys, keys), dim=2)
            values = torch.cat((old_values, values), dim=2)
        self.layers[attention] = keys, values
        return keys, values

    def keep_rows(self, rows: Tensor):
        """Keep only the chosen rows; a row can be chosen several times."""
        self.mask = self.mask.index_select(0, rows)
        for attention, (keys, values) in self.layers.items():
            self.layers[attention] = keys.index_select(0, rows), values.index_select(0, rows)


class Attention(nn.Module):
    """Causal attention in which several query heads share a key/value head (GQA, 2305.13245)."""
    def __init__(self, config: MoEConfig):
        super().__init__()
        D = config.d_model
        self.C = D // config.n_head
        self.q = nn.Linear(D, config.n_head * self.C, bias=False)
        self.k = nn.Linear(D, config.n_kv_head * self.C, bias=False)
        self.v = nn.Linear(D, config.n_kv_head * self.C, bias=False)
        self.o = nn.Linear(config.n_head * self.C, D, bias=False)
        self.q_norm = nn.RMSNorm(self.C, config.norm_eps)
        self.k_norm = nn.RMSNorm(self.C, config.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, visible: Tensor, places: Tensor,
                cache: KVCache | None = None) -> Tensor:
        """x (N, D), freqs_cis (N, 1, C/2), visible (B, 1, new, S), places (N,) -> (N, D)."""
        B, _, new, _ = visible.shape
        q = self.q(x).unflatten(1, (-1, self.C))                        # (N, H, C)
        k = self.k(x).unflatten(1, (-1, self.C))                        # (N, n_kv_head, C)
        v = self.v(x).unflatten(1, (-1, self.C))
        q = rotate(self.q_norm(q), freqs_cis)
        k = rotate(self.k_norm(k), freqs_cis)
        q = pad(q, places, (B, new)).transpose(1, 2)                    # (B, H, new, C)
        k = pad(k, places, (B, new)).transpose(1, 2)                    # (B, n_kv_head, new, C)
        v = pad(v, places, (B, new)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self, k, v)                             # (B, n_kv_head, S, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)                                # (B, new, D)
        return self.o(unpad(y, places))


class Experts(nn.Module):
    """A router and E feed-forward networks, K of which work on each token."""
    def __init__(self, config: MoEConfig):
        super().__init__()
        E = config.n_expert
        D = config.d_model
        self.n_active = config.n_active
        self.router = nn.Linear(D, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, config.d_expert, D))
        self.up = nn.Parameter(torch.empty(E, config.d_expert, D))
        self.down = nn.Parameter(torch.empty(E, D, config.d_expert))

    def forward(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> y (N, D), routes (N, K), router_logits (N, E).

        `routes` that you pass in are activated in place of the router's own choice (replay)."""
        router_logits = at_least_fp32(self.router(x))                   # (N, E)
        if routes is None:
            routes = router_logits.topk(self.n_active).indices          # (N, K)
        # Softmax over all experts, divided by the sum of the active ones, is softmax over the
        # active ones. Under replay too it comes from today's logits: the router keeps learning.
        expert_weights = router_logits.gather(1, routes).softmax(dim=-1).to(x.dtype)    # (N, K)

        # Sort the N*K pairs (token, expert) by expert: each expert gets one block of rows.
        expert_of_pair, order = routes.flatten().sort(stable=True)      # (N*K,) each
        token_of_pair = order // routes.shape[1]                        # (N*K,)
        rows_per_expert = expert_of_pair.bincount(minlength=len(self.gate)).tolist()
        blocks = x.index_select(0, token_of_pair).split(rows_per_expert)
        expert_outputs = []
        for block, gate, up, down in zip(blocks, self.gate, self.up, self.down):
            inner = F.silu(block @ gate.T) * (block @ up.T)             # (rows, d_expert)
            expert_outputs.append(inner @ down.T)                       # (rows, D)
        weight_of_pair = expert_weights.flatten().index_select(0, order)        # (N*K,)
        weighted = torch.cat(expert_outputs) * weight_of_pair[:, None]  # (N*K, D)
        y = torch.zeros_like(x).index_add(0, token_of_pair, weighted)   # (N, D)
        return y, routes, router_logits


class Layer(nn.Module):
    def __init__(self, config: MoEConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.experts_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.experts = Experts(config)

    def forward(self, x: Tensor, freqs_cis: Tensor, visible: Tensor, places: Tensor,
                cache: KVCache | None, routes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), freqs_cis, visible, places, cache)
        y, routes, router_logits = self.experts(self.experts_norm(x), routes)
        return x + y, routes, router_logits


class Output(NamedTuple):
    """What a forward pass returns; 0 in padding."""
    logits: Tensor          # (B, logits_to_keep, vocab_size)
    hidden: Tensor          # (B, logits_to_keep, D) what the logits are made of
    routes: Tensor          # (B, new, L, K) the active experts, most probable first
    router_logits: Tensor   # (B, new, L, E) in fp32


class MoETransformer(nn.Module):
    """The model: embedding, layers, norm and a projection to the vocabulary."""
    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        C = config.d_model // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, C, 2) / C)   # (C/2,)
        angle = torch.arange(config.max_length)[:, None] * frequency    # (max_length, C/2)
        # Complex numbers of fp32, which model.bfloat16() leaves alone: positions stay exact.
        freqs_cis = torch.polar(torch.ones_like(angle), angle)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:         # 1/sqrt(inputs): outputs are as large as inputs
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=1.0)

    def forward(self, tokens: Tensor, mask: Tensor, routes: Tensor | None = None,
                cache: KVCache | None = None, logits_to_keep: int = 0) -> Output:
        """Tokens (B, new) -> Output. What stands in padding, on either side, changes nothing.

        mask (B, new)         True for real tokens
        routes (B, new, L, K) experts to activate instead of the router's choice (replay)
        cache                 what came before; this call adds its columns to it
        logits_to_keep        the last columns, whose logits you want; 0 for all
        ValueError for more columns than config.max_length."""
        B, new = tokens.shape
        all_mask = mask                                                 # (B, S)
        if cache is not None:
            if cache.mask is not None:
                all_mask = torch.cat((cache.mask, mask), dim=1)
            cache.mask = all_mask
        S = all_mask.shape[1]
        if S > self.config.max_length:
            raise ValueError(f"{S} columns are more than max_length = {self.config.max_length}")

        places = mask.flatten().nonzero()[:, 0]                         # (N,)
        x = self.embed(unpad(tokens, places))                           # (N, D)
        # The first real token of a row has position 0, however much padding stands before it.
        positions = (all_mask.cumsum(dim=1) - 1)[:, -new:]              # (B, new)
        freqs_cis = self.freqs_cis[unpad(positions, places)][:, None]   # (N, 1, C/2)
        key = torch.arange(S, device=tokens.device)                     # (S,)
        query = key[-new:, None]                                        # (new, 1)
        # A column sees the real tokens up to its own. Padding sees itself: no softmax is empty.
        visible = all_mask[:, None] & (key <= query) | (key == query)   # (B, new, S)
        visible = visible[:, None]                                      # the same for all heads
        active = []
        router_logits = []
        for i, layer in enumerate(self.layers):
            replayed = None if routes is None else unpad(routes[:, :, i], places).long()    # (N, K)
            x, active_here, logits_here = layer(x, freqs_cis, visible, places, cache, replayed)
            active.append(active_here)                                  # (N, K)
            router_logits.append(logits_here)                           # (N, E)

        hidden = self.norm(pad(x, places, (B, new))[:, -logits_to_keep:])
        return Output(self.unembed(hidden), hidden,
                      pad(torch.stack(active, dim=1), places, (B, new)),
                      pad(torch.stack(router_logits, dim=1), places, (B, new)))


def balance_loss(routes: Tensor, router_logits: Tensor, mask: Tensor) -> Tensor:
    """How unevenly the experts are used: 1 if all are used alike, E/K if only K of them are.

    E * sum over e of (share of the active pairs) * (mean probability), averaged over the layers:
    Switch Transformer (2101.03961), Eq. 4-6. Of routes (B, S, L, K) and router_logits (B, S, L, E),
    both as a pass gave them, for the real tokens of mask (B, S)."""
    routes = routes[mask].transpose(0, 1)                               # (L, N, K)
    router_logits = router_logits[mask].transpose(0, 1)                 # (L, N, E)
    probs = router_logits.contiguous().softmax(dim=-1)
    E = probs.shape[-1]
    pairs = F.one_hot(routes, E).sum(dim=(1, 2))                        # (L, E)
    share = pairs / pairs.sum(dim=1, keepdim=True)
    return (E * (share * probs.mean(dim=1)).sum(dim=1)).mean()


# ---------------------------------------------------------------------------- the sampler

@dataclass
class Rollout:
    """What flows from the sampler to the trainer: one rectangle, a row for every response.

    Prompts are padded on the left to a common width W, responses follow, padded on the right; those
    to one prompt stand side by side. Prompts 3 10 and 4 5 10, two responses to each, end token 9
    and padding "." may give

        tokens   .  3 10 |  7  9  .               mask   . x x | x x .
                 .  3 10 |  7  7  9                      . x x | x x x
                 4  5 10 |  5  9  .                      x x x | x x .
                 4  5 10 |  6  6  6  (truncated)         x x x | x x x

    The truncated response has no end token. W = 3 columns of prompts, T = 3 of responses, whose
    lengths are 2 3 2 3, as the end token counts.

    Whoever works on a rollout adds what he knows of each row: in the fields that are None at first,
    or in others. The rows that are selected take it along."""
    tokens: Tensor                      # (B, S)
    mask: Tensor                        # (B, S) True for real tokens
    prompt_width: int                   # W
    logp_old: Tensor | None = None      # (B, T) log-prob of each token when it was sampled
    routes: Tensor | None = None        # (B, S, L, K) experts that were active then, uint8; 0 where
                                        # no pass was made: padding, last token of a response
    rewards: Tensor | None = None       # (B,)
    advantages: Tensor | None = None    # (B,), or (B, T) for one per token
    weights: Tensor | None = None       # (B,) how much each token of the response counts

    @property
    def response(self) -> Tensor:
        """The tokens of the responses (B, T)."""
        return self.tokens[:, self.prompt_width:]

    @property
    def response_mask(self) -> Tensor:
        """True for tokens of a response, its end token included (B, T)."""
        return self.mask[:, self.prompt_width:]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response (B,)."""
        return self.response_mask.sum(dim=1)

    def select(self, rows: Tensor) -> "Rollout":
        """The chosen rows: numbers, or True for each one chosen (B,)."""
        part = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(part, name, x[rows])
        return part


def lay_out(prompts: list[list[int]], room: int, pad_id: int,
            vocab_size: int) -> tuple[Tensor, Tensor, int]:
    """P lists of token ids -> tokens and mask (P, W + room), with empty columns for responses, and
    W. ValueError for a prompt that has no ids or unknown ones."""
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt is {prompt}; it must be one or more token ids from 0 to "
                             f"{vocab_size - 1}")
    W = max(map(len, prompts))
    tokens = []
    mask = []
    for prompt in prompts:
        left = W - len(prompt)
        tokens.append([pad_id] * left + prompt + [pad_id] * room)
        mask.append([False] * left + [True] * len(prompt) + [False] * room)
    return torch.tensor(tokens), torch.tensor(mask), W


def choose(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token for each row of probs (rows, vocab_size): the first at which the cumulative
    probability exceeds the row's random number, uniform (rows,), at least 0 and below 1."""
    cumulative = probs.cumsum(dim=-1)                                   # (rows, vocab_size)
    number = uniform[:, None] * cumulative[:, -1:]                      # (rows, 1)
    return torch.searchsorted(cumulative, number, right=True)[:, 0]


@torch.no_grad()
def generate(model: MoETransformer, prompts: list[list[int]], group_size: int, max_new_tokens: int,
             temperature: float = 1.0, eos_id: int = -1, pad_id: int = 0,
             uniform: Tensor | None = None) -> Rollout:
    """Sample `group_size` responses to each of P prompts, lists of token ids.

    A response ends with `eos_id`, or is truncated after `max_new_tokens`. No top-k or top-p: the
    trainer scores the distribution that was sampled. Temperature 0 takes the likeliest token, with
    its log-prob at temperature 1. All randomness is `uniform` (B, max_new_tokens), from 0 to 1."""
    device = model.embed.weight.device

    # 1 Prefill: each prompt goes through the model once.
    tokens, mask, W = lay_out(prompts, max_new_tokens, pad_id, model.config.vocab_size)
    cache = KVCache()
    out = model(tokens[:, :W].to(device), mask[:, :W].to(device), cache=cache, logits_to_keep=1)

    # 2 Copy each prompt and what is known of it to all rows of its group.
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(group_size)        # (B,)
    tokens = tokens[prompt_of_row].to(device)                           # (B, S)
    mask = mask[prompt_of_row].to(device)
    logits = out.logits[prompt_of_row, -1]                              # (B, vocab_size)
    routes = F.pad(out.routes[prompt_of_row], (0, 0, 0, 0, 0, max_new_tokens)).to(torch.uint8)
    logp_old = torch.zeros(len(tokens), max_new_tokens, device=device)  # (B, T)
    cache.keep_rows(prompt_of_row.to(device))

    # 3 Loop: choose a token for each row, drop the rows that end with it, compute the others.
    # Each row has random numbers of its own: that one row ends changes nothing for the others.
    uniform = (torch.rand(logp_old.shape) if uniform is None else uniform).to(device)
    rows = torch.arange(len(tokens), device=device)                     # those that go on
    for t in range(max_new_tokens):
        probs = (logits.float() / (temperature or 1.0)).softmax(dim=-1)     # (rows, vocab_size)
        chosen = choose(probs, uniform[rows, t]) if temperature else probs.argmax(dim=-1)
        # The end token is like any other: chosen here, so scored and learned. To stop is an action.
        tokens[rows, W + t] = chosen
        mask[rows, W + t] = True
        logp_old[rows, t] = probs.gather(1, chosen[:, None])[:, 0].log()
        # But nothing is predicted from the last token of a response: it needs no pass.
        go_on = (chosen != eos_id).nonzero()[:, 0]
        if len(go_on) == 0 or t == max_new_tokens - 1:
            break
        if len(go_on) < len(rows):
            rows = rows[go_on]
            chosen = chosen[go_on]
            cache.keep_rows(go_on)
        out = model(chosen[:, None], mask[rows, W + t][:, None], cache=cache)
        logits = out.logits[:, 0]
        routes[rows, W + t] = out.routes[:, 0].to(torch.uint8)

    # 4 Pack up, without the columns that no response has reached.
    S = W + t + 1
    return Rollout(tokens[:, :S], mask[:, :S], W, logp_old[:, :S - W], routes[:, :S])
