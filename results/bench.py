"""How fast sampling, an optimisation step and a whole RL step are, on a CPU and random weights.

    python results/bench.py                  ours, some minutes
    python results/bench.py --peers          beside transformers and TRL: pip install trl
    python results/bench.py --peers --small  tiny sizes, to see that it runs

The model has 4 layers of width 128, 4 heads (2 for keys and values), 8 experts of width 256 (2
active) and 272 tokens; prompts have 12 tokens, and no response ends early. Sides that are compared
take turns, after a round to warm up; numbers are medians. GFLOP/s counts the matrix products that a
side computes, 2 for a multiply-add (attention only to what a position may see, a backward pass as
two forward ones); the ceiling is one large fp32 product with as many threads.

The peers have the same weights, in fp32, and what is best here among: experts by grouped_mm or
eager, prompts repeated or num_return_sequences, rows in a micro-batch. TRL makes the same 4
optimiser steps per rollout, "tuned", and "as it comes": gradient checkpointing, bf16 autocast, 8
rows at a time, the router's auxiliary loss. It always scores a rollout again for its old log-probs.
"products alone" is no sampler but the limit of one: the matrix products of sampling on noise.

Not measured: GPUs, compiled models, inference engines such as vLLM, long responses, responses of
different lengths (but for the share of padding), learning. The work is not quite the same: our
sampler keeps log-probs and routes, our steps and TRL's compute metrics; transformers do neither.
Peak memory is that of the process, with --peers theirs too.
"""
import argparse
import importlib.metadata
import inspect
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gspo
import moe
import train
from data.rollout import Rollout
from results import compare, hf, report

PROMPT, NEW, LINE, GROUP, STEPS, VOCABULARY = 12, 32, 64, 8, 4, 272
LAYERS, WIDTH, INNER, ROWS = (1, 32, 16, 32) if "--small" in sys.argv else (4, 128, 256, 256)
RUN = train.Config(lr=1e-6)     # so low that the routing of a repeat is that of the first


# ---------------------------------------------------------------------------- measuring

def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fastest(results, what, choices, spent):
    results["best"][what] = best = min(choices, key=spent)
    print(f"{what}: best with {best}", flush=True)
    return best


def measure(results, what, unit, amount, sides):
    """Sides {name: (function, FLOP, threads)} take turns at `amount` tokens or responses."""
    spent = {name: [] for name in sides}
    for _ in range(1 + results["repeats"]):         # the first is to warm up
        for name, (run, _, threads) in sides.items():
            torch.set_num_threads(threads)
            spent[name].append(seconds(run))
    torch.set_num_threads(results["threads"])
    record(results, what, unit, amount, {name: (spent[name][1:], *side[1:])
                                         for name, side in sides.items()})


def record(results, what, unit, amount, sides):
    """Sides {name: (seconds of every repeat, FLOP, threads)} -> a row for each, printed."""
    median = {name: statistics.median(spent) for name, (spent, _, _) in sides.items()}
    for name, (spent, flop, threads) in sides.items():
        gflops = flop / median[name] / 1e9
        row = {"what": what, "side": name, "rate": amount / median[name], "unit": unit,
               "gflops": gflops, "share_of_ceiling": gflops / results["ceiling_gflops"][threads],
               "first_is_faster": median[name] / median[next(iter(median))], "seconds": spent}
        results["rows"].append(row)
        print(line(**row), flush=True)


def line(what, side, rate, unit, gflops, share_of_ceiling, first_is_faster, **_):
    return (f"| {what:24} | {side:16} | {rate:9.1f} {unit:11} | {gflops:7.1f} | "
            f"{share_of_ceiling:6.1%} | {first_is_faster:5.2f} |")


def product_gflops(threads, n=2048):
    torch.set_num_threads(threads)
    a, b = torch.rand(n, n), torch.rand(n, n)
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(10)) / 1e9


def copy_gbytes(n=2 ** 26):
    source, target = torch.rand(n), torch.rand(n)       # 256 MiB read, 256 MiB written
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9


def forward_flop(config, tokens, seen, unembedded):
    """A forward pass over `tokens` positions, which see `seen` positions on average (themselves
    included), with logits at `unembedded` positions."""
    D, kv_width = config.d_model, config.n_kv_head * config.d_model // config.n_head
    attention = 2 * D * D + 2 * D * kv_width + 2 * D * seen
    experts = D * config.n_expert + config.n_active * 3 * D * config.d_expert
    return 2 * (tokens * config.n_layer * (attention + experts)
                + unembedded * D * config.vocab_size)


