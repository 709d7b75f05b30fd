"""A Mixture-of-Experts transformer with the Qwen3-MoE architecture (arXiv 2505.09388), small.

One layer:   x = x + attention(norm(x))
             x = x + experts(norm(x))

    attention   grouped queries, RMSNorm on every query and key head, rotary positions, no biases
    router      p = softmax(router x) over all E experts, in fp32; the K most probable are active,
                and weigh p_e / (sum of the K active p): their weights sum to 1
    experts     y = sum over the active e of weight_e * down_e (silu(gate_e x) * up_e x)

Dropout, router noise and expert capacity are left out. With them the log-prob of a response would
be random or depend on its batch mates, and the ratio of GSPO is a ratio of log-probs. Qwen3 has no
shared expert, so this model has none either.

Routing is data: the active experts come out of a forward pass as a tensor (`routes`), and a later
pass takes them in and activates them again (routing replay). No module remembers anything between
two calls.

Tokens come as a rectangle, with padding. Attention needs the rectangle; between two attentions a
layer computes only the real tokens, as one flat list: see `unpad` and `pad`.

The letters in shape comments, to which the sampler below adds its own:
    B rows    N real tokens of a call: those that are not padding
    `new` columns of a call    S all columns: first those in a cache, then the new ones
    L layers    E experts    K active experts    D width of the model    H query heads of width C
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
    max_length: int = 64        # most columns that a call may have: prompt + response, in tokens
    n_layer: int = 3
    d_model: int = 64
    n_head: int = 4
    n_kv_head: int = 2          # n_head / n_kv_head query heads share one key/value head
    n_expert: int = 8
    n_active: int = 2           # with 1 its weight is always 1: only balance_loss moves the router
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

def unpad(x: Tensor, cells: Tensor) -> Tensor:
    """The rectangle x (B, new, ...) -> the flat list of its real tokens (N, ...), row after row.

    `cells` (N,) are the numbers of the cells with real tokens, if you count the cells of the
    rectangle row after row, from 0. The "." is padding:

        x    .  3 10  7       numbers   0  1  2  3       cells    1 2 3 4 5 6
             4  5 10  .                 4  5  6  7       result   3 10 7 4 5 10
    """
    x = x.flatten(0, 1)
    if len(cells) == len(x):        # no padding, as in each step of the sampler
        return x
    return x.index_select(0, cells)


def pad(x: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of unpad: x (N, ...) -> the rectangle (B, new, ...), with 0 in padding."""
    B, new = shape
    if len(cells) < B * new:
        x = x.new_zeros(B * new, *x.shape[1:]).index_copy(0, cells, x)
    return x.unflatten(0, shape)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def turns_at(positions: Tensor, config: MoEConfig) -> Tensor:
    """How rotary positions (2104.09864) turn a head: for the positions (N,) of tokens, the complex
    numbers of length 1 (N, 1, C/2) to multiply it with. In fp32, whatever the weights are in."""
    C = config.d_model // config.n_head
    frequency = config.rope_theta ** (-torch.arange(0, C, 2, device=positions.device).float() / C)
    angle = positions[:, None, None].float() * frequency                # (N, 1, C/2)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Read each pair of neighbours in x (N, heads, C) as a complex number and turn it. (The
    released Qwen3 pairs numbers half a head apart: the same model, with q and k reordered.)"""
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))      # (N, heads, C/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


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

    def forward(self, x: Tensor, turns: Tensor, visible: Tensor, cells: Tensor,
                cache: KVCache | None = None) -> Tensor:
        """x (N, D), turns (N, 1, C/2), visible (B, 1, new, S), cells (N,) -> (N, D)."""
        B, _, new, _ = visible.shape
        q = self.q(x).unflatten(1, (-1, self.C))                        # (N, H, C)
        k = self.k(x).unflatten(1, (-1, self.C))                        # (N, n_kv_head, C)
        v = self.v(x).unflatten(1, (-1, self.C))
        q = rotate(self.q_norm(q), turns)
        k = rotate(self.k_norm(k), turns)
        q = pad(q, cells, (B, new)).transpose(1, 2)                    # (B, H, new, C)
        k = pad(k, cells, (B, new)).transpose(1, 2)                    # (B, n_kv_head, new, C)
        v = pad(v, cells, (B, new)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self, k, v)                             # (B, n_kv_head, S, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)                                # (B, new, D)
        return self.o(unpad(y, cells))


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

    def forward(self, x: Tensor, turns: Tensor, visible: Tensor, cells: Tensor,
                cache: KVCache | None, routes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), turns, visible, cells, cache)
        y, routes, router_logits = self.experts(self.experts_norm(x), routes)
        return x + y, routes, router_logits


class Output(NamedTuple):
    """What a forward pass returns. In padding, all is 0. `kept` are the columns you asked for."""
    logits: Tensor          # (B, kept, vocab_size)
    hidden: Tensor          # (B, kept, D) what the logits are made of
    routes: Tensor          # (B, new, L, K) the active experts
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
        for parameter in self.parameters():
            if parameter.dim() > 1:         # 1/sqrt(inputs): outputs are as large as inputs
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=1.0)

    def forward(self, tokens: Tensor, mask: Tensor, routes: Tensor | None = None,
                cache: KVCache | None = None, logits_to_keep: int | None = None) -> Output:
        """Tokens (B, new) -> Output. What stands in padding, on either side, changes nothing.

        mask (B, new)         True for real tokens
        routes (B, new, L, K) experts to activate instead of the router's choice (replay)
        cache                 what came before; this call adds its columns to it
        logits_to_keep        how many columns, the last ones, need logits; None for all
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

        cells = mask.flatten().nonzero()[:, 0]                          # (N,)
        x = self.embed(unpad(tokens, cells))                            # (N, D)
        # The first real token of a row has position 0, however much padding stands before it:
        # . 3 10 7 have the positions -1 0 1 2, of which that of the padding is not used.
        positions = (all_mask.cumsum(dim=1) - 1)[:, -new:]              # (B, new)
        turns = turns_at(unpad(positions, cells), self.config)          # (N, 1, C/2)
        key_column = torch.arange(S, device=tokens.device)              # (S,)
        query_column = key_column[-new:, None]                          # (new, 1)
        # A query sees the real tokens up to its own column, and itself: so the softmax of padding
        # is not over nothing.
        visible = all_mask[:, None] & (key_column <= query_column)      # (B, new, S)
        visible = visible | (key_column == query_column)
        visible = visible[:, None]                                      # the same for all heads
        routes_of_layers = []
        logits_of_layers = []
        for i, layer in enumerate(self.layers):
            replayed = None
            if routes is not None:
                replayed = unpad(routes[:, :, i], cells).long()         # (N, K)
            x, active, router_logits = layer(x, turns, visible, cells, cache, replayed)
            routes_of_layers.append(active)                             # (N, K)
            logits_of_layers.append(router_logits)                      # (N, E)

        first = 0 if logits_to_keep is None else max(0, new - logits_to_keep)
        hidden = self.norm(pad(x, cells, (B, new))[:, first:])
        return Output(self.unembed(hidden), hidden,
                      pad(torch.stack(routes_of_layers, dim=1), cells, (B, new)),
                      pad(torch.stack(logits_of_layers, dim=1), cells, (B, new)))


