"""Group Sequence Policy Optimization (GSPO, arXiv 2507.18071) and its relatives, one flag apart.

For one question x the old policy writes a group of G responses y_1 .. y_G, and a rule gives each a
reward r_i. The advantage A_i = (r_i - mean(r)) / std(r) says how much better y_i is than its
siblings (Eq. 6). The new policy moves towards the better ones, but not far from the old policy:

    GSPO  J = E[ 1/G sum_i min( s_i A_i, clip(s_i, 1-low, 1+high) A_i ) ]                   (Eq. 5)
          s_i = ( pi_new(y_i|x) / pi_old(y_i|x) )^(1/|y_i|)                                 (Eq. 7)
              = exp( mean over t of [log pi_new(y_it) - log pi_old(y_it)] )
    GRPO  J = E[ 1/G sum_i 1/|y_i| sum_t min( w_it A_i, clip(w_it, 1-low, 1+high) A_i ) ]   (Eq. 2)
          w_it = pi_new(y_it) / pi_old(y_it)                                                (Eq. 3)

GSPO has one ratio for a whole response and keeps or clips the response as one. GRPO has a ratio for
every token and clips tokens. Apart from the clip this is the only difference in the gradient: each
token of y_i has the weight s_i A_i / |y_i| in GSPO (Eq. 10) and its own weight w_it A_i / |y_i| in
GRPO (Eq. 12). When the log-ratio of one token jumps, say because the router sent it to other
experts, log s_i moves by only 1/|y_i| of that jump.

The file is in reading order: advantages, Eq. 5 written out, ratios, clip, GSPO, GRPO, the loss, the
update. Behind the banner "the relatives" GSPO needs three things only: seq_mean_token_mean, its row
in the table ALGORITHMS, and `prepare`, which turns a rollout and its rewards into advantages. The
rest there is for the other objectives and for the metrics.

Letters as in moe.py: B = P*G responses to P prompts, S columns, the last T of them the responses';
N response tokens in a list, L layers, E experts, K active experts, D width. A is an advantage.
"""
import io
import itertools
import time
from dataclasses import dataclass, replace
from math import isfinite
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moe import MoETransformer, Rollout, at_least_fp32, autocast

# exp(20) is finite in fp32, exp(89) is not: where the minimum then takes the gradient away, inf * 0
# would be NaN. No healthy run comes near the bound.
MAX_LOG_RATIO = 20.0


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """Rewards (P, G) -> advantages (P, G): how far above its group's mean, in standard deviations.

    The paper (Eq. 6) does not say which standard deviation. This is the sample one (G - 1), as in
    TRL and verl but without their epsilon: [1, 0, 0, 0] -> [1.5, -0.5, -0.5, -0.5]. A group whose
    rewards are all equal teaches nothing and gets exactly 0. `scale="none"` leaves the division out
    (Dr. GRPO, 2503.20783). ValueError for rewards that are not finite."""
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite numbers; these are {rewards.tolist()}")
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}; it can be 'std' or 'none'")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)               # (P, G)
    if scale == "std":
        advantages = advantages / rewards.std(dim=1, keepdim=True)
    highest = rewards.amax(dim=1, keepdim=True)                            # (P, 1)
    lowest = rewards.amin(dim=1, keepdim=True)
    # Exactly 0 where all are equal; rounding could leave 1e-8 / 1e-8.
    return torch.where(highest > lowest, advantages, 0.0)


def gspo_objective(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor,
                   clip_low: float, clip_high: float) -> Tensor:
    """Eq. 5 written out: the objective J of GSPO, a scalar to maximise.

    `policy_loss` below gives the same number with its sign turned, and serves every objective.
    Log-probs (B, T), advantages (B,), mask (B, T) True for response tokens; every row has some.

    Two responses, of 3 tokens and of 2. The first is good (A = 1) and has become likelier, beyond
    the clip range. The second is bad (A = -1) and has become likelier too: it keeps its gradient.

    >>> logp_old = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -0.3, 0.0]])
    >>> logp     = torch.tensor([[-0.9, -1.7, -0.6], [-0.6, -0.2, 0.0]])   # both: 0.1 on average
    >>> mask     = torch.tensor([[True, True, True], [True, True, False]])
    >>> J = gspo_objective(logp, logp_old, torch.tensor([1.0, -1.0]), mask, 0.05, 0.05)
    >>> round(J.item(), 4)      # s = exp(0.1) = 1.1052 twice: (min(1.1052, 1.05) - 1.1052) / 2
    -0.0276
    """
    log_w = torch.where(mask, logp - logp_old.detach(), 0.0)               # (B, T)  log of Eq. 3
    s = (log_w.sum(dim=1) / mask.sum(dim=1)).exp()                         # (B,)    Eq. 7
    clipped_s = s.clamp(1 - clip_low, 1 + clip_high)
    unclipped = s * advantages
    clipped = clipped_s * advantages
    return torch.minimum(unclipped, clipped).mean()                        #         Eq. 5


