"Following instructions: verifiers, scores and intervals against plain counting; models that know the answers, that ignore the prompt, of every family."
import builtins, json, math
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from llmlab import tiny
from llmlab.config import Model, Tokenizer
from llmlab.data.corpora import open_corpus
from llmlab.data.formats import Row, Turn, bundled_rows
from llmlab.data.instructions import make_template
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval import answers
from llmlab.eval.answers import bootstrap, chrf, common_length, form, loops, rouge_l, sign_test, token_f1
from llmlab.eval.evaluate import OpenModel
from llmlab.eval.instruct import (_batch, answer_nats, ask, ask_all, commonest, instruct, instruct_html, instruct_lines, instruct_markdown, likelihoods, others_of, ranking, shown_rows, write_answers, write_instruct)
from llmlab.eval.verifiers import VERIFIERS, check_checks, readings, verify, words_of
from llmlab.files import ConfigError, DataError
from llmlab.models.ar import AR
from llmlab.models.objective import RowScores
from llmlab.models.transformer import Shape, build
from llmlab.models.zoo import add_extras, make_objective

pytestmark = pytest.mark.usefixtures('one_thread')
tokenizer = build_tokenizer(Tokenizer(kind='byte'), open_corpus(tiny.config().data))
template = make_template('alpaca', tokenizer)
colours = 'amber blue coral gold green grey ivory jade lilac mauve ochre olive pink red rose white'.split()
rows = [Row(f'row {i}', (Turn('user', f'Say {c}.'), Turn('assistant', c))) for i, c in enumerate(colours)]
shape = Shape(vocab_size=tokenizer.vocab_size, seq_len=96, d_model=64, num_layers=2, num_heads=4, num_kv_heads=4, d_ff=128, token_mix='conv3')


class Fake:
    "An objective whose costs a function gives: of the context and the answer, as text."
    name, causal, is_bound, one_graph = 'fake', True, False, False
    def __init__(self, cost, say=''): self.cost, self.say = cost, say
    def probe(self, network, batch): return {}
    def nll(self, network, batch, generator=None, draws=1):
        nats = []
        for tokens, targets, weights in zip(batch.tokens, batch.targets, batch.weights):
            at = weights.nonzero()[:, 0]
            nats.append(float(self.cost(tokenizer.decode(tokens[:at[0]+1].tolist()), tokenizer.decode(targets[at].tolist()))))
        count = batch.weights.sum(1)
        return RowScores(torch.tensor(nats, dtype=torch.float64), count, count*0, count)
    def generate(self, network, prompts, *, max_new_tokens, stop_id=None, **dials): return [tokenizer.encode(self.say)[:max_new_tokens] for _ in prompts]


def fake(cost, say='red')->OpenModel: return OpenModel(build(replace(shape, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, d_ff=8)), Fake(cost, say), tokenizer, {'path': 'fake'})
def asked_of(rows): return ask_all(rows, template, tokenizer, 96)[0]


# ---- verifiers ----------------------------------------------------------------------------------------------------------------------

