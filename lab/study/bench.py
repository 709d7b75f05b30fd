"""How fast sampling, an optimiser step and a whole RL step are, with random weights.

    python -m lab.study.bench             ours alone, some minutes; on a GPU with --device cuda
    python -m lab.study.bench --peers     beside transformers and TRL: lab/requirements.txt

The sides of a comparison take turns, after a round to warm up, and the numbers are medians. No
response ends early. The last line is all results as JSON, with the seconds of each round.

The peers have the same weights, in fp32, and what was fastest of a few choices on two cores:
experts by grouped_mm, a quarter of the responses in a pass. TRL makes the same optimiser steps,
"tuned" like this, and "as it comes": with gradient checkpointing, bf16 autocast, 8 responses in a
pass, an auxiliary loss. It also scores a rollout anew and computes metrics; our sampler computes a
prompt once for its group. Not measured: compiled models, engines such as vLLM, long responses.
"""
import argparse
import json
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version

import torch
from torch.utils.benchmark import set_torch_threads, timer      # timer() waits for a GPU

import gspo
import train
from lab import hf
from lab.study.study import machine, shell
from moe import MoEConfig, MoETransformer, generate

PROMPT = 12             # tokens
NEW = 32                # tokens of a response ...
COLUMNS = 64            # ... but in the update alone, where prompt and response have 64
GROUP = 8               # responses to a prompt
STEPS = 4               # optimiser steps in an RL step
VOCABULARY = 272        # tokens
UPDATE = train.RLOptions(group_size=GROUP, mini_batches=1)
RL_STEP = train.RLOptions(group_size=GROUP, mini_batches=STEPS)
adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)     # so slow that routes stay the same


def new_model(D, n_expert=8):
    torch.manual_seed(0)
    return MoETransformer(MoEConfig(VOCABULARY, n_layer=4, d_model=D, d_expert=2 * D,
                                    n_expert=n_expert, max_length=COLUMNS))