# ---------------------------------------------------------------------------- the objectives

class Ratios(NamedTuple):
    """What the objectives are made of; all (B, T)."""
    logp: Tensor        # under the policy being trained, where all gradient comes from
    log_w: Tensor       # logp - logp_old, the log of Eq. 3; 0 outside the responses
    log_s: Tensor       # its mean over the response, the log of Eq. 7, repeated along the row
    mask: Tensor


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x (B, T) over each response, repeated along its row: (B, T). x must be 0 outside
    the mask."""
    lengths = mask.sum(dim=1).clamp(min=1)
    return (x.sum(dim=1) / lengths)[:, None].expand_as(x)


def ratios(logp: Tensor, logp_old: Tensor, mask: Tensor) -> Ratios:
    """Log-probs (B, T) under both policies, mask (B, T) of booleans -> the log-ratios."""
    # GSPO's clip range, 3e-3, is finer than bf16, whose steps above 1 are 8e-3: at least fp32.
    dtype = torch.promote_types(logp.dtype, torch.float32)
    logp = torch.where(mask, logp, 0).to(dtype)
    logp_old = torch.where(mask, logp_old.detach(), 0).to(dtype)
    log_w = logp - logp_old
    # The bound comes after the mean: a bound on single tokens would change s.
    log_s = response_mean(log_w, mask)
    return Ratios(logp, log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO),
                  log_s.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask)


# Each objective gives what every token contributes and where the clip is active, (B, T) both.
# The advantages A are (B, T).

def clip(ratio: Tensor, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(ratio * A, clip(ratio) * A). Beyond the clip range there is nothing more to gain and no
    gradient. A ratio that moved against A (up with A < 0, down with A > 0) keeps its gradient, up
    to MAX_LOG_RATIO."""
    contribution = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    clipped = torch.where(A > 0, ratio > 1 + high, ratio < 1 - low)
    return contribution, clipped


def gspo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return clip(r.log_s.exp(), A, low, high)                               # Eq. 5 and 7


def grpo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return clip(r.log_w.exp(), A, low, high)                               # Eq. 2 and 3


