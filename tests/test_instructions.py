"Instructions: formats, templates, masks, and every check with a case that fails it."
import json, pickle
from dataclasses import replace
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.formats import FORMATS, Row, Turn, bundled_rows, read_rows, rows_of_records
from llmlab.data.instructions import Segment, encode_row, make_template, open_template, prompt_ids, trained_turns
from llmlab.data.rendered import (asked_key, check_lengths, check_overlap, check_rows, cuttable, look, prepare_instructions, read_instructions, report_text, rows_of, sizes,
    split_rows, stack, target_fractions, truncate)
from llmlab.data.tokenizer import build_tokenizer, train_tokenizer
from llmlab.files import ConfigError, DataError

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n\n' + date_string + '\n' + m['content'] | trim + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' + date_string + '\n' }}{%- endif %}")
LLAMA2 = "{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
MARKED = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINK = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FORGETS = ("{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope='session')
def hf_folder(tmp_path_factory):
    "A byte-level BPE as GPT-2's, trained here, with ChatML's special tokens."
    from tokenizers import AddedToken, Tokenizer as HF, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    folder = tmp_path_factory.mktemp('hf')
    hf = HF(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator((r.prompt+' '+r.response for r in bundled_rows()), BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    hf.add_special_tokens([AddedToken(t, special=True) for t in ('<|endoftext|>', '<|im_start|>', '<|im_end|>')])
    hf.save(str(folder/'tokenizer.json'))
    return folder


def jinja(folder, text:str, **tokens):
    "The tokenizer of a folder and its Jinja template."
    (folder/'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|im_end|>', 'chat_template': text} | tokens))
    tokenizer = build_tokenizer(config.Tokenizer(kind='hf', path=str(folder)), open_corpus(config.Data(name='stories', max_documents=2)))
    return tokenizer, make_template('auto', tokenizer, folder)


@pytest.fixture(scope='session')
def tokenizers(hf_folder):
    (hf_folder/'tokenizer_config.json').write_text('{}') # GPT-2: BOS and EOS are the same
    texts = [r.prompt+' '+r.response for r in bundled_rows()]
    made = {k: train_tokenizer(texts, config.Tokenizer(kind=k, vocab_size=400)) for k in ('byte', 'bpe')}
    return made | {'hf': build_tokenizer(config.Tokenizer(kind='hf', path=str(hf_folder)), open_corpus(config.Data(name='stories', max_documents=2)))}


@pytest.fixture(scope='session')
def sentencepiece(tmp_path_factory):
    "A tokenizer as Llama 2's: a blank before every text, bytes for unknown characters."
    from tokenizers import AddedToken, Tokenizer as HF, decoders, models, normalizers
    folder = tmp_path_factory.mktemp('sp')
    vocab = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '\u2581', *'abcdefghijklmnopqrstuvwxyz']
    hf = HF(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[], byte_fallback=True, unk_token='<unk>'))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    hf.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    hf.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ('<unk>', '<s>', '</s>')])
    hf.save(str(folder/'tokenizer.json'))
    return build_tokenizer(config.Tokenizer(kind='hf', path=str(folder)), open_corpus(config.Data(name='stories', max_documents=2)))


text = st.text(st.characters(exclude_categories=('Cs',)), max_size=30) | st.sampled_from(['<|eos|>', '<|im_end|>', '### Response:\n', ' ', '\n\n', 'Qslot000Z', 'a  b ', '\u0301', '👩‍🚀'])
flags = st.sampled_from([None, None, True, False])


@st.composite
def conversations(draw)->Row:
    "Rows of one to three exchanges, with or without a system turn and an input."
    turns = [Turn('system', draw(text))]*draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))): turns += [Turn('user', draw(text)), Turn('assistant', draw(text.filter(str.strip)), draw(flags))]
    return Row('r', tuple(turns), input=draw(st.sampled_from(['', 'about this', '\n'])))


# formats

