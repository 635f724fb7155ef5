"Models that see: they must look, learn only where they should, and come back from disk the same."
import pytest, torch
from torch.testing import assert_close
from llmlab.config import Optim
from llmlab.files import ConfigError, DataError
from llmlab.finetune.vision import COLOURS, answers, check_answers, colour_records, encode_images, image_batch, image_rows, freeze_unused, look, open_processor, read_image_examples, tiny_vision
from llmlab.models.pretrained import HFCausal, add_peft, build_pretrained, leak, linear_names, merge_peft, open_pretrained, part_of, plain_head, save_pretrained
from llmlab.packing.loader import Batch, Loader, in_order
from llmlab.trainer.loop import fit
from llmlab.trainer.optim import build_optimizer

transformers, peft, PIL = pytest.importorskip('transformers'), pytest.importorskip('peft'), pytest.importorskip('PIL.Image')
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
KINDS, NAMES, hf = ('mllama', 'llava'), list(COLOURS), HFCausal()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    return {kind: tiny_vision(folder/kind, kind) for kind in KINDS}


def opened(models, kind): return open_pretrained(models[kind], kind='image-text'), open_processor(models[kind])
def squares(): return read_image_examples(colour_records())
def rows_of(processor, examples=None, **k): return image_rows(examples or squares(), processor, **dict(seq_len=63) | k)
def all_of(rows): return next(iter(in_order(rows, rows.num_rows)))
def tune(network, rows, steps=120, lr=3e-3):
    fit(network, hf, Loader(rows, 3, seed=0, workers=0), build_optimizer(network, Optim(name='adamw', lr=lr)), total_steps=steps, save_every=10**6, log_every=10**6)
    return network.eval()
def talk(text, colour='red', answer='no', size=28): return {'messages': [{'role': 'user', 'content': text}, {'role': 'assistant', 'content': answer}], 'image': PIL.new('RGB', (size, size), colour)}


@pytest.mark.parametrize('kind, method', [('mllama', 'lora'), ('llava', 'full'), *(pytest.param(*p, marks=pytest.mark.proof) for p in (('mllama', 'full'), ('mllama', 'dora'), ('llava', 'lora'), ('llava', 'dora')))])
def test_the_colour_question(models, kind, method, tmp_path):
    "Three of three after tuning and not before; blank pictures break it; merged, saved and reopened by transformers alone it is the same."
    network, processor = opened(models, kind)
    rows = rows_of(processor)
    if method != 'full': add_peft(network, method=method, r=8, alpha=16, base=models[kind])
    assert answers(network, processor, squares(), 4) != NAMES
    tune(network, rows, lr=3e-3 if method == 'full' else 1e-2)
    assert answers(network, processor, squares(), 4) == NAMES
    blind = answers(network, processor, squares(), 4, blank=True)
    assert len(set(blind)) == 1 and blind != NAMES
    batch = all_of(rows)
    assert look(network, batch) > .1
    if method != 'full':
        with torch.no_grad():
            assert_close(merge_peft(network)(batch.tokens, document=batch.document, **batch.extras), network(batch.tokens, document=batch.document, **batch.extras), atol=1e-5*20, rtol=1e-5) # scores reach 20
    report = save_pretrained(network, models[kind], tmp_path/'out')
    assert report['drift'] == 0
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path/'out')
    with torch.no_grad(): far = (theirs(input_ids=batch.tokens, **batch.extras).logits-network(batch.tokens, **batch.extras)).abs().max()
    assert far < (1e-6 if method == 'full' else 1e-4)
    assert answers(open_pretrained(tmp_path/'out', kind='image-text'), open_processor(tmp_path/'out'), squares(), 4) == NAMES


def test_shut_gates_do_not_look(tmp_path):
    "The trap: a fresh mllama ignores the picture, and adapters do not open its gates."
    network, processor = open_pretrained(tiny_vision(tmp_path, gates=0.), kind='image-text'), open_processor(tmp_path)
    batch = all_of(rows_of(processor))
    assert look(network, batch) == 0
    add_peft(network, r=4)
    tune(network, rows_of(processor), 10, 1e-2)
    assert look(network, batch) == 0
    hf.loss(network, batch).sum.backward()
    assert not any(p.grad.any() for n, p in network.named_parameters() if part_of(n) == 'vision' and p.grad is not None)


