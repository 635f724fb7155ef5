"The site: what the builder makes of a cell, dead links, and every page in a real browser."
import functools, http.server, json, os, re, shutil, subprocess, sys, threading, time
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'nbs'/'_site'))
pytest.importorskip('pypandoc', reason='pandoc is not here: pip install -e ".[dev]" -c constraints.txt')
import build as site
from reference import symbols

def cell(kind, source, outputs=()):
    return {'cell_type': kind, 'source': source, 'metadata': {}} | ({'outputs': list(outputs), 'execution_count': None} if kind == 'code' else {})

def printed(text, name='stdout'): return {'output_type': 'stream', 'name': name, 'text': [text]}

def shown(**data): return {'output_type': 'display_data', 'metadata': {}, 'data': {k.replace('_', '/', 1): v for k, v in data.items()}}

LOADER = '''#| export
class Loader:
    "Endless batches; `fit` reads them. Not <b>bold</b>."
    def __init__(self,
        rows:int, # rows in a batch
        seed:int=0, # of the order, 0 | 1
    ):
        self.rows = rows

    def close(self)->None: "End the threads."

def fit(
    loader:Loader, # where batches come from
    *names:str,
    rate:float|None=None, # highest learning rate
        # and a second line about it
)->dict[str, float]: # losses by name
    "Train, and say how it went."
    return {}

KINDS = {'a|b': 1}
def _hidden(): pass
'''
PATCH = '''#| export
@patch
def state(self:Loader)->dict: # a few numbers
    "Where the next batch comes from."
    return {}
'''
FIRST = [cell('markdown', '# A book of <two> pages & `more`\n> What it *promises*.\n\nIt begins. See [the loop](part/loop.ipynb#a-section) and `Loader.close`, `loop.fit`, `nbs/part/loop.ipynb`, `part.loop`; `fit` is a word here.')]
SECOND = [
    cell('code', '#| default_exp part.loop'),
    cell('markdown', '# The loop\n> Steps.\n\n## A section\n\n`fit` reads `Loader`; $$x^2$$ costs $5.\n- a list without a blank line\n\n| a | b |\n|---|---|\n| `x\\|y` | 2 |\n\n::: {.callout-note}\n## Mind\nthe step\n:::'),
    cell('code', '#| export\nimport os\nfrom book.files import x'),
    cell('code', LOADER), cell('code', PATCH),
    cell('code', '#| hide\nsecret = 1', [printed('SECRET')]), cell('code', '#| exporti\nINTERNAL = 1'),
    cell('code', '#| echo: false\nNOCODE = 1', [printed('only this')]), cell('code', '#| output: false\nNOOUT = 1', [printed('NEVER')]),
    cell('code', '#| include: false\nNOTHING = 1'), cell('code', '#| code-fold: true\n#| code-summary: Folded\nFOLDED = 1'),
    cell('code', '#| notest\n!ls; print("</script>")\nx = 1 #| hide_line', [printed('\x1b[31mred\x1b[0m </script><script>alert(1)</script>\n10%\r100%\n')]),
    cell('code', 'table', [shown(text_html='<div><style scoped>\n.x{}</style>\n\n<table class="dataframe"><tr><td>7</td></tr></table></div>', text_plain='plain')]),
    cell('code', '# a heading in an output', [shown(text_markdown='# Top\n\n| q | r |\n|---|---|\n| 1 | 2 |')]),
    cell('code', '#| label: fig-x\n#| fig-cap: A dot', [shown(image_png='iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')]),
    cell('markdown', 'As @fig-x shows.'),
]

def write(folder, pages, contents=None):
    nbs = folder/'nbs'
    for path, cells in pages.items():
        (nbs/path).parent.mkdir(parents=True, exist_ok=True)
        (nbs/path).write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    contents = contents or ['index.ipynb', {'section': 'A <part>', 'contents': [p for p in pages if p != 'index.ipynb']}]
    (nbs/'_quarto.yml').write_text(json.dumps({'website': {'title': 'book', 'sidebar': {'contents': contents}}}))
    (folder/'settings.ini').write_text('[DEFAULT]\nlib_path = book\ngit_url = https://example.com/b\nbranch = main\nconsole_scripts = book_fit=book.part.loop:fit\n')
    return nbs

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('book')
    bad = site.build(write(folder, {'index.ipynb': FIRST, 'part/loop.ipynb': SECOND}), folder/'out', search=False)
    return bad, (folder/'out'/'index.html').read_text(), (folder/'out'/'part'/'loop.html').read_text(), folder/'out'