RECORDS = {
    'alpaca': {'instruction': 'Add.', 'input': '1 2', 'output': '3'}, 'dolly': {'instruction': 'Add.', 'context': '1 2', 'response': '3', 'category': 'sums'},
    'messages': {'messages': [{'role': 'user', 'content': 'Add.'}, {'role': 'assistant', 'content': '3', 'train': True}]},
    'sharegpt': {'conversations': [{'from': 'human', 'value': 'Add.'}, {'from': 'gpt', 'value': '3'}]}, 'prompt': {'prompt': 'Add.', 'completion': '3'},
}


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_is_known_and_read(name, tmp_path):
    said = []
    for suffix, body in (('json', json.dumps([RECORDS[name]]*2)), ('jsonl', (json.dumps(RECORDS[name])+'\n')*2), ('json', json.dumps({'version': '1', 'data': [RECORDS[name]]*2})), ('json', '\ufeff'+json.dumps([RECORDS[name]]*2))):
        (tmp_path/f'f.{suffix}').write_text(body)
        rows = read_rows(tmp_path/f'f.{suffix}', say=said.append)
        assert [r.id for r in rows] == ['f-1', 'f-2'] and {r.kind for r in rows} == {name} and {(r.instruction, r.response) for r in rows} == {('Add.', '3')}
        assert rows == read_rows(tmp_path/f'f.{suffix}', name, lambda line: None) and [Row.from_dict(json.loads(json.dumps(r.to_dict()))) for r in rows] == rows
    assert said and all(name in line for line in said)
    assert rows[0].input == ('1 2' if name in ('alpaca', 'dolly') else '')


def test_what_is_not_read_is_told():
    say = []
    talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}]
    rows = rows_of_records([{'messages': talk, 'id': 7, 'source': 'web'}, {'messages': talk[:2], 'lang': 'en'}, {'messages': talk[:1]}], say=say.append)
    assert [len(r.turns) for r in rows] == [2, 2, 1] and rows[2].response == ''
    assert say[1:] == ['fields that are not read: lang, source', '1 rows end with turns that nobody answered: these turns are left off']


