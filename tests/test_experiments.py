"""Comparisons of trainings, where some have no result."""
import numpy as np
import pandas as pd

from vit_nbdev.experiments import answers, compare

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
