"""The documentation site: the notebooks' links, API pages, the check for broken links. With `--slow`, all of it."""
import importlib.util, json, os, re, shutil, subprocess, sys, tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT/'tools').is_dir(): pytest.skip('the repository is not here', allow_module_level=True)
pytest.importorskip('nbdev')
spec = importlib.util.spec_from_file_location('make_site', ROOT/'tools'/'make_site.py')
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_links_of_notebooks(path):
    "Every relative link of the prose leads to a file that is there"
    dead = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'markdown': continue
        prose = re.sub(r'```.*?```|`[^`]*`', '', ''.join(cell['source']), flags=re.S)
        for link in re.findall(r'\]\(([^)\s]+)\)', prose):
            if re.match(r'\w+:|#', link) or (path.parent/link.split('#')[0]).exists(): continue
            dead.append(link)
    assert not dead, f'{path.name}: {dead}'

def test_all_notebooks_are_pages():
    groups = site.notebooks()
    assert {p for paths in groups.values() for p in paths} | {ROOT/'nbs'/'index.ipynb'} == set(NOTEBOOKS)

def test_names_lead_to_the_api():
    names = dict(vit_learner='learner.html#vit_learner')
    code = '```\n`vit_learner`\n```'
    text = f'# `vit_learner`\nCall `vit_learner(dls)` or `vit_learner`, not `learner`, [`vit_learner`](x.md).\n{code}'
    linked = site.link_names(text, names, '../')
    link = '<a class="api" href="../learner.html#vit_learner"><code>vit_learner</code></a>'
    assert linked.startswith('# `vit_learner`\nCall') and linked.count(link) == 1
    assert linked.endswith('[`vit_learner`](x.md).\n```\n`vit_learner`\n```')

def test_api_page():
    import vit_nbdev.attention as module
    page = site.api_page(module)
    assert '<a id="multiheadattention"></a>\n\n## MultiHeadAttention' in page
    assert '| `n_heads` | number of heads; each is `dim / n_heads` wide |' in page
    assert 'qkv_bias: bool = True' in page and ' at 0x' not in page

def test_parameters_with_a_bar_stay_one_cell():
    def f(x: int|None = None,  # a | b
    ): pass
    assert site.parameter_table(f).splitlines()[-1] == r'| `x` | a \| b |'

@pytest.mark.parametrize('link, there', [
    ('b.html', True), ('b.html#here', True), ('#top', True), ('https://nowhere.example/x', True), ('data:,x', True),
    ('b.html#gone', False), ('c.html', False), ('pictures/x.png', False), ('#gone', False)])
def test_broken_links(tmp_path, link, there):
    (tmp_path/'a.html').write_text(f'<p id="top"><a href="{link}">x</a>')
    (tmp_path/'b.html').write_text('<h1 id="here">')
    assert site.broken_links(tmp_path) == ([] if there else [f'a.html -> {link}'])

PIXEL = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

def cell(source, **data):
    if not data: return dict(cell_type='markdown', metadata={}, source=source)
    data = {kind.replace('_', '/'): value for kind, value in data.items()}
    output = dict(output_type='display_data', metadata={}, data=data)
    return dict(cell_type='code', metadata={}, source=source, outputs=[output], execution_count=None)

def test_a_small_site(tmp_path, monkeypatch):
    "A link in an output leads to the page, as one in the prose does; a picture has its caption as alternative text"
    build = pytest.importorskip('sphinx.cmd.build')
    pytest.importorskip('sphinx_book_theme')
    monkeypatch.setattr(site, 'ROOT', tmp_path)
    monkeypatch.setattr(site, 'mathjax', lambda folder: False)
    for folder in ('nbs/images', 'nbs/studies', 'source', 'vit_nbdev'): (tmp_path/folder).mkdir(parents=True)
    (tmp_path/'settings.ini').write_text('[DEFAULT]\ngit_url = https://github.com/me/mine\n')
    chapter = [cell('# Chapter'), cell('plot()', image_png=PIXEL), cell('*What to see: a\ndot.*\n\nThen prose.'),
               cell('#| fig-alt: Another dot\nplot()', image_png=PIXEL), cell('plot()', image_png=PIXEL)]
    index = [cell('# Front'), cell('show()', text_markdown='Read [the chapter](0.ipynb).')]
    for name, cells in dict(index=index, **{'0': chapter}).items():
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)
        (tmp_path/'nbs'/f'{name}.ipynb').write_text(json.dumps(nb))
    site.write_sources(tmp_path/'source')
    assert build.build_main(['-q', '-b', 'html', str(tmp_path/'source'), str(tmp_path/'site')]) == 0
    assert '<a class="reference internal" href="0.html">' in (tmp_path/'site'/'index.html').read_text()
    assert site.broken_links(tmp_path/'site') == []
    pictures = re.findall(r'<img alt="([^"]*)"[^>]* src="_images', (tmp_path/'site'/'0.html').read_text())
    assert pictures == ['a dot.', 'Another dot', 'what the code above draws; the text below says what it shows']