def test_parts_of_text_and_checks_are_read():
    row, = rows_of_records([{'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'A'}, {'type': 'text', 'text': 'b'}]}, {'role': 'assistant', 'content': 'c'}], 'checks': [{'name': 'x'}]}], say=lambda line: None)
    assert row.instruction == 'Ab' and row.checks == ({'name': 'x'},)


@pytest.mark.parametrize('name, body, says', [
    ('f.json', '[{"instruction": "a", "output": "b"}, {"prompt": "a", "answer": "b"}]', 'Record 2 has prompt, answer'), ('f.json', '[]', 'no records'), ('f.json', '[1]', 'record 1'), ('f.json', '{"a"', 'not readable as JSON'),
    ('f.jsonl', '{"prompt": "a", "answer": "b"}\n{"prom\n{}', 'line 2'), ('f.csv', 'instruction,output\na,b,c\n', 'record 1'), ('f.csv', 'instruction,output\n"a,b\n', 'not sound CSV'), ('f.txt', 'a', '.jsonl or .csv'),
    ('f.json', '[{"instruction": "a", "output": null, "input": 3}]', 'input is 3'), ('f.json', '[{"messages": []}]', 'not empty'), ('f.json', '[{"messages": [{"role": "tool", "content": "x"}]}]', "role is 'tool'"),
    ('f.json', '[{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]', 'not text'), ('f.json', '['*100_000, 'not readable'),
    ('f.json', '[{"prompt": "a", "completion": "x\\ud800"}]', 'half a character'), ('f.json', '[{"prompt": [1], "completion": "x"}]', 'not text'), ('f.json', '[{"instruction": "a", "output": "b", "checks": "all"}]', 'checks'),
])
def test_files_that_are_wrong_say_where(name, body, says, tmp_path):
    (tmp_path/name).write_text(body)
    with pytest.raises(DataError, match=None) as e: read_rows(tmp_path/name, say=lambda line: None)
    assert says in str(e.value), str(e.value)


def test_bytes_that_are_not_text_and_files_that_are_not_there(tmp_path):
    (tmp_path/'f.json').write_bytes(b'[{"instruction": "\xff"}]')
    with pytest.raises(DataError, match='not UTF-8'): read_rows(tmp_path/'f.json')
    with pytest.raises(DataError, match='cannot read'): read_rows(tmp_path/'none.json')
    with pytest.raises(ConfigError, match='Did you mean dolly'): rows_of_records([{}], 'doly')
    with pytest.raises(DataError, match='instruction and output is missing|instruction and output'): rows_of_records([{'a': 1}], 'alpaca')


def test_bundled_answers_pass_their_own_checks():
    from llmlab.eval.verifiers import check_checks, verify
    for r in bundled_rows(300):
        found = verify(r.response, check_checks(r.checks, r.id))
        assert all(found['strict']) and (found['strict'] or r.category == 'sort numbers'), (r, found)


def test_bundled_rows_are_right():
    rows = bundled_rows(1000, seed=3)
    assert rows == bundled_rows(1000, seed=3) != bundled_rows(1000, seed=4)
    assert len({asked_key(r) for r in rows}) == 1000 and len({r.category for r in rows}) == 14
    for r in rows:
        items, numbers = r.input.split(', '), [int(x) for x in r.input.replace(',', ' ').split() if x.isdigit()]
        if r.category == 'reverse': assert r.response.split(', ') == items[::-1]
        if r.category == 'sort words': assert r.response.split(', ') == sorted(items)
        if r.category == 'count': assert int(r.response) == len(items)
        if r.category == 'add': assert int(r.response) == sum(numbers)
        if r.category == 'largest': assert int(r.response) == max(numbers)
        if r.category in ('choose', 'colour'): assert r.response in r.input and r.response
    assert bundled_rows(100, 3) == rows[:100]


# templates and masks

def templates(tokenizer, kind:str)->list: return [make_template(n, tokenizer) for n in ('alpaca', 'chat')]


def assert_sound(row, template, tokenizer, train_on):
    "All that must hold of a row, worked out apart from the module's checks."
    e = encode_row(row, template, tokenizer, train_on)
    check_rows([look(row, e, template, tokenizer, train_on)])
    learned = [t.content for t, yes in zip(row.turns, trained_turns(row, train_on)) if yes]
    stop, found, run = template.stop_ids(tokenizer), [], []
    for i, t in zip([*e.ids, 0], [*e.targets, False]):
        if t: run.append(i)
        elif run: found.append(run); run = []
    assert all(r[-1] in stop and not set(r[:-1]) & set(stop) for r in found)
    trim = str.strip if template.name == 'jinja' else str
    assert [trim(tokenizer.decode(r[:-1])) for r in found] == [trim(x) for x in learned]
    assert e.ids[:e.n_prompt] == prompt_ids(row, template, tokenizer) == prompt_ids(row if row.input else row.asked, template, tokenizer)
    return e


@given(row=conversations(), kind=st.sampled_from(['byte', 'bpe', 'hf']), name=st.sampled_from(['alpaca', 'chat']), train_on=st.sampled_from(['last', 'all', 'listed']))
@settings(max_examples=300, deadline=None)
def test_targets_are_the_answers_and_prompts_are_what_generation_is_fed(tokenizers, row, kind, name, train_on):
    tokenizer = tokenizers[kind]
    e = assert_sound(row, make_template(name, tokenizer), tokenizer, train_on)
    assert e.ids[0] == tokenizer.bos_id and e.ids.count(tokenizer.eos_id) == sum(t.role == 'assistant' for t in row.turns) + (tokenizer.bos_id == tokenizer.eos_id)


@given(row=conversations(), train_on=st.sampled_from(['last', 'all']))
@settings(max_examples=60, deadline=None)
def test_a_tokenizer_that_puts_a_blank_before_every_text(sentencepiece, row, train_on):
    if any('\u2581' in t.content for t in row.turns): return # its own sign for a blank does not come back
    e = assert_sound(row, make_template('alpaca', sentencepiece), sentencepiece, train_on)
    assert e.ids[0] == sentencepiece.bos_id != sentencepiece.eos_id == e.ids[-1]


@pytest.mark.parametrize('source', [CHATML, MARKED, LLAMA3, LLAMA2], ids=['chatml', 'marked', 'llama3', 'llama2'])
def test_jinja_templates_agree_with_transformers(hf_folder, source):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    tokenizer, template = jinja(hf_folder, source, bos_token='<|endoftext|>')
    rows = [r for r in bundled_rows(28)] + [Row('t', (Turn('user', ' hi '), Turn('assistant', 'So  it is.\n'), Turn('user', 'é'), Turn('assistant', '漢')))]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(hf_folder/'tokenizer.json'), chat_template=source, bos_token='<|endoftext|>', eos_token='<|im_end|>')
    for r in rows:
        e = assert_sound(r, template, tokenizer, 'all')
        said = [{'role': t.role, 'content': t.content + f'\n\n{r.input}'*bool(t.role == 'user' and r.input)} for t in r.turns]
        rendered = theirs.apply_chat_template(said, tokenize=False, date_string='26 Jul 2024')
        assert theirs.decode(e.ids, clean_up_tokenization_spaces=False) == rendered
        prompt = theirs.apply_chat_template(said[:-1], tokenize=False, add_generation_prompt=True, date_string='26 Jul 2024')
        assert theirs.decode(prompt_ids(r, template, tokenizer), clean_up_tokenization_spaces=False) == prompt
    again = open_template(json.loads(json.dumps(template.description)), tokenizer)
    assert encode_row(rows[-1], again, tokenizer) == encode_row(rows[-1], template, tokenizer) and again.stop_ids(tokenizer) == [tokenizer.eos_id]


@given(row=conversations(), train_on=st.sampled_from(['last', 'all']))
@settings(max_examples=60, deadline=None)
def test_jinja_holds_for_any_text(chatml, row, train_on): assert_sound(row, chatml[1], chatml[0], train_on)


@pytest.fixture(scope='session')
def chatml(hf_folder): return jinja(hf_folder, CHATML)


@pytest.mark.parametrize('source, says', [
    (CHATML.replace('<|im_end|>', ''), 'could not learn to stop'), (THINK, 'training and generation would differ'), ("{{ raise_exception('no') }}", 'cannot write the roles'), ('{% for', 'cannot write the roles'),
    ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<|im_end|>{% endfor %}", 'once, in their order'), (CHATML.replace("m['content']", "m['content'] | upper"), 'once, in their order'),
])
def test_jinja_templates_that_cannot_be_trained_on_are_refused(hf_folder, source, says):
    with pytest.raises(DataError) as e: jinja(hf_folder, source)
    assert says in str(e.value) and 'finetune.template=chat' in str(e.value)


def test_a_template_that_rewrites_earlier_turns_is_refused_for_conversations_alone(hf_folder):
    tokenizer, template = jinja(hf_folder, FORGETS)
    one, two = bundled_rows(1)[0], Row('two', (Turn('user', 'a'), Turn('assistant', 'b'), Turn('user', 'c'), Turn('assistant', 'd')))
    assert_sound(one, template, tokenizer, 'last')
    with pytest.raises(DataError, match='once, in their order|rewrites earlier turns'): encode_row(two, template, tokenizer)
    tokenizer, template = jinja(hf_folder, CHATML.replace("m['content']", "m['content'].replace('x', 'y')"))
    with pytest.raises(DataError, match='changes the text'): encode_row(Row('x', (Turn('user', 'x'), Turn('assistant', 'b'))), template, tokenizer)


def test_rows_that_a_template_cannot_write_are_named(hf_folder, tmp_path):
    tokenizer, template = jinja(hf_folder, CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('tree', 'bush') }}"))
    rows = bundled_rows(60)
    with pytest.raises(DataError, match=r'of 60 rows cannot be written \(tasks-.*changes the text'): prepare_instructions(rows, template, tokenizer, max_seq_len=200, folder=tmp_path/'d')


def test_auto_without_a_jinja_template_is_alpaca(tokenizers, tmp_path, hf_folder):
    assert make_template('auto', tokenizers['bpe']).name == make_template('auto', tokenizers['bpe'], tmp_path).name == 'alpaca'
    (tmp_path/'chat_template.jinja').write_text(CHATML)
    with pytest.raises(DataError, match='kind hf'): make_template('auto', tokenizers['bpe'], tmp_path)
    with pytest.raises(DataError, match='not one of this version'): open_template({'name': 'alpaca', 'sha256': 'x'}, tokenizers['bpe'])


def test_a_border_inside_a_token_does_no_harm():
    "The usual way (tokenize the prompt, count) is off by a token where the border merges; segments are not."
    prompt, answer = '### Instruction:\nCopy.\n\n### Response:\n', '\n\nred'
    tokenizer = train_tokenizer([prompt+answer]*50, config.Tokenizer(kind='bpe', vocab_size=300))
    e = encode_row(Row('r', (Turn('user', 'Copy.'), Turn('assistant', answer))), make_template('alpaca', tokenizer), tokenizer)
    assert tokenizer.encode(prompt+answer)[:len(tokenizer.encode(prompt))] != tokenizer.encode(prompt) # the border is inside a token
    assert tokenizer.decode([i for i, t in zip(e.ids, e.targets) if t]) == answer


# the checks, each with a case that fails it

def broken(template, change): return replace(template, lay=lambda turns, about, opened: change(template.lay(turns, about, opened), opened))
def endless(groups, opened): return [[s for s in g if s.kind != 'end'] for g in groups]
def shy(groups, opened): return [[p for s in g for p in ([replace(s, text=s.text[:1], target=False), replace(s, text=s.text[1:])] if s.kind == 'response' else [s])] for g in groups]
def rewritten(groups, opened): return [[replace(s, text=s.text.upper()) if s.kind == 'response' else s for s in g] for g in groups]
def greedy(groups, opened): return groups[:1] + [[replace(s, target=True) for s in g] for g in groups[1:]]
def blank(groups, opened): return groups[:-1] + [[*groups[-1], Segment(' ', False, 'frame')]] if opened else groups
def twice(groups, opened): return [groups[0]*2] + groups[1:]
def inside(groups, opened): return groups[:1] + [[*g, Segment('', False, 'frame', 'BOS')] for g in groups[1:]]


@pytest.mark.parametrize('change, check', [(endless, 'M3'), (shy, 'M4'), (rewritten, 'M4'), (greedy, 'M5'), (shy, 'M5'), (blank, 'M6'), (twice, 'M7'), (inside, 'M7')])
@pytest.mark.parametrize('name', ['alpaca', 'chat'])
def test_a_broken_template_is_found(tokenizers, tmp_path, name, change, check):
    rows, tokenizer = [r for r in bundled_rows(60) if len(r.response) > 2], tokenizers['byte']
    bad = broken(make_template(name, tokenizer), change)
    with pytest.raises(DataError) as e: prepare_instructions(rows, bad, tokenizer, max_seq_len=200, folder=tmp_path/'d', say=lambda line: None)
    assert f'{check} fails in ' in str(e.value) and rows[0].id in str(e.value) and not (tmp_path/'d').exists()


def test_double_bos_is_found_where_bos_is_eos(tokenizers):
    tokenizer, row = tokenizers['hf'], bundled_rows(1)[0]
    assert tokenizer.bos_id == tokenizer.eos_id
    bad = broken(make_template('alpaca', tokenizer), twice)
    with pytest.raises(DataError, match='M7 fails'): check_rows([look(row, encode_row(row, bad, tokenizer), bad, tokenizer)])


def test_a_jinja_template_that_writes_bos_again_is_found(hf_folder):
    tokenizer, template = jinja(hf_folder, LLAMA2.replace("{% if loop.first %}{{ bos_token }}{% endif %}", "{{ bos_token }}"), bos_token='<|endoftext|>')
    row = Row('two', (Turn('user', 'a'), Turn('assistant', 'b'), Turn('user', 'c'), Turn('assistant', 'd')))
    with pytest.raises(DataError, match='M7 fails'): check_rows([look(row, encode_row(row, template, tokenizer), template, tokenizer)])


def test_m1_rows_without_an_answer(tokenizers, tmp_path):
    rows, tokenizer, say = bundled_rows(100), tokenizers['byte'], []
    def hollow(n): return [replace(r, turns=(r.turns[0], Turn('assistant', ' \n')) if i % 2 else r.turns[:1]) if i < n else r for i, r in enumerate(rows)]
    sides = prepare_instructions(hollow(4), make_template('alpaca', tokenizer), tokenizer, max_seq_len=200, folder=tmp_path/'d', say=say.append)
    assert any(line.startswith('M1: 4 rows have no answer and were left out (tasks-1') for line in say) and sum(map(len, sides.values())) == 96
    with pytest.raises(DataError, match='M1 fails: 30 of 100 rows have nothing to learn .*max_lost_fraction=0.3'): prepare_instructions(hollow(30), make_template('alpaca', tokenizer), tokenizer, max_seq_len=200, folder=tmp_path/'e')
    with pytest.raises(DataError, match='nothing is left|M1 fails'): prepare_instructions(hollow(100), make_template('alpaca', tokenizer), tokenizer, max_seq_len=200, folder=tmp_path/'e', max_lost_fraction=1.)
    told = replace(rows[0], turns=(rows[0].turns[0], replace(rows[0].turns[1], train=False))) # the file says: not to be learned
    say.clear()
    prepare_instructions([told, *rows[1:]], make_template('alpaca', tokenizer), tokenizer, max_seq_len=200, folder=tmp_path/'f', say=say.append)
    assert any(line.startswith('M1: 1 rows') for line in say)


def test_m2_padding_is_never_a_target(tokenizers):
    tokenizer = tokenizers['byte']
    e = stack([encode_row(r, make_template('alpaca', tokenizer), tokenizer) for r in bundled_rows(5)], 200, tokenizer.pad_id, 'train', {'key': ''})
    check_lengths(e)
    e.masks[2, e.lengths[2]] = 1
    with pytest.raises(DataError, match=r'M2 fails: padding is a target in 1 rows \(tasks-3\)'): check_lengths(e)


def test_m4_a_tokenizer_that_loses_text(tmp_path):
    tokenizer = train_tokenizer(['### Instruction:\nResponse: Input abcdefghijklmnopqrstuvwxyz'], config.Tokenizer(kind='char'))
    rows = [Row('a', (Turn('user', 'copy'), Turn('assistant', 'cost: 5 €')))]
    with pytest.raises(DataError, match='M4 fails in 1 of 1 rows .*does not give this text back'): prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=99, folder=tmp_path/'d', validation_fraction=0.)


