"""Write README.md from nbs/index.ipynb (nbdev's own command for it needs Quarto, which is no Python package).

    python tools/make_readme.py           write README.md and its pictures in nbs/images/
    python tools/make_readme.py --check   change nothing; exit 1 if they are not what the notebook makes

The directives `hide`, `echo: false`, `output: false` and `fig-alt` do what they do in nbdev's own pages.
"""
import argparse, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 'nbs/images'
HEAD = '<!-- made from nbs/index.ipynb by tools/make_readme.py: edit the notebook -->\n\n'

def render():
    "`{path from the root: bytes}` of README.md and the pictures in it"
    from execnb.nbio import nb2str, read_nb
    from nbconvert import MarkdownExporter
    from nbdev.process import extract_directives
    from nbformat import reads
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    cells, alts = [], []
    for cell in nb.cells:
        flags = extract_directives(cell, remove=True) if cell.cell_type == 'code' else {}
        if cell.cell_type == 'raw' or 'hide' in flags: continue
        if flags.get('output:', [''])[0].lower() == 'false': cell.outputs = []
        if flags.get('echo:', [''])[0].lower() == 'false': cell.source = ''
        if cell.cell_type == 'code':
            alts += [' '.join(flags.get('fig-alt:', []))]*sum('image/png' in o.get('data', {}) for o in cell.outputs)
            for out in cell.outputs: out.get('data', {}).pop('text/html', None)   # GitHub shows the plain form
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = dict(name='python')     # for the colours of the code
    body, resources = MarkdownExporter().from_notebook_node(
        reads(nb2str(nb), as_version=4), resources={'output_files_dir': PICTURES, 'unique_key': 'readme'})
    body = re.sub(r'```(python)?\n\n```\n', '', body)        # what `echo: false` leaves behind
    # links are seen from the root here
    body = re.sub(r'\]\(((?:images/|studies/)?[\w.-]+\.(?:ipynb|png))\)', r'](nbs/\1)', body)
    alts = iter(alts)
    body = re.sub(r' *\n!\[png\]\((.*?)\)\n *', lambda found: f'\n![{next(alts)}]({found[1]})\n', body)
    while '\n\n\n' in body: body = body.replace('\n\n\n', '\n\n')
    return {'README.md': (HEAD + body.strip() + '\n').encode(), **resources['outputs']}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args()
    files = render()
    stale = [name for name, data in files.items() if not (ROOT/name).exists() or (ROOT/name).read_bytes() != data]
    if args.check:
        if stale: sys.exit(f"not what nbs/index.ipynb makes: {', '.join(stale)}; run python tools/make_readme.py")
        return
    for name in stale:
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/name).write_bytes(files[name])
    print(f"wrote {', '.join(stale) or 'nothing, all was in place'}")

if __name__ == '__main__': main()