def test_symbols():
    loader, fit, kinds = symbols(LOADER)
    assert [(p.name, p.type, p.default, p.comment) for p in loader.params] == [('rows', 'int', '', 'rows in a batch'), ('seed', 'int', '0', 'of the order, 0 | 1')]
    assert loader.signature == 'Loader(rows: int, seed: int=0)' and [m.name for m in loader.members] == ['Loader.close']
    assert fit.signature == 'fit(loader: Loader, *names: str, rate: float | None=None) → dict[str, float]' and fit.returned == 'losses by name'
    assert [p.comment for p in fit.params] == ['where batches come from', '', 'highest learning rate and a second line about it'] and kinds.kind == 'value'
    assert symbols(PATCH)[0].name == 'Loader.state' and symbols(PATCH)[0].params == []
    one, data = symbols('def f(x:int, y=1)->int: return x # not a comment of the result\n@dataclass\nclass D:\n    a:int # first\n    _b:int=1\n    c:float=.1 # third\n')
    assert one.params[1].default == '1' and not one.params[0].comment
    assert [(p.name, p.comment) for p in data.params] == [('a', 'first'), ('c', 'third')] and data.signature == 'D(a: int, c: float=0.1)'
    assert symbols('%time f(') == []

def test_directives(tiny):
    bad, _, page, _ = tiny
    assert not bad, bad
    for gone in ('SECRET', 'secret', 'INTERNAL', 'NOCODE', 'NEVER', 'NOTHING', 'default_exp', '#|', 'hide_line', '\x1b', '10%\r', '\n10%\n'): assert gone not in page, gone
    for there in ('only this', 'NOOUT', '<summary>Folded</summary>', '<summary>Imports</summary>', '100%'): assert there in page, there
    assert '<script>alert' not in page and '&lt;/script&gt;' in page

def test_reference_block(tiny):
    _, _, page, _ = tiny
    for anchor in ('loader', 'loader.close', 'fit', 'kinds', 'loader.state'): assert f'id="{anchor}"' in page, anchor
    assert '_hidden' in page and 'id="_hidden"' not in page
    block = page[page.index('<summary>Reference: <code>Loader'):page.index('</details>', page.index('<summary>Reference: <code>Loader'))]
    assert 'rows in a batch' in block and 'of the order, 0 | 1' in block and 'Gives back <code>dict[str, float]</code>: losses by name' in block
    assert '&lt;b&gt;bold&lt;/b&gt;' in block and 'second line about it' in block
    assert 'https://example.com/b/blob/main/book/part/loop.py' in page and 'Module <code>book.part.loop</code>' in page
    assert page.index('<code>', page.index('Endless batches')) # the code is there, unfolded
    assert '<details' not in page[page.index('<div class="exported">'):page.index('Endless batches')]

def test_prose_and_outputs(tiny):
    _, _, page, out = tiny
    assert page.count('<h1') == 1 and '<math' in page and 'costs $5' in page and '<li>a list without' in page
    assert 'callout-note' in page and 'Mind' in page and '<code>x|y</code>' in page
    assert '<style scoped>' not in page and 'class="dataframe"' in page and '>plain<' not in page
    assert re.search(r'<h2[^>]*>Top', page) and 'Figure 1' in re.sub(r'\s|&nbsp;|\u00a0', ' ', page) and (out/'part'/'assets'/'loop-1.png').read_bytes()[:4] == b'\x89PNG'

