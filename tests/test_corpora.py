"Corpora: what breaks at night."
import gzip, json, math, os, subprocess, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from llmlab import config
from llmlab.data import corpora
from llmlab.data.corpora import Corpus, Document, GRAMMAR, docstrings, hash_share, open_corpus, story, story_entropy
from llmlab.files import DataError

root = Path(__file__).resolve().parent.parent
shakespeare = root.parent/'shared'/'data'/'tinyshakespeare.txt'
texts_of = st.lists(st.text(max_size=30), max_size=40)


def listed(texts, **options): return Corpus('listed', 'none', lambda start: ((t, t) for t in texts[start:]), lambda: list(texts), lambda: None, **options)
def files(path, base=None, **more): return open_corpus(config.Data(name='files', path=str(path), **more), base)
def read(corpus): return [d.text for d, _ in corpus.all()]


# --- splits

@given(texts_of, texts_of, st.floats(0, .99))
@settings(deadline=None)
def test_adding_documents_moves_none(texts, more, fraction):
    sides = {d.text: s for d, s in listed(['x']+texts, validation_fraction=fraction).all()}
    grown = {d.text: s for d, s in listed(more+['x']+texts+more, validation_fraction=fraction).all()}
    assert sides.items() <= grown.items()


@given(st.text(min_size=1), st.floats(0, .99), st.floats(0, .99))
def test_a_larger_fraction_only_adds(text, a, b):
    side = {f: next(s for _, s in listed([text], validation_fraction=f).all()) for f in (a, b)}
    assert side[max(a, b)] == 'validation' or side[min(a, b)] == 'train'


@given(texts_of, st.floats(0, .99), st.sampled_from(['hash', 'tail']), st.integers(0, 45), st.integers(0, 45))
@settings(deadline=None)
def test_any_range_is_that_part_of_the_whole(texts, fraction, split, start, stop):
    corpus = listed(['x']+texts, validation_fraction=fraction, split=split)
    whole = list(corpus.all())
    assert list(corpus.all(start, stop)) == [(d, s) for d, s in whole if start <= d.index < stop]
    for side in ('train', 'validation'):
        assert list(corpus.iterate(side, 1)) == [d for d, s in whole if s == side and d.index >= 1]
    joined = ''.join(['x']+texts)
    assert ''.join(d.text for d, _ in whole) == joined
    if split == 'tail': assert ''.join(d.text for d, s in whole if s == 'train') == joined[:int(len(joined)*(1-fraction))]


def test_max_documents_is_a_prefix():
    texts = [str(i) for i in range(100)]
    assert read(listed(texts, max_documents=10)) == texts[:10]
    assert list(listed(texts, max_documents=10).all(10)) == []
    tail = listed(texts, max_documents=10, split='tail', validation_fraction=.5)
    assert [(d.text, s) for d, s in tail.all()] == [(t, 'train' if i < 5 else 'validation') for i, t in enumerate(texts[:10])]


def test_empty_rows_keep_their_number():
    assert [(d.text, d.index) for d, _ in listed(['a', '', 'b']).all()] == [('a', 0), ('b', 2)]


def test_empty_corpora_and_splits():
    with pytest.raises(DataError, match='holds no text'): list(listed([]).all())
    with pytest.raises(DataError, match='train split'): list(listed(['a'], validation_fraction=.999999).iterate('train'))
    assert list(listed(['a'], validation_fraction=0).iterate('validation')) == []
    assert list(listed(['a']).iterate('validation', start=1)) == [] # a job that goes on at the end is no error


def test_fingerprints():
    a = listed(['a', 'b'])
    assert a.fingerprint == listed(['a', 'b']).fingerprint
    others = [listed(['a', 'c']), listed(['b', 'a']), listed(['a', 'b'], split='tail'), listed(['a', 'b'], validation_fraction=.5), listed(['a', 'b'], max_documents=1)]
    assert len({c.fingerprint for c in [a, *others]}) == 6


