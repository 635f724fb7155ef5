"The cross-segment needle: what was read segments ago is answered by full attention and through the memory of Infini-attention, and by nothing else."
import sys
from pathlib import Path
import pytest
sys.path.append(str(Path(__file__).parent/'bench'))
from needle import ARMS, N, QUICK, T, TASK, cell, digits, gates, read, settings, table, train

pytestmark = pytest.mark.usefixtures('one_thread')


def earlier(network, **k)->list[float]: return digits(network, **k)[:-1] # depths at which the needle lies segments before the question


def test_needles_lie_where_they_are_said_to(): # what the columns of the table mean
    for length in (T, 4*T, 16*T):
        last = (length-2)//N*N # the row that is read has a token less than the question, and the needle must end before the next segment
        ask = lambda depth: [q.needle for q in TASK.questions(50, length, depth)]
        assert min(ask(1.)) >= last and max(max(ask(d)) for d in (0., .25, .5, .75))+3 <= last


def test_full_attention_answers_everywhere():
    assert min(digits(train(f'full {QUICK}', steps=160)[0])) >= .97


def test_a_segment_alone_is_at_chance():
    assert max(earlier(train(f'local {QUICK}', steps=100)[0])) <= .2 # longer does not help: nothing of the answer is within its reach


def test_infini_answers_from_memory_and_only_from_there():
    network, _ = train(f'infini {QUICK}', steps=250)
    assert min(earlier(network)) >= .95 and max(earlier(network, memory=False)) <= .2
    assert min(earlier(network, length=4*T, samples=50)) >= .8 # four times as long as it learned
    assert any(abs(g-.5) > .01 for layer in gates(network) for g in layer)


def test_arms_are_what_their_words_say():
    for arm in ARMS: assert settings(arm, 0, 400).model.attention == arm.split()[0]
    cfg = settings('infini rule=delta gate_init=-4 optim.lr=0.1', 3, 400)
    assert (cfg.model.infini.rule, cfg.model.infini.gate_init, cfg.optim.lr, cfg.run.seed, cfg.model.infini.segment_len) == ('delta', -4, .1, 3, N)


def test_table_is_of_all_lines(tmp_path):
    line = '{"arm": "%s", "seed": %d, "steps": 9, "quick": false, "seconds": 2.0, "gates": [[0.5], [0.25]], "digits": {"96": [1, 1, 1, %s, 0.5], "384": [0.1, 0.1, 0.1, 0.1, 1.0]}}\n'
    out = tmp_path/'a.jsonl'
    assert read(out) == []
    out.write_text(line % ('infini', 0, '1.0') + line % ('full', 0, '1.0') + line % ('infini', 1, '0.6'))
    found = read(out)
    assert cell(found[::2], '96') == '1 1 1 .80 .50 (.90 to 1)' and cell(found, 'off') == ''
    rows = table(found).splitlines()
    assert len(rows) == 4 and rows[2].startswith('| `full` | 9 | 1 |') and rows[3].endswith('| .10 .10 .10 .10 1 (.10 to .10) |  |  | 0.25 to 0.50 | 2 |')
