"""Teach a tiny Mixture-of-Experts transformer arithmetic: imitation first, then RL with GSPO.

    python train.py                        the whole job, from random weights, in minutes on a CPU
    python train.py --algorithm grpo       another objective, from the same cold start
    python train.py --ask "47*8="          ask the model of the last run
    python train.py --resume               go on after Ctrl-C, to the very same numbers
    python train.py --help                 every option, and why it has its default

    1  cold start   imitate a teacher who thinks now and then, slips and guesses    cold_start
    2  evaluate     on held-out problems                                            evaluate
    3  RL           sample, reward, advantages, update; again                       reinforce
    4  report       what happened, in words, numbers and curves                     report

All chance comes from (seed, stage, step). So a checkpoint needs only the weights, the optimiser and
the number of the step to go on exactly as if nothing had happened.
"""
import argparse
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import gspo
import moe
from data import demonstrations
from data.options import Parser, fail, option
from data.tokenizer import Tokenizer
from results import report


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
    algorithm: str = option("gspo", "the objective", choices=tuple(gspo.CLIP))
    steps: int = option(500, "RL steps; later ones find few groups with a signal", 0)
    prompts: int = option(32, "problems in a step", 1)
    group_size: int = option(8, "responses to a problem: each other's baseline", 2)
    mini_batches: int = option(4, "optimiser steps per rollout, as in the paper", 1)
    lr: float = option(3e-4, "learning rate: gentle, the policy must stay near the sampler's", 0, 1)
    clip_low: float = option(None, "lower clip range; gspo 3e-3 (see README), grpo 0.2", 0, 1)
    clip_high: float = option(None, "upper clip range; gspo 4e-3, grpo 0.27", 0, 100)
    scale: str = option("std", "divide advantages by their group's std?", choices=("std", "none"))
    temperature: float = option(1.0, "of sampling and of scoring: the policy as it is", 0.01, 100)
    max_new_tokens: int = option(64, "a response without an end by then is worth 0", 1, 1000)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this", 1e-6)
    recompute_logp_old: bool = option(False, "score again, do not trust the sampler's log-probs")
    # The run.
    eval_every: int = option(100, "RL steps from one held-out evaluation to the next", 1)
    save_every: int = option(50, "RL steps from one checkpoint to the next", 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; what we measured with", 1, 1024)
    out: str = option(None, "folder of the run (default: the first free out/run-N)")


# The paper's 3e-4 and 4e-4 belong to responses of thousands of tokens. In one of 30 tokens a single
# token moves the mean log-ratio far more: ten times the range learned faster on all of five seeds.
CLIP = gspo.CLIP | {"gspo": (3e-3, 4e-3), "gspo_token": (3e-3, 4e-3)}
MAX_PROMPT = 64     # tokens
MAY_CHANGE = ("steps", "eval_every", "save_every", "device", "threads", "out")      # on --resume


# ---------------------------------------------------------------------------- the command line

def task_class(name):
    exists = name.isidentifier() and (Path(__file__).parent / "data" / f"{name}.py").exists()
    Task = getattr(importlib.import_module(f"data.{name}"), "Task", None) if exists else None
    return Task or fail(f"argument --task: {name!r} is none; write data/NAME.py with a class Task")


def parse(argv):
    """The command line -> config, task, what to do, and the state of the run to go on with."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=Config.task)
    Task = task_class(first.parse_known_args(argv)[0].task)     # the task has options of its own
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = parser.add_argument_group("with the last run in out/, or the one in --out")
    todo = todo.add_mutually_exclusive_group()
    todo.add_argument("--ask", metavar="PROMPT", help="let the model answer")
    todo.add_argument("--eval_only", action="store_true", help="evaluate the model")
    todo.add_argument("--resume", action="store_true", help="go on with RL")
    parser.add_argument("--fresh", action="store_true", help="make the cold start, cached or not")
    parser.add_fields("options of a run", dataclasses.fields(Config))
    parser.add_fields(f"options of the task {Task.__module__}", dataclasses.fields(Task))
    given = vars(parser.parse_args(argv))
    todo = {key: given.pop(key) for key in ("ask", "eval_only", "resume", "fresh")}
    state = None
    if todo["ask"] is not None or todo["eval_only"] or todo["resume"]:
        given["out"] = given.get("out") or report.last_run()
        state = report.load(Path(given["out"]) / "checkpoint.pt", "name another run with --out")
        for key, value in given.items():
            if key not in MAY_CHANGE and value != state["options"].get(key):
                fail(f"argument --{key}: this run has {state['options'].get(key)}, which only a "
                     "new run can change")
        given = state["options"] | given
        Task = task_class(given["task"])
    own = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{key: value for key, value in given.items() if key in own})
    task = Task(**{key: value for key, value in given.items() if key not in own})
    for name, default in zip(("clip_low", "clip_high"), CLIP[config.algorithm]):
        if getattr(config, name) is None:
            setattr(config, name, default)
    config.out = config.out or next(f"out/run-{i}" for i in itertools.count(1)
                                    if not Path(f"out/run-{i}").exists())
    if state is None and Path(config.out).exists() and any(Path(config.out).iterdir()):
        fail(f"argument --out: {config.out} is not empty; --resume it or name another folder")
    if todo["resume"] and config.steps <= state["step"]:
        fail(f"argument --steps: {config.out} has made {state['step']} already; ask for more")
    return config, task, todo, state


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
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
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
        (loss + config.balance * out.balance_loss).backward()
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

def respond(config, task, tokenizer, model, problems, n, generator=None):
    """Sample n responses to each problem, or the greedy one if there is no generator, and reward.

    Gives the rollout and, row by row, [(problem, text, reward), ...]: the text without `<end>`,
    None if the response was cut before it, which is worth 0."""
    rollout = moe.generate(model, [tokenizer.encode(problem.prompt) for problem in problems], n,
                           config.max_new_tokens, config.temperature, tokenizer.end, tokenizer.pad,
                           generator, greedy=generator is None)
    scored = []
    for i, length in enumerate(rollout.lengths.tolist()):
        problem, row = problems[i // n], rollout.tokens[i, :length].tolist()
        text = tokenizer.decode(row[:-1]) if row[-1] == tokenizer.end else None
        scored.append((problem, text, 0.0 if text is None else float(task.reward(problem, text))))
    return rollout, scored


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def thinks(text):
    return text is not None and text.startswith("<think>")


def test_problems(task):
    """The task's held-out set; if it has none, fresh problems from the training distribution."""
    return task.held_out() if hasattr(task, "held_out") else \
        [task.sample(random.Random(f"held out {i}")) for i in range(400)]


def evaluate(config, task, tokenizer, model):
    """On held-out problems, 4 sampled responses and the greedy one each -> numbers, the sampled."""
    problems = test_problems(task)
    _, greedy = respond(config, task, tokenizer, model, problems, 1)
    rollout, scored = respond(config, task, tokenizer, model, problems, 4,
                              torch.Generator().manual_seed(config.seed))
    kinds = {}
    for problem, _, reward in scored:
        kinds.setdefault(getattr(problem, "kind", "all"), []).append(reward)
    return {"accuracy": mean(reward for _, _, reward in scored),
            "accuracy_greedy": mean(reward for _, _, reward in greedy),
            "think_share": mean(thinks(text) for _, text, _ in scored),
            "accuracy_thinking": mean(reward for _, text, reward in scored if thinks(text)),
            "length": rollout.lengths.float().mean().item(),
            "kinds": {kind: mean(rewards) for kind, rewards in kinds.items()}}, scored


# ---------------------------------------------------------------------------- 3 RL

def rl_step(config, task, tokenizer, model, optimizer, step):
    """GSPO's six steps -> the row of metrics.csv."""
    began, rng = time.time(), random.Random(f"{config.seed} rl {step}")
    P, G = config.prompts, config.group_size
    # 1 sample G responses to each of P problems, 2 reward them
    problems = [task.sample(rng) for _ in range(P)]
    rollout, scored = respond(config, task, tokenizer, model, problems, G,
                              torch.Generator().manual_seed(rng.getrandbits(63)))
    rewards = torch.tensor([reward for _, _, reward in scored]).view(P, G)
    # 3 advantages: how good is a response beside its siblings?
    advantages = gspo.group_advantages(rewards.to(rollout.logp.device), config.scale)   # (P, G)
    # 4 ratio, 5 clip and 6 update: `mini_batches` times, each with its own groups
    logp_old = gspo.rescore(model, rollout, config.temperature) \
        if config.recompute_logp_old else rollout.logp
    parts = gspo.update(model, optimizer, rollout, advantages, config.algorithm, config.clip_low,
                        config.clip_high, config.mini_batches, config.temperature,
                        config.max_grad_norm, logp_old=logp_old)
    row = {name: mean(part[name] for part in parts) for name in (parts[0] if parts else ())}
    seconds = time.time() - began
    return row | {
        "step": step, "reward": rewards.mean().item(), "seconds": seconds,
        "think": mean(thinks(text) for _, text, _ in scored),
        "length": rollout.lengths.float().mean().item(),
        "truncated": mean(text is None for _, text, _ in scored),
        "no_signal": (advantages == 0).all(dim=1).float().mean().item(),
        "tokens_per_second": rollout.lengths.sum().item() / seconds}


def reinforce(config, task, tokenizer, model, state, folder):
    """RL from step state["step"] to config.steps: logged, evaluated and saved on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    first, began, seconds_before = state["step"], time.time(), state["seconds_rl"]
    metrics, interrupted = report.metrics_writer(folder / "metrics.csv", first), []

    def checkpoint():
        state.update(model=model.state_dict(), optimizer=optimizer.state_dict())
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
            row = rl_step(config, task, tokenizer, model, optimizer, step)
        except FloatingPointError as error:
            sys.exit(f"train.py: RL step {step}: {error}; {folder}/checkpoint.pt has the model as "
                     f"it was after step {saved}. A lower --lr may help.")
        if step % config.eval_every == 0 or step == config.steps:
            state["evaluation"], scored = evaluate(config, task, tokenizer, model)
            row |= {name: state["evaluation"][name] for name in ("accuracy", "accuracy_greedy")}
        state["step"], state["seconds_rl"] = step, seconds_before + time.time() - began
        metrics.writerow(row)
        left = (time.time() - began) / (step - first) * (config.steps - step)
        report.print_row(row, state["evaluation"]["accuracy"], left)
        if "accuracy" in row:
            report.show(state["evaluation"], scored, folder / "samples.txt", f"RL step {step}")
        if step % config.save_every == 0 or step == config.steps or interrupted:
            saved = checkpoint()
        if interrupted and step < config.steps:
            print(f"stopped; to go on: python train.py --resume --out {folder}")
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ---------------------------------------------------------------------------- the whole job

def begin(config, task, tokenizer, model, fresh):
    """Stages 1 and 2 -> the state of a new run, which is what a checkpoint holds."""
    seconds, began = cold_start(config, task, tokenizer, model, fresh), time.time()
    print("2 evaluate: what imitation has reached")
    evaluation, scored = evaluate(config, task, tokenizer, model)
    report.show(evaluation, scored, Path(config.out) / "samples.txt", "after the cold start")
    rng = random.Random("the teacher")
    teacher = mean(task.reward(problem, task.demonstrate(problem, rng))
                   for problem in test_problems(task) for _ in range(10))
    return {"step": 0, "seconds_rl": 0.0, "cold_start": evaluation, "evaluation": evaluation,
            "accuracy_teacher": teacher, "seconds_cold_start": seconds,
            "seconds_before_rl": seconds + time.time() - began}


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
    reinforce(config, task, tokenizer, model, state, folder)
    report.finish(config, state, folder)


def main(argv=None):
    try:
        config, task, todo, state = parse(argv)
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
    try:
        run(config, task, todo, state, tokenizer, model)
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint, if this run has one yet")
        sys.exit(130)


if __name__ == "__main__":
    main()
