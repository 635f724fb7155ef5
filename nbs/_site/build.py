"""Build the book as a website, from the notebooks as they lie: `python nbs/_site/build.py`; `--check` looks at a site that is there.

Nothing of the book is imported or run: code and outputs are what the notebooks hold. pandoc turns Markdown into HTML, pagefind makes the index of the search.
Order, titles of sections and the name of the site come from `_quarto.yml`; names, places and the address of the source from `settings.ini`.
"""
import argparse, ast, base64, configparser, html, json, os, re, shutil, struct, subprocess, sys, tempfile, time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
import yaml
sys.path.insert(0, str(Path(__file__).parent))
from reference import Param, Symbol, imported, only_imports, symbols

HERE = Path(__file__).resolve().parent
STATIC = ('site.css', 'site.js')
DOORS = {'tutorials/first_run.ipynb': 'First run', 'tour.ipynb': 'Tour of the house', 'gallery.ipynb': 'Gallery'} # buttons of the landing page, where the book has these pages
SETTINGS = 'reference/config.ipynb' # its tables begin each line with a setting: `optim.lr` leads there from every page
# CommonMark, as JupyterLab reads it, and what Quarto adds: fenced divs, attributes, formulas, footnotes (quarto.lua makes anchors as Quarto does)
MARKDOWN = 'commonmark_x-smart-subscript-superscript-emoji-fancy_lists-gfm_auto_identifiers+autolink_bare_uris-yaml_metadata_block+implicit_figures'
SILENT = {'notest', 'gpu', 'slow', 'eval', 'exec_doc', 'login', 'default_exp', 'export', 'exports', 'hide_line', 'filter_stream', 'label', 'fig-cap', 'fig-alt', 'tbl-cap', 'code-summary',
    'echo', 'output', 'include', 'code-fold', 'warning', 'error', 'hide', 'exporti', 'hide_input', 'hide_output', 'hide-output', 'hide-input', 'code-overflow', 'fig-width', 'fig-height', 'message', 'column'}

class SiteError(Exception): "What a person must mend before there is a site."

@dataclass
class Page:
    path:str                # of the notebook, below nbs
    title:str=''            # plain text
    promise:str=''
    section:str=''
    module:str=''           # llmlab.trainer.loop, where it exports one
    markdown:str=''
    body:str=''             # HTML
    files:dict = field(default_factory=dict)    # pictures: name -> bytes
    symbols:list = field(default_factory=list)  # [(name, anchor, kind)]
    imports:dict = field(default_factory=dict)  # name here -> (module, name)
    ids:set = field(default_factory=set)
    problems:list = field(default_factory=list)

    @property
    def url(self)->str: return self.path[:-len('.ipynb')]+'.html'
    def to(self, url:str)->str: return os.path.relpath(url, os.path.dirname(self.url) or '.')

@dataclass
class Book:
    title:str
    items:list                    # the side bar: a path, or (section, items)
    pages:dict                    # path -> Page, in order
    package:str
    source:str                    # address of the source, up to the path in it
    lines:dict                    # (module, name) -> line
    commands:dict                 # llmlab_train -> (module, name)
    base:str                      # where it lies on its host: /llmlab

# ---- one notebook

def directives(source:str)->tuple[dict, str]:
    "The `#|` lines of a cell, Quarto's (`echo: false`) and nbdev's (`export`), and the code without them."
    found, code = {}, []
    for line in source.splitlines():
        if m := re.match(r'#\|\s*([\w-]+):\s*(.*)$', line):
            try: found[m[1]] = yaml.safe_load(m[2])
            except yaml.YAMLError: found[m[1]] = m[2]
        elif m := re.match(r'#\|\s*([\w-]+)\s*(.*)$', line): found[m[1]] = m[2] or True
        elif not re.search(r'#\|\s*hide_line\s*$', line): code.append(line)
    return found, '\n'.join(code).strip('\n')

def fence(text:str, attributes:str='')->str:
    ticks = '`'*max(3, 1+max((len(o) for o in re.findall('`+', text)), default=0))
    return f'{ticks}{" "*bool(attributes)}{attributes}\n{text}\n{ticks}'

def raw(text:str)->str: return fence(text, '{=html}')

def _text(value)->str: return ''.join(value) if isinstance(value, list) else value

def _plain(text:str)->str: # as a terminal leaves it: no colours, a line that was written over is gone
    return re.sub(r'[^\n]*\r(?=[^\n])', '', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', text).replace('\r\n', '\n')).rstrip()

def _output_text(text:str, kind:str='')->str:
    if not re.search(r'\S(  |\t)\s*\S|^\|.*\|$', text, re.M): kind += ' wrap' # no columns that a break would spoil
    return raw(f'<pre class="output{kind}" tabindex="0">{html.escape(_plain(text))}</pre>') if text.strip() else ''

def _joined(outputs:list[dict])->list[dict]:
    "Outputs, with what was printed piece by piece as one text: where a cell stopped to breathe is chance."
    out = []
    for o in outputs:
        if out and o['output_type'] == 'stream' == out[-1]['output_type'] and o.get('name') == out[-1].get('name'): out[-1] = {**o, 'text': _text(out[-1]['text'])+_text(o['text'])}
        else: out.append(o)
    return out

def _size(data:bytes)->tuple[int, int]|None: # of a PNG
    return struct.unpack('>II', data[16:24]) if data[:8] == b'\x89PNG\r\n\x1a\n' else None

def _lower(text:str)->str:
    "Markdown of an output, its headings below those of the page."
    parts = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M|re.S)
    deep = min((len(m) for part in parts[::2] for m in re.findall(r'^(#+) ', part, re.M)), default=2)
    return ''.join(part if i%2 else re.sub(r'^(#+ )', '#'*max(0, 2-deep)+r'\1', part, flags=re.M) for i, part in enumerate(parts))

