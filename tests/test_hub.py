"The hub: what breaks at night, against a hub of our own that breaks on demand."
import gzip, io, json, os, random, re, subprocess, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st
from fake_hub import FakeHub, oid, sha
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.hub import Listing, ask_hub, backoff, fetch
from llmlab.files import DataError

root = Path(__file__).resolve().parent.parent
texts = [f'document {i} of many, '+chr(97+i%26)*(i*37%400) for i in range(600)]


# --- a hub, and a process that reads from it

def parquet(texts, **more):
    f = io.BytesIO()
    pq.write_table(pa.table({'id': list(range(len(texts))), 'text': texts}), f, compression='none', use_dictionary=False, **more)
    return f.getvalue()
def jsonl(texts): return ''.join(json.dumps({'text': t})+'\n' for t in texts).encode()
def csv(texts): return ('text;n\n'+''.join(f'{t};1\n' for t in texts)).encode()
def split(write, name='data/train-{:05}-of-00003.parquet', among=(250, 100, 250)):
    ends = [sum(among[:i]) for i in range(len(among)+1)]
    return {name.format(i): write(texts[a:b]) for i, (a, b) in enumerate(zip(ends, ends[1:]))}


class Client:
    "A process that reads corpora."
    def __init__(self, url, home, **env):
        env = os.environ | dict(HF_ENDPOINT=url, HF_HOME=str(home), PYTHONPATH=str(root), HF_HUB_DOWNLOAD_TIMEOUT='1', HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0', HF_DATASETS_OFFLINE='0', OMP_NUM_THREADS='1',
            HF_DATASETS_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_PROGRESS_BARS='1') | env
        self.process = subprocess.Popen([sys.executable, str(root/'tests'/'hub_client.py')], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def ask(self, path, **more):
        data = dict(name='hub', path=path) | more.pop('data', {})
        self.process.stdin.write(json.dumps(dict(data=data, **more))+'\n'); self.process.stdin.flush()
    def answer(self): return json.loads(self.process.stdout.readline())
    def read(self, path, **more): self.ask(path, **more); return self.answer()
    def close(self): self.process.stdin.close(); self.process.wait()


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('home')

@pytest.fixture(scope='module')
def shared_hub():
    hub = FakeHub()
    yield hub
    hub.close()

@pytest.fixture
def hub(shared_hub):
    shared_hub.fail.clear(); shared_hub.log.clear(); shared_hub.served.clear()
    return shared_hub

@pytest.fixture(scope='module')
def client(shared_hub, home):
    client = Client(shared_hub.url, home)
    yield client
    client.close()

@pytest.fixture
def poems(hub):
    "A dataset of three parquet files that this test alone reads."
    name = f'owner/poems-{len(hub.repos)}'
    hub.add(name, {'README.md': b'---\nlicense: mit\n---\nPoems.\n', **split(parquet)})
    return name

def names(hub, name): return [f for f in hub.repos[name]['main'] if f.startswith('data/')]


# --- all is well

@pytest.mark.parametrize('files', [split(parquet), split(jsonl, 'a/{}.jsonl'), split(lambda t: gzip.compress(jsonl(t)), '{}.jsonl.gz'), split(jsonl, '{}.json'), split(csv, 'data/{}.csv')],
    ids=['parquet', 'jsonl', 'jsonl-gz', 'json', 'csv'])
def test_the_whole_and_any_part(hub, client, files, request):
    name = f'owner/{request.node.callspec.id}-whole'
    hub.add(name, files | {'README.md': b'---\nconfigs:\n- config_name: only\n  data_files: "**/*"\n  sep: ";"\n---\n' if 'csv' in name else b''})
    starts = [0, 1, 249, 250, 251, 349, 350, 599, 600, 700]
    for start in reversed(starts): # the farthest first, when nothing is known of the files before
        got = client.read(name, start=start)
        assert got.get('texts') == texts[start:] and not got['said'], (start, got.get('error'))
    assert client.read(name, start=240, stop=360)['texts'] == texts[240:360]
    for file, data in files.items(): assert hub.served[file] <= len(data)+(2*65536 if 'parquet' in name else 0) # once the file, and its footer for the rows and the estimate


def test_equal_to_local_files(hub, client, poems, tmp_path):
    for name, data in split(parquet).items(): (tmp_path/Path(name).name).write_bytes(data)
    local = open_corpus(config.Data(name='files', path=str(tmp_path)))
    assert client.read(poems)['texts'] == [d.text for d, _ in local.all()] == texts


def test_known_before_is_asked_for_once(hub, client, poems):
    client.read(poems)
    hub.log.clear()
    assert client.read(poems)['texts'] == texts
    assert [m for m, p, _ in hub.log] == ['GET'] and hub.log[0][1] == f'/api/datasets/{poems}'


def test_a_start_in_the_middle_reads_only_footers_before_it(hub, client, poems):
    first, second, third = names(hub, poems)
    big = parquet([t*80 for t in texts[:250]])
    hub.repos[poems]['main'][first] = big
    assert client.read(poems, start=260, stop=270)['texts'] == texts[260:270]
    assert hub.served[first] <= 2 << 16 < len(big) # the rows, and the estimate of the text
    assert hub.times(f'GET .*{first}') == 2 and hub.times(f'GET .*{second}') == 2 and hub.times(f'GET .*{third}') == 0


def as_fineweb(texts):
    f, n = io.BytesIO(), len(texts)
    pq.write_table(pa.table(dict(text=texts, id=['<urn:uuid>']*n, dump=['CC-MAIN-2024-10']*n, url=['https://']*n, file_path=['s3://']*n, language=['en']*n,
        language_score=[.9]*n, token_count=[9]*n, score=[3.1]*n, int_score=[3]*n)), f)
    return f.getvalue()


@pytest.mark.parametrize('name, path, files, where', [
    ('fineweb-edu', 'HuggingFaceFW/fineweb-edu', {'data/CC-MAIN-2024-10/train-00000-of-00001.parquet': as_fineweb(['all']), 'sample/100BT/000_00000.parquet': as_fineweb(['100'])} | split(as_fineweb, 'sample/10BT/{:03}_00000.parquet'),
        'configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n- config_name: sample-100BT\n  data_files:\n  - split: train\n    path: sample/100BT/*'),
    ('openwebtext', 'Skylion007/openwebtext', split(parquet, 'plain_text/train-{:05}-of-00003.parquet'), 'configs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n  default: true'),
    ('tinystories', 'roneneldan/TinyStories', split(parquet, 'data/train-{:05}-of-00003-2d5a1467fff1081b.parquet') | {'data/validation-00000-of-00001-869c898b519ad725.parquet': parquet(['held out']), 'TinyStories-train.txt': b'x', 'TinyStories_all_data.tar.gz': b'x'}, 'license: cdla-sharing-1.0'),
])
def test_known_datasets_as_they_are_laid_out(hub, client, name, path, files, where):
    hub.add(path, {'README.md': f'---\n{where}\n---\n'.encode(), **files})
    got = client.read(None, data=dict(name=name), start=300)
    assert got.get('texts') == texts[300:], got
    if name == 'openwebtext': assert got['size'] == 39_769_491_688
    if name == 'fineweb-edu': assert client.read(None, data=dict(name=name, subset='default'))['texts'] == ['all']
    if name == 'tinystories': assert client.read(None, data=dict(name=name, hub_split='validation'))['texts'] == ['held out']


def test_a_script_and_what_the_hub_made_of_it(hub, client, poems):
    hub.add(poems, {poems.split('/')[1]+'.py': b'import datasets'})
    assert re.search('scripts are no longer supported.*data.revision=refs/convert/parquet', client.read(poems)['error'])
    hub.add(poems, {'default/train/0000.parquet': parquet(['converted'])}, revision='refs/convert/parquet')
    assert client.read(poems, data=dict(revision='refs/convert/parquet'))['texts'] == ['converted']


def test_an_estimate_of_the_text(hub, client, poems):
    size = client.read(poems, take=1)['size']
    assert abs(size/sum(map(len, texts))-1) < .1
    assert client.read('owner/many-lines', take=1).get('size') is None


def test_a_token_stays_with_the_hub(hub, home, poems):
    client = Client(hub.url, home, HF_TOKEN='hf_secret')
    assert client.read(poems)['texts'] == texts and hub.leaked == 0 and hub.signed
    client.close()


def test_columns_splits_subsets(hub, client):
    hub.add('owner/many', {'README.md': b'---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: a/*\n  - split: test\n    path: t/*\n- config_name: b\n  data_files: b/*\n---\n',
        'a/0.jsonl': jsonl(['a']), 't/0.jsonl': jsonl(['t']), 'b/0.jsonl': b'{"body": "b"}\n'})
    read = lambda **data: client.read('owner/many', data=data)
    assert read(subset='a')['texts'] == ['a'] and read(subset='a', hub_split='test')['texts'] == ['t'] and read(subset='b', text_column='body')['texts'] == ['b']
    assert re.search(r"'a', 'b'.*data\.subset", read()['error']) and re.search(r"Available: \['a', 'b'\].*data\.subset", read(subset='c')['error'])
    assert re.search(r"no split 'dev', it has train, test\. .*data\.hub_split", read(subset='a', hub_split='dev')['error'])
    assert 'The columns are body' in read(subset='b')['error']


# --- something breaks

@pytest.mark.parametrize('on, times, how, waits', [
    ('GET .*00001', 3, dict(status=503), [1, 2, 3]),
    ('GET .*00000', 1, dict(status=429, headers={'Retry-After': '77'}), [1]),
    ('GET .*00000', 1, dict(status=429, headers={'RateLimit': '"resolvers";r=0;t=55'}), [1]),
    ('GET .*00002', 1, dict(cut=0), [1]),
    ('GET .*00000', 4, dict(cut=9000), [1, 1, 1, 1]),          # bytes arrived each time: the patience begins anew
    ('GET .*00000', 2, dict(cut=9000, ranges='ignored'), [1, 2]), # begun anew by a server that knows no ranges
    ('GET .*00001', 1, dict(wrong=True), [1]),
    ('GET .*00001', 1, dict(slow=2.5), [1]),                  # longer than the timeout
    ('GET /api/datasets/[^/]*/[^/]*$', 2, dict(status=500), [1, 2]),
    ('GET .*/tree/', 1, dict(status=502), None),              # retried by the library, or by us
    ('POST .*/paths-info/', 2, dict(status=504), [1, 2]),
    ('HEAD .*README', 2, dict(status=503), None),
    ('HEAD .*00001', 7, dict(status=503), None),
], ids=str)
def test_it_passes(hub, client, poems, on, times, how, waits):
    hub.will(on, times, **how)
    got = client.read(poems)
    assert got.get('texts') == texts, got
    assert hub.fail[0]['times'] == 0
    if waits is not None:
        assert [failed for failed, _, _ in got['waits']] == waits and len(got['said']) == len(waits)
        assert all(line.startswith(poems) and re.search(r'asking again in \d+ s \(\d of \d\)$', line) for line in got['said'])
    if 'headers' in how: assert got['waits'] == [[1, seconds, seconds] for seconds in [77. if 'Retry-After' in how['headers'] else 55.]]


@pytest.mark.parametrize('seed', range(20))
def test_a_bad_night(hub, client, poems, seed):
    "Many things break at once, in any order: no document is lost, none comes twice."
    rng = random.Random(seed)
    for _ in range(rng.randint(3, 10)):
        how = rng.choice([dict(status=rng.choice([500, 502, 503, 504, 429, 408])), dict(cut=rng.randint(0, 60_000)), dict(cut=rng.randint(0, 60_000), ranges='ignored'), dict(wrong=True), dict(cut=0)])
        hub.will(rng.choice(['GET .*0000[012]-of', 'GET .*00001-of', '(GET|HEAD) .*00002-of', 'GET /api', 'POST ', 'HEAD .*README']), rng.randint(1, 2), **how)
    start = rng.choice([0, 0, 100, 250, 340, 599])
    got = client.read(poems, start=start)
    assert got.get('texts') == texts[start:], got.get('error')
    assert client.read(poems)['texts'] == texts


def test_a_broken_file_is_gone_on_with(hub, client, poems):
    file = names(hub, poems)[0]
    hub.will(f'GET .*{file}', 3, cut=7000)
    assert client.read(poems)['texts'] == texts
    assert [r for m, p, r in hub.log if m == 'GET' and p.endswith(file)] == ['bytes=0-', 'bytes=7000-', 'bytes=14000-', 'bytes=21000-']
    assert hub.served[file] == len(hub.repos[poems]['main'][file]) # no byte twice


@pytest.mark.parametrize('on, how, says', [
    ('.*00000', dict(status=403, headers={'X-Error-Code': 'GatedRepo'}), r'Accept them on https://huggingface.co/datasets/owner/.*hf auth login'),
    ('HEAD .*README', dict(status=401, headers={'X-Error-Code': 'GatedRepo'}), r'Accept them on'),
    ('GET /api/datasets/[^/]*/[^/]*$', dict(status=401, headers={'X-Error-Message': 'Invalid credentials in Authorization header'}), 'hf auth login'),
    ('GET /api/datasets/[^/]*/[^/]*$', dict(status=403), 'hf auth login'),
    ('GET .*00001', dict(status=404, headers={'X-Error-Code': 'EntryNotFound'}), 'a file that it lists is not there'),
], ids=str)
def test_it_does_not_pass(hub, client, poems, on, how, says):
    hub.will(on, 99, **how)
    got = client.read(poems)
    assert re.search(says, got['error']) and got['waits'] == [] and poems in got['error']


def test_not_there(hub, client, poems):
    assert 'Check data.path' in client.read('owner/nothing')['error']
    assert 'Check data.revision' in client.read(poems, data=dict(revision='v9'))['error']
    assert hub.times('.') <= 3


def test_patience_ends_and_what_arrived_is_kept(hub, client, poems):
    file = names(hub, poems)[1]
    hub.will(f'GET .*{file}', 1, cut=5000)
    hub.will(f'GET .*{file}', 99, status=503)
    got = client.read(poems)
    assert 'the hub answers 503, 10 times in a row' in got['error'] and 'goes on from there' in got['error'] and len(got['waits']) == 9
    hub.fail.clear(); hub.log.clear()
    assert client.read(poems)['texts'] == texts
    assert [r for m, p, r in hub.log if m == 'GET' and p.endswith(file)] == ['bytes=5000-']


def test_nobody_there(hub, home, tmp_path):
    client = Client('http://127.0.0.1:9', tmp_path)
    got = client.read('owner/poems')
    client.close()
    assert 'Connection refused, 6 times in a row' in got['error'] and '--offline' in got['error'] and len(got['said']) == 5


def test_what_is_here_needs_no_hub(hub, client, poems):
    before = client.read(poems)
    hub.will('.', 99, status=503)
    got = client.read(poems)
    assert got['texts'] == texts and got['fingerprint'] == before['fingerprint'] and len(got['said']) == 4
    assert re.search(r'going on without the hub, with the files as they were last listed \(commit [0-9a-f]{8}\)', got['said'][-1])


@given(st.integers(1, 30), st.floats(0, 1000))
def test_backoff(failed, asked):
    full = min(2**(failed-1), 120)
    assert max(asked, full/2) <= backoff(failed, asked) <= max(asked, full)


def test_the_patience_is_some_minutes():
    waited = []
    def never(): raise ConnectionError('no route')
    with pytest.raises(DataError): ask_hub(never, 'owner/name', lambda line: None, waited.append)
    assert len(waited) == 9 and 100 < sum(waited) < 600


def test_a_full_disk_is_said_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path)); monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('llmlab.data.hub._complete', full)
    with pytest.raises(DataError, match='the disk is full'): fetch(Listing('owner/name', 'c'*40, 'parquet', {}, [('0.parquet', 1, 'd'*64)]), 0)


