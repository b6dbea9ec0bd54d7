"""Comparisons of trainings, where some have no result; and the ledger of them."""
import numpy as np
import pandas as pd
import pytest

from vit_nbdev.experiments import answers, compare, paired, read_trials, trials

def test_a_pair_is_two_results():
    "A training without one makes none, and nothing is said of fewer than two pairs"
    results = dict(a=(90., np.nan, 93.), b=(91., 92., 95.), c=(90., np.nan, np.nan))
    rows = [dict(name=n, seed=i, accuracy=x, seconds=1.) for n, xs in results.items() for i, x in enumerate(xs)]
    runs = pd.DataFrame(rows)
    found, table = answers(runs, {'two': ('a', 'b'), 'one': ('c', 'b')}), compare(runs, to='b')
    assert found.pairs.tolist() == [2, 1]
    columns = ['difference', '95 % interval', 'detectable', 'verdict']
    assert found.loc['one', columns].tolist() == table.loc['c', columns].tolist() == ['']*4
    assert found.loc['two', columns].tolist() == table.loc['a', columns].tolist()
    assert answers(runs, {'one': ('c', 'b')}).pairs.tolist() == [1]
    untimed = runs.assign(seconds=runs.seconds.where(runs.name != 'a'))
    assert answers(untimed, {'two': ('a', 'b')})['least seconds'].tolist() == ['–, 1']

def test_pairs_that_are_all_equal():
    "They have no spread, so nothing is known of what could have been seen"
    rows = [dict(name=n, seed=i, accuracy=100., seconds=1.) for n in 'ab' for i in range(5)]
    table = compare(pd.DataFrame(rows), to='b')
    assert table.loc['a'].tolist() == ['100.00 ± 0.00', 5, '+0.00', '', '', 'all equal']
    assert paired([1., 2.], [1., 2.]).verdict == 'all equal' and paired([1., 2.], [0., 1.]).verdict == 'not resolved'
    assert str(paired([1.]*5, [1.]*5)) == '+0.00 (5 pairs): all equal'

# --- the ledger ---

def double(seed, x): return dict(loss=2*x + seed)

def test_a_last_line_without_an_end_is_whole(tmp_path):
    "An editor may leave it so; the next one does not join it"
    file = tmp_path/'trials.jsonl'
    trials(double, dict(a=dict(x=1)), file, seeds=range(2))
    file.write_text(file.read_text().rstrip())
    assert trials(double, dict(a=dict(x=1)), file, seeds=range(3)).loss.tolist() == [2, 3, 4]

def test_a_ledger_that_cant_be_written_is_said_before_training(tmp_path):
    with pytest.raises(FileNotFoundError): trials(None, dict(a=dict(x=1)), tmp_path/'no'/'trials.jsonl')

def test_what_train_gives_does_not_take_the_place_of_the_name(tmp_path):
    "Or its line would be that of another setting, and the training done again for ever"
    file = tmp_path/'trials.jsonl'
    with pytest.raises(ValueError, match="train gives 'name', a column that the ledger has itself"):
        trials(lambda seed, x: dict(name='S/16', loss=x), dict(a=dict(x=1)), file)
    runs = trials(lambda seed, x: dict(seed=seed, loss=x), dict(a=dict(x=1)), file, seeds=range(2))
    assert runs.seed.tolist() == [0, 1]

def test_another_process_that_writes_other_settings_is_noticed(tmp_path):
    file = tmp_path/'trials.jsonl'
    def train(seed, x):
        if not seed: trials(double, dict(a=dict(x=10)), file, seeds=[1])
        return double(seed, x)
    with pytest.raises(ValueError, match='with other settings'): trials(train, dict(a=dict(x=1)), file, seeds=range(2))

def test_lines_that_an_editor_leaves_while_others_train(tmp_path):
    "A blank one is none; a last one that is open gets its end, and nothing is lost"
    file = tmp_path/'trials.jsonl'
    def train(seed, x):
        if file.read_text(): file.write_text(file.read_text().rstrip() if seed == 1 else file.read_text() + '\n')
        return double(seed, x)
    assert trials(train, dict(a=dict(x=1)), file, seeds=range(4)).loss.tolist() == [2, 3, 4, 5]

def test_two_processes_share_a_ledger(tmp_path):
    "What the other one has done meanwhile is not trained again; what both have done counts once"
    file, begun = tmp_path/'trials.jsonl', []
    def train(seed, x):
        begun.append(seed)
        if len(begun) == 1: trials(double, dict(a=dict(x=1)), file, seeds=range(2))      # the other process
        return double(seed, x)
    runs = trials(train, dict(a=dict(x=1)), file, seeds=range(3))
    assert begun == [0, 2] and runs.seed.tolist() == [0, 1, 2]
    file.write_text(file.read_text()*2)               # each was done by both
    assert compare(read_trials(file), to='a', value='loss').n.tolist() == [3]
    trials(double, dict(a=dict(x=2)), tmp_path/'other.jsonl', seeds=range(1))
    file.write_text(file.read_text() + (tmp_path/'other.jsonl').read_text())
    with pytest.raises(ValueError, match="has 'a' with other settings"): trials(double, dict(a=dict(x=1)), file)

def test_a_name_that_no_line_can_hold(tmp_path):
    def never(seed): raise AssertionError('trained')
    with pytest.raises(TypeError, match="can't be a setting's name: use text or a number"):
        trials(never, {('S/16', 0.1): {}}, tmp_path/'ledger.jsonl')
    assert not list(tmp_path.iterdir())
