"""A Mixture-of-Experts transformer with the Qwen3-MoE architecture (arXiv 2505.09388), small.

One layer:   x = x + attention(norm(x))
             x = x + experts(norm(x))

    attention   grouped queries, RMSNorm on every query and key head, rotary positions, no biases
    router      p = softmax(W x) over all E experts, the softmax in fp32; the K most probable are
                active, and weigh p_e / (sum of the K active p): their weights sum to 1
    experts     y = sum over the active e of weight_e * down_e(silu(gate_e x) * up_e x)

Dropout, router noise and expert capacity are left out. With them the log-prob of a response would
depend on chance or on its batch mates, and the ratio of GSPO is a ratio of log-probs. Qwen3 has no
shared expert, so this model has none either.

Routing is data: the active experts come out of a forward pass as a tensor (`routes`), and a later
pass takes them in and activates them again (routing replay). No module remembers anything between
two calls.

The sampler and the trainer work on the same rectangle of tokens, see `Rollout`. Attention needs the
rectangle; between two attentions a layer computes only the real tokens, as one flat list: see
`unpad` and `pad`.

The letters in shape comments:
    B rows (responses)    S columns    T the last of them: those of a call, or of the responses
    N real tokens         L layers     E experts    K active experts
    D width of the model  H query heads             C width of a head
"""
import contextlib
import copy
from dataclasses import dataclass
from typing import ContextManager, NamedTuple

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
    n_active: int = 2
    d_expert: int = 64          # width inside an expert
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        def require(condition, name, remedy):
            if not condition:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {remedy}")
        for name, kind in self.__annotations__.items():
            require(kind is float or getattr(self, name) >= 1, name, "at least 1")
        require(self.d_model % (2 * self.n_head) == 0, "d_model", "a multiple of 2 * n_head")
        require(self.n_head % self.n_kv_head == 0, "n_kv_head", "a divisor of n_head")
        require(self.n_active <= self.n_expert, "n_active", f"at most n_expert, {self.n_expert}")
        require(self.n_expert <= 256, "n_expert", "at most 256: rollouts keep routes in one byte")


# ---------------------------------------------------------------------------- the model

def unpad(x: Tensor, places: Tensor) -> Tensor:
    """The rectangle x (B, T, ...) -> the flat list of its real tokens (N, ...), row after row.

    `places` (N,) are the positions of the real tokens if you number the rectangle's cells row after
    row, from 0. The "." is padding:

        x    .  3 10  7       cells   0  1  2  3      places   1 2 3 4 5 6
             4  5 10  .               4  5  6  7      result   3 10 7 4 5 10
    """
    return x.flatten(0, 1).index_select(0, places)


def pad(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of unpad: the flat list x (N, ...) -> the rectangle (B, T, ...), for a `shape` of
    (B, T), with 0 in padding."""
    B, T = shape
    cells = x.new_zeros(B * T, *x.shape[1:])
    return cells.index_copy(0, places, x).unflatten(0, (B, T))


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, dtype: str) -> ContextManager:
    """With this, PyTorch computes matrix products in bfloat16 or float16, if `dtype` says so. The
    weights, what the layers add up, softmax, norms and rotary positions stay in fp32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotary positions (2104.09864): read each pair of neighbours in x (N, heads, C) as a complex
    number and turn it by the angle that freqs_cis (N, 1, C/2) has for its position. (The released
    Qwen3 pairs numbers half a head apart: the same model, with q and k in another order.)"""
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))      # (N, heads, C/2)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).to(x.dtype)


class LayerCache:
    """The keys and values of one layer for all columns so far, (B, n_kv_head, S, C) each."""
    def __init__(self):
        self.keys = None
        self.values = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest T columns -> the keys and values of all S columns."""
        if self.keys is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys = keys
        self.values = values
        return keys, values


class KVCache:
    """What the sampler keeps of the columns so far, so that each pass computes only new ones."""
    def __init__(self, n_layer: int):
        self.mask = None                    # (B, S), True for real tokens
        self.layers = [LayerCache() for _ in range(n_layer)]

    def keep_rows(self, rows: Tensor):
        """Keep only the chosen rows; a row can be chosen several times."""
        self.mask = self.mask.index_select(0, rows)
        for layer in self.layers:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)


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
                cache: LayerCache | None = None) -> Tensor:
        """x (N, D), freqs_cis (N, 1, C/2), visible (B, 1, T, S), places (N,) -> (N, D)."""
        B, _, T, _ = visible.shape
        q = self.q(x).unflatten(1, (-1, self.C))                        # (N, H, C)
        k = self.k(x).unflatten(1, (-1, self.C))                        # (N, n_kv_head, C)
        v = self.v(x).unflatten(1, (-1, self.C))
        # Of the norm's type: under autocast q and k are of another one.
        q = rotate(self.q_norm(q.to(self.q_norm.weight.dtype)), freqs_cis)
        k = rotate(self.k_norm(k.to(self.k_norm.weight.dtype)), freqs_cis)
        q = pad(q, places, (B, T)).transpose(1, 2)                      # (B, H, T, C)
        k = pad(k, places, (B, T)).transpose(1, 2)                      # (B, n_kv_head, T, C)
        v = pad(v, places, (B, T)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)                                   # (B, n_kv_head, S, C)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)                                # (B, T, D)
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
        # Not under autocast: rounded logits are often equal, and then other experts win.
        with torch.autocast(x.device.type, enabled=False):
            router_logits = at_least_fp32(self.router(x))               # (N, E)
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
                cache: LayerCache | None, routes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), freqs_cis, visible, places, cache)
        y, routes, router_logits = self.experts(self.experts_norm(x), routes)
        return x + y, routes, router_logits