@pytest.mark.parametrize('targets', ['text', 'fusion', 'vision', 'vision,fusion', 'all-linear'])
@pytest.mark.parametrize('kind', KINDS)
def test_towers(models, kind, targets):
    "Gradients where adapters are, none where all is frozen; after steps the frozen tower has not moved."
    network, processor = opened(models, kind)
    counts = add_peft(network, r=4, targets=targets)
    wanted = {'text', 'fusion', 'vision'} if targets == 'all-linear' else set(targets.split(','))
    assert counts['adapters'] == len(network.adapter['modules']) and {part_of(n) for n in network.adapter['modules']} == wanted
    before, batch = {n: p.detach().clone() for n, p in network.named_parameters()}, all_of(rows_of(processor))
    hf.loss(network, batch).sum.backward()
    grads = {part: [p.grad.abs().max().item() for n, p in network.named_parameters() if part_of(n) == part and p.grad is not None] for part in ('text', 'fusion', 'vision')}
    for part, found in grads.items(): assert (max(found) > 0) if part in wanted else not found
    network.zero_grad()
    tune(network, rows_of(processor), 3, 1e-2)
    moved = {part_of(n) for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == wanted and all('.lora_' in n for n, p in network.named_parameters() if not torch.equal(p, before[n]))


@pytest.mark.parametrize('kind', KINDS)
def test_rows_side_by_side_are_rows_alone(models, kind):
    "Texts of different length: padding and the further tensors fit together."
    network, processor = opened(models, kind)
    assert plain_head(network)
    rows = rows_of(processor, read_image_examples([talk('a', 'red'), talk('what colour is the square?', 'blue', 'green'), talk('what', 'green', 'red red')]))
    together = hf.nll(network, batch := all_of(rows))
    alone = [hf.nll(network, b) for b in in_order(rows, 1)]
    assert_close(together.nats, torch.cat([s.nats for s in alone]), atol=1e-4, rtol=1e-5)
    assert together.count.tolist() == [s.count.item() for s in alone] and (batch.document < 0).any()


@pytest.mark.parametrize('kind', KINDS)
def test_two_pictures_and_one(models, kind):
    network, processor = opened(models, kind)
    two = talk('which?') | {'image': None, 'images': [PIL.new('RGB', (28, 28), c) for c in ('red', 'blue')]}
    rows = rows_of(processor, read_image_examples([two, talk('which?', 'green')]))
    exact = 1e-5 if kind == 'llava' else 1e-3 # an mllama's words before the first picture look at empty places for pictures, too
    assert_close(hf.nll(network, all_of(rows)).nats, torch.cat([hf.nll(network, b).nats for b in in_order(rows, 1)]), atol=1e-4, rtol=exact)


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_that_of_transformers(models, kind):
    network, processor = opened(models, kind)
    found = encode_images(processor, squares())
    loss = hf.loss(network, image_batch(found))
    assert_close(loss.sum/loss.count, network.model(**found).loss, atol=1e-5, rtol=1e-5)


def test_targets_are_the_answers(models):
    for kind in KINDS:
        _, processor = opened(models, kind)
        found = encode_images(processor, squares())
        assert [processor.tokenizer.decode(l[l >= 0]) for l in found['labels']] == [n+'</s>' for n in NAMES]
        assert not ((found['input_ids'] == processor.image_token_id) & (found['labels'] >= 0)).any()
        several = read_image_examples([{'messages': [{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'red'}, {'role': 'user', 'content': 'and?'}, {'role': 'assistant', 'content': 'blue'}],
                                        'image': PIL.new('RGB', (28, 28))}])
        found = encode_images(processor, several)
        assert processor.tokenizer.decode(found['labels'][0][found['labels'][0] >= 0]) == 'red</s>blue</s>'
        check_answers(processor, several[0], found['labels'][0])


def test_an_image_as_an_answer_is_never_a_target(models):
    "Even where a template puts the picture between the marks."
    _, processor = opened(models, 'llava')
    e = squares()[0]
    processor.chat_template = '{{ bos_token }}{% generation %}{% for m in messages %}{% for c in m.content %}{% if c.type == "image" %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% endgeneration %}'
    found = encode_images(processor, [e])
    assert (found['input_ids'] == processor.image_token_id).sum() == 4
    assert not ((found['input_ids'] == processor.image_token_id) & (found['labels'] >= 0)).any()


def test_pictures_stay_closed_until_their_batch(models, tmp_path):
    "The header is enough to plan; a file that is cut is found when its batch is made, and named."
    _, processor = opened(models, 'llava')
    import numpy as np
    records = []
    for i in range(3):
        PIL.fromarray(np.random.default_rng(i).integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        records.append(talk('what?') | {'image': f'{i}.png'})
    (tmp_path/'1.png').write_bytes((tmp_path/'1.png').read_bytes()[:900])
    rows = rows_of(processor, read_image_examples(records, tmp_path))
    batches = in_order(rows, 1)
    assert 'pixel_values' in next(batches).extras
    with pytest.raises(DataError, match='1.png'): next(batches)
    (tmp_path/'1.png').unlink()
    with pytest.raises(DataError, match='does not exist'): rows_of(processor, read_image_examples(records, tmp_path))


def test_what_a_picture_is_given_as(models, tmp_path):
    _, processor = opened(models, 'llava')
    PIL.new('RGB', (28, 28), 'red').save(tmp_path/'a.png')
    data = (tmp_path/'a.png').read_bytes()
    same = [encode_images(processor, read_image_examples([talk('what?') | {'image': x}]))['pixel_values'] for x in (str(tmp_path/'a.png'), tmp_path/'a.png', data, {'bytes': data, 'path': None}, {'bytes': None, 'path': str(tmp_path/'a.png')}, PIL.open(tmp_path/'a.png'), PIL.new('RGBA', (28, 28), 'red'))]
    assert all(torch.equal(same[0], x) for x in same)


@pytest.mark.parametrize('kind', KINDS)
def test_lengths_are_told_without_looking(models, kind):
    "What was counted from text and sizes is what comes out, for pictures of several sizes."
    _, processor = opened(models, kind)
    examples = read_image_examples([talk('what '*n, size=s) for n, s in ((1, 28), (5, 60), (2, 28), (9, 60), (3, 17))])
    rows = rows_of(processor, examples)
    batch = all_of(rows)
    assert rows.report['longest'] == int((batch.document >= 0).sum(1).max()) == batch.tokens.shape[1]


def test_too_long_is_left_out_and_counted(models):
    _, processor = opened(models, 'llava')
    examples, said = read_image_examples([talk('what '*n) for n in (1, 2, 30, 40)]), []
    rows = rows_of(processor, examples, seq_len=31, max_lost_fraction=.5, say=said.append)
    assert rows.num_rows == 2 and rows.report['too_long'] == 2 and len(said) == 1 and '2 of 4' in said[0]
    with pytest.raises(DataError, match=f"packing.seq_len={rows.report['longest']-1}"): rows_of(processor, examples, seq_len=31)
    assert rows_of(processor, examples, seq_len=rows.report['longest']-1).num_rows == 4
    with pytest.raises(DataError, match='no example'): image_rows([], processor, seq_len=31)


def test_order_and_resume(models):
    "The loader's order: seeded, shared by ranks, gone on with where it stopped."
    _, processor = opened(models, 'llava')
    rows = rows_of(processor, read_image_examples([talk('what '*n) for n in range(1, 8)]))
    whole = [next(l) for l in [Loader(rows, 2, seed=3)] for _ in range(9)]
    loader = Loader(rows, 2, seed=3)
    for _ in range(4): next(loader)
    state = loader.state_dict()
    loader.close()
    again = Loader(rows, 2, seed=3, workers=0)
    again.load_state_dict(state)
    for b in whole[4:]:
        a = next(again)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.extras['pixel_values'], b.extras['pixel_values']) and a.rows.tolist() == b.rows.tolist()
    ranks = [Loader(rows, 1, seed=3, rank=r, world=2, workers=0) for r in (0, 1)]
    assert [[int(next(l).rows) for l in ranks] for _ in range(9)] == [b.rows.tolist() for b in whole]
    other = rows_of(processor, read_image_examples([talk('what '*n, 'blue') for n in range(1, 8)]))
    assert other.fingerprint != rows.fingerprint # other pictures, the same words


def test_the_users_own_collator(models):
    network, processor = opened(models, 'llava')
    def collate(items): return encode_images(processor, read_image_examples([{'messages': [{'role': 'user', 'content': i['q']}, {'role': 'assistant', 'content': i['a']}], 'image': i['picture']} for i in items]))
    items = [{'q': 'what colour is the square?', 'a': name, 'picture': PIL.new('RGB', (28, 28), rgb)} for name, rgb in COLOURS.items()]
    own = image_rows(items, processor, seq_len=63, collate=collate)
    ours = rows_of(processor)
    assert_close(hf.nll(network, all_of(own)).nats, hf.nll(network, all_of(ours)).nats)
    assert image_rows([i | {'picture': items[0]['picture']} for i in items], processor, seq_len=63, collate=collate).fingerprint != own.fingerprint
    assert own.report['longest'] == ours.report['longest']
    with pytest.raises(DataError, match='no tensor labels'): image_batch({'input_ids': torch.zeros(1, 3)})
    with pytest.raises(DataError, match='at their beginning'): image_batch({'input_ids': torch.zeros(1, 3), 'labels': torch.zeros(1, 3), 'attention_mask': torch.tensor([[0, 1, 1]])})
    with pytest.raises(DataError, match='one shape'): image_batch({'input_ids': torch.zeros(1, 3), 'labels': torch.zeros(1, 2)})
    assert image_rows(items, processor, seq_len=63, collate=lambda some: {k: t for k, t in collate(some).items() if k != 'pixel_values'}).num_rows == 3 # a model of text has no further tensors
    calls = []
    def fickle(items): # marks other tokens each time
        found = collate(items)
        calls.append(None)
        if len(calls) > 3: found['labels'][:, 1:4] = 5
        return found
    with pytest.raises(DataError, match='targets'): all_of(image_rows(items, processor, seq_len=63, collate=fickle))


def test_pictures_are_not_packed(models):
    network, processor = opened(models, 'llava')
    b = all_of(rows_of(processor))
    document = b.document.clone()
    document[:, 8:] = 1
    with pytest.raises(ConfigError, match='finetune.packing=none'): hf.loss(network, Batch(b.tokens, b.targets, b.weights, document, extras=b.extras))


def test_a_checkpoint_of_a_model_that_sees(models):
    for kind in KINDS:
        network, processor = opened(models, kind)
        add_peft(network, r=2, targets='vision,fusion', base=models[kind])
        tune(network, rows_of(processor), 3)
        again = build_pretrained(network.shape.to_dict(), network.adapter)
        again.load_state_dict({k: t for k, t in network.state_dict().items() if '.lora_' in k}, strict=False)
        whole = build_pretrained(network.shape.to_dict())
        whole.load_state_dict(merge_peft(network).state_dict())
        batch = all_of(rows_of(processor))
        with torch.no_grad(): scores = [n(batch.tokens, document=batch.document, one_document=True, **batch.extras) for n in (network, again, whole)]
        assert torch.equal(scores[0], scores[1])
        assert_close(scores[0], scores[2], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_opened_says_why(models, tmp_path):
    with pytest.raises(ConfigError, match='no processor'): open_processor(tmp_path)
    with pytest.raises(ConfigError, match='kind image-text'):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path/'text')
        open_pretrained(tmp_path/'text', kind='image-text')
    import shutil
    shutil.copytree(models['llava'], tmp_path/'bare')
    (tmp_path/'bare'/'chat_template.jinja').unlink()
    with pytest.raises(ConfigError, match='no chat template'): open_processor(tmp_path/'bare')


def test_what_the_loss_cannot_reach_is_frozen(models):
    "Then the trainer's look at the gradients finds nothing amiss, whole towers or adapters."
    for kind in KINDS:
        for targets in (None, 'all-linear', 'vision'):
            network, processor = opened(models, kind)
            rows, said = rows_of(processor), []
            if targets: add_peft(network, r=2, targets=targets)
            frozen = freeze_unused(network, all_of(rows), said.append)
            assert [n.rpartition('.')[0] for n in frozen] == ['model.model.vision_tower.post_layernorm']*2*(kind == 'llava' and not targets) and len(said) == bool(frozen)
            assert all(p.grad is None for p in network.parameters())
            fit(network, hf, Loader(rows, 3, seed=0, workers=0), build_optimizer(network, Optim(name='adamw', lr=1e-3)), total_steps=2, save_every=10**6, check_groups=True)
