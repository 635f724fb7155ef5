"The commands: light to start, clear when something is wrong, right in their exit codes."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import command, root

doors = ['train', 'prepare', 'finetune', 'evaluate', 'generate', 'export', 'runs', 'doctor', 'slurm', 'bench']
heavy = ['torch', 'transformers', 'datasets', 'wandb', 'matplotlib', 'tiktoken', 'pyarrow', 'tensorboard']


def python(code:str)->str:
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('door', doors)
def test_help_is_light(door):
    out = python(f"""
import sys
from llmlab.cli import {door} as door
try: door(['--help'])
except SystemExit as e: assert e.code == 0
print('LOADED', [m for m in {heavy + ['pydantic', 'numpy']} if m in sys.modules])""")
    assert 'usage: llmlab_' in out and 'LOADED []' in out, out


def test_recipes_import_no_heavy_library():
    assert python("import sys, llmlab.recipes; print([m for m in ('transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules])").strip() == '[]'


def test_every_door_is_a_console_script():
    import configparser
    ini = configparser.ConfigParser(delimiters=['=']); ini.read(root/'settings.ini')
    scripts = dict(s.split('=') for s in ini['DEFAULT']['console_scripts'].split())
    assert sorted(s.split(':')[1] for s in scripts.values()) == sorted(doors)


def test_usage_error_is_2(llmlab):
    done = llmlab('llmlab_train', '--no-such-option')
    assert done.returncode == 2 and 'usage' in done.stderr


def test_five_mistakes_at_once(llmlab, tmp_path):
    (tmp_path/'five.yaml').write_text('trainer:\n  bach_size: 8\n  max_steps: ten\noptim: {lr: -1e-3}\nmodel:\n  architecture: arr\ntrainign: {epochs: 2}\n')
    done = llmlab('llmlab_train', '--config', 'five.yaml')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    for part in ('5 problems', 'five.yaml, line 2', 'line 3', 'line 4', 'line 6', 'line 7', 'did you mean trainer.batch_size?', 'did you mean trainer?'): assert part in done.stderr, done.stderr


def test_missing_data(llmlab):
    done = llmlab('llmlab_train', '--config', 'tiny_test', 'data.name=files', 'data.path=nowhere.txt')
    assert done.returncode == 1 and 'nowhere.txt' in done.stderr and 'Traceback' not in done.stderr


def test_verbose_shows_the_traceback(llmlab):
    done = llmlab('llmlab_train', '--config', 'tiny_test', 'data.name=files', 'data.path=nowhere.txt', '--verbose')
    assert done.returncode == 1 and 'Traceback' in done.stderr


@pytest.fixture(scope='module')
def trained(tmp_path_factory)->Path:
    "A folder with a finished tiny run."
    folder = tmp_path_factory.mktemp('trained')
    done = subprocess.run(command('train', '--config', 'tiny_test', 'run.name=r'), cwd=folder, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    for part in ('validation loss', 'a bigram model has', 'plots', 'sample'): assert part in done.stdout, done.stdout
    return folder


def test_the_run_folder_explains_itself(trained):
    run = trained/'runs'/'r'
    for name in ('config.yaml', 'environment.json', 'metrics.jsonl', 'metrics.csv', 'status.json', 'samples', 'checkpoints', 'plots'): assert (run/name).exists(), name
    assert json.loads((run/'status.json').read_text())['state'] == 'done'


def test_evaluate_and_generate(llmlab, trained, tmp_path):
    done = llmlab('llmlab_eval', '--run', 'r', '--tokens', '8', '--out', 'e.json', cwd=trained)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((trained/'e.json').read_text())
    assert json.loads(done.stdout) == numbers and 0 < numbers['val/loss'] < 6 and not numbers['val/is_bound']
    again = [llmlab('llmlab_generate', '--prompt', 'The ', '--max-new-tokens', '12', '--seed', '3', cwd=trained) for _ in range(2)]
    assert again[0].returncode == 0 and again[0].stdout == again[1].stdout and again[0].stdout.startswith('The ')


def test_text_file_is_scored(llmlab, trained):
    (trained/'t.txt').write_text('The cat saw a red ball.')
    done = llmlab('llmlab_eval', '--run', 'r', '--text', 't.txt', '--tokens', '0', cwd=trained)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)['val/bits_per_byte'] < 10


