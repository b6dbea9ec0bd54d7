"""`pytest --slow` runs the slow cells of the notebooks, too; `pytest -n 2 --dist worksteal` takes two cores."""
import os

import pytest

# before torch is imported: two tests at a time don't share a core, and sums have one order
os.environ.setdefault('OMP_NUM_THREADS', '1')

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true',
                     help='run the cells that carry `#| slow`, too (about an hour on two cores)')

@pytest.fixture(scope='session')
def slow(pytestconfig): return pytestconfig.getoption('--slow')
