"""`pytest --slow` runs the slow cells of the notebooks, too; `pytest -n 2 --dist worksteal` takes two cores."""
import atexit, os, shutil, signal, tempfile
from itertools import islice

import pytest

# under `nohup` or `&` a shell has Ctrl-C ignored, for all programs that begin there; the tests press it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

# before torch is imported: two tests at a time don't share a core, and sums have one order
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')     # no test fetches weights, also where there is a network
if 'PYTEST_XDIST_WORKER' not in os.environ:      # or has some that were fetched before
    os.environ['HF_HUB_CACHE'] = tempfile.mkdtemp(prefix='no-weights-')
    atexit.register(shutil.rmtree, os.environ['HF_HUB_CACHE'], ignore_errors=True)

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true',
                     help='run the cells that carry `#| slow`, too (about an hour on two cores)')

def pytest_collection_modifyitems(items):
    """With several workers the notebooks come first, since they take longest: at the end no core waits for another

    Each worker begins with a stretch of the list, the notebooks of its share at the head.
    """
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    longest = [item for item in items if item.originalname == 'test_notebook']
    rest, ordered = iter([item for item in items if item not in longest]), []
    for i in range(workers):
        size, first = (len(items) - len(ordered))//(workers - i), longest[i::workers]
        ordered += first + list(islice(rest, max(size - len(first), 0)))
    items[:] = [*ordered, *rest]

@pytest.fixture(autouse=True)
def seeded():
    "Each test draws the same numbers, whatever ran before it in its process"
    import random
    import numpy as np
    import torch
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

@pytest.fixture(scope='session')
def slow(pytestconfig): return pytestconfig.getoption('--slow')

@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "Two classes of twelve pictures, every other one square, the others oblong; for reading only"
    import numpy as np
    from PIL import Image
    path, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for label, level in dict(dark=90, light=150).items():
        (path/label).mkdir()
        for i in range(12):
            shape = (28, 28, 3) if i % 2 else (60, 44, 3)
            Image.fromarray(rng.normal(level, 30, shape).clip(0, 255).astype(np.uint8)).save(path/label/f'{i:02}.png')
    return path

def _few_digits():
    "The digits with 256 images to train, for tests that don't ask how well a run does; not for other processes"
    from sklearn.utils import Bunch
    from vit_nbdev import data
    digits, n = data.load_digits(), 256 + 180 + 360
    few = Bunch(images=digits.images[:n], target=digits.target[:n])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, 'load_digits', lambda: few)
        yield

few_digits = pytest.fixture(_few_digits)
few_digits_in_module = pytest.fixture(scope='module')(_few_digits)

@pytest.fixture
def no_pictures(monkeypatch):
    "Runs of this process draw nothing, which takes longer than an epoch: for tests of what is trained and kept"
    from vit_nbdev import runs
    monkeypatch.setattr(runs, 'draw_pictures', lambda *args, **kwargs: {})
