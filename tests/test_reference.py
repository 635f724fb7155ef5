"The reference pages show what is true now: their stored outputs are generated again and compared."
import ast, json, re, shlex
from pathlib import Path
import pytest
from llmlab.cli import tidy
from llmlab.config import presets
from llmlab.reference import EXAMPLES, METRICS, commands

pages = Path(__file__).resolve().parent.parent/'nbs'/'reference'


@pytest.mark.parametrize('name', ['config', 'commands'])
def test_stored_is_generated(name):
    space, compared = {}, 0
    for cell in json.loads((pages/f'{name}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        *body, last = ast.parse(''.join(cell['source'])).body
        exec(compile(ast.Module(body, []), name, 'exec'), space)
        made = eval(compile(ast.Expression(last.value), name, 'eval'), space)
        stored = ''.join(cell['outputs'][0]['data']['text/markdown'])
        assert stored == made.data, f'{name} is stale: run nbs/reference/{name}.ipynb again'
        compared += 1
    assert compared


def test_metrics_that_the_code_writes_are_in_the_table():
    "The table is kept by hand: every name that stands whole in the code is in it, and all names of it that are whole stand in the code."
    code = ''.join(p.read_text() for p in sorted((pages.parent.parent/'llmlab').rglob('*.py')) if p.name not in ('reference.py', '_modidx.py'))
    written = set(re.findall(rf"""['"]({'|'.join(METRICS)})/(\w+)['"]""", code))
    assert len(written) > 20
    assert not [f'{who}/{name}' for who, name in written if name not in METRICS[who]]
    made = re.compile(r'(gate|read|state|denominator)_LL|TASK|\.\.\.|distinct\d|loss_(first|last)|checks_') # put together from pieces
    assert not [f'{who}/{name}' for who, names in METRICS.items() for name in names if not made.match(name) and not re.search(rf'\b{name}\b', code)]


def test_examples_are_command_lines():
    parsers = commands()
    assert set(EXAMPLES) == set(parsers)
    for name, lines in EXAMPLES.items():
        for line, _ in lines:
            first, *words = shlex.split(line)
            assert first == name
            parsers[name].parse_args(tidy(words, any(a.dest == 'overrides' for a in parsers[name]._actions))) # leaves with 2 where it is none
            if '--config' in words: assert words[words.index('--config')+1] in presets(), line