CASES = { # check -> arguments, passing, failing
    'words': [(dict(exactly=2), ['a b', '你好', "don't go"], ['a', 'a b c', '']), (dict(at_least=2, at_most=3), ['a b', 'a b c'], ['a', 'a b c d'])],
    'sentences': [(dict(exactly=2), ['One. Two.', 'Is it? Yes', '一。二。', 'a\nb', 'It is 3.14. Really!'], ['One.', 'a b', 'One... two... three. '])],
    'paragraphs': [(dict(exactly=2), ['a\n\nb', 'a\n \n\nb', 'a\n***\nb'], ['a\nb', 'a', 'a\n\nb\n\nc'])],
    'bullets': [(dict(exactly=2), ['- a\n- b', '1. a\n2) b', 'Here:\n* a\n  * b'], ['- a', '-a\n-b', 'a - b\nc - d'])],
    'keywords': [(dict(present=['red fox'], absent=['dog']), ['A Red  fox.'], ['a fox red', 'red fox and dog', 'redfox'])],
    'frequency': [(dict(word='go', at_least=2), ['go, Go!', 'go go go'], ['go', 'gogo going'])],
    'choice': [(dict(options=['Yes', 'No']), ['yes', ' No. ', '"yes"'], ['maybe', 'yes no', ''])],
    'no_commas': [({}, ['a b'], ['a, b', 'a，b', ''])],
    'json': [({}, ['{"a": [1, null]}', '[]', '```json\n{}\n```'], ['{a: 1}', "{'a': 1}", 'null', '{"a": NaN}', '[1', '[' * 100_000]), (dict(keys=['a']), ['{"a": 0}'], ['{"b": 0}', '["a"]'])],
    'case': [(dict(case='lower'), ['abc 1', 'äöü'], ['Abc', '123']), (dict(case='upper'), ['ABC!'], ['ABc'])],
    'ends': [(dict(first='Dear', last='Bye.'), ['dear Ann. bye.', ' Dear x Bye. '], ['Dear Ann', 'Bye. Dear'])],
    'title': [({}, ['<<A title>>\ntext'], ['<<>>', '<a>', '<<a\nb>>'])],
    'placeholders': [(dict(at_least=2), ['[a] [b]'], ['[a]', '[] []', '[a\nb] [c]'])],
    'repeat_prompt': [(dict(prompt='Say it.'), ['Say it. It.', 'say it! ok'], ['It.', 'Say it.', 'Well, say it. It.'])],
}

@pytest.mark.parametrize('name', VERIFIERS)
def test_verifiers(name):
    for arguments, passing, failing in CASES[name]:
        check_checks([dict(check=name, **arguments)])
        assert [t for t in passing if not VERIFIERS[name](t, **arguments)] == []
        assert [t for t in failing if VERIFIERS[name](t, **arguments)] == []


def test_there_are_fourteen(): assert len(VERIFIERS) == len(CASES) == 14


@given(st.text(), st.sampled_from([dict(check=n, **c[0][0]) for n, c in CASES.items()]))
def test_no_text_breaks_a_check(text, check):
    found = verify(text, [check])
    assert found['loose'][0] >= found['strict'][0]
    assert found['strict'] == [bool(text.strip()) and VERIFIERS[check['check']](text.strip(), **{k: v for k, v in check.items() if k != 'check'})]
    assert all(r.strip() for r in readings(text))


@given(st.text())
@example("0'\U00020000")
def test_words_are_the_same_in_any_case_and_composition(text):
    import unicodedata
    assert words_of(unicodedata.normalize('NFD', text)) == words_of(text)
    assert words_of(' '.join(words_of(text))) == words_of(text)


@pytest.mark.parametrize('checks, says', [([{}], 'names the check None'), (['words'], 'names the check None'), ([dict(check='words')], 'needs a limit'), ([dict(check='words', exactly='3')], 'a whole number'), ([dict(check='keywords', present='abc')], 'a list of words'),
    ([dict(check='case', case='title')], 'lower and upper'), ([dict(check='choice', options=[])], 'list of options'), ([dict(check='frequency', word='...', at_least=1)], 'no word'), ([dict(check='frequency', word=3, at_least=1)], 'not a word'), ([dict(check='keywords', present=['a', '!'])], 'no word')])
def test_bad_checks_are_refused(checks, says):
    with pytest.raises(ConfigError, match=says): check_checks(checks, 'row 1')


# ---- scores -------------------------------------------------------------------------------------------------------------------------

