"Fine-tuning from end to end: the commands, kills and resumes, models of Hugging Face, old YAML files, the user's own data, pictures."
import json, os, signal, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from torch.testing import assert_close
from conftest import Running
from llmlab import tiny
from llmlab.config import load_config
from llmlab.data.instructions import bundled_rows
from llmlab.data.tokenizer import train_tokenizer
from llmlab.files import CheckpointError, ConfigError, DataError, read_json, read_jsonl
from llmlab.finetune.sft import find_base, settle_base
from llmlab.recipes import evaluate, finetune, open_trained, prepare, pretrain, resume_settings
from llmlab.trainer.loop import Limit
from llmlab.trainer.tracking import Stopped

quiet = dict(screen='none', say=lambda line: None)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A small network of each family, and a tiny Llama with a tokenizer, in a folder to work in."
    folder = tmp_path_factory.mktemp('tuned')
    before = Path.cwd()
    os.chdir(folder)
    for family in ('ar', 'diffusion', 'sdd'): pretrain(tiny.config(f'run.name={family}', f'model.architecture={family}', 'packing.seq_len=128', 'trainer.max_steps=20', 'trainer.eval_interval=20', 'trainer.sample_tokens=0'), **quiet)
    llama(folder/'llama')
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def there(room, monkeypatch): monkeypatch.chdir(room)


