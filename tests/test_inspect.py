"A report is a count: held against one made token by token; and nothing that a text holds breaks how it is shown."
import base64, json, random, re
from collections import Counter
from html.parser import HTMLParser
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from rich.console import Console
from io import StringIO
from llmlab import config
from llmlab.data.corpora import Document
from llmlab.data.tokenizer import build_tokenizer
from llmlab.files import CacheError, ConfigError, hash_bytes
from llmlab.packing.cache import DamagedChunk, build_cache
from llmlab.packing.inspect import check_report_name, count_lengths, facts, print_report, printed, report, show_batch, show_row, size, view_row, visible, write_report
from llmlab.packing.loader import Batch, Loader
from llmlab.packing.packer import STRATEGIES, pack

class Texts:
    "A corpus of given texts; every fifth is held out."
    def __init__(self, texts):
        self.texts, self.name, self.licence = list(texts), 'texts', 'CC0-1.0'
        self.size_bytes, self.fingerprint = sum(len(t.encode()) for t in texts), hash_bytes(*texts)
    def iterate(self, split, start=0):
        for i in range(start, len(self.texts)):
            if (i % 5 == 1) == (split == 'validation'): yield Document(self.texts[i], self.name, i)
    def all(self, start=0, stop=None):
        for i in range(start, min(stop or len(self.texts), len(self.texts))): yield Document(self.texts[i], self.name, i), 'validation' if i % 5 == 1 else 'train'

def some_texts(n=90, seed=0):
    r = random.Random(seed)
    return [' '.join(r.choice(['cat', 'dog', 'owl', 'sat', 'äpfel', '漢字', '🙂', '<b>&', 'ran\n']) for _ in range(int(r.lognormvariate(2.5, 1))+1)) for _ in range(n)]

def byte(): return build_tokenizer(config.Tokenizer(kind='byte'), Texts([]))

@pytest.fixture(scope='module', params=STRATEGIES)
def cache(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')
    return build_cache(Texts(some_texts()), byte(), config.Packing(seq_len=48, chunk_rows=12, folder=str(folder), strategy=request.param))

def naive(cache):
    "Everything again from the rows, slowly."
    lengths, tokens, ids = [], 0, Counter()
    for i in range(len(cache.chunks)):
        p, ends = cache.chunk(i), {}
        for s, n in enumerate(p.length): ends[int(p.document[s])] = max(ends.get(int(p.document[s]), 0), int(p.start[s]+n))
        lengths += ends.values()
        for r in range(p.num_rows):
            n = sum(int(p.length[s]) for s in range(*p.row_spans[r:r+2]))
            tokens += n
            ids.update(p.tokens[r, :n].tolist())
    return sorted(lengths), tokens, ids

# --- the numbers

def test_report_is_the_naive_count(cache):
    r, tokenizer = report(cache), byte()
    lengths, tokens, ids = naive(cache)
    texts = [d.text for d in Texts(some_texts()).iterate('train')]
    assert lengths == sorted(len(t.encode())+2 for t in texts)
    assert r.documents == r.packing.documents == r.lengths.documents == len(texts) and r.packing.tokens == tokens == cache.num_tokens
    assert r.lengths.tokens == sum(lengths) and r.lengths.mean == pytest.approx(np.mean(lengths))
    for k, q in dict(p1=.01, p10=.1, p50=.5, p90=.9, p99=.99, max=1.).items(): assert r.quantiles[k] == np.quantile(lengths, q, method='inverted_cdf')
    assert r.packing.targets == cache.num_targets == sum(lengths)-len(lengths)
    assert r.packing.rows == cache.num_rows and r.packing.fill == pytest.approx(cache.fill)
    assert r.vocab_used == len(set(ids)-set(tokenizer.special.values())) and r.vocab_size == 256 and r.unknown == 0
    assert r.file_bytes == sum(p.stat().st_size for p in cache.path.glob('packed_chunk_*.pt')) == sum(c.file_bytes for c in r.chunks)
    assert r.text_bytes == sum(len(t.encode()) for t in texts) and r.text_bytes_per_token == pytest.approx(r.text_bytes/sum(lengths))
    assert r.bytes_per_token == pytest.approx(r.file_bytes/tokens)
    each = [c['file_bytes']/c['tokens'] for c in cache.chunks]
    assert r.spread(lambda c: c.bytes_per_token) == pytest.approx((min(each), np.median(each), max(each)))
    if cache.meta['params']['strategy'] == 'concat': assert r.packing.cut > 0
    else: assert r.packing.cut == 0

@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(2, 50), max_size=30), min_size=1, max_size=5), st.floats(0, 1))
def test_lengths_add_up_to_exact_quantiles(chunks, q):
    total = count_lengths(np.zeros(0, int))
    for c in chunks: total = total+count_lengths(np.array(c, int))
    every = sum(chunks, [])
    assert total.documents == len(every) and total.tokens == sum(every) and (np.diff(total.value) > 0).all()
    want = sorted(every)[max(1, int(np.ceil(q*len(every)-1e-9)))-1] if every else 0
    assert total.quantile(q) == want

