"""Teach a tiny Mixture-of-Experts transformer arithmetic: imitation first, then RL with GSPO.

    python train.py                        the whole job, from random weights, in minutes on a CPU
    python train.py --algorithm grpo       another objective, after the same cold start
    python train.py --task countdown       another task: a search that learns not to give up
    python train.py --ask "47*8="          ask the model of the last run
    python train.py --inspect              see what an update does to it, token by token
    python train.py --resume               go on after Ctrl-C, to the very same numbers
    python train.py --help                 every option, and why it has its default

    1  cold start   imitate a teacher who thinks now and then, slips and guesses
    2  evaluate     on held-out problems
    3  RL           sample, reward, advantages, update; again
    4  report       what happened, in words, numbers and curves

All randomness follows from the seed, that of an RL step from the seed and its number. So after the
cold start a checkpoint needs only the weights, the optimiser, the success rate of each kind of
problem and the number of the last step to go on as if nothing had happened (on as many threads).
"""
import random
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import gspo
import moe
from data import demonstrations, tasks
from data.queries import Queries
from data.tokenizer import Tokenizer
from lab import command_line, extras, inspection, preflight, report, runs
from lab.muon import Muon
from lab.options import option

# Every field below becomes a flag:
#     name: type = option(default, what it is and why it has this default, lowest, highest value)


@dataclass
class ModelOptions:
    """the model: a third of a million parameters learn this task in minutes on two cores"""
    n_layer: int = option(3, "layers", 1, 4096)
    d_model: int = option(64, "width between the layers", 2, 4096)
    n_head: int = option(4, "query heads", 1)
    n_kv_head: int = option(2, "key/value heads, each for n_head / n_kv_head query heads", 1)
    n_expert: int = option(8, "experts in a layer", 1)
    n_active: int = option(2, "experts that a token uses", 1)
    d_expert: int = option(64, "inner width of an expert", 1, 4096)


@dataclass
class ColdStartOptions:
    """the cold start: imitation of the teacher"""
    cold_steps: int = option(1100, "steps of imitation: until the thinking is mostly right", 1)
    muon_lr: float = option(0.02, "peak learning rate of the matrices in the layers (Muon)", 0, 1)
    cold_lr: float = option(6e-3, "peak learning rate of all other parameters (AdamW)", 0, 1)
    cold_tokens: int = option(3840, "tokens in a batch, padding not counted", 64)
    balance: float = option(0.01, "weight of the loss that keeps all experts in use", 0, 10)


@dataclass
class RLOptions:
    """RL"""
    # Importing the extras, above, has added their rows to gspo.ALGORITHMS.
    algorithm: str = option("gspo", "the objective", choices=tuple(gspo.ALGORITHMS))
    steps: int = option(200, "RL steps: until held-out accuracy hardly rises any more", 0)
    queries: str = option("adaptive", "kinds of problem to ask: above all those that are sometimes "
                          "answered right (adaptive), or all (uniform)",
                          choices=("adaptive", "uniform"))
    prompts: int = option(32, "problems in a step", 1)
    group_size: int = option(8, "responses to a problem, compared with each other", 2)
    mini_batches: int = option(4, "optimiser steps per pass, as in the paper; with many GSPO is "
                               "ahead of GRPO", 1)
    epochs: int = option(1, "passes over a rollout, as in PPO", 1, 100)
    lr: float = option(3e-4, "learning rate: the policy must stay near the one that sampled", 0, 1)
    clip_low: float = option(None, "lower clip range (default: as in gspo.ALGORITHMS)", 0, 1)
    clip_high: float = option(None, "upper clip range (default: as in gspo.ALGORITHMS)", 0, 100)
    routing_replay: str = option("none", "experts that an update activates: those that the router "
                                 "chooses now (none), or that sampled (r3, 2510.11370)",
                                 choices=("none", "r3", *extras.ROUTING_REPLAY))
    temperature: float = option(1.0, "of sampling and scoring alike", 0.01, 100)
    max_new_tokens: int = option(64, "a response without an end by then has reward 0", 1, 1000)
    max_grad_norm: float = option(1.0, "longer gradients are shortened; cold start too", 1e-6)