def response_flop(config, prompts, n, new=NEW):
    """The prompts, once each or once for every response; then all new tokens but the last. What a
    sampler computes, and a forward pass of an update that computes no padding."""
    return forward_flop(config, prompts * PROMPT, (PROMPT + 1) / 2, prompts) + \
        forward_flop(config, n * (new - 1), PROMPT + new / 2, n * (new - 1))


def padding_share():
    """What `update` computes without need, for a rollout like the main run's (a third of the
    responses short, the others long): the share of padding among its token positions, counted where
    the experts get them, and among the places of its attention."""
    torch.manual_seed(0)
    P, B = RUN.prompts, RUN.prompts * RUN.group_size
    prompts = [[2] * n for n in torch.randint(4, 9, (P,)).tolist()]
    lengths = torch.where(torch.rand(B) < 1 / 3, torch.randint(3, 6, (B,)),
                          torch.randint(20, 51, (B,)))
    mask, model, computed = torch.arange(50) < lengths[:, None], new_model(), []
    routes = torch.zeros(LAYERS, B, 60, 2, dtype=torch.uint8)
    rollout = Rollout(prompts, mask.long(), 0.0 * mask, mask, routes, lengths)
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    used = lengths + prompt_lengths.repeat_interleave(RUN.group_size)
    most = inspect.signature(gspo.update).parameters["micro_tokens"].default
    parts = [part for rows in torch.arange(B).tensor_split(RUN.mini_batches)
             for part in gspo.micro_batches(rollout, rows, most)]
    model.layers[0].experts.register_forward_hook(lambda _, x, y: computed.append(len(x[0])))
    with torch.no_grad():
        [gspo.score(model, rollout, part) for part in parts]
    # A prompt once per group and part; the last token of a response predicts nothing.
    needed = int((lengths - 1).sum()) + sum(
        int(prompt_lengths[(part // RUN.group_size).unique()].sum()) for part in parts)
    return (1 - needed / sum(computed),
            1 - int(used.sum()) / sum(len(part) * int(used[part].max()) for part in parts))


# ---------------------------------------------------------------------------- ours

def new_model(n_expert=8):
    torch.manual_seed(0)
    return moe.MoETransformer(moe.MoEConfig(VOCABULARY, LINE, LAYERS, WIDTH, 4, 2, n_expert, 2,
                                            INNER))


def prompts_for(n):
    """Prompts for n responses, without 0 and 1, which are padding and end to the peers."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (n // GROUP, PROMPT), generator=draw).tolist()


def our_update(model, optimizer, rollout, advantages, mini_batches=1):
    gspo.update(model, optimizer, rollout, advantages, "gspo", RUN.clip_low, RUN.clip_high,
                mini_batches)


def our_rl_step(model, optimizer):
    rollout = moe.generate(model, prompts_for(ROWS), GROUP, NEW)
    rewards = (rollout.tokens.sum(1) % 2).float().view(-1, GROUP)       # is the sum of ids odd?
    our_update(model, optimizer, rollout, gspo.group_advantages(rewards).flatten(), STEPS)


@torch.inference_mode()
def products(model, n):
    """The matrix products of sampling n responses and nothing else, with experts evenly used: what
    PyTorch makes of the work that no sampler can leave out. Prompts are not even computed."""
    c, C = model.config, WIDTH // model.config.n_head
    x, q = torch.randn(n, WIDTH), torch.randn(n * c.n_kv_head, c.n_head // c.n_kv_head, C)
    blocks = torch.randn(c.n_expert, n * c.n_active // c.n_expert, WIDTH)
    cache = torch.randn(LAYERS, 2, n * c.n_kv_head, PROMPT + NEW, C)
    weights = torch.rand(*q.shape[:2], PROMPT + NEW)
    for S in range(PROMPT + 1, PROMPT + NEW):
        for layer, (k, v) in zip(model.layers, cache):
            layer.attention.qkv(x), layer.attention.o(x), layer.experts.router(x)
            q @ k[:, :S].mT, weights[:, :, :S] @ v[:, :S]
            h, _ = blocks @ layer.experts.gate.mT, blocks @ layer.experts.up.mT
            h @ layer.experts.down.mT
        model.unembed(x)


# ---------------------------------------------------------------------------- transformers

def as_transformers(model, experts="grouped_mm"):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config, state = hf.to_hf(model)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, attn_implementation="sdpa",
                                                experts_implementation=experts))
    theirs.load_state_dict(state)
    return theirs


@torch.inference_mode()
def their_sampling(theirs, n, experts, repeated):
    theirs.set_experts_implementation(experts)
    tokens = torch.tensor(prompts_for(n)).repeat_interleave(GROUP if repeated else 1, dim=0)
    theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                    top_p=1.0, temperature=1.0, max_new_tokens=NEW, min_new_tokens=NEW,
                    num_return_sequences=1 if repeated else GROUP, pad_token_id=0)


def their_update(theirs, optimizer, rollout, advantages, experts, micro):
    """One optimiser step on Eq. 5, `micro` rows at a time."""
    theirs.set_experts_implementation(experts)
    optimizer.zero_grad()
    prompts = torch.tensor(rollout.prompts).repeat_interleave(GROUP, dim=0)
    lines = torch.cat((prompts, rollout.tokens), dim=1)                         # (B, LINE)
    for rows in torch.arange(len(lines)).split(micro):
        logits = theirs(lines[rows], use_cache=False,
                        logits_to_keep=torch.arange(PROMPT - 1, LINE - 1)).logits
        logp = logits.log_softmax(-1).gather(-1, rollout.tokens[rows][..., None])[..., 0]
        s, A = (logp - rollout.logp[rows]).mean(dim=1).exp(), advantages[rows]
        objective = torch.minimum(s * A, s.clamp(1 - RUN.clip_low, 1 + RUN.clip_high) * A)
        (-objective.sum() / len(lines)).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()


# ---------------------------------------------------------------------------- TRL

def trl_config(folder, max_steps, micro):
    """What the same work needs; unless `micro` is None, also what is fast, `micro` rows at a time
    (the default is 8)."""
    from trl import GRPOConfig
    parts = ROWS // STEPS // (micro or 8)
    tuned = micro and dict(
        per_device_train_batch_size=micro, gradient_checkpointing=False, bf16=False,
        router_aux_loss_coef=0.0, logging_strategy="no", dataloader_pin_memory=False)
    return GRPOConfig(
        folder, max_steps=max_steps, num_generations=GROUP, max_completion_length=NEW,
        gradient_accumulation_steps=parts, steps_per_generation=STEPS * parts,
        generation_kwargs={"min_new_tokens": NEW}, importance_sampling_level="sequence",
        loss_type="grpo", beta=0.0, epsilon=RUN.clip_low, epsilon_high=RUN.clip_high, seed=0,
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **tuned or {})


def trl_cycles(model, experts, micro, repeats, between=lambda: None):
    """Cycles of sampling ROWS responses and STEPS optimiser steps, taking turns with `between` ->
    the seconds of `repeats` of them and of `between`. The first of each is left out."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import GRPOTrainer
    ends, others = [], []       # times, seconds

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % STEPS == 0:
                ends.append(time.perf_counter())
                others.append(seconds(between))

    words = ["<pad>", "<end>", *(f"w{i}" for i in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(words[i] for i in prompt) for prompt in prompts_for(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            as_transformers(model, experts), callbacks=[Turns()],
            reward_funcs=lambda completion_ids, **_: [sum(ids) % 2.0 for ids in completion_ids],
            args=trl_config(folder, STEPS * (repeats + 1), micro),
            train_dataset=Dataset.from_dict({"prompt": texts * (repeats + 2)}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [end - begin - other for begin, other, end in zip(ends, others, ends[1:])], others[1:]


# ---------------------------------------------------------------------------- the comparisons

def sampling(results, model, theirs):
    threads = results["threads"]
    def side(model, n, threads=threads):
        return (lambda: moe.generate(model, prompts_for(n), GROUP, NEW),
                response_flop(model.config, n // GROUP, n), threads)
    best = theirs and fastest(
        results, "transformers, sampling",
        [("grouped_mm", True), ("grouped_mm", False), ("eager", True), ("eager", False)],
        lambda it: min(seconds(lambda: their_sampling(theirs, ROWS, *it)) for _ in range(3)))
    for n in ROWS // 4, ROWS, 2 * ROWS, 4 * ROWS:
        sides = {"ours": side(model, n)}
        if theirs and n <= 2 * ROWS:
            sides["transformers"] = (lambda: their_sampling(theirs, n, *best),
                                     response_flop(model.config, n, n), threads)
        sides["products alone"] = (lambda: products(model, n),
                                   response_flop(model.config, 0, n), threads)
        if n == 2 * ROWS and threads > 1:
            sides["ours, 1 thread"] = side(model, n, 1)
        measure(results, f"sampling, {n} responses", "tokens/s", n * NEW, sides)
    measure(results, f"sampling, {ROWS} responses", "tokens/s", ROWS * NEW,
            {f"ours, {E} experts": side(new_model(E), ROWS) for E in (8, 16, 32, 64)})


def optimisation(results, model, optimizer, theirs):
    threads = results["threads"]
    batch = moe.generate(model, prompts_for(ROWS), GROUP, LINE - PROMPT), torch.randn(ROWS)
    flop, their_flop = (3 * response_flop(model.config, prompts, ROWS, LINE - PROMPT)
                        for prompts in (ROWS // GROUP, ROWS))
    ours = lambda: our_update(model, optimizer, *batch)
    sides = {"ours": (ours, flop, threads)}
    if theirs:
        adamw = torch.optim.AdamW(theirs.parameters(), RUN.lr, fused=True)
        update = lambda choice: their_update(theirs, adamw, *batch, *choice)
        best = fastest(
            results, "transformers, update",
            [(experts, ROWS // k) for experts in ("grouped_mm", "eager") for k in (8, 4, 2, 1)],
            lambda choice: min(seconds(lambda: update(choice)) for _ in range(3)))
        sides["transformers"] = (lambda: update(best), their_flop, threads)
    if threads > 1:
        sides["ours, 1 thread"] = (ours, flop, 1)
    measure(results, f"update, {ROWS} x {LINE} tokens", "tokens/s", ROWS * LINE, sides)


def rl_steps(results, model, optimizer, with_trl):
    config, threads, S = model.config, results["threads"], PROMPT + NEW
    what, ours = f"RL step, {ROWS} responses", lambda: our_rl_step(model, optimizer)
    flop = 4 * response_flop(config, ROWS // GROUP, ROWS)      # a backward pass is two forward ones
    if not with_trl:
        return measure(results, what, "responses/s", ROWS, {"ours": (ours, flop, threads)})
    best = fastest(
        results, "TRL",
        [(experts, ROWS // k) for experts in ("grouped_mm", "eager") for k in (16, 8, 4)],
        lambda choice: min(trl_cycles(model, *choice, 2)[0]))
    for name, choice in ("TRL, tuned", best), ("TRL, as it comes", ("grouped_mm", None)):
        # A pass over the rollout more than ours, another one if checkpointed; logits for prompts
        # too, and again in the backward pass.
        passes = 5 if choice[1] is None else 4
        theirs = response_flop(config, ROWS, ROWS) + forward_flop(
            config, passes * ROWS * S, (S + 1) / 2, 5 * ROWS * (S - 1))
        spent, spent_ours = trl_cycles(model, *choice, results["repeats"], ours)
        record(results, what, "responses/s", ROWS, {"ours": (spent_ours, flop, threads),
                                                    name: (spent, theirs, threads)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--peers", action="store_true", help="also transformers and TRL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    results = vars(options) | {
        "machine": compare.machine().removesuffix(", 2 threads"),
        "commit": compare.shell("git", "-C", str(Path(__file__).parent), "describe", "--always",
                                "--dirty", "--exclude", "*"),
        "versions": {name: installed.get(name) for name in ("torch", "transformers", "trl")},
        "ceiling_gflops": {k: product_gflops(k) for k in (1, options.threads)}, "best": {},
        "rows": []}
    peers = [name for name in ("transformers", "trl") if options.peers and name in installed]
    for name in ("transformers", "trl") if options.peers else ():
        if name not in installed:
            print(f"{name} is not installed: it is left out")
    model, theirs = new_model(), None
    optimizer = train.new_learner(RUN, model, {}).optimizer
    if "transformers" in peers:
        theirs, tokens = as_transformers(model), torch.tensor(prompts_for(ROWS))
        with torch.no_grad():
            difference = (theirs(tokens).logits - model(tokens).logits).abs().max().item()
        assert difference < 1e-3, difference
        results["logits_differ_by"] = difference
        print(f"transformers' logits differ from ours by {difference:.1e} at most")
    sampling(results, model, theirs)
    optimisation(results, model, optimizer, theirs)
    rl_steps(results, model, optimizer, "trl" in peers)
    results["peak_memory_mib"] = report.peak_memory_mib()
    results["padding_share"] = padding_share()
    results["copy_gbytes"] = copy_gbytes()
    print("\n| what | side | per second | GFLOP/s | of the ceiling | the first is faster by |",
          "|---|---|---|---|---|---|", *(line(**row) for row in results["rows"]), "", sep="\n")
    print("ceiling:", *(f"{gflops:.1f} GFLOP/s with {threads} thread(s),"
                        for threads, gflops in results["ceiling_gflops"].items()),
          f"{results['copy_gbytes']:.1f} GB/s for a copy; peak memory {results['peak_memory_mib']} "
          "MiB; padding in an update like the main run's: {:.1%} of the token positions, {:.1%} of "
          "the places in attention".format(*results["padding_share"]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