class Output(NamedTuple):
    """What a forward pass returns. In padding, logits and router_logits are 0."""
    logits: Tensor          # (B, logits_to_keep, vocab_size)
    hidden: Tensor          # (B, logits_to_keep, D): the logits are made of these
    routes: Tensor          # (L, B, T, K) the active experts, most probable first
    router_logits: Tensor   # (L, B, T, E) in fp32


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
                cache: KVCache | None = None, logits_to_keep: int | None = None) -> Output:
        """Tokens (B, T) -> Output. What stands in padding, on either side, changes nothing.

        mask (B, T)           True for real tokens
        routes (L, B, T, K)   experts to activate instead of the router's choice (replay)
        cache                 what came before; this call adds its T columns to it
        logits_to_keep        the last columns, whose logits you want; None for all
        ValueError for more columns than config.max_length."""
        B, T = tokens.shape
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
        positions = (all_mask.cumsum(dim=1) - 1)[:, -T:]                # (B, T)
        freqs_cis = self.freqs_cis[unpad(positions, places)][:, None]   # (N, 1, C/2)
        key = torch.arange(S, device=tokens.device)                     # (S,)
        query = key[-T:, None]                                          # (T, 1)
        # A column sees the real tokens up to its own. Padding sees itself: no softmax is empty.
        visible = all_mask[:, None] & (key <= query)                    # (B, T, S)
        visible = visible | (key == query)

        all_routes = []
        all_router_logits = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            replayed = None if routes is None else unpad(routes[i], places).long()      # (N, K)
            x, active, router_logits = layer(
                x, freqs_cis, visible[:, None], places, layer_cache, replayed)
            all_routes.append(pad(active, places, (B, T)))
            all_router_logits.append(pad(router_logits, places, (B, T)))

        x = pad(x, places, (B, T))                                      # (B, T, D)
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:]
        hidden = self.norm(x)
        # Padding gets distinct experts too: whoever replays all columns finds valid ones.
        distinct = torch.arange(self.config.n_active, device=tokens.device)     # (K,)
        active = torch.stack(all_routes).where(mask[..., None], distinct)       # (L, B, T, K)
        return Output(self.unembed(hidden), hidden, active, torch.stack(all_router_logits))


def balance_loss(out: Output, mask: Tensor) -> Tensor:
    """How unevenly the experts are used: 1 if all are used alike, E/K if only K of them are.

    E * sum over e of (share of the active pairs) * (mean probability), over the real tokens of
    mask (B, T), averaged over the layers: Switch Transformer (2101.03961), Eq. 4-6."""
    routes = out.routes[:, mask]                                        # (L, N, K)
    probs = out.router_logits[:, mask].softmax(dim=-1)                  # (L, N, E)
    E = probs.shape[-1]
    pairs = F.one_hot(routes, E).sum(dim=(1, 2))                        # (L, E)
    share = pairs / pairs.sum(dim=1, keepdim=True)
    return (E * (share * probs.mean(dim=1)).sum(dim=1)).mean()


# ---------------------------------------------------------------------------- the sampler

