"""The wheel holds everything, and the library runs with old and new fastai, and without what it does not need."""
import os, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = '''
import os, random, signal, sys, warnings
import accelerate, fastai.vision.all, fastcore, torch      # what these change is theirs
def switches():
    "What an import could change for the whole process"
    numbers = [getattr(torch, name)() for name in ("get_num_threads", "get_num_interop_threads", "get_default_dtype",
               "get_float32_matmul_precision", "are_deterministic_algorithms_enabled", "initial_seed")]
    return numbers, random.getstate(), signal.getsignal(signal.SIGINT), dict(os.environ), warnings.filters[:]
before = switches()
import vit_nbdev.cli, vit_nbdev.export, vit_nbdev.serve, vit_nbdev.diagnose
assert switches() == before, "importing the library changed a switch"
from vit_nbdev.runs import train, predict
run = train(epochs=1, device="cpu", out=sys.argv[1])
files = sorted((run/"samples").glob("*.png"))
assert len(predict(run, files)) == len(files) == 8
import vit_nbdev
print("fastcore", fastcore.__version__, "fastai", fastai.__version__, "from", vit_nbdev.__file__)
'''

PAGE = '''
import torch
from vit_nbdev.interpret import explore
from vit_nbdev.vit import vit
page = explore(vit("digits"), torch.randn(2, 1, 8, 8), "page.html")
assert "</html>" in page and page._repr_html_().startswith("<iframe")
import vit_nbdev
print("from", vit_nbdev.__file__)
'''

def run(*args, cwd=ROOT, **env):
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy"
    out = tmp_path_factory.mktemp('wheel')
    run('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, source_of(tmp_path_factory))
    return next(out.glob('*.whl'))

@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    "A folder in which the wheel is installed"
    site = tmp_path_factory.mktemp('installed')
    run('-m', 'pip', 'install', '-q', '--no-deps', '--target', site, wheel)
    return site

def source_of(tmp_path_factory):
    "A copy of what belongs to the project, so that nothing left lying about gets in"
    source = tmp_path_factory.mktemp('source')
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, source/name)
    shutil.copytree(ROOT/'vit_nbdev', source/'vit_nbdev', ignore=shutil.ignore_patterns('__pycache__'))
    return source

def files_of_the_package():
    "The modules and the pages, as a wheel names them"
    assets = (ROOT/'vit_nbdev'/'assets').iterdir()
    return {p.relative_to(ROOT).as_posix() for p in [*(ROOT/'vit_nbdev').glob('*.py'), *assets]}

def test_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        assert files_of_the_package() == {n for n in names if n.startswith('vit_nbdev/')}
        assert {'vit_nbdev/assets/explorer.html', 'vit_nbdev/assets/report.css'} <= names
        info = next(n.split('/')[0] for n in names if n.endswith('.dist-info/METADATA'))
        meta = message_from_bytes(z.read(f'{info}/METADATA'))
        scripts = ConfigParser()
        scripts.read_string(z.read(f'{info}/entry_points.txt').decode())
        assert any(n.endswith('LICENSE') for n in names)
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    assert meta['Version'] == config['DEFAULT']['version'] and meta['License-Expression'] == 'Apache-2.0'
    readme, url = meta.get_payload(), config['DEFAULT']['git_url']
    assert f']({url}/raw/main/nbs/images/' in readme and f']({url}/blob/main/nbs/00_attention.ipynb)' in readme
    assert '](nbs/' not in readme
    commands = ('vit_train', 'vit_predict', 'vit_explain', 'vit_export', 'vit_serve')
    assert dict(scripts['console_scripts']) == {name: f'vit_nbdev.cli:{name}' for name in commands}
    needed = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert len(needed) == len(config['DEFAULT']['requirements'].split())
    assert not any(r.startswith(('nbdev', 'execnb', 'pytest')) for r in needed), needed
    sources = [*(ROOT/'vit_nbdev').glob('*.py'), *(ROOT/'nbs').glob('*.ipynb'), *ROOT.glob('*.md')]
    found = [re.findall(r'vit_nbdev\[([a-z,]+)\]', path.read_text(encoding='utf-8')) for path in sources]
    named = {name for path in found for extras in path for name in extras.split(',')}
    assert {'hub', 'onnx', 'datasets'} <= named
    assert named | {'tensorboard', 'wandb'} <= set(meta.get_all('Provides-Extra')), 'pip would install nothing'