def test_m8_shares_of_targets(tokenizers, tmp_path):
    tokenizer, say = tokenizers['byte'], []
    odd = [Row('long-prompt', (Turn('user', 'x'*5000), Turn('assistant', 'y'))), Row('long-answer', (Turn('user', ''), Turn('assistant', 'y'*5000)))]
    examples = [encode_row(r, make_template('alpaca', tokenizer), tokenizer) for r in [*odd, *bundled_rows(20)]]
    found = target_fractions(examples)
    assert found['rows'] == ['long-prompt', 'long-answer'] and found['outside'] == 2 and sum(found['histogram'].values()) == 22
    prepare_instructions([*odd, *bundled_rows(60)], make_template('alpaca', tokenizer), tokenizer, max_seq_len=6000, folder=tmp_path/'d', say=say.append)
    assert any(line.startswith('M8: a share of targets beyond 1 to 95 % in 2 rows') for line in say)


def test_m9_pad_may_be_eos_since_padding_is_by_length(tokenizers, tmp_path):
    say, rows = [], bundled_rows(60)
    same = replace(tokenizers['byte'], description=tokenizers['byte'].description | {'special': tokenizers['byte'].special | {'PAD': tokenizers['byte'].eos_id}})
    class Saved(type(same)):
        def save(self, folder): return tokenizers['byte'].save(folder)
    same.__class__ = Saved
    sides = prepare_instructions(rows, make_template('alpaca', same), same, max_seq_len=200, folder=tmp_path/'d', say=say.append)
    assert any(line.startswith('M9: PAD is EOS') for line in say)
    e = sides['train']
    ends = e.tokens.gather(1, (e.lengths.long()-1)[:, None]).flatten(), e.masks.gather(1, (e.lengths.long()-1)[:, None]).flatten()
    assert (ends[0] == same.eos_id).all() and (ends[1] == 1).all() # the EOS of the answer is learned, though it looks like padding
    say.clear()
    prepare_instructions(rows, make_template('alpaca', tokenizers['byte']), tokenizers['byte'], max_seq_len=200, folder=tmp_path/'e', say=say.append)
    assert not any(line.startswith('M9') for line in say)