def balance_loss(routes: Tensor, router_logits: Tensor, mask: Tensor) -> Tensor:
    """How unevenly the experts are used: 1 if all are used alike, E/K if K of them are active for
    all tokens and have all the probability.

    E * sum over e of (share of the active pairs) * (mean probability), averaged over the layers:
    Switch Transformer (2101.03961), Eq. 4-6. routes (B, S, L, K) and router_logits (B, S, L, E) are
    those of an Output; only the real tokens of mask (B, S) count."""
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

    More letters: P prompts, G responses to each, so that B = P*G. S = W + T columns: W of the
    prompts, padded on the left, and T of the responses, padded on the right. Responses to one
    prompt stand side by side. Prompts 3 10 and 4 5 10, two responses to each, end token 9 and
    padding "." may give

        tokens   .  3 10 |  7  9  .               mask   . x x | x x .
                 .  3 10 |  7  7  9                      . x x | x x x
                 4  5 10 |  5  9  .                      x x x | x x .
                 4  5 10 |  6  6  6  (truncated)         x x x | x x x

    The truncated response has no end token. The lengths are 2 3 2 3, as the end token counts.

    What becomes known of the rows later goes into the fields that are None at first, or into others
    of your own. Each tensor here has an entry for every row, and `select` selects from all."""
    tokens: Tensor                      # (B, S)
    mask: Tensor                        # (B, S) True for real tokens
    prompt_width: int                   # W
    logp_old: Tensor | None = None      # (B, T) log-prob of each token when it was sampled
    routes: Tensor | None = None        # (B, S, L, K) experts that were active then, uint8. Padding
                                        # and the last token of a response, from which nothing is
                                        # predicted, have none: a 0, which reads as expert 0
    rewards: Tensor | None = None       # (B,)
    advantages: Tensor | None = None    # (B,), or (B, T) for one per token
    token_weights: Tensor | None = None # (B,) how much each token of the response counts

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


def lay_out(prompts: list[list[int]], responses: list[list[int]], pad_id: int,
            device: torch.device, room: int = 0) -> Rollout:
    """Prompts and a response to each, lists of token ids -> a Rollout as drawn above, with `room`
    more columns of padding on the right."""
    W = max(map(len, prompts))
    T = max(map(len, responses)) + room
    tokens = []
    mask = []
    for prompt, response in zip(prompts, responses):
        left = W - len(prompt)
        right = T - len(response)
        tokens.append([pad_id] * left + prompt + response + [pad_id] * right)
        mask.append([False] * left + [True] * len(prompt + response) + [False] * right)
    return Rollout(torch.tensor(tokens, device=device), torch.tensor(mask, device=device), W)


def check_request(config: MoEConfig, prompts: list[list[int]], max_new_tokens: int,
                  temperature: float):
    """ValueError, naming what is wrong, for a request that `generate` cannot serve."""
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"a prompt is {prompt}; it must be one or more token ids from 0 to "
                             f"{config.vocab_size - 1}")
    if not (prompts and max_new_tokens >= 1 and temperature >= 0):
        raise ValueError(f"no prompts, or {max_new_tokens=} below 1, or {temperature=} below 0")
    columns = max(map(len, prompts)) + max_new_tokens
    if columns > config.max_length:
        raise ValueError(f"prompt + max_new_tokens = {columns} > max_length = {config.max_length}")


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits (rows, vocab_size), and its log-prob; (rows,) each.

    It is the first at which the cumulative probability exceeds the row's number `uniform` (rows,),
    at least 0 and below 1; at temperature 0 the likeliest, with its log-prob at temperature 1.
    FloatingPointError for logits of which no probabilities can be made."""
    probs = (logits.float() / (temperature or 1.0)).softmax(dim=-1)     # (rows, vocab_size)
    if probs.isnan().any():
        raise FloatingPointError(f"logits in {logits.dtype} are not finite; try a wider precision")
    if temperature == 0:
        chosen = probs.argmax(dim=-1)                                   # (rows,)
    else:
        cumulative = probs.cumsum(dim=-1)
        number = uniform[:, None] * cumulative[:, -1:]                  # (rows, 1)
        chosen = torch.searchsorted(cumulative, number, right=True)[:, 0]
    return chosen, probs.gather(1, chosen[:, None])[:, 0].log()


