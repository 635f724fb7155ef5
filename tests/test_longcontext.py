"Long context: exact lengths and depths, honest keys, an oracle that finds everything and guessers at chance, losses by place against plain counting."
import contextlib, json, re
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from llmlab import tiny
from llmlab.config import Tokenizer
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval.evaluate import OpenModel, batches_of, text_rows
from llmlab.eval.longcontext import (GRASS, WORDINGS, Associative, CrossSegment, Grid, Question, TextTask, as_batch, ask, check_digits, digits_right, forced, haystack, longcontext,
    loss_by_position, losses_of, plot_grids, plot_losses, recall_gain, repeat_rows, said, sentences, split_answer, split_of, text_task, wilson, written)
from llmlab.files import ConfigError
from llmlab.models.ar import AR
from llmlab.models.transformer import Shape, build

torch.set_num_threads(1)
corpus = open_corpus(tiny.config('data.max_documents=60').data)
byte = build_tokenizer(Tokenizer(kind='byte'), corpus)
bpe = build_tokenizer(tiny.config('data.max_documents=60').tokenizer, corpus)
real = tuple(sentences([*tiny.documents(), 'In 1984 there were 31337 of them. Nobody counted.']))
slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
small = dict(d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=48)


class Knows(nn.Module):
    "Always says what the questions' answers are (or something of its own), whatever it reads."
    def __init__(self, vocab_size:int, answer=None, seq_len:int=10**6):
        super().__init__()
        self.shape, self.head_weight, self.answer, self.on, self.context = SimpleNamespace(seq_len=seq_len, vocab_size=vocab_size), torch.eye(vocab_size), answer, True, seq_len
    def forward(self, tokens, *, document=None, one_document=False, logits=False):
        said = self.answer(tokens) if self.on else torch.zeros_like(tokens)
        return 9*F.one_hot(said, self.shape.vocab_size).float()
    @contextlib.contextmanager
    def without_memory(self):
        self.on = False
        try: yield
        finally: self.on = True


def oracle(task, vocab_size:int, lengths, depths, samples:int, seed:int=0)->Knows:
    "Has learned the questions by heart."
    known = {q.ids[:-1]: q.ids[1:] for n in lengths for d in depths for q in task.questions(samples, n, d, seed)}
    longest = lambda row: next(known[k] for n in lengths if (k := tuple(row[:n-1].tolist())) in known)
    return Knows(vocab_size, lambda tokens: torch.stack([F.pad(torch.tensor(longest(r)), (0, len(r)-len(longest(r)))) for r in tokens]))


def guesser(low:int, high:int, seed:int=0)->Knows:
    "Says one of some tokens at random."
    g = torch.Generator().manual_seed(seed)
    return Knows(high, lambda tokens: torch.randint(low, high, tokens.shape, generator=g))


tasks = st.builds(lambda t, name, filler, digits, distractors, shots: text_task(t, name, filler=filler, digits=digits, distractors=distractors, shots=shots),
    st.sampled_from([byte, bpe]), st.sampled_from(list(WORDINGS)), st.sampled_from(['grass', 'words', real]), st.integers(3, 7), st.integers(0, 4), st.integers(0, 3))


def needed(task)->int:
    "The shortest length that fits: what the message says, raised until it does."
    n = 1
    while True:
        try: task.questions(6, n, .5); return n
        except ConfigError as e: n = int(re.search(r'Take a length of (\d+) or more', str(e))[1])