def test_m12_the_same_question_on_both_sides(tokenizers, tmp_path):
    rows, tokenizer, say = bundled_rows(50), tokenizers['byte'], []
    twin = replace(rows[3], id='twin', turns=(Turn('user', '  '+rows[3].instruction.upper()), *rows[3].turns[1:]))
    kw = dict(max_seq_len=200, say=say.append)
    sides = prepare_instructions([*rows, twin], make_template('alpaca', tokenizer), tokenizer, folder=tmp_path/'tail', split='tail', **kw)
    assert any(line.startswith('M12: 1 rows of validation ask what a row of training asks (twin)') for line in say) and [len(e) for e in sides.values()] == [41, 10]
    say.clear()
    prepare_instructions([*rows, twin], make_template('alpaca', tokenizer), tokenizer, folder=tmp_path/'hash', **kw)
    assert not any('M12' in line for line in say) # by hash they are on one side


# truncation

@given(rows=st.lists(conversations(), min_size=1, max_size=6), room=st.integers(1, 160), how=st.sampled_from(['drop', 'truncate_prompt', 'truncate_response']))
@settings(max_examples=150, deadline=None)
def test_truncation_keeps_what_it_says_and_counts_what_it_loses(tokenizers, rows, room, how):
    tokenizer = tokenizers['byte']
    template = make_template('alpaca', tokenizer)
    whole = [encode_row(replace(r, id=str(i)), template, tokenizer) for i, r in enumerate(rows)]
    cut = [truncate(e, room, how) for e in whole]
    assert sizes(whole).lost(room, how) == sum(e.n_target for e in whole) - sum(c.n_target for c in cut if c)
    for e, c in zip(whole, cut):
        if len(e.ids) <= room: assert c == e
        elif c: 
            assert how != 'drop' and len(c.ids) == room == c.spans[-1][2]
            assert c.ids[0] == tokenizer.bos_id
            if how == 'truncate_prompt': assert c.ids[c.n_prompt:] == e.ids[e.n_prompt:] and c.n_target == e.n_target and len(cuttable(e)) >= len(e.ids)-room
            else: assert c.ids == e.ids[:room] and c.n_prompt == e.n_prompt < room
    for fraction in (0, .05, .5):
        n = sizes(whole).enough(fraction, how)
        most = fraction*sum(e.n_target for e in whole)
        assert sizes(whole).lost(n, how) <= most and (n == 1 or sizes(whole).lost(n-1, how) > most)


