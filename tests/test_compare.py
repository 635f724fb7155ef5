"Side by side: whatever a result holds or lacks, every column has its line and every note its reason."
import re
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console
from llmlab.eval.compare import SAMPLER, SCORED, SPEED, WRITTEN, accuracy_of, compare, comparison_markdown, comparison_table, names_of, notes, plot_comparison, real_text, written
from llmlab.eval.generation import REAL
from llmlab.files import DataError

number = st.floats(0, 1e6, allow_nan=False)
maybe = lambda x: st.none() | x
point = st.fixed_dictionaries({'name': st.just('temperature'), 'temperature': st.floats(0, 3)}, optional={f'gen/{k}': maybe(number) for k in ('judge_nats', 'entropy', 'distinct2', 'self_bleu4', 'rep1', 'rep4', 'nfe', 'tokens_per_row', 'tokens_per_sec')})
real = st.fixed_dictionaries({'name': st.just(REAL), 'temperature': st.none()}, optional={f'gen/{k}': maybe(number) for k in ('judge_nats', 'entropy', 'distinct2')})
result = st.fixed_dictionaries({}, optional={'name': st.sampled_from(['a', 'b', 'x|y']), 'step': st.integers(0, 9), 'architecture': st.sampled_from(['ar', 'diffusion', 'sdd']), 'parameters': st.integers(0, 10**12),
    'training_tokens': st.integers(0, 10**13), 'val/loss': number, 'val/loss_se': number, 'val/is_bound': st.booleans(), 'val/perplexity': number, 'val/bits_per_byte': number, 'val/accuracy': st.floats(0, 1),
    'val/accuracy_of': st.sampled_from(['all', 'masked']), 'val/targets': st.integers(1, 2), 'tokenizer': st.sampled_from('tu'), 'corpus': st.sampled_from('cd'), 'seq_len': st.integers(1, 2), 'judge': st.sampled_from('jk'),
    'judge_is_itself': st.booleans(), 'generation': st.builds(lambda p, r: [*p, r], st.lists(point, max_size=3), real), 'generate/decode_tokens_per_sec': number})


@settings(max_examples=80, deadline=None)
@given(st.lists(result, min_size=1, max_size=4))
def test_every_column_has_its_line(results):
    head, lines = compare(results)
    assert len(set(head)) == len(head) >= len(results)+1 and head[1:len(results)+1] == names_of(results)
    assert all(len(line) == len(head) and any(line[1:]) for line in lines)
    order = [line.name for line in (*SCORED, SAMPLER, *WRITTEN, *SPEED)]
    shown = [line[0] for line in lines]
    assert shown == [n for n in order if n in shown]
    for r, column in zip(results, zip(*(line[1:] for line in lines))):
        cells = dict(zip(shown, column))
        assert cells.get('exact or bound', '') == {True: 'bound', False: 'exact', None: ''}[r.get('val/is_bound')]
        assert cells.get('accuracy of', '') == (accuracy_of(r) or '')
        assert (cells.get('loss, nats per token', '') != '') == ('val/loss' in r)
    text = comparison_markdown(results)
    table = [l for l in text.splitlines() if l.startswith('|')]
    assert len(table) == len(lines)+2 and all(len(re.findall(r'(?<!\\)\|', l)) == len(head)+1 for l in table)
    assert all(n in text for n in notes(results))
    console = Console(width=200, record=True, file=open('/dev/null', 'w'))
    console.print(comparison_table(results))
    assert 'exact or bound' in console.export_text() or not any('val/is_bound' in r for r in results)


@settings(max_examples=80, deadline=None)
@given(st.lists(result, min_size=1, max_size=4))
def test_notes_have_their_reason(results):
    found = ' '.join(notes(results))
    assert ('A bound is' in found) == any(r.get('val/is_bound') for r in results)
    differ = lambda k: len({r[k] for r in results if k in r}) > 1
    assert ('The tokenizers differ' in found) == differ('tokenizer')
    assert ('The judges differ' in found) == differ('judge')
    assert ('The rows differ in length' in found) == differ('seq_len')
    assert ('Not the same text' in found) == (differ('corpus') or (differ('val/targets') and not differ('tokenizer')))
    assert ('judges itself' in found) == any(r.get('judge_is_itself') for r in results)
    assert len(notes(results[:1]*2)) == len(notes(results[:1]))


def test_the_point_that_is_shown():
    points = [{'name': f'temperature {t}', 'temperature': t, 'gen/entropy': t} for t in (.2, .9, 1.4)]
    assert written({'generation': [*points, {'name': REAL, 'temperature': None}]})['temperature'] == .9
    assert written({'generation': None}) == written({}) == real_text({}) == {}


def test_real_text_of_each_tokenizer():
    one, two = ([{'name': 'temperature 1', 'temperature': 1., 'gen/entropy': 1.}, {'name': REAL, 'temperature': None, 'gen/entropy': e}] for e in (2., 3.))
    assert compare([{'name': 'a', 'generation': one}, {'name': 'b', 'generation': one}])[0] == ['', 'a', 'b', REAL]
    head, lines = compare([{'name': 'a', 'generation': one}, {'name': 'b', 'generation': two}])
    assert head == ['', 'a', 'b', f'{REAL} for a', f'{REAL} for b']
    assert ['entropy of a row', '1.000', '1.000', '2.000', '3.000'] in lines


def test_pictures():
    some = [{'name': 'a', 'val/loss': 2., 'val/loss_se': .1, 'val/is_bound': False}, {'name': 'b', 'val/loss': 3., 'val/is_bound': True}, {'name': 'c'}]
    assert plot_comparison(some) == plot_comparison(some) and plot_comparison(some)[:4] == b'\x89PNG'
    with pytest.raises(DataError): plot_comparison(some[2:])
    with pytest.raises(DataError): compare([])
