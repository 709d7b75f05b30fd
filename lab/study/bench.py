"""How fast sampling, an optimiser step and a whole RL step are, with random weights.

    python -m lab.study.bench                   ours alone, some minutes
    python -m lab.study.bench --peers           beside transformers and TRL: lab/requirements.txt
    python -m lab.study.bench --peers --small   tiny sizes, to see that it runs
    python -m lab.study.bench --device cuda     ours alone, on a GPU

The model has 4 layers of width 128, 4 heads (2 for keys and values), 8 experts of width 256 (2
active) and 272 tokens. Prompts have 12 tokens, and no response ends early. The sides of a
comparison take turns, after a round to warm up, and the numbers are medians. GFLOP/s counts the
matrix products that a side computes, 2 for a multiply-add: attention only to what a position may
see, a backward pass as two forward ones. The ceiling is one large fp32 product with as many
threads. Our sampler computes a prompt once for its group; our update, and all that transformers and
TRL do, computes it for every response.

The peers have the same weights, in fp32, and the fastest of a few choices: experts by grouped_mm or
eager, prompts repeated or num_return_sequences, rows in a micro-batch. TRL makes the same 4
optimiser steps per rollout, "tuned", and "as it comes": gradient checkpointing, bf16 autocast, 8
rows at a time, the router's auxiliary loss. It always scores a rollout again for its old log-probs.

Not measured: compiled models, inference engines such as vLLM, long responses, responses of
different lengths, learning. The work is not quite the same: our sampler keeps log-probs and routes,
our steps and TRL's compute metrics; transformers do neither. Peak memory is that of the process,
with --peers theirs too.
"""
import argparse
import importlib.metadata
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import gspo
import moe
import train
from lab import hf
from lab.extras import metrics
from lab.report import peak_memory_mib, update_metrics
from lab.study.experiments import machine, shell

PROMPT = 12             # tokens
NEW = 32                # tokens of a response ...
COLUMNS = 64            # ... but in the update alone, where prompt and response have 64
GROUP = 8
STEPS = 4               # optimiser steps in an RL step
VOCABULARY = 272
CONFIG = train.RLOptions(group_size=GROUP, mini_batches=STEPS)
CLIP_LOW, CLIP_HIGH = gspo.ALGORITHMS["gspo"].clip_range


class Sizes(NamedTuple):
    n_layer: int
    d_model: int
    d_expert: int
    rows: int           # responses


FULL = Sizes(4, 128, 256, 256)
SMALL = Sizes(1, 32, 16, 32)


# ---------------------------------------------------------------------------- measuring

class Side(NamedTuple):
    """One side of a comparison."""
    name: str
    threads: int
    flop: float
    run: Callable | None = None


def seconds(run):
    began = time.perf_counter()
    run()
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def least_seconds(run, times=3):
    return min(seconds(run) for _ in range(times))


class Bench:
    """Measures, prints a row for every side, and keeps the rows."""
    def __init__(self, sizes, threads, repeats):
        self.sizes = sizes
        self.threads = threads
        self.repeats = repeats
        self.ceiling_gflops = {k: product_gflops(k) for k in (1, threads)}
        self.best = {}
        self.rows = []

    def fastest(self, what, choices, seconds_of):
        best = min(choices, key=seconds_of)
        self.best[what] = best
        print(f"{what}: fastest with {best}", flush=True)
        return best

    def measure(self, what, unit, amount, sides):
        """The sides take turns at `amount` tokens or responses."""
        spent = [[] for _ in sides]
        for _ in range(1 + self.repeats):           # the first is to warm up
            for side, times in zip(sides, spent):
                torch.set_num_threads(side.threads)
                times.append(seconds(side.run))
        torch.set_num_threads(self.threads)
        self.record(what, unit, amount, sides, [times[1:] for times in spent])

    def record(self, what, unit, amount, sides, spent):
        """A row for each side, from the seconds of each of its repeats."""
        medians = [statistics.median(times) for times in spent]
        for side, times, median in zip(sides, spent, medians):
            gflops = side.flop / median / 1e9
            row = {
                "what": what, "side": side.name, "rate": amount / median, "unit": unit,
                "gflops": gflops, "share_of_ceiling": gflops / self.ceiling_gflops[side.threads],
                "first_is_faster": median / medians[0], "seconds": times,
            }
            self.rows.append(row)
            print(table_row(row), flush=True)


def table_row(row):
    return (f"| {row['what']:24} | {row['side']:16} | {row['rate']:9.1f} {row['unit']:11} | "
            f"{row['gflops']:7.1f} | {row['share_of_ceiling']:6.1%} | "
            f"{row['first_is_faster']:5.2f} |")