# --- processes

def test_a_killed_process_loses_nothing(hub, home, poems):
    file = names(hub, poems)[0]
    data = hub.repos[poems]['main'][file] = parquet([t*20 for t in texts[:250]])
    part = home/'hub'/f'datasets--{poems.replace("/", "--")}'/'blobs'/f'{oid(file, data)}.incomplete'
    hub.will(f'GET .*{file}', 1, slow=.05)
    first = Client(hub.url, home)
    first.ask(poems)
    until(lambda: part.exists() and part.stat().st_size)
    first.process.kill(); first.process.wait()
    kept = part.stat().st_size
    assert 0 < kept < len(data)
    second = Client(hub.url, home)
    assert second.read(poems)['texts'] == [t*20 for t in texts[:250]]+texts[250:]
    second.close()
    assert [r for m, p, r in hub.log if m == 'GET' and p.endswith(file)] == ['bytes=0-', f'bytes={kept}-'] and not part.exists()


def test_two_processes_fetch_a_file_once(hub, client, home, poems):
    hub.will('GET .*parquet', 3, slow=.01)
    other = Client(hub.url, home)
    client.ask(poems); other.ask(poems)
    assert client.answer()['texts'] == other.answer()['texts'] == texts
    other.close()
    for file in names(hub, poems): assert hub.served[file] == len(hub.repos[poems]['main'][file])