def output(o:dict, options:dict, page:Page)->str:
    "Markdown of one output; its pictures go to `page.files`."
    if o['output_type'] == 'stream':
        if o.get('name') == 'stderr' and options.get('warning') is False: return ''
        lines, words = _text(o['text']), str(options.get('filter_stream') or '').split()
        return _output_text(''.join(l for l in lines.splitlines(True) if not any(w in l for w in words)), ' stderr' if o.get('name') == 'stderr' else '')
    if o['output_type'] == 'error': return _output_text('\n'.join(o['traceback']), ' error')
    data = {k: _text(v) for k, v in o.get('data', {}).items() if not k.endswith('json')}
    if 'text/html' in data:
        return raw('<div class="rich scroll" tabindex="0">' + re.sub(r'\n\s*\n', '\n', re.sub(r'<style scoped>.*?</style>', '', data['text/html'], flags=re.S)) + '</div>')
    if 'text/markdown' in data: return _lower(data['text/markdown'])
    for mime, ending in (('image/svg+xml', 'svg'), ('image/png', 'png'), ('image/jpeg', 'jpg')):
        if mime not in data: continue
        content = data[mime].encode() if ending == 'svg' else base64.b64decode(data[mime])
        name = f'{PurePosixPath(page.path).stem}-{len(page.files)+1}.{ending}'
        page.files[name] = content
        shown, size = o.get('metadata', {}).get(mime, {}), _size(content)
        if size and shown.get('width'): size = shown['width'], round(size[1]*shown['width']/size[0])
        caption, label = str(options.get('fig-cap') or ''), str(options.get('label') or '')
        alt = str(options.get('fig-alt') or re.sub(r'[`*$]', '', caption) or 'What the code above draws')
        if label.startswith('fig-'):
            return f'![{caption}](assets/{name}){{#{label}' + (f' width={size[0]} height={size[1]}' if size else '') + f' alt="{html.escape(alt)}"}}'
        place = f' width="{size[0]}" height="{size[1]}"' if size else ''
        return raw(f'<figure class="picture"><img src="assets/{name}" alt="{html.escape(alt)}"{place} loading="lazy">' + (f'<figcaption>{html.escape(caption)}</figcaption>' if caption else '') + '</figure>')
    if 'text/latex' in data: return data['text/latex']
    return _output_text(data.get('text/plain', ''))

def prose(text:str)->str:
    "A docstring or a comment as Markdown: `<` and what looks like an underlined heading stay as they are written, also inside a table."
    parts = re.split(r'(`+[^`]*`+)', text)
    return ''.join(p if i%2 else re.sub(r'([<$*_\[\]\\])', r'\\\1', p) for i, p in enumerate(parts))

def _cell(text:str)->str: return prose(' '.join(text.split())).replace('|', '\\|')

def _code(text:str)->str:
    tick = '``' if '`' in text else '`'
    return f'{tick}{text}{tick}'.replace('|', '\\|') if text else ''

def parameters(rows:list[Param], word:str)->str:
    "A table of parameters in Markdown; without a column that would be empty."
    if not rows or not any(p.type or p.default or p.comment for p in rows): return ''
    head = [word] + [n for n, k in (('type', 'type'), ('default', 'default'), ('meaning', 'comment')) if any(getattr(p, k) for p in rows)]
    take = {'type': lambda p: _code(p.type), 'default': lambda p: _code(p.default), 'meaning': lambda p: _cell(p.comment)}
    return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---']*len(head), *([_code(p.name)+'{.own}', *(take[h](p) for h in head[1:])] for p in rows)])

def docstring(text:str)->str:
    "Paragraphs and lists of a docstring as Markdown; what is indented stays as it is."
    out = []
    for block in re.split(r'\n\s*\n', text.strip()):
        lines = block.splitlines()
        out.append(fence('\n'.join(l[4:] for l in lines)) if lines and all(l.startswith('    ') for l in lines) else '\n'.join(prose(l) if not re.match(r'\s*[-*] ', l) else re.match(r'\s*[-*] ', l)[0]+prose(re.sub(r'^\s*[-*] ', '', l)) for l in lines))
    return '\n\n'.join(out)