def test_shakespeare_is_cut_where_nanogpt_cuts_it():
    if not shakespeare.exists(): pytest.skip('needs ../shared/data/tinyshakespeare.txt')
    text = shakespeare.read_text(encoding='utf-8')
    n = len(text)
    corpus = files(shakespeare, split='tail', validation_fraction=.1)
    train, validation = ([d.text for d in corpus.iterate(s)] for s in ('train', 'validation'))
    assert train == [text[:int(n*.9)]] and validation == [text[int(n*.9):]]
    assert corpus.name == 'tinyshakespeare' and corpus.size_bytes == shakespeare.stat().st_size


@given(st.text(max_size=50))
def test_num_bytes(text): assert Document(text, '', 0).num_bytes == len(text.encode())


# --- stories

@given(st.integers(0, 5), st.integers(0, 10**9))
def test_a_story_is_a_pure_function(seed, index):
    assert story(seed, index) == story(seed, index)
    assert open_corpus(config.Data(name='stories', seed=seed, max_documents=10**9+1)).all(index).__next__()[0].text == story(seed, index).text


def test_the_mean_surprise_is_the_entropy():
    nats = [story(3, i).nats for i in range(20_000)]
    mean = sum(nats)/len(nats)
    error = math.sqrt(sum((x-mean)**2 for x in nats)/len(nats)**2)
    assert abs(mean-story_entropy()) < 4*error # four standard errors


def derivations(text:str, rule:str='story', at:int=0, said:tuple=())->list[tuple[int, tuple]]:
    "All ways in which `rule` can tell `text[at:]` up to some place: (that place, what is remembered)."
    found = []
    for alternative in corpora._alternatives(rule):
        states = [(at+len(alternative[0]), said)] if text.startswith(alternative[0], at) else []
        for name, part, then in zip(alternative[1::3], alternative[2::3], alternative[3::3]):
            after = []
            for place, known in states:
                word = dict(known).get(part)
                if word is not None: ends = [(place+len(word), known)] if text.startswith(word, place) else []
                else: ends = derivations(text, part, place, known)
                for end, learned in ends:
                    if name: learned = tuple((dict(learned) | {name: text[place:end]}).items())
                    if text.startswith(then, end): after.append((end+len(then), learned))
            states = after
        found += states
    return found


@pytest.mark.parametrize('index', range(100))
def test_a_story_can_be_told_in_one_way_only(index):
    text = story(1, index).text
    assert sum(end == len(text) for end, _ in derivations(text)) == 1


def test_every_story_fits_into_its_number():
    def most(rule): return math.log2(len(GRAMMAR[rule])) + max(sum(most(r) for r in a[2::3] if r in GRAMMAR) for a in corpora._alternatives(rule))
    assert most('story') < 97


# --- python

def test_python_is_real_text_without_leaks():
    corpus = open_corpus(config.Data())
    docs = list(corpus.all())
    assert len({d.text for d, _ in docs}) == len(docs) > 1000
    assert sum(d.num_bytes for d, _ in docs) == corpus.size_bytes > 10_000_000
    sides = {d.text: s for d, s in docs}
    for text, decides in corpora._python_texts():
        if text != decides: assert sides[text] == sides[decides]
    text = ''.join(sides)
    assert 'site-packages/torch' not in text and str(Path(sys.prefix).resolve()) not in text
    assert [d for d, _ in corpus.all(700, 720)] == [d for d, _ in docs[700:720]]


def test_python_survives_what_it_finds(tmp_path):
    (tmp_path/'good.py').write_text('"""Good."""\n')
    (tmp_path/'copy.py').write_text('"""Good."""\n')
    (tmp_path/'latin.py').write_bytes('# naïve\n'.encode('latin-1'))
    (tmp_path/'empty.py').write_text('')
    (tmp_path/'gone.py').symlink_to(tmp_path/'nowhere.py')
    (tmp_path/'test').mkdir(); (tmp_path/'test'/'test_good.py').write_text('assert True\n')
    (tmp_path/'site-packages').mkdir(); (tmp_path/'site-packages'/'torch.py').write_text('x = 1\n')
    assert corpora._python_sources(tmp_path) == {'"""Good."""\n': False, 'assert True\n': True}


