"""Teach a tiny Mixture-of-Experts transformer arithmetic: imitation first, then RL with GSPO.

    python train.py                        the whole job, from random weights, in minutes on a CPU
    python train.py --algorithm grpo       another objective, from the same cold start
    python train.py --ask "47*8="          ask the model of the last run
    python train.py --inspect              see what an update does to it, token by token
    python train.py --resume               go on after Ctrl-C, to the very same numbers
    python train.py --help                 every option, and why it has its default

    1  cold start   imitate a teacher who thinks now and then, slips and guesses    cold_start
    2  evaluate     on held-out problems                                            evaluate
    3  RL           sample, reward, advantages, update; again                       rl
    4  report       what happened, in words, numbers and curves                     report

All chance comes from (seed, stage, step). So a checkpoint needs only the weights, the optimiser and
the number of the step to go on exactly as if nothing had happened.
"""
import copy
import dataclasses
import hashlib
import inspect
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

import gspo
import moe
from data import demonstrations
from data.options import fail, option, parse
from data.responses import explore, held_out_problems, respond
from data.tokenizer import Tokenizer
from results import inspection, report


@dataclasses.dataclass
class Config:
    """Every field is a flag; what it says is its help."""
    task: str = option("arithmetic", "module in data/ that holds the class Task")
    seed: int = option(0, "same seed and threads, same run", 0)
    # The model: a third of a million parameters learn this task in minutes on two cores.
    n_layer: int = option(3, "layers", 1, 4096)
    d_model: int = option(64, "width between the layers", 2, 4096)
    n_head: int = option(4, "query heads", 1)
    n_kv_head: int = option(2, "key/value heads, each for n_head / n_kv_head query heads", 1)
    n_expert: int = option(8, "experts in a layer", 1)
    n_active: int = option(2, "experts that a token uses", 1)
    d_expert: int = option(64, "inner width of an expert", 1, 4096)
    # Cold start.
    cold_steps: int = option(4500, "steps of imitation: until the thinking is mostly right", 1)
    cold_lr: float = option(6e-3, "peak learning rate; so small a model bears a high one", 0, 1)
    cold_tokens: int = option(2560, "tokens in a batch, padding included", 64)
    balance: float = option(0.01, "weight of the loss that keeps all experts in use", 0, 10)
    # RL.
    algorithm: str = option("gspo", "the objective", choices=tuple(gspo.ALGORITHMS))
    steps: int = option(500, "RL steps; later ones find few groups with a signal", 0)
    prompts: int = option(32, "problems in a step", 1)
    group_size: int = option(8, "responses to a problem: each other's baseline", 2)
    mini_batches: int = option(4, "optimiser steps per rollout, as in the paper", 1)
    lr: float = option(3e-4, "learning rate: gentle, the policy must stay near the sampler's", 0, 1)
    clip_low: float = option(None, "lower clip range (default: see README; gspo 3e-3)", 0, 1)
    clip_high: float = option(None, "upper clip range (default: see README; gspo 4e-3)", 0, 100)
    scale: str = option(None, "divide advantages by their group's std? (default: as in its paper)",
                        choices=("std", "none"))
    routing_replay: str = option("none", "update with the experts that were active under the old "
                                 "weights: r2, in a pass of the trainer; r3, in the sampler",
                                 choices=("none", "r2", "r3"))
    kl_coef: float = option(0.0, "weight of the KL to the cold start's policy, off in GSPO", 0, 99)
    gamma: float = option(1.0, "ppo: a reward a token later is worth this much", 0, 1)
    gae_lambda: float = option(0.95, "ppo: 1 trusts rewards, 0 the critic", 0, 1)
    dynamic_sampling: bool = option(False, "sample until every group has a signal (DAPO)")
    sampling_rounds: int = option(10, "with --dynamic_sampling: at most so often", 1, 1000)
    overlong: int = option(0, "so many tokens before --max_new_tokens the reward begins to fall, "
                           "to 1 less at the end (DAPO); 0: it does not", 0, 1000)
    temperature: float = option(1.0, "of sampling and of scoring: the policy as it is", 0.01, 100)
    max_new_tokens: int = option(64, "a response without an end by then is worth 0", 1, 1000)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this", 1e-6)
    sampler: str = option("float32", "precision to sample in", choices=("float32", "bfloat16"))
    recompute_logp_old: bool = option(False, "score again, do not trust the sampler's log-probs")
    correction: str = option("none", "score again and weigh tokens by how far off the sampler was",
                             choices=("none", "tis", "icepop"))
    # The run.
    eval_every: int = option(100, "RL steps from one held-out evaluation to the next", 1)
    save_every: int = option(50, "RL steps from one checkpoint to the next", 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; what we measured with", 1, 1024)
    out: str = option(None, "folder of the run (default: the first free out/run-N)")


    def __post_init__(self):
        """Fill in what depends on the algorithm."""
        term, _, clip, scale = gspo.ALGORITHMS[self.algorithm]
        # The paper's 3e-4 and 4e-4 belong to responses of thousands of tokens. In one of 30 tokens
        # a single one moves the mean log-ratio far more: ten times the range learned faster on all
        # of five seeds.
        clip = (3e-3, 4e-3) if self.algorithm in ("gspo", "gspo_token") else clip
        for name, default in (("clip_low", clip[0]), ("clip_high", clip[1]), ("scale", scale)):
            if default is None and getattr(self, name) is not None:
                raise ValueError(f"argument --{name}: {self.algorithm} has no such thing")
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.correction != "none" and term in gspo.PER_RESPONSE:
            raise ValueError(f"argument --correction: it weighs tokens, {self.algorithm} whole "
                             "responses; gspo_token can have it")
        if self.overlong > self.max_new_tokens:
            raise ValueError("argument --overlong: at most --max_new_tokens")


MAX_PROMPT = 64     # tokens


# ---------------------------------------------------------------------------- 1 the cold start

def cold_start(config, task, tokenizer, model, fresh):
    """Imitate the teacher, from random weights. Kept in out/ for later runs; gives the seconds."""
    device = model.embed.weight.device
    relevant = {name: value for name, value in dataclasses.asdict(config).items()
                if name.startswith(("cold_", "n_", "d_")) or
                name in ("task", "seed", "balance", "threads", "max_new_tokens", "max_grad_norm")}
    sources = [inspect.getsource(x) for x in (moe, demonstrations, inspect.getmodule(type(task)),
                                              cold_start)]
    made_of = repr((relevant, task, sources, tokenizer.tokens, torch.__version__, device.type))
    path = Path("out") / f"cold-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.pt"
    if path.exists() and not fresh:
        kept = report.load(path, "--fresh makes it again")
        model.load_state_dict(kept["model"])
        print(f"1 cold start: taken from {path} (--fresh makes it again)")
        return kept["seconds"]

    print(f"1 cold start: {config.cold_steps} steps of imitation")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    began = time.time()
    batches = demonstrations.batches(task, tokenizer, config.seed, config.cold_tokens)
    for step in range(1, config.cold_steps + 1):
        for group in optimizer.param_groups:        # 50 steps up, then down to 0
            group["lr"] = config.cold_lr * min(step / 50, 1 - (step - 1) / config.cold_steps)
        tokens, keep, target = demonstrations.collate(next(batches), device)
        out = model(tokens, keep=keep)                                      # logits (M, V)
        total = F.cross_entropy(out.logits, target, reduction="sum")        # nats
        # Over a constant, not over M: a token weighs the same in every batch.
        loss = total / config.cold_tokens
        optimizer.zero_grad()
        (loss + config.balance * moe.balance_loss(out)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not torch.isfinite(loss + norm):
            sys.exit(f"train.py: cold start step {step}: loss {loss.item()}, gradient norm "
                     f"{norm.item()}; there is no checkpoint yet. A lower --cold_lr may help.")
        optimizer.step()
        if step % 100 == 0 or step == config.cold_steps:
            left = (time.time() - began) / step * (config.cold_steps - step)
            print(f"  step {step:5}   loss {total / len(target):.3f} nats a token   "
                  f"{report.clock(left)} left", flush=True)
    seconds = time.time() - began
    report.save(path, {"model": model.state_dict(), "seconds": seconds})
    return seconds


# ---------------------------------------------------------------------------- 2 the evaluation

def evaluate(config, task, tokenizer, model):
    """On held-out problems, 4 sampled responses and the greedy one each -> numbers, the sampled."""
    problems = held_out_problems(task)
    _, greedy = respond(config, task, tokenizer, model, problems, 1)
    _, sampled = respond(config, task, tokenizer, model, problems, 4,
                         torch.Generator().manual_seed(config.seed))
    return report.evaluation(sampled, greedy), sampled


# ---------------------------------------------------------------------------- 3 RL

class Learner(NamedTuple):
    """What RL moves, and what it may need beside."""
    model: moe.MoETransformer
    optimizer: torch.optim.Optimizer
    head: torch.nn.Module | None                # ppo: the critic's
    reference: moe.MoETransformer | None        # with --kl_coef: the model after the cold start


def new_learner(config, model, state):
    """A Learner that goes on from `state`."""
    head = reference = None
    if config.algorithm == "ppo":
        head = torch.nn.Linear(config.d_model, 1).to(model.embed.weight.device)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        head.load_state_dict(state.get("head", head.state_dict()))
    if config.kl_coef:
        reference = copy.deepcopy(model)
        reference.load_state_dict(state.setdefault("reference", copy.deepcopy(model.state_dict())))
    optimizer = torch.optim.AdamW([*model.parameters(), *(head.parameters() if head else ())],
                                  lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    return Learner(model, optimizer, head, reference)


def prepare(config, learner, rollout, rewards):
    """Everything that gspo.update wants to know of a rollout -> the rollout (scored again where an
    option asks for it), advantages, further arguments, metrics."""
    sampled, replay, extra, began = rollout.logp, config.routing_replay, {}, time.time()
    corrected, logp_ref, critic = config.correction != "none", None, None
    if config.recompute_logp_old or corrected or replay == "r2" or learner.head:
        rollout, values = gspo.rescore(learner.model, rollout, config.temperature,
                                       replay=replay == "r3", head=learner.head)
        extra["seconds_rescoring"] = time.time() - began
    mean_weight = gspo.seq_mean_token_mean(rollout.lengths, None)                       # (B,)
    if learner.reference:
        logp_ref = gspo.rescore(learner.reference, rollout, config.temperature)[0].logp
        extra["kl_ref"] = gspo.kl_loss(rollout.logp, logp_ref, rollout.mask, mean_weight).item()
    rewards = rewards.to(rollout.logp.device)                                           # (P, G)
    if learner.head:
        advantages, critic = gspo.ppo_advantages(rollout, learner.head, values, rewards.flatten(),
                                                 config.gamma, config.gae_lambda)       # (B, T)
        extra["value_error"] = (critic.returns - values)[rollout.mask].square().mean().item()
    else:
        advantages = gspo.group_advantages(rewards, config.scale).flatten()             # (B,)
    if corrected:
        advantages = advantages.view(len(sampled), -1) * gspo.mismatch_weights(
            config.correction, rollout.logp, sampled)                                   # (B, T)
    return rollout, advantages, dict(
        algorithm=config.algorithm, clip_low=config.clip_low, clip_high=config.clip_high,
        mini_batches=config.mini_batches, temperature=config.temperature,
        max_grad_norm=config.max_grad_norm, max_length=config.max_new_tokens,
        replay=replay != "none", kl_coef=config.kl_coef, logp_ref=logp_ref, critic=critic), extra


def rl_step(config, task, tokenizer, learner, step):
    """One step of RL -> the row of metrics.csv, the rows of updates.csv."""
    began = time.time()
    # 1 sample G responses to each of P problems, 2 reward them
    rollout, rewards, responses = explore(config, task, tokenizer, learner.model, step)
    # 3 advantages: how good is a response beside its siblings?
    rollout, advantages, options, extra = prepare(config, learner, rollout, rewards)
    # 4 ratio, 5 clip and 6 update: `mini_batches` times, each with its own groups
    updates = gspo.update(learner.model, learner.optimizer, rollout, advantages, **options)
    seconds = time.time() - began
    if step == 1 and options["replay"]:
        print(f"  routing replay {config.routing_replay}: a pass that records the experts took "
              f"{extra.get('seconds_rescoring', 0):.3f} of {seconds:.3f} s; the record has "
              f"{rollout.routes.nbytes / 1024:.0f} KiB")
    return report.response_stats(responses) | report.means(updates) | extra | {
        "step": step, "seconds": seconds,
        "no_signal": (rewards.amax(dim=1) == rewards.amin(dim=1)).float().mean().item(),
        "tokens_per_second": sum(response.length for response in responses) / seconds}, updates


def rl(config, task, tokenizer, model, state, folder):
    """RL from step state["step"] to config.steps: logged, evaluated and saved on the way."""
    learner = new_learner(config, model, state)
    first, began, seconds_before = state["step"], time.time(), state["seconds_rl"]
    log, interrupted = report.Log(folder, first, config.n_layer), []

    def checkpoint():
        state.update(model=model.state_dict(), optimizer=learner.optimizer.state_dict())
        if learner.head:
            state["head"] = learner.head.state_dict()
        report.save(folder / "checkpoint.pt", state)
        return state["step"]

    saved = checkpoint()
    # The first Ctrl-C waits for the end of the step, a second one does not.
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(
        signal.signal(signal.SIGINT, signal.default_int_handler)))
    for step in range(first + 1, config.steps + 1):
        if (step - first) % 25 == 1:
            print(report.HEADER)
        try:
            row, updates = rl_step(config, task, tokenizer, learner, step)
        except FloatingPointError as error:
            sys.exit(f"train.py: RL step {step}: {error}; {folder}/checkpoint.pt has the model as "
                     f"it was after step {saved}. A lower --lr may help.")
        if step % config.eval_every == 0 or step == config.steps:
            state["evaluation"], sampled = evaluate(config, task, tokenizer, model)
            row |= {name: state["evaluation"][name] for name in ("accuracy", "accuracy_greedy")}
        state["step"], state["seconds_rl"] = step, seconds_before + time.time() - began
        state["responses"] += row["responses"]
        log.write(row, updates)
        left = (time.time() - began) / (step - first) * (config.steps - step)
        report.print_row(row, state["evaluation"]["accuracy"], left)
        if "accuracy" in row:
            report.show(state["evaluation"], sampled, folder / "samples.txt", f"RL step {step}")
        if step % config.save_every == 0 or step == config.steps or interrupted:
            saved = checkpoint()
        if interrupted and step < config.steps:
            print(f"stopped; to go on: python train.py --resume --out {folder}")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def inspect_update(config, task, tokenizer, model, state):
    """Make all but the last optimiser step of the next RL step, in memory, and show that one's
    responses: what they are to the model that has moved since it sampled them."""
    learner, n = new_learner(config, model, state), config.mini_batches
    signal_only = dataclasses.replace(config, dynamic_sampling=True)
    sampled, rewards, _ = explore(signal_only, task, tokenizer, model, state["step"] + 1)
    rollout, advantages, options, _ = prepare(config, learner, sampled, rewards)
    gspo.update(model, learner.optimizer, rollout, advantages, **options, steps=max(1, n - 1))
    groups = torch.arange(config.prompts).tensor_split(n)[-1].tolist()
    rows = [g * config.group_size + i for g in groups for i in range(config.group_size)]
    print(f"{config.out}, {config.algorithm}, RL step {state['step'] + 1}, in memory: "
          f"{max(1, n - 1)} of {n} optimiser steps are made.")
    like = {"gspo": ("gspo", "gspo_token"), "grpo": ("grpo", "ppo", "dr_grpo", "dapo")}
    ranges = {name: (c.clip_low, c.clip_high) for name, family in like.items()
              for c in [config if config.algorithm in family else Config(algorithm=name)]}
    inspection.show(config, tokenizer, model, rollout, rewards, advantages, rows, ranges)


# ---------------------------------------------------------------------------- the whole job

def begin(config, task, tokenizer, model, fresh):
    """Stages 1 and 2 -> the state of a new run, which is what a checkpoint holds."""
    seconds, began = cold_start(config, task, tokenizer, model, fresh), time.time()
    print("2 evaluate: what imitation has reached")
    evaluation, scored = evaluate(config, task, tokenizer, model)
    report.show(evaluation, scored, Path(config.out) / "samples.txt", "after the cold start")
    rng = random.Random("the teacher")
    teacher = report.mean(task.reward(problem, task.demonstrate(problem, rng))
                          for problem in held_out_problems(task) for _ in range(10))
    return {"step": 0, "responses": 0, "seconds_rl": 0.0, "seconds_cold_start": seconds,
            "seconds_before_rl": seconds + time.time() - began, "accuracy_teacher": teacher,
            "cold_start": evaluation, "evaluation": evaluation}


def build(config, task, state):
    """The tokenizer and the model, which takes up the weights of `state` if there is one."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    devices = ["cpu"] + ["mps"] * torch.backends.mps.is_available() + \
        ["cuda"] * torch.cuda.is_available()
    device = devices[-1] if config.device == "auto" else config.device
    if device not in devices:
        fail(f"argument --device: there is no {device} here; choose from {', '.join(devices)}")
    tokenizer = Tokenizer()
    demonstrations.check(task, tokenizer, MAX_PROMPT, config.max_new_tokens)
    sizes = {name: getattr(config, name) for name in vars(config) if name.startswith(("n_", "d_"))}
    model = moe.MoETransformer(moe.MoEConfig(
        tokenizer.size, max_length=MAX_PROMPT + config.max_new_tokens, **sizes)).to(device)
    if state:
        model.load_state_dict(state["model"])
    return tokenizer, model


def run(config, task, todo, state, tokenizer, model):
    """The whole job, or what is left of it."""
    folder = Path(config.out)
    state = state or begin(config, task, tokenizer, model, todo["fresh"])
    state["options"] = dataclasses.asdict(config) | dataclasses.asdict(task)
    (folder / "config.json").write_text(json.dumps(state["options"], indent=2) + "\n")
    print(f"3 RL: {config.algorithm}, steps {state['step'] + 1} to {config.steps}, in {folder}")
    rl(config, task, tokenizer, model, state, folder)
    report.finish(config, state, folder)


def main(argv=None):
    try:
        config, task, todo, state = parse(argv, Config, __doc__)
        tokenizer, model = build(config, task, state)
        if todo["ask"] is not None:
            rollout = moe.generate(model, [tokenizer.encode(todo["ask"])], 1, config.max_new_tokens,
                                   eos_id=tokenizer.end, pad_id=tokenizer.pad, greedy=True)
            return print(todo["ask"] + tokenizer.decode(rollout.tokens[0].tolist()))
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, RuntimeError, TypeError) as error:     # nothing has begun yet
        fail(" ".join(f"{error}".split()))
    if todo["eval_only"]:
        return report.show(*evaluate(config, task, tokenizer, model))
    if todo["inspect"]:
        return inspect_update(config, task, tokenizer, model, state)
    try:
        run(config, task, todo, state, tokenizer, model)
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, if this run has one yet")
        sys.exit(130)


if __name__ == "__main__":
    main()
