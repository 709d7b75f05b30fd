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
    P prompts   G responses per prompt   B = P*G rows   T tokens   S positions = cache slots
    L layers    E experts                K active       D width    F expert width   V vocabulary
    H query heads   J key/value heads    C head width   b rows alive
    N tokens that are computed, in one list   M places whose logits are wanted
    n = N*K pairs of a token and an expert that works on it
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data.rollout import Rollout


@dataclass(frozen=True)
class MoEConfig:
    """Raises ValueError for sizes that cannot be built."""
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

    def __post_init__(self):
        def need(true, name, remedy):
            if not true:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {remedy}")
        for name, kind in self.__annotations__.items():
            need(kind is float or getattr(self, name) >= 1, name, "at least 1")
        need(self.d_model % (2 * self.n_head) == 0, "d_model", "a multiple of 2 * n_head")
        need(self.n_head % self.n_kv_head == 0, "n_kv_head", f"a divisor of n_head, {self.n_head}")
        need(self.n_active <= self.n_expert, "n_active", f"at most n_expert, {self.n_expert}")
        need(self.n_expert <= 255, "n_expert", "at most 255: rollouts keep routes in one byte")


class Output(NamedTuple):
    logits: torch.Tensor    # (B, T, V), or (M, V) if `keep` chose M positions
    hidden: torch.Tensor    # (B, T, D) or (M, D): what the logits are made of
    routes: torch.Tensor    # (L, B, T, K) active experts, most probable first
    router: torch.Tensor    # (L, B, T, E) the router's logits, fp32; 0 after the last `keep`


class KVCache:
    """Keys and values of B rows. Prompts are padded on the left, so that all rows stand at the same
    slot: slot s of row b holds its position s - start[b]."""
    def __init__(self, config, start, n_slots, dtype):
        C = config.d_model // config.n_head
        self.start, self.used = start, 0                                # (B,), slots
        self.kv = torch.zeros(config.n_layer, 2, len(start), config.n_kv_head, n_slots, C,
                              device=start.device, dtype=dtype)         # (L, 2, B, J, S, C)

    def advance(self, T):
        """Make room for T tokens -> their positions (B, T), and True where they must not look, at
        padding and at what comes later: (B, T, S)."""
        self.used += T
        slots = torch.arange(self.used, device=self.start.device)       # (S,)
        start, now = self.start[:, None], slots[-T:, None]              # (B, 1), (T, 1)
        unseen = (slots < start[:, None]) | (slots > now)               # (B, T, S)
        return (now.mT - start).clamp(min=0), unseen

    def write(self, layer, k, v):
        """Put k, v (B, J, T, C) into the newest slots -> all used slots (B, J, S, C), twice."""
        keys, values = self.kv[layer, :, :, :, :self.used]
        keys[:, :, -k.shape[2]:], values[:, :, -k.shape[2]:] = k, v
        return keys, values

    def select(self, rows):
        self.start, self.kv = self.start[rows], self.kv.index_select(2, rows)


class Lines:
    """Where the N tokens that are computed stand in B lines of T places. All but attention computes
    these alone: no padding, and once only what several lines begin with.

    needed (B, T)   True at the places that matter; without it all do, and N = B*T
    source (B, T)   number b*T + t of the place whose token is computed for this one; see
                    MoETransformer

        needed  1 1 1 0         source  0 1 2 3         tokens of the list, padded  0 1 2 .
                1 1 1 1                 0 1 6 7                                     0 1 3 4
    computed at the places 0 1 2 6 7 (at); "." is not needed: some other token of the list"""
    def __init__(self, B, T, needed=None, source=None):
        self.B, self.T, self.needed, self.at = B, T, needed, None
        if needed is not None:
            if source is None:
                source = torch.arange(B * T, device=needed.device).view(B, T)
            here = torch.zeros(B * T, dtype=torch.bool, device=needed.device)
            here = here.index_fill(0, source[needed], True)             # (B*T,) computed here?
            self.at = here.nonzero()[:, 0]                              # (N,) place of a token
            # (B*T,) which token of the list a place takes
            self.token = (here.cumsum(0) - 1).clamp(min=0).index_select(0, source.flatten())

    def pad(self, x, dim=0):
        """N tokens along `dim` -> (B, T)."""
        if self.at is not None:
            x = x.index_select(dim, self.token)
        return x.unflatten(dim, (self.B, self.T))

    def unpad(self, x):
        """x (B, T, ...) -> (N, ...)."""
        x = x.flatten(0, 1)
        return x if self.at is None else x.index_select(0, self.at)

    def take(self, x, keep):
        """x (N, ...) -> (M, ...), a row for every True in keep (B, T)."""
        places = keep.flatten().nonzero()[:, 0]                         # (M,)
        return x.index_select(0, places if self.at is None else self.token[places])