def reference(s:Symbol, link:str, anchor:str='')->str:
    "The reference of one symbol in Markdown."
    at = f' id="{html.escape(anchor)}"' if anchor else ''
    back = (f'Gives back {_code(s.returns)}' + (f': {prose(s.returned)}' if s.returned else '.')) if s.returns not in ('', 'None') else ''
    parts = [raw(f'<div class="symbol-ref"{at}><p class="signature"><code>{html.escape(s.signature)}</code> {link}</p>'), docstring(s.doc),
        parameters(s.params, 'field' if s.kind == 'class' and not s.signature.count('(') else 'parameter'), back, raw('</div>')]
    return '\n\n'.join(p for p in parts if p)

def exported(code:str, page:Page, book:Book)->str:
    "A cell of the module: its names as anchors, the code, and the reference of what it defines, folded."
    found = symbols(code)
    def link(name): # to the line in the source
        line = book.lines.get((page.module, name)); path = page.module.replace('.', '/')+'.py'
        return f'<a class="source" href="{book.source}/{path}{f"#L{line}" if line else ""}">source</a>'
    heads, folded = [], []
    for s in found:
        anchor = _anchor(s.name, page)
        page.symbols.append((s.name, anchor, s.kind))
        heads.append(f'<h3 class="symbol {s.kind}" id="{html.escape(anchor)}"><a href="#{html.escape(anchor)}">{html.escape(s.name)}</a></h3>')
        if s.kind == 'value': continue
        folded.append(reference(s, link(s.name)))
        for m in s.members:
            inner = _anchor(m.name, page)
            page.symbols.append((m.name, inner, m.kind))
            folded.append(reference(m, '', inner))
    names = ', '.join(f'<code>{html.escape(s.name)}</code>' for s in found if s.kind != 'value')
    bar = f'<div class="names">{"".join(heads)}{link(found[0].name)}</div>' if heads else ''
    return '\n\n'.join(x for x in (raw(f'<div class="exported">{bar}'), fence(code, '{.python}'),
        raw(f'<details class="reference"><summary>Reference: {names}</summary>') if folded else '', *folded, raw('</details>') if folded else '', raw('</div>')) if x)

def _anchor(name:str, page:Page)->str: # in lower case, as nbdev has it; a second one of the same letters keeps its own
    low, taken = name.lower(), {a for _, a, _ in page.symbols}
    return next(a for a in (low, name, *(f'{low}-{i}' for i in range(2, 99))) if a not in taken)

def _split_title(text:str)->tuple[str, str, str]:
    "Title, promise and the rest of the first Markdown cell."
    m = re.match(r'#\s+(.+?)\s*#*\s*(?:\n|$)((?:\s*>[^\n]*(?:\n|$))*)(.*)', text.strip(), re.S)
    return (m[1], ' '.join(re.sub(r'^\s*>\s?', '', l).strip() for l in m[2].strip().splitlines()).strip(), m[3].strip()) if m else ('', '', text)

def _bare(text:str)->str: return re.sub(r'[`*$]|\[([^]]*)\]\([^)]*\)', lambda m: m[1] or '', text)

def open_notebook(path:Path)->list[dict]:
    try: return json.loads(path.read_text(encoding='utf-8'))['cells']
    except FileNotFoundError: raise SiteError(f'{path} is in _quarto.yml, but there is no such file. Take it out of _quarto.yml, or write it.') from None
    except (ValueError, KeyError, TypeError) as e: raise SiteError(f'{path} is no notebook ({e!r}). Open it in JupyterLab and save it again, or take back the last change (git checkout).') from e

def read(page:Page, cells:list[dict], book:Book)->None:
    "Title, promise, module, imports and Markdown of a page, from its cells alone."
    out = []
    for c in cells: # what belongs to the whole page
        text = _text(c['source'])
        if c['cell_type'] == 'raw' and (m := re.match(r'---\n(.*?)\n---', text.strip(), re.S)):
            front = yaml.safe_load(m[1]) or {}
            page.title, page.promise = str(front.get('title', '')), str(front.get('description', ''))
        if c['cell_type'] == 'code':
            if m := re.search(r'^#\|\s*default_exp:?\s+([\w.]+)', text, re.M): page.module = f'{book.package}.{m[1]}'
            page.imports |= imported(directives(text)[1], book.package)
    headed = bool(page.title)
    if headed: out.append(_head(page, page.title, page.promise, book))
    for n, c in enumerate(cells):
        text = _text(c['source']).strip('\n')
        if c['cell_type'] == 'markdown':
            if not headed and re.match(r'\s*#\s', text):
                title, promise, text = _split_title(text)
                page.title, page.promise, headed = _bare(title), _bare(promise), True
                out.append(_head(page, title, promise, book))
            if text.strip(): out.append(re.sub(r'^# ', '## ', text, flags=re.M) if '```' not in text else text)
        elif c['cell_type'] == 'code':
            options, code = directives(text)
            page.problems += [f'cell {n+1}: `#| {k}` is not known to this builder' for k in options if k not in SILENT]
            if any(options.get(k) not in (None, False) for k in ('hide', 'default_exp', 'exporti')) or options.get('include') is False: continue
            member = any(k in options for k in ('export', 'exports'))
            shown = bool(code) and options.get('echo') is not False and not (options.keys() & {'hide_input', 'hide-input'})
            if shown:
                block = exported(code, page, book) if member and page.module and not only_imports(code) else fence(code, '{.python}')
                fold = options.get('code-fold')
                if fold in (True, 'true', 'show') or (fold is None and only_imports(code)):
                    word = str(options.get('code-summary') or ('Imports' if only_imports(code) else 'Code'))
                    block = '\n\n'.join((raw(f'<details class="fold"{" open" if fold == "show" else ""}><summary>{html.escape(word)}</summary>'), block, raw('</details>')))
                out.append(block)
            if options.get('output') is not False and not (options.keys() & {'hide_output', 'hide-output'}):
                results = [x for o in _joined(c.get('outputs', [])) if (x := output(o, options, page))]
                if results and options.get('tbl-cap'): results.append(f'*{options["tbl-cap"]}*')
                if results: out += [raw('<div class="outputs">'), *results, raw('</div>')]
    if not page.title: page.problems.append('no title: the first Markdown cell must begin with "# Title" and "> one line"'); page.title = page.path
    page.markdown = '\n\n'.join(out)