def plain_lcs(a, b)->int:
    best = [[0]*(len(b)+1) for _ in range(len(a)+1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b): best[i+1][j+1] = best[i][j]+1 if x == y else max(best[i][j+1], best[i+1][j])
    return best[-1][-1]


@given(st.lists(st.integers(0, 4), max_size=90), st.lists(st.integers(0, 4), max_size=90))
def test_longest_common_subsequence(a, b): assert common_length(a, b) == plain_lcs(a, b) == common_length(b, a)


def test_rouge_of_chinese():
    assert rouge_l('我爱北京天安门', '我爱北京天安门') == 1
    assert rouge_l('我爱北京', '北京爱我') == pytest.approx(.5) and token_f1('我爱北京', '北京爱我') == 1
    assert rouge_l('完全不同', '我爱北京') == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_are_shares(a, b):
    for f in (token_f1, rouge_l):
        assert 0 <= f(a, b) <= 1 and f(a, b) == f(b, a) and f(a, a) == 1
    assert rouge_l(a, b) <= token_f1(a, b)+1e-12


def test_without_sacrebleu(monkeypatch):
    answers._chrf.cache_clear()
    real = builtins.__import__
    def without(name, *args, **kw):
        if name.startswith('sacrebleu'): raise ModuleNotFoundError(name)
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', without)
    try:
        with pytest.raises(ConfigError, match='needs sacrebleu.*pip install sacrebleu.*leave_out'): chrf(['a'], ['a'])
        model = fake(lambda c, a: 1)
        with pytest.raises(ConfigError, match='sacrebleu'): instruct(model, rows, template)
        found = instruct(model, rows, template, leave_out=['chrf'], k=4)
        assert 'instruct/chrf' not in found and 'instruct/token_f1' in found and 'chrf' not in found['settings'] and 'chrF' not in instruct_markdown(found)
    finally: answers._chrf.cache_clear()


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=30), st.text(max_size=30))
def test_form_of_any_text(text, asked, reference):
    found = form(text, asked, reference)
    assert found['format_ok'] == (found['stopped'] and not any(found[k] for k in ('leaks', 'empty', 'echoes', 'loops')))
    same = form(reference, asked, reference)
    assert not (same['leaks'] or same['echoes'] or same['loops'])


def test_loops_are_found_soon():
    assert loops('again and again '*8) and loops('我'*12) and loops('ab'*10) and loops('{"a": 1}, '*11)
    assert not loops('1, 2, 3, 4, 5, 6, 7, 8, 9, 10') and not loops('---\n'*3) and not loops('    '*20) and not loops('')


# ---- intervals ----------------------------------------------------------------------------------------------------------------------

def test_the_bootstrap_covers():
    "A 95 % interval of a ratio holds the truth about 95 times of 100 (a little less often: the rows are few and skewed)."
    g, hits, paired, n = np.random.default_rng(1), 0, 0, 300
    for trial in range(n):
        weight = g.integers(5, 40, 60)
        nats = weight*g.gamma(4, .5, 60) # mean 2 nats a token
        b = bootstrap(nats, weight, 400, trial)
        hits += b.low <= 2 <= b.high
        d = bootstrap(weight*g.normal(.1, .3, 60), weight, 400, trial)
        paired += d.low <= .1 <= d.high
    assert .90 <= hits/n <= .985 and .90 <= paired/n <= .985


def test_the_bootstrap_by_the_book():
    g = np.random.default_rng(0)
    a, b = g.random(30), g.integers(1, 9, 30)
    index = np.random.default_rng(5).integers(0, 30, (4000, 30))
    low, high = np.quantile(a[index].sum(1)/b[index].sum(1), [.025, .975])
    found = bootstrap(a, b, 4000)
    assert found.value == pytest.approx(a.sum()/b.sum()) and found.low == pytest.approx(low, rel=.03) and found.high == pytest.approx(high, rel=.03)
    assert bootstrap(a, b, seed=1) == bootstrap(a, b, seed=1) != bootstrap(a, b, seed=2)
    with pytest.raises(DataError): bootstrap([1.], [0.])


@given(st.integers(0, 40), st.integers(0, 40))
def test_sign_test_by_counting(up, down):
    n = up+down
    tail = sum(math.comb(n, i) for i in range(min(up, down)+1))/2**n
    assert sign_test([1.]*up+[-2.]*down+[0.]*3) == dict(above=up, below=down, p=pytest.approx(min(1, 2*tail)))


def test_sign_test_of_very_many(): assert sign_test([1]*60_000+[-1]*60_000)['p'] == 1. and sign_test([1]*60_000+[-1]*50_000)['p'] < 1e-100