@dataclass
class RunOptions:
    """the run"""
    task: str = option("arithmetic", "module in data/ that holds the class Task")
    seed: int = option(0, "same seed and threads, same run", 0)
    eval_every: int = option(100, "RL steps from one held-out evaluation to the next", 1)
    save_every: int = option(50, "RL steps from one checkpoint to the next", 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    threads: int = option(2, "CPU threads; what we measured with", 1, 1024)
    out: str = option(None, "folder of the run (default: the first free out/run-N)")


OPTION_GROUPS = (ModelOptions, ColdStartOptions, RLOptions, RunOptions, *extras.OPTIONS)


@dataclass
class Config(*OPTION_GROUPS):
    """All options in one: config.lr, config.n_layer ..."""


MAX_PROMPT = 64     # tokens


class Response(NamedTuple):
    """What a response says and is worth."""
    problem: object
    text: str           # without its end token
    truncated: bool     # True if it had no end token after --max_new_tokens
    reward: float       # 0 if it was truncated
    length: int         # tokens, the end token included
    thinks: bool        # False if it was truncated, or the task does not say what thinking is
    measures: dict      # {name: number}, empty if the task measures nothing


class Trainer:
    """The stages of a run, as they are with the default options. Other options may ask for extras:
    classes that are put in front of this one and override its methods (lab/extras/__init__.py). A
    first reader can ignore them. Three extras are always at work and change no number of a run:
    they measure, stop at Ctrl-C, and keep the cold start in out/ for later runs."""
    def __init__(self, config: Config, task):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.task = task
        self.options = vars(config) | command_line.task_options(task)
        self.folder = Path(config.out)
        self.tokenizer = Tokenizer(tasks.vocabulary(config.task, task))
        self.demonstrations = demonstrations.batches(task, self.tokenizer, config.seed,
                                                     config.cold_tokens)
        sizes = {field.name: getattr(config, field.name) for field in fields(ModelOptions)}
        self.model = moe.MoETransformer(moe.MoEConfig(
            len(self.tokenizer.tokens), max_length=MAX_PROMPT + config.max_new_tokens, **sizes))
        self.device = runs.find_device(config.device)
        self.model.to(self.device)
        self.optimizer = AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                               weight_decay=0.0, fused=True)
        self.queries = Queries(task, config.queries == "adaptive", success_rates={})
        self.loss_terms = []            # of extras, as gspo.gradient adds them
        self.measured = {}              # by extras, in an RL step
        self.progress = {"step": 0}     # all that the report tells in the end
        preflight.check(self, MAX_PROMPT, extras.COLUMNS["metrics"])

    # ------------------------------------------------------------------------ 1 the cold start

    def cold_start(self):
        """Imitate the teacher, from random weights. Muon moves the matrices inside the layers
        (attention, routers, experts), AdamW the rest: embedding, unembedding, norms."""
        config = self.config
        model = self.model
        parameters = list(model.parameters())
        matrices = [parameter for parameter in model.layers.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in parameters if parameter.dim() == 1]
        rest = [model.embed.weight, model.unembed.weight, *vectors]
        optimizers = [
            Muon(matrices, config.muon_lr, weight_decay=0.05),
            AdamW(rest, config.cold_lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)]

        def share_of_peak(done: int) -> float:
            # The smaller of two lines: up within 50 steps, and down to 0 over all steps.
            return min((done + 1) / 50, 1 - done / config.cold_steps)
        schedules = [LambdaLR(optimizer, share_of_peak) for optimizer in optimizers]
        print(f"1 cold start: {config.cold_steps} steps of imitation")
        began = time.time()
        for step in range(1, config.cold_steps + 1):
            # A rollout that the teacher has written. The loss of imitation is minus the log-prob of
            # its responses. RL has responses of the model itself, each with a weight.
            prompts, responses = zip(*next(self.demonstrations))
            batch = moe.lay_out(prompts, responses, self.tokenizer.pad_id, self.device)
            scores = gspo.score(model, batch)
            nats = -scores.logp.sum()
            # Not divided by the tokens of this batch: a token weighs the same in every batch.
            loss = nats / config.cold_tokens
            uneven = moe.balance_loss(scores.routes, scores.router_logits, batch.mask)
            model.zero_grad()
            (loss + config.balance * uneven).backward()
            self.optimizer_step(parameters, optimizers, config.max_grad_norm)
            for schedule in schedules:
                schedule.step()
            report.cold_step(step, config.cold_steps, nats / batch.lengths.sum(), began)
        self.progress["seconds_cold_start"] = time.time() - began

    # ------------------------------------------------------------------------ 2 the evaluation

    def evaluate(self) -> tuple[dict, list[Response]]:
        """4 sampled responses to each held-out problem and a greedy one -> numbers; the sampled."""
        problems = tasks.held_out_problems(self.task)
        generator = torch.Generator().manual_seed(self.config.seed)
        likeliest = self.sample(self.model, problems, 1, temperature=0.0)
        several = self.sample(self.model, problems, 4, self.config.temperature, generator)
        sampled = self.judge(problems, several)
        return report.evaluation(sampled, self.judge(problems, likeliest)), sampled

    def sample(self, model: moe.MoETransformer, problems: list, group_size: int, temperature: float,
               generator: torch.Generator | None = None) -> moe.Rollout:
        """`group_size` responses to each problem; temperature 0 is greedy."""
        T = self.config.max_new_tokens
        prompts = [self.tokenizer.encode(problem.prompt) for problem in problems]
        uniform = torch.rand(len(prompts) * group_size, T, generator=generator)
        return moe.generate(model, prompts, group_size, T, temperature, self.tokenizer.eos_id,
                            self.tokenizer.pad_id, uniform)

    def judge(self, problems: list, rollout: moe.Rollout) -> list[Response]:
        """Decode, reward and measure each response, row by row."""
        group_size = len(rollout.tokens) // len(problems)
        responses = []
        rows = zip(rollout.response.tolist(), rollout.lengths.tolist())
        for i, (ids, length) in enumerate(rows):
            problem = problems[i // group_size]
            truncated = ids[length - 1] != self.tokenizer.eos_id
            text = self.tokenizer.decode(ids[:length] if truncated else ids[:length - 1])
            reward = 0.0 if truncated else float(self.task.reward(problem, text))
            thinks = not truncated and tasks.thinks(self.task, text)
            measures = tasks.measure(self.task, problem, text, truncated)
            responses.append(Response(problem, text, truncated, reward, length, thinks, measures))
        return responses

    # ------------------------------------------------------------------------ 3 RL

    def rl_step(self, step: int) -> tuple[list[Response], list[gspo.Learned]]:
        """One step of RL -> all responses that were sampled, and what was learned from them."""
        rng = random.Random(f"{self.config.seed} rl {step}")
        # Draw P problems, sample G responses to each, reward them.
        rollout, responses = self.collect(self.model, rng)
        # Advantages: how good is a response beside its siblings?
        rollout.advantages = self.advantages(rollout)
        # Update: ratio, clip and step, `mini_batches` times in each epoch, each with its groups.
        learned = gspo.update(self.model, self.optimizer, rollout, self.config, self.loss_terms,
                              self.gradient, self.optimizer_step)
        # Learn what to ask next: problems that are sometimes answered right, sometimes wrong.
        self.queries.learn(responses)
        return responses, learned

    def collect(self, model: moe.MoETransformer,
                rng: random.Random) -> tuple[moe.Rollout, list[Response]]:
        """G responses of the model to each of P new problems, as a rollout and as texts."""
        config = self.config
        problems = self.queries.draw(config.prompts, rng)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        rollout = self.sample(model, problems, config.group_size, config.temperature, generator)
        responses = self.judge(problems, rollout)
        rewards = [response.reward for response in responses]
        rollout.rewards = torch.tensor(rewards, device=self.device)
        return rollout, responses

    def advantages(self, rollout: moe.Rollout) -> Tensor:
        """One for each response (B,), within its group."""
        rewards = rollout.rewards.view(-1, self.config.group_size)          # (P, G)
        return gspo.group_advantages(rewards).flatten()

    gradient = staticmethod(gspo.gradient)
    optimizer_step = staticmethod(gspo.optimizer_step)
    measure = staticmethod(report.update_metrics)

    def rl(self):
        """RL up to step config.steps: logged, evaluated and saved on the way."""
        config = self.config
        log = report.Log(self.folder, self.options, self.progress, extras.COLUMNS)
        for step in range(self.progress["step"] + 1, config.steps + 1):
            began = time.time()
            self.measured = {}
            responses, learned = self.rl_step(step)
            updates = self.measure(learned)
            self.measured["seconds"] = time.time() - began
            last = step == config.steps
            evaluated = self.evaluate() if last or step % config.eval_every == 0 else None
            self.progress["step"] = step
            log.write(responses, updates, self.measured, evaluated)
            if last or step % config.save_every == 0:
                runs.save(self.folder / "checkpoint.pt", self.state_dict())

    # ------------------------------------------------------------------------ the whole job

    def run(self):
        """The four stages, or what is left of them."""
        if "evaluation" not in self.progress:       # a new run
            runs.clear(self.folder)
            self.cold_start()
            print("2 evaluate: what imitation has reached")
            evaluation, responses = self.evaluate()
            report.show(evaluation, responses, self.folder, "after the cold start")
            self.progress |= {"first_evaluation": evaluation, "evaluation": evaluation}
            runs.save(self.folder / "cold_start.pt", self.state_dict())     # for --inspect
            runs.save(self.folder / "checkpoint.pt", self.state_dict())
        self.rl()
        report.finish(self.folder, self.config, self.task, self.progress)

    def state_dict(self) -> dict:
        return {"options": self.options, "progress": self.progress,
                "vocabulary": self.tokenizer.tokens,
                "success_rates": self.queries.success_rates,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict):
        self.progress.update(state["progress"])
        self.queries.success_rates.update(state["success_rates"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main(argv: list[str] | None = None):
    with runs.bad_input_in_one_line():
        config, task, todo, state = command_line.parse(argv, Config, OPTION_GROUPS, __doc__)
        ExtendedTrainer = extras.extend(Trainer, config)
        trainer = ExtendedTrainer(config, task)
        if state:
            runs.restore(trainer, state)
    if todo:
        return inspection.look(trainer, todo, MAX_PROMPT)       # --ask, --inspect, --eval_only
    with runs.alone_in(trainer.folder):
        trainer.run()


if __name__ == "__main__":
    with runs.quiet_broken_pipe():
        main()