def test_a_run_in_which_nothing_fits_is_refused_with_the_length_that_would_do(tokenizers, tmp_path):
    rows, tokenizer = bundled_rows(100), tokenizers['byte']
    kw = dict(folder=tmp_path/'d', say=lambda line: None)
    with pytest.raises(DataError, match='100.0% of all targets are lost') as e: prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=8, **kw)
    n = int(str(e.value).split('max_seq_len of ')[1].split(' ')[0].replace(',', ''))
    with pytest.raises(DataError): prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=n-1, **kw)
    assert not (tmp_path/'d').exists()
    sides = prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=n, **kw)
    assert sum(map(len, sides.values())) <= 100
    with pytest.raises(DataError, match='nothing is left to learn'): prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=8, max_lost_fraction=1., **kw)
    with pytest.raises(DataError, match='finetune.truncation is error'): prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=n-1, truncation='error', **kw)
    with pytest.raises(ConfigError, match='finetune.truncation'): prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=n, truncation='cut', **kw)


# splits and the folder

@given(n=st.integers(20, 120), more=st.integers(0, 60), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_row_keeps_its_side_when_others_come(n, more, seed):
    rows = all_rows()
    def side(rows): return {r.id: k for k, v in split_rows(rows, .5, seed=seed).items() for r in v}
    before, after = side(rows[:n]), side(rows[:n+more])
    assert all(after[i] == s for i, s in before.items())


@cache
def all_rows()->list[Row]: return bundled_rows(200)


def test_the_folder_is_as_documented_and_read_again(tokenizers, tmp_path):
    rows, tokenizer, say = bundled_rows(100), tokenizers['bpe'], []
    kw = dict(max_seq_len=128, folder=tmp_path/'data_instruct', say=say.append, source={'path': 'mine.json'}, split='tail')
    first = prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, **kw)
    names = {p.name for p in (tmp_path/'data_instruct').iterdir()}
    assert names == {f'{s}_{a}' for s in ('train', 'val') for a in ('tokens.pt', 'masks.pt', 'lengths.pt', 'rows.jsonl')} | {'tokenizer.json', 'config.json', 'report.json', 'report.md'}
    tokens, masks, lengths = (torch.load(tmp_path/'data_instruct'/f'train_{n}.pt', weights_only=True) for n in ('tokens', 'masks', 'lengths'))
    assert (tokens.dtype, masks.dtype, lengths.dtype) == (torch.int32, torch.uint8, torch.int32) and tokens.shape == masks.shape == (80, 128) and lengths.shape == (80,)
    for r, ids, mask, n in zip(rows, tokens, masks, lengths):
        assert tokenizer.decode(ids[mask.bool()], skip_special=False) == r.response+'<|eos|>' and (ids[n:] == tokenizer.pad_id).all()
    meta = json.loads((tmp_path/'data_instruct'/'config.json').read_text())
    assert {'format_version', 'template', 'mask_semantics', 'eos_policy', 'bos_policy', 'max_seq_len', 'truncation', 'tokenizer', 'special_ids', 'source', 'split', 'counts', 'lab_version'} <= set(meta)
    assert meta['counts'] == {'train': 80, 'validation': 20} and meta['source'] == {'path': 'mine.json'}
    report = json.loads((tmp_path/'data_instruct'/'report.json').read_text())
    assert report_text(report) in (tmp_path/'data_instruct'/'report.md').read_text()
    assert rows_of(tmp_path/'data_instruct', 'validation') == rows[80:]
    stamp = (tmp_path/'data_instruct').stat().st_ino
    say.clear()
    again = prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, **kw)
    assert not say and (tmp_path/'data_instruct').stat().st_ino == stamp and again['train'].fingerprint == first['train'].fingerprint != first['validation'].fingerprint
    assert torch.equal(again['train'].tokens, first['train'].tokens) and again['train'].ids == [r.id for r in rows[:80]]


