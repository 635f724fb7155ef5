"Rows of examples: whole, alone with themselves, learned from only where the mask says so; read, divided and resumed like any cache."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.files import CacheError, DataError
from llmlab.models.transformer import positions_of
from llmlab.packing.loader import Loader, in_order
from llmlab.packing.packer import packing_report
from llmlab.packing.rows import PACKINGS, Rows


def make(n=60, T=15, seed=0, shortest=2, answers=True):
    "Examples whose tokens are all different, with any mask on their second half; the padding holds rubbish."
    g = np.random.default_rng(seed)
    lengths = g.integers(shortest, T+2, n)
    tokens = np.arange(n*(T+1)).reshape(n, T+1)+5
    inside = np.arange(T+1) < lengths[:, None]
    masks = (inside & (np.arange(T+1) >= lengths[:, None]//2) & (g.random((n, T+1)) < .8)) if answers else inside
    masks[0, 1] = True
    return dict(tokens=tokens, masks=masks.astype(np.uint8), lengths=lengths, seq_len=T)


def wanted(x):
    "Of every target its token, and the token before it; by hand."
    return sorted((int(x['tokens'][i, t-1]), int(x['tokens'][i, t])) for i in range(len(x['tokens'])) for t in range(1, x['lengths'][i]) if x['masks'][i, t])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), T=st.integers(2, 24), seed=st.integers(0, 99), packing=st.sampled_from(PACKINGS), batch_rows=st.integers(1, 9))
def test_every_target_once_and_no_other(n, T, seed, packing, batch_rows):
    x = make(n, T, seed)
    rows, found, longest = Rows.of(**x, packing=packing, pad_id=3), [], 0
    for b in in_order(rows, batch_rows):
        assert b.num_targets == int(b.weights.sum()) and set(b.weights.unique().tolist()) <= {0., 1.}
        found += list(zip(b.tokens[b.weights > 0].tolist(), b.targets[b.weights > 0].tolist()))
        assert (b.tokens[b.document < 0] == 3).all() # what lay in the padding is gone
        assert not b.weights[b.document < 0].any()
    assert sorted(found) == wanted(x)
    assert (rows.num_targets, rows.num_documents, rows.num_tokens) == (len(found), n, x['lengths'].sum())
    assert rows.num_rows == n or packing == 'isolated'


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), T=st.integers(2, 24), seed=st.integers(0, 99), packing=st.sampled_from(PACKINGS))
def test_m10_examples_are_whole_and_alone(n, T, seed, packing):
    "Positions begin anew with every example, its first token is no target even where its mask says so, and no weight crosses an edge."
    x = make(n, T, seed, answers=False) # every token is a target
    first, seen = {int(row[0]) for row in x['tokens']}, []
    for b in in_order(Rows.of(**x, packing=packing), 4):
        assert (not b.extras) and not hasattr(b, 'attention_mask') # isolation by positions and documents alone
        positions = positions_of(b.document)
        assert not {int(t) for t in b.targets[b.weights > 0]} & first
        for row in range(len(b.tokens)):
            tokens, document = [*b.tokens[row].tolist(), int(b.targets[row, -1])], b.document[row].tolist()
            edges = [t for t in range(len(document)) if not t or document[t] != document[t-1]]
            assert (positions[row, edges] == 0).all() and all(positions[row, t] == positions[row, t-1]+1 for t in range(len(document)) if t not in edges)
            for t in edges:
                if document[t] < 0: continue
                i = (tokens[t]-5)//(T+1) # which example
                whole = x['tokens'][i, :x['lengths'][i]].tolist()
                assert tokens[t:t+len(whole)] == whole
                seen.append(i)
            last = [t for t in range(len(document)-1) if document[t] != document[t+1]]
            assert not b.weights[row, last].any()
        if packing == 'none' or b.one_document: assert b.document.max() == 0
        assert b.one_document or packing == 'isolated'
    assert sorted(seen) == list(range(n))


def test_packing_does_not_depend_on_anything_else():
    x = make(200)
    a, b = Rows.of(**x), Rows.of(**{k: torch.tensor(v) if k != 'seq_len' else v for k, v in x.items()}) # arrays and tensors
    assert a.fingerprint == b.fingerprint and (a.packed.tokens == b.packed.tokens).all() and (a.packed.mask == b.packed.mask).all()
    assert Rows.of(**x, packing='none').fingerprint != a.fingerprint and a.fill > .9 > Rows.of(**x, packing='none').fill
    for what in ('tokens', 'masks'): # another token, another mask: other rows
        other = x | {what: x[what].copy()}
        i = int((x['lengths'] >= 4).argmax())
        other[what][i, 2] = 1-other[what][i, 2] if what == 'masks' else 9
        assert Rows.of(**other).fingerprint != a.fingerprint
    assert Rows.of(**x, tokenizer='other').fingerprint != a.fingerprint
    rubbish = x | {'tokens': np.where(np.arange(16) < x['lengths'][:, None], x['tokens'], 77)} # what stands in the padding says nothing
    assert Rows.of(**rubbish).fingerprint == a.fingerprint
    assert not a.chunk(0).mask[:, 0].any() # a row begins with an example