@dataclass
class Rollout:
    """What flows from the sampler to the trainer: one rectangle, a row for every response.

    Prompts are padded on the left to a common width, responses follow, padded on the right; the
    group_size rows of one prompt stand side by side. Prompts 3 10 and 4 5 10, two responses to
    each, end token 9 and padding "." may give

        tokens   .  3 10 |  7  9  .        mask   . x x | x x .
                 .  3 10 |  7  7  9               . x x | x x x
                 4  5 10 |  5  9  .               x x x | x x .
                 4  5 10 |  6  6  6               x x x | x x x

    The last row was cut: it has no end token. S = 6 columns, of which the last T = 3 are those of
    the responses, whose lengths are 2 3 2 3: the end token counts, padding does not. The logits of
    a column predict the token of the next one: the columns 2, 3 and 4 score these responses."""
    tokens: Tensor      # (B, S)
    mask: Tensor        # (B, S) True for real tokens
    logp: Tensor        # (B, T) log-prob of each response token under the old policy, when it was
                        # sampled or by gspo.rescore; 0 in padding
    routes: Tensor      # (L, B, S, K) active experts, uint8; any distinct ones in padding and for
                        # the last token of a response, which the sampler does not compute
    group_size: int     # holds for whole groups only, not for any rows that you select

    @property
    def response(self) -> Tensor:
        """The tokens of the responses (B, T)."""
        return self.tokens[:, -self.logp.shape[1]:]

    @property
    def response_mask(self) -> Tensor:
        """True for tokens of a response, its end token included (B, T)."""
        return self.mask[:, -self.logp.shape[1]:]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response (B,)."""
        return self.response_mask.sum(dim=1)

    def predicting(self, x: Tensor) -> Tensor:
        """Of x (L, B, S, ...), the columns whose logits predict the response: (L, B, T, ...)."""
        return x[:, :, -self.logp.shape[1] - 1:-1]

    def select(self, rows: Tensor) -> "Rollout":
        """The chosen rows: numbers, or True for each one chosen (B,)."""
        return Rollout(self.tokens[rows], self.mask[rows], self.logp[rows], self.routes[:, rows],
                       self.group_size)

    def cut(self, T: int) -> "Rollout":
        """A copy with only the first T columns of the responses."""
        S = self.tokens.shape[1] - self.logp.shape[1] + T
        return Rollout(self.tokens[:, :S].clone(), self.mask[:, :S].clone(),
                       self.logp[:, :T].clone(), self.routes[:, :, :S].clone(), self.group_size)

    @staticmethod
    def join(rollouts: list["Rollout"]) -> "Rollout":
        """One rollout of several: pad them to common widths and concatenate."""
        T = max(r.logp.shape[1] for r in rollouts)
        W = max(r.tokens.shape[1] - r.logp.shape[1] for r in rollouts)      # of the prompts
        tokens = []
        masks = []
        logps = []
        routes = []
        for r in rollouts:
            right = T - r.logp.shape[1]
            left = W + T - r.tokens.shape[1] - right
            tokens.append(F.pad(r.tokens, (left, right)))
            masks.append(F.pad(r.mask, (left, right)))
            logps.append(F.pad(r.logp, (0, right)))
            # Padding repeats the nearest column, whose routes are distinct experts.
            columns = torch.arange(W + T, device=r.routes.device) - left
            routes.append(r.routes[:, :, columns.clamp(0, r.tokens.shape[1] - 1)])
        return Rollout(torch.cat(tokens), torch.cat(masks), torch.cat(logps),
                       torch.cat(routes, dim=1), rollouts[0].group_size)


def check_request(config: MoEConfig, prompts: list[list[int]], group_size: int,
                  max_new_tokens: int, temperature: float):
    """ValueError, naming what is wrong, for a request that `generate` cannot serve."""
    if not prompts or not all(prompts):
        raise ValueError("prompts must be lists of at least one token id")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {prompt} has ids outside 0 .. {config.vocab_size - 1}")
    if group_size < 1 or max_new_tokens < 1 or not temperature >= 0:
        raise ValueError(f"{group_size=} and {max_new_tokens=} must be at least 1, {temperature=} "
                         "at least 0")
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_length:
        raise ValueError(f"prompt + max_new_tokens = {longest} > max_length = {config.max_length}")


def choose(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token for each row of probs (B, vocab_size): the first at which the cumulative
    probability exceeds the row's number from 0 to 1, uniform (B,) -> (B,)."""
    cumulative = probs.cumsum(dim=-1)                                   # (B, vocab_size)
    total = cumulative[:, -1:]
    # Rounding must not lift the number to the total, which no token exceeds.
    just_below = total.nextafter(torch.zeros_like(total))
    number = torch.minimum(uniform[:, None] * total, just_below)        # (B, 1)
    return torch.searchsorted(cumulative, number, right=True)[:, 0]