@pytest.mark.parametrize('what, change', [('max_seq_len', dict(max_seq_len=210)), ('train_on', dict(train_on='all')), ('template', {}), ('tokenizer', {}), ('rows', {}), ('seed', dict(seed=1)), ('truncation', dict(truncation='error')),
    ('validation_fraction', dict(validation_fraction=.3)), ('split', dict(split='tail')), ('max_lost_fraction', dict(max_lost_fraction=.1))])
def test_what_changed_is_said_and_the_folder_made_again(tokenizers, tmp_path, what, change):
    rows, tokenizer, say, kw = bundled_rows(60), tokenizers['byte'], [], dict(max_seq_len=200, folder=tmp_path/'d')
    first = prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, **kw, say=lambda line: None)
    rows = rows[:-1] if what == 'rows' else rows
    tokenizer = tokenizers['bpe'] if what == 'tokenizer' else tokenizer
    again = prepare_instructions(rows, make_template('chat' if what == 'template' else 'alpaca', tokenizer), tokenizer, **(kw | change), say=say.append)
    assert say[0].startswith(f'd is made again: {what}') and again['train'].fingerprint != first['train'].fingerprint


def test_a_damaged_or_foreign_folder_is_refused(tokenizers, tmp_path):
    rows, tokenizer, kw = bundled_rows(60), tokenizers['byte'], dict(max_seq_len=200, say=lambda line: None)
    def prepare(folder, **more): return prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, folder=folder, **kw, **more)
    prepare(tmp_path/'d')
    (tmp_path/'d'/'train_masks.pt').write_bytes(pickle.dumps(print))
    with pytest.raises(DataError, match='train_masks.pt changed'): prepare(tmp_path/'d')
    (tmp_path/'d'/'train_masks.pt').unlink()
    with pytest.raises(DataError, match='train_masks.pt is missing'): read_instructions(tmp_path/'d')
    assert len(prepare(tmp_path/'d', force=True)['train'])
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('all of it')
    with pytest.raises(DataError, match='holds thesis.txt, which is not of prepared'): prepare(tmp_path/'mine')
    with pytest.raises(DataError, match='holds thesis.txt, which is not of prepared'): prepare(tmp_path/'mine', force=True)
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'all of it'
    with pytest.raises(DataError, match='ids are not of one row'): prepare_instructions([rows[0]]*2, make_template('alpaca', tokenizer), tokenizer, folder=tmp_path/'x', **kw)


