"""`pytest --slow` runs the slow cells of the notebooks, too."""
import pytest

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true',
                     help='run the cells that carry `#| slow`, too (about an hour on two cores)')

@pytest.fixture(scope='session')
def slow(pytestconfig): return pytestconfig.getoption('--slow')