def _head(page:Page, title:str, promise:str, book:Book)->str:
    "The head of a page in Markdown: section, title, promise, and the module it is the source of."
    where = ''
    if page.module:
        path = page.module.replace('.', '/')+'.py'
        where = f'<p class="module">Module <code>{page.module}</code> <a href="{book.source}/{path}">source</a> <a href="{book.source}/nbs/{page.path}">notebook</a></p>'
    section = f'<p class="section-name">{html.escape(page.section)}</p>' if page.section else ''
    safe = lambda t: ''.join(x if i%2 else x.replace('<', '\\<') for i, x in enumerate(re.split(r'(`+[^`]*`+)', t))) # a title is text
    return '\n\n'.join(x for x in (raw(section) if section else '', f'# {safe(title)}', f'::: {{.lead}}\n{safe(promise)}\n:::' if promise else '', raw(where) if where else '') if x)

# ---- the book

def load_book(nbs:Path)->Book:
    "The book that `_quarto.yml` describes; pages are not read yet."
    quarto = next((p for p in (nbs/'_quarto.yml', nbs.parent/'_quarto.yml') if p.exists()), None)
    if not quarto: raise SiteError(f'There is no _quarto.yml in {nbs} or above it: it says which pages the book has, and in what order.')
    try: site = yaml.safe_load(quarto.read_text(encoding='utf-8'))['website']; contents = site['sidebar']['contents']
    except (yaml.YAMLError, KeyError, TypeError) as e: raise SiteError(f'{quarto} cannot be read: {e}. It needs website.title and website.sidebar.contents, as Quarto has them.') from e
    settings = configparser.ConfigParser(delimiters=['=']); settings.read(nbs.parent/'settings.ini', encoding='utf-8')
    s = settings['DEFAULT']; package = s.get('lib_path', s.get('lib_name', 'llmlab'))
    pages, names = {}, {}
    def walk(items, section):
        out = []
        for it in items:
            if isinstance(it, str): it = {'href': it}
            if 'contents' in it or 'section' in it:
                title = it.get('section') or it.get('text') or ''
                if str(title).endswith('.ipynb'): raise SiteError(f'{quarto}: the section {title!r} is a page. Write `section: A title` and the page below `contents`.')
                out.append((str(title), walk(it.get('contents') or [], str(title))))
            elif str(it.get('href', '')).endswith('.ipynb') and '*' not in it['href']:
                path = os.path.normpath(it['href'])
                if path in pages: raise SiteError(f'{quarto}: {path} is there twice.')
                pages[path] = Page(path, section=section); out.append(path)
                if it.get('text'): names[path] = str(it['text'])
            else: raise SiteError(f'{quarto}: {it!r} in the side bar is no notebook. Name each page as folder/page.ipynb.')
        return out
    items = walk(contents, '')
    if not pages: raise SiteError(f'{quarto} names no page.')
    lines = {}
    for f in (nbs.parent/package).rglob('*.py') if (nbs.parent/package).is_dir() else ():
        module = '.'.join(f.relative_to(nbs.parent).with_suffix('').parts)
        for node in ast.parse(f.read_text(encoding='utf-8')).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                lines[module, node.name] = node.lineno
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for t in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(t, ast.Name): lines[module, t.id] = node.lineno
    commands = dict(l.split('=') for l in s.get('console_scripts', '').split() if '=' in l)
    return Book(site.get('title', package), items, pages, package, f"{s.get('git_url', '')}/blob/{s.get('branch', 'main')}", lines, {k: tuple(v.split(':')) for k, v in commands.items()}, s.get('doc_baseurl', '').rstrip('/'))

def find_pandoc()->str:
    try:
        import pypandoc
        return pypandoc.get_pandoc_path()
    except (ImportError, OSError): pass
    raise SiteError('pandoc is not here, which writes the pages. `make docs` installs it and the rest into .venv; in an environment of your own: pip install -e ".[docs]" -c constraints.txt')