def test_unknown_characters_are_counted(tmp_path):
    known = ['abab', 'baba', 'aabb', 'bbaa']*10
    tokenizer = build_tokenizer(config.Tokenizer(kind='char'), Texts(known))
    built = build_cache(Texts(['abc', 'held out', 'dab', 'aa']), tokenizer, config.Packing(seq_len=8, folder=str(tmp_path)))
    r = report(built)
    assert r.unknown == 2 and r.vocab_used == 2 # c and d; a and b

def test_one_chunk_at_a_time(cache, monkeypatch):
    order, real = [], type(cache).chunk
    monkeypatch.setattr(type(cache), 'chunk', lambda self, i, into=None: order.append(i) or real(self, i, into))
    told = []
    report(cache, samples=[], progress=lambda done, of: told.append((done, of)))
    assert order == list(range(len(cache.chunks))) and told == [(i+1, len(order)) for i in order]

def test_damage_is_named(tmp_path):
    built = build_cache(Texts(some_texts()), byte(), config.Packing(seq_len=48, chunk_rows=12, folder=str(tmp_path)))
    victim = built.path/built.chunks[1]['file']
    data = bytearray(victim.read_bytes())
    data[len(data)//2] ^= 4
    victim.write_bytes(data)
    with pytest.raises(DamagedChunk, match=victim.name): report(built)

def test_nothing_to_report(tmp_path):
    "A cache whose chunks hold no rows, as a validation split may have."
    built = build_cache(Texts(['one']), byte(), config.Packing(seq_len=8, folder=str(tmp_path)), split='validation')
    r = report(built)
    assert built.num_rows == 0 and r.packing.rows == 0 and r.quantiles['max'] == 0 and r.samples == []
    assert r._repr_html_() and str(r) and r.to_markdown() and json.dumps(r.to_dict(), allow_nan=False) and built._repr_html_()

# --- rows as text

def test_every_row_shows_its_tokens(cache):
    tokenizer = byte()
    for row in range(cache.num_rows):
        v = show_row(cache, row, tokenizer)
        i = int(np.searchsorted(cache.offsets, row, side='right'))-1
        p, r = cache.chunk(i), row-int(cache.offsets[i])
        assert v.chunk == i and v.row == row and v.row_tokens == cache.seq_len+1
        assert sum(s.length for s in v.spans)+v.padding == v.row_tokens
        assert [s.document for s in v.spans] == p.document[slice(*p.row_spans[r:r+2])].tolist()
        texts = [d.text for d in Texts(some_texts()).iterate('train')][sum(c['source']['documents'] for c in cache.chunks[:i]):]
        for s in v.spans:
            framed = [257, *texts[s.document].encode(), 258]
            assert s.total == len(framed)
            assert s.text == visible(tokenizer.decode(framed[s.start:s.stop], skip_special=False))
    assert show_row(cache, -1, tokenizer).row == cache.num_rows-1
    for wrong in (cache.num_rows, -cache.num_rows-1):
        with pytest.raises(CacheError, match='there is no row'): show_row(cache, wrong)

def test_borders_are_seen_without_colours():
    p = pack([np.array([257, *b'cat sat', 258], np.uint16), np.array([257, *b'owl', 258], np.uint16)], 17, pad_id=256)
    text = printed(view_row(p, 0, byte()), width=60)
    assert '\x1b' not in text
    assert text.count('┏') == 2 and '┃ <|bos|>owl<|eos|>' in text and '3 padding' in text
    ruler = text.splitlines()[1]
    assert len(ruler) == 60 and ruler.count('┃') == 3 and ruler.count('░') == 59-int(14*59/17)
    out = StringIO()
    Console(file=out, force_terminal=True, color_system='truecolor', width=60).print(view_row(p, 0, byte()))
    assert '\x1b[' in out.getvalue() # and in a terminal they are coloured

def test_a_long_row_is_shortened_in_a_report(tmp_path):
    built = build_cache(Texts([f'{i}\n'*200 for i in range(10)]), byte(), config.Packing(seq_len=600, chunk_rows=8, folder=str(tmp_path)))
    r = report(built)
    assert r.samples and sum(l.startswith('┃ ') for l in str(r).splitlines()) <= 6*sum(len(v.spans) for v in r.samples)
    assert '... 196 more lines' in str(r) and '... ' not in str(r.samples[0])
    assert str(r.samples[0]).count('↵') == sum(s.text.count('↵') for s in r.samples[0].spans)

class Tags(HTMLParser):
    "Which tags there are, and whether they close."
    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.text = [], Counter(), ''
        self.feed(html)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.seen[tag] += 1
        if tag not in ('meta', 'hr', 'img', '!doctype'): self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.seen[tag] += 1
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data

@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), st.text(max_size=15).map(lambda t: t.encode('utf-8', 'replace')),
    st.sampled_from([b'</span><script>', b'"\'>&lt;', b'\x1b[2J\x07\r\x00', '\u202e\u200d\x85'.encode(), b'[red]x[/red]', b'[/]'])), min_size=1, max_size=4), st.integers(4, 40))