def until(true, seconds=20):
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)


# --- ahead

def test_the_next_file_is_fetched_ahead(hub, client, poems):
    first, second, third = names(hub, poems)
    assert client.read(poems, take=120, hold=True)['texts'] == texts[:120]
    time.sleep(.3)
    assert hub.times(f'GET .*{second}') == 0
    client.read(poems, take=130, hold=True)
    until(lambda: hub.times(f'GET .*{second}') == 1)
    assert hub.times(f'GET .*{third}') == 0


def test_who_leaves_off_stops_the_fetching(hub, client, poems):
    second = names(hub, poems)[1]
    data = hub.repos[poems]['main'][second] = parquet([t*50 for t in texts[250:350]])
    hub.will(f'GET .*{second}', 1, slow=.1)
    assert client.read(poems, take=200)['texts'] == texts[:200]
    until(lambda: hub.times(f'GET .*{second}'))
    time.sleep(.5)
    assert client.read(poems)['texts'] == texts[:250]+[t*50 for t in texts[250:350]]+texts[350:]


def test_memory_is_bounded(hub, client, poems):
    before = client.read(poems, take=1)['peak']
    hub.add('owner/large', {f'data/{i}.parquet': parquet([chr(97+i)*10_000]*5000, row_group_size=100) for i in range(3)})
    got = client.read('owner/large', last=1)
    assert [re.sub(r'^.*: ', '', line) for line in got['said']] == [f'fetching 50 of 50 MB, file {i} of 3' for i in (1, 2, 3)]
    assert got['texts'] == ['c'*10_000] and got['peak'] - before < 100e6 # one file has 50 MB, all have 150


