"""Build the documentation site from the notebooks as they are, with their stored outputs: nothing is executed.

    python tools/make_site.py            write it to _site/
    python tools/make_site.py --out DIR  or elsewhere

Chapters and studies become pages, each module gets a page of its API, and names in backticks lead there. All links are
checked at the end. It needs the extra `site`; formulas are drawn by MathJax, which npm fetches, so that the site works
without a network.
"""
import argparse, html, importlib, inspect, json, re, shutil, subprocess, sys, tempfile, time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # this checkout's library, wherever another is installed
MATHJAX = 'mathjax@3.2.2'
DIRECTIVE = re.compile(r'^#\|.*\n?', flags=re.M)
COMMON_WORDS = {'train', 'predict', 'explain'}    # in backticks they may well be a folder, or another library's method
CONF = '''
project, author, copyright = 'vit_nbdev', 'vit_nbdev developers', '2026, vit_nbdev developers'
extensions = ['myst_nb', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath', 'amsmath', 'html_image']
myst_heading_anchors = 4
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'misc.highlighting_failure']
html_theme, html_title, html_static_path = 'sphinx_book_theme', 'vit_nbdev', ['_static']
html_show_sourcelink = html_copy_source = False
html_css_files = ['site.css']
html_theme_options = dict(
    repository_url={url!r}, repository_branch='main', path_to_docs='nbs', use_repository_button=True,
    use_download_button=False, navbar_persistent=[], home_page_in_toc=True, show_toc_level=2,
    launch_buttons=dict(colab_url='https://colab.research.google.com', binderhub_url='https://mybinder.org'))
'''
CSS = '''
.cell_output .output { overflow-x: auto; }
.cell_output img, div.math svg { max-width: 100%; height: auto; }
.cell_output table.dataframe { margin-bottom: 1.5rem; }
.highlight pre { font-size: .8rem; }
a.api code { text-decoration: underline dotted; }
div.math { overflow-x: auto; }
code.literal, h1, h2, h3 { overflow-wrap: anywhere; }
code.literal span.pre { white-space: normal; }
td code.literal { overflow-wrap: normal; }
.prev-next-info { min-width: 0; overflow-wrap: anywhere; }
'''

def settings():
    "Names and addresses from settings.ini"
    from configparser import ConfigParser
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def notebooks():
    "Pages in reading order: chapters, then what belongs to them, then studies"
    chapters = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
    others = [p for p in sorted((ROOT/'nbs').glob('*.ipynb')) if p not in chapters and p.name != 'index.ipynb']
    return dict(Chapters=chapters, More=others, Studies=sorted((ROOT/'nbs'/'studies').glob('*.ipynb')))

def exported():
    "`{name: address of its entry}` of what the modules export"
    from vit_nbdev._modidx import d
    return {name.split('.', 2)[2]: page for symbols in d['syms'].values() for name, (page, _) in symbols.items()
            if name.count('.') == 2 and not name.split('.')[2].startswith('_')}

def link_names(text, names, up):
    "Markdown whose names in backticks lead to the API; code blocks and links stay as they are"
    def entry(found):
        name = found[1].removesuffix('()')
        if name not in names or name in COMMON_WORDS: return found[0]
        return f'<a class="api" href="{up}{names[name]}"><code>{html.escape(found[1])}</code></a>'
    parts = re.split(r'(```.*?```|\[[^\]]*\]\([^)]*\)|^#+ [^\n]*$)', text, flags=re.S | re.M)
    return ''.join(p if i % 2 else re.sub(r'(?<!`)`([\w.]+(?:\(\))?)`(?!`)', entry, p) for i, p in enumerate(parts))

def repository_links(text, folder, url):
    "Links to files of the repository that are no pages lead to the repository"
    def leads(found):
        target = (folder/found[2].split('#')[0]).resolve()
        if not found[2] or re.match(r'\w+:|#', found[2]) or not target.exists(): return found[0]
        if target.is_relative_to(ROOT/'nbs') and target.suffix in ('.ipynb', '.png', '.svg'): return found[0]
        return f'{found[1]}({url}/blob/main/{target.relative_to(ROOT)})'
    return re.sub(r'(\])\(([^)\s]*)\)', leads, text)

