"""Teach a tiny Mixture-of-Experts transformer arithmetic: imitation first, then RL with GSPO.

    python train.py                        the whole job, from random weights, in minutes on a CPU
    python train.py --algorithm grpo       another objective, from the same cold start
    python train.py --task countdown       another task: a search that learns not to give up
    python train.py --ask "47*8="          ask the model of the last run
    python train.py --inspect              see what an update does to it, token by token
    python train.py --resume               go on after Ctrl-C, to the very same numbers
    python train.py --help                 every option, and why it has its default

    1  cold start   imitate a teacher who thinks now and then, slips and guesses    cold_start
    2  evaluate     on held-out problems                                            evaluate
    3  RL           sample, reward, advantages, update; again                       rl
    4  report       what happened, in words, numbers and curves                     finish

All chance comes from (seed, stage, step). So a checkpoint needs only the weights, the optimiser,
the success rate of each kind of problem and the number of the step to go on exactly as if nothing
had happened (on a CPU, with as many threads).
"""
import ast
import atexit
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import ContextManager, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import gspo
import moe
from data import demonstrations, tasks
from data.queries import Queries
from data.tokenizer import Tokenizer
from lab import report
from lab.options import Parser, fail, option, parser_for

# Every field below is a flag, and its text is what --help says about it.


@dataclasses.dataclass
class ModelOptions:
    """the model: a third of a million parameters learn this task in minutes on two cores"""
    n_layer: int = option(3, "layers", 1, 4096)
    d_model: int = option(64, "width between the layers", 2, 4096)
    n_head: int = option(4, "query heads", 1)
    n_kv_head: int = option(2, "key/value heads, each for n_head / n_kv_head query heads", 1)
    n_expert: int = option(8, "experts in a layer", 1)
    n_active: int = option(2, "experts that a token uses", 1)
    d_expert: int = option(64, "inner width of an expert", 1, 4096)


@dataclasses.dataclass
class ColdStartOptions:
    """the cold start: imitation of the teacher"""
    cold_steps: int = option(1100, "steps of imitation: until the thinking is mostly right", 1)
    muon_lr: float = option(0.02, "peak learning rate of the matrices in the layers (Muon)", 0, 1)
    cold_lr: float = option(6e-3, "peak learning rate of all other parameters (AdamW)", 0, 1)
    cold_tokens: int = option(3840, "tokens in a batch, padding not counted", 64)
    balance: float = option(0.01, "weight of the loss that keeps all experts in use", 0, 10)


@dataclasses.dataclass
class RLOptions:
    """RL"""
    algorithm: str = option("gspo", "the objective", choices=tuple(gspo.ALGORITHMS))
    steps: int = option(200, "RL steps: until held-out accuracy hardly rises any more", 0)
    queries: str = option("adaptive", "kinds of problem to ask: above all those that are sometimes "
                          "answered right (adaptive), or all equally often (uniform); a task "
                          "without kinds decides by itself", choices=("adaptive", "uniform"))
    prompts: int = option(32, "problems in a step", 1)
    group_size: int = option(8, "responses to a problem: each other's baseline", 2)
    mini_batches: int = option(4, "optimiser steps per rollout, as in the paper; with many GSPO is "
                               "ahead of GRPO", 1)
    lr: float = option(3e-4, "learning rate: gentle, the policy must stay near the sampler's", 0, 1)
    clip_low: float = option(None, "lower clip range (default: as in the table ALGORITHMS of "
                             "gspo.py; for gspo about half of log_s_std, see results/)", 0, 1)
    clip_high: float = option(None, "upper clip range (default: as in that table)", 0, 100)
    routing_replay: str = option("none", "experts that the update activates: those that the router "
                                 "chooses now (none; the others gained nothing here), those of a "
                                 "pass of the trainer before it, which scores again too (r2), or "
                                 "those of the sampler (r3)",
                                 choices=("none", "r2", "r3"))
    temperature: float = option(1.0, "of sampling and of scoring: the policy as it is", 0.01, 100)
    max_new_tokens: int = option(64, "a response without an end by then is worth 0", 1, 1000)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this; in the cold start "
                                  "too", 1e-6)
    dtype: str = option("float32", "of the matrix products in RL (torch.autocast)",
                        choices=("float32", "bfloat16", "float16"))
    epochs: int = option(1, "passes over a rollout, as in PPO; more make its updates staler", 1,
                         100)
    sampler: str = option("same", "weights to sample with: the trainer's own (same), or a copy in "
                          "this precision (float8 and int: rounded, but computed in float32)",
                          choices=("same", "float32", "bfloat16", "float16", "float8", "int8",
                                   "int4", "int3"))
    lag: int = option(0, "sample with the weights of so many rollouts ago, as asynchronous RL does",
                      0, 100)
    recompute_logp_old: bool = option(False, "score again, do not trust the sampler's log-probs")
    correction: str = option("none", "score again and weigh tokens by how far off the sampler was",
                             choices=("none", "tis", "icepop"))