def llama(folder):
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    hf.train_from_iterator((r.prompt+r.response for r in bundled_rows()), trainers.BpeTrainer(vocab_size=512, special_tokens=['<pad>', '<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, pad_token='<pad>', bos_token='<s>', eos_token='</s>')
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder); fast.save_pretrained(folder)
    return folder


def settings(init, *more):
    return load_config(None, [f'finetune.init={init}', 'tracking.wandb=off', 'tracking.tensorboard=false', 'packing.seq_len=128', 'run.precision=fp32', 'run.threads=1', 'trainer.batch_size=4', 'trainer.eval_interval=20',
                              'trainer.save_interval=10', 'trainer.log_interval=5', 'trainer.sample_tokens=8', 'optim.lr=3e-3', 'optim.warmup_steps=5', *more], under='sft')


def test_tables_may_learn_beside_the_adapters(room):
    r = finetune(settings('llama', 'run.name=tables', 'trainer.max_steps=24', 'finetune.peft.method=lora', 'finetune.peft.train=[embed_tokens,lm_head]', 'optim.lr=1e-2'), **quiet)
    held = load_file(sorted((r.folder/'checkpoints').glob('step-*'))[-1]/'model.safetensors')
    assert {'lm_head', 'embed_tokens'} <= {k.split('.')[-2] for k in held if 'lora_' not in k}
    assert_close(evaluate('tables', metrics=['perplexity'])['val/loss'], r.metrics['val/loss'], rtol=1e-5, atol=1e-5)
    assert r.metrics['val/loss'] < 5.5 # the adapters alone stay above 6


@pytest.mark.parametrize('method, init', [(m, i) for m in ('full', 'lora') for i in ('ar', 'diffusion', 'sdd', 'llama') if (m, i) != ('lora', 'sdd')]+[pytest.param('lora', 'sdd', marks=pytest.mark.proof)])
def test_every_family_learns_answers(method, init, room):
    r = finetune(settings(init, f'run.name={init}-{method}', 'trainer.max_steps=24', f'finetune.peft.method={method}', 'finetune.peft.r=8', *['optim.lr=2e-2']*(method == 'lora')), **quiet)
    curve = [m['train/loss'] for m in read_jsonl(r.folder/'metrics.jsonl') if 'train/loss' in m]
    assert curve[-1] < curve[0]-(.05 if (init, method) == ('llama', 'lora') else .5) and r.samples # (adapters cannot do much for a head of noise)
    again = evaluate(r.folder.name, metrics=['perplexity'])
    assert_close(again['val/loss'], r.metrics['val/loss'], rtol=1e-5, atol=1e-5)
    checkpoint = sorted((r.folder/'checkpoints').glob('step-*'))[-1]
    meta = read_json(checkpoint/'meta.json')
    assert meta['template']['name'] == 'alpaca' and meta['train_config']['finetune']['init'] == str(room/'llama' if init == 'llama' else r.folder.absolute()/'base')
    if method == 'lora': assert all('lora_' in k or k.startswith('extras.') for k in load_file(checkpoint/'model.safetensors'))


def start(folder, *words): return Running('llmlab_finetune', *words, cwd=folder)


@pytest.mark.parametrize('init, method', [('ar', 'full'), ('ar', 'lora'), pytest.param('llama', 'lora', marks=pytest.mark.proof), pytest.param('diffusion', 'full', marks=pytest.mark.proof), pytest.param('llama', 'full', marks=pytest.mark.proof)])
def test_killed_in_the_middle_of_an_epoch_it_resumes_to_the_same_bits(init, method, room):
    words = ['finetune.init='+init, f'finetune.peft.method={method}', 'finetune.peft.dropout=0.1' if (init, method) == ('ar', 'lora') else 'finetune.peft.r=4', 'tracking.wandb=off', 'packing.seq_len=128', 'run.precision=fp32', 'trainer.batch_size=4',
             'trainer.max_steps=50', 'trainer.save_interval=7', 'trainer.log_interval=1', 'trainer.eval_interval=25', 'trainer.sample_tokens=0', 'optim.warmup_steps=5']
    name = f'{init}-{method}'
    p = start(room, *words, f'run.name=whole-{name}')
    assert p.wait(timeout=300) == 0, p.err
    log = room/'runs'/f'cut-{name}'/'metrics.jsonl'
    p = start(room, *words, f'run.name=cut-{name}')
    for lines in (12, 31): # never where a checkpoint is
        while p.poll() is None and not (log.exists() and len(read_jsonl(log)) >= lines): time.sleep(.02)
        p.send_signal(signal.SIGKILL); p.wait()
        p = start(room, '--resume', f'cut-{name}')
    assert p.wait(timeout=300) == 0, p.err
    unlike = {'train/tokens_per_sec', 'train/memory_gb', 'train/mfu', 'train/data_wait', 'time', 'seconds'}
    def outcome(run):
        last = sorted((room/'runs'/run/'checkpoints').glob('step-*'))[-1]
        return [{k: v for k, v in r.items() if k not in unlike} for r in read_jsonl(room/'runs'/run/'metrics.jsonl')], load_file(last/'model.safetensors')
    (a, weights), (b, others) = outcome(f'whole-{name}'), outcome(f'cut-{name}')
    assert a == b and weights.keys() == others.keys()
    for k in weights: assert_close(weights[k], others[k], rtol=0, atol=0)


def test_the_base_stays_with_the_run(room, monkeypatch):
    "The other run goes on and throws its old checkpoint away, or the folder of all runs moves: adapters still have what they lie on."
    pretrain(tiny.config('run.name=mother', 'packing.seq_len=128', 'trainer.max_steps=10', 'trainer.eval_interval=10', 'trainer.sample_tokens=0'), **quiet)
    short = ['trainer.max_steps=6', 'trainer.save_interval=3']
    with pytest.raises(Stopped): finetune(settings('mother', 'run.name=child', 'finetune.peft.method=lora', *short), limit=Limit(steps=3), **quiet)
    whole = finetune(settings('mother', 'run.name=whole-child', *short), **quiet)
    (room/'runs'/'mother').rename(room/'lost')
    try:
        cfg, folder = resume_settings('child')
        before = finetune(cfg, resume=folder, **quiet).metrics['val/loss']
        for run in ('child', 'whole-child'): assert evaluate(run, metrics=['perplexity'])['val/loss'] > 0
        (room/'elsewhere').mkdir()
        (room/'runs'/'child').rename(room/'elsewhere'/'child')
        assert_close(evaluate(str(room/'elsewhere'/'child'), metrics=['perplexity'])['val/loss'], before, rtol=1e-5, atol=1e-5)
    finally: (room/'lost').rename(room/'runs'/'mother')


def test_what_was_learned_is_never_asked(room):
    rows = [{'instruction': f'Say the number {i}.', 'output': f'It is {i}.'} for i in range(40)]
    (room/'numbers.json').write_text(json.dumps(rows))
    finetune(settings('ar', f'data.path={room}/numbers.json', 'finetune.split=tail', 'run.name=numbers', 'trainer.max_steps=3'), **quiet)
    assert evaluate('numbers', metrics=['perplexity'])['val/loss'] > 0
    (room/'numbers.json').write_text(json.dumps(rows[::-1])) # now others are the last
    from llmlab.files import CacheError
    from llmlab.tuned import follow
    for ask in (lambda: evaluate('numbers', metrics=['perplexity']), lambda: follow('numbers', max_new_tokens=2)):
        with pytest.raises(CacheError, match='fingerprint'): ask()


def test_a_short_run_has_a_short_warm_up_and_can_be_made_longer(room):
    said = []
    finetune(settings('ar', 'run.name=shorter', 'trainer.max_steps=20', 'optim.warmup_steps=100'), screen='none', say=said.append)
    assert any('2 steps instead of 100' in line for line in said)
    assert read_json(room/'runs'/'shorter'/'status.json')['step'] == 20
    cfg, folder = resume_settings('shorter', ['trainer.epochs=1'])
    assert (cfg.trainer.max_steps, cfg.trainer.epochs, cfg.optim.warmup_steps) == (None, 1, 2)


def test_a_resume_by_train_goes_on_too(llmlab, room):
    done = llmlab('llmlab_finetune', 'finetune.init=ar', 'run.name=two-doors', 'tracking.wandb=off', 'packing.seq_len=128', 'trainer.max_steps=8', '--stop-after', '4', cwd=room)
    assert done.returncode == 75 and 'llmlab_finetune --resume' in done.stderr
    done = llmlab('llmlab_train', '--resume', 'two-doors', cwd=room)
    assert done.returncode == 0, done.stderr
    assert read_json(room/'runs'/'two-doors'/'status.json')['step'] == 8


def test_prepare_makes_the_same_folder(llmlab, room):
    words = ['finetune.init=ar', 'packing.seq_len=120', 'data.validation_fraction=0.25']
    done = llmlab('llmlab_prepare', '--config', 'sft', *words, cwd=room)
    assert done.returncode == 0 and 'rows of 120' in done.stdout, done.stderr
    folder, = (f for f in (room/'data_instruct').iterdir() if '-120-' in f.name)
    assert {'train_tokens.pt', 'train_masks.pt', 'val_tokens.pt', 'val_masks.pt', 'tokenizer.json', 'config.json'} <= {p.name for p in folder.iterdir()}
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    prepare(load_config('sft', words), say=lambda line: None)
    assert times == {p: p.stat().st_mtime_ns for p in folder.iterdir()}


THEIRS = {
    'item': 'class D(list):\n    def __getitem__(self, i): raise KeyError("answer")\ndef get_custom_dataset(dataset_config, processor, split): return D([1, 2])\n',
    'labels': 'def get_custom_dataset(dataset_config, processor, split): return [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5]}]\n',
    'kinds': 'def get_custom_dataset(dataset_config, processor, split): return [{"instruction": "a", "output": "b"}]*4 if split == "train" else ["x"]\n',
    'collator': 'def get_custom_dataset(dataset_config, processor, split): return [1, 2, 3]\ndef get_data_collator(processor):\n    def collate(some): raise ValueError("on purpose")\n    return collate\n',
}

@pytest.mark.parametrize('kind, text', [('item', "KeyError: 'answer'"), ('labels', 'example 1 of the train split has no labels'), ('kinds', 'example 0 of the validation split is a str'), ('collator', 'on purpose')])
def test_mistakes_in_the_users_file_are_told_as_theirs(kind, text, room):
    (room/f'u_{kind}.py').write_text(THEIRS[kind])
    with pytest.raises(DataError) as e: finetune(settings('llama', 'data.name=file', f'data.file={room}/u_{kind}.py', 'run.name=never'), **quiet)
    assert text in str(e.value) and f'u_{kind}.py' in str(e.value) and not (room/'runs'/'never').exists()


@pytest.mark.parametrize('more, text', [
    (['finetune.init=nothing-here'], 'there is no run'),
    (['data.path=none.json'], 'none.json'),
    (['packing.seq_len=8'], 'would pass'),
    (['model.num_layers=7'], 'another model than this config'),
    (['finetune.peft.method=dora'], 'for Hugging Face models'),
    (['finetune.peft.method=lora', 'finetune.peft.targets=nothing'], 'nothing'),
    (['data.name=python'], 'data.name=instructions'),
    (['finetune.peft.method=lora', 'finetune.peft.train=[nothing]'], 'no such parameter'),
    (['tokenizer.kind=byte'], 'brings its own tokenizer'),
    (['trainer.patience=1', 'data.validation_fraction=0'], 'nothing is held out'),
])
def test_what_cannot_be_is_said_and_nothing_is_left(more, text, llmlab, room):
    before = set((room/'runs').iterdir())
    done = llmlab('llmlab_finetune', 'finetune.init=ar', 'tracking.wandb=off', *more, cwd=room)
    assert done.returncode == 1 and text in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert set((room/'runs').iterdir()) == before


def test_early_stopping_ends_the_run_well(room):
    r = finetune(settings('ar', 'run.name=early', 'trainer.patience=1', 'trainer.eval_interval=2', 'optim.lr=1.0', 'optim.warmup_steps=1', 'trainer.epochs=5'), **quiet)
    assert r.state.global_step < r.steps and read_json(r.folder/'status.json')['state'] == 'done'
    cfg, folder = resume_settings('early')
    assert finetune(cfg, resume=folder, **quiet).state.global_step == r.state.global_step


def test_adapters_on_adapters_and_a_lost_base(room):
    finetune(settings('ar', 'run.name=first', 'finetune.peft.method=lora', 'trainer.max_steps=6'), **quiet)
    second = finetune(settings('first', 'run.name=second', 'finetune.peft.method=lora', 'trainer.max_steps=6'), **quiet)
    assert open_trained('second')[0].network.shape.seq_len == 128
    base = Path(read_json(sorted((second.folder/'checkpoints').glob('step-*'))[-1]/'meta.json')['adapter']['base']['path'])
    hidden = base.rename(base.with_name('gone'))
    try:
        with pytest.raises(CheckpointError, match='base'): open_trained('second')
    finally: hidden.rename(base)


OLD = '''
dataset: {name: custom_dataset, file: synthetic_dataset.py, test_split: test, split_ratio: 0.8}
model: {name: %s, peft: true, peft_method: lora, checkpoint_dir: ./checkpoints}
training: {batch_size: 2, lr: 1e-2, epochs_per_job: 10, total_jobs: 6, gradient_accumulation: 1}
slurm: {partition: gpucluster, time: 4:00:00, nodes: 1, gpu_id: 0}
'''
SYNTHETIC = '''
import torch
from PIL import Image
COLOURS = {'red': (220, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 220)}

def get_custom_dataset(dataset_config, processor, split, split_ratio=0.8):
    assert dataset_config.test_split == 'test' and split_ratio == 0.8
    rows = [{'image': Image.new('RGB', (28, 28), rgb), 'colour': name} for name, rgb in COLOURS.items()]*2
    return {'train': rows[:int(len(rows)*split_ratio)], 'test': rows[int(len(rows)*split_ratio):]}[split]

class Collator:
    def __init__(self, processor): self.processor, processor.tokenizer.padding_side = processor, 'right'
    def __call__(self, samples):
        talks = [[{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'what colour is the square?'}]}, {'role': 'assistant', 'content': [{'type': 'text', 'text': s['colour']}]}] for s in samples]
        batch = self.processor(text=[self.processor.apply_chat_template(t) for t in talks], images=[[s['image']] for s in samples], padding=True, add_special_tokens=False, return_tensors='pt')
        labels = torch.full_like(batch['input_ids'], -100)
        for i, s in enumerate(samples):
            prompt = self.processor.apply_chat_template(talks[i][:1], add_generation_prompt=True)
            n = self.processor(text=[prompt], images=[[s['image']]], add_special_tokens=False, return_tensors='pt')['input_ids'].shape[1]
            labels[i, n:] = torch.where(batch['attention_mask'][i, n:] > 0, batch['input_ids'][i, n:], -100)
        return {**batch, 'labels': labels}

def get_data_collator(processor): return Collator(processor)
'''


def test_the_yaml_of_the_earlier_pipeline_runs_unchanged(tmp_path, monkeypatch):
    from llmlab.finetune.vision import answers, colour_records, open_processor, read_image_examples, tiny_vision
    monkeypatch.chdir(tmp_path)
    tiny_vision(tmp_path/'vision', 'mllama')
    (tmp_path/'old.yaml').write_text(OLD % 'vision')
    (tmp_path/'synthetic_dataset.py').write_text(SYNTHETIC)
    said = []
    cfg = load_config('old.yaml', ['run.device=cpu', 'tracking.wandb=off', 'run.precision=fp32', 'run.name=v', 'optim.warmup_steps=5', 'packing.seq_len=96', 'finetune.peft.r=8'], say=said.append, under='sft')
    assert (cfg.data.name, cfg.data.validation_fraction, cfg.finetune.peft.method, cfg.run.folder, cfg.chain.total_jobs, cfg.optim.lr) == ('file', .2, 'lora', './checkpoints', 6, .01)
    assert sum(' is now ' in line for line in said) >= 10
    r = finetune(cfg, **quiet)
    assert r.steps == 60*2 and (r.folder/'synthetic_dataset.py').read_text() == SYNTHETIC # six jobs of ten epochs are one run; what was run lies beside it
    model, _ = open_trained(str(r.folder))
    assert answers(model.network, open_processor('vision'), read_image_examples(colour_records()), 4) == ['red', 'green', 'blue']


def test_the_users_file_fails_as_theirs(llmlab, room):
    (room/'mine.py').write_text('def get_custom_dataset(dataset_config, processor, split):\n    return undefined_name[split]\n')
    done = llmlab('llmlab_finetune', 'finetune.init=ar', 'data.file=mine.py', 'tracking.wandb=off', cwd=room)
    assert done.returncode == 1 and 'mine.py' in done.stderr and 'undefined_name' in done.stderr and 'line 2' in done.stderr, done.stderr


def test_instructions_are_evaluated_and_talked_with(llmlab, room):
    done = llmlab('llmlab_finetune', 'finetune.init=ar', 'run.name=asked', 'tracking.wandb=off', 'packing.seq_len=128', 'trainer.max_steps=20', 'optim.lr=3e-3', 'optim.warmup_steps=2', cwd=room)
    assert done.returncode == 0, done.stderr
    done = llmlab('llmlab_eval', 'asked', '--metrics', 'perplexity,instruct', '--samples', '12', '--max-new-tokens', '12', cwd=room)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['instruct/nll'] < found['base']['instruct/nll'] and found['instruct/rank_chance'] == 1/8 and found['val/loss'] > 0
    folder = Path(found['folder'])
    assert len(read_jsonl(room/folder/'generations.jsonl')) == 12 and read_json(room/folder/'eval.json')['instruct/nll'] == found['instruct/nll']
    done = llmlab('llmlab_generate', 'run=asked' if False else '--run', 'asked', '--chat', '--prompt', 'Say red.', '--prompt', 'Again.', '--max-new-tokens', '6', cwd=room)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr
    done = llmlab('llmlab_eval', 'ar', '--metrics', 'instruct', cwd=room)
    assert done.returncode == 1 and 'was not fine-tuned' in done.stderr