def test_any_bytes_can_be_shown(texts, row_tokens):
    p = pack([np.array([257, *t, 258], np.uint16) for t in texts], row_tokens, pad_id=256)
    for r in range(p.num_rows):
        v = view_row(p, r, byte())
        text = printed(v, width=40)
        assert all(c.isprintable() or c == '\n' for c in text)
        tags = Tags(v._repr_html_())
        assert not tags.open and set(tags.seen) <= {'div', 'b', 'span'} and tags.seen['span'] == 2*len(v.spans)+1+bool(v.padding) # the ruler has one more, which may be empty
        for s in v.spans: assert s.text in tags.text
        squeezed = lambda t: re.sub(r'[\s┃]', '', t)
        for s in v.spans: assert squeezed(s.text) in squeezed(text) # nothing taken for markup, nothing lost at a line's end

# --- batches

def a_batch(texts, T, prompt=0):
    "Rows of framed texts, packed; the first `prompt` targets of each document do not count."
    p = pack([np.array([257, *t, 258], np.uint16) for t in texts], T+1, pad_id=256)
    stored, document, weights = torch.from_numpy(p.tokens.astype(np.int64)), torch.full((p.num_rows, T+1), -1), torch.zeros(p.num_rows, T)
    for r in range(p.num_rows):
        at = 0
        for i, s in enumerate(range(*p.row_spans[r:r+2])):
            n = int(p.length[s])
            document[r, at:at+n] = i
            weights[r, at+min(prompt, n-1):at+n-1] = 1
            at += n
    return Batch(stored[:, :-1], stored[:, 1:], weights, document[:, :-1])

@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b'</span><script>', b'"\'>&lt;', b'\x1b[2J\x07\r\x00\n', b'[red]x[/red]'])), min_size=1, max_size=5), st.integers(4, 40), st.integers(0, 5))
def test_a_batch_shows_what_counts(texts, T, prompt):
    batch = a_batch(texts, T, prompt)
    v = show_batch(batch, byte(), rows=99)
    assert v.counts['target'] == batch.num_targets and sum(v.counts.values()) == len(v.rows)*(T+1) and v.seq_len == T
    for r, row in enumerate(v.rows):
        assert sum(p.tokens for p in row) == T+1
        kinds = ''.join({'target': 't', 'context': 'c', 'padding': 'p'}[p.kind]*p.tokens for p in row)
        assert [k == 't' for k in kinds[1:]] == (batch.weights[r] > 0).tolist() and kinds.rstrip('p').count('p') == 0
        assert all((a.kind, a.document) != (b.kind, b.document) for a, b in zip(row, row[1:]))
    text, tags = printed(v, width=40), Tags(v._repr_html_())
    assert all(c.isprintable() or c == '\n' for c in text)
    assert not tags.open and set(tags.seen) <= {'div', 'b', 'span'}
    assert all(p.text in tags.text for row in v.rows for p in row) and text.count('┏') == tags.seen['span']-4-sum(p.kind == 'padding' or i > 0 and p.document == row[i-1].document for row in v.rows for i, p in enumerate(row))