@slow
@given(tasks, st.integers(0, 300), st.sampled_from([0., .1, .37, .5, .9, 1., None]), st.integers(0, 3), st.sampled_from(['train', 'eval']))
def test_text_questions(task, extra, depth, seed, split):
    length = needed(task)+40+extra
    questions, tokenizer = task.questions(6, length, depth, seed, split), byte if task.encode.__self__ is byte else bpe
    assert questions == task.questions(6, length, depth, seed, split)
    assert {q.length for q in questions} == {length} and len({q.text for q in questions}) == 6 and {split_of(q.text) for q in questions} == {split}
    for q in questions:
        text, key = tokenizer.decode(q.ids), q.text
        assert q.ids[0] == tokenizer.bos_id and tokenizer.decode(q.answer).strip() == key == f'{int(key):0{task.digits}}'
        assert q.places == tuple(range(length-len(q.answer), length)) and q.prompt+q.answer == list(q.ids)
        assert text.endswith(f' {key}') and tokenizer.decode(q.prompt).rstrip().endswith(' is')
        assert list(q.ids[q.needle:q.needle+1]) == tokenizer.encode(' The')[:1]
        told = len(re.findall(rf'(?<!\d){key}(?!\d)', text))
        assert told == 1+task.wording.needle.count('{key}') # the needle and the answer: nowhere else
        numbers = set(re.findall(r'\d+', text)) - ({'1984', '31337'} if task.filler is real else set())
        cut = {n for n in numbers if len(n) < task.digits or task.filler is real and ('1984'.endswith(n) or '31337'.endswith(n))} # a number of the filler, of which the beginning was cut off
        assert len(numbers-cut) <= 1+task.distractors+task.shots <= len(numbers)
        if depth is not None: assert abs(q.depth-depth)*(length-needed(task)) <= 80+40*task.distractors # half a sentence, or half a distractor


@slow
@given(tasks, st.integers(0, 3))
def test_the_same_keys_at_every_depth(task, seed):
    n = needed(task)+100
    a, b = task.questions(4, n, 0., seed), task.questions(4, n, 1., seed)
    assert [q.text for q in a] == [q.text for q in b] and [sorted(q.ids) for q in a] == [sorted(q.ids) for q in b] # other order, same pieces
    assert all(x.needle < y.needle for x, y in zip(a, b))
    assert a != task.questions(4, n, 0., seed+1)


@pytest.mark.parametrize('tokenizer', [byte, bpe], ids=['byte', 'bpe'])
def test_as_the_tokenizer_would_write_it(tokenizer):
    "Pieces that were encoded alone are what the whole text is."
    for q in text_task(tokenizer, filler=real, distractors=2).questions(10, 600, .4):
        begin = q.needle # before, a sentence may have lost its beginning
        assert tokenizer.encode(tokenizer.decode(q.ids[begin:])) == list(q.ids[begin:])


def test_train_and_eval_share_no_key():
    task = text_task(byte, 'short', digits=3)
    a, b = ({q.text for seed in range(20) for q in task.questions(40, 200, None, seed, split)} for split in ('train', 'eval'))
    assert len(a) > 300 and len(b) > 300 and not a & b
    halves = [split_of(f'{i:05}') for i in range(10**5)]
    assert abs(halves.count('eval')-50_000) < 1000
    assert [split_of(k) for k in ('12345', '00000', '00001', '00002')] == ['eval', 'train', 'eval', 'eval'] # for ever: a training set may be years old


def test_numbers_of_the_filler_are_no_keys():
    task = text_task(byte, 'short', filler=('From 1 to 9 it is 123456789 and 10 is 0.',), digits=1)
    with pytest.raises(ConfigError, match='not 1 different keys of 1 digits'): task.questions(1, 300)
    text = text_task(byte, 'short', filler=('It was 4711 once.',), digits=2)
    keys = {q.text for s in range(60) for q in text.questions(5, 100, seed=s)}
    assert len(keys) > 40 and not keys & {'47', '71', '11'}


@pytest.mark.parametrize('wrong, says', [(dict(distractors=5), 'distractors is 5'), (dict(shots=4), 'shots is 4'), (dict(digits=0), 'digits is 0'), (dict(filler='sand'), "filler is 'sand'")])
def test_settings_that_make_no_sense(wrong, says):
    with pytest.raises(ConfigError, match=says): text_task(byte, **wrong)


@pytest.mark.parametrize('task, least', [(CrossSegment(), 6), (CrossSegment(5), 12), (Associative(8, 4, 16), 24), (Associative(9, 1, 16), 34), (Associative(1, 1, 2), 4)])
def test_the_shortest_row(task, least):
    for depth in (0., .5, 1., None): assert [q.length for q in task.questions(3, least, depth)] == [least]*3
    with pytest.raises(ConfigError, match=f'take {least} tokens'): task.questions(1, least-1)
    with pytest.raises(ConfigError, match='depth is 1.5'): task.questions(1, 99, 1.5)
    with pytest.raises(ConfigError, match='0 samples'): task.questions(0, 99)
    with pytest.raises(ConfigError, match="split is 'test'"): task.questions(1, 99, split='test')