class RMSNorm(torch.autograd.Function):
    """y = w x r, with r = 1 / sqrt(mean(x^2) + eps) over the last dimension (1910.07467, Eq. 4).

    On a CPU, PyTorch derives the gradient of F.rms_norm from its single products and sums, and each
    of them goes through memory. By hand, with u = x r and g the gradient of y, it is half the work:
    dw = sum over tokens of g u,   dx = r (g w - u mean(g w u))."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()           # (N, ..., 1)
        u = x * r
        ctx.save_for_backward(u, r, weight)
        return u * weight

    @staticmethod
    def backward(ctx, g):
        u, r, weight = ctx.saved_tensors
        gu = g * u
        grad_weight = gu.sum(0)             # autograd adds up T too, if x is (B, T, D)
        mean = gu.mul_(weight).mean(-1, keepdim=True)                   # (N, ..., 1)
        grad_x = torch.mul(g, weight, out=gu).addcmul_(u, mean, value=-1).mul_(r)
        return grad_x, grad_weight, None


def rms_norm(x, weight, eps):
    """x (N, ...) or, with a weight of (D,), (B, T, D) -> the same."""
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def rotate(x, turn):
    """Rotary positions (2104.09864): take each pair of neighbours in x (N, *, C) for a complex
    number and turn it by its angle; turn (N, 1, C/2)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal attention; H/J query heads share one key/value head (GQA, 2305.13245)."""
    def __init__(self, config, layer):
        super().__init__()
        D, H, J = config.d_model, config.n_head, config.n_kv_head
        self.layer, self.H, self.J, self.C, self.eps = layer, H, J, D // H, config.norm_eps
        self.qkv = nn.Linear(D, D + 2 * J * self.C, bias=False)         # D = H * C
        self.o = nn.Linear(D, D, bias=False)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(self.C)) for _ in "qk")

    def forward(self, x, turn, mask, cache, lines):
        """x (N, D), turn (N, 1, C/2), mask (1 or B*J, H/J*T, S) of 0 and, where a token must not
        look, -1e9 -> (N, D). `lines` knows where the N tokens stand."""
        H, J, C = self.H, self.J, self.C
        qk, v = self.qkv(x).unflatten(1, (-1, C)).split((H + J, J), dim=1)
        weight = torch.cat((self.q_norm.expand(H, C), self.k_norm.expand(J, C)))
        qk = rotate(rms_norm(qk, weight, self.eps), turn)               # (N, H + J, C)
        qk, v = lines.pad(qk).transpose(1, 2), lines.pad(v).transpose(1, 2)
        q, k = qk.split((H, J), dim=1)                                  # (B, H, T, C), (B, J, T, C)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)                        # (B, J, S, C)
        # By hand: for rows this short faster on a CPU than scaled_dot_product_attention.
        q = q.reshape(len(q) * J, -1, C)                                # (B*J, H/J*T, C)
        k, v = k.flatten(0, 1), v.flatten(0, 1)                         # (B*J, S, C)
        weights = torch.baddbmm(mask, q, k.mT, alpha=C ** -0.5).softmax(-1)     # (B*J, H/J*T, S)
        y = (weights @ v).view(lines.B, H, lines.T, C).transpose(1, 2)  # (B, T, H, C)
        return self.o(lines.unpad(y).flatten(1))


def blockwise(x, end, weights):
    """Block e of the rows of x (n, in), the one that ends before end[e], times weights[e], which is
    (out, in), for all e -> (n, out)."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weights.shape[1:])
    # What F.grouped_mm may not know.
    if x.dtype == torch.float64 or x.device.type == "mps" or not aligned:
        blocks = x.tensor_split(end[:-1].tolist())
        return torch.cat([block @ weight.T for block, weight in zip(blocks, weights)])
    return F.grouped_mm(x, weights.mT, offs=end)


