"The user's own dataset file: names, versions, errors, and files that were written for other tools."
import os, pickle, subprocess, sys
from pathlib import Path
import pytest
from llmlab.data.userfile import UserCodeError, as_dataset_config, call_by_name, load_user_file, split_name
from llmlab.files import DataError, LlmlabError

LIST = 'def get_custom_dataset(split): return [split]\n'


@pytest.fixture
def write(tmp_path):
    def write(text:str, name:str='mine.py')->Path:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
        return tmp_path/name
    return write


def test_the_file_runs_once(write, tmp_path):
    path = write(f'from pathlib import Path\nPath({str(tmp_path/"log")!r}).open("a").write("x")\n{LIST}def get_data_collator(processor): return list\n')
    for _ in range(3):
        mine = load_user_file(path)
        assert mine.dataset('train') == ['train'] and mine.dataset('test') == ['test'] and mine.collator()(('x',)) == ['x']
    assert (tmp_path/'log').read_text() == 'x'
    assert not list(tmp_path.rglob('__pycache__'))


def test_a_changed_file_is_another_module(write):
    one = load_user_file(write(LIST))
    two = load_user_file(write(LIST.replace('[split]', '[split, 1]')))
    assert one.dataset('a') == ['a'] and two.dataset('a') == ['a', 1] and one.sha256 != two.sha256
    assert load_user_file(write(LIST)).module is one.module


def test_two_files_of_one_name(write):
    one, two = load_user_file(write(LIST, 'a/mine.py')), load_user_file(write(LIST, 'b/mine.py'))
    assert one.module is not two.module and one.sha256 == two.sha256


def test_classes_pickle(write):
    mine = load_user_file(write('from dataclasses import dataclass\n@dataclass\nclass Example:\n    text: str\ndef get_custom_dataset(split): return [Example("a")]\n'))
    assert pickle.loads(pickle.dumps(mine.dataset('train'))) == mine.dataset('train')


def test_modules_beside_the_file(write, tmp_path):
    before = list(sys.path)
    write('WORD = "beside"\n', 'words_beside_it.py')
    late = load_user_file(write('def get_custom_dataset(split):\n    from words_beside_it import WORD\n    return [WORD]\n'))
    assert late.dataset('train') == ['beside'] and sys.path == before
    sys.modules.pop('words_beside_it')


def test_a_copy_for_the_run(write, tmp_path):
    path = write(LIST)
    mine = load_user_file(path, copy_to=tmp_path/'run')
    assert (tmp_path/'run/mine.py').read_bytes() == path.read_bytes() and mine.describe() == dict(file='mine.py', function='get_custom_dataset', sha256=mine.sha256)
    again = load_user_file('mine.py', base=tmp_path/'run')
    assert again.sha256 == mine.sha256


def test_relative_paths_start_at_the_config(write, tmp_path, monkeypatch):
    write(LIST, 'configs/mine.py')
    monkeypatch.chdir(tmp_path)
    assert load_user_file('mine.py', base='configs').path == tmp_path/'configs/mine.py'
    with pytest.raises(DataError, match='does not exist'): load_user_file('mine.py')


# ---- names --------------------------------------------------------------------------------------------------------------------------

def test_another_function(write):
    "The collator is always get_data_collator: the name after the colon is that of the dataset."
    path = write(LIST+'def get_other(split): return [split, split]\ndef get_data_collator(processor): return list\n')
    mine = load_user_file(f'{path}:get_other')
    assert mine.dataset('a') == ['a', 'a'] and mine.collator()(('x',)) == ['x']
    with pytest.raises(DataError, match='has no function get_othr. It has get_custom_dataset, get_data_collator, get_other. Did you mean get_other'): load_user_file(f'{path}:get_othr')


@pytest.mark.parametrize('text, says', [('x = 1\n', 'has no function get_custom_dataset. It has none'), ('from os.path import join\ndef get_dataset(split): ...\n', 'It has get_dataset. Did you mean get_dataset')])
def test_a_missing_function(write, text, says):
    with pytest.raises(DataError, match=says): load_user_file(write(text))


@pytest.mark.parametrize('name', ['data.json', 'mine', 'mine.py.txt', '', 'mine.py:a:b', 'mine:get'])
def test_no_python_file(name):
    with pytest.raises(DataError, match='not a Python file'): split_name(name)


@pytest.mark.parametrize('parameters, gets', [('dataset_config, processor, split', ('c', 'p', 's')), ('dataset_config, tokenizer, split, split_ratio=0.5', ('c', 'p', 's', .8)), ('split', ('s',)), ('split, dataset_config', ('s', 'c')),
    ('split, seed=3, *, processor', ('s', 3, 'p')), ('dataset_config, processor, split, split_ratio, /', ('c', 'p', 's', .8)), ('split_ratio=.1, *rest', (.8,))])