@torch.inference_mode()
def generate(model: MoETransformer, prompts: list[list[int]], group_size: int, max_new_tokens: int,
             temperature: float = 1.0, eos_id: int = -1, pad_id: int = 0,
             uniform: Tensor | None = None) -> Rollout:
    """Sample `group_size` responses to each of P prompts, lists of token ids. A response ends with
    `eos_id`, or is truncated after `max_new_tokens`. No top-k or top-p: scored is what was sampled.
    `choose` explains the temperature and `uniform` (B, max_new_tokens)."""
    check_request(model.config, prompts, max_new_tokens, temperature)
    device = model.embed.weight.device
    # 1 Prefill: each prompt goes through the model once.
    start = lay_out(prompts, [[]] * len(prompts), pad_id, device, room=max_new_tokens)      # P rows
    W = start.prompt_width
    cache = KVCache()
    out = model(start.tokens[:, :W], start.mask[:, :W], cache=cache, logits_to_keep=1)

    # 2 Copy each prompt, and what is known of it, to all rows of its group.
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    cache.keep_rows(prompt_of_row)
    logits = out.logits[prompt_of_row, -1]                              # (B, vocab_size)
    rollout = start.select(prompt_of_row)                               # B rows
    routes = out.routes[prompt_of_row].to(torch.uint8)                  # (B, W, L, K)
    rollout.routes = F.pad(routes, (0, 0, 0, 0, 0, max_new_tokens))     # (B, S, L, K)
    rollout.logp_old = torch.zeros_like(rollout.response, dtype=torch.float32)  # (B, T)

    # 3 Loop: choose a token for each row, drop the rows that end with it, compute the others.
    # Each row has random numbers of its own: that one row ends changes nothing for the others.
    uniform = (torch.rand(rollout.response.shape) if uniform is None else uniform).to(device)
    rows = torch.arange(len(prompt_of_row), device=device)              # those that go on
    for t in range(max_new_tokens):
        chosen, logp_old = choose(logits, temperature, uniform[rows, t])
        # The end token is like any other: chosen here, so scored and learned. To stop is an action.
        rollout.tokens[rows, W + t] = chosen
        rollout.mask[rows, W + t] = True
        rollout.logp_old[rows, t] = logp_old
        # But nothing is predicted from the last token of a response: it needs no pass.
        go_on = (chosen != eos_id).nonzero()[:, 0]
        if len(go_on) == 0 or t == max_new_tokens - 1:
            break
        if len(go_on) < len(rows):
            rows = rows[go_on]
            chosen = chosen[go_on]
            cache.keep_rows(go_on)
        out = model(chosen[:, None], rollout.mask[rows, W + t, None], cache=cache)
        logits = out.logits[:, 0]
        rollout.routes[rows, W + t] = out.routes[:, 0].to(torch.uint8)

    # 4 Pack up, as ordinary tensors again, without the columns that no response has reached.
    S = W + t + 1
    with torch.inference_mode(False):
        return Rollout(rollout.tokens[:, :S].clone(), rollout.mask[:, :S].clone(), W,
                       rollout.logp_old[:, :t + 1].clone(), rollout.routes[:, :S].clone())
