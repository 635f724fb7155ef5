"What a cell defines, read from its text: names, signatures, docstrings, parameters with their comments. Nothing is imported or run."
import ast, io, re, tokenize
from dataclasses import dataclass, field
from functools import lru_cache

@dataclass
class Param:
    name:str            # with its stars
    type:str = ''       # annotation
    default:str = ''    # '' where it must be given
    comment:str = ''    # what stands beside it in the source

@dataclass
class Symbol:
    name:str                                             # `fit`, `Loader.state`, `GATES`
    kind:str                                             # function, class, method, value
    signature:str = ''                                   # with its name
    doc:str = ''
    params:list[Param] = field(default_factory=list)     # arguments; the fields of a class
    returns:str = ''                                     # annotation
    returned:str = ''                                    # the comment beside it
    members:list['Symbol'] = field(default_factory=list) # public methods

@lru_cache(4096)
def parse(code:str)->ast.Module|None: # None: a shell line or a magic, not Python alone
    try: return ast.parse(code)
    except SyntaxError: return None

def _comments(code:str)->dict[int, tuple[int, str, bool]]: # line -> column, text, alone on its line
    out = {}
    try:
        for t in tokenize.generate_tokens(io.StringIO(code).readline):
            if t.type == tokenize.COMMENT: out[t.start[0]] = t.start[1], t.string.lstrip('#').strip(), not t.line[:t.start[1]].strip()
    except (tokenize.TokenError, IndentationError): pass
    return out

def _joined(first:int, last:int, column:int, notes:dict)->str:
    "The comment on line `first`, and those alone on the lines after it (up to `last`) that stand further right than `column`."
    parts = [notes[first][1]] if first in notes else []
    for line in range(first+1, last):
        if line not in notes or not notes[line][2] or notes[line][0] <= column: break
        parts.append(notes[line][1])
    return ' '.join(parts)

def _arguments(fn:ast.FunctionDef|ast.AsyncFunctionDef, notes:dict, bound:bool)->tuple[list[Param], str]:
    a = fn.args
    plain = [*a.posonlyargs, *a.args]
    rows = [(x, x.arg, d) for x, d in zip(plain, [None]*(len(plain)-len(a.defaults))+a.defaults)]
    if a.vararg: rows.append((a.vararg, '*'+a.vararg.arg, None))
    rows += [(x, x.arg, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: rows.append((a.kwarg, '**'+a.kwarg.arg, None))
    ends = [max(x.end_lineno, d.end_lineno if d else 0) for x, _, d in rows]
    close = fn.returns.end_lineno if fn.returns else max([fn.lineno, *ends])
    body = fn.body[0].lineno
    params = []
    for i, (x, name, d) in enumerate(rows):
        until = rows[i+1][0].lineno if i+1 < len(rows) else close
        alone = i+1 == len(rows) or ends[i+1] != ends[i]                  # the last of its line
        alone &= ends[i] != close or not fn.returns and fn.lineno != close # beside `)->int:` it is the result's
        params.append(Param(name, ast.unparse(x.annotation) if x.annotation else '', ast.unparse(d) if d else '', _joined(ends[i], until, x.col_offset, notes) if alone else ''))
    returned = notes[close][1] if close in notes and body > close and (fn.returns or fn.lineno == close) else ''
    return params[bound:], returned

def _signature(name:str, fn, bound:bool)->str:
    text = re.sub(r'^(self|cls)(:\s*[\w.\'"]+)?(, )?', '', ast.unparse(fn.args)) if bound else ast.unparse(fn.args)
    return f'{name}({text})' + (f' → {ast.unparse(fn.returns)}' if fn.returns else '')

def _is(decorators:list[ast.expr], *names:str)->bool:
    return any(ast.unparse(d.func if isinstance(d, ast.Call) else d).split('.')[-1] in names for d in decorators)

def _function(fn, notes:dict, owner:str='')->Symbol:
    name, prop = (f'{owner}.{fn.name}' if owner else fn.name), _is(fn.decorator_list, 'property', 'cached_property')
    bound = bool(owner) and not _is(fn.decorator_list, 'staticmethod')
    params, returned = _arguments(fn, notes, bound)
    signature = name + (f' → {ast.unparse(fn.returns)}' if prop and fn.returns else '') if prop else _signature(name, fn, bound)
    return Symbol(name, 'method' if owner else 'function', signature, ast.get_docstring(fn) or '', params, ast.unparse(fn.returns) if fn.returns else '', returned)

def _class(node:ast.ClassDef, notes:dict)->Symbol:
    fields, members, init = [], [], None
    for i, x in enumerate(node.body):
        if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name) and not x.target.id.startswith('_'):
            until = node.body[i+1].lineno if i+1 < len(node.body) else node.end_lineno+1
            fields.append(Param(x.target.id, ast.unparse(x.annotation), ast.unparse(x.value) if x.value else '', _joined(x.end_lineno, until, x.col_offset, notes)))
        elif isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if x.name == '__init__': init = x
            elif not x.name.startswith('_') or (x.name.startswith('__') and x.name != '__post_init__' and ast.get_docstring(x)): members.append(_function(x, notes, node.name))
    if init: params, signature = _arguments(init, notes, True)[0], _signature(node.name, init, True).split(' → ')[0]
    else:
        params = fields
        shown = _is(node.decorator_list, 'dataclass')
        signature = node.name + ('(' + ', '.join(f'{p.name}: {p.type}' + (f'={p.default}' if p.default else '') for p in params) + ')' if shown else '')
    return Symbol(node.name, 'class', signature, ast.get_docstring(node) or '', params, members=members)

def symbols(code:str)->list[Symbol]: # in their order; empty where the text is not Python
    "The public functions, classes, patched methods and values that a cell defines."
    tree, notes, out = parse(code), _comments(code), []
    for node in tree.body if tree else []:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if _is(node.decorator_list, 'patch', 'patch_to', 'patch_property') and (first := node.args.args) and first[0].annotation:
                if not node.name.startswith('_') or ast.get_docstring(node): out.append(_function(node, notes, ast.unparse(first[0].annotation).strip('\'"')))
            elif not node.name.startswith('_'): out.append(_function(node, notes))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'): out.append(_class(node, notes))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out += [Symbol(t.id, 'value') for t in targets if isinstance(t, ast.Name) and not t.id.startswith('_') and node.value is not None]
    return out

def imported(code:str, package:str)->dict[str, tuple[str, str]]: # name here -> module, name there ('' where it is the module itself)
    "What a cell takes from `package`."
    out, tree = {}, parse(code)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level and node.module.split('.')[0] == package:
            out |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        elif isinstance(node, ast.Import): out |= {a.asname or a.name: (a.name, '') for a in node.names if a.name.split('.')[0] == package}
    return out

def only_imports(code:str)->bool:
    tree = parse(code)
    return bool(tree and tree.body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