def test_of_a_large_batch_a_few_rows(cache):
    batch = next(Loader(cache, 8, seed=0, workers=0))
    v = show_batch(batch, byte(), rows=2)
    assert len(v.rows) == 2 and v.total == 8 and '... 6 more rows' in str(v) and '6 more rows' in v._repr_html_() and repr(v).startswith('<batch of 8 rows of 48: ')
    out = StringIO()
    Console(file=out, force_terminal=True, color_system='truecolor', width=60).print(v)
    assert '\x1b[' in out.getvalue() and '\x1b' not in str(v)

# --- tables and files

def test_the_same_in_every_shape(cache, tmp_path):
    r = report(cache)
    html, md, obj = (write_report(r, tmp_path/f'r.{e}').read_text() for e in ('html', 'md', 'json'))
    obj = json.loads(obj)['train']
    tags = Tags(html)
    assert not tags.open and tags.seen['img'] == 3 and 'script' not in tags.seen and 'http' not in html
    for pairs in facts(r).values():
        for name, value in pairs.items():
            assert name in tags.text and value in tags.text and f'| {name} | {value} |' in md
            assert name in str(r)
    assert obj['packing']['rows'] == cache.num_rows and obj['lengths']['max'] == r.quantiles['max'] and len(obj['chunks']) == len(cache.chunks)
    assert obj['chunks'][0]['raw_ratio']*4 == pytest.approx(obj['chunks'][0]['int64_ratio'])
    assert obj['samples'][0]['spans'][0]['document'] == 0
    assert '\x1b' not in str(r) and max(map(len, str(r).splitlines())) <= 100
    with pytest.raises(ConfigError, match='does not end in'): write_report(r, tmp_path/'r.xlsx')

def test_many_chunks_stay_small(tmp_path):
    built = build_cache(Texts(some_texts(400)), byte(), config.Packing(seq_len=16, chunk_rows=2, folder=str(tmp_path)))
    assert len(built.chunks) > 150
    r = report(built)
    assert len(str(r).splitlines()) < 80 and '...' in str(r)
    assert sum(base64.b64decode(svg).decode().count('<circle') for svg in re.findall('base64,([^"]+)', r._repr_html_())) == 200 # two pictures of a hundred dots
    assert len(built._repr_html_()) < 30_000

def test_a_report_of_bins(tmp_path):
    bins = pytest.importorskip('llmlab.packing.bins')
    ids = np.concatenate([[*b'the cat sat on the mat, the owl saw it', 258]]*40).astype(np.uint16)
    ids.tofile(tmp_path/'train.bin')
    built = bins.open_bins(tmp_path, 'train', 32, byte(), chunk_rows=8)
    r = report(built, byte())
    assert r.packing.rows == built.num_rows and r.documents == built.num_documents
    assert facts(r)['Text']['size'] == 'not known' and r.to_dict()['text_bytes_per_token'] is None and r._repr_html_()

def test_size():
    assert [size(n) for n in (0, 999.4, 999.6, 1e6, 2.5e12)] == ['0 B', '999 B', '1 kB', '1 MB', '2.5 TB']

def test_what_is_printed_and_refused(cache, capsys):
    print_report([report(cache), report(cache, samples=[])])
    text = capsys.readouterr().out
    assert '\x1b' not in text and text.count('Documents  documents') == 2 and text.count('┏') > 0
    for good in ('a.html', 'b/c.json', 'd.md'): check_report_name(good)
    for bad in ('data.name=python', 'report', 'r.HTML.gz'):
        with pytest.raises(ConfigError, match='put --report last'): check_report_name(bad)
