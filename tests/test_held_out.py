"Held-out bugs: they are real, and what `diagnose` finds and misses among them today is written down"
import json
from pathlib import Path

import pytest
import torch

import held_out_bugs as bugs
import planted_bugs
from vit_nbdev.diagnose import CHECKS, diagnose

RESULTS = Path(__file__).parent / 'held_out_results.json'

@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def built(make):
    torch.manual_seed(0)
    return make()

def call(model, x, arrange=lambda t: t):
    if isinstance(x, dict): return model(**{k: arrange(t) for k, t in x.items()})
    return model(arrange(x))

def outputs(model, given):
    "Outputs at inference, of another batch, in training, and after a step of SGD"
    x = given['x']
    outs = [call(model.eval(), x), call(model, x, lambda t: t.flip(0))]
    torch.manual_seed(0)
    outs.append(call(model.train(), x))
    given['loss_func'](outs[-1], given['y']).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None: p -= 0.1 * p.grad
    return [*outs, call(model.eval(), x)]

def losses(model, given, steps=10):
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    found = []
    for _ in range(steps):
        loss = given['loss_func'](call(model, given['x']), given['y'])
        opt.zero_grad()
        loss.backward()
        opt.step()
        found.append(loss.item())
    return found

# ---- the bugs are real ----

@pytest.mark.parametrize('bug', bugs.CATALOGUE, ids=lambda b: b.name)
def test_bug_trains_and_differs_from_the_corrected_model_with_the_same_weights(bug):
    wrong, right = built(bug.make), built(bug.right)
    weights, given = right.state_dict(), bug.given()
    shared = {k: w for k, w in wrong.state_dict().items() if k in weights and weights[k].shape == w.shape}
    right.load_state_dict(shared, strict=False)
    assert shared and bug.source and bug.module in dict(wrong.named_modules())
    pairs = [(a - b).abs().max().item() for a, b in zip(outputs(wrong, given), outputs(right, given), strict=True)]
    assert max(pairs) > 1e-3
    fell = losses(built(bug.make), given)
    assert fell[-1] < 0.9 * fell[0]

def test_the_catalogue_holds_both_kinds_and_no_planted_bug():
    names = [b.name for b in bugs.CATALOGUE]
    assert len(set(names) - {b.name for b in planted_bugs.CATALOGUE}) == len(names) == 52
    assert {b.check for b in bugs.CATALOGUE} <= {'', *CHECKS} and sum(not b.check for b in bugs.CATALOGUE) == 19
