"Tokenizers: what breaks at night."
import copy, json, os, random, subprocess, sys, unicodedata
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer as HF, decoders, models, normalizers, pre_tokenizers, processors, trainers
from llmlab import config, tiny
from llmlab.data import tokenizer as page
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import SPECIALS, Tokenizer, build_tokenizer, load_tokenizer, special_text, train_tokenizer
from llmlab.files import ConfigError, DataError

root = Path(__file__).resolve().parent.parent
shakespeare = root.parent/'shared'/'data'/'tinyshakespeare.txt'


def settings_of(**more): return config.Tokenizer(**{'vocab_size': 600, **more})


def sources(start, stop): return [d.text for d, _ in open_corpus(config.Data()).all(start, stop)]


@pytest.fixture(scope='module')
def pair()->list[Tokenizer]:
    "One vocabulary of Python sources, both engines."
    texts = sources(0, 150)
    return [train_tokenizer(texts, settings_of(vocab_size=4096, engine=e)) for e in ('tiktoken', 'tokenizers')]


@pytest.fixture(scope='module')
def every(pair)->dict[str, Tokenizer]:
    "One of each kind that gives back any text (char: of its own alphabet)."
    return dict(byte=train_tokenizer([], settings_of(kind='byte')), tiktoken=pair[0], tokenizers=pair[1], hf=page._hf(gpt2_like()))


def save_hf(folder:Path, hf, **beside)->Path:
    folder.mkdir(parents=True, exist_ok=True)
    hf.save(str(folder/'tokenizer.json'))
    for name, content in beside.items(): (folder/f'{name}.json').write_text(json.dumps(content))
    return folder