def policy_loss(algorithm: str, logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float | None = None, clip_high: float | None = None,
                token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and which tokens are clipped. A pure function of tensors.

    logp (B, T)          log-probs of the response tokens under the policy being trained
    logp_old (B, T)      the same under the policy that sampled them
    advantages (B,)      one per response; or (B, T), one per token, if not gspo, luspo or gmpo
    mask (B, T)          true (or 1) for response tokens, the end token included. What stands
                         elsewhere, be it NaN, is ignored. A row without tokens is worth 0, but
                         counts as a response.
    clip_low, clip_high  by default those of ALGORITHMS; sapo and reinforce have none
    token_weights (B,)   how much each token of a response counts, if the rows are only a part of
                         the mini-batch; by default as in ALGORITHMS, the longest length being T
    Returns the loss, a scalar, and `clipped` (B, T): True where the clip removes the gradient (for
    cispo: where it limits the weight)."""
    objective_of, aggregation, clip_range, _ = find_algorithm(algorithm)
    if objective_of in ONE_ADVANTAGE_PER_RESPONSE and advantages.dim() == 2:
        raise ValueError(f"{algorithm} has one advantage per response, not per token: (B,)")
    low = clip_range[0] if clip_low is None else clip_low
    high = clip_range[1] if clip_high is None else clip_high
    mask = mask > 0                                                        # of any dtype
    r = ratios(logp, logp_old, mask)                                       # (B, T) each
    A = advantages.detach().to(r.logp.dtype)
    if A.dim() == 1:
        A = A[:, None]
    A = torch.where(mask, A, 0)                                            # (B, T)
    if token_weights is None:
        lengths = mask.sum(dim=1).clamp(min=1).to(A.dtype)                 # (B,)
        token_weights = aggregation(lengths, mask.shape[1])                # (B,)

    # For GSPO all tokens of a response contribute the same and weigh 1/(B |y_i|): their sum is the
    # one term per response that Eq. 5 has.
    contribution, clipped = objective_of(r, A, low, high)                  # (B, T) each
    per_response = torch.where(mask, contribution, 0).sum(dim=1)           # (B,)
    objective = (per_response * token_weights).sum()
    return -objective, clipped & (A != 0)       # `clip` takes A = 0 for a bad token


# ---------------------------------------------------------------------------- the update

@dataclass(frozen=True)
class Settings:
    """How to update. What is not explained here is an option of train.py, which explains it.
    ValueError for what does not go together."""
    algorithm: str = "gspo"
    clip_low: float | None = None       # None here and in the next two: what ALGORITHMS has
    clip_high: float | None = None
    scale: str | None = None
    mini_batches: int = 4
    epochs: int = 1
    dtype: str = "float32"
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    max_new_tokens: int = 64            # the longest response, by which dr_grpo divides
    micro_tokens: int = 8192            # rows times columns in a forward pass: bounds the memory
    routing_replay: str = "none"
    recompute_logp_old: bool = False
    correction: str = "none"
    kl_coef: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95

    def __post_init__(self):
        row = find_algorithm(self.algorithm)
        defaults = {"clip_low": row.clip[0], "clip_high": row.clip[1], "scale": row.scale}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, default)
            elif default is None:
                raise ValueError(f"{name} is {value}, but {self.algorithm} has none; leave it out")
        if self.correction != "none" and row.objective in ONE_ADVANTAGE_PER_RESPONSE:
            raise ValueError(f"correction is {self.correction}, which weighs tokens, but "
                             f"{self.algorithm} weighs whole responses; take gspo_token")


@dataclass
class Experience:
    """What an update learns from: a rollout and what is known of it."""
    rollout: Rollout
    advantages: Tensor                  # (B,) or (B, T)
    logp_ref: Tensor | None = None      # (B, T) under the reference policy, for the KL term
    critic: "Critic | None" = None      # for ppo

    def select(self, rows: Tensor) -> "Experience":
        return Experience(
            self.rollout.select(rows), self.advantages[rows],
            None if self.logp_ref is None else self.logp_ref[rows],
            None if self.critic is None else self.critic.select(rows))


class Scores(NamedTuple):
    """Responses under the model as it is now."""
    logp: Tensor            # (B, T), 0 in padding
    entropy: Tensor         # (B, T) of the distribution that each token was chosen from, in nats
    hidden: Tensor          # (B, T, D): the logits of each token were made of these
    routes: Tensor          # (L, B, S, K), of prompt and response
    router_logits: Tensor   # (L, B, S, E)

    def detach(self) -> "Scores":
        return Scores(*(x.detach() for x in self))

    @staticmethod
    def join(parts: list["Scores"]) -> "Scores":
        """The scores of several parts of a batch in one, without their gradient."""
        logp, entropy, hidden, routes, router_logits = zip(*(part.detach() for part in parts))
        return Scores(torch.cat(logp), torch.cat(entropy), torch.cat(hidden),
                      torch.cat(routes, dim=1), torch.cat(router_logits, dim=1))


def score(model: MoETransformer, rollout: Rollout, temperature: float = 1.0,
          replay: bool = False, dtype: str = "float32") -> Scores:
    """The log-probs of a rollout's responses under the model as it is now, at the temperature that
    they were sampled with, and what else a pass over them gives.

    With `replay` the model activates the experts that the rollout has on record, rollout.routes, in
    place of those that its router would choose today; their weights are today's."""
    T = rollout.logp.shape[1]
    routes = rollout.routes if replay else None
    with autocast(rollout.tokens.device, dtype):
        out = model(rollout.tokens, rollout.mask, routes, logits_to_keep=T + 1)
    # The logits of a column predict the token of the next one. So the last column of the prompt is
    # needed too, and those of the last column of all predict nothing.
    logits = at_least_fp32(out.logits[:, :-1])
    log_probs = (logits / temperature).log_softmax(dim=-1)                 # (B, T, vocab_size)
    logp = log_probs.gather(2, rollout.response[..., None])[..., 0]        # (B, T)
    logp = torch.where(rollout.response_mask, logp, 0)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)               # (B, T)
    return Scores(logp, entropy, out.hidden[:, :-1], out.routes, out.router_logits)