def test_sdist_is_complete(tmp_path_factory):
    "What a wheel can be built from again"
    source = source_of(tmp_path_factory)
    run('setup.py', '-q', 'sdist', cwd=source)
    with tarfile.open(next((source/'dist').glob('*.tar.gz'))) as tar:
        names = {name.split('/', 1)[-1] for name in tar.getnames()}
    assert files_of_the_package() | {'settings.ini', 'setup.py'} <= names

def test_page_from_the_wheel(wheel, tmp_path):
    "The package finds its pages from inside the zipped wheel, too"
    assert f'from {wheel}' in run('-c', PAGE, cwd=tmp_path, PYTHONPATH=str(wheel))

def test_wheel_works_without_nbdev(site, tmp_path):
    "The library and its pages from the wheel, not from this folder, with an nbdev that can't be imported"
    (tmp_path/'nbdev.py').write_text('raise ImportError("nbdev must not be needed")')
    out = run('-c', TRAIN + PAGE, tmp_path/'run', cwd=tmp_path, PYTHONPATH=f'{tmp_path}{os.pathsep}{site}')
    assert out.count(f'from {site}') == 2 and (tmp_path/'page.html').is_file()

def test_newest_fastai_and_fastcore(wheel, tmp_path):
    "The development set has fastcore 1, which nbdev 2 needs; the library must run with the newest as well"
    if not find_spec('fasthtml'): pytest.skip('needs fasthtml, which the newest fastprogress imports')
    newest = ['fastai', 'fastcore>=2', 'fasttransform', 'fastprogress', 'plum-dispatch<2.10']
    install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path/'site']
    got = subprocess.run([*install, wheel, *newest], capture_output=True, text=True)
    if got.returncode: pytest.skip(f'the newest fastai can not be had here: {got.stderr.strip().splitlines()[-1]}')
    out = run('-c', TRAIN, tmp_path/'run', cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert str(tmp_path/'site') in out and 'fastcore 2.' in out
    asked = 'parser().parse_args("--img_size 28 --skip-bad".split())'
    script = f'from vit_nbdev.cli import vit_train; print(vit_train.{asked})'
    out = run('-c', script, cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert 'img_size=28' in out and 'skip_bad=True' in out

LIGHT = {    # a module, and what it must not import; those that may import least come first
    'diagnose': {'fastai', 'fastcore', 'torchvision', 'matplotlib'},
    'vit': {'fastai', 'torchvision', 'accelerate', 'matplotlib', 'sklearn', 'scipy', 'pandas', 'PIL', 'IPython',
            'nbdev'},
    'interpret': {'fastai', 'matplotlib', 'sklearn', 'torchvision', 'pandas', 'IPython'},
    'pretrained': {'fastai', 'timm', 'transformers', 'torchvision', 'huggingface_hub', 'matplotlib', 'sklearn',
                   'scipy'},
}

def test_light_imports():
    """The model costs little more to import than torch: it does not wait for fastai, matplotlib and the like

    `fastcore.basics`, for `patch`, is allowed: it needs the standard library only, and takes milliseconds. The rest of
    fastcore is not. One process imports the modules in turn, so that it imports torch once.
    """
    script = '''
import sys
from importlib import import_module
for name, heavy in eval(sys.argv[1]).items():
    import_module(f"vit_nbdev.{name}")
    loaded = heavy & set(sys.modules)
    if name == "vit":
        loaded |= {m for m in sys.modules if m.startswith("fastcore.")} - {"fastcore.imports", "fastcore.basics"}
    assert not loaded, (name, sorted(loaded))
'''
    run('-c', script, repr(LIGHT))