def test_links(tiny):
    _, first, page, out = tiny
    assert 'href="part/loop.html#a-section"' in first and first.count('href="part/loop.html#loader.close"') == 1 and 'href="part/loop.html#fit"' in first
    assert '<a class="name" href="part/loop.html"><code>nbs/part/loop.ipynb</code>' in first and '<a class="name" href="part/loop.html"><code>part.loop</code>' in first
    assert '<code>fit</code> is a word' in first # a plain word leads nowhere on a page that does not import it
    assert '<a class="name" href="#fit"><code>fit</code></a> reads' in page and 'rel="prev" href="../index.html"' in page and 'rel="next" href="part/loop.html"' in first
    assert '<title>A book of &lt;two&gt; pages &amp; more - book</title>' in first and 'A &lt;part&gt;' in page and '<two>' not in first
    assert (out/'404.html').exists() and (out/'titles.js').exists()

def test_a_dead_link_is_refused(tmp_path):
    text = '# T\n> p\n\n[a](b.ipynb) [b](index.ipynb#gone) [c](#nowhere) ![d](no.png) ![e](https://example.com/x.png) [f](https://example.com/) [g](it%20is.txt) [h](#A-Place)\n\n## A place'
    nbs = write(tmp_path, {'index.ipynb': [cell('markdown', text), cell('code', '#| ecko: false\n1')]})
    (nbs/'it is.txt').write_text('here')
    done = subprocess.run([sys.executable, root/'nbs'/'_site'/'build.py', '--nbs', nbs, '--out', tmp_path/'out', '--check'], capture_output=True, text=True)
    assert done.returncode == 1 and 'does not exist' in done.stderr and 'make docs' in done.stderr
    bad = site.build(nbs, tmp_path/'out', search=False)
    assert len(bad) == 6, bad
    for what in ('`#| ecko`', 'b.ipynb does not exist', 'no such anchor', '#nowhere', 'no.png does not exist', 'fetches https://example.com/x.png'): assert any(what in b for b in bad), what
    done = subprocess.run([sys.executable, root/'nbs'/'_site'/'build.py', '--nbs', nbs, '--out', tmp_path/'out', '--check'], capture_output=True, text=True)
    assert done.returncode == 1 and '5 faults' in done.stderr and 'Traceback' not in done.stderr

def test_what_is_missing_is_said(tmp_path, monkeypatch):
    nbs = write(tmp_path, {'index.ipynb': FIRST[:1]}, ['index.ipynb', 'gone.ipynb'])
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'old.html').write_text('old')
    (nbs/'gone.ipynb').write_bytes((nbs/'index.ipynb').read_bytes())
    with pytest.raises(site.SiteError, match='something else than a site'): site.build(nbs, tmp_path/'out', search=False)
    (nbs/'gone.ipynb').unlink()
    with pytest.raises(site.SiteError, match='gone.ipynb is in _quarto.yml'): site.build(nbs, tmp_path/'out', search=False)
    with pytest.raises(site.SiteError, match='is no notebook'): (nbs/'gone.ipynb').write_text('{'); site.build(nbs, tmp_path/'out', search=False)
    assert (tmp_path/'out'/'old.html').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['nbs', 'out', 'settings.ini'] # the site of before, and nothing beside it
    monkeypatch.setitem(sys.modules, 'pypandoc', None)
    with pytest.raises(site.SiteError, match='make docs'): site.find_pandoc()

# ---- the real book in a real browser

class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def _chromium():
    return next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)

@pytest.fixture(scope='module')
def browser():
    try: from playwright.sync_api import sync_playwright
    except ImportError: pytest.skip('playwright is not here: pip install -e ".[dev]" -c constraints.txt')
    if not _chromium(): pytest.skip('no Chromium is here, so no page was looked at: install chromium (apt-get install chromium, or a Chrome)')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=_chromium(), args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield b
        b.close()

def _heard(page, base):
    wrong = []
    page.set_default_timeout(60_000)
    page.on('console', lambda m: m.type in ('error', 'warning') and wrong.append(f'{page.url}: {m.type}: {m.text}'))
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on('requestfailed', lambda r: 'ERR_ABORTED' in str(r.failure) or wrong.append(f'{page.url}: {r.url} failed: {r.failure}')) # (aborted: we went on before a picture below the screen had come)
    page.on('response', lambda r: r.status >= 400 and wrong.append(f'{page.url}: {r.url}: {r.status}'))
    page.on('request', lambda r: r.url.startswith((base, 'data:', 'blob:')) or wrong.append(f'{page.url}: {r.url} is off the host'))
    return wrong

