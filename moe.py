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
    H query heads   J key/value heads    C head width   N = B*T tokens in one list   b rows alive
"""
from dataclasses import asdict, dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


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
    probs: torch.Tensor     # (L, B, T, E) the router's probabilities, fp32


class KVCache:
    """Keys and values of B rows, one slot per position: slot s of row b holds position s."""
    def __init__(self, config, n_rows, n_slots, device, dtype):
        C = config.d_model // config.n_head
        self.kv = torch.zeros(config.n_layer, 2, n_rows, config.n_kv_head, n_slots, C,
                              device=device, dtype=dtype)                # (L, 2, B, J, S, C)

    def write(self, layer, positions, k, v):
        """Put k, v (B, J, T, C) into slots `positions` (B, T) -> all slots (B, J, S, C), twice."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        # Indexing with (B, T) tensors around a slice puts their axes first: (B, T, J, C).
        self.kv[layer, 0][rows, :, positions] = k.transpose(1, 2)
        self.kv[layer, 1][rows, :, positions] = v.transpose(1, 2)
        return self.kv[layer, 0], self.kv[layer, 1]


def rotate(x, cos, sin):
    """Rotary positions (2104.09864): turn each pair (x_i, x_{i+C/2}) of x (B, *, T, C)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; H/J query heads share one key/value head (GQA, 2305.13245)."""
    def __init__(self, config, layer):
        super().__init__()
        D, J, C = config.d_model, config.n_kv_head, config.d_model // config.n_head
        self.layer, self.C = layer, C
        self.q = nn.Linear(D, D, bias=False)                            # D = H * C
        self.k = nn.Linear(D, J * C, bias=False)
        self.v = nn.Linear(D, J * C, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.q_norm = nn.RMSNorm(C, config.norm_eps)
        self.k_norm = nn.RMSNorm(C, config.norm_eps)

    def forward(self, x, cos, sin, positions, cache):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.C).transpose(1, 2)             # (B, H or J, T, C)
                   for y in (self.q(x), self.k(x), self.v(x)))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        seen = None
        if cache is not None:
            # A slot past its row's position holds padding or nothing yet: it must not be seen.
            k, v = cache.write(self.layer, positions, k, v)             # (B, J, S, C)
            seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
        # Without a cache rows are padded on the right: the causal mask alone hides all padding.
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=cache is None, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))              # (B, T, D)


class Experts(nn.Module):
    """Router and experts: each token is worked on by K of the E feed-forward networks."""
    def __init__(self, config):
        super().__init__()
        E, D, width = config.n_expert, config.d_model, config.d_expert
        self.K = config.n_active
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * width, D))       # both halves in one product
        self.down = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x, routes):
        """x (N, D) -> y (N, D), routes (N, K), probs (N, E). Given `routes` are replayed."""
        probs = self.router(x).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
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
        counts = torch.bincount(expert_of, minlength=len(self.down))    # (E,)
        blocks = x[token_of].split(counts.tolist())
        outputs = []
        for block, gate_up, down in zip(blocks, self.gate_up, self.down):
            gate, up = (block @ gate_up.T).chunk(2, dim=-1)             # (n_e, F) each
            outputs.append((F.silu(gate) * up) @ down.T)                # (n_e, D)
        weighted = torch.cat(outputs) * gates.flatten()[order, None]    # (N*K, D)
        return torch.zeros_like(x).index_add(0, token_of, weighted), routes, probs


def balance_loss(out):
    """How unevenly the experts of an Output are used: 1 if all are used alike, E/K if only K are.

    E * sum over e of (share of the active pairs) * (mean probability), mean over the layers: Switch
    Transformer (2101.03961) Eq. 4-6. Padding counts."""
    E = out.probs.shape[-1]
    counts = torch.stack([routes.flatten().bincount(minlength=E) for routes in out.routes])
    share = counts / out.routes[0].numel()                              # (L, E)
    return (E * (share * out.probs.mean((1, 2))).sum(-1)).mean()


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.experts_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.experts = Experts(config)

    def forward(self, x, cos, sin, positions, cache, routes):
        x = x + self.attention(self.attention_norm(x), cos, sin, positions, cache)
        y, routes, probs = self.experts(self.experts_norm(x).flatten(0, 1), routes)     # (N, D)
        return x + y.view_as(x), routes, probs


