"""`pytest --slow` runs the slow cells of the notebooks, too."""
import os

# Two OpenMP threads that spin for each other on a core that is busy with something else are many times slower than one.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

import pytest

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the cells that carry `#| slow`, too (about two hours on two cores)')

@pytest.fixture(scope='session')
def slow(pytestconfig): return pytestconfig.getoption('--slow')