@given(st.text())
def test_docstrings_never_fail(source): assert isinstance(docstrings(source), str)


# --- files

def test_a_folder_in_the_order_of_its_names(tmp_path):
    for name, text in {'b.txt': 'two', 'a/z.md': 'one', 'c.jsonl': '{"text": "three"}\n\n{"text": null}\n{"text": "four"}\n', '.hidden.txt': 'no', 'e.png': '?'}.items():
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text(text)
    pq.write_table(pa.table({'text': ['five', None, 'six']}), tmp_path/'d.parquet')
    corpus = files(tmp_path.name, tmp_path.parent)
    assert [(d.text, d.index) for d, _ in corpus.all()] == [('one', 0), ('two', 1), ('three', 2), ('four', 4), ('five', 5), ('six', 7)]
    for start in range(9): assert [d.index for d, _ in corpus.all(start)] == [i for i in (0, 1, 2, 4, 5, 7) if i >= start]
    before = corpus.fingerprint
    (tmp_path/'e.png').write_text('!'); assert files(tmp_path).fingerprint == before
    (tmp_path/'b.txt').write_text('too'); assert files(tmp_path).fingerprint != before


def test_the_text_is_taken_as_it_is(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'\xef\xbb\xbfone\r\ntwo \n\n')
    assert read(files(tmp_path/'a.txt')) == ['one\r\ntwo \n\n']


@given(st.lists(st.text(max_size=20), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 14))
@settings(deadline=None, max_examples=30)
def test_parquet_from_any_row(tmp_path_factory, texts, group, start):
    path = tmp_path_factory.mktemp('rows')/'a.parquet'
    pq.write_table(pa.table({'text': pa.array(texts, pa.large_string())}), path, row_group_size=group)
    assert list(corpora._read_rows(path, 'text', start)) == texts[start:]


def bad_file(folder:Path, name:str, content:bytes)->Path:
    (folder/name).write_bytes(content)
    return folder/name


@pytest.mark.parametrize('name, content, says', [
    ('a.txt', b'one\ntwo\nna\xefve', r'a\.txt, line 3, byte 10: not UTF-8 .*iconv'),
    ('a.txt', 'one'.encode('utf-16'), r'UTF-16'),
    ('a.txt', b'', 'holds no text'),
    ('a.jsonl', b'', 'holds no text'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "n\xef"}\n', r'line 2, byte 25: not UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": \n', r'line 3: not a line of JSON'),
    ('a.jsonl', b'['*100_000, r'line 1: not a line of JSON'),
    ('a.jsonl', b'["a"]\n', r'line 1: .*not a JSON object'),
    ('a.jsonl', b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2: no column 'text'. The columns are body, id"),
    ('a.jsonl', b'{"text": ["a"]}\n', r"line 1: the text is \['a'\], not a string"),
    ('a.jsonl', b'{"text": "a\\ud800b"}\n', r'line 1: half a character .* position 1'),
    ('a.parquet', b'PAR1 and then nothing', r'not a parquet file, or cut short'),
    ('a.csv', b'text\n', r'not \.csv'),
])
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, says):
    path = bad_file(tmp_path, name, content)
    with pytest.raises(DataError, match=says): list(files(path).all())