def test_large_vocabularies_are_held():
    x = make(4)
    x['tokens'] = x['tokens']+100_000
    assert wanted(x) == sorted((a, b) for batch in in_order(Rows.of(**x), 2) for a, b in zip(batch.tokens[batch.weights > 0].tolist(), batch.targets[batch.weights > 0].tolist()))


def test_the_face_of_a_cache():
    "What recipes read of one."
    rows = Rows.of(**make(), name='ours', tokenizer='t', identity='i', split='validation', path='data_instruct')
    info = rows.info()
    assert (info['dataset_name'], info['split'], info['sequence_length'], info['path'], info['tokenizer'], info['corpus']) == ('ours', 'validation', 15, 'data_instruct', 't', 'i')
    assert (info['total_sequences'], info['total_targets'], info['total_chunks'], info['complete']) == (rows.num_rows, rows.num_targets, 1, True)
    assert len(rows.chunks) == 1 and rows.chunk(0).mask.sum() == rows.num_targets == len(wanted(make())) and rows.text_bytes == 0 and rows.verify() == [] and 'ours (validation)' in repr(rows)
    into = np.empty_like(rows.packed.tokens)
    assert (rows.chunk(0, into).tokens == into).all()
    report = packing_report(rows.chunk(0)) # of the layout
    assert report.from_start_share == 1 and report.documents == 60 and not report.cut and not report.too_long


def refused(change, *said, **kw):
    x = make(**kw)
    change(x)
    with pytest.raises(DataError) as e: Rows.of(**x)
    for s in said: assert s in str(e.value)

def put(x, key, value): x[key] = value

def test_what_cannot_be_learned_from_is_refused_with_all_that_is_wrong():
    refused(lambda x: put(x, 'seq_len', 10), 'are longer than a row of 11 tokens. The longest has 16: a seq_len of 15 holds it')
    refused(lambda x: put(x, 'masks', np.ones_like(x['masks'])), 'have a target in their padding')
    refused(lambda x: put(x['lengths'], 7, 1), '1 of 60 examples (number 7)', 'fewer than 2 tokens')
    refused(lambda x: put(x['lengths'], 7, 99), 'say that they are longer than the 16 tokens')
    refused(lambda x: put(x, 'masks', x['masks']*0), 'none of the 60 examples has a target', 'longer max_seq_len')
    refused(lambda x: put(x, 'masks', x['masks']*3), 'something else than 0 and 1')
    refused(lambda x: put(x, 'masks', x['masks'][:, 1:]), 'do not belong together')
    refused(lambda x: x.update({k: x[k][:0] for k in ('tokens', 'masks', 'lengths')}), 'there is no example')
    def twice(x): x['lengths'][3] = 1; x['masks'][5] = 1; x['lengths'][5] = 4
    refused(twice, '(number 3) have fewer than 2 tokens', '(number 3, 5) have a target in their padding')


# --- the loader over them

def batches(loader, n): return [next(loader) for _ in range(n)]
def same(a, b):
    assert (a.num_targets, a.one_document, a.place) == (b.num_targets, b.one_document, b.place)
    for k in ('tokens', 'targets', 'weights', 'document', 'rows'): assert_close(getattr(a, k), getattr(b, k), rtol=0, atol=0)


@pytest.mark.parametrize('workers', [0, 1, 2])
@pytest.mark.parametrize('world', [1, 2, 4])
def test_every_example_once_an_epoch(world, workers):
    x = make(80)
    rows = Rows.of(**x)
    ranks, drawn = [Loader(rows, 1, seed=5, rank=r, world=world, workers=workers) for r in range(world)], {}
    while ranks[0].position < ranks[0].end_of(3): drawn |= {b.place: b for b in map(next, ranks)}
    orders = []
    for epoch in range(3):
        order = [drawn[p] for p in range(epoch*rows.num_rows, (epoch+1)*rows.num_rows)]
        found = [pair for b in order for pair in zip(b.tokens[b.weights > 0].tolist(), b.targets[b.weights > 0].tolist())]
        assert sorted(found) == wanted(x)
        orders.append([b.rows.item() for b in order])
    assert orders[0] != orders[1] != orders[2] # each epoch is shuffled anew
    for r in ranks: r.close()


@pytest.mark.parametrize('world', [1, 2])
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('packing', PACKINGS)
def test_resume_in_the_middle_of_an_epoch(world, workers, packing):
    "Stopped after every number of batches up to two epochs: what follows is bit for bit what would have come."
    rows = lambda: Rows.of(**make(25), packing=packing) # made anew, as in another process
    per_rank = 4//world
    start = lambda source: [Loader(source, per_rank, seed=3, rank=r, world=world, workers=workers) for r in range(world)]
    n = 2*rows().num_rows//4
    straight = [batches(loader, n+3) for loader in start(rows())]
    for stop in range(0, n, 3):
        ranks = start(rows())
        for loader in ranks: batches(loader, stop)
        states = [loader.state_dict() for loader in ranks]
        assert all(s == states[0] for s in states) # one state for all ranks
        for r, loader in enumerate(start(rows())):
            loader.load_state_dict(states[0])
            for a, b in zip(batches(loader, 3), straight[r][stop:stop+3], strict=True): same(a, b)
            loader.close()
        for loader in ranks: loader.close()


