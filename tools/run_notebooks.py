"""Run notebooks from top to bottom and store their outputs in place.

    python tools/run_notebooks.py                          every notebook, the slow cells too
    python tools/run_notebooks.py nbs/00_attention.ipynb   one of them
    python tools/run_notebooks.py --skip slow nbs/...      leave the slow cells, and their stored outputs, as they are

Each notebook runs in a process of its own, in its own folder. A cell that carries `#| eval: false` is left alone, as in
`nbdev_test`, and so is a `#| gpu` cell on a machine without CUDA. A notebook in which a cell fails is not written.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def settle(text):
    "What a terminal shows in the end of `text`: the last state of a line that a progress bar wrote again and again"
    lines = [(line.split('\r')[-1].rstrip(), '\r' in line) for line in ''.join(text).rstrip('\n').split('\n')]
    return [line + '\n' for line, rewritten in lines if line or not rewritten]

def run(path, skip):
    "Run one notebook; the outputs are written only if every cell succeeds"
    import torch
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.process import extract_directives
    skip = set(skip) | (set() if torch.cuda.is_available() else {'gpu'})
    nb = read_nb(path)
    shell = CaptureShell(path)
    # this checkout's library, wherever another is installed
    shell._run(f'import sys; sys.path.insert(0, {str(ROOT)!r})')
    os.chdir(path.parent)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != 'code': continue
        flags = extract_directives(cell, remove=False)
        if flags.get('eval:', [''])[0].lower() == 'false' or skip & flags.keys(): continue
        cell.outputs, start = [], time.time()
        shell.cell(cell)
        if shell.exc:
            print(f'{path.name}, cell {i}:\n{cell.source}\n{shell.prettytb(fname=path)}', file=sys.stderr)
            return 1
        if (seconds := time.time() - start) > 20 and not {'slow', 'gpu'} & flags.keys():
            print(f'{path.name}, cell {i} took {seconds:.0f} s: does it need `#| slow`?', file=sys.stderr)
        for out in cell.outputs:
            if 'text' in out: out['text'] = settle(out['text'])
        cell.outputs = [o for o in cell.outputs if o.get('text', True)]
    clean_nb(nb)
    with tempfile.NamedTemporaryFile('w', dir=path.parent, suffix='.tmp', delete=False) as tmp: pass
    write_nb(nb, tmp.name)
    os.chmod(tmp.name, 0o644)
    os.replace(tmp.name, path)
    return 0

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all under nbs/')
    parser.add_argument('--skip', metavar='FLAG', action='append', default=[],
                        help='leave cells with this flag as they are, such as slow')
    parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: sys.exit(run(args.notebooks[0].resolve(), args.skip))
    found = sorted(p for p in (ROOT/'nbs').rglob('[!_.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    notebooks = args.notebooks or found
    failed = []
    for path in notebooks:
        start = time.time()
        code = subprocess.run([sys.executable, __file__, '--one', str(path), *[f'--skip={flag}' for flag in args.skip]],
                              env={**os.environ, 'PYTHONWARNINGS': 'ignore'}).returncode
        print(f"{'failed' if code else 'ok':7}{time.time() - start:6.0f} s  {path}", flush=True)
        if code: failed.append(path)
    sys.exit(bool(failed))

if __name__ == '__main__': main()
