"""The page of a recorded update has the numbers of gspo.py: in Python, in node and in Chromium, the
last two where they are installed."""
import itertools
import json
import re
import shutil
import subprocess

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import gspo
from lab import page
from lab.measures import expert_change, predicting
from lab.tests.tools import HOUSE, odd_trainer

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_rule(step, low, method="gspo", replay=0, std=1):
    return dict(step=step, low=low, high=low * 4 / 3, method=method, replay=replay, std=std)


@pytest.fixture(scope="module")
def recorded():
    """What was scored for a recording, a rollout and its scores, without replay and with it in
    turn; the page; the recording, read from the page."""
    trainer = odd_trainer(mini_batches=4, epochs=2)
    score = trainer.score
    scored = []

    def watched(model, rollout, replay):
        scored.append((rollout, score(model, rollout, replay)))
        return scored[-1][1]
    trainer.score = watched
    html = page.page([page.record(trainer)])
    data, = re.findall(r'type="application/json">(.*?)</script>', html)
    return scored, html, json.loads(data)[0]


def responses_of(recording):
    return list(itertools.chain(*(group["responses"] for group in recording["groups"])))


def expected(recording, rule):
    """log w (B, T), the objective and the clipped tokens (B, T) of the recording's numbers."""
    responses = responses_of(recording)
    passes = [x["replayed" if rule["replay"] else "log_w"] for x in responses]
    rows = [torch.tensor(x[rule["step"]], dtype=torch.float64) / 1e5 for x in passes]
    log_w = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    A = torch.tensor([x["A" if rule["std"] else "A_plain"] for x in responses], dtype=torch.float64)
    loss, clipped = gspo.policy_loss(rule["method"], log_w, torch.zeros_like(log_w), A, mask,
                                     rule["low"], rule["high"])
    return log_w, -loss.item(), clipped


@pytest.mark.parametrize("method", ["gspo", "grpo"])
@pytest.mark.parametrize("replay", [0, 1])
@pytest.mark.parametrize("step", range(9))
def test_the_page_has_the_ratios_and_the_clip_of_the_update(recorded, step, replay, method):
    scored, _, recording = recorded
    shown, scores = scored[2 * step + replay]
    mask = shown.response_mask
    logs = gspo.log_ratios(scores.logp, shown.logp_old, mask)
    ratio = (logs.log_s if method == "gspo" else logs.log_w).exp()
    for low in (3e-4, 1e-3, 0.02):
        rule = make_rule(step, low, method, replay)
        log_w, J, clipped = expected(recording, rule)
        assert_close(log_w, logs.log_w.double(), rtol=0, atol=0.51e-5)
        loss, clipped_then = gspo.policy_loss(method, scores.logp, shown.logp_old, shown.advantages,
                                              mask, low, rule["high"])
        assert abs(J + loss) < 1e-5
        on_the_edge = ((ratio - 1 - rule["high"]).abs() < 1e-5) | ((ratio - 1 + low).abs() < 1e-5)
        assert (clipped == clipped_then)[mask & ~on_the_edge].all()
        assert clipped[mask].any() == (step > 0) or low == 0.02


def test_the_groups_are_one_of_each_mini_batch(recorded):
    _, _, recording = recorded
    assert [group["mini_batch"] for group in recording["groups"]] == [1, 2, 3, 4]
    assert recording["turns"] == [1, 2, 3, 4] * 2


def test_the_page_loads_nothing_and_no_text_can_leave_its_place(recorded):
    _, html, recording = recorded
    committed = (HOUSE / "results" / "update.html").read_text(encoding="utf-8")
    for text in (html, committed):
        assert "http" not in text
        assert len(text.encode()) < 300_000
    assert page.page([recording | {"task": "</script><b>"}]).count("</script>") == 2


def test_one_command_writes_the_page_of_a_run(cold_starts):
    folder = cold_starts.parent / "run"
    page.main([str(folder), str(folder)])
    assert (folder / "update.html").read_text(encoding="utf-8").count('"task":"arithmetic"') == 2


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_functions_of_the_page_give_the_numbers_of_gspo(recorded, tmp_path):
    scored, html, recording = recorded
    cases = itertools.product((0, 1, 4, 8), (3e-4, 1e-3, 0.02), ("gspo", "grpo"), (0, 1), (0, 1))
    rules = [make_rule(*case) for case in cases]
    mathematics, = re.findall(r"(// ---- mathematics.*)// ---- the end", html, re.DOTALL)
    script = tmp_path / "numbers.js"
    script.write_text(f"""{mathematics}
const batch = {json.dumps(responses_of(recording))};
const numbers = {json.dumps(rules)}.map(rule => {{
  const judged = batch.map(response => judge(response, rule));
  const changes = batch.flatMap(x => x.tokens.map((_, t) => expertChange(x, rule.step, t)));
  return [objective(judged), judged.flat().map(x => x.silent), mean(changes)];
}});
console.log(JSON.stringify(numbers));""", encoding="utf-8")
    run = subprocess.run([NODE, script], capture_output=True, text=True, check=True)
    for rule, (J, silent, change) in zip(rules, json.loads(run.stdout), strict=True):
        shown, scores = scored[2 * rule["step"]]
        _, expected_J, clipped = expected(recording, rule)
        assert abs(J - expected_J) < 1e-9
        assert silent == clipped[shown.response_mask].tolist()
        routes = [predicting(shown, x.routes) for x in (shown, scores)]
        assert abs(change - expert_change(*routes).mean()) < 1e-6


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("method, replay, std", [("gspo", 0, 1), ("grpo", 1, 0)])
def test_the_sliders_move_the_numbers(recorded, tmp_path, method, replay, std):
    scored, _, recording = recorded
    deep = page.record(odd_trainer(n_layer=8, epochs=2))        # a second recording
    path = tmp_path / "update.html"
    path.write_text(page.page([recording, deep]), encoding="utf-8")
    _, J, clipped = expected(recording, make_rule(3, 0.01, method, replay, std))
    dom = dom_of(f"{path.as_uri()}#step=3&range=0.01&method={method}&replay={replay}&std={std}")
    shown = dict(re.findall(r'<output id="(\w+)" title="([^"]+)"', dom))
    assert abs(float(shown["objective"]) - J) < 1e-9
    assert abs(float(shown["silenced"]) * scored[0][0].lengths.sum() - clipped.sum()) < 1e-3
    tip, = re.findall(r'<p id="tip"[^>]*>(.*)</p>', dom_of(f"{path.as_uri()}#problem=5&step=99"))
    assert tip.count(" | ") == 7


def dom_of(address):
    """The page as its script has left it."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom")
    run = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr          # no error
    return run.stdout


def test_the_committed_page_is_made_of_the_template():
    template = (HOUSE / "lab" / "page.html").read_text(encoding="utf-8")
    before, after = template.split("RECORDINGS")
    committed = (HOUSE / "results" / "update.html").read_text(encoding="utf-8")
    assert committed.startswith(before) and committed.endswith(after)
