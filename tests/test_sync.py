"""What is made from the notebooks is what the notebooks make."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest

pytest.importorskip('nbdev', reason='nbdev exports the notebooks', exc_type=ImportError)

ROOT = Path(__file__).parent.parent
ENV = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # nbdev_export does nothing while it is set

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project without its modules"
    path = tmp_path_factory.mktemp('copy')
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'): shutil.copy(ROOT/name, path/name)
    shutil.copytree(ROOT/'nbs', path/'nbs', ignore=shutil.ignore_patterns('.*', '_*'))
    return path

def nbdev(command, cwd):
    done = subprocess.run([Path(sys.executable).parent/command], cwd=cwd, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def modules(path): return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob('*.py')}

def test_export(copy):
    "The modules are byte for byte what nbdev_export makes: none edited by hand, none left over"
    nbdev('nbdev_export', copy)
    made, here = modules(copy/'vit_nbdev'), modules(ROOT/'vit_nbdev')
    assert sorted(made) == sorted(here)
    assert [name for name in made if made[name] != here[name]] == []
    assert (copy/'pyproject.toml').read_bytes() == (ROOT/'pyproject.toml').read_bytes()

def test_clean(copy):
    "nbdev_clean finds nothing to clean"
    nbdev('nbdev_clean', copy)
    for path in (copy/'nbs').rglob('*.ipynb'):
        assert path.read_bytes() == (ROOT/path.relative_to(copy)).read_bytes(), f'{path.name}: run nbdev_clean'

def test_readme():
    subprocess.run([sys.executable, 'tools/make_readme.py', '--check'], cwd=ROOT, check=True)

def test_run_notebooks_keeps_a_failing_notebook(tmp_path):
    "The tool that stores outputs: a good notebook gets them, one with an error is left as it was"
    from execnb.nbio import mk_cell, new_nb, read_nb, write_nb
    for name, source in dict(good='2*3', bad='1/0').items():
        write_nb(new_nb([mk_cell('x = 1'), mk_cell(source)]), tmp_path/f'{name}.ipynb')
    before = (tmp_path/'bad.ipynb').read_bytes()
    command = [sys.executable, ROOT/'tools'/'run_notebooks.py', tmp_path/'good.ipynb', tmp_path/'bad.ipynb']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and 'ZeroDivisionError' in done.stderr
    assert read_nb(tmp_path/'good.ipynb').cells[1].outputs[0]['data']['text/plain'] == ['6']
    assert (tmp_path/'bad.ipynb').read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.ipynb', 'good.ipynb']