def test_a_checkpoint_cut_in_half(llmlab, trained, tmp_path):
    shutil.copytree(trained, tmp_path/'t')
    last = sorted((tmp_path/'t'/'runs'/'r'/'checkpoints').glob('step-*'))[-1]
    weights = last/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:weights.stat().st_size//2])
    done = llmlab('llmlab_generate', '--run', str(last), cwd=tmp_path/'t')
    assert done.returncode == 1 and 'model.safetensors' in done.stderr and 'Traceback' not in done.stderr


def test_a_truncated_chunk(llmlab, trained, tmp_path):
    shutil.copytree(trained/'cache', tmp_path/'cache')
    chunk = next(p for p in sorted((tmp_path/'cache').rglob('packed_chunk_*.pt')))
    chunk.write_bytes(chunk.read_bytes()[:-40])
    done = llmlab('llmlab_train', '--config', 'tiny_test', cwd=tmp_path)
    assert done.returncode == 1 and chunk.name in done.stderr and 'Traceback' not in done.stderr
    assert llmlab('llmlab_prepare', '--config', 'tiny_test', '--force-rebuild', cwd=tmp_path).returncode == 0
    assert llmlab('llmlab_prepare', '--config', 'tiny_test', '--verify', cwd=tmp_path).returncode == 0


def test_runs(llmlab, trained):
    assert 'r' in llmlab('llmlab_runs', 'list', cwd=trained).stdout
    for words in (['show', 'r'], ['report', 'r'], ['export', 'r']):
        done = llmlab('llmlab_runs', *words, cwd=trained)
        assert done.returncode == 0, (words, done.stderr)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 3 MB."
    disk = tmp_path/'disk'
    disk.mkdir()
    if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('mounting a small tmpfs needs root')
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)


def test_a_full_disk(llmlab, trained, small_disk):
    shutil.copytree(trained/'cache', small_disk.parent/'cache')
    words = ['--config', 'tiny_test', f'packing.folder={small_disk.parent}/cache', 'run.name=full', 'trainer.save_interval=5', 'trainer.keep_last=50', 'trainer.max_steps=60']
    done = llmlab('llmlab_train', *words, cwd=small_disk)
    assert done.returncode == 1 and 'the disk is full' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    from llmlab.trainer.checkpoint import check_files, latest
    newest = latest(small_disk/'runs'/'full'/'checkpoints', say=lambda line: None)
    assert newest is not None and not check_files(newest)


def test_several_checkpoints_side_by_side(llmlab, trained):
    done = llmlab('llmlab_eval', 'r', '--num-samples', '6', '--max-new-tokens', '12', '--temperatures', '0.7,1', '--judge', 'r', '--tokens', '0', '--output', 'w.json', '--plot', 'f.png', cwd=trained)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers == json.loads((trained/'w.json').read_text()) and numbers['judge_is_itself'] and len(numbers['generation']) == 3 and (trained/'f.png').read_bytes()[:4] == b'\x89PNG'
    done = llmlab('llmlab_eval', 'w.json', '--run', 'r', '--metrics', 'perplexity', '--output', 'w.md', cwd=trained)
    assert done.returncode == 0 and 'exact or bound' in done.stdout and 'real text' in done.stdout, done.stderr
    assert (trained/'w.md').read_text().startswith('|  | r')


@pytest.mark.parametrize('words, says', [(['--metrics', 'speeed'], 'Choose from perplexity, accuracy, exact, generation, speed'), (['--metrics', 'speed', '--judge', 'r'], 'Add generation'),
    (['--sampler', 'steps'], 'steps=16,order=prob'), (['--sampler', 'steps=8'], 'one token after the other'), (['--temperatures', 'hot'], '0.6,0.8,1.0'), (['--num-samples', '0'], '1 or more'), (['--draws', '0'], '1 or more'), (['--judge', 'nobody'], 'nobody')])
def test_senseless_evaluations(llmlab, trained, words, says):
    done = llmlab('llmlab_eval', 'r', '--tokens', '0', *words, cwd=trained)
    assert done.returncode == 1 and says in done.stderr and 'Traceback' not in done.stderr, done.stderr

def test_check_says_what_a_step_needs_and_prepares_nothing(llmlab, tmp_path):
    done = llmlab('llmlab_train', '--config', 'small', 'data.name=fineweb-edu', '--check')
    assert done.returncode == 0, done.stderr
    for part in ('weights', 'optimizer states', 'activations', 'peak', 'The largest trainer.batch_size that fits', '24 GB: fits'): assert part in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())
    done = llmlab('llmlab_train', '--resume', '--check')
    assert done.returncode == 1 and 'leave --resume out' in done.stderr