# ---- models that know, and models that do not look ----------------------------------------------------------------------------------

def knows(context:str, answer:str)->float: return 1. if f'Say {answer}.' in context else 3.*(len(answer)+1)


def test_one_that_knows_the_answers():
    found = instruct(fake(knows), rows, template, leave_out=['writing'])
    assert found['instruct/rank_accuracy'] == 1 and found['instruct/rank_blind'] < .5 and found['instruct/rank_chance'] == .125
    assert found['instruct/gain'] > 0 and found['instruct/gain_swapped'] > 0 and found['intervals']['instruct/gain'][0] > 0
    assert found['instruct/nll'] == pytest.approx(16/sum(len(c)+1 for c in colours))
    against = instruct(fake(knows), rows, template, base=fake(lambda c, a: 3.*(len(a)+1)), leave_out=['writing'])['against_base']
    assert against['nll']['high'] < 0 and against['nll']['below'] == 16 and against['nll']['p'] < 1e-4 and against['rank_accuracy']['low'] > 0


def many(n:int, answer)->list[Row]: return [Row(f'r{i}', (Turn('user', f'Ask {i}.'), Turn('assistant', answer(i)))) for i in range(n)]


@pytest.mark.parametrize('k', [2, 4, 8])
def test_one_that_ignores_the_prompt_is_at_chance(k):
    "Whatever it thinks of the answers: every row is the right one once and a wrong one as often as all others."
    g, ms = np.random.default_rng(0), []
    liking = {str(i): g.random() for i in range(400)}
    found = instruct(fake(lambda c, a: liking[a]*(len(a)+1)), many(400, str), template, k=k, leave_out=['writing'])
    low, high = found['intervals']['instruct/rank_accuracy']
    assert low-.02 < 1/k < high+.02 and found['instruct/rank_accuracy'] == found['instruct/rank_blind']
    assert found['instruct/gain'] == found['instruct/gain_swapped'] == found['instruct/rank_above_blind'] == 0 and found['intervals']['instruct/gain'] == [0, 0]


def test_one_that_finds_all_the_same_shares_the_point():
    found = instruct(fake(lambda c, a: len(a)+1.), many(30, str), template, k=4, leave_out=['writing'])
    assert found['instruct/rank_accuracy'] == pytest.approx(.25)


def test_a_common_answer_is_what_the_blind_choice_is_for():
    "Half of the rows have one answer, and the model likes it: above 1/k without looking at the instruction, and not above blind."
    found = instruct(fake(lambda c, a: (1. if a == 'yes' else 2.)*(len(a)+1)), many(60, lambda i: 'yes' if i%2 else f'no {i}'), template, k=4, leave_out=['writing'])
    assert found['instruct/rank_accuracy'] > .4 and found['instruct/rank_above_blind'] == 0


def test_a_misleading_instruction_has_a_negative_gain():
    found = instruct(fake(lambda c, a: (5. if f'Say {a}.' in c else 1.)), rows, template, leave_out=['writing'])
    assert found['instruct/gain'] < 0 and found['instruct/gain_swapped'] < 0 and found['instruct/rank_accuracy'] == 0


def test_costs_are_per_token():
    "A long right answer costs more nats than a short wrong one and less per token."
    two = [Row('a', (Turn('user', 'x'), Turn('assistant', 'a'*30))), Row('b', (Turn('user', 'y'), Turn('assistant', 'b')))]
    asked = asked_of(two)
    others = [others_of(a, asked, 2, 96) for a in asked]
    model = fake(lambda c, a: (.5 if ('x' in c) == ('a' in a) else 1.)*(len(a)+1))
    assert [r['rank'] for r in ranking(model, asked, others, likelihoods(model, asked, others), 2)] == [1., 1.]


# ---- rows ---------------------------------------------------------------------------------------------------------------------------