def product_gflops(threads, n=2048):
    torch.set_num_threads(threads)
    a = torch.rand(n, n)
    b = torch.rand(n, n)
    return 2 * n ** 3 / least_seconds(lambda: a @ b, times=10) / 1e9


def copy_gbytes(n=2 ** 26):
    source = torch.rand(n)
    target = torch.rand(n)
    moved = 2 * source.nbytes           # 256 MiB read, 256 MiB written
    return moved / least_seconds(lambda: target.copy_(source), times=5) / 1e9


# ---------------------------------------------------------------------------- FLOP

def forward_flop(config, tokens, seen, unembedded):
    """A forward pass over `tokens` positions, which see `seen` positions on average (themselves
    included), with logits at `unembedded` positions."""
    D = config.d_model
    kv_width = config.n_kv_head * D // config.n_head
    attention = 2 * D * D + 2 * D * kv_width + 2 * D * seen
    experts = D * config.n_expert + config.n_active * 3 * D * config.d_expert
    layers = tokens * config.n_layer * (attention + experts)
    return 2 * (layers + unembedded * D * config.vocab_size)


def sampling_flop(config, prompts, n):
    """So many prompts, with the logits of their last tokens; then n responses without their last
    tokens, which predict nothing."""
    new = n * (NEW - 1)
    return (forward_flop(config, prompts * PROMPT, (PROMPT + 1) / 2, prompts)
            + forward_flop(config, new, PROMPT + NEW / 2, new))


def update_flop(config, n, S):
    """n prompts and responses of S tokens together, with the logits of the responses and of one
    column before them; a backward pass is two forward ones."""
    return 3 * forward_flop(config, n * S, (S + 1) / 2, n * (S - PROMPT + 1))


def trl_flop(config, n, passes):
    """An RL step of TRL: it samples n responses, then makes so many `passes` through the layers, a
    backward pass being two. There are logits for prompts too, in 5 passes: one scores the rollout,
    3 are the update, and its backward pass computes the logits once more."""
    S = PROMPT + NEW
    passes_flop = forward_flop(config, passes * n * S, (S + 1) / 2, 5 * n * (S - 1))
    return sampling_flop(config, n, n) + passes_flop


# ---------------------------------------------------------------------------- ours

def new_model(sizes, n_expert=8):
    torch.manual_seed(0)
    return moe.MoETransformer(moe.MoEConfig(
        VOCABULARY, max_length=COLUMNS, n_layer=sizes.n_layer, d_model=sizes.d_model, n_head=4,
        n_kv_head=2, n_expert=n_expert, n_active=2, d_expert=sizes.d_expert))


def new_optimizer(model):
    # So low a learning rate that every repeat has the routing of the first.
    return torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0,
                             fused=True)


def prompts_for(n):
    """Prompts for n responses, without 0 and 1, which are padding and end to the peers."""
    generator = torch.Generator().manual_seed(0)
    shape = (n // GROUP, PROMPT)
    return torch.randint(2, VOCABULARY, shape, generator=generator, device="cpu").tolist()


def our_sampling(model, n, new=NEW):
    return moe.generate(model, prompts_for(n), GROUP, new)


class OfCore:
    def measure(self, steps):
        return update_metrics(steps)


class OfRun(metrics.Extra, OfCore):
    """What a run measures in every optimiser step."""


def our_update(model, optimizer, rollout, mini_batches):
    config = replace(CONFIG, mini_batches=mini_batches)
    OfRun().measure(gspo.update(model, optimizer, rollout, config))


def our_rl_step(model, optimizer, n):
    rollout = our_sampling(model, n)
    rewards = rollout.response.sum(dim=1) % 2                   # is the sum of the ids odd?
    rollout.advantages = gspo.group_advantages(rewards.float().view(-1, GROUP)).flatten()
    our_update(model, optimizer, rollout, STEPS)


# ---------------------------------------------------------------------------- transformers

def as_transformers(model, experts="grouped_mm"):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config, state = hf.to_hf(model)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **config, attn_implementation="sdpa", experts_implementation=experts))
    theirs.load_state_dict(state)
    return theirs