def _picture(page, name):
    if folder := os.environ.get('LLMLAB_PICTURES'):
        Path(folder).mkdir(parents=True, exist_ok=True); page.screenshot(path=Path(folder)/f'site-{name}.png')

def test_every_page_in_a_browser(browser, tmp_path):
    out = tmp_path/'site'
    bad = site.build(root/'nbs', out)
    assert not bad, '\n'.join(bad)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, directory=out)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: _walk(browser, f'http://127.0.0.1:{server.server_port}/', out)
        finally: server.shutdown()

def _walk(browser, base, out):
    book = site.load_book(root/'nbs')
    # every page, as wide as a phone, in the order of "next"
    context = browser.new_context(viewport={'width': 390, 'height': 844}, color_scheme='light'); page = context.new_page(); wrong = _heard(page, base)
    page.goto(base)
    seen = []
    while True:
        seen.append(page.url.removeprefix(base))
        state = page.evaluate('''() => ({h1: document.querySelectorAll('h1').length, wide: document.documentElement.scrollWidth - innerWidth, next: document.querySelector('a[rel=next]')?.href,
            broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
            out: [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, pre, p:has(math), .side, details:not([open])')).map(e => e.outerHTML.slice(0, 120)).slice(0, 3)})''')
        if state['h1'] != 1 or state['wide'] > 0 or state['broken'] or state['out']: wrong.append(f'{page.url}: {state}')
        if not state['next']: break
        page.goto(state['next'], wait_until='load')
    assert len(seen) == len(book.pages) and set(seen) == {'' if i == 0 else p.url for i, p in enumerate(book.pages.values())}
    page.goto(base+seen[1]); _picture(page, 'phone')
    page.click('#ui-menu'); page.wait_for_selector('.side a[aria-current]', state='visible'); _picture(page, 'phone-menu')
    assert not wrong, '\n'.join(wrong)
    context.close()

    context = browser.new_context(viewport={'width': 1440, 'height': 1000}, color_scheme='light'); page = context.new_page(); wrong = _heard(page, base)
    page.goto(base); _picture(page, 'first')
    # dark, and still dark on the page after
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour); page.click('#ui-theme'); dark = page.evaluate(colour)
    assert light != dark
    page.click('a[rel=next]'); page.wait_for_url(base+seen[1]); assert page.evaluate(colour) == dark
    # the search finds a word, titles first, and what it found opens
    page.keyboard.press('/'); page.keyboard.type('tokenizer')
    page.wait_for_function("document.querySelector('#ui-hits').dataset.for === 'tokenizer' && document.querySelectorAll('#ui-hits mark').length > 0"); _picture(page, 'search')
    assert 'tokenizer' in page.locator('#ui-hits a').first.text_content().lower()
    found = page.locator('#ui-hits a:has(mark)').first; to = found.get_attribute('href'); found.click()
    page.wait_for_url('**'+to.split('/')[-1]); assert 'tokenizer' in page.inner_text('main').lower()
    # a formula has a size, a link to a name opens what is folded
    page.goto(base+'3_models/02_infini.html'); box = page.locator('math[display=block]').first.bounding_box()
    assert box['width'] > 100 and box['height'] > 20
    page.locator('math[display=block]').first.scroll_into_view_if_needed(); _picture(page, 'formula-dark')
    page.goto(base+'2_packing/02_loader.html#loader.close'); page.wait_for_function("document.getElementById('loader.close').closest('details').open"); _picture(page, 'reference-dark')
    # a page that does not exist says so
    assert not wrong, '\n'.join(wrong)
    page.goto((out/'index.html').as_uri()); page.click('#ui-find'); page.keyboard.type('loader'); page.wait_for_selector('#ui-hits a') # without a server: titles alone, and no error
    assert not [w for w in wrong if 'off the host' not in w], wrong
    context.close()