def test_which_others():
    asked = asked_of(many(50, lambda i: str(i % 10)))
    for a in asked[:20]:
        swap, found = others_of(a, asked, 8, 96)
        texts = [b.row.response for b in found]
        assert len(set(texts)) == len(texts) == 7 and a.row.response not in texts and swap.prompt != a.prompt
    assert others_of(asked[0], asked, 8, 96) == others_of(asked[0], asked, 8, 96) != others_of(asked[0], asked, 8, 96, seed=1)
    tight = len(asked[0].prompt)+len(asked[0].answer)-1
    long = replace(asked[1], answer=asked[1].answer*3)
    assert others_of(asked[0], [asked[0], long], 2, tight)[1] == []


def test_rows_that_cannot_be_asked():
    odd = [rows[0], Row('none', (Turn('user', 'x'), Turn('assistant', ''))), Row('alone', (Turn('user', 'x'),)), Row('long', (Turn('user', 'x'*200), Turn('assistant', 'y'))), rows[1]]
    found = instruct(fake(knows), odd, template, k=2, leave_out=['writing'])
    assert (found['instruct/rows'], found['instruct/rows_left_out']) == (2, 3)
    assert any('no answer' in n and 'none, alone' in n for n in found['notes']) and any('longer than 96 tokens' in n and 'long' in n for n in found['notes'])
    alone = instruct(fake(knows), rows[:3], template, leave_out=['writing'])
    assert 'instruct/rank_accuracy' not in alone and any('lower k' in n for n in alone['notes'])
    with pytest.raises(DataError, match='none of the 1 rows can be asked .*no answer: 1'): instruct(fake(knows), odd[1:2], template)


@pytest.mark.parametrize('name', ['alpaca', 'chat'])
def test_conversations(name):
    "The last answer is scored, behind all that was said; a mark against learning it does not matter."
    t = make_template(name, tokenizer)
    row = Row('c', (Turn('system', 'Be brief.'), Turn('user', 'Hi'), Turn('assistant', 'Hello', False), Turn('user', 'Name it.'), Turn('assistant', 'Red', False)), input='a colour')
    a = ask(row, t, tokenizer)
    assert tokenizer.decode(a.answer) == 'Red' and a.answer[-1] == tokenizer.eos_id and all(a.counts)
    assert all(x in tokenizer.decode(a.prompt) for x in ('Be brief.', 'Hello', 'Name it.', 'a colour')) and not any(x in tokenizer.decode(a.blank) for x in ('brief', 'Hello', 'Name', 'colour'))


@pytest.mark.parametrize('bad, says', [(dict(k=1), 'k is 1'), (dict(samples=0), 'samples is 0'), (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(leave_out=['chr']), 'chr cannot be left out'), (dict(checks={'x': []}), "no row has this id")])
def test_bad_settings(bad, says):
    with pytest.raises(ConfigError, match=says): instruct(fake(knows), rows, template, **bad)


def test_checks_of_rows():
    own = [replace(rows[0], checks=({'check': 'case', 'case': 'lower'},)), *rows[1:]]
    found = instruct(fake(knows, 'Red'), own, template, checks={'row 1': [{'check': 'words', 'exactly': 1}], 'row 0': [{'check': 'words', 'at_most': 2}]}, k=2)
    assert (found['instruct/checks_rows'], found['instruct/checks_checks'], found['instruct/checks_strict_rows'], found['instruct/checks_strict_checks']) == (2, 3, .5, pytest.approx(2/3))
    assert found['baselines']['copy_prompt']['instruct/checks_strict_rows'] == 0 and found['rows'][0]['strict'] == [False, True]
    with pytest.raises(ConfigError, match='row row 0 names the check'): instruct(fake(knows), [replace(rows[0], checks=({'check': 'nothing'},))], template)


def test_samples_are_the_same_rows():
    one, two = (instruct(fake(knows), rows, template, samples=9, k=2, leave_out=['writing']) for _ in range(2))
    assert one == two and one['instruct/rows'] == 9 and [r['id'] for r in one['rows']] == sorted((r['id'] for r in one['rows']), key=lambda i: int(i[4:]))
    assert [r['id'] for r in instruct(fake(knows), rows, template, samples=9, k=2, seed=1, leave_out=['writing'])['rows']] != [r['id'] for r in one['rows']]