def pictures_in_words(cells):
    "Give each picture its alternative text: the cell's own `fig-alt`, or the caption in italics behind it"
    for cell, behind in zip(cells, [*cells[1:], dict(source='')]):
        if not any('image/png' in out.get('data', {}) for out in cell.get('outputs', [])): continue
        alt = re.search(r'^#\| fig-alt: (.*)', ''.join(cell['source']), flags=re.M)
        alt = alt or re.match(r'\*(?:What to see: )?([^*]+)\*', ''.join(behind['source']))
        alt = ' '.join(alt[1].split()) if alt else 'what the code above draws; the text below says what it shows'
        cell['metadata']['mystnb'] = dict(image=dict(alt=alt))

def page(path, names, url):
    "A notebook as the site shows it, without directives and hidden cells"
    nb, kept = json.loads(path.read_text(encoding='utf-8')), []
    up = '../'*len(path.relative_to(ROOT/'nbs').parent.parts)
    pictures_in_words(nb['cells'])
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        flags = {line[2:].split(':')[0].strip() for line in DIRECTIVE.findall(source)}
        if cell['cell_type'] == 'raw' or 'hide' in flags: continue
        if cell['cell_type'] == 'code':
            cell['source'] = DIRECTIVE.sub('', source).strip('\n')
            if '#| output: false' in source: cell['outputs'] = []
            if '#| echo: false' in source: cell['metadata']['tags'] = ['remove-input']
            if not cell['source']: continue
        else: cell['source'] = link_names(repository_links(source, path.parent, url), names, up)
        kept.append(cell)
    nb['cells'] = kept
    return json.dumps(nb)

def signature(path, thing):
    "`name(parameters)` as code, a line each if there are many"
    try: parameters = inspect.signature(thing)
    except (TypeError, ValueError): return path
    bare = partial(re.sub, r"<(?:function|class) '?([\w.]+)'?(?: at 0x\w+)?>", r'\1')
    shown = [bare(str(p)) for p in parameters.parameters.values()]
    gives = parameters.return_annotation
    gives = '' if gives is inspect.Signature.empty else f' -> {inspect.formatannotation(gives)}'
    line = f"{path}({', '.join(shown)}){gives}"
    if len(line) <= 80: return line
    return f'{path}(\n' + ''.join(f'    {p},\n' for p in shown) + f'){gives}'

def parameter_table(thing):
    "Markdown table of the comments behind parameters; empty if there is none"
    try: found = docments(thing, full=True, returns=True)
    except (TypeError, ValueError): return ''
    label = lambda name: 'returns' if name == 'return' else f'`{name}`'
    rows = [(label(name), p.docment) for name, p in found.items() if p.get('docment')]
    if not rows: return ''
    escape = lambda text: ' '.join(text.split()).replace('|', '\\|')
    return '\n'.join(['| parameter | |', '|---|---|', *[f'| {name} | {escape(text)} |' for name, text in rows], ''])

def api_page(module):
    "Markdown of what a module exports: signature, docstring, and a table of its parameters"
    from vit_nbdev._modidx import d
    url, name = settings()['git_url'], module.__name__.split('.')[-1]
    lines = [f'# {module.__name__}', '', module.__doc__ or '', '']
    def entry(path, thing, level):
        anchor = d['syms'][module.__name__].get(f'{module.__name__}.{path}', (f'#{path.lower()}',))[0].split('#')[1]
        source = f'[source]({url}/blob/main/vit_nbdev/{name}.py#L{inspect.getsourcelines(thing)[1]})'
        lines.extend([f'<a id="{anchor}"></a>', '', f'{"#"*level} {path}', '',
                      '```python', signature(path, thing), '```', '',
                      f'{(inspect.getdoc(thing) or "").strip()} ({source})', '', parameter_table(thing)])
    for path in sorted(getattr(module, '__all__', []), key=str.lower):
        thing = getattr(module, path)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)): continue
        entry(path, thing, 2)
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(function) and not method.startswith('_') and function.__doc__:
                entry(f'{path}.{method}', function, 3)
    return '\n'.join(lines)

def front_page(groups, modules, names, url):
    "The notebook of the front page, with the table of contents behind it"
    nb = json.loads(page(ROOT/'nbs'/'index.ipynb', names, url))
    def tree(caption, entries):
        return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *entries, '```', ''])
    entry = lambda path: str(path.relative_to(ROOT/'nbs').with_suffix(''))
    trees = [tree(caption, map(entry, paths)) for caption, paths in groups.items()]
    trees.append(tree('API', modules))
    nb['cells'].append(dict(cell_type='markdown', id='contents', metadata={}, source='\n'.join(trees)))
    return json.dumps(nb)