@torch.no_grad()
def logits_difference(model, theirs, n):
    tokens = torch.tensor(prompts_for(n))
    ours = model(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits
    return (theirs(tokens).logits - ours).abs().max().item()


@torch.inference_mode()
def their_sampling(theirs, n, experts, repeated):
    theirs.set_experts_implementation(experts)
    tokens = torch.tensor(prompts_for(n))
    if repeated:
        tokens = tokens.repeat_interleave(GROUP, dim=0)
    theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                    top_p=1.0, temperature=1.0, max_new_tokens=NEW, min_new_tokens=NEW,
                    num_return_sequences=1 if repeated else GROUP, pad_token_id=0)


def their_update(theirs, optimizer, rollout, experts, micro):
    """One optimiser step on Eq. 5, `micro` rows at a time."""
    theirs.set_experts_implementation(experts)
    optimizer.zero_grad()
    B, T = rollout.logp_old.shape
    for rows in torch.arange(B).split(micro):
        part = rollout.select(rows)
        logits = theirs(part.tokens, use_cache=False, logits_to_keep=T + 1).logits
        log_probs = logits[:, :-1].log_softmax(dim=-1)
        logp = log_probs.gather(2, part.response[..., None])[..., 0]
        loss, _ = gspo.policy_loss("gspo", logp, part.logp_old, part.advantages,
                                   part.response_mask)
        (loss * len(rows) / B).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), CONFIG.max_grad_norm)
    optimizer.step()


# ---------------------------------------------------------------------------- TRL

def trl_config(folder, n, max_steps, micro):
    """What the same work needs. Unless `micro` is None, also what is fast, `micro` rows at a time;
    the default is 8."""
    from trl import GRPOConfig
    parts = n // STEPS // (micro or 8)
    tuned = {}
    if micro:
        tuned = {"per_device_train_batch_size": micro, "gradient_checkpointing": False,
                 "bf16": False, "router_aux_loss_coef": 0.0, "logging_strategy": "no",
                 "dataloader_pin_memory": False}
    return GRPOConfig(
        folder, max_steps=max_steps, num_generations=GROUP, max_completion_length=NEW,
        gradient_accumulation_steps=parts, steps_per_generation=STEPS * parts,
        generation_kwargs={"min_new_tokens": NEW}, importance_sampling_level="sequence",
        loss_type="grpo", beta=0.0, epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, seed=0,
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **tuned)


def trl_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0],
                                   eos_token=words[1])


def is_sum_odd(completion_ids, **_):
    """The reward of our_rl_step."""
    return [sum(ids) % 2.0 for ids in completion_ids]