def update(model: MoETransformer, optimizer: torch.optim.Optimizer, experience: Experience,
           settings: Settings, first: int | None = None,
           scaler: torch.amp.GradScaler | None = None) -> list[dict]:
    """One optimiser step for each mini-batch of whole groups, in each epoch -> a dict of metrics
    for each step.

    With `first`, only the first so many mini-batches of all epochs. A mini-batch in which every A
    is 0 has no step, unless a KL term or a critic has something to learn. The optimizer must know
    the parameters of the critic's head too. FloatingPointError, before the step, if the loss or the
    gradient is not finite.

    In float16, whose smallest number is 6e-8, gradients would vanish. So the `scaler` multiplies
    the loss by a large number, and divides the gradients by it before they are clipped. If a
    gradient overflows, the step is skipped, and the next ones get a smaller number."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)                 # does nothing
    scaler.scale(torch.zeros(1, device=experience.advantages.device))      # lets it start
    parameters = list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))
    lengths = experience.rollout.lengths                                   # (B,)
    rows_of_groups = torch.arange(len(lengths), device=lengths.device)
    rows_of_groups = rows_of_groups.view(-1, experience.rollout.group_size)        # (P, G)
    mini_batches = rows_of_groups.tensor_split(settings.mini_batches) * settings.epochs
    metrics = []
    for index, groups in enumerate(mini_batches[:first]):
        mini_batch = experience.select(groups.flatten())
        optimizer.zero_grad()
        result = accumulate_gradient(model, mini_batch, settings, scaler)
        if result is None:
            continue
        loss, step_metrics = result
        loss = add_up(parameters, loss)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
        skipped = scaler.is_enabled() and not isfinite(grad_norm)
        if not isfinite(loss) or not (isfinite(grad_norm) or skipped):
            raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}; a lower lr may help")
        scaler.step(optimizer)
        scaler.update()
        metrics.append({"mini_batch": index, "loss": loss,
                        "grad_norm": 0.0 if skipped else grad_norm,
                        "skipped": float(skipped)} | step_metrics)
    return metrics


def accumulate_gradient(model: MoETransformer, mini_batch: Experience, settings: Settings,
                        scaler: torch.amp.GradScaler) -> tuple[float, dict] | None:
    """Add the gradient of a mini-batch's loss to the parameters, a part at a time -> the policy
    loss and the metrics; None if no response has a gradient.

    The weights of the tokens are those of the whole mini-batch, and in the model no row influences
    another: so the losses of the parts add up to its loss, and their gradients to its gradient."""
    lengths = mini_batch.rollout.lengths.float()                           # (B,)
    aggregation = find_algorithm(settings.algorithm).aggregation
    token_weights = aggregation(lengths, settings.max_new_tokens)          # (B,)
    # The KL term and the critic are averaged alike under every algorithm.
    mean_weights = seq_mean_token_mean(lengths, settings.max_new_tokens)   # (B,)
    # A response with A = 0 counts in these weights but has no gradient: it is not computed, unless
    # another loss needs it.
    needed = mini_batch.advantages != 0                                    # (B,) or (B, T)
    if needed.dim() == 2:
        needed = needed.any(dim=1)
    if settings.kl_coef or mini_batch.critic is not None:
        needed = torch.ones_like(needed)
    if not needed.any():
        return None
    # Under torchrun the responses are dealt out: this process computes only its own.
    rank, n_processes = team()
    dealt = [needed.nonzero()[first::n_processes, 0] for first in range(n_processes)]
    mine = mini_batch.select(dealt[rank])
    token_weights = token_weights[dealt[rank]]
    mean_weights = mean_weights[dealt[rank]]

    total = 0.0
    computed = []
    for rows in micro_batches(mine.rollout, settings):
        part = mine.select(rows)
        mask = part.rollout.response_mask
        # logp_old was stored by moe.generate when it sampled (or by rescore, before the update). In
        # the first mini-batch the model has not moved since: every ratio is 1, up to rounding, and
        # nothing is clipped. Each optimiser step moves the model further away. (A sampler in lower
        # precision or with older weights, whose log-probs are trusted, is off from the start.)
        logp_old = part.rollout.logp
        scores = score(model, part.rollout, settings.temperature, settings.routing_replay != "none",
                       settings.dtype)
        loss, clipped = policy_loss(
            settings.algorithm, scores.logp, logp_old, part.advantages, mask,
            settings.clip_low, settings.clip_high, token_weights[rows])
        scaler.scale(loss + extra_losses(part, scores, mean_weights[rows], settings)).backward()
        total += loss.item()
        computed.append((scores.detach(), clipped))
    all_scores, all_clipped = zip(*gather(computed, lengths.device))
    return total, update_metrics(mini_batch.select(torch.cat(dealt)), Scores.join(all_scores),
                                 torch.cat(all_clipped))


def micro_batches(rollout: Rollout, settings: Settings) -> tuple[Tensor, ...]:
    """The row numbers 0 .. B-1 in parts of at most `micro_tokens` cells, at least one row each."""
    B, S = rollout.tokens.shape
    rows = torch.arange(B, device=rollout.tokens.device)
    return rows.split(max(1, settings.micro_tokens // S)) if B else ()


# Many processes, under torchrun: the work is dealt out, its results are shared. So every process
# knows the whole rollout and decides by itself what all others decide.

def team() -> tuple[int, int]:
    """The number of this process, and how many there are: 0 and 1 without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(mine: list, device: torch.device) -> list:
    """The lists of all processes in one list, process 0 first, with their tensors on `device`."""
    _, n_processes = team()
    if n_processes == 1:
        return mine
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    received = [None] * n_processes
    dist.all_gather_object(received, buffer.getvalue())
    # Not only weights, but from nobody else than ourselves.
    lists = [torch.load(io.BytesIO(sent), device, weights_only=False) for sent in received]
    return list(itertools.chain(*lists))