def test_what_is_wrong_with_a_parquet_file_is_said(tmp_path):
    path = tmp_path/'a.parquet'
    pq.write_table(pa.table({'text': ['x'*1000]*100, 'number': list(range(100))}), path, compression='none', use_dictionary=False)
    with pytest.raises(DataError, match="no column 'body'. The columns are text, number"): list(files(path, text_column='body').all())
    with pytest.raises(DataError, match='row 0: the text is 0, not a string'): list(files(path, text_column='number').all())
    raw = path.read_bytes()
    path.write_bytes(raw[:len(raw)//2])
    with pytest.raises(DataError, match='cut short'): list(files(path).all())
    path.write_bytes(b'PAR1'+b'\xff'*1000+raw[1004:])
    with pytest.raises(DataError, match='Copy or download'): list(files(path).all())


def test_paths_that_are_not_there(tmp_path):
    (tmp_path/'corpus.txt').write_text('x')
    with pytest.raises(DataError, match="'corpus.txt' is in the same folder"): files('korpus.txt', tmp_path)
    with pytest.raises(DataError, match='nor does the folder'): files(tmp_path/'no'/'where')
    (tmp_path/'pictures').mkdir()
    with pytest.raises(DataError, match='it is empty'): files(tmp_path/'pictures')
    (tmp_path/'pictures'/'a.png').write_text('')
    with pytest.raises(DataError, match=r'only \.png'): files(tmp_path/'pictures')
    corpus = files('corpus.txt', tmp_path)
    (tmp_path/'corpus.txt').unlink()
    with pytest.raises(DataError, match='cannot read .*No such file'): list(corpus.all())


# --- the user's own file

def mine(tmp_path, source, **more):
    (tmp_path/'mine.py').write_text(source)
    return open_corpus(config.Data(name='file', file='mine.py', **more), tmp_path)


def test_own_file(tmp_path):
    (tmp_path/'neighbour_of_mine.py').write_text('words = ["a", "b", "c"]\n')
    corpus = mine(tmp_path, 'from neighbour_of_mine import words\ndef documents():\n    for w in words: yield {"body": w}\n', text_column='body')
    assert corpus.name == 'mine' and read(corpus) == ['a', 'b', 'c'] == read(corpus) # anew for each pass
    assert [d.text for d, _ in corpus.all(2)] == ['c']
    before = corpus.fingerprint
    assert mine(tmp_path, 'def documents(): return ["a"]').fingerprint != before


@pytest.mark.parametrize('source, says', [
    ('def texts(): return []\ndef _private(): pass\nimport json\n', r'no function documents\(\)\. It has texts;'),
    ('x = 1\n', 'Write one that yields'),
    ('def documents(:\n', r'mine\.py, line 1: SyntaxError'),
    ('\nimport no_such_module_at_all\n', r'mine\.py, line 2: ModuleNotFoundError'),
    ('def documents():\n    import json\n    return json.loads("{")\n', r'mine\.py, line 3: JSONDecodeError'),
    ('def documents():\n    yield "a"\n    raise KeyError("lost")\n', r"mine\.py, line 3: KeyError: 'lost'"),
    ('def documents(folder): return []\n', r'TypeError: documents\(\) missing'),
    ('def documents(): return "one long text"\n', 'gave one str'),
    ('def documents(): return 7\n', 'gave one int'),
    ('def documents(): yield 7\n', 'document 0: the text is 7'),
    ('def documents(): yield {"body": "a"}\n', "document 0: no column 'text'. The columns are body"),
    ('def documents(): yield "\\ud800"\n', 'half a character'),
    ('def documents(): return []\n', 'holds no text'),
])
def test_what_is_wrong_with_an_own_file_is_said(tmp_path, source, says):
    with pytest.raises(DataError, match=says): list(mine(tmp_path, source).all())


def test_own_file_that_is_missing(tmp_path):
    with pytest.raises(DataError, match='Set data.file to a Python file'): open_corpus(config.Data(name='file', file='mine.py'), tmp_path)
    with pytest.raises(DataError, match='data.file is not set'): open_corpus(config.Data(name='file'))


# --- the hub

HUB_SCRIPT = '''
import json, sys
from pathlib import Path
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.files import DataError
def message(**data):
    try: list(open_corpus(config.Data(**data), Path(sys.argv[1])).all())
    except DataError as e: return str(e)
corpus = open_corpus(config.Data(name='hub', path='poems', text_column='body'), Path(sys.argv[1]))
print(json.dumps(dict(whole=[d.text for d, _ in corpus.all()], rest=[(d.index, d.text) for d, _ in corpus.all(3)], some=[d.text for d, _ in corpus.all(1, 3)], name=corpus.name,
    offline=message(name='tinystories'), split=message(name='hub', path='poems', hub_split='nope'), column=message(name='hub', path='poems'),
    damaged=message(name='hub', path='damaged', text_column='body'), missing=message(name='hub', path='not/there'))))
'''


def test_the_hub_without_a_network(tmp_path):
    for folder in ('poems', 'damaged'):
        (tmp_path/folder).mkdir()
        for i in range(2): pq.write_table(pa.table({'body': [f'{i}{j}' for j in range(3)], 'id': [1, 2, 3]}), tmp_path/folder/f'{i}.parquet')
    (tmp_path/'damaged'/'1.parquet').write_bytes(b'PAR1 nonsense PAR1')
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'home'), PYTHONPATH=str(root), HF_DATASETS_DISABLE_PROGRESS_BARS='1')
    done = subprocess.run([sys.executable, '-c', HUB_SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got['whole'] == ['00', '01', '02', '10', '11', '12'] and got['rest'] == [[3, '10'], [4, '11'], [5, '12']] and got['some'] == ['01', '02'] and got['name'] == 'poems'
    for text in (got['offline'], got['missing']): assert 'never read on this machine' in text and 'hf download' in text and 'data.name=python' in text
    assert 'roneneldan/TinyStories' in got['offline']
    assert 'data.hub_split' in got['split'] and 'The columns are body, id' in got['column'] and '1.parquet: not a parquet file' in got['damaged']


def test_known_datasets():
    for name, of in corpora.HUB.items():
        corpus = open_corpus(config.Data(name=name, max_documents=10))
        assert corpus.name == name and corpus.licence == of.licence and corpus.size_bytes is None
    assert open_corpus(config.Data(name='openwebtext')).size_bytes == 39_769_491_688


def test_what_is_no_dataset(tmp_path):
    (tmp_path/'poems').mkdir()
    for path, says in [('./poemz', "no folder here; 'poems' is in the same folder, and no name of a dataset"), ('a/b/c', 'no name'), ('poems', 'holds no dataset')]:
        with pytest.raises(DataError, match=says): list(open_corpus(config.Data(name='hub', path=path), tmp_path).all())


def test_gzipped_lines(tmp_path):
    with gzip.open(tmp_path/'a.jsonl.gz', 'wt') as f: f.write('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path/'b.jsonl').write_text('{"text": "three"}\n')
    (tmp_path/'c.gz').write_bytes(b'no')
    corpus = files(tmp_path)
    for start in range(4): assert [d.text for d, _ in corpus.all(start)] == ['one', 'two', 'three'][start:]
    raw = (tmp_path/'a.jsonl.gz').read_bytes()
    for bad in (raw[:-9], b'no gzip at all', raw[:12]+b'\xff'*20+raw[32:]):
        (tmp_path/'a.jsonl.gz').write_bytes(bad)
        with pytest.raises(DataError, match=r'a\.jsonl\.gz: not a gzip file, or cut short'): list(corpus.all())


def test_a_light_import():
    "Opening a corpus loads no heavy library."
    code = "import sys, llmlab.data.tokenizer; from llmlab import config; from llmlab.data.corpora import open_corpus; open_corpus(config.Data()); open_corpus(config.Data(name='tinystories')); print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers', 'tiktoken', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | dict(PYTHONPATH=str(root)), capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout+done.stderr

def test_the_size_of_parquet_is_that_of_its_text(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    texts = [f'number {i} '*200 for i in range(500)] # compresses well
    pq.write_table(pa.table({'text': texts, 'other': texts}), tmp_path/'a.parquet', use_dictionary=False)
    corpus = open_corpus(config.Data(name='files', path=str(tmp_path)))
    assert corpus.size_bytes == pytest.approx(sum(map(len, texts)), rel=.01) and (tmp_path/'a.parquet').stat().st_size < corpus.size_bytes/5