@dataclasses.dataclass
class RelativesOptions:
    """for GSPO's relatives only"""
    scale: str = option(None, "divide advantages by their group's std, or not (default: as the "
                        "algorithm's paper does)", choices=("std", "none"))
    kl_coef: float = option(0.0, "weight of the KL to the cold start's policy, off in GSPO", 0, 99)
    gamma: float = option(1.0, "ppo: a reward a token later is worth this much", 0, 1)
    gae_lambda: float = option(0.95, "ppo: 1 trusts rewards, 0 the critic", 0, 1)
    dynamic_sampling: bool = option(False, "sample until every group has a signal (DAPO)")
    sampling_rounds: int = option(10, "with --dynamic_sampling: at most so often", 1, 1000)
    overlong: int = option(0, "so many tokens before --max_new_tokens the reward begins to fall, "
                           "to 1 less at the end (DAPO); 0: it does not", 0, 1000)


@dataclasses.dataclass
class RunOptions:
    """the run"""
    task: str = option("arithmetic", "module in data/ that holds the class Task")
    seed: int = option(0, "same seed and threads, same run", 0)
    eval_every: int = option(100, "RL steps from one held-out evaluation to the next", 1)
    save_every: int = option(50, "RL steps from one checkpoint to the next", 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; what we measured with", 1, 1024)
    out: str = option(None, "folder of the run (default: the first free out/run-N)")


@dataclasses.dataclass
class Config(RunOptions, RelativesOptions, RLOptions, ColdStartOptions, ModelOptions):
    """All options. ValueError for those that do not go together."""

    def __post_init__(self):
        settings = self.settings()
        self.clip_low = settings.clip_low
        self.clip_high = settings.clip_high
        self.scale = settings.scale
        if self.overlong > self.max_new_tokens:
            raise ValueError(f"overlong is {self.overlong}; it must be at most --max_new_tokens, "
                             f"{self.max_new_tokens}")

    def settings(self) -> gspo.Settings:
        """Those of the options that gspo.update reads: they have the same names there."""
        names = {field.name for field in dataclasses.fields(gspo.Settings)}
        return gspo.Settings(**{name: value for name, value in vars(self).items() if name in names})


MAX_PROMPT = 64     # tokens
LAYOUT = 3          # of a checkpoint; raise it when older ones can no longer be read


class Run(NamedTuple):
    """What every stage works with."""
    config: Config
    task: object
    tokenizer: Tokenizer
    model: moe.MoETransformer
    folder: Path


class Response(NamedTuple):
    """What a response says and is worth."""
    problem: object
    text: str           # without its end token
    cut: bool           # True if it had no end token after --max_new_tokens
    reward: float       # 0 if it was cut
    length: int         # tokens, the end token included
    thinks: bool        # False if it was cut, or the task does not say what thinking is
    measures: dict      # {name: number}, empty if the task measures nothing


# ---------------------------------------------------------------------------- 1 the cold start

def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (..., m, n) -> matrices with the same singular vectors, and all singular values near
    1: from 0.7 to 1.2. Those below some 1/500 of the matrix's norm stay smaller.

    Five Newton-Schulz steps, each of which turns every singular value v into
    3.4445 v - 4.7750 v^3 + 2.0315 v^5 (K. Jordan's Muon, kellerjordan.github.io/posts/muon)."""
    # Divided by their Frobenius norm, they have no singular value above 1.
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT                                                   # (..., m, m)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Averages the gradients of each matrix by momentum, and moves it by the matrix that has the
    same singular vectors and singular values near 1: what is rare in the data moves it as far as
    what is common, and an expert with few tokens moves as far as a busy one.

    A parameter of three dimensions is a stack of matrices, such as those of all experts of a layer.
    (torch.optim.Muon takes one matrix at a time: 39 ms a step for this model, 11 ms here.)"""
    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum,
                                      "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad + group["momentum"] * momentum       # Nesterov
                m, n = parameter.shape[-2:]                                 # outputs, inputs
                # A tall matrix makes longer steps, as in Jordan's Muon.
                change = orthogonalise(ahead) * max(1, m / n) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * change)


def cold_optimizers(config: Config, model: moe.MoETransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (attention, routers, experts); AdamW for the rest:
    embedding, unembedding and the vectors of the norms."""
    matrices = [parameter for parameter in model.layers.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    rest = [model.embed.weight, model.unembed.weight, *vectors]
    return [Muon(matrices, config.muon_lr, weight_decay=0.05),
            torch.optim.AdamW(rest, config.cold_lr, betas=(0.9, 0.95), weight_decay=0.05,
                              fused=True)]


def cold_start(run: Run, fresh: bool) -> float:
    """Imitate the teacher, from random weights -> the seconds that took. The result is kept in out/
    for later runs that would make the same, unless `fresh`."""
    config = run.config
    model = run.model
    path = Path("out") / f"cold-{cold_start_key(run)}.pt"
    if not fresh and all(gspo.gather([path.exists()], torch.device("cpu"))):    # for all processes
        kept = load(path, "--fresh makes it again")
        model.load_state_dict(kept["model"])
        print(f"1 cold start: taken from {path} (--fresh makes it again)")
        return kept["seconds"]

    print(f"1 cold start: {config.cold_steps} steps of imitation")
    device = model.embed.weight.device
    optimizers = cold_optimizers(config, model)

    def share_of_peak(done: int) -> float:
        # The smaller of two lines: up within 50 steps, and down to 0 over all steps.
        return min((done + 1) / 50, 1 - done / config.cold_steps)
    schedules = [LambdaLR(optimizer, share_of_peak) for optimizer in optimizers]
    began = time.time()
    batches = demonstrations.batches(run.task, run.tokenizer, config.seed, config.cold_tokens)
    rank, n_processes = gspo.team()
    for step in range(1, config.cold_steps + 1):
        mine = next(batches)[rank::n_processes]
        tokens, mask, T = demonstrations.collate(mine, run.tokenizer.pad_id, device)
        out = model(tokens, mask, logits_to_keep=T + 1)
        response_mask = mask[:, -T:]            # only responses are imitated
        predicted = out.logits[:, :-1][response_mask]       # the next token; (N, vocab_size)
        target = tokens[:, -T:][response_mask]                              # (N,)
        total = F.cross_entropy(predicted, target, reduction="sum")         # nats
        loss = total / config.cold_tokens       # not by N: a token weighs the same in every batch
        model.zero_grad()
        (loss + config.balance / n_processes * moe.balance_loss(out, mask)).backward()
        loss = gspo.add_up(list(model.parameters()), loss.item())
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        if not math.isfinite(loss + grad_norm):
            sys.exit(f"train.py: cold start step {step}: loss {loss}, gradient norm {grad_norm}; "
                     "there is no checkpoint yet. A lower --muon_lr or --cold_lr may help.")
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        if step % 100 == 0 or step == config.cold_steps:
            left = (time.time() - began) / step * (config.cold_steps - step)
            print(f"  step {step:5}   loss {total / len(target):.3f} nats a token   "
                  f"{report.clock(left)} left", flush=True)
    seconds = time.time() - began
    path.parent.mkdir(exist_ok=True)
    save(path, {"layout": LAYOUT, "model": model.state_dict(), "seconds": seconds})
    return seconds


def cold_start_key(run: Run) -> str:
    """A name for all that decides a cold start: options, task, code, vocabulary, version of torch,
    kind of device."""
    fields = (*dataclasses.fields(ModelOptions), *dataclasses.fields(ColdStartOptions))
    names = [field.name for field in fields]
    names += ["task", "seed", "threads", "max_grad_norm"]
    options = {name: getattr(run.config, name) for name in names}
    code = [code_of(x) for x in (
        moe, demonstrations, inspect.getmodule(type(run.task)), Tokenizer, build, orthogonalise,
        Muon, cold_optimizers, cold_start)]
    parts = (LAYOUT, gspo.team()[1], options, vars(run.task), code, run.tokenizer.tokens,
             torch.__version__, run.model.embed.weight.device.type)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def code_of(x) -> str:
    """The code of a module, class or function without its comments and docstrings: editing these
    keeps a cold start."""
    tree = ast.parse(inspect.getsource(x))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


# ---------------------------------------------------------------------------- 2 the evaluation

def sample_responses(run: Run, model: moe.MoETransformer, problems: list, group_size: int,
                     temperature: float, generator: torch.Generator | None = None) -> moe.Rollout:
    """`group_size` responses to each problem; temperature 0 is greedy. With N processes, process r
    samples the groups r, r + N, r + 2 N, ... Each gets the whole rollout in the end."""
    rank, n_processes = gspo.team()
    P = len(problems)
    T = run.config.max_new_tokens
    prompts = [run.tokenizer.encode(problem.prompt) for problem in problems]
    uniform = torch.rand(P, group_size, T, generator=generator)
    mine = moe.generate(model, prompts[rank::n_processes], group_size, T, temperature,
                        run.tokenizer.eos_id, run.tokenizer.pad_id,
                        uniform[rank::n_processes].flatten(0, 1))
    device = mine.tokens.device
    rollout = moe.Rollout.join(gspo.gather([mine], device))
    dealt = torch.cat([torch.arange(P)[first::n_processes] for first in range(n_processes)])
    rows = torch.arange(P * group_size).view(P, group_size)[dealt.argsort()]
    return rollout.select(rows.flatten().to(device))


def reward_responses(run: Run, problems: list, rollout: moe.Rollout) -> list[Response]:
    """Decode, reward and measure each response, row by row."""
    responses = []
    rows = zip(rollout.response.tolist(), rollout.lengths.tolist())
    for i, (ids, length) in enumerate(rows):
        problem = problems[i // rollout.group_size]
        cut = ids[length - 1] != run.tokenizer.eos_id
        text = run.tokenizer.decode(ids[:length] if cut else ids[:length - 1])
        reward = 0.0 if cut else float(run.task.reward(problem, text))
        thinks = not cut and tasks.thinks(run.task, text)
        measures = tasks.measure(run.task, problem, text, cut)
        responses.append(Response(problem, text, cut, reward, length, thinks, measures))
    return responses


def evaluate(run: Run) -> tuple[dict, list[Response]]:
    """On held-out problems, 4 sampled responses to each and the greedy one -> numbers, and the
    sampled responses."""
    problems = tasks.held_out_problems(run.task)
    generator = torch.Generator().manual_seed(run.config.seed)
    likeliest = sample_responses(run, run.model, problems, 1, temperature=0.0)
    several = sample_responses(run, run.model, problems, 4, run.config.temperature, generator)
    greedy = reward_responses(run, problems, likeliest)
    sampled = reward_responses(run, problems, several)
    return report.evaluation(sampled, greedy), sampled


# ---------------------------------------------------------------------------- 3 RL

class Learner(NamedTuple):
    """What RL moves, and what it may need beside the model."""
    optimizer: torch.optim.Optimizer
    head: nn.Module | None                      # ppo: the critic's
    scaler: torch.amp.GradScaler                # of the loss, in float16
    reference: moe.MoETransformer | None        # with --kl_coef: the model after the cold start
    old_weights: list[dict]                     # with --lag: those of the last rollouts


def new_learner(run: Run, state: dict) -> Learner:
    """A Learner that goes on from `state`, the content of a checkpoint."""
    config = run.config
    head = None
    reference = None
    if config.algorithm == "ppo":
        head = nn.Linear(config.d_model, 1).to(run.model.embed.weight.device)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        if "head" in state:
            head.load_state_dict(state["head"])
    if config.kl_coef:
        reference = copy.deepcopy(run.model)        # that of the cold start, in a new run
        if state.get("step"):
            path = Path(config.out) / "cold_start.pt"
            reference.load_state_dict(load(path, "start a new run")["model"])
    parameters = [*run.model.parameters(), *(head.parameters() if head else ())]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    scaler = torch.amp.GradScaler(run.model.embed.weight.device.type,
                                  enabled=config.dtype == "float16")
    scaler.load_state_dict(state.get("scaler", scaler.state_dict()))
    return Learner(optimizer, head, scaler, reference, state.get("old_weights", []))


class Samples(NamedTuple):
    """The groups that an RL step learns from, and all responses that were sampled for it, those of
    dropped groups included."""
    rollout: moe.Rollout
    rewards: Tensor             # (P, G), the overlong penalty included
    has_signal: Tensor          # (P,) True where the rewards differ, without the overlong penalty
    all_responses: list[Response]


def overlong_penalty(lengths: Tensor, longest: int, margin: int) -> Tensor:
    """What DAPO (2503.14476, Eq. 13) adds to the reward: 0 for responses up to `longest - margin`
    tokens, then less with every token, -1 from `longest` on. No `margin`, no penalty."""
    if margin == 0:
        return torch.zeros(lengths.shape)
    return ((longest - margin - lengths) / margin).clamp(-1, 0)


def sampling_model(run: Run, learner: Learner) -> moe.MoETransformer:
    """The model that samples the next rollout: the trainer's own, or a copy in the precision of
    --sampler, with the weights of `lag` rollouts ago. The first `lag` rollouts have those of the
    cold start."""
    config = run.config
    if config.sampler == "same" and config.lag == 0:
        return run.model
    model = copy.deepcopy(run.model)
    if config.lag:
        learner.old_weights.append(copy.deepcopy(run.model.state_dict()))
        del learner.old_weights[:-1 - config.lag]
        model.load_state_dict(learner.old_weights[0])
    return model if config.sampler == "same" else moe.in_precision(model, config.sampler)


def sample_and_reward(run: Run, sampler: moe.MoETransformer, queries: Queries,
                      rng: random.Random) -> Samples:
    """P new problems, G responses to each, their rewards. `rng` is where all chance comes from."""
    config = run.config
    problems = queries.draw(config.prompts, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    dtype = config.dtype if config.sampler == "same" else "float32"
    with moe.autocast(run.model.embed.weight.device, dtype):
        rollout = sample_responses(run, sampler, problems, config.group_size, config.temperature,
                                   generator)
    responses = reward_responses(run, problems, rollout)
    rewards = torch.tensor([response.reward for response in responses])
    rewards = rewards.view(-1, config.group_size)                           # (P, G)
    has_signal = rewards.amax(dim=1) > rewards.amin(dim=1)                  # (P,)
    penalty = overlong_penalty(rollout.lengths.cpu(), config.max_new_tokens, config.overlong)
    return Samples(rollout, rewards + penalty.view_as(rewards), has_signal, responses)


def sample_until_signal(run: Run, sampler: moe.MoETransformer, queries: Queries,
                        rng: random.Random) -> Samples:
    """Dynamic sampling (DAPO): drop groups that are all right or all wrong and sample new problems
    until there are P groups. After the last round, dropped groups of that round fill the gaps."""
    P = run.config.prompts
    kept = []                   # pairs: Samples, and the numbers of the groups to keep of them
    missing = P
    for round_ in range(1, run.config.sampling_rounds + 1):
        new = sample_and_reward(run, sampler, queries, rng)
        groups = new.has_signal.nonzero()[:, 0][:missing]
        missing -= len(groups)
        if missing and round_ == run.config.sampling_rounds:
            print(f"  after {round_} rounds of sampling {missing} of {P} groups have no signal; "
                  "see --sampling_rounds")
            spare = (~new.has_signal).nonzero()[:, 0][:missing]
            groups = torch.cat((groups, spare)).sort().values
        kept.append((new, groups))
        if missing == 0:
            break
    rollouts = []
    for new, groups in kept:
        rows = torch.arange(len(new.rollout.tokens)).view(P, -1)[groups].flatten()
        rollouts.append(new.rollout.select(rows.to(new.rollout.tokens.device)))
    return Samples(moe.Rollout.join(rollouts),
                   torch.cat([new.rewards[groups] for new, groups in kept]),
                   torch.cat([new.has_signal[groups] for new, groups in kept]),
                   list(itertools.chain(*(new.all_responses for new, _ in kept))))


def rl_step(run: Run, learner: Learner, queries: Queries,
            step: int) -> tuple[dict, list[dict]]:
    """One step of RL -> a row of metrics.csv, and the rows of updates.csv."""
    began = time.time()
    rng = random.Random(f"{run.config.seed} rl {step}")
    settings = run.config.settings()
    # Sample G responses to each of P problems, and reward them.
    collect = sample_until_signal if run.config.dynamic_sampling else sample_and_reward
    samples = collect(run, sampling_model(run, learner), queries, rng)
    queries.learn(samples.all_responses)
    # Advantages: how good is a response beside its siblings?
    experience, metrics = gspo.prepare(
        run.model, samples.rollout, samples.rewards.to(samples.rollout.logp.device), settings,
        learner.reference, learner.head)
    # Ratio, clip and optimiser step: `mini_batches` times in each epoch, each with its own groups.
    updates = gspo.update(run.model, learner.optimizer, experience, settings,
                          scaler=learner.scaler)

    seconds = time.time() - began
    if step == 1 and settings.routing_replay != "none":
        recorded = (f"in a pass of {metrics['seconds_rescoring']:.3f} of {seconds:.3f} s"
                    if "seconds_rescoring" in metrics else "by the sampler, which costs no pass")
        print(f"  routing replay {settings.routing_replay}: the experts were recorded {recorded}; "
              f"the record has {samples.rollout.routes.nbytes / 1024:.0f} KiB")
    n_tokens = sum(response.length for response in samples.all_responses)
    row = report.response_metrics(samples.all_responses) | report.means(updates) | metrics
    # How far the sampler was from the trainer shows in the first mini-batch, where the trainer has
    # not moved yet, or in a pass before it.
    config = run.config
    differs = config.sampler != "same" or config.lag > 0 or config.dtype != "float32"
    for name in report.MISMATCH_COLUMNS:
        row[name] = (updates[0] | metrics)[name] if updates and differs else None
    row["step"] = step
    row["no_signal"] = 1 - samples.has_signal.float().mean().item()
    row["seconds"] = seconds
    row["tokens_per_second"] = n_tokens / seconds
    return row, updates


def rl(run: Run, state: dict):
    """RL from step state["step"] to config.steps: logged, evaluated and saved on the way."""
    config = run.config
    if state["step"] == 0:
        save(run.folder / "cold_start.pt", state | {"model": run.model.state_dict()})
    learner = new_learner(run, state)
    queries = Queries(run.task, config.queries == "adaptive", state["success_rates"])
    saved_step = save_checkpoint(run, learner, state)
    measures = list(state["evaluation"]["measures"])
    log = report.Log(run.folder, state["step"], config.n_layer, measures)
    start = state["step"]
    if start == 0:
        log.write_evaluation(0, state["first_evaluation"])
    seconds_before = state["seconds_rl"]
    began = time.time()
    interrupted = catch_interrupt()
    for step in range(start + 1, config.steps + 1):
        if (step - start) % 25 == 1:
            print(report.HEADER)
        try:
            row, updates = rl_step(run, learner, queries, step)
            count_skipped(state, updates)
        except (FloatingPointError, ValueError) as error:       # the latter: a reward of NaN
            sys.exit(f"train.py: RL step {step}: {error}; {run.folder}/checkpoint.pt has the model "
                     f"as it was after step {saved_step}")
        if step % config.eval_every == 0 or step == config.steps:
            state["evaluation"], sampled = evaluate(run)
            row["accuracy"] = state["evaluation"]["accuracy"]
            row["accuracy_greedy"] = state["evaluation"]["accuracy_greedy"]
            log.write_evaluation(step, state["evaluation"])
        state["step"] = step
        state["seconds_rl"] = seconds_before + time.time() - began
        state["responses"] += row["responses"]
        log.write(row, updates)
        left = (time.time() - began) / (step - start) * (config.steps - step)
        report.print_row(row, state["evaluation"]["accuracy"], left)
        if "accuracy" in row:
            report.show(state["evaluation"], sampled, run.folder / "samples.txt", f"RL step {step}")
        stop = any(gspo.gather([bool(interrupted)], torch.device("cpu")))
        if step % config.save_every == 0 or step == config.steps or stop:
            saved_step = save_checkpoint(run, learner, state)
        if stop and step < config.steps:
            print(f"stopped; to go on: python train.py --resume --out {run.folder}")
            sys.exit(130)
    stop_catching()


def count_skipped(state: dict, updates: list[dict]):
    """FloatingPointError if float16 has skipped 20 optimiser steps running."""
    for update in updates:
        state["skipped"] = state.get("skipped", 0) + 1 if update["skipped"] else 0
        if state["skipped"] == 20:
            raise FloatingPointError("20 optimiser steps running had a gradient that is not finite "
                                     "in float16; --dtype bfloat16 has a wider range")


def catch_interrupt() -> list:
    """A list that is empty until Ctrl-C is pressed, or SIGTERM comes. The first one waits for the
    end of the step, a second one does not."""
    interrupted = []

    def handle(number, frame):
        interrupted.append(number)
        if gspo.team()[1] == 1:         # torchrun may pass on what a process has had already
            stop_catching()
    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return interrupted


def stop_catching():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------- what a run leaves

RUN_FILES = {"config.json", "metrics.csv", "updates.csv", "evaluations.csv", "samples.txt",
             "summary.json", "cold_start.pt", "checkpoint.pt", "curves.png", "lock"}


def save(path: Path, content: dict):
    """Tensors and plain data, atomically; see report.write."""
    buffer = io.BytesIO()           # torch.save into a full disk would leave half a file
    torch.save(content, buffer)
    report.write(path, buffer.getvalue())


def lock(folder: Path) -> ContextManager:
    """Use it as `with lock(folder):`, which keeps other runs out. A process that is killed lets go
    of the folder. One line and exit code 2 if another run has it. (Windows has no flock: there
    nothing is locked.)"""
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()
    file = open(folder / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is using {folder}; name another folder with --out")
    return file


def load(path: Path, remedy: str) -> dict:
    """What `save` wrote: tensors and plain data, never code. One line and exit code 2, with the
    remedy, if it cannot be read."""
    if not path.exists():
        fail(f"there is no {path}; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["model"].items()        # whatever is saved here has weights
    except Exception as error:          # whatever a damaged file leads to
        fail(f"{path} cannot be read ({type(error).__name__}); {remedy}")
    if content.get("layout") != LAYOUT:
        fail(f"{path} has layout {content.get('layout', 0)}, of an older or newer version of this "
             f"program, which reads {LAYOUT}; {remedy}")
    return content


def save_checkpoint(run: Run, learner: Learner, state: dict) -> int:
    """Bring the state up to date and save it -> its step."""
    state["model"] = run.model.state_dict()
    state["optimizer"] = learner.optimizer.state_dict()
    state["old_weights"] = learner.old_weights
    state["scaler"] = learner.scaler.state_dict()
    if learner.head:
        state["head"] = learner.head.state_dict()
    save(run.folder / "checkpoint.pt", state)
    return state["step"]


def last_run() -> Path:
    runs = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run in out/ yet; begin with: python train.py")
    return runs[-1].parent


def is_ours(path: Path) -> bool:
    """True for a file that a run writes, or a part of one that a killed run has left."""
    return re.sub(r"\.\d+\.part$", "", path.name) in RUN_FILES


def is_free(folder: Path) -> bool:
    """True if a new run may use the folder: it does not exist, or has only files of a run that was
    killed before its first checkpoint."""
    if not folder.exists():
        return True
    return all(map(is_ours, folder.iterdir())) and not (folder / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------- the whole job

def begin(run: Run, fresh: bool) -> dict:
    """Stages 1 and 2 -> the state of a new run: what a checkpoint holds, but for the model, the
    optimizer and the critic's head, which save_checkpoint adds."""
    for path in run.folder.iterdir():   # of a run that was killed before its first checkpoint
        if is_ours(path) and path.name != "lock":
            path.unlink()
    seconds = cold_start(run, fresh)
    began = time.time()
    print("2 evaluate: what imitation has reached")
    evaluation, sampled = evaluate(run)
    report.show(evaluation, sampled, run.folder / "samples.txt", "after the cold start")
    rng = random.Random("the teacher")
    problems = tasks.held_out_problems(run.task) * 10
    teacher = report.mean(run.task.reward(problem, run.task.demonstrate(problem, rng))
                          for problem in problems)
    options = dataclasses.asdict(run.config) | task_options(run.task)
    return {"layout": LAYOUT, "options": options, "step": 0, "responses": 0, "success_rates": {},
            "seconds_rl": 0.0,
            "seconds_cold_start": seconds, "seconds_before_rl": seconds + time.time() - began,
            "accuracy_teacher": teacher, "first_evaluation": evaluation, "evaluation": evaluation}


def finish(run: Run, state: dict):
    """Stage 4: summary.json, curves.png and a few words."""
    cold = state["first_evaluation"]
    last = state["evaluation"]
    summary = {
        "accuracy_teacher": state["accuracy_teacher"], "accuracy_cold_start": cold["accuracy"],
        "accuracy": last["accuracy"], "accuracy_greedy": last["accuracy_greedy"],
        "think_share_cold_start": cold["think_share"], "think_share": last["think_share"],
        "length_cold_start": cold["length"], "length": last["length"],
        "seconds_cold_start": state["seconds_cold_start"], "seconds_rl": state["seconds_rl"],
        "seconds": state["seconds_before_rl"] + state["seconds_rl"],
        "peak_memory_mib": report.peak_memory_mib(), "steps": state["step"],
        "responses": state["responses"],
        "measures_cold_start": cold["measures"], "measures": last["measures"]}
    report.write(run.folder / "summary.json", json.dumps(summary, indent=2).encode())
    print("4 report", *report.summary_lines(summary, run.config.algorithm), sep="\n  ")
    try:
        print(f"  The curves are in {report.curves(run.folder)}.")
    except ImportError:
        print("  No curves.png: matplotlib is not installed.")


def ask(run: Run, prompt: str):
    """Print the model's greedy answer to a prompt."""
    ids = run.tokenizer.encode(prompt)
    if not 0 < len(ids) <= MAX_PROMPT:
        example = run.task.sample(random.Random(0)).prompt
        raise ValueError(f"argument --ask: a prompt has 1 to {MAX_PROMPT} tokens, this one has "
                         f"{len(ids)}; ask something like {example}")
    rollout = moe.generate(run.model, [ids], 1, run.config.max_new_tokens, 0.0,
                           run.tokenizer.eos_id, run.tokenizer.pad_id)
    response = rollout.response[0].tolist()
    cut = response[-1] != run.tokenizer.eos_id
    text = run.tokenizer.decode(response if cut else response[:-1])
    print(report.answer(prompt, text, cut))


def inspect_update(run: Run, state: dict):
    """Sample groups that have a signal, make all optimiser steps on them but the last (with one:
    that one), in memory, and show the responses of the last one: what they are to the model that
    has moved since it sampled them."""
    print("Look at the two ratios: GRPO's jumps from token to token, GSPO's is one for the whole "
          "response.")
    config = run.config
    learner = new_learner(run, state)
    queries = Queries(run.task, config.queries == "adaptive", state["success_rates"])
    rng = random.Random(f"{config.seed} rl {state['step'] + 1}")
    samples = sample_until_signal(run, sampling_model(run, learner), queries, rng)
    rewards = samples.rewards.to(samples.rollout.logp.device)
    experience, _ = gspo.prepare(run.model, samples.rollout, rewards, config.settings(),
                                 learner.reference, learner.head)
    n_steps = config.mini_batches * config.epochs
    steps = max(1, n_steps - 1)
    gspo.update(run.model, learner.optimizer, experience, config.settings(), first=steps,
                scaler=learner.scaler)
    when = f"after RL step {state['step']}" if state["step"] else "after the cold start"
    title = (f"{run.folder}, {config.algorithm}: the model as it was {when} has sampled "
             f"{config.prompts} groups and made {steps} of {n_steps} optimiser steps.")
    all_rows = torch.arange(len(experience.advantages)).view(config.prompts, -1)
    last_rows = all_rows.tensor_split(config.mini_batches)[-1].flatten()
    report.show_update(title, run, experience, rewards.flatten(), last_rows)


def train(run: Run, state: dict | None, fresh: bool):
    """The whole job, or what is left of it."""
    if state is None:
        state = begin(run, fresh)
    state["options"] = dataclasses.asdict(run.config) | task_options(run.task)
    report.write(run.folder / "config.json", json.dumps(state["options"], indent=2).encode())
    print(f"3 RL: {run.config.algorithm}, steps {state['step'] + 1} to {run.config.steps}, "
          f"in {run.folder}")
    rl(run, state)
    finish(run, state)


# ---------------------------------------------------------------------------- the command line

OPTION_GROUPS = (RunOptions, ModelOptions, ColdStartOptions, RLOptions, RelativesOptions)
# The options that may differ with --resume. Other threads or another device round otherwise.
MAY_CHANGE = ("steps", "eval_every", "save_every", "device", "threads", "out")


def task_options(task) -> dict:
    """The fields of a task that is a dataclass: they are options too."""
    return dataclasses.asdict(task) if dataclasses.is_dataclass(task) else {}


def parse(argv: list[str] | None) -> tuple[Config, object, dict, dict | None]:
    """The command line -> config, task, what to do, and the state of the run to go on with, which
    is None for a new run. ValueError for what cannot be done."""
    task_parser = Parser(add_help=False)
    task_parser.add_argument("--task", default=RunOptions.task)
    task_name = task_parser.parse_known_args(argv)[0].task
    Task = tasks.task_class(task_name)              # its fields are options too
    groups = {group.__doc__: group for group in OPTION_GROUPS}
    groups[f"the task {Task.__module__}"] = Task
    task_defaults = tasks.defaults(Task, Config)
    parser = parser_for(__doc__, groups, task_defaults)
    given = vars(parser.parse_args(argv))           # a flag not given is not there
    todo = {name: given.pop(name) for name in ("ask", "inspect", "eval_only", "resume", "fresh")}
    state = None
    if todo["ask"] is not None or todo["inspect"] or todo["eval_only"] or todo["resume"]:
        folder = Path(given.get("out") or last_run())
        name = "cold_start.pt" if todo["inspect"] == "cold_start" else "checkpoint.pt"
        state = load(folder / name, "name another run with --out, or start a new one")
        for key, value in given.items():
            if key not in MAY_CHANGE and value != state["options"].get(key):
                raise ValueError(f"argument --{key}: this run has {state['options'].get(key)}, "
                                 "which only a new run can change")
        given = state["options"] | given | {"out": str(folder)}
        Task = tasks.task_class(given["task"])
    else:
        given = task_defaults | given
    own = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in given.items() if name in own})
    task = Task(**{name: value for name, value in given.items() if name not in own})
    if config.out is None:
        config.out = next(f"out/run-{i}" for i in itertools.count(1)
                          if is_free(Path(f"out/run-{i}")))
    if state is None and not is_free(Path(config.out)):
        raise ValueError(f"argument --out: {config.out} is not empty; --resume it or name another")
    made = state["step"] if state else 0
    if todo["resume"] and (config.steps < made or config.steps == made and reported(config, made)):
        raise ValueError(f"argument --steps: {config.out} has made {state['step']} steps already; "
                         "ask for more")
    return config, task, todo, state


def reported(config: Config, step: int) -> bool:
    """True if the run has its report after so many steps. A run that was killed at its very end has
    the last checkpoint, but no report yet."""
    path = Path(config.out) / "summary.json"
    return path.exists() and json.loads(path.read_text()).get("steps") == step


def build(config: Config, task, state: dict | None = None) -> Run:
    """The tokenizer and the model, with the weights of `state` if there is one."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.cuda.is_available():
        devices.append("cuda")
    device = devices[-1] if config.device == "auto" else config.device
    if device not in devices:
        raise ValueError(f"argument --device: there is no {device} here; choose from "
                         f"{', '.join(devices)}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))     # torchrun: a GPU for each
    tokenizer = Tokenizer(tasks.vocabulary(config.task))
    demonstrations.check(task, tokenizer, MAX_PROMPT, config.max_new_tokens)
    for name in tasks.measure(task, task.sample(random.Random(0)), "", True):
        if name in report.COLUMNS:
            raise ValueError(f"the task measures {name!r}, a column that metrics.csv has already; "
                             "choose another name")
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelOptions)}
    model = moe.MoETransformer(moe.MoEConfig(
        len(tokenizer.tokens), max_length=MAX_PROMPT + config.max_new_tokens, **sizes)).to(device)
    if state:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError:
            raise ValueError(f"the model in {config.out} has other sizes than its options say; "
                             "name another run with --out") from None
    return Run(config, task, tokenizer, model, Path(config.out or ""))


def join_team(run: Run) -> Run:
    """Under torchrun, meet the other processes. Process 0 prints and leaves files; the others do
    all that it does, but print nothing and write to a temporary folder. ValueError for too many."""
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes == 1:
        return run
    n_groups = min(run.config.prompts, len(tasks.held_out_problems(run.task)))
    if n_processes > n_groups:
        raise ValueError(f"{n_processes} processes are too many for {n_groups} groups; raise "
                         "--prompts")
    on_gpu = run.model.embed.weight.device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if dist.get_rank() == 0:
        return run
    sys.stdout = open(os.devnull, "w")
    sys.stderr = sys.stdout
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return run._replace(folder=Path(folder))


def main(argv: list[str] | None = None):
    try:
        config, task, todo, state = parse(argv)
        run = join_team(build(config, task, state))
        if todo["ask"] is not None:
            return ask(run, todo["ask"])
        run.folder.mkdir(parents=True, exist_ok=True)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:        # what the options or files lead to
        fail(error)
    if todo["eval_only"]:
        return report.show(*evaluate(run))
    if todo["inspect"]:
        return inspect_update(run, state)
    try:
        with lock(run.folder):
            train(run, state, todo["fresh"])
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, if this run has one yet")
        sys.exit(130)
    except RuntimeError as error:
        if not (dist.is_initialized() and "onnection" in str(error)):
            raise
        sys.exit(f"train.py: another process is gone ({str(error).splitlines()[0]}); --resume goes "
                 "on from the last checkpoint, if this run has one yet")
    except OSError as error:                # a full disk, a folder that is gone
        if isinstance(error, BrokenPipeError):
            raise
        sys.exit(f"train.py: {error}; once that is mended, --resume goes on from the last "
                 "checkpoint, if this run has one yet")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:         # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