def test_stops():
    asked = asked_of(rows[:2])
    long, short = (write_answers(fake(knows, s), asked, template, max_new_tokens=5) for s in ('a longer one', 'red'))
    assert long == [('a lon', False)]*2 and short == [('red', True)]*2
    twice = type('T', (), dict(stop_ids=lambda self, t: [t.eos_id, ord('!')]))()
    assert write_answers(fake(knows, 'ab!c'), asked, twice, max_new_tokens=9) == [('ab', True)]*2


def test_baselines():
    found = instruct(fake(knows), rows, template, k=2)
    assert found['baselines']['commonest']['answer'] in colours and found['baselines']['commonest']['times'] == 1
    found = instruct(fake(knows), rows, template, k=2, train_answers=['pink', 'pink', 'red'])
    assert {k: found['baselines']['commonest'][k] for k in ('answer', 'times', 'of', 'instruct/exact_match')} == dict(answer='pink', times=2, of='train_answers') | {'instruct/exact_match': 1/16}
    assert commonest(['aaaa', 'b', 'cc']) == ('cc', 1)


# ---- real models of every family ----------------------------------------------------------------------------------------------------

def learn(model:OpenModel, steps:int)->OpenModel:
    "The task learned. Families that write a canvas of a given length meet every length: end tokens fill it, none to all that fit."
    asked, g = asked_of(rows), np.random.default_rng(0)
    def filled(a):
        more = int(g.integers(0, 9-len(a.answer))) if model.objective.is_bound else 0
        return replace(a, answer=a.answer+[tokenizer.eos_id]*more, counts=a.counts+[True]*more)
    optimizer, draws = torch.optim.AdamW(model.network.parameters(), 5e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        b = _batch([(asked[i].prompt, filled(asked[i])) for i in g.permutation(16)])
        loss = model.objective.loss(model.network, b, draws)
        optimizer.zero_grad(); (loss.sum/b.num_targets).backward(); optimizer.step()
    model.network.eval()
    return model


def trained(family:str, steps:int)->OpenModel:
    objective = make_objective(Model.model_validate(dict(architecture=family, sdd=dict(k=8))), tokenizer.special)
    return learn(OpenModel(add_extras(build(shape, seed=0), objective), objective, tokenizer, {'path': family}), steps)


@pytest.fixture(scope='module', params=['ar', 'diffusion', 'sdd'])
def family(request, one_thread)->tuple[OpenModel, OpenModel]: return trained(request.param, 150 if request.param == 'ar' else 250), trained(request.param, 0)


def test_every_family(family, tmp_path):
    tuned, base = family
    found = instruct(tuned, rows, template, base=base, max_new_tokens=8, draws=2)
    assert found['instruct/nll'] < found['base']['instruct/nll']/2 and found['against_base']['nll']['high'] < 0
    assert found['intervals']['instruct/gain'][0] > 0 and found['intervals']['instruct/gain_swapped'][0] > 0
    assert found['intervals']['instruct/rank_accuracy'][0] > .125 and found['instruct/rank_above_blind'] > .3
    assert found['instruct/chrf'] > found['base']['instruct/chrf']+10
    bound = tuned.objective.is_bound
    assert found['instruct/is_bound'] == bound and any('upper bound' in n for n in found['notes']) == bound and ('draws' in found['settings']) == bound
    one, again = (instruct(tuned, rows[:5], template, k=3, max_new_tokens=8, draws=2) for _ in range(2))
    assert one == again
    json.dumps(found, allow_nan=False)
    folder = write_instruct(tmp_path/'out', found)
    assert json.loads((folder/'eval.json').read_text())['instruct/gain'] == found['instruct/gain']
    lines = [json.loads(line) for line in (folder/'generations.jsonl').read_text().splitlines()]
    assert len(lines) == 16 and {'id', 'instruction', 'reference', 'output', 'stop', 'chrf', 'nll', 'rank', 'base'} <= set(lines[0])


def test_batches_do_not_matter(family):
    tuned, _ = family
    asked = asked_of(rows)
    one, all_ = (answer_nats(tuned, [(a.prompt, a) for a in asked], batch_rows=n, draws=2) for n in (1, 16))
    np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-4)


