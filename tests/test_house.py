"The shape of the house: what every page and module keeps to."
import ast, json, re
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
names = [str(p.relative_to(root/'nbs')) for p in pages]


def cells(page:Path)->list[dict]: return json.loads(page.read_text())['cells']
def source(cell:dict)->str: return ''.join(cell['source'])
def exported(cell:dict)->bool: return cell['cell_type'] == 'code' and bool(re.match(r'#\|\s*export\b', source(cell)))


def module_of(page:Path)->str|None:
    m = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(source(c) for c in cells(page)), re.M)
    return m[1] if m else None


order = [m for p in pages if (m := module_of(p))] # the order of the book


def module_file(name:str)->Path: return root/'llmlab'/(name.replace('.', '/')+'.py')


def imports(path:Path)->list[str]:
    "Modules of ours that a module imports, wherever in its text."
    found, here = [], list(path.relative_to(root).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = '.'.join(here[:len(here)-node.level]*bool(node.level) + [node.module or ''])
            if module.split('.')[0] != 'llmlab': continue
            assert not any(a.name == '*' for a in node.names), f'{path}: import *'
            package = module.strip('.')+'.'
            for a in node.names: # `from ..data import corpora` names a module, `from ..files import hash_file` a function
                found.append((package+a.name if module_file((package+a.name)[7:]).exists() else package[:-1])[7:])
        elif isinstance(node, ast.Import): found += [a.name[7:] for a in node.names if a.name.startswith('llmlab.')]
    return found


def test_a_notebook_for_every_module():
    have = {str(p.relative_to(root/'llmlab').with_suffix('')).replace('/', '.') for p in (root/'llmlab').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')}
    assert have == set(order)
    assert len(order) == len(set(order))


@pytest.mark.parametrize('name', order)
def test_imports_point_back(name):
    before = order[:order.index(name)]
    forward = [m for m in imports(module_file(name)) if m not in before]
    assert not forward, f'{name} imports {forward}, which stand later in the book'


@pytest.mark.parametrize('page', pages, ids=names)
def test_page(page):
    cs = cells(page)
    ids = [c['id'] for c in cs]
    assert len(ids) == len(set(ids)), 'cell ids repeat'
    assert page.stat().st_size < 300_000, 'over 300 KB'
    long = [len(source(c).splitlines()) for c in cs if exported(c) and len(source(c).splitlines()) > 60]
    assert not long, f'exported cells of {long} lines'
    assert not [o for c in cs for o in c.get('outputs', []) if o['output_type'] == 'error'], 'a stored error'
    text = json.dumps([c.get('outputs') for c in cs])
    assert not re.search(r'/root/|/home/|/tmp/|\.venv|it/s\]', text), 'a path of this machine, or a progress bar, in the outputs'
    assert not any(o.get('name') == 'stderr' for c in cs for o in c.get('outputs', [])), 'stderr in the outputs'


@pytest.mark.parametrize('page', [p for p in pages if module_of(p)], ids=[n for n, p in zip(names, pages) if module_of(p)])
def test_page_of_a_module(page):
    cs = cells(page)
    assert re.fullmatch(r'#\|\s*default_exp\s+\S+', source(cs[0]).strip()), 'the first cell is `#| default_exp` alone'
    head = source(cs[1]).splitlines()
    assert cs[1]['cell_type'] == 'markdown' and head[0].startswith('# ') and any(l.startswith('> ') for l in head), 'title and promise come next'
    assert 'nbdev_export()' in source(cs[-1]), 'the last cell exports'
    rest = [source(c) for c in cs if c['cell_type'] == 'code' and not exported(c)]
    assert any(re.search(r'\b(test_\w+|assert|assert_close)\b', s) for s in rest), 'a page tests what it exports'
    assert all(c['cell_type'] == 'markdown' or exported(c) or not exported(n) or source(c).strip() for c, n in zip(cs, cs[1:]))


@pytest.mark.parametrize('name', order)
def test_public_functions_are_described(name):
    tree = ast.parse(module_file(name).read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            assert ast.get_docstring(node), f'{name}.{node.name} has no docstring'
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            bare = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
            assert not bare, f'{name}.{node.name}: no type for {bare}'


def test_every_page_is_in_the_book():
    import yaml
    listed = []
    def walk(items):
        for i in items: listed.append(i) if isinstance(i, str) else walk(i['contents'])
    walk(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(listed) == sorted(names)


def test_the_project_speaks_of_itself_alone():
    "No path of a machine and no package host in what is committed."
    hosts = re.compile('|'.join(['/wor' + 'k/', '/tmp/d' + 'ev', 'py' + 'pi\\.', 'files\\.python' + 'hosted']))
    for p in [*pages, *(root/'llmlab').rglob('*.py'), *(root/'llmlab').rglob('*.yaml'), *(root/'tests').rglob('*.py'), *(root/n for n in ('README.md', 'Makefile', 'settings.ini', '_quarto.yml', 'constraints.txt'))]:
        assert not hosts.search(p.read_text()), p