def byte_level(special=('<|endoftext|>',)):
    hf = HF(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator(tiny.documents(), trainers.BpeTrainer(vocab_size=320, show_progress=False, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return hf


def gpt2_like(tmp=None)->dict:
    import tempfile
    with tempfile.TemporaryDirectory() as folder: return page._hf_description(save_hf(Path(folder), byte_level()))


# --- text -> ids -> text

@given(text=st.text())
@settings(deadline=None, max_examples=300)
@pytest.mark.parametrize('name', ['byte', 'tiktoken', 'tokenizers', 'hf'])
def test_round_trip(every, name, text):
    t = every[name]
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert b''.join(map(t.token_bytes, ids)) == text.encode()
    assert not set(ids) & set(t.special.values())
    assert t.encode_batch([text, text])[1].tolist() == ids


@given(st.text(), st.text())
@settings(deadline=None)
def test_characters(alphabet, text):
    t = train_tokenizer([alphabet, 'x'], settings_of(kind='char'))
    assert t.vocab_size == len(set(alphabet+'x'))+6
    assert t.decode(t.encode(alphabet)) == alphabet
    ids = t.encode(text)
    assert [i == t.unk_id for i in ids] == [c not in alphabet+'x' for c in text]
    assert t.decode(ids) == ''.join(c if c in alphabet+'x' else '\ufffd' for c in text)
    assert [t.token_bytes(i).decode() for i in range(t.vocab_size-6)] == sorted(set(alphabet+'x'))


@given(st.lists(st.integers(0, 10_000)))
def test_any_ids_decode(every, ids):
    for t in every.values():
        own = [i % t.vocab_size for i in ids]
        assert isinstance(t.decode(own), str) and isinstance(t.decode(np.array(own, np.uint16), skip_special=False), str)


def test_ids_that_are_not_ours(every):
    for t in every.values():
        for bad in ([t.vocab_size], [0, -1]):
            with pytest.raises(DataError, match='outside of the vocabulary'): t.decode(bad)


def test_lone_surrogates_are_refused(every):
    for t in [*every.values(), train_tokenizer(['a'], settings_of(kind='char'))]:
        with pytest.raises(DataError, match='lone surrogate'): t.encode('half \ud83d a character')


def test_half_a_character_decodes(every):
    for name in ('byte', 'tiktoken', 'tokenizers', 'hf'):
        t = every[name]
        first = next(i for i, p in enumerate(t.pieces) if p == b'\xc3')
        assert t.decode([first]) == '\ufffd'


# --- special tokens

SPELLED = [special_text(n) for n in SPECIALS] + ['<|endoftext|>', '<s>', '</s>', '[PAD]', '[CLS]']

@given(st.lists(st.sampled_from(SPELLED+[' ', 'a', '\n']), max_size=8).map(''.join))
@settings(deadline=None)
def test_text_cannot_forge_special_tokens(every, text):
    for t in every.values():
        assert not set(t.encode(text)) & set(t.special.values())
        assert t.decode([t.bos_id, *t.encode(text), t.eos_id]) == text


def test_our_special_tokens_are_the_last_ids(every):
    for name in ('byte', 'tiktoken', 'tokenizers'):
        t = every[name]
        assert [t.pad_id, t.bos_id, t.eos_id, t.mask_id, t.unk_id, t.ignore_id] == list(range(t.vocab_size-6, t.vocab_size))
        assert t.decode([t.bos_id, t.eos_id], skip_special=False) == '<|bos|><|eos|>' and t.decode([t.bos_id, t.pad_id]) == ''
        assert t.token_bytes(t.mask_id) == b''


# --- training

def test_the_size_of_the_vocabulary():
    texts = sources(0, 20)
    for size in (262, 263, 1000):
        t = train_tokenizer(texts, settings_of(vocab_size=size), say=pytest.fail)
        assert t.vocab_size == len(t.pieces) == size and t.encode_batch(['a'])[0].dtype == np.uint16
    for size in (256, 261):
        with pytest.raises(ConfigError, match='at least 262'): train_tokenizer(texts, settings_of(vocab_size=size))
    said = []
    assert train_tokenizer(['too few'], settings_of(vocab_size=65536), said.append).vocab_size < 300 and 'no other pair occurs twice' in said[0]


def test_no_text():
    for kind in ('bpe', 'char'):
        for texts in ([], ['']):
            with pytest.raises(DataError, match='no text'): train_tokenizer(texts, settings_of(kind=kind))


def test_only_the_first_megabytes_count():
    few = train_tokenizer(iter(['abcabc '*100_000]*3), settings_of(vocab_size=270, train_megabytes=.1))
    assert few.fingerprint == train_tokenizer(['abcabc '*100_000], settings_of(vocab_size=270, train_megabytes=.1)).fingerprint


def test_training_gives_the_same_in_any_process():
    code = "from llmlab import config; from llmlab.data.corpora import open_corpus; from llmlab.data.tokenizer import train_tokenizer; print(train_tokenizer([d.text for d, _ in open_corpus(config.Data(name='stories')).all(0, 3000)], config.Tokenizer(vocab_size=900, engine='tiktoken')).fingerprint)"
    prints = {subprocess.run([sys.executable, '-c', code], env=os.environ | dict(PYTHONPATH=str(root), PYTHONHASHSEED=seed, RAYON_NUM_THREADS=seed, TOKENIZERS_PARALLELISM='true'), capture_output=True, text=True, check=True).stdout for seed in '123'}
    assert len(prints) == 1


def test_shakespeare_has_65_characters():
    if not shakespeare.exists(): pytest.skip('needs ../shared/data/tinyshakespeare.txt')
    corpus = open_corpus(config.Data(name='files', path=str(shakespeare), split='tail', validation_fraction=.1))
    t = build_tokenizer(settings_of(kind='char'), corpus)
    text = shakespeare.read_text()
    codes = {c: i for i, c in enumerate(sorted(set(text)))} # as nanoGPT numbers them
    assert t.vocab_size == 65+6 and t.encode(text) == [codes[c] for c in text]


def test_the_validation_split_teaches_only_the_alphabet(tmp_path):
    (tmp_path/'a.txt').write_text('ab'*500+'yz'*50)
    corpus = open_corpus(config.Data(name='files', path='a.txt', split='tail', validation_fraction=.1), tmp_path)
    assert build_tokenizer(settings_of(kind='char'), corpus).description['characters'] == 'abyz'
    assert not any(b'yz' in p for p in build_tokenizer(settings_of(vocab_size=300), corpus).pieces)


# --- the engines agree

def differing(pair, texts): return [t for t, a, b in zip(texts, pair[0].encode_batch(texts), pair[1].encode_batch(texts)) if not np.array_equal(a, b)]


def test_engines_agree_on_python(pair):
    texts = sources(600, 1100)
    assert sum(map(len, texts)) > 2_000_000 and differing(pair, texts) == []


def in_company(code:int)->str: return "a{0}a 1{0}1 '{0}  {0}! {0}\n{0}{0}".format(chr(code))


def test_engines_agree_on_unicode(pair):
    "All signs, marks, blanks, digits and cased letters; a sample of the rest."
    codes = [c for c in range(0x110000) if (k := unicodedata.category(chr(c))) != 'Cs' and (k not in ('Cn', 'Co', 'Lo') or c % 97 == 0)]
    assert differing(pair, [in_company(c) for c in codes]) == []


@pytest.mark.proof
def test_engines_agree_on_every_code_point(pair):
    assert differing(pair, [in_company(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]) == []


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_engines_agree_on_joined_tokens(pair, rng):
    "Tokens side by side: where the order of the joins would show."
    pieces = [p.decode() for p in pair[0].pieces if p and p.isascii()]
    groups = [[p for p in pieces if p.isalpha()], [p for p in pieces if p.isspace()], [p for p in pieces if not any(c.isalnum() or c.isspace() for c in p)], pieces]
    texts = [''.join(rng.choices(group, k=rng.randrange(2, 7))) for group in rng.choices(groups, k=300)]
    assert differing(pair, texts) == []


@pytest.mark.parametrize('text', [' '*1_000_000, ' '*300_000+'x', '\t'*300_000, '\n'*300_000, ' \n'*200_000, 'a'*300_000, '^'*300_000, '7'*300_000, '漢'*100_000, '\u0301'*100_000, (' '*255+'\n')*50, (' '*256+'\n')*50, (' '*257+'\n')*50])
def test_long_runs(pair, text):
    assert differing(pair, [text]) == [] and pair[0].decode(pair[0].encode(text)) == text


def test_threads_and_giants_change_nothing(pair):
    texts = sources(100, 160)*4
    assert sum(map(len, texts)) > 1<<20
    assert [a.tolist() for a in pair[0].encode_batch(texts)] == [pair[0].encode(t) for t in texts]
    giant = ('def f(x):\n    return x\n'*800_000)[:(1<<24)+10]
    ids = pair[0].encode_batch([giant])[0]
    assert ids.dtype == np.uint16 and ids[:1000].tolist() == pair[0].encode(giant[:100_000])[:1000]


def test_an_engine_that_is_not_there(pair, tmp_path, monkeypatch):
    pair[0].save(tmp_path)
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(DataError, match='pip install tiktoken'): load_tokenizer(tmp_path)
    monkeypatch.setattr(page.importlib.util, 'find_spec', lambda name: None)
    assert train_tokenizer(tiny.documents(), settings_of(vocab_size=300)).engine == 'tokenizers'


# --- one file

def test_what_is_saved_is_loaded(every, tmp_path):
    for name, t in {**every, 'char': train_tokenizer(['añb\n🙂'], settings_of(kind='char'))}.items():
        path = t.save(tmp_path/name)
        for again in (load_tokenizer(path), load_tokenizer(str(tmp_path/name))):
            assert again.fingerprint == t.fingerprint and again.pieces == t.pieces and again.special == t.special
            assert (again.kind, again.engine, again.vocab_size) == (t.kind, t.engine, t.vocab_size)
            assert again.encode('añb 🙂 it') == t.encode('añb 🙂 it')
        assert again.save(tmp_path/(name+'2')).read_bytes() == path.read_bytes()


def test_fingerprints(pair):
    texts = tiny.documents()
    all_of = [train_tokenizer(texts, settings_of(**o)) for o in (dict(kind='byte'), dict(kind='char'), dict(vocab_size=300), dict(vocab_size=301), dict(vocab_size=300, engine='tokenizers'))]
    all_of += [train_tokenizer(texts[1:], settings_of(vocab_size=300)), train_tokenizer(texts+['Z'], settings_of(kind='char')), *pair]
    assert len({t.fingerprint for t in all_of}) == len(all_of)


def test_files_that_are_not_tokenizers(tmp_path, pair):
    with pytest.raises(DataError, match='does not exist'): load_tokenizer(tmp_path)
    good = pair[0].save(tmp_path).read_text()
    for content, says in {good[:-100]: 'not readable as JSON', '': 'not readable', '\xff': 'not readable', '[1]': 'a JSON object', '['*100_000: 'not', '{}': 'not a tokenizer that llmlab saved',
                          byte_level().to_str(): 'set tokenizer.kind=hf', good.replace('"bpe"', '"magic"'): 'unknown kind', good.replace('"kind": "bpe"', '"kind": "byte"'): 'changed or damaged',
                          good.replace('"EOS": ', '"EOS": 1'): 'changed or damaged'}.items():
        (tmp_path/'tokenizer.json').write_text(content, encoding='latin-1' if content == '\xff' else 'utf-8')
        with pytest.raises(DataError, match=says): load_tokenizer(tmp_path)


def places(o, path=()):
    for k in (list(o) if isinstance(o, dict) else range(min(len(o), 4)) if isinstance(o, list) else []):
        yield (*path, k)
        yield from places(o[k], (*path, k))


@pytest.mark.parametrize('name', ['byte', 'char', 'tiktoken', 'tokenizers', 'hf'])
def test_a_forged_file_is_an_error_or_a_tokenizer(name, tmp_path):
    "Any part replaced by nonsense, with the right fingerprint: never another kind of error."
    make = dict(byte=dict(kind='byte'), char=dict(kind='char'), tiktoken=dict(vocab_size=280, engine='tiktoken'), tokenizers=dict(vocab_size=280, engine='tokenizers'))
    description = gpt2_like() if name == 'hf' else train_tokenizer(tiny.documents(), settings_of(**make[name])).description
    rng, refused = random.Random(0), 0
    for _ in range(150):
        forged = copy.deepcopy(description)
        short = [p for p in places(forged) if len(p) < 4]
        *path, last = rng.choice(short)
        at = forged
        for k in path: at = at[k]
        if rng.random() < .3: del at[last]
        else: at[last] = rng.choice([None, True, -1, 2**33, 10**12, 1.5, '', 'x', '(', [], {}, ['a'], {'a': 1}])
        (tmp_path/'tokenizer.json').write_text(json.dumps(forged | {'fingerprint': page._fingerprint(forged)}))
        try:
            t = load_tokenizer(tmp_path)
            t.decode(t.encode('The cat <|eos|>'))
        except DataError: refused += 1
    assert refused > 40


# --- Hugging Face

def hf_of(folder): return build_tokenizer(config.Tokenizer(kind='hf', path=str(folder)), None)


def test_roles_from_the_files_beside(tmp_path):
    hf = byte_level(('<|endoftext|>', '<|im_end|>', '<tool>'))
    gpt2 = hf_of(save_hf(tmp_path/'gpt2', byte_level(), tokenizer_config=dict(bos_token='<|endoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>', add_bos_token=True)))
    assert gpt2.bos_id == gpt2.eos_id == 0 and sorted([gpt2.pad_id, gpt2.mask_id, gpt2.unk_id, gpt2.ignore_id]) == list(range(gpt2.vocab_size-4, gpt2.vocab_size))
    qwen = hf_of(save_hf(tmp_path/'qwen', hf, special_tokens_map=dict(eos_token={'content': '<|im_end|>'}, pad_token='<|endoftext|>')))
    assert (qwen.pad_id, qwen.bos_id, qwen.eos_id) == (0, 1, 1)
    clash = hf_of(save_hf(tmp_path/'clash', hf, special_tokens_map=dict(eos_token='<|im_end|>', pad_token='<|im_end|>')))
    assert clash.eos_id == 1 and clash.pad_id not in (1, clash.bos_id)
    for t in (gpt2, qwen, clash): assert len({t.special[n] for n in SPECIALS if n != 'BOS'}) == 5
    (tmp_path/'clash'/'tokenizer_config.json').write_text('{')
    with pytest.raises(DataError, match='tokenizer_config.json is not readable'): hf_of(tmp_path/'clash')


def test_settings_that_change_texts_are_off(tmp_path):
    hf = byte_level(('<s>', '</s>'))
    hf.enable_truncation(3); hf.enable_padding(length=10)
    hf.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    t = hf_of(save_hf(tmp_path/'a', hf))
    assert (t.bos_id, t.eos_id) == (0, 1)
    for text in ('', 'The fox looked for a leaf. </s><s>'):
        assert t.decode(t.encode(text)) == text and not {0, 1} & set(t.encode(text))
    again = load_tokenizer(t.save(tmp_path/'b'))
    assert again.encode(text) == t.encode(text)
    assert hf_of(tmp_path/'b').fingerprint == t.fingerprint # what we saved is welcome as well


def test_words_in_pieces_and_sentence_pieces(tmp_path):
    uni = HF(models.Unigram())
    uni.pre_tokenizer, uni.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    uni.train_from_iterator(tiny.documents(), trainers.UnigramTrainer(vocab_size=120, show_progress=False, special_tokens=['<unk>', '<s>', '</s>'], unk_token='<unk>'))
    t = hf_of(save_hf(tmp_path/'uni', uni))
    assert (t.unk_id, t.bos_id, t.eos_id) == (0, 1, 2)
    assert t.decode(t.encode('The fox saw a leaf.')) == 'The fox saw a leaf.'
    assert b''.join(map(t.token_bytes, t.encode('The fox saw a leaf.'))) == b' The fox saw a leaf.'
    assert t.encode('Ω')[-1] == t.unk_id
    words = HF(models.WordPiece(unk_token='[UNK]'))
    words.normalizer, words.pre_tokenizer, words.decoder = normalizers.Lowercase(), pre_tokenizers.Whitespace(), decoders.WordPiece()
    words.train_from_iterator(tiny.documents(), trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']))
    t = hf_of(save_hf(tmp_path/'words', words))
    assert [t.special[n] for n in ('PAD', 'UNK', 'BOS', 'EOS', 'MASK')] == [0, 1, 2, 3, 4] and t.ignore_id == t.vocab_size-1
    assert t.decode(t.encode('The fox')) == 'the fox' and b''.join(map(t.token_bytes, t.encode('the leaf'))) == b' the leaf'
    with pytest.raises(DataError): t.decode([t.vocab_size])


def test_large_vocabularies_take_32_bits(tmp_path):
    hf = HF(models.WordLevel({'[UNK]': 0} | {f'w{i}': i for i in range(1, 70_000)}, unk_token='[UNK]'))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t = hf_of(save_hf(tmp_path, hf))
    ids = t.encode_batch(['w1 w69999'])[0]
    assert ids.dtype == np.uint32 and ids.tolist() == [1, 69_999] and t.vocab_size > 65_536


def test_paths(tmp_path, pair):
    with pytest.raises(DataError, match='hf download'): hf_of(tmp_path/'gpt2')
    with pytest.raises(DataError, match='tokenizer.json does not exist'): hf_of(tmp_path)
    with pytest.raises(ConfigError, match='tokenizer.path'): build_tokenizer(config.Tokenizer(kind='hf'), None)
    with pytest.raises(ConfigError, match='is not trained'): train_tokenizer([], config.Tokenizer(kind='hf'))
    (tmp_path/'tokenizer.json').write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(DataError, match='not a Hugging Face tokenizer'): hf_of(tmp_path)
    pair[1].save(tmp_path/'ours')
    assert build_tokenizer(settings_of(path=str(tmp_path/'ours')), None).fingerprint == pair[1].fingerprint