def mathjax(folder):
    "Put MathJax into `folder`; False if npm can't fetch it"
    if not shutil.which('npm'): return False
    with tempfile.TemporaryDirectory() as tmp:
        if subprocess.run(['npm', 'pack', '--silent', MATHJAX], cwd=tmp, capture_output=True).returncode: return False
        subprocess.run(['tar', 'xzf', *Path(tmp).glob('*.tgz'), 'package/es5/tex-svg.js'], cwd=tmp, check=True)
        shutil.copy(Path(tmp)/'package/es5/tex-svg.js', folder/'tex-svg.js')
    return True

def write_sources(folder):
    "Everything that sphinx reads"
    groups, names, url = notebooks(), exported(), settings()['git_url']
    empty = [p.name for paths in groups.values() for p in paths if not _has_outputs(p)]
    if empty: sys.exit(f"without outputs, so nothing to show: {', '.join(empty)}; run them with tools/run_notebooks.py")
    modules = [p.stem for p in sorted((ROOT/'vit_nbdev').glob('*.py')) if not p.stem.startswith('_')]
    (folder/'studies').mkdir()
    (folder/'_static').mkdir()
    shutil.copytree(ROOT/'nbs'/'images', folder/'images')
    for path in (p for paths in groups.values() for p in paths):
        (folder/path.relative_to(ROOT/'nbs')).write_text(page(path, names, url), encoding='utf-8')
    for name in modules:
        text = api_page(importlib.import_module(f'vit_nbdev.{name}'))
        (folder/f'{name}.md').write_text(text, encoding='utf-8')
    (folder/'index.ipynb').write_text(front_page(groups, modules, names, url), encoding='utf-8')
    (folder/'_static'/'site.css').write_text(CSS, encoding='utf-8')
    conf = CONF.format(url=url)
    if mathjax(folder/'_static'): conf += "mathjax_path = 'tex-svg.js'\n"
    else: print("npm can't fetch MathJax: formulas will need a network")
    (folder/'conf.py').write_text(conf, encoding='utf-8')

def _has_outputs(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return any(cell.get('outputs') for cell in cells)

class Links(HTMLParser):
    "What a page links to, and the places in it that can be linked to"
    def __init__(self, text):
        super().__init__()
        self.to, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.to += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        self.places |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}

def broken_links(site):
    "`page -> link` for each internal link that leads nowhere"
    files = [p.resolve() for p in site.rglob('*.html') if '_static' not in p.parts]
    pages = {p: Links(p.read_text(encoding='utf-8')) for p in files}
    broken = []
    for path, found in pages.items():
        for link in found.to:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith(('data:', '#!')): continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target/'index.html'
            there = target.exists() and (not parts.fragment or target not in pages
                                        or unquote(parts.fragment) in pages[target].places)
            if not there: broken.append(f'{path.relative_to(site.resolve())} -> {link}')
    return sorted(set(broken))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT/'_site', help="the folder to write")
    args = parser.parse_args()
    try:
        import myst_nb, sphinx_book_theme, sphinx_copybutton   # noqa: F401
        from sphinx.cmd.build import build_main
    except ImportError as e:
        sys.exit(f"the site needs {e.name}: pip install -e '.[dev,site]'")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        source, built = Path(tmp)/'source', Path(tmp)/'site'
        source.mkdir()
        write_sources(source)
        if code := build_main(['-q', '-j', 'auto', '-b', 'html', str(source), str(built)]): sys.exit(code)
        for path in built.rglob('*.html'):     # the theme's label hides the shortcut that the button shows
            path.write_text(path.read_text(encoding='utf-8').replace(' aria-label="Search"', ''), encoding='utf-8')
        broken = broken_links(built)
        if broken: sys.exit('links that lead nowhere:\n' + '\n'.join(broken))
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(built, args.out, ignore=shutil.ignore_patterns('.doctrees', '.buildinfo*'))
    pages = len(list(args.out.rglob('*.html')))
    print(f'{args.out}: {pages} pages in {time.perf_counter() - start:.0f} s, no broken link')

if __name__ == '__main__': main()