def test_the_text_that_just_fits():
    for task in (text_task(byte), text_task(bpe, 'needle', distractors=4, shots=3)):
        n = needed(task)
        assert {q.length for q in task.questions(6, n, .7)} == {n}
        with pytest.raises(ConfigError, match='a length of 20 is too short'): task.questions(1, 20)


@slow
@given(st.integers(1, 5), st.integers(12, 200), st.one_of(st.none(), st.floats(0, 1)), st.integers(0, 5))
def test_the_toy(digits, length, depth, seed):
    for q in CrossSegment(digits).questions(5, length, depth, seed):
        ids, D = q.ids, digits
        assert ids.count(1) == ids.count(2) == 1 and ids.index(1) == q.needle and ids[-D-1] == 2
        assert list(ids[q.needle+1:q.needle+1+D]) == q.answer == list(ids[-D:])
        assert all(13 <= t < 40 for i, t in enumerate(ids[:-D-1]) if not q.needle <= i <= q.needle+D)
        if depth is not None: assert abs(q.needle-round(depth*(length-2*D-2))) <= 8 and 0 <= q.needle <= length-2*D-2


@slow
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 20), st.integers(0, 100), st.one_of(st.none(), st.floats(0, 1)))
def test_pairs_and_queries(pairs, queries, segment_len, extra, depth):
    queries = min(pairs, queries)
    task = Associative(pairs, queries, segment_len)
    length = -(-2*pairs//segment_len)*segment_len+2*queries+extra
    for q in task.questions(3, length, depth):
        told = q.ids[q.needle:q.needle+2*pairs]
        values = dict(zip(told[::2], told[1::2]))
        assert len(values) == pairs and [values[q.ids[p-1]] for p in q.places] == q.answer and len(q.places) == queries
        assert (q.needle+2*pairs-1)//segment_len < (q.places[0]-1)//segment_len # a border lies between
        assert len({q.ids[p-1] for p in q.places}) == queries and max(q.ids) < task.vocab_size


def test_needles_of_a_depth_are_spread():
    "Or all of a cell would lie across a border of segments, or none."
    for task in (CrossSegment(), Associative(2, 1)):
        places = {depth: [q.needle for q in task.questions(200, 120, depth)] for depth in (0., .5, 1.)}
        assert len(set(places[.5])) == 17 and len(set(places[0.])) == len(set(places[1.])) == 9 and min(places[0.]) == 0
        assert [a-b for a, b in zip(places[.5], places[.5][1:])] == [q.needle-r.needle for q, r in zip(task.questions(200, 120, .4), task.questions(200, 120, .4)[1:])]
    places = {q.needle for q in text_task(byte).questions(40, 700, .3)}
    assert len(places) >= 4


def test_the_haystack_keeps_every_token():
    g = np.random.default_rng(0)
    for _ in range(200):
        sizes, room, depth = g.integers(1, 9, 60), int(g.integers(0, 60)), float(g.random())
        ids, at, where = haystack(iter([[int(i)+100]*int(n) for i, n in enumerate(sizes)]), room, [1]*3, [[2]*2, [3]*4], depth, g)
        assert len(ids) == room+3+6 and ids[at:at+3] == [1]*3 and ids.count(1) == 3 and ids.count(2) == 2 and ids.count(3) == 4
        assert where == pytest.approx(at/(room+6)) and abs(where-depth)*(room+6) <= 4
        assert ids.index(2)+1 == ids.index(2, ids.index(2)+1) # nothing was put into a distractor


def test_a_tokenizer_without_digits():
    char = build_tokenizer(Tokenizer(kind='char'), open_corpus(tiny.config('data.max_documents=20').data))
    with pytest.raises(ConfigError, match='different digits with the same token'): text_task(char)


def test_answers_in_other_tokens():
    known = {}
    groups = lambda text: [known.setdefault(t, len(known)) for t in re.findall(r' ?[a-zA-Z?.]+| ?\d{1,3}|\d{1,3}| ', text)]
    question, answer = split_answer(groups, ' The pass key is', '90541')
    assert len(answer) == 2 and question+answer == groups(' The pass key is 90541')
    assert TextTask(groups, WORDINGS['short'], digits=6).digit_chance == pytest.approx(1e-3)


def test_wilson_by_hand():
    low, high = wilson(15, 20)
    assert (low, high) == pytest.approx((.5313, .8881), abs=1e-4) # Newcombe 1998 has these formulas; the numbers were done by hand
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(50, 100) == pytest.approx((.4038, .5962), abs=1e-4)


@pytest.mark.parametrize('task, vocab_size, lengths', [(CrossSegment(), 40, (12, 40)), (Associative(), 97, (40, 70)), (text_task(byte, 'short', distractors=2), byte.vocab_size, (150, 231)), (text_task(bpe), bpe.vocab_size, (250, 400))])
def test_an_oracle_finds_everything_and_a_blind_one_nothing(task, vocab_size, lengths):
    depths = (0., .4, 1.)
    network = oracle(task, vocab_size, lengths, depths, 5)
    for batch_tokens in (1, 300, 10**6):
        grid = ask(network, task, lengths, depths, 5, off=network.without_memory, batch_tokens=batch_tokens)
        assert grid.values().tolist() == [[1., 1.]]*3 and grid.values('off').max() == 0 and grid.values('off', 'digits').max() == 0
    assert network.on and (grid.total()['accuracy'], grid.total('off')['accuracy']) == (1, 0) and grid.lengths == list(lengths) and grid.depths == list(depths)
    assert Grid.from_record(json.loads(json.dumps(grid.record(), allow_nan=False))) == grid


@pytest.mark.parametrize('task, low, high', [(CrossSegment(1), 3, 13), (CrossSegment(2), 3, 13), (Associative(4, 2), 33, 65)])
def test_a_guesser_is_at_chance(task, low, high):
    grid = ask(guesser(low, high), task, (40, 64), (0., 1.), 500)
    t, n = grid.total(), 4*500
    assert t['low'] <= task.chance <= t['high']
    assert abs(t['digits']-task.digit_chance) < 4*(task.digit_chance/n)**.5


def test_a_tie_is_no_answer():
    network = Knows(40, lambda tokens: torch.zeros_like(tokens))
    network.forward = lambda tokens, **k: torch.zeros(*tokens.shape, 40)
    assert forced(network, CrossSegment().questions(5, 20)).tolist() == [0]*5


class Writes:
    "Goes on with a text of its own."
    name = 'ar'
    def __init__(self, text): self.text = text
    def generate(self, network, prompts, *, max_new_tokens, temperature, stop_id=None): return [byte.encode(self.text(i))[:max_new_tokens] for i, _ in enumerate(prompts)]


def test_written_looks_at_whole_words():
    network, questions = Knows(262, None), text_task(byte, 'short', digits=3).questions(8, 150)
    keys = [q.text for q in questions]
    right = lambda text: written(network, Writes(text), questions, byte.decode, batch_tokens=10**6)[0].tolist()
    assert right(lambda i: keys[i]) == right(lambda i: f'{keys[i]}. Remember') == right(lambda i: f': {keys[i]}') == [True]*8
    assert right(lambda i: '1'+keys[i]) == right(lambda i: keys[i]+'4') == right(lambda i: keys[i][:2]) == right(lambda i: '') == right(lambda i: 'x'+keys[i]) == [False]*8
    part = written(network, Writes(lambda i: keys[i][:2]+'x'), questions, byte.decode, batch_tokens=10**6)[1]
    assert part == pytest.approx([2/3]*8)
    assert said('the key is 312!', '312') and digits_right('31', '312') == pytest.approx(2/3)


def trained(steps:int, **shape)->nn.Module:
    task, network = CrossSegment(1), build(Shape(vocab_size=40, seq_len=24, **small | shape), seed=3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    for step in range(steps):
        batch = as_batch(task.questions(32, 20, seed=step, split='train'))
        (AR().loss(network, batch).sum/batch.num_targets).backward()
        optimizer.step(); optimizer.zero_grad()
    return network


def test_forced_and_written_agree():
    network, g = trained(8), np.random.default_rng(0)
    rows = [q for n in g.integers(6, 26, 60).tolist() for q in CrossSegment(1).questions(2, n, None, int(n))]
    a, b = forced(network, rows), written(network, AR(), rows)
    assert (a == 1).tolist() == b[0].tolist() and .15 < b[0].mean() < .95
    for batch_tokens in (1, 60): assert np.array_equal(forced(network, rows, batch_tokens=batch_tokens), a) and np.array_equal(written(network, AR(), rows, batch_tokens=batch_tokens)[1], b[1])
    assert network.training # left as it was


@pytest.mark.parametrize('attention', ['local', 'xl', 'infini'])
def test_attention_in_segments(attention):
    "Any length is scored and written, with the memory and without, and the two agree."
    network, g = trained(25, attention=attention, segment_len=8), np.random.default_rng(0)
    rows = [q for n in g.integers(20, 100, 12).tolist() for q in CrossSegment(1).questions(2, n, None, int(n))]
    arms = []
    for off in (contextlib.nullcontext, network.without_memory):
        with off(): arms.append((forced(network, rows) == 1).tolist()); assert arms[-1] == written(network, AR(), rows)[0].tolist()
    assert arms[0] == arms[1] if attention != 'infini' else sum(arms[0]) > sum(arms[1])
    out = longcontext(OpenModel(network, AR(), SimpleNamespace(bos_id=1), {}), [as_batch(rows)], tasks=(), off=network.without_memory)
    assert set(out['longcontext']['places']) == {'position', 'within', 'segment'} and {b['stop'] for b in out['longcontext']['places']['within']} <= set(range(1, 9))


def test_rows_shorter_than_the_length():
    task = CrossSegment(1)
    rope, learned = (build(Shape(vocab_size=40, seq_len=16, position=p, **small)) for p in ('rope', 'learned'))
    assert ask(rope, task, (16, 64), (0.,), 3).values().shape == (1, 2)
    with pytest.raises(ConfigError, match='learned positions, and 16 of them'): ask(learned, task, (16, 18), (0.,), 3)
    assert ask(learned, task, (17,), (0.,), 3).on[0].samples == 3
    assert written(rope, AR(), task.questions(2, 17))[0].shape == (2,)
    with pytest.raises(ConfigError, match='would drop the beginning'): written(rope, AR(), task.questions(2, 18))
    with pytest.raises(ConfigError, match='learned positions'): recall_gain(learned, [[20]*6], [21], (0, 8))


def real_batches(seq_len:int=48)->list: return list(batches_of(text_rows(tiny.documents(), byte, seq_len), 7))


def test_losses_by_position_against_counting():
    network, batches, N = build(Shape(vocab_size=byte.vocab_size, seq_len=48, **small), seed=1), real_batches(), 10
    network.eval()
    on, off = lambda: contextlib.nullcontext(), []
    @contextlib.contextmanager
    def knocked_out():
        weight = network.norm.weight.data.clone()
        network.norm.weight.data.mul_(.5); off.append(1)
        try: yield
        finally: network.norm.weight.data.copy_(weight)
    found = loss_by_position(network, batches, N, off=knocked_out)
    by = {v: {} for v in ('position', 'within', 'segment')}
    for b in batches:
        nats = losses_of(network, b)
        for r in range(len(b.tokens)):
            for t in range(48):
                if b.weights[r, t] == 0: continue
                first = int((b.document[r] == b.document[r, t]).nonzero()[0])
                for v, k in (('position', t-first), ('within', t%N), ('segment', t//N-first//N)):
                    total, n = by[v].get(k, (0., 0)); by[v][k] = total+nats[r, t].item(), n+1
    for v, places in found.items():
        assert [int(n) for n in places.counts] == [by[v].get(k, (0, 0))[1] for k in range(len(places.counts))]
        assert places.on == pytest.approx([by[v].get(k, (0, 0))[0] for k in range(len(places.counts))], rel=1e-4)
        assert places.counts.sum() == sum(b.num_targets for b in batches) and not np.allclose(places.on, places.off)
        buckets = places.buckets([3, 5, 1000])
        assert sum(b['targets'] for b in buckets) == places.counts.sum() and buckets[0]['start'] == 0 and buckets[-1]['stop'] == len(places.counts)
    assert len(off) == len(batches)
    with torch.no_grad(): assert found['position'].on.sum() == pytest.approx(sum(AR().nll(network, b).nats.sum().item() for b in batches), rel=1e-5)


def test_recall_gain_by_hand():
    network = build(Shape(vocab_size=40, seq_len=64, **small), seed=2).eval()
    g = torch.Generator().manual_seed(0)
    passages, filler = torch.randint(1, 40, (5, 9), generator=g).tolist(), torch.randint(1, 40, (50,), generator=g).tolist()
    gain = recall_gain(network, passages, filler, (0, 7, 31), start=(3,), batch_tokens=64)
    same = recall_gain(network, passages, filler, (0, 7, 31), start=(3,))
    assert gain.on == pytest.approx(same.on, abs=1e-5) and gain.off is None and gain.passages == 5 and 'off' not in gain.record()
    for i, gap in enumerate(gain.gaps):
        each = []
        for r, p in enumerate(passages):
            row = [3, *p, *[filler[(r*gap+k)%50] for k in range(gap)], *p]
            with torch.no_grad(): nats = F.cross_entropy(network(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction='none')
            each.append((nats[-8:].mean()-nats[1:9].mean()).item())
        assert gain.on[i] == pytest.approx(np.mean(each), abs=1e-5) and gain.on_se[i] == pytest.approx(np.std(each, ddof=1)/5**.5, abs=1e-5)


@pytest.mark.parametrize('wrong', [lambda: repeat_rows([[1, 2], [1]], [3], 1), lambda: repeat_rows([[1]], [3], 1), lambda: repeat_rows([[1, 2]], [], 1)])
def test_rows_that_cannot_be_repeated(wrong):
    with pytest.raises(ConfigError): wrong()


def test_longcontext_of_a_checkpoint():
    network = build(Shape(vocab_size=byte.vocab_size, seq_len=96, **small), seed=1)
    model, lines = OpenModel(network, AR(), byte, {'path': 'here'}), []
    how = dict(lengths=(97, 160), depths=(0., 1.), samples=2, tasks=('short',), settings=dict(digits=4, filler='words'), off=contextlib.nullcontext, segment_len=16, say=lines.append)
    out = longcontext(model, real_batches(96), **how)
    assert json.dumps(out, allow_nan=False) and out == longcontext(model, real_batches(96), **how) # the same again
    assert {k for k in out} >= {'longcontext/short', 'longcontext/short_off', 'longcontext/short_chance', 'longcontext/loss', 'longcontext/loss_first', 'longcontext/loss_last_off', 'longcontext/recall_gain', 'longcontext'}
    assert out['longcontext/loss'] == out['longcontext/loss_off'] and set(out['longcontext']['places']) == {'position', 'within', 'segment'}
    assert any('beyond the 96 tokens' in l for l in lines) and any('| depth | 97 | 160 |' in l for l in lines)
    grid, places = {'a': Grid.from_record(out['longcontext']['grids']['short'])}, out['longcontext']['places']
    assert plot_grids(grid)[:4] == plot_grids(grid, 'digits')[:4] == plot_losses(places, out['longcontext']['gain'])[:4] == plot_losses(places)[:4] == b'\x89PNG'
    alone = longcontext(model, **how | dict(off=None, lengths=(80,), by='written'))
    assert set(alone) == {'longcontext/short', 'longcontext/short_digits', 'longcontext/short_chance', 'longcontext'} and alone['longcontext']['by'] == 'written'
    with pytest.raises(ConfigError, match='would drop the beginning'): longcontext(model, **how | dict(by='written'))
    with pytest.raises(ConfigError, match='by is'): longcontext(model, by='ear')
    with pytest.raises(ConfigError, match='too short for passkey'): longcontext(model)
    with pytest.raises(ConfigError, match='of the family diffusion'): longcontext(model._replace(objective=SimpleNamespace(name='diffusion')))