def test_parameters(write, parameters, gets):
    names = [p.split('=')[0].strip() for p in parameters.split(',') if p.strip() not in ('*', '/', '*rest')]
    mine = load_user_file(write(f'def get_custom_dataset({parameters}): return [({", ".join(names)},)]\n'))
    assert mine.dataset('s', processor='p', dataset_config='c') == [gets]


def test_the_rest(write):
    mine = load_user_file(write('def get_custom_dataset(split, /, **rest): return [sorted(rest)]\n'))
    assert mine.dataset('s') == [['dataset_config', 'processor', 'split_ratio']]


def test_an_unknown_parameter(write):
    mine = load_user_file(write('def get_custom_dataset(dataset_config, processor, splt): return [1]\n'))
    with pytest.raises(DataError, match='parameter splt, which nobody fills.*Did you mean split'): mine.dataset('s')


# ---- errors -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('body, says', [('raise AttributeError("no such thing")', 'AttributeError: no such thing'), ('import sys; sys.exit(3)', 'SystemExit: 3'), ('raise StopIteration', 'StopIteration'), ('return dataset_config.colour', "no attribute 'colour'"), ('return {}["x"]', "KeyError: 'x'")])
def test_errors_of_the_user(write, body, says):
    mine = load_user_file(write(f'\n\ndef get_custom_dataset(dataset_config, split):\n    {body}\n'))
    with pytest.raises(UserCodeError, match=says) as found: mine.dataset('train')
    assert 'mine.py raised an error (in get_custom_dataset, split=\'train\')' in str(found.value) and 'line 4, in get_custom_dataset: ' in str(found.value)
    assert isinstance(found.value, LlmlabError) and found.value.__cause__ is not None and 'finetune.test_split' not in str(found.value)


def test_errors_of_the_collator_are_not_swallowed(write):
    mine = load_user_file(write(LIST+'def get_data_collator(processor):\n    return processor.pad\n'))
    with pytest.raises(UserCodeError, match="AttributeError"): mine.collator(3)
    with pytest.raises(DataError, match='gave a int, which cannot be called'): load_user_file(write(LIST+'def get_data_collator(processor): return 3\n')).collator()


@pytest.mark.parametrize('text, says', [('import nothing_of_this_name\n', 'ModuleNotFoundError'), ('def f(:\n', 'line 1: def f'), ('1/0\n', 'line 1, in <module>: 1/0'), ('x = "\x00"\n', 'null bytes')])
def test_errors_on_import(write, text, says):
    before = set(sys.modules)
    with pytest.raises(UserCodeError, match=says): load_user_file(write(text))
    assert not {m for m in set(sys.modules)-before if m.startswith('llmlab_user_')}
    assert load_user_file(write(LIST)).dataset('a') == ['a'] # mended, it runs


def test_a_long_traceback_is_short(write):
    mine = load_user_file(write('def f(n): return f(n+1)\ndef get_custom_dataset(split): return f(0)\n'))
    with pytest.raises(UserCodeError, match='RecursionError') as found: mine.dataset('train')
    assert len(str(found.value).splitlines()) < 15


@pytest.mark.parametrize('gives, says', [('None', 'gave nothing'), ('{"train": [1]}', 'gave several splits'), ('(x for x in [1])', 'a generator, which has no length'), ('[]', 'gave no examples'), ('3', 'a int, which')])
def test_what_is_no_dataset(write, gives, says):
    with pytest.raises(DataError, match=says): load_user_file(write(f'def get_custom_dataset(split): return {gives}\n')).dataset('train')


# ---- files that were written for other tools ----------------------------------------------------------------------------------------

def test_a_file_of_another_tool(write):
    "In the manner of llama-cookbook: four parameters, the split looked up in what was made, fields of dataset_config, a collator class."
    mine = load_user_file(write('''
class Collator:
    def __init__(self, processor): self.processor = processor
    def __call__(self, samples): return {"n": len(samples), "with": self.processor}
def get_custom_dataset(dataset_config, processor, split, split_ratio=0.9):
    rows = [{"messages": [], "file": dataset_config.file} for _ in range(20)]
    cut = int(20*split_ratio)
    return {dataset_config.train_split: rows[:cut], dataset_config.test_split: rows[cut:]}[split]
def get_data_collator(processor): return Collator(processor)
'''))
    config = as_dataset_config('mine.py', test_split='test', data_path='x')
    assert (len(mine.dataset('train', dataset_config=config)), len(mine.dataset('test', dataset_config=config, split_ratio=.75)), config.data_path) == (16, 5, 'x')
    assert mine.collator('p')([1, 2]) == {'n': 2, 'with': 'p'}
    with pytest.raises(UserCodeError, match='finetune.test_split'): mine.dataset('validation', dataset_config=config)


def test_nothing_heavy_is_imported():
    code = 'import sys, llmlab.data.userfile; print([m for m in ("torch", "transformers", "datasets", "numpy") if m in sys.modules])'
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)}).stdout.strip() == '[]'