class Experts(nn.Module):
    """Router and experts: each token is worked on by K of the E feed-forward networks."""
    def __init__(self, config):
        super().__init__()
        E, D, width = config.n_expert, config.d_model, config.d_expert
        self.K = config.n_active
        self.router = nn.Linear(D, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, width, D))
        self.up = nn.Parameter(torch.empty(E, width, D))
        self.down = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x, routes):
        """x (N, D) -> token (n,) and y (n, D): y[i] is to be added to token[i]; routes (N, K), the
        router's logits (N, E). Given `routes` are replayed."""
        logits = self.router(x).to(torch.promote_types(x.dtype, torch.float32))
        if routes is None:
            routes = logits.topk(self.K).indices                        # (N, K)
        # Softmax over all, then the active ones divided by their sum, is softmax over the active
        # ones. It is live even if the routes are replayed: the router keeps learning.
        gates = logits.gather(1, routes).softmax(-1).to(x.dtype)        # (N, K)

        # Bring the pairs into the order of their experts: each works on one contiguous block.
        expert_of, order = routes.flatten().sort(stable=True)           # (N*K,) each
        each = torch.arange(len(self.down), device=x.device)            # (E,)
        end = torch.searchsorted(expert_of, each, right=True, out_int32=True)   # (E,)
        token = order // routes.shape[1]                                # (N*K,)
        y = self.feed_forward(x.index_select(0, token), expert_of, end)
        return token, y * gates.flatten().index_select(0, order)[:, None], routes, logits

    def feed_forward(self, x, expert_of, end):
        """What the experts make of their blocks of the rows of x (n, D) -> (n, D)."""
        n, E = len(x), len(self.down)
        if x.device.type == "cpu" and n <= 128 * E:
            # Up to 128 rows an expert, a CPU uses one thread for a product. In a batch, padded to
            # the longest block, both share the work: worth it up to about twice as many rows.
            start = F.pad(end[:-1], (1, 0))                             # (E,)
            longest = int((end - start).max())
            if E * longest <= 2 * n + 16 * E:
                place = torch.arange(n) + (torch.arange(E) * longest - start)[expert_of]    # (n,)
                x = x.new_zeros(E * longest, x.shape[1]).index_copy_(0, place, x)
                x = x.view(E, longest, -1)                              # (E, longest, D)
                h = F.silu(x @ self.gate.mT) * (x @ self.up.mT)         # (E, longest, F)
                return (h @ self.down.mT).flatten(0, 1).index_select(0, place)
        h = F.silu(blockwise(x, end, self.gate)) * blockwise(x, end, self.up)   # (n, F)
        return blockwise(h, end, self.down)


def balance_loss(out):
    """How unevenly the experts of an Output are used: 1 if all are used alike, E/K if only K are.

    E * sum over e of (share of the active pairs) * (mean probability), mean over the layers: Switch
    Transformer (2101.03961) Eq. 4-6, over the tokens that were computed."""
    computed = out.router[0].any(-1)                                    # (B, T)
    routes, probs = out.routes[:, computed], out.router[:, computed].softmax(-1)
    E = probs.shape[-1]                                                 # (L, N, K), (L, N, E)
    counts = torch.stack([layer.flatten().bincount(minlength=E) for layer in routes])   # (L, E)
    return (E * (counts / routes[0].numel() * probs.mean(1)).sum(-1)).mean()


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm, self.experts_norm = (
            nn.Parameter(torch.ones(config.d_model)) for _ in range(2))
        self.attention = Attention(config, layer)
        self.experts = Experts(config)
        self.eps = config.norm_eps

    def forward(self, x, turn, mask, cache, lines, routes):
        normed = rms_norm(x, self.attention_norm, self.eps)
        x = x + self.attention(normed, turn, mask, cache, lines)
        token, y, routes, logits = self.experts(rms_norm(x, self.experts_norm, self.eps), routes)
        # x + y, summed over the K experts of each token.
        return x.index_add_(0, token, y), routes, logits