def to_html(markdown:str, pandoc:str)->str:
    "HTML of a page's Markdown."
    done = subprocess.run([pandoc, '-f', MARKDOWN, '-t', 'html5', '--mathml', '--wrap=none', '--lua-filter', HERE/'quarto.lua'], input=markdown, text=True, capture_output=True, encoding='utf-8')
    if done.returncode: raise SiteError(f'pandoc stopped: {done.stderr.strip()}')
    return done.stdout

def tidy(body:str, page:Page)->str:
    "Lines of code without anchors of their own, wrapped below their beginning; a prose heading that has the name of a symbol gives way to it."
    def line(m):
        depth = len(m[1])-len(m[1].lstrip(' '))
        return f'<span class="l"{f" style=--i:{min(depth, 24)}" if depth else ""}>{m[1]}</span>'
    def block(m): return re.sub(r'<span id="cb[\w-]+"><a href="#cb[\w-]+" aria-hidden="true" tabindex="-1"></a>(.*?)</span>(?=\n|</code>)', line, re.sub(r' id="cb\d+"', '', m[0]))
    body = re.sub(r'<div class="sourceCode" id="cb\d+">.*?</div>', block, body, flags=re.S)
    if page.path == SETTINGS:
        there = set(re.findall(r'\bid="([^"]+)"', body))
        body = re.sub(r'<td([^>]*)>(<code>(\w+(?:\.\w+)+)</code>)</td>', lambda m: m[0] if m[3] in there or there.add(m[3]) else f'<td{m[1]} id="{m[3]}">{m[2]}</td>', body)
    taken = {html.escape(a) for _, a, _ in page.symbols}
    body = re.sub(r'<h([2-6])( class="[^"]*")? id="([^"]+)"', lambda m: m[0] if 'symbol' in (m[2] or '') or m[3] not in taken else f'<h{m[1]}{m[2] or ""} id="{m[3]}-section"', body)
    body = re.sub(r'<td( style="[^"]*")?>(.*?)</td>', lambda m: f'<td class="w"{m[1] or ""}>{m[2]}</td>' if len(re.sub('<[^>]*>', '', m[2])) > 40 else m[0], body, flags=re.S) # text, not a number
    body = re.sub(r'<h1 id="[^"]*"', '<h1', body)
    body = re.sub(r'<h([2-4]) id="([^"]+)"([^>]*)>(.*?)</h\1>', r'<h\1 id="\2"\3>\4 <a class="here" href="#\2" aria-label="Link to this section"></a></h\1>', body, flags=re.S)
    return body

KEEP = re.compile(r'(<a\b.*?</a>|<pre\b.*?</pre>|<h[1-6]\b.*?</h[1-6]>|<summary\b.*?</summary>|<p class="signature">.*?</p>|<p class="module">.*?</p>)', re.S)

class Links:
    "Where names in backticks and links between notebooks lead."
    def __init__(self, book:Book):
        self.book, self.modules, self.known, self.short = book, {}, {}, defaultdict(set)
        for p in book.pages.values():
            if p.module: self.modules[p.module] = p
        for p in book.pages.values():
            for name, anchor, _ in p.symbols:
                if p.module: self.known[p.module, name] = (p, anchor)
                self.short[name].add((p.path, anchor))
        self.settings = {i for i in book.pages[SETTINGS].ids if '.' in i} if SETTINGS in book.pages else set()
        self.tails = defaultdict(set)
        for m in self.modules:
            parts = m.split('.')
            for i in range(1, len(parts)): self.tails['.'.join(parts[i:])].add(m)

    def symbol(self, text:str, page:Page)->str|None: # an address, seen from `page`; None: not ours, or not clear
        name = text.removesuffix('()')
        to = lambda p, anchor='': (f'#{anchor}' if anchor else None) if p is page else page.to(p.url)+(f'#{anchor}' if anchor else '')
        for own, anchor, _ in page.symbols:
            if own == name: return f'#{anchor}'
        if name in self.modules: return to(self.modules[name])
        if name in page.imports and (name in (page.imports[name][1], page.imports[name][0].split('.')[-1]) or not name.islower()): # `import a as work` makes no name of `work`
            module, there = page.imports[name]
            if f'{module}.{there}' in self.modules: return to(self.modules[f'{module}.{there}'])
            if (module, there) in self.known: return to(*self.known[module, there])
        if name in self.book.commands:
            for p in self.book.pages.values():
                if p.path.startswith('reference/') and name in p.ids: return to(p, name)
            if self.book.commands[name] in self.known: return to(*self.known[self.book.commands[name]])
        if name in self.settings: return to(self.book.pages[SETTINGS], name) if page.path != SETTINGS else None
        head, dot, last = name.rpartition('.')
        if dot:
            if len(self.tails.get(name, ())) == 1: return to(self.modules[next(iter(self.tails[name]))]) # trainer.loop
            if head in page.imports: # tiny.config, Loader.close
                module, there = page.imports[head]
                for m, n in ((f'{module}.{there}', last), (module, f'{there}.{last}')):
                    if (m, n) in self.known: return to(*self.known[m, n])
            owners = {m for m in self.modules if m == head} or self.tails.get(head, set())
            if len(owners) == 1 and (hit := self.known.get((next(iter(owners)), last))): return to(*hit)
        if not dot and not (re.search(r'[A-Z_]', name.strip('_'))) : return None # `train`, `path`: an ordinary word unless the page has it
        hits = self.short.get(name, ())
        if len(hits) == 1:
            path, anchor = next(iter(hits)); return to(self.book.pages[path], anchor)
        return None

    def file(self, text:str, page:Page)->str|None: # nbs/4_trainer/04_loop.ipynb, llmlab/trainer/loop.py
        if text.endswith('.ipynb'): hit = self.book.pages.get(text.removeprefix('nbs/'))
        else: hit = self.modules.get(text.removesuffix('.py').replace('/', '.')) if text.endswith('.py') else None
        return page.to(hit.url) if hit and hit is not page else None

    def apply(self, page:Page)->str:
        "The page's body with its links made."
        def name(m):
            text = html.unescape(m[1]); to = self.symbol(text, page) or self.file(text, page)
            return f'<a class="name" href="{html.escape(to)}">{m[0]}</a>' if to else m[0]
        parts = KEEP.split(page.body)
        body = ''.join(p if i%2 else re.sub(r'<code>([\w./]+(?:\(\))?)</code>', name, p) for i, p in enumerate(parts))
        def href(m):
            url = html.unescape(m[1])
            if re.match(r'[a-z][\w+.-]*:|//', url) or '.ipynb' not in url and url[:1] != '#': return m[0]
            path, _, anchor = url.partition('#')
            there = os.path.normpath(os.path.join(os.path.dirname(page.path), unquote(path))) if path else page.path
            if there not in self.book.pages: return m[0] # the check tells
            p = self.book.pages[there]
            if anchor and anchor not in p.ids: anchor = next((a for a in (anchor.lower(), anchor.lower()+'-section') if a in p.ids), anchor)
            return f'href="{html.escape((page.to(p.url) if path else "")+("#"+anchor if anchor else ""))}"'
        return re.sub(r'<code>(-[^<\s]{1,24})</code>', r'<code class="option">\1</code>', re.sub(r'href="([^"]*)"', href, body))