def test_a_hugging_face_model(tmp_path):
    transformers = pytest.importorskip('transformers')
    from llmlab.models.pretrained import HFCausal, open_pretrained
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=96)).save_pretrained(tmp_path)
    base, tuned = (OpenModel(open_pretrained(tmp_path).eval(), HFCausal(), tokenizer, {'path': name}) for name in ('base', 'tuned'))
    learn(tuned, 150)
    found = instruct(tuned, rows, template, base=base, max_new_tokens=8)
    assert found['intervals']['instruct/gain_swapped'][0] > 0 and found['intervals']['instruct/rank_accuracy'][0] > .125 and found['against_base']['nll']['high'] < 0
    assert found['instruct/chrf'] > found['base']['instruct/chrf'] and found['instruct/stopped'] > .5


def test_a_base_with_another_tokenizer():
    other = build_tokenizer(Tokenizer(kind='bpe', vocab_size=400), open_corpus(tiny.config().data))
    base = OpenModel(build(replace(shape, vocab_size=other.vocab_size, seq_len=40), seed=0), AR(), other, {'path': 'other'})
    tuned = OpenModel(build(shape, seed=0), AR(), tokenizer, {'path': 'mine'})
    found = instruct(tuned, rows, template, base=base, k=2, max_new_tokens=4)
    assert 'nll' not in found['against_base'] and 'gain' not in found['against_base'] and 'bits_per_byte' in found['against_base'] and any('tokenizers differ' in n for n in found['notes'])
    assert found['instruct/rows'] == found['base'].get('instruct/rows', found['instruct/rows'])


# ---- what people read ---------------------------------------------------------------------------------------------------------------

def test_tables_hold_any_text():
    evil = '<script>alert("|")</script>\n| `x` [a](javascript:b) *b*'
    odd = [Row(f'r{i}', (Turn('user', evil+str(i)), Turn('assistant', evil))) for i in range(3)]
    found = instruct(OpenModel(build(replace(shape, seq_len=300), seed=0), Fake(lambda c, a: 1., evil), tokenizer, {'path': evil}), odd, template, k=2)
    page, text = instruct_html(found), instruct_markdown(found)
    assert '<script>' not in page+text and '](javascript' not in text
    below = text.split('## Rows')[1].strip().splitlines()
    assert {line.count('|') for line in below} == {7}


@pytest.mark.parametrize('number', [1, 5, 16, 20])
def test_shown_rows(number):
    found = instruct(fake(knows), rows, template, k=2)
    shown = shown_rows(found, number)
    assert len(shown) == len({r['id'] for _, r in shown}) == min(number, 16)
    scores = {k: [r['chrf'] for kind, r in shown if kind == k] for k in ('best', 'worst')}
    assert not scores['best'] or not scores['worst'] or min(scores['best']) >= max(scores['worst'])
    assert shown == shown_rows(found, number)


def test_the_lines_fit_the_head():
    for more in (dict(), dict(base=fake(knows)), dict(leave_out=['writing']), dict(leave_out=['ranking', 'chrf'], base=fake(knows)), dict(pattern=r'\w+')):
        found = instruct(fake(knows), rows, template, k=2, **more)
        head, lines = instruct_lines(found)
        assert all(len(line) == len(head) for line in lines) and ('change' in head) == ('base' in more)
        shown_rows(found); instruct_html(found)


def test_our_own_tasks():
    "The reference answers of the bundled rows are in good form, and copying is no answer."
    own = bundled_rows(60)
    model = OpenModel(build(replace(shape, seq_len=300), seed=0), Fake(lambda c, a: 1.), tokenizer, {'path': 'fake'})
    found = instruct(model, own, template, k=4)
    assert found['instruct/rows'] == 60 and all(form(r.response, r.instruction)['format_ok'] for r in own)
    assert found['baselines']['copy_prompt']['instruct/exact_match'] < .2