def add_up(parameters: list[nn.Parameter], loss: float) -> float:
    """Replace each gradient by the sum of those of all processes -> the sum of their losses. In a
    process that has computed no row, a gradient may be missing: it counts as 0."""
    if team()[1] == 1:
        return loss
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    total = torch.cat([*flat, flat[0].new_tensor([loss])])
    dist.all_reduce(total)
    parts = total[:-1].split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts):
        p.grad = part.view_as(p)
    return total[-1].item()


# ---------------------------------------------------------------------------- the relatives

def gspo_token(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # Eq. 13-14: the value is s_i, the gradient that of the token alone. The bracket is exactly 0
    # and must be formed first: log s_i is so near 0 that adding it to logp would round it away.
    log_s = (r.logp - r.logp.detach()) + r.log_s.detach()
    return clip(log_s.exp(), A, low, high)


def cispo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # The weight is clipped, not the gradient: every token keeps one.
    w = r.log_w.exp().detach()
    contribution = w.clamp(1 - low, 1 + high) * A * r.logp
    return contribution, (w < 1 - low) | (w > 1 + high)


def gmpo(r: Ratios, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    # Tokens are clipped first (in log w, on the side that A asks for), then their geometric mean
    # is taken. Without the clip this is GSPO.
    log_w = torch.where(A > 0, r.log_w.clamp(max=high), r.log_w.clamp(min=-low))
    return response_mean(log_w, r.mask).exp() * A, log_w != r.log_w


SAPO_TAU_POSITIVE = 1.0
SAPO_TAU_NEGATIVE = 1.05    # the gate for A < 0 closes a little faster


def sapo(r: Ratios, A: Tensor, low: None, high: None) -> tuple[Tensor, Tensor]:
    # A gate in place of the clip: its slope, sech^2(tau/2 (w - 1)), falls smoothly from 1 at w = 1.
    tau = torch.full_like(A, SAPO_TAU_NEGATIVE).masked_fill(A > 0, SAPO_TAU_POSITIVE)
    contribution = 4 / tau * torch.sigmoid(tau * (r.log_w.exp() - 1)) * A
    return contribution, torch.zeros_like(r.mask)


def reinforce(r: Ratios, A: Tensor, low: None, high: None) -> tuple[Tensor, Tensor]:
    # No ratio: unbiased in the first mini-batch only, where the policy is still the sampler's.
    return r.logp * A, torch.zeros_like(r.mask)


ONE_ADVANTAGE_PER_RESPONSE = (gspo, gmpo)


# How much each token of a response counts in the objective: lengths |y| (B,) of the responses, and
# the longest length that there can be -> weights (B,). The names are those that verl uses.

def seq_mean_token_mean(lengths: Tensor, longest: int) -> Tensor:
    return 1 / (len(lengths) * lengths)                 # 1/B sum_i 1/|y_i| sum_t


def token_mean(lengths: Tensor, longest: int) -> Tensor:
    return torch.ones_like(lengths) / lengths.sum()     # 1/(sum_i |y_i|) sum_i sum_t


def seq_mean_token_sum(lengths: Tensor, longest: int) -> Tensor:
    return torch.ones_like(lengths) / len(lengths)      # 1/B sum_i sum_t


def seq_mean_token_sum_norm(lengths: Tensor, longest: int) -> Tensor:
    return torch.ones_like(lengths) / (len(lengths) * longest)      # 1/(B longest) sum_i sum_t


class Algorithm(NamedTuple):
    objective: Callable         # (Ratios, A, low, high) -> contribution and clipped, (B, T) both
    aggregation: Callable       # how the contributions of tokens are added up
    clip: tuple                 # low, high: of s for gspo and luspo, of log w for gmpo, else of w
    scale: str | None           # of group_advantages; None for ppo: a critic gives its advantages


# A clip range is that of the cited paper unless a comment says otherwise. The GSPO paper has 3e-4
# and 4e-4, for responses of thousands of tokens. Ours have about 30 tokens, so that one token moves
# the mean much further. Ten times the range learned faster on all of five seeds. A rule is half the
# spread of log s, the metric log_s_std; results/README.md has the figures for both.
ALGORITHMS = {
    "gspo": Algorithm(gspo, seq_mean_token_mean, (3e-3, 4e-3), "std"),              # 2507.18071
    # For advantages per token; with one per response it equals gspo in value and gradient.
    "gspo_token": Algorithm(gspo_token, seq_mean_token_mean, (3e-3, 4e-3), "std"),  # 2507.18071
    # The range is that of the GSPO paper's GRPO.
    "grpo": Algorithm(grpo, seq_mean_token_mean, (0.2, 0.27), "std"),               # 2402.03300
    "ppo": Algorithm(grpo, seq_mean_token_mean, (0.2, 0.2), None),                  # 1707.06347
    # No std and no 1/|y|: it argues that both are biases, to easy or hard questions and to length.
    "dr_grpo": Algorithm(grpo, seq_mean_token_sum_norm, (0.2, 0.2), "none"),        # 2503.20783
    # More room upwards, for rare tokens; long responses count more.
    "dapo": Algorithm(grpo, token_mean, (0.2, 0.28), "std"),                        # 2503.14476
    # Weights from 0 to 5: no lower bound, as in the paper; the upper one is what TRL recommends.
    "cispo": Algorithm(cispo, token_mean, (1.0, 4.0), "std"),                       # 2506.13585
    "gmpo": Algorithm(gmpo, seq_mean_token_mean, (0.4, 0.4), "std"),                # 2507.20673
    "sapo": Algorithm(sapo, seq_mean_token_mean, (None, None), "std"),              # 2511.20347
    # GSPO times |y|: it argues that GSPO's 1/|y| makes responses shrink.
    "luspo": Algorithm(gspo, seq_mean_token_sum, (2e-3, 2.5e-3), "std"),            # 2602.05261
    "reinforce": Algorithm(reinforce, seq_mean_token_mean, (None, None), "none"),
}


def find_algorithm(name: str) -> Algorithm:
    """The row of the table. ValueError, with the names that there are, for another name."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm is {name!r}; it can be one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


# ---------------------------------------------------------------------------- beside the objective

@torch.no_grad()
def rescore(model: MoETransformer, rollout: Rollout, settings: Settings, replay: bool = False,
            head: nn.Module | None = None) -> tuple[Rollout, Tensor]:
    """The rollout with the log-probs and routes of a pass of the trainer in place of the sampler's,
    and the values (B, T) of a critic's `head`, which are 0 without one and in padding."""
    parts = [score(model, rollout.select(rows), settings.temperature, replay, settings.dtype)
             for rows in micro_batches(rollout, settings)]
    scores = Scores.join(parts)
    values = torch.zeros_like(scores.logp)
    if head:
        values = head(scores.hidden)[..., 0] * rollout.response_mask
    return replace(rollout, logp=scores.logp, routes=scores.routes.to(torch.uint8)), values


def prepare(model: MoETransformer, rollout: Rollout, rewards: Tensor, settings: Settings,
            reference: MoETransformer | None = None,
            head: nn.Module | None = None) -> tuple[Experience, dict]:
    """A rollout and its rewards (P, G) -> what `update` learns from, and metrics.

    By default that is the rollout as it was sampled, with its group advantages. The trainer scores
    it again, which replaces logp_old and the routes, for recompute_logp_old, for a correction, for
    routing replay r2, and for ppo, whose critic has the `head`. For the KL term, it is scored under
    the `reference` too."""
    metrics = {}
    sampled = rollout
    corrected = settings.correction != "none"
    values = None
    if settings.recompute_logp_old or corrected or head or settings.routing_replay == "r2":
        began = time.time()
        # r2 records the experts of this pass, r3 replays those of the sampler in it.
        rollout, values = rescore(model, rollout, settings,
                                  replay=settings.routing_replay == "r3", head=head)
        metrics["seconds_rescoring"] = time.time() - began
        metrics |= mismatch_metrics(sampled, rollout.logp, rollout.routes)
    logp_ref = None
    if reference:
        logp_ref = rescore(reference, rollout, settings)[0].logp
        weights = seq_mean_token_mean(rollout.lengths, settings.max_new_tokens)
        kl = kl_loss(rollout.logp, logp_ref, rollout.response_mask, weights)
        metrics["kl_ref"] = kl.item()
    critic = None
    if head:
        advantages, critic = ppo_advantages(rollout, head, values, rewards.flatten(), settings)
        error = (critic.returns - values)[rollout.response_mask]
        metrics["value_error"] = error.square().mean().item()
    else:
        advantages = group_advantages(rewards, settings.scale).flatten()   # (B,)
    if corrected:
        weights = mismatch_weights(settings.correction, rollout.logp, sampled.logp)     # (B, T)
        advantages = advantages.view(len(weights), -1) * weights
    return Experience(rollout, advantages, logp_ref, critic), metrics


def extra_losses(part: Experience, scores: Scores, mean_weights: Tensor,
                 settings: Settings) -> Tensor | float:
    """What some settings add to the policy loss: a KL term, and the loss of PPO's critic."""
    mask = part.rollout.response_mask
    loss = 0.0
    if settings.kl_coef:
        loss += settings.kl_coef * kl_loss(scores.logp, part.logp_ref, mask, mean_weights)
    if part.critic:
        values = part.critic.head(scores.hidden)[..., 0]                   # (B, T)
        loss += VALUE_COEF * value_loss(values, part.critic.values, part.critic.returns, mask,
                                        mean_weights)
    return loss


def mismatch_weights(kind: str, logp_old: Tensor, logp_sampler: Tensor) -> Tensor:
    """What to multiply each token's advantage with if the sampler's policy mu, say one in lower
    precision, was not quite pi_old: pi_old / mu, cut at 2 ("tis", truncated importance sampling) or
    0 outside [0.5, 5] ("icepop"). All (B, T). Not to be confused with the objective's own ratio."""
    ratio = (logp_old - logp_sampler).clamp(max=MAX_LOG_RATIO).exp()
    if kind == "tis":
        return ratio.clamp(max=2.0)
    return torch.where((ratio >= 0.5) & (ratio <= 5), ratio, 0)


def kl_loss(logp: Tensor, logp_ref: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """KL(policy || reference), a scalar: the sum over all tokens of weights (B,) times
    k3 = x - 1 - log x with x = pi_ref / pi, as in GRPO. Its value is never negative and unbiased
    over tokens of the policy. Its gradient, with the tokens held fixed, is in expectation that of
    KL(reference || policy). logp, logp_ref and mask are (B, T)."""
    log_x = -ratios(logp, logp_ref, mask).log_w
    return ((log_x.expm1() - log_x).sum(dim=1) * weights).sum()


# PPO has a critic in place of the group: a learned guess, at every token, of the reward to come.

VALUE_CLIP = 0.2        # how far a value may move before its loss stops caring
VALUE_COEF = 0.1        # weight of the critic's loss beside that of the policy


class Critic(NamedTuple):
    head: nn.Module     # the model's hidden state (B, T, D) -> the value of each token (B, T, 1)
    values: Tensor      # (B, T) its guesses before the update
    returns: Tensor     # (B, T) what it should have guessed

    def select(self, rows: Tensor) -> "Critic":
        return Critic(self.head, self.values[rows], self.returns[rows])


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (1506.02438, Eq. 16) of rewards and values (B, T), both 0
    after the end -> (B, T): the sum over l of (gamma lam)^l (r_t+l + gamma v_t+l+1 - v_t+l)."""
    advantages = torch.zeros_like(values)
    advantage = 0.0
    next_value = 0.0
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = surprise + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages


def ppo_advantages(rollout: Rollout, head: nn.Module, values: Tensor, rewards: Tensor,
                   settings: Settings) -> tuple[Tensor, Critic]:
    """Rewards (B,), earned by the last tokens, and values (B, T) -> advantages (B, T), the Critic.
    The advantages are brought to mean 0 and deviation 1 over all tokens, as in verl."""
    at_end = torch.zeros_like(values)
    at_end[range(len(rewards)), rollout.lengths - 1] = rewards
    advantages = gae(at_end, values, settings.gamma, settings.gae_lambda)  # (B, T)
    std, mean = torch.std_mean(advantages[rollout.response_mask])
    return (advantages - mean) / (std + 1e-8), Critic(head, values, advantages + values)


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor,
               weights: Tensor) -> Tensor:
    """Half the squared error of values (B, T), summed with weights (B,) to a scalar; a move beyond
    VALUE_CLIP gains nothing."""
    near = values_old + (values - values_old).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
    return (torch.where(mask, error, 0).sum(dim=1) * weights).sum()


# ---------------------------------------------------------------------------- the metrics

def ratio_metrics(logp: Tensor, logp_old: Tensor, advantages: Tensor, clipped: Tensor,
                  mask: Tensor) -> dict[str, float]:
    """What the ratios look like; arguments as for policy_loss, with a mask of booleans, and
    `clipped` from it. results/README.md explains each of these metrics."""
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    clipped_low = (clipped & (A < 0)).float()                              # (B, T)
    clipped_high = (clipped & (A > 0)).float()
    r = ratios(logp, logp_old, mask)
    log_w = r.log_w[mask]                                                  # (N,)
    log_s = r.log_s[:, 0]                                                  # (B,)
    return {
        "clip_low": clipped_low[mask].mean().item(),
        "clip_high": clipped_high[mask].mean().item(),
        "clip_low_seq": response_mean(clipped_low, mask)[:, 0].mean().item(),
        "clip_high_seq": response_mean(clipped_high, mask)[:, 0].mean().item(),
        "log_s_mean": log_s.mean().item(),
        "log_s_std": log_s.std(correction=0).item(),
        "log_w_mean": log_w.mean().item(),
        "log_w_std": log_w.std(correction=0).item(),
        "outliers": ((log_w.exp() - 1).abs() > 0.2).float().mean().item(),
        # KL(old || new) per token, estimated by w - 1 - log w, which is never negative.
        "kl": (log_w.expm1() - log_w).mean().item(),
    }


def expert_change(old: Tensor, new: Tensor) -> Tensor:
    """Active experts (L, N, K), before and after, as sets -> the share that changed (L,)."""
    changed = (old[..., :, None] != new[..., None, :]).all(dim=-1)         # (L, N, K)
    return changed.float().mean(dim=(1, 2))


def routing_metrics(old: Tensor, new: Tensor, router_logits: Tensor) -> dict[str, list[float]]:
    """What the router of each layer does: the experts on record and those of this pass, (L, N, K)
    each, compared as sets, and its logits now (L, N, E) -> L floats for each metric."""
    pairs = one_hot(new.long(), router_logits.shape[-1]).sum(dim=(1, 2)).float()       # (L, E)
    probs = router_logits.softmax(dim=-1)                                  # (L, N, E)
    return {
        "expert_change": expert_change(old, new).tolist(),
        "expert_load": (pairs.amax(dim=1) / pairs.mean(dim=1)).tolist(),
        "router_entropy": torch.special.entr(probs).sum(dim=-1).mean(dim=1).tolist(),
    }


def mismatch_metrics(rollout: Rollout, logp: Tensor, routes: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer: its rollout beside the log-probs (B, T) and the
    experts (L, B, S, K) of a pass of the trainer, before the trainer has moved."""
    mask = rollout.response_mask                                           # (B, T)
    log_w = (logp.detach() - rollout.logp)[mask]                           # (N,)
    old = rollout.predicting(rollout.routes)[:, mask]                      # (L, N, K)
    new = rollout.predicting(routes)[:, mask]                              # (L, N, K)
    return {
        "mismatch_mean": log_w.abs().mean().item(),
        "mismatch_max": log_w.abs().max().item(),
        # KL(sampler || trainer) per token, estimated as `kl` is.
        "mismatch_kl": (log_w.expm1() - log_w).mean().item(),
        "mismatch_experts": expert_change(old, new).mean().item(),
    }


def update_metrics(computed: Experience, scores: Scores, clipped: Tensor) -> dict:
    """The metrics of an optimiser step, over the responses that it computed."""
    rollout = computed.rollout
    mask = rollout.response_mask                                           # (B, T)
    old_routes = rollout.predicting(rollout.routes)[:, mask]               # (L, N, K)
    new_routes = rollout.predicting(scores.routes)[:, mask]                # (L, N, K)
    router_logits = rollout.predicting(scores.router_logits)[:, mask]      # (L, N, E)
    return (ratio_metrics(scores.logp, rollout.logp, computed.advantages, clipped, mask)
            | routing_metrics(old_routes, new_routes, router_logits)
            | mismatch_metrics(rollout, scores.logp, scores.routes)
            | {"entropy": scores.entropy[mask].mean().item()})