# ---- the frame around a page

def side(book:Book, page:Page)->str:
    "The pages as a list; the section of this page is open, the others are folded."
    def rows(items):
        out = []
        for it in items:
            if isinstance(it, str):
                p = book.pages[it]; here = ' aria-current="page"' if p is page else ''
                out.append(f'<li><a href="{page.to(p.url)}"{here}>{html.escape(p.title)}</a></li>')
            else: out.append(f'<li><details{" open" if _has(it[1], page.path) else ""}><summary>{html.escape(it[0])}</summary><ul>{rows(it[1])}</ul></details></li>')
        return ''.join(out)
    return f'<ul>{rows(book.items)}</ul>'

def _has(items, path:str)->bool: return any(it == path if isinstance(it, str) else _has(it[1], path) for it in items)

def _flat(items)->list[str]: return [p for it in items for p in ([it] if isinstance(it, str) else _flat(it[1]))]

def aside(page:Page, body:str)->str:
    "Sections of the page, and what it defines."
    heads = re.findall(r'<h([23]) id="([^"]+)"[^>]*>(.*?)</h\1>', body, re.S)
    out = ''
    if heads:
        out += '<ul>'
        for level, at, text in heads: out += f'<li class="h{level}"><a href="#{at}">{re.sub(r"</?a[^>]*>", "", re.sub(r" ?<a class=.here.*?</a>", "", text, flags=re.S))}</a></li>'
        out += '</ul>'
    classes = {m for m, _, k in page.symbols if k == 'class'}
    names = [(n, a) for n, a, kind in page.symbols if kind != 'method' or n.split('.')[0] not in classes]
    if names: out += '<b>Defined here</b><ul class="defines">' + ''.join(f'<li><a href="#{html.escape(a)}"><code>{html.escape(n)}</code></a></li>' for n, a in names) + '</ul>'
    return f'<details open><summary>On this page</summary>{out}</details>' if out else ''

def landing(book:Book, page:Page, table:str='')->tuple[str, str]: # doors, and a card for each section
    "What only the first page has; what a section is about, the table of its pages says."
    about = {re.sub('<[^>]*>', '', name).strip(): text for name, text in re.findall(r'<tr[^>]*>\s*<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>', table, re.S)}
    doors = [(book.pages[p], word) for p, word in DOORS.items() if p in book.pages]
    after = list(book.pages.values())[1:2]
    doors = doors or [(p, 'Begin to read') for p in after]
    out = '<p class="doors">' + ''.join(f'<a href="{page.to(p.url)}">{html.escape(word)}</a>' for p, word in doors) + '</p>'
    cards = ''
    for it in book.items:
        if isinstance(it, str): continue
        inside = [book.pages[p] for p in _flat(it[1])]
        cards += f'<li><b>{html.escape(it[0])}</b>' + (f'<span>{about[it[0].lower()]}</span>' if it[0].lower() in about else '') + ', '.join(f'<a href="{page.to(p.url)}">{html.escape(p.title)}</a>' for p in inside) + '</li>'
    title = '' if table else '<h2 id="parts-of-the-book">Parts of the book</h2>'
    return out, f'<nav class="parts" aria-label="Parts of the book">{title}<ul>{cards}</ul></nav>' if cards else ''

