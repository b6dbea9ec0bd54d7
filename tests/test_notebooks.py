"""Each notebook is a test: it runs from top to bottom, and its assertions hold."""
import ast, json, re, symtable
from pathlib import Path

import pytest
import torch

run_notebook = pytest.importorskip('nbdev.test', reason='nbdev runs the notebooks', exc_type=ImportError).test_nb

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('[!_.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook(path, slow, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')      # nbdev sets it as well, and would leave it
    monkeypatch.setenv('MPLBACKEND', 'agg')
    monkeypatch.syspath_prepend(ROOT)
    skip = (set() if slow else {'slow'}) | (set() if torch.cuda.is_available() else {'gpu'})
    passed, _ = run_notebook(path, skip_flags=skip)
    assert passed, f'a cell of {path.name} failed; the cell and its traceback are printed above'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_stored_outputs(path):
    "What a reader sees on GitHub: results, and no error among them"
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs, f'{path.name} is stored without outputs: run tools/run_notebooks.py'
    assert not [o for o in outputs if o['output_type'] == 'error']

class Generators(ast.NodeTransformer):
    "Comprehensions as generators: from Python 3.12 on the names in a comprehension count as those of its cell"
    def visit_ListComp(self, node):
        self.generic_visit(node)
        elt = node.elt if hasattr(node, 'elt') else ast.Tuple([node.key, node.value], ast.Load())
        return ast.GeneratorExp(elt, node.generators)
    visit_SetComp = visit_DictComp = visit_ListComp

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_slow_cells_leave_names_alone(path):
    "A cell that isn't slow reads what it would read without the slow cells before it: the tests run it without them"
    def names(source):
        tree = Generators().visit(ast.parse(re.sub(r'(?m)^[!%].*', '', source)))
        tables = [top := symtable.symtable(ast.unparse(tree), path.name, 'exec')]
        for t in tables: tables += t.get_children()
        read = {s.get_name() for t in tables for s in t.get_symbols()
                if s.is_referenced() and (t is top or s.is_global())}
        return {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}, read
    known, changed = set(), set()
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        flags = re.findall(r'(?m)^#\| (slow|gpu|eval: false)', source)
        if cell['cell_type'] != 'code' or 'eval: false' in flags: continue
        stored, read = names(source)
        if flags: changed |= stored & known
        else:
            assert not (wrong := changed & read - stored), f"{cell['id']} reads {wrong}, which a slow cell has changed"
            known, changed = known | stored, changed - stored

def test_results_page():
    "It shows every cell that begins with `#| result:`, under its caption, with the outputs that are stored now"
    read = lambda path: json.loads(path.read_text(encoding='utf-8'))['cells']
    text = ''.join
    shown = [o['data'] for c in read(ROOT/'nbs'/'results.ipynb') if c['cell_type'] == 'code' for o in c['outputs']]
    captions = [text(d['text/markdown']).strip('*') for d in shown if 'text/markdown' in d]
    measured = [(c, re.match(r'(?:#\|.*\n)*#\| result: (.*)', ''.join(c['source'])))
                for path in NOTEBOOKS if path.name != 'results.ipynb' for c in read(path) if c['cell_type'] == 'code']
    measured = {tag[1]: c for c, tag in measured if tag}
    assert len(measured) > 20 and set(measured) <= set(captions), 'run tools/run_notebooks.py nbs/results.ipynb'
    for caption, cell in measured.items():
        for output in cell['outputs']:
            kind = 'text/markdown' if 'text' in output else 'text/html'
            part = output['text'] if 'text' in output else output['data'].get('text/html', '')
            assert any(text(part) in text(d.get(kind, '')) for d in shown), f'{caption}: run nbs/results.ipynb again'

@pytest.mark.parametrize('ledger', sorted((ROOT/'nbs'/'studies').glob('*.jsonl')), ids=lambda p: p.name)
def test_ledger(ledger):
    "Each training tells its setting, one for each name, so that `trials` can refuse another under that name"
    from vit_nbdev.experiments import read_trials
    runs = read_trials(ledger)
    assert runs.setting.map(type).eq(str).all() and not runs.setting.str.contains('measured:').any()
    assert runs.groupby('name').setting.nunique().eq(1).all()
    assert not runs.duplicated(['name', 'seed']).any()
