"The arithmetic of races and reports, with clocks that are made up. No time is asserted."
import itertools, json, statistics
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from llmlab.config import ConfigError
from llmlab.eval.speed import (BENCHES, Race, Size, bench, bench_generate, bench_loader, bench_train, copies, greedy, interleave, llama_greedy, llama_loss, loss_gap, products,
    random_batch, raw_batches, report, table, training_step)
from llmlab.models.ar import AR
from llmlab.models.transformer import build
from llmlab.models.zoo import to_llama
from llmlab.trainer.machine import Machine

torch.set_num_threads(1)
toy = Size(d_model=32, num_layers=2, num_heads=2, d_ff=64, vocab_size=200, seq_len=16, batch_rows=3)


def race_of(speeds:dict[str, list[float]], order:list|None=None)->Race:
    "A race on a clock that only the contestants move."
    now, turn = [0.], dict.fromkeys(speeds, 0)
    def contestant(name):
        def work():
            if order is not None: order.append(name)
            now[0] += speeds[name][turn[name] % len(speeds[name])]
            turn[name] += 1
            return 10.
        return work
    return interleave({n: contestant(n) for n in speeds}, min(map(len, speeds.values())), clock=lambda: now[0])


def test_turns():
    order = []
    race_of({'a': [1, 1, 1], 'b': [1, 1, 1], 'c': [1, 1, 1]}, order)
    assert ''.join(order) == 'abc' + 'abc' + 'cba' + 'abc' # a warm-up, then turned round every time


seconds = st.lists(st.floats(.01, 100), min_size=1, max_size=9)


@given(seconds, st.floats(.1, 10), st.data())
def test_ratios_do_not_see_the_weather(base, times, data):
    "A machine that is slower in some rounds, for all alike, changes no ratio."
    weather = data.draw(st.lists(st.floats(.1, 10), min_size=len(base), max_size=len(base)))
    fast = {'a': [1.]*len(base), 'b': [times]*len(base)}
    race = Race({k: [x*w for x, w in zip(v, weather)] for k, v in fast.items()}, {'a': 1., 'b': 1.})
    assert race.ratios('a', 'b') == pytest.approx([times]*len(base))
    assert race.ratio('b', 'a') == pytest.approx(1/times)


@given(seconds, st.floats(1, 1e6))
def test_report(times, work):
    race = Race({'x': times, 'y': times[::-1], 'limit': [1.]*len(times)}, {'x': work, 'y': 2*work, 'limit': 1e12})
    r = report('training', race, 'x', 'limit', per_token=1e6, about={'size': 's'})
    assert [row['name'] for row in r['rows']] == ['x', 'y'] and r['rounds'] == len(times)
    x, y = r['rows']
    assert x['ratio'] == x['low'] == x['high'] == 1. and y['low'] <= y['ratio'] <= y['high']
    assert x['utilisation'] == pytest.approx(statistics.median(work/t for t in times)*1e6/1e12)
    assert x['tokens_per_sec'] == pytest.approx(work/statistics.median(times))
    text = table(r)
    assert text.count('\n|') >= 3 and '1.00 (1.00 to 1.00)' in text and '- size: s' in text
    json.dumps(r, allow_nan=False)


def test_no_limit_no_column():
    r = report('loader', race_of({'a': [1.], 'b': [2.]}), 'b', about={})
    assert 'utilisation' not in r['rows'][0] and r['rows'][0]['ratio'] == 2. and table(r).splitlines()[0].count('|') == 4


def test_limits_count_their_work():
    assert products(Machine(), 8, 5)() == 2*8**3*5
    assert copies(Machine(), 2, 3)() == 2*3*2*2**20


def test_the_peer_does_the_same_work():
    "The same loss, the same gradients, and after a step the same weights."
    ours = build(toy.shape(), seed=0)
    theirs, batch = to_llama(ours), random_batch(toy)
    assert loss_gap(ours, theirs, batch, Machine()) < 1e-5
    a, b = AR().loss(ours, batch), llama_loss(theirs, batch)
    assert a.count == b.count == 3*16
    torch.testing.assert_close(a.sum, b.sum)
    steps = [training_step(ours, AR().loss, batch, Machine()), training_step(theirs, llama_loss, batch, Machine())]
    assert [step() for step in steps] == [48, 48]
    with torch.no_grad():
        torch.testing.assert_close(ours(batch.tokens), theirs(input_ids=batch.tokens).logits, atol=2e-4, rtol=1e-3) # the step is lr*sign at first: a gradient near 0 may fall either way
        assert AR().loss(ours, batch).sum < a.sum


def test_greedy_texts_agree():
    ours = build(toy.shape(), seed=0).eval()
    with torch.no_grad(): ours.embed.weight.mul_(20) # with an opinion
    theirs, prompts = to_llama(ours), [[5, 6, 7], [9, 8, 100]]
    a, b = (f(n, prompts, 9, Machine()) for f, n in ((greedy, ours), (llama_greedy, theirs)))
    assert a == b and all(len(row) == 9 for row in a)


def test_raw_batches(tmp_path):
    path = tmp_path/'raw.bin'
    np.arange(1000, dtype=np.uint16).tofile(path)
    for x, y in itertools.islice(raw_batches(path, 4, 10), 20):
        assert x.shape == (4, 10) and torch.equal(y, x+1)
        assert torch.equal(x, x[:, :1]+torch.arange(10))
    (only,) = next(raw_batches(path, 4, 10, targets=False))
    assert only.shape == (4, 10)
    a, b = (next(raw_batches(path, 4, 10, seed=3))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_benches_run():
    result, = bench('train', rounds=1, machine=Machine(), d_model=32, num_layers=1, num_heads=2, d_ff=64, vocab_size=200, seq_len=8, batch_rows=2)
    assert [r['name'] for r in result['rows']] == ['llmlab', "transformers' Llama"] and result['limit'] == 'matrix products'
    reports = bench_generate(toy, machine=Machine(), prompt_tokens=3, new_tokens=4, batches=(1, 2), rounds=1)
    assert [r['what'] for r in reports] == ['generation, 1 at once', 'generation, 2 at once']
    for r in (result, *reports): json.dumps(r, allow_nan=False); table(r)


def test_compiled_is_compared_with_compiled(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, 'compile', lambda f: wrapped.append(f) or f) # a real compilation takes a minute
    plain, compiled = bench_train(toy, machine=Machine(), rounds=1, compiled=True)
    assert len(wrapped) == 2 and (plain['what'], compiled['what']) == ('training', 'training, compiled')
    assert [r['name'] for r in compiled['rows']] == ['llmlab, compiled', "transformers' Llama, compiled"] and compiled['rows'][1]['ratio'] == 1.


def test_mistakes():
    with pytest.raises(ConfigError, match='there are train, loader, generate'): bench('speed')
    with pytest.raises(ConfigError, match='not a multiple'): bench('train', num_heads=5)
    assert set(BENCHES) == {'train', 'loader', 'generate'}