# --- offline, revisions

def test_offline(hub, client, home, poems):
    client.read(poems, stop=300) # the third file is not here
    hub.log.clear()
    offline = Client(hub.url, home, HF_HUB_OFFLINE='1')
    assert offline.read(poems, stop=350)['texts'] == texts[:350]
    got = offline.read(poems)
    assert re.search(r'00002-of-00003\.parquet .* was not fetched yet.*hf download owner/', got['error'])
    assert re.search(r'never read on this machine.*--local-dir', offline.read('owner/other')['error'])
    client.read(poems)
    again = offline.read(poems, start=10)
    offline.close()
    assert again['texts'] == texts[10:] and hub.times('.*') and not again['waits']


def test_the_fingerprint_is_of_the_content(hub, client, poems):
    files = hub.repos[poems]['main']
    old = sha(files)
    before = client.read(poems)['fingerprint']
    hub.add(poems, files, revision='v1')
    hub.add(poems, files | {'README.md': b'Better explained.'})
    assert client.read(poems)['fingerprint'] == before                                                 # the text is what it was
    assert hub.times('GET .*parquet') == 3                                                             # and nothing was fetched again
    hub.add(poems, files | {names(hub, poems)[2]: parquet(['another'])})
    changed = client.read(poems)
    assert changed['fingerprint'] != before and changed['texts'] == texts[:350]+['another']
    for revision in ('v1', old): assert client.read(poems, data=dict(revision=revision))['fingerprint'] == before


# --- through to the cache

def test_a_cache_of_the_hub(hub, client, home, poems, tmp_path):
    code = f'''
import json
from llmlab.config import Config
from llmlab.recipes import prepare
hub = prepare(Config(data=dict(name='hub', path={poems!r}, validation_fraction=.1), tokenizer=dict(kind='byte'), packing=dict(seq_len=64, folder='cache')))
print(json.dumps([hub.train.num_documents, hub.validation.num_documents]))
'''
    hub.will('GET .*parquet', 3, cut=6000)
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), PYTHONPATH=str(root), HF_HUB_OFFLINE='0', HF_DATASETS_OFFLINE='0', HF_HUB_DISABLE_PROGRESS_BARS='1')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout.splitlines()[-1])) == len(texts) and 'asking again' in done.stdout