def frame(book:Book, page:Page, template:str)->str:
    "The whole page."
    order = list(book.pages.values()); i = order.index(page)
    turn = ''
    if i: turn += f'<a rel="prev" href="{page.to(order[i-1].url)}"><small>Before</small>{html.escape(order[i-1].title)}</a>'
    if i+1 < len(order): turn += f'<a rel="next" href="{page.to(order[i+1].url)}"><small>Next</small>{html.escape(order[i+1].title)}</a>'
    body = page.body
    if i == 0:
        table = re.search(r'<table>\s*(?:<colgroup>.*?</colgroup>\s*)?<thead>\s*<tr[^>]*>\s*<th[^>]*>part</th>.*?</table>', body, re.S)
        doors, parts = landing(book, page, table[0] if table else '')
        head = re.search(r'</h1>\s*(<div class="lead">.*?</div>)?', body, re.S); at = head.end() if head else 0
        cut = body.find('<h2 ', at); cut = cut if cut > 0 else len(body) # the parts stand in place of the table that lists the same pages, or after what it is and how to begin
        begin, end = table.span() if table else (cut, cut)
        body = body[:at]+doors+body[at:begin]+parts+body[end:]
    fill = {'aside': aside(page, body), 'title': html.escape(page.title if page.title == book.title else f'{page.title} - {book.title}'), 'site': html.escape(book.title), 'promise': html.escape(page.promise, quote=True), 'root': page.to('.'),
        'home': page.to(order[0].url), 'side': side(book, page), 'body': body, 'turn': turn, 'kind': 'landing' if i == 0 else 'page'}
    return re.sub(r'\{\{(\w+)\}\}', lambda m: fill[m[1]], template)

def lost(book:Book, template:str)->str:
    "The page for an address that does not exist: it may be shown in any folder, so it names no other file."
    body = '<h1>This page does not exist</h1><p class="lead">The book has no page at this address. It may have been renamed.</p><p><a id="ui-home" href="index.html">To the first page</a></p>' \
        f'<script>for(const a of document.querySelectorAll("#ui-home,.site"))a.href=location.pathname.startsWith("{book.base}/")?"{book.base}/":a.protocol==="file:"?a.href:"/"</script>'
    style = (HERE/'site.css').read_text()
    text = re.sub(r'<link rel="stylesheet"[^>]*>', lambda m: f'<style>{style}</style>', re.sub(r'<script src=[^>]*></script>', '', template))
    fill = {'title': f'No such page - {html.escape(book.title)}', 'site': html.escape(book.title), 'promise': '', 'root': '.', 'home': 'index.html', 'side': '', 'aside': '', 'body': body, 'turn': '', 'kind': 'lost'}
    return re.sub(r'\{\{(\w+)\}\}', lambda m: fill[m[1]], text)

# ---- the check

class _Scan(HTMLParser):
    def __init__(self): super().__init__(); self.ids, self.links, self.twice, self.h1 = set(), [], [], 0
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if i := a.get('id'): self.twice += [i]*(i in self.ids); self.ids.add(i)
        self.h1 += tag == 'h1'
        for k in ('href', 'src'):
            if a.get(k): self.links.append((tag, a[k]))

def check(site:Path)->tuple[list[str], int]: # what is wrong; links looked at
    "Links, anchors and pictures that lead nowhere, anchors that are there twice, and whatever a page would fetch from another host."
    seen, bad, n = {}, [], 0
    for f in sorted(site.rglob('*.html')):
        if 'pagefind' in f.relative_to(site).parts: continue
        scan = _Scan(); scan.feed(re.sub(r'<span class="\w{1,2}"[^>]*>|</span>', '', f.read_text(encoding='utf-8'))); seen[f.resolve()] = scan
    for f, scan in seen.items():
        where = f.relative_to(site.resolve())
        bad += [f'{where}: the anchor #{i} is there twice' for i in dict.fromkeys(scan.twice)]
        if scan.h1 != 1: bad.append(f'{where}: {scan.h1} titles, there must be one')
        for tag, url in scan.links:
            n += 1
            if re.match(r'[a-z][\w+.-]*:|//', url, re.I):
                if tag not in ('a',) and not url.startswith('data:'): bad.append(f'{where}: <{tag}> fetches {url} from another host')
                continue
            path, _, anchor = url.partition('#'); there = (f.parent/unquote(path)).resolve() if path else f
            if there.is_dir(): there = there/'index.html'
            if not there.exists(): bad.append(f'{where}: {url} does not exist')
            elif not there.is_relative_to(site.resolve()): bad.append(f'{where}: {url} lies outside the site')
            elif anchor and there in seen and unquote(anchor) not in seen[there].ids: bad.append(f'{where}: {url}: the page has no such anchor')
    if not seen: bad.append(f'{site}: there is no page')
    return list(dict.fromkeys(bad)), n

# ---- all together