def trl_cycles(model, n, repeats, experts, micro, between=None):
    """Cycles of sampling n responses and STEPS optimiser steps, which take turns with the function
    `between` -> the seconds of `repeats` cycles, and of `between`. The first is to warm up."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer
    ends = []
    others = []

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % STEPS == 0:
                ends.append(time.perf_counter())
                others.append(seconds(between) if between else 0.0)

    words = ["<pad>", "<end>", *(f"w{i}" for i in range(2, VOCABULARY))]
    texts = [" ".join(words[i] for i in prompt) for prompt in prompts_for(n)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            as_transformers(model, experts), reward_funcs=is_sum_odd, callbacks=[Turns()],
            args=trl_config(folder, n, STEPS * (repeats + 1), micro),
            train_dataset=Dataset.from_dict({"prompt": texts * (repeats + 2)}),
            processing_class=trl_tokenizer(words))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    spent = [end - begin - other for begin, other, end in zip(ends, others, ends[1:])]
    return spent, others[1:]


# ---------------------------------------------------------------------------- the comparisons

def compare_sampling(bench, model, theirs):
    rows = bench.sizes.rows

    def measure(n, sides):
        bench.measure(f"sampling, {n} responses", "tokens/s", n * NEW, sides)

    def ours(name, model, n, threads=bench.threads):
        return Side(name, threads, sampling_flop(model.config, n // GROUP, n),
                    partial(our_sampling, model, n))

    if theirs:
        best = bench.fastest(
            "transformers, sampling",
            product(("grouped_mm", "eager"), (True, False)),
            lambda choice: least_seconds(partial(their_sampling, theirs, rows, *choice)))
    for n in (rows // 4, rows, 2 * rows, 4 * rows):
        sides = [ours("ours", model, n)]
        if theirs and n <= 2 * rows:
            sides.append(Side("transformers", bench.threads, sampling_flop(model.config, n, n),
                              partial(their_sampling, theirs, n, *best)))
        if n == 2 * rows and bench.threads > 1:
            sides.append(ours("ours, 1 thread", model, n, threads=1))
        measure(n, sides)
    measure(rows, [ours(f"ours, {E} experts", new_model(bench.sizes, E), rows)
                   for E in (8, 16, 32, 64)])


def compare_updates(bench, model, theirs):
    rows = bench.sizes.rows
    flop = update_flop(model.config, rows, COLUMNS)
    rollout = our_sampling(model, rows, COLUMNS - PROMPT)
    rollout.advantages = torch.randn(rows)
    ours = partial(our_update, model, new_optimizer(model), rollout, 1)
    sides = [Side("ours", bench.threads, flop, ours)]
    if theirs:
        update = partial(their_update, theirs, new_optimizer(theirs), rollout)
        best = bench.fastest(
            "transformers, update",
            product(("grouped_mm", "eager"), (rows // 8, rows // 4, rows // 2, rows)),
            lambda choice: least_seconds(partial(update, *choice)))
        sides.append(Side("transformers", bench.threads, flop, partial(update, *best)))
    if bench.threads > 1:
        sides.append(Side("ours, 1 thread", 1, flop, ours))
    bench.measure(f"update, {rows} x {COLUMNS} tokens", "tokens/s", rows * COLUMNS, sides)


def compare_rl_steps(bench, model, with_trl):
    rows = bench.sizes.rows
    what = f"RL step, {rows} responses"
    flop = (sampling_flop(model.config, rows // GROUP, rows)
            + update_flop(model.config, rows, PROMPT + NEW))
    step = partial(our_rl_step, model, new_optimizer(model), rows)
    ours = Side("ours", bench.threads, flop, step)
    if not with_trl:
        bench.measure(what, "responses/s", rows, [ours])
        return
    best = bench.fastest(
        "TRL", product(("grouped_mm", "eager"), (rows // 16, rows // 8, rows // 4)),
        lambda choice: min(trl_cycles(model, rows, 2, *choice)[0]))
    # One pass scores the rollout, 3 are the update, and gradient checkpointing takes one more.
    tuned = Side("TRL, tuned", bench.threads, trl_flop(model.config, rows, passes=4))
    default = Side("TRL, as it comes", bench.threads, trl_flop(model.config, rows, passes=5))
    for theirs, choice in ((tuned, best), (default, ("grouped_mm", None))):
        spent, our_seconds = trl_cycles(model, rows, bench.repeats, *choice, between=step)
        bench.record(what, "responses/s", rows, [ours, theirs], [our_seconds, spent])


def parse_options():
    parser = argparse.ArgumentParser(prog="python -m lab.study.bench", allow_abbrev=False,
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", action="store_true", help="also transformers and TRL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (without --peers)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args()


def main():
    options = parse_options()
    if options.peers and options.device != "cpu":
        sys.exit("bench: --peers measures on a CPU only; leave out --device")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    warnings.filterwarnings("ignore")           # the peers have many
    logging.disable(logging.WARNING)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    peers = ["transformers", "trl"] if options.peers else []
    for name in [name for name in peers if name not in installed]:
        print(f"{name} is not installed: the bench leaves it out")
        peers.remove(name)

    torch.set_default_device(options.device)
    bench = Bench(SMALL if options.small else FULL, options.threads, options.repeats)
    results = vars(options) | {
        "machine": machine().removesuffix(", 2 threads"),
        "commit": shell("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
                        "--exclude", "*"),
        "versions": {name: installed.get(name) for name in ("torch", "transformers", "trl")},
    }
    model = new_model(bench.sizes)
    theirs = as_transformers(model) if "transformers" in peers else None
    if theirs:
        difference = logits_difference(model, theirs, bench.sizes.rows)
        assert difference < 1e-3, difference
        results["logits_differ_by"] = difference
        print(f"transformers' logits differ from ours by {difference:.1e} at most")
    compare_sampling(bench, model, theirs)
    compare_updates(bench, model, theirs)
    compare_rl_steps(bench, model, "trl" in peers)
    results |= {
        "ceiling_gflops": bench.ceiling_gflops, "best": bench.best, "rows": bench.rows,
        "peak_memory_mib": peak_memory_mib(), "copy_gbytes": copy_gbytes(),
    }
    if options.device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
        results["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2 ** 20
    show(results)


def show(results):
    """Everything as a table for a README, then as JSON."""
    print("\n| what | side | per second | GFLOP/s | of the ceiling | the first is faster by |")
    print("|---|---|---|---|---|---|")
    for row in results["rows"]:
        print(table_row(row))
    print()
    for threads, gflops in results["ceiling_gflops"].items():
        print(f"ceiling: {gflops:.1f} GFLOP/s with {threads} thread(s)")
    print(f"{results['copy_gbytes']:.1f} GB/s for a copy; peak memory "
          f"{results['peak_memory_mib']} MiB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