def test_ranks_and_rows_divide_the_same_work():
    rows = Rows.of(**make(50))
    one, many = Loader(rows, 6, seed=2), [Loader(rows, 3, seed=2, rank=r, world=2) for r in (0, 1)]
    for _ in range(12):
        whole, parts = next(one), [next(loader) for loader in many]
        for k in ('tokens', 'targets', 'weights', 'document', 'rows'): assert_close(getattr(whole, k), torch.cat([getattr(p, k) for p in parts]), rtol=0, atol=0)
        assert whole.num_targets == sum(p.num_targets for p in parts)
    state = one.state_dict()
    alone = Loader(rows, 1, seed=2, workers=0) # goes on with another number of ranks
    alone.load_state_dict(state)
    assert torch.cat([next(alone).rows for _ in range(6)]).tolist() == next(one).rows.tolist()
    for loader in (one, *many): loader.close()


def test_other_examples_are_not_gone_on_with():
    state = Loader(Rows.of(**make(30)), 2, seed=1).state_dict()
    for other in (Rows.of(**make(31)), Rows.of(**make(30, answers=False)), Rows.of(**make(30), packing='none')):
        with pytest.raises(CacheError, match='is not the cache that the checkpoint was made with'): Loader(other, 2, seed=1).load_state_dict(state)
    with pytest.raises(CacheError, match='its tokenizer is'): Loader(Rows.of(**make(30), tokenizer='other'), 2, seed=1).load_state_dict(state)
    Loader(Rows.of(**make(30), path='elsewhere'), 2, seed=1).load_state_dict(state) # the same ones in another place


def test_a_batch_may_be_changed_without_harm_to_the_rows():
    rows = Rows.of(**make(30))
    first = next(in_order(rows, 3))
    kept = first.weights.clone()
    first.weights.zero_(); first.tokens.zero_()
    again = next(in_order(rows, 3))
    assert_close(again.weights, kept)
    assert again.tokens.any()


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('stops', [[5], [1, 6]], ids=str)
@pytest.mark.parametrize('name', ['ar', 'diffusion', 'sdd'])
def test_training_on_them_is_gone_on_with_exactly(tmp_path, name, stops):
    "Stopped within an epoch, with fresh objects: every logged number and every weight, bit for bit; and it learns."
    from functools import partial
    from llmlab.config import Diffusion as DiffusionSettings, Optim, SDD as SDDSettings
    from llmlab.models.ar import AR
    from llmlab.models.diffusion import Diffusion
    from llmlab.models.sdd import SDD
    from llmlab.models.transformer import Shape, build
    from llmlab.models.zoo import add_extras, own_special
    from llmlab.trainer.checkpoint import TrainState, capture, checkpointer, latest, load_checkpoint, restore
    from llmlab.trainer.loop import Limit, fit
    from llmlab.trainer.optim import build_optimizer
    from llmlab.trainer.tracking import Stopped, Tracker
    class Memory:
        def __init__(self): self.records = {}
        def log(self, metrics, step): self.records[step] = {k: v for k, v in metrics.items() if not k.endswith(('_per_sec', '_wait', '_gb'))}
    x, special = make(90, T=31, shortest=6), own_special(64)
    x['tokens'] = np.arange(32)[None] % 7 + np.arange(90)[:, None] % 5 + 5 # each counts up from its own number: can be learned
    def sitting(folder, memory, limit=None, seed=0):
        objective = {'ar': lambda: AR(), 'diffusion': lambda: Diffusion(DiffusionSettings(), special), 'sdd': lambda: SDD(SDDSettings(k=2), DiffusionSettings(), special)}[name]()
        network = add_extras(build(Shape(vocab_size=64, seq_len=31, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=64), seed=seed), objective, seed)
        things = dict(network=network, optimizer=build_optimizer(network, Optim(lr=.01, warmup_steps=2)), loader=Loader(Rows.of(**x), 4, seed=1), generators={'objective': torch.Generator().manual_seed(0)})
        path = latest(folder)
        state = restore(load_checkpoint(path), **things) if path else TrainState()
        try: fit(network, objective, things['loader'], things['optimizer'], total_steps=24, accumulation=2, state=state, generator=things['generators']['objective'], save_every=9, log_every=4,
                 save=checkpointer(folder, partial(capture, **things)), tracker=Tracker([memory]), limit=limit, check_groups=True)
        finally: things['loader'].close()
        return network
    straight, cut = Memory(), Memory()
    whole = sitting(tmp_path/'a', straight)
    for i, steps in enumerate(stops):
        with pytest.raises(Stopped): sitting(tmp_path/'b', cut, Limit(steps=steps), seed=i)
    parts = sitting(tmp_path/'b', cut, seed=9)
    assert cut.records == straight.records and straight.records[24]['train/loss'] < straight.records[4]['train/loss']
    for p, q in zip(whole.parameters(), parts.parameters()): assert_close(p, q, rtol=0, atol=0)