class MoETransformer(nn.Module):
    """tokens (B, T) -> Output. Padding, on the right, changes nothing elsewhere.
    routes (L, B, T, K)   experts to activate instead of the router's own choice (replay)
    keep (B, T)           True at the M positions whose logits are wanted, at least one; without a
                          cache, routes and router after the last of them in a row are 0
    source (B, T)         if rows begin alike, the number b*T + t of the place whose token is
                          computed for this one, for instance that of the first row that does; it
                          must stand in the same column, after the same tokens (and routes).
                          Needs `keep`.
    cache                 a KVCache of what came before; tokens are then padded on the left
    Raises ValueError for more than config.max_length tokens."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        C = config.d_model // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, C, 2) / C)   # (C/2,)
        angle = torch.arange(config.max_length)[:, None] * frequency    # (max_length, C/2)
        # Complex, so that model.bfloat16() leaves it alone; model.to(torch.bfloat16) would not.
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:             # 1/sqrt(inputs): a product keeps the size of x
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=1.0)

    def forward(self, tokens, routes=None, keep=None, cache=None, source=None):
        B, T = tokens.shape
        if cache is None and T > self.config.max_length:
            raise ValueError(f"{T} tokens are more than max_length = {self.config.max_length}")
        lines, J = Lines(B, T), self.config.n_kv_head
        if cache is None:       # padding stands on the right: causality alone hides it
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            unseen = (positions[:1] > positions[:1].mT)[None]           # (1, T, S = T)
            if keep is not None:        # what comes later than all that is wanted is not computed
                lines = Lines(B, T, keep.flip(1).cumsum(1).flip(1) > 0, source)
        else:
            positions, unseen = cache.advance(T)
            unseen = unseen.repeat_interleave(J, dim=0)                 # (B*J, T, S)
        x = self.embed(lines.unpad(tokens))                             # (N, D)
        turn = self.turn.index_select(0, lines.unpad(positions))[:, None]       # (N, 1, C/2)
        mask = (-1e9 * unseen).to(x.dtype).repeat(1, self.config.n_head // J, 1)  # (1 or B*J, .)
        all_routes, all_logits = [], []
        for i, layer in enumerate(self.layers):
            replayed = None if routes is None else lines.unpad(routes[i]).long()    # (N, K)
            x, chosen, logits = layer(x, turn, mask, cache, lines, replayed)
            all_routes.append(chosen), all_logits.append(logits)
        x = lines.pad(x) if keep is None else lines.take(x, keep)       # (B, T, D) or (M, D)
        x = rms_norm(x, self.norm, self.config.norm_eps)
        chosen, logits = (lines.pad(torch.stack(y), dim=1) for y in (all_routes, all_logits))
        if lines.needed is not None:
            chosen, logits = chosen * lines.needed[..., None], logits * lines.needed[..., None]
        return Output(self.unembed(x), x, chosen, logits)               # (L, B, T, K), (L, B, T, E)


def check_request(config, prompts, group_size, max_new_tokens, temperature):
    if not prompts or not all(p and min(p) >= 0 and max(p) < config.vocab_size for p in prompts):
        raise ValueError(f"prompts must be non-empty lists of ids in 0 .. {config.vocab_size - 1}")
    if group_size < 1 or max_new_tokens < 1 or not temperature > 0:
        raise ValueError(f"{group_size=}, {max_new_tokens=}, {temperature=}: all must be above 0")
    if (S := max(map(len, prompts)) + max_new_tokens) > config.max_length:
        raise ValueError(f"prompt + max_new_tokens = {S} > max_length = {config.max_length}")


def choose(probs, luck):
    """The first token at which the cumulative probability (b, V) exceeds the row's number from 0 to
    1, luck (b,) -> (b,)."""
    cumulative = probs.cumsum(-1)
    # Rounding must not push the number up to the whole sum, beyond all tokens.
    number = torch.minimum(luck[:, None] * cumulative[:, -1:], cumulative[:, -1:].nextafter(
        torch.zeros((), device=probs.device)))                          # (b, 1)
    return torch.searchsorted(cumulative, number, right=True)[:, 0]


@torch.inference_mode()
def generate(model, prompts, group_size, max_new_tokens, temperature=1.0, eos_id=None, pad_id=0,
             generator=None, greedy=False):
    """Sample `group_size` responses to each prompt, a list of token ids -> Rollout.

    A response ends with `eos_id` or is cut at `max_new_tokens`; without an `eos_id` all are cut.
    No top-k or top-p: the trainer has to score the same distribution. The state of `generator`, a
    CPU one on every device, decides the rollout. See check_request for errors."""
    check_request(model.config, prompts, group_size, max_new_tokens, temperature)
    config, device, G, T = model.config, model.embed.weight.device, group_size, max_new_tokens
    lengths = torch.tensor([len(p) for p in prompts], device=device)    # (P,) of the prompts
    P, B, longest = len(prompts), len(prompts) * G, int(lengths.max())
    end = -1 if eos_id is None else eos_id
    # One uniform number per token, drawn at once: a row's luck does not depend on its mates.
    luck = torch.rand(B, T, generator=generator).to(device)             # (B, T)
    tokens = torch.full((B, T), pad_id, device=device)
    logp = torch.zeros(B, T, device=device)
    routes = torch.arange(config.n_active, dtype=torch.uint8, device=device)    # in padding: any K
    routes = routes.repeat(config.n_layer, B, longest + T, 1)           # (L, B, S, K)

    # The prompts run once each, then their cache is copied to all G rows of the group.
    padded = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    cache = KVCache(config, longest - lengths, longest + T, model.embed.weight.dtype)
    last = torch.arange(longest, device=device) == longest - 1          # its logits are wanted
    out = model(padded, keep=last.expand(P, -1), cache=cache)
    group = torch.arange(P, device=device).repeat_interleave(G)         # (B,)
    slot = (torch.arange(longest, device=device) + cache.start[:, None]).clamp(max=longest - 1)
    seen = out.routes[:, torch.arange(P, device=device)[:, None], slot] # (L, P, longest, K)
    routes[:, :, :longest] = seen[:, group].to(torch.uint8)
    cache.select(group)
    logits, position = out.logits[group], lengths[group]                # (B, V), (B,)
    alive = torch.arange(B, device=device)                              # rows still being written
    ended = torch.zeros(B, dtype=torch.bool, device=device)

    for t in range(T):
        probs = (logits.float() / temperature).softmax(-1)              # (b, V)
        new = probs.argmax(-1) if greedy else choose(probs, luck[alive, t])     # (b,)
        tokens[alive, t] = new
        logp[alive, t] = probs.gather(1, new[:, None])[:, 0].log()
        ended = ended | (new == end)
        going = (~ended).nonzero()[:, 0]
        if t == T - 1 or len(going) == 0:
            break
        if len(going) < 0.9 * len(alive):       # to move the cache costs more than a few idle rows
            alive, new, position, ended = (x[going] for x in (alive, new, position, ended))
            cache.select(going)
        out = model(new[:, None], cache=cache)
        logits = out.logits[:, 0]
        routes[:, alive, position] = out.routes[:, :, 0].to(torch.uint8)
        position = position + 1

    mask = F.pad((tokens == end).cumsum(1)[:, :-1], (1, 0)) == 0         # no end before this token
    tokens, logp = tokens.where(mask, pad_id), logp.where(mask, 0.0)
    lengths, T = mask.sum(1), int(mask.sum(1).max())
    with torch.inference_mode(False):           # ordinary tensors again: autograd may save them
        return Rollout([list(p) for p in prompts], *(x.clone() for x in (
            tokens[:, :T], logp[:, :T], mask[:, :T], routes, lengths)))