def left_pad(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """P lists of token ids -> tokens (P, W), padded on the left, and mask (P, W) of real tokens."""
    W = max(map(len, prompts))
    tokens = [[pad_id] * (W - len(prompt)) + prompt for prompt in prompts]
    mask = [[False] * (W - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def make_room(tokens: Tensor, mask: Tensor, routes: Tensor, max_new_tokens: int, pad_id: int,
              group_size: int) -> Rollout:
    """Prompts (B, W), with their mask and routes -> a Rollout with room for responses, all padding.
    Routes that are not known yet repeat those of the prompt's last token."""
    B, W = tokens.shape
    columns = torch.arange(W + max_new_tokens, device=tokens.device).clamp(max=W - 1)
    return Rollout(F.pad(tokens, (0, max_new_tokens), value=pad_id),
                   F.pad(mask, (0, max_new_tokens)),
                   torch.zeros(B, max_new_tokens, device=tokens.device),
                   routes.to(torch.uint8)[:, :, columns], group_size)


def rounded(matrices: Tensor, precision: str) -> Tensor:
    """Matrices (..., outputs, inputs) as an engine would keep them in float8 (e4m3), int8, int4 or
    int3, with a scale for each output; but the result has the type of the input."""
    largest = matrices.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)    # (..., outputs, 1)
    if precision == "float8":
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        return (matrices / scale).to(torch.float8_e4m3fn).to(matrices.dtype) * scale
    bits = int(precision.removeprefix("int"))
    scale = largest / (2 ** (bits - 1) - 1)             # symmetric: int4 goes from -7 to 7
    return (matrices / scale).round() * scale


@torch.no_grad()
def in_precision(model: MoETransformer, precision: str) -> MoETransformer:
    """A copy of the model that computes in bfloat16 or float16; or in its own precision, with all
    its matrices, embeddings and routers included, rounded to float8, int8, int4 or int3."""
    model = copy.deepcopy(model)
    # Not model.to(dtype): it would cast the complex numbers of the rotary positions too.
    if precision == "float32":
        return model.float()
    if precision == "bfloat16":
        return model.bfloat16()
    if precision == "float16":
        return model.half()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(rounded(parameter, precision))
    return model


@torch.inference_mode()
def generate(model: MoETransformer, prompts: list[list[int]], group_size: int, max_new_tokens: int,
             temperature: float = 1.0, eos_id: int | None = None, pad_id: int = 0,
             uniform: Tensor | None = None) -> Rollout:
    """Sample `group_size` responses to each of P prompts, lists of token ids.

    A response ends with `eos_id` or is cut after `max_new_tokens`. No top-k or top-p: the trainer
    scores the distribution that was sampled. Temperature 0 takes the likeliest token, with its
    log-prob at temperature 1. `uniform` (B, max_new_tokens), from 0 to 1, is all its chance."""
    check_request(model.config, prompts, group_size, max_new_tokens, temperature)
    device = model.embed.weight.device
    eos_id = -1 if eos_id is None else eos_id       # no token has the id -1

    # 1 Prefill: each prompt goes through the model once.
    tokens, mask = left_pad(prompts, pad_id, device)                    # (P, W) each
    cache = KVCache(model.config.n_layer)
    out = model(tokens, mask, cache=cache, logits_to_keep=1)

    # 2 Copy each prompt and its cache to all rows of its group, and make room for the responses.
    P, W = tokens.shape
    prompt_of_row = torch.arange(P, device=device).repeat_interleave(group_size)    # (B,)
    cache.keep_rows(prompt_of_row)
    logits = out.logits[prompt_of_row, -1]                              # (B, vocab_size)
    rollout = make_room(tokens[prompt_of_row], mask[prompt_of_row], out.routes[:, prompt_of_row],
                        max_new_tokens, pad_id, group_size)

    # 3 Loop: choose a token for each row, drop the rows that end with it, compute the others.
    # Each row has numbers of its own: when one row ends changes nothing for the others.
    uniform = (torch.rand(rollout.logp.shape) if uniform is None else uniform).to(device)
    rows = torch.arange(len(uniform), device=device)                    # those that go on
    for t in range(max_new_tokens):
        probs = (logits.float() / (temperature or 1.0)).softmax(dim=-1)     # (rows, vocab_size)
        chosen = choose(probs, uniform[rows, t]) if temperature else probs.argmax(dim=-1)
        rollout.tokens[rows, W + t] = chosen
        rollout.mask[rows, W + t] = True
        rollout.logp[rows, t] = probs.gather(1, chosen[:, None])[:, 0].log()
        go_on = (chosen != eos_id).nonzero()[:, 0]
        if len(go_on) == 0 or t == max_new_tokens - 1:
            break
        if len(go_on) < len(rows):
            rows = rows[go_on]
            chosen = chosen[go_on]
            cache.keep_rows(go_on)
        real = torch.ones(len(rows), 1, dtype=torch.bool, device=device)
        out = model(chosen[:, None], real, cache=cache)
        logits = out.logits[:, 0]
        rollout.routes[:, rows, W + t] = out.routes[:, :, 0].to(torch.uint8)

    # 4 Pack up: cut the columns that no response has reached.
    with torch.inference_mode(False):           # ordinary tensors again, which autograd may save
        return rollout.cut(T=t + 1)