class MoETransformer(nn.Module):
    """tokens (B, T) -> Output. Padding, on the right, changes nothing elsewhere.
    routes (L, B, T, K)   experts to activate instead of the router's own choice (replay)
    keep (B, T)           True at the M positions whose logits are wanted
    positions (B, T)      with `cache`, a KVCache that holds the earlier positions of each row
    Raises ValueError for more than config.max_length tokens."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        C = config.d_model // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, C, 2) / C)   # (C/2,)
        angle = torch.arange(config.max_length)[:, None] * frequency.repeat(2)  # (max_length, C)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:             # 1/sqrt(inputs): a product keeps the size of x
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=1.0)

    def forward(self, tokens, routes=None, keep=None, positions=None, cache=None):
        B, T = tokens.shape
        if cache is None and T > self.config.max_length:
            raise ValueError(f"{T} tokens are more than max_length = {self.config.max_length}")
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]   # (B, 1, T, C)
        x = self.embed(tokens)                                          # (B, T, D)
        all_routes, all_probs = [], []
        for i, layer in enumerate(self.layers):
            replayed = None if routes is None else routes[i].flatten(0, 1).long()   # (N, K)
            x, chosen, probs = layer(x, cos, sin, positions, cache, replayed)
            all_routes.append(chosen.view(B, T, -1)), all_probs.append(probs.view(B, T, -1))
        hidden = self.norm(x if keep is None else x[keep])              # (M, D)
        routes, probs = torch.stack(all_routes), torch.stack(all_probs)
        return Output(self.unembed(hidden), hidden, routes, probs)


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
        responses, lengths = self.tokens.tolist(), self.lengths.tolist()
        lines, keep = [], []
        for row in rows.tolist():
            prompt, n = self.prompts[row // G], lengths[row]
            lines.append(torch.tensor(prompt + responses[row][:n]))
            keep.append(torch.tensor([False] * (len(prompt) - 1) + [True] * n + [False]))
        tokens, keep = (nn.utils.rnn.pad_sequence(x, batch_first=True).to(self.tokens.device)
                        for x in (lines, keep))                         # (b, S) each
        return tokens, keep, self.mask[rows], self.routes[:, rows, :tokens.shape[1]]

    @staticmethod
    def join(rollouts, groups):
        """One rollout of the chosen groups, a list of their numbers for every one of `rollouts`."""
        G = len(rollouts[0].tokens) // len(rollouts[0].prompts)
        rows = [[g * G + i for g in chosen for i in range(G)] for chosen in groups]
        def pad(parts):         # each (B, T or S, ...), of which T and S may differ
            return nn.utils.rnn.pad_sequence(
                [row for part, these in zip(parts, rows) for row in part[these]], batch_first=True)
        tokens, logp, mask = (pad([getattr(r, name) for r in rollouts])
                              for name in ("tokens", "logp", "mask"))
        routes = pad([r.routes.permute(1, 2, 0, 3) for r in rollouts]).permute(2, 0, 1, 3)
        return Rollout([r.prompts[g] for r, chosen in zip(rollouts, groups) for g in chosen],
                       tokens, logp, mask, routes,
                       torch.cat([r.lengths[these] for r, these in zip(rollouts, rows)]))


def check_request(config, prompts, group_size, max_new_tokens, temperature):
    if not prompts or not all(p and min(p) >= 0 and max(p) < config.vocab_size for p in prompts):
        raise ValueError(f"prompts must be non-empty lists of ids in 0 .. {config.vocab_size - 1}")
    if group_size < 1 or max_new_tokens < 1 or not temperature > 0:
        raise ValueError(f"{group_size=}, {max_new_tokens=}, {temperature=}: all must be above 0")
    if (S := max(map(len, prompts)) + max_new_tokens) > config.max_length:
        raise ValueError(f"prompt + max_new_tokens = {S} > max_length = {config.max_length}")


@torch.inference_mode()
def generate(model, prompts, group_size, max_new_tokens, temperature=1.0, eos_id=None, pad_id=0,
             generator=None, greedy=False):
    """Sample `group_size` responses to each prompt, a list of token ids -> Rollout.

    A response ends with `eos_id` or is cut at `max_new_tokens`; without an `eos_id` all are cut.
    No top-k or top-p: the trainer has to score the same distribution. The state of `generator`, a
    CPU one on every device, decides the rollout. See check_request for errors."""
    check_request(model.config, prompts, group_size, max_new_tokens, temperature)
    config, device, G, T = model.config, model.embed.weight.device, group_size, max_new_tokens
    start = torch.tensor([len(p) for p in prompts], device=device)      # (P,)
    P, B, S = len(prompts), len(prompts) * G, int(start.max()) + T
    end = -1 if eos_id is None else eos_id
    # One uniform number per token, drawn at once: a row's luck does not depend on its mates.
    luck = torch.rand(B, T, generator=generator).to(device)             # (B, T)
    tokens = torch.full((B, T), pad_id, device=device)
    logp = torch.zeros(B, T, device=device)
    routes = torch.arange(config.n_active, dtype=torch.uint8, device=device)    # in padding: any K
    routes = routes.repeat(config.n_layer, B, S, 1)                     # (L, B, S, K)

    # The prompts run once each, then their cache is copied to all G rows of the group.
    padded = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True,
                                       padding_value=pad_id).to(device)  # (P, longest)
    cache = KVCache(config, P, S, device, model.embed.weight.dtype)
    positions = torch.arange(padded.shape[1], device=device).expand_as(padded)
    out = model(padded, keep=positions == start[:, None] - 1, positions=positions, cache=cache)
    cache.kv = cache.kv.repeat_interleave(G, dim=2)
    logits = out.logits.repeat_interleave(G, dim=0)                     # (B, V)
    routes[:, :, :padded.shape[1]] = out.routes.repeat_interleave(G, dim=1).to(torch.uint8)
    position = (start - 1).repeat_interleave(G)                         # (B,)
    alive = torch.arange(B, device=device)                              # rows still being written

    for t in range(T):
        log_probs = (logits.float() / temperature).log_softmax(-1)      # (b, V)
        # The first token at which the cumulative probability exceeds the row's number.
        cumulative = log_probs.exp().cumsum(-1)                         # (b, V)
        new = (cumulative <= luck[alive, t, None] * cumulative[:, -1:]).sum(-1)         # (b,)
        new = log_probs.argmax(-1) if greedy else new.clamp(max=config.vocab_size - 1)
        tokens[alive, t] = new
        logp[alive, t] = log_probs.gather(1, new[:, None])[:, 0]
        going = (new != end).nonzero()[:, 0]
        if t == T - 1 or len(going) == 0:
            break
        if len(going) < len(alive):
            alive, new, position = alive[going], new[going], position[going]
            cache.kv = cache.kv[:, :, going]
        position = position + 1
        out = model(new[:, None], positions=position[:, None], cache=cache)
        logits = out.logits[:, 0]
        routes[:, alive, position] = out.routes[:, :, 0].to(torch.uint8)

    mask = F.pad((tokens == end).cumsum(1)[:, :-1], (1, 0)) == 0         # no end before this token
    lengths, T = mask.sum(1), int(mask.sum(1).max())
    with torch.inference_mode(False):           # ordinary tensors again: autograd may save them
        return Rollout([list(p) for p in prompts], *(x.clone() for x in (
            tokens[:, :T], logp[:, :T], mask[:, :T], routes, lengths)))


# What `transformers` calls the fields of MoEConfig, in their order ...
HF_CONFIG = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size",
             "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
             "moe_intermediate_size", "rope_theta", "rms_norm_eps")
# ... and the parts of our parameters' names, replaced in this order.
HF_NAMES = {
    "attention_norm": "input_layernorm", "attention": "self_attn", ".q.": ".q_proj.",
    ".k.": ".k_proj.", ".v.": ".v_proj.", ".o.": ".o_proj.", "experts.router": "mlp.gate",
    "experts.gate_up": "mlp.experts.gate_up_proj", "experts.down": "mlp.experts.down_proj",
    "experts_norm": "post_attention_layernorm", "model.unembed": "lm_head", "embed": "embed_tokens"}


def to_hf(model):
    """-> (config, state): `Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).load_state_dict(state)`
    of `transformers` 5 is the same model. The tensors are the model's own, not copies."""
    config = dict(zip(HF_CONFIG, asdict(model.config).values(), strict=True)) | {
        "head_dim": model.config.d_model // model.config.n_head, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
        "tie_word_embeddings": False, "hidden_act": "silu"}
    rename = lambda name: reduce(lambda text, pair: text.replace(*pair), HF_NAMES.items(), name)
    return config, {rename("model." + name): x for name, x in model.state_dict().items()}


def from_hf(config, state):
    """The inverse of `to_hf`. `state` may also hold one tensor per expert, as checkpoints do.
    Raises ValueError for a variant of the architecture that this model does not have."""
    model = MoETransformer(MoEConfig(*(config[name] for name in HF_CONFIG)))
    (own, tensors), each = to_hf(model), range(model.config.n_expert)
    if wrong := {name: config[name] for name in own if config.get(name, own[name]) != own[name]}:
        raise ValueError(f"{wrong} is another architecture: here {({k: own[k] for k in wrong})}")
    names, state = dict(zip(tensors, model.state_dict())), dict(state)
    for at in [name.split("0.gate_proj")[0] for name in state if "experts.0.gate_proj" in name]:
        gate, up, down = (torch.stack([state.pop(f"{at}{e}.{part}_proj.weight") for e in each])
                          for part in ("gate", "up", "down"))           # (E, F, D) twice, (E, D, F)
        state |= {at + "gate_up_proj": torch.cat((gate, up), 1), at + "down_proj": down}
    model.load_state_dict({names.get(name, name): x for name, x in state.items()})
    return model