def prompts_for(n):
    """Prompts for n responses, without 0 and 1, which are padding and end to the peers."""
    return torch.randint(2, VOCABULARY, (n // GROUP, PROMPT))


def our_sampling(model, n, new=NEW):
    """n responses of so many `new` tokens."""
    return generate(model, prompts_for(n).tolist(), GROUP, new)


def our_rl_step(model, optimizer, n):
    rollout = our_sampling(model, n)
    rewards = rollout.response.sum(dim=1) % 2                   # is the sum of the ids odd?
    rollout.advantages = gspo.group_advantages(rewards.view(-1, GROUP)).flatten()
    gspo.update(model, optimizer, rollout, RL_STEP)


def as_transformers(model):
    """The same model. AssertionError if its logits are others."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    config, state = hf.to_hf(model)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, experts_implementation="grouped_mm"))
    theirs.load_state_dict(state)
    tokens = prompts_for(256)
    logits = model(tokens, torch.ones_like(tokens, dtype=torch.bool)).logits
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-3)
    return theirs


@torch.inference_mode()
def their_sampling(theirs, n):
    theirs.generate(prompts_for(n), do_sample=True, top_k=0, num_return_sequences=GROUP,
                    max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)


def their_update(theirs, optimizer, rollout):
    """One optimiser step on the loss of GSPO."""
    optimizer.zero_grad()
    for rows in torch.arange(len(rollout.tokens)).chunk(4):
        part = rollout.select(rows)
        logits = theirs(part.tokens, use_cache=False, logits_to_keep=COLUMNS - PROMPT + 1).logits
        logp = logits[:, :-1].log_softmax(dim=-1).gather(2, part.response[..., None])[..., 0]
        loss, _ = gspo.policy_loss("gspo", logp, part.logp_old, part.advantages, part.response_mask)
        (loss / 4).backward()
    gspo.optimizer_step(theirs.parameters(), [optimizer], max_grad_norm=1.0)


def trl_turns(our_step, model, n, rounds, tuned):
    """RL steps of n responses, TRL's and ours in turn -> {side: its seconds in each round}."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    times = [timer()]

    def is_sum_odd(completion_ids, **_):
        """The reward of our_rl_step. TRL asks for it once in an RL step: then it is our turn."""
        times.append(timer())
        our_step()
        times.append(timer())
        return [sum(ids) % 2.0 for ids in completion_ids]
    tokenizer = hf.tokenizer_for(["<pad>", "<end>", *map(chr, range(0x102, 0x100 + VOCABULARY))])
    data = Dataset.from_dict({"prompt": tokenizer.batch_decode(prompts_for(n * (rounds + 1)))})
    rows = n // 4 if tuned else 8               # in a pass
    tuning = {"gradient_checkpointing": False, "bf16": False, "router_aux_loss_coef": 0.0}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = GRPOConfig(
            folder, max_steps=STEPS * rounds, steps_per_generation=n // rows, use_cpu=True,
            per_device_train_batch_size=rows, gradient_accumulation_steps=n // STEPS // rows,
            num_generations=GROUP, max_completion_length=NEW, logging_strategy="no",
            generation_kwargs={"min_new_tokens": NEW}, save_strategy="no", loss_type="grpo",
            importance_sampling_level="sequence", **(tuning if tuned else {}))
        GRPOTrainer(as_transformers(model), is_sum_odd, config, data,
                    processing_class=tokenizer).train()
    spent = [end - begin for begin, end in zip(times, times[1:])]
    return {"ours": spent[1::2], "TRL, tuned" if tuned else "TRL, as it comes": spent[::2]}


def take_turns(sides, rounds):
    """Functions {side: function} -> {side: its seconds in each round}."""
    spent = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            began = timer()
            run()
            spent[side].append(timer() - began)
    return spent


def comparisons(D, n, rounds, peers):
    """For width D and n responses: what is measured, unit, amount in a round, {side: seconds}."""
    model = new_model(D)
    optimizer = adamw(model.parameters())
    theirs = as_transformers(model) if peers else None
    one_thread = set_torch_threads(1)           # one_thread(f) runs f on it
    for k in (n // 4, n, 2 * n, 4 * n):
        sides = {"ours": partial(our_sampling, model, k)}
        if peers:
            sides["transformers"] = partial(their_sampling, theirs, k)
        if k == 2 * n:
            sides["ours, 1 thread"] = one_thread(sides["ours"])
        yield f"sampling, {k} responses", "tokens/s", k * NEW, take_turns(sides, rounds)
    sides = {f"ours, {E} experts": partial(our_sampling, new_model(D, E), n)
             for E in (8, 16, 32, 64)}
    yield f"sampling, {n} responses", "tokens/s", n * NEW, take_turns(sides, rounds)

    rollout = our_sampling(model, n, COLUMNS - PROMPT)
    rollout.advantages = torch.randn(n)
    sides = {"ours": partial(gspo.update, model, optimizer, rollout, UPDATE)}
    if peers:
        sides["transformers"] = partial(their_update, theirs, adamw(theirs.parameters()), rollout)
    sides["ours, 1 thread"] = one_thread(sides["ours"])
    yield f"update, {n} x {COLUMNS} tokens", "tokens/s", n * COLUMNS, take_turns(sides, rounds)

    step = partial(our_rl_step, model, optimizer, n)
    if not peers:
        yield f"RL step, {n} responses", "responses/s", n, take_turns({"ours": step}, rounds)
        return
    for tuned in (True, False):
        yield f"RL step, {n} responses", "responses/s", n, trl_turns(step, model, n, rounds, tuned)


def main():
    parser = argparse.ArgumentParser("python -m lab.study.bench", allow_abbrev=False)
    parser.add_argument("--peers", action="store_true", help="also transformers and TRL, on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or, without --peers, cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    D = 32 if options.small else 128
    n = 32 if options.small else 256
    packages = ("torch", "transformers", "trl") if options.peers else ("torch",)
    results = vars(options) | {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "commit": shell("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "versions": {name: version(name) for name in packages}, "rows": []}
    print("| what | side | per second | the first is faster by |\n|---|---|---|---|")
    for what, unit, amount, spent in comparisons(D, n, 1 + options.repeats, options.peers):
        medians = [statistics.median(times[1:]) for times in spent.values()]
        for (side, times), median in zip(spent.items(), medians):
            row = {"what": what, "side": side, "rate": amount / median, "unit": unit,
                   "first_is_faster": median / medians[0], "seconds": times[1:]}
            results["rows"].append(row)
            print(f"| {what} | {side} | {row['rate']:.1f} {unit} | {row['first_is_faster']:.2f} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