def test_a_notebook_without_outputs_is_named(tmp_path, monkeypatch):
    bare = tmp_path/'bare.ipynb'
    bare.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=['1'], outputs=[])])))
    monkeypatch.setattr(site, 'notebooks', lambda: dict(Chapters=[bare]))
    with pytest.raises(SystemExit, match='without outputs, so nothing to show: bare.ipynb; run'):
        site.write_sources(tmp_path)

def test_without_its_extra(tmp_path):
    "One sentence that says what to install"
    (tmp_path/'sphinx_book_theme.py').write_text("raise ModuleNotFoundError(name='sphinx_book_theme')")
    (tmp_path/'myst_nb.py').write_text('')
    run = subprocess.run([sys.executable, ROOT/'tools'/'make_site.py'], capture_output=True, text=True,
                         env=os.environ | {'PYTHONPATH': f"{tmp_path}{os.pathsep}{ROOT}"})
    assert run.returncode == 1
    assert run.stderr.strip() == "the site needs sphinx_book_theme: pip install -e '.[dev,site]'"

@pytest.fixture(scope='module')
def built(pytestconfig, tmp_path_factory):
    "All of the site, in about a minute"
    if not pytestconfig.getoption('--slow'): pytest.skip('a minute or more: run with --slow')
    pytest.importorskip('sphinx_book_theme')
    folder = tmp_path_factory.mktemp('whole')/'site'
    command = [sys.executable, ROOT/'tools'/'make_site.py', '--out', folder]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and 'no broken link' in run.stdout, run.stdout + run.stderr
    assert 'WARNING' not in run.stderr, run.stderr
    return folder

def test_the_whole_site(built):
    "Every page, no warning, no broken link, and every name where nbdev's index says it is"
    for address in site.exported().values():
        page, anchor = address.split('#')
        assert anchor in site.Links((built/page).read_text(encoding='utf-8')).places, address

@pytest.fixture(scope='module')
def axe(tmp_path_factory):
    "The checks of axe-core, which npm fetches"
    folder, npm = tmp_path_factory.mktemp('axe'), shutil.which('npm')
    if npm is None or subprocess.run([npm, 'pack', '--silent', 'axe-core@4.14.1'], cwd=folder).returncode:
        pytest.skip('npm is not here, or has no network')
    with tarfile.open(next(folder.glob('*.tgz'))) as tar: return tar.extractfile('package/axe.min.js').read().decode()

PAGES = ('index', '02_vit', 'studies/other_images', 'results', 'vit')
SERIOUS = """async () => (await axe.run()).violations.filter(v => ['serious', 'critical'].includes(v.impact))
    .map(v => `${v.id}: ${v.nodes[0].html}`)"""

@pytest.mark.parametrize('scheme, widths', [('light', (390, 900, 1440)), ('dark', (390,))])
def test_pages_are_accessible(built, axe, scheme, widths):
    "axe-core finds nothing serious on five pages, none of which is wider than its window"
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if path is None: pytest.skip('no chromium on the PATH')
    with playwright.sync_playwright() as play:
        browser, wrong = play.chromium.launch(executable_path=path, args=['--no-sandbox']), []
        for width in widths:
            tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
            for name in PAGES:
                tab.goto((built/f'{name}.html').as_uri())
                tab.locator('html[data-theme]').wait_for()
                tab.wait_for_timeout(500)              # tab stops come when the theme's script has seen what scrolls
                tab.evaluate(axe)
                wrong += [f'{name} at {width}: {what}' for what in tab.evaluate(SERIOUS)]
                beyond = tab.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
                if beyond: wrong.append(f'{name} at {width}: {beyond} pixels beyond the window')
        browser.close()
    assert wrong == []
