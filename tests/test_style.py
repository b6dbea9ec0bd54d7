"""The house style, as far as a machine can see it: lines, cells, and ruff's rules (pyproject.toml has the reasons)."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH, LENGTH = 120, 40
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('[!_.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SCRIPTS = sorted([ROOT/'setup.py', *(ROOT/'tests').glob('*.py'), *(ROOT/'tools').glob('*.py')])

# Not conforming yet: notebooks (with their modules) and tests. A name must go as soon as its file conforms.
LINES_TO_DO = set()
RUFF_TO_DO = set()

def name(path): return path.relative_to(ROOT).as_posix()

def module(notebook):
    "The module that this notebook exports, if it exports one"
    found = re.search(r'#\| *default_exp +([\w.]+)', notebook.read_text(encoding='utf-8'))
    return ROOT/'vit_nbdev'/f'{found[1].replace(".", "/")}.py' if found else None

def sources(path):
    "`(where, source)` of a script, or of each code cell of a notebook and of its module"
    if path.suffix == '.py':
        text = path.read_text(encoding='utf-8')
        text = re.sub(r'^__all__ = \[.*?\]$', '', text, flags=re.M | re.S)   # nbdev wraps it its own way
        return [(name(path), text)]
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = [(f'{name(path)}, cell {c["id"]}', ''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    return code + (sources(module(path)) if module(path) else [])

def too_long(source):
    "Is this an exported cell of more than 40 lines that doesn't say why at its head?"
    lines = source.strip().split('\n')
    directives = [line for line in lines if line.startswith('#|')]
    exported = any(re.match(r'#\| *exports?\b', line) for line in directives)
    head = '\n'.join(lines[len(directives):])
    return exported and len(lines) > LENGTH and not re.match(rf'# longer than {LENGTH} lines: \w', head)

def faults(path):
    "Lines and cells that are too long"
    for where, source in sources(path):
        for line in source.split('\n'):
            if len(line) > WIDTH: yield f'{where}: {len(line)} characters: {line.strip()[:60]} ...'
        if path.suffix == '.ipynb' and not where.endswith('.py') and too_long(source):
            yield f'{where}: over {LENGTH} lines; split it, or begin it with "# longer than {LENGTH} lines: why"'

def files(to_do):
    "Each notebook and script; one that doesn't conform yet is expected to fail, and must fail"
    def param(path):
        todo = pytest.mark.xfail(strict=True, reason='does not conform yet')
        return pytest.param(path, id=name(path), marks=[todo] if name(path) in to_do else [])
    return [param(path) for path in NOTEBOOKS + SCRIPTS]

@pytest.mark.parametrize('path', files(LINES_TO_DO))
def test_lines_and_cells(path):
    found = list(faults(path))
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('path', files(RUFF_TO_DO))
def test_ruff(path):
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])  # a venv may not be active
    ruff = shutil.which('ruff', path=beside)
    if ruff is None: pytest.skip("ruff is not installed: pip install -e '.[dev]' brings it")
    checked = [path] + ([module(path)] if path.suffix == '.ipynb' and module(path) else [])
    command = [ruff, 'check', '--no-cache', '--ignore', 'E501', '--output-format', 'concise', *checked]   # lines: above
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_which_cells_are_too_long():
    body = '\n'.join(f'x{i} = {i}' for i in range(LENGTH))
    assert too_long(f'#| export\n{body}')
    assert too_long(f'#| export\n# longer than {LENGTH} lines:\n{body}')
    assert not too_long(f'#| export\n# longer than {LENGTH} lines: a table\n{body}')
    assert not too_long(f'#| slow\n{body}') and not too_long('#| export')
