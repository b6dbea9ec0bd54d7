"""Held-out bugs: they are real, and what `diagnose` finds and misses among them today is written down.

`python tests/test_held_out.py` writes the table again, after a change of the detector. A bug for whose sake the
detector was changed moves to `planted_bugs.py` first.
"""
import functools
import json
from pathlib import Path

import pytest
import torch

import held_out_bugs as bugs
import planted_bugs
from vit_nbdev.diagnose import CHECKS, diagnose

RESULTS = Path(__file__).parent / 'held_out_results.json'
CONTRACT, REFERENCE = 'a contract', 'nothing that shows without a reference'

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

# ---- what is found ----

@functools.cache
def alarms(make, given):
    "What is worse than a note: `('check in module', ...)`. Many bugs have one corrected model, which is looked at once"
    report = diagnose(built(make), **given(), show=False)
    found = tuple(f'{f.check} in {f.module or "the model"}' for f in report if f.severity != 'note')
    assert bool(report) is not bool(found)
    return found

def result(bug):
    found, false = alarms(bug.make, bug.given), alarms(bug.right, bug.given)
    return dict(breaks=CONTRACT if bug.check else REFERENCE,
                expected=bug.check and f'{bug.check} in {bug.module or "the model"}',
                verdict='found' if found else 'missed', alarms=list(found), false_alarms=list(false))

@pytest.fixture(scope='module')
def table(): return json.loads(RESULTS.read_text(encoding='utf-8'))

DRAWN = 'fused attention drops at inference', 'dropout made in forward'   # what else they set off is drawn

@pytest.mark.parametrize('bug', bugs.CATALOGUE, ids=lambda b: b.name)
def test_the_written_verdict_is_reproduced_and_the_corrected_model_is_healthy(bug, table):
    now, then = result(bug), table[bug.name]
    if bug.name in DRAWN:
        assert set(now['alarms']) <= set(then['alarms'])
        now, then = ({**r, 'alarms': r['alarms'][:1]} for r in (now, then))
    assert now == then, 'the detector sees it differently now: if for the better, write the table again'
    assert now['false_alarms'] == []

def test_the_table_keeps_its_misses(table):
    assert list(table) == [b.name for b in bugs.CATALOGUE]
    found = {kind: [r['verdict'] for r in table.values() if r['breaks'] == kind] for kind in (CONTRACT, REFERENCE)}
    assert {k: (v.count('found'), len(v)) for k, v in found.items()} == {CONTRACT: (28, 33), REFERENCE: (4, 19)}

if __name__ == '__main__':
    torch.set_num_threads(1)
    RESULTS.write_text(json.dumps({b.name: result(b) for b in bugs.CATALOGUE}, indent=1) + '\n', encoding='utf-8')