def test_a_file_that_would_run_code_is_not_opened(tokenizers, tmp_path):
    "Even where its hash was mended."
    from llmlab.files import hash_file
    tokenizer = tokenizers['byte']
    prepare_instructions(bundled_rows(60), make_template('alpaca', tokenizer), tokenizer, max_seq_len=200, folder=tmp_path/'d', say=lambda line: None)
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'boom'), 'w'))
    torch.save(Bomb(), tmp_path/'d'/'train_tokens.pt')
    meta = json.loads((tmp_path/'d'/'config.json').read_text())
    meta['files']['train_tokens.pt'] = hash_file(tmp_path/'d'/'train_tokens.pt')
    (tmp_path/'d'/'config.json').write_text(json.dumps(meta))
    with pytest.raises(DataError, match='train_tokens.pt'): read_instructions(tmp_path/'d')
    assert not (tmp_path/'boom').exists()


# real files

def test_alpaca_splits_800_to_200(shared, tmp_path):
    rows = read_rows(shared/'data'/'alpaca_1k.json', say=lambda line: None)
    tokenizer = train_tokenizer((r.prompt+'\n'+r.response for r in rows[:800]), config.Tokenizer(kind='bpe', vocab_size=4096))
    sides = prepare_instructions(rows, make_template('alpaca', tokenizer), tokenizer, max_seq_len=520, folder=tmp_path/'d', split='tail', say=lambda line: None)
    assert [len(e) for e in sides.values()] == [800, 200] and sides['validation'].ids[0] == 'alpaca_1k-801'


def test_dolly_is_freed_of_its_frame(shared):
    say = []
    rows = read_rows(shared/'data'/'dolly_sample.jsonl', say=say.append)
    assert len(say) == 3 and len(rows) == 151 and sum(bool(r.input) for r in rows) == 47
    assert not any('###' in r.instruction or r.response.endswith('###') for r in rows)