def index_search(site:Path)->None:
    done = subprocess.run([sys.executable, '-m', 'pagefind', '--site', str(site)], capture_output=True, text=True)
    if done.returncode:
        if 'No module named' in done.stderr: raise SiteError('pagefind is not here, which makes the index of the search. `make docs` installs it and the rest into .venv; in an environment of your own: pip install -e ".[docs]" -c constraints.txt')
        raise SiteError(f'pagefind stopped: {(done.stderr or done.stdout).strip()[-1000:]}')

def build(nbs:Path, out:Path, search:bool=True, workers:int=2)->list[str]: # what is wrong with it
    "Write the site to `out`, whole or not at all; a site with dead links is written too, and they are listed."
    pandoc, book = find_pandoc(), load_book(nbs)
    for p in book.pages.values(): read(p, open_notebook(nbs/p.path), book)
    def render(p): p.body = tidy(to_html(p.markdown, pandoc), p); p.ids = set(re.findall(r'\bid="([^"]+)"', p.body))
    with ThreadPoolExecutor(workers) as pool: list(pool.map(render, sorted(book.pages.values(), key=lambda p: -len(p.markdown))))
    links, template = Links(book), (HERE/'page.html').read_text(encoding='utf-8')
    out = Path(out).resolve(); out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and any(out.iterdir()) and not (out/'titles.js').exists(): raise SiteError(f'{out} holds something else than a site of this book, so it is not replaced. Empty it, or name another folder with --out.')
    new = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', suffix='.tmp', dir=out.parent))
    try:
        for p in book.pages.values():
            p.body = links.apply(p)
            to = new/p.url; to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(frame(book, p, template), encoding='utf-8')
            for name, content in p.files.items(): (to.parent/'assets').mkdir(exist_ok=True); (to.parent/'assets'/name).write_bytes(content)
            for url in re.findall(r'(?:src|href)="([^":#?]+)"', p.body): # files beside the notebook
                here = (nbs/p.path).parent/unquote(html.unescape(url)); to_file = to.parent/unquote(html.unescape(url))
                if here.is_file() and here.suffix != '.ipynb' and here.resolve().is_relative_to(nbs.resolve()) and not to_file.exists(): to_file.parent.mkdir(parents=True, exist_ok=True); shutil.copy(here, to_file)
        for name in STATIC: shutil.copy(HERE/name, new/name)
        (new/'titles.js').write_text('window.TITLES='+json.dumps(titles(book), ensure_ascii=False, separators=(',', ':'))+'\n', encoding='utf-8')
        (new/'404.html').write_text(lost(book, template), encoding='utf-8'); (new/'.nojekyll').touch()
        if search: index_search(new)
        bad = [f'{p.path}: {x}' for p in book.pages.values() for x in p.problems]+check(new)[0]
        new.chmod(0o755)
        old = None
        if out.exists(): old = out.with_name(f'.{out.name}.{os.getpid()}.tmp'); out.rename(old)
        new.rename(out)
        if old: shutil.rmtree(old)
    finally:
        if new.exists(): shutil.rmtree(new)
    return bad

def titles(book:Book)->list: # [title or name, address, where]
    "What the search looks through first: titles, then names."
    pages = [[p.title, p.url, p.section or book.title, p.promise] for p in book.pages.values()]
    return pages+[[name, f'{p.url}#{anchor}', p.module, ''] for p in book.pages.values() for name, anchor, _ in p.symbols if p.module]

def main()->int:
    root = HERE.parent.parent
    ap = argparse.ArgumentParser(description='Build the book as a website, and look for dead links.')
    ap.add_argument('--nbs', type=Path, default=root/'nbs', help='folder of the notebooks'); ap.add_argument('--out', type=Path, default=root/'_docs', help='folder of the site')
    ap.add_argument('--check', action='store_true', help='only look for dead links in the site that is there'); ap.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1), help='pandoc processes at a time')
    a = ap.parse_args(); begin = time.time()
    try:
        if a.check and not a.out.is_dir(): raise SiteError(f'{a.out} does not exist. `make docs` builds it.')
        bad = check(a.out)[0] if a.check else build(a.nbs, a.out, workers=a.workers)
    except SiteError as e: print(f'\n{e}\n', file=sys.stderr); return 1
    shown = os.path.relpath(a.out)
    if bad:
        print(f'\nThe site in {shown} has {len(bad)} fault{"s"*(len(bad) > 1)}:\n  '+'\n  '.join(bad)+'\nMend the notebook (links in it name notebooks: [words](../folder/page.ipynb#anchor)) and build again.\n', file=sys.stderr); return 1
    pages = len([f for f in a.out.rglob('*.html') if 'pagefind' not in f.parts])-1
    if a.check: print(f'{pages} pages in {shown}: no dead link.'); return 0
    print(f'{pages} pages in {shown}, {time.time()-begin:.0f} s; no dead link. To read it:\n  {os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"} -m http.server -d {shown} --bind 127.0.0.1\nthen open http://127.0.0.1:8000/ (opening {shown}/index.html as a file works too, with a search of titles alone)')
    return 0

if __name__ == '__main__': sys.exit(main())
