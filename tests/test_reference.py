"The reference pages show what is true now: their stored outputs are generated again and compared."
import ast, json
from pathlib import Path
import pytest

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
