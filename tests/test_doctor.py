"Every finding, with the facts of machines that we do not have."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, strategies as st
from llmlab import tiny
from llmlab.config import Config, load_config
from llmlab.files import ConfigError, write_json
from llmlab.launch import doctor
from llmlab.launch.doctor import (Finding, ask, check_base, check_cache, check_checkpoint, check_compiler, check_cores, check_disk, check_flash, check_gpus, check_hub, check_memory, check_packages,
    check_precision, check_python, check_run, check_slurm, check_text, check_tokenizer, check_torch, check_tracking, check_torchvision, check_transformers, check_writable, examine, exit_code, find_cache, free_memory,
    import_errors, mend, nvidia_driver, plan_of, rows_to_make, standing, tensor_shapes, usable_cores, wants_hub)

GB = 1e9
cuda = dict(version='2.13.0', built_for='CUDA 13.0', gpus=[dict(name='H100', bytes=80*GB, free=79*GB)], device='cuda', bf16=True, threads=8)
cpu = cuda | dict(version='2.13.0+cpu', built_for='CPU', gpus=[], device='cpu')


@pytest.mark.parametrize('finding,state', [
    (check_python((3, 11, 0)), 'ok'), (check_python((3, 14, 2)), 'ok'), (check_python((3, 9, 18)), 'problem'), (check_python((2, 7)), 'problem'),
    (check_torch(cuda, None, 'H100, driver 580.1'), 'ok'), (check_torch(cpu, None, None), 'ok'),
    (check_torch(cpu, None, 'H100, driver 580.1'), 'problem'), (check_torch(cpu, None, 'H100, driver 580.1', 'cpu'), 'ok'),
    (check_torch(cuda | dict(gpus=[]), None, 'H100, driver 470.1'), 'problem'), (check_torch(cuda | dict(version='2.10.1'), None, None), 'problem'),
    (check_torch(cuda | dict(version='3.0.0a0+git1'), None, None), 'ok'), (check_torch(None, 'it crashed (SIGILL)', None), 'problem'),
    (check_gpus([]), 'ok'), (check_gpus(cuda['gpus']), 'ok'), (check_gpus(cuda['gpus'], 'cuda'), 'ok'), (check_gpus(cuda['gpus'], 'cuda:1'), 'problem'),
    (check_gpus([], 'cuda'), 'problem'), (check_gpus([], 'mps'), 'problem'), (check_gpus([], 'mps', 'mps'), 'ok'), (check_gpus([], 'auto', 'mps'), 'ok'),
    (check_gpus([dict(name='A', bytes=80*GB, free=3*GB)]*2), 'warning'),
    (check_precision(True, 'cpu', 'bf16'), 'ok'), (check_precision(False, 'cpu', 'bf16'), 'warning'), (check_precision(False, 'mps', 'bf16'), 'ok'), (check_precision(False, 'cuda'), 'ok'),
    (check_flash(True, True, None), 'ok'), (check_flash(True, False, None), 'ok'), (check_flash(True, True, 'undefined symbol'), 'warning'),
    (check_flash(True, True, 'undefined symbol', 'flash'), 'problem'), (check_flash(False, False, None, 'flash'), 'problem'),
    (check_cores(8, 8, 0.), 'ok'), (check_cores(8, 8, 7.9), 'warning'), (check_cores(2, 64, 0.), 'warning'), (check_cores(64, 1, 0.), 'warning'), (check_cores(1, 1, .2), 'ok'),
    (check_memory(16*GB), 'ok'), (check_memory(GB), 'warning'), (check_memory(16*GB, 14*GB), 'warning'), (check_memory(16*GB, 17*GB), 'problem'),
    (check_memory(16*GB, 17*GB, on_cpu=False), 'ok'), (check_memory(float('inf'), 1.), 'ok'),
    (check_disk('runs', Path('r'), 9*GB), 'ok'), (check_disk('runs', Path('r'), GB), 'warning'), (check_disk('runs', Path('r'), 9*GB, 8*GB), 'warning'),
    (check_disk('runs', Path('r'), 9*GB, 10*GB), 'problem'),
    (check_transformers({}), 'ok'), (check_transformers({'transformers': 'x'}), 'warning'), (check_transformers({'torchvision': 'nms'}), 'ok'), (check_transformers({'transformers': 'x', 'torchvision': 'nms'}), 'warning'),
    (check_torchvision(None, '2.13.0'), 'ok'), (check_torchvision('0.28.0', '2.13.0+cu130', ['torch==2.13.0']), 'ok'), (check_torchvision('0.21.0', '2.13.0', ['torch==2.6.0']), 'warning'), (check_torchvision('0.28.0', None, ['torch==2.13.0'], 'x'), 'warning'),
    (check_hub({}), 'ok'), (check_hub({'HF_HUB_OFFLINE': '1'}), 'ok'), (check_hub({'HF_HUB_OFFLINE': '1'}, 'data'), 'warning'), (check_hub({}, 'data', 'x'), 'problem'), (check_hub({}, 'data'), 'ok'),
    (check_compiler('/usr/bin/g++', True), 'ok'), (check_compiler(None, True), 'ok'), (check_compiler(None, True, wanted=True), 'problem'), (check_compiler('g++', False, wanted=True), 'problem'),
    (check_compiler(None, False, triton=True, cuda=True), 'ok'), (check_compiler('g++', True, triton=False, cuda=True), 'warning'), (check_compiler('g++', True, cuda=True, wanted=True), 'problem'),
    (check_slurm({'sbatch': None, 'squeue': None}), 'ok'), (check_slurm({'sbatch': 's', 'squeue': 'q'}), 'ok'), (check_slurm({'sbatch': None, 'squeue': 'q'}), 'warning'), (check_slurm({'sbatch': None}, '42'), 'ok'),
], ids=str)
def test_finding(finding, state):
    assert finding.state == state
    assert state == 'ok' or finding.advice
    assert str(finding).startswith(f'{state:8} {finding.about}')


@pytest.mark.parametrize('have,state,words', [
    ({'numpy': '2.4.6', 'fastcore': '1.14.5'}, 'ok', '2 required'),
    ({'numpy': '1.26.4', 'fastcore': '2.2.0'}, 'problem', 'numpy 1.26.4 (not >=2), fastcore 2.2.0'),
    ({'numpy': '2.4.6'}, 'problem', 'missing: fastcore'),
    ({'numpy': '2.5.0rc1', 'fastcore': '1.13'}, 'ok', ''),
])
def test_packages(have, state, words):
    finding = check_packages(['numpy>=2', 'fastcore<2,>=1.12', "flash-attn>=2; extra == 'gpu'", "tomli; python_version < '3'"], have.get)
    assert finding.state == state and words in finding.seen


@pytest.mark.parametrize('wish,mode,key,errors,states', [
    ('off', 'disabled', False, {}, ['ok', 'ok']), ('auto', 'offline', False, {}, ['ok', 'ok']), ('auto', 'online', True, {}, ['ok', 'ok']),
    ('online', 'online', False, {}, ['ok', 'warning']), ('offline', 'offline', True, {'wandb': 'x'}, ['ok', 'warning']), ('off', 'disabled', False, {'wandb': 'x'}, ['ok', 'ok']),
    ('off', 'disabled', False, {'torch.utils.tensorboard': 'x'}, ['warning', 'ok']),
])
def test_tracking(wish, mode, key, errors, states): assert [f.state for f in check_tracking(wish, mode, key, errors)] == states


def test_tensorboard_that_is_off_may_be_missing():
    assert check_tracking('off', 'disabled', False, {'torch.utils.tensorboard': 'x'}, tensorboard=False)[0].state == 'ok'


def test_text(tmp_path):
    (tmp_path/'a.txt').touch()
    def state(**data): return check_text(Config(data=data)).state
    assert state() == state(name='fineweb-edu') == state(name='files', path=str(tmp_path/'a.txt')) == 'ok'
    assert state(name='files', path=str(tmp_path/'b.txt')) == state(name='files') == state(name='file', file=str(tmp_path/'b.py')) == 'problem'


def test_writable(tmp_path):
    assert check_writable('runs', tmp_path/'a'/'b').state == 'ok'
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'f').touch()
    assert check_writable('runs', tmp_path/'f'/'runs').state == 'problem'
    assert standing(tmp_path/'x'/'y') == tmp_path


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*a, **k): raise OSError(30, 'Read-only file system')
    monkeypatch.setattr(doctor.tempfile, 'TemporaryFile', refuse)
    finding = check_writable('runs', tmp_path)
    assert finding.state == 'problem' and 'Read-only file system' in finding.seen


def test_ask_survives_what_it_asks():
    assert 'no answer' in ask('signal.pause()', patience=1.)[1]
    assert 'ValueError' in ask('signal.Signals(0)')[1]


def test_a_library_that_breaks(tmp_path, monkeypatch):
    (tmp_path/'brokenlib.py').write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path/'deadlib.py').write_text('import os; os.abort()')
    (tmp_path/'goodlib.py').write_text('')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    errors = import_errors(['brokenlib', 'deadlib', 'goodlib'])
    assert errors == {'brokenlib': 'RuntimeError: operator torchvision::nms does not exist', 'deadlib': 'it crashed (SIGABRT)'}


def test_driver(tmp_path, monkeypatch):
    tool = tmp_path/'nvidia-smi'
    tool.write_text('#!/bin/sh\necho "NVIDIA H200, 580.65.06"\necho "NVIDIA H200, 580.65.06"\n')
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert nvidia_driver() == 'NVIDIA H200, driver 580.65.06'
    tool.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed"\nexit 9\n')
    assert nvidia_driver() is None
    tool.unlink()
    assert nvidia_driver() is None


def test_limits(): assert 1 <= usable_cores() <= os.cpu_count() and free_memory() > 0


@pytest.fixture
def quick(monkeypatch):
    "Answers without the processes that import real libraries."
    facts = {'torch': cpu, 'error': None, 'errors': {}}
    monkeypatch.setattr(doctor, 'ask', lambda call: (facts['torch'], facts['error']))
    monkeypatch.setattr(doctor, 'import_errors', lambda names: {n: e for n, e in facts['errors'].items() if n in names})
    monkeypatch.setattr(doctor, 'nvidia_driver', lambda: None)
    return facts


def of(findings, about): return next(f for f in findings if f.about == about)


def test_examine(quick, tmp_path):
    config = tiny.config(f'run.folder={tmp_path/"runs"}', f'packing.folder={tmp_path/"cache"}')
    findings = examine(config)
    assert all(isinstance(f, Finding) for f in findings) and len({f.about for f in findings}) == len(findings)
    assert of(findings, 'model').state == of(findings, 'text').state == of(findings, 'runs').state == 'ok'
    assert list(tmp_path.iterdir()) == []
    assert 'model' not in {f.about for f in examine()}


def test_examine_a_hopeless_plan(quick):
    config = tiny.config('run.device=cuda', 'model.backend=flash', 'data.name=files', 'data.path=/no/such.txt', 'model.d_model=65', 'run.threads=999')
    findings = examine(config)
    assert {f.about for f in findings if f.state == 'problem'} == {'gpus', 'flash-attn', 'text', 'model'}
    assert of(findings, 'cores').state == 'warning' and exit_code(findings) == 1


def test_examine_without_torch(quick):
    quick.update(torch=None, error="ModuleNotFoundError: No module named 'torch'")
    findings = examine(tiny.config())
    assert of(findings, 'torch').state == 'problem' and 'gpus' not in {f.about for f in findings}


def test_examine_a_model_too_large(quick, monkeypatch):
    monkeypatch.setattr(doctor, 'free_memory', lambda: 16*GB)
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda folder: type('Usage', (), dict(free=15*GB)))
    findings = examine(tiny.config('model.size=415m', 'tokenizer.vocab_size=32768', 'run.device=cpu', 'packing.seq_len=512'))
    assert of(findings, 'runs').state == 'problem' and of(findings, 'memory').state in ('ok', 'warning')
    findings = examine(tiny.config('model.size=415m', 'model.num_layers=99', 'run.device=cpu', 'packing.seq_len=512'))
    assert of(findings, 'memory').state == 'problem'


def test_light():
    code = "import sys, llmlab.launch.doctor; sys.exit(bool({'torch', 'transformers', 'datasets', 'wandb', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': str(Path(doctor.__file__).parents[2])}).returncode == 0


def checkpoint(path:Path, step:int, config:Config, **more)->Path:
    "A checkpoint with a tensor in it."
    import torch
    from llmlab.trainer.checkpoint import save_checkpoint
    state = dict(global_step=step, model_state_dict={'embed.weight': torch.zeros(100, 8), 'mlp.weight': torch.zeros(8, 16)}, model_config={'seq_len': config.packing.seq_len}, optimizer_state_dict={}, scheduler_state_dict={},
                 scaler_state_dict={}, train_config=config.to_dict(), best_val_loss=None, architecture='ar', cache_info={})
    return save_checkpoint(path/'checkpoints'/f'step-{step:08d}', state | more)


@pytest.fixture
def plan(tmp_path): return tiny.config(f'run.folder={tmp_path/"runs"}', f'packing.folder={tmp_path/"cache"}')


@pytest.fixture
def run(tmp_path, plan):
    "A run with two checkpoints."
    path = tmp_path/'runs'/'one'
    for step in (10, 20): checkpoint(path, step, plan)
    plan.save(path/'config.yaml')
    write_json(path/'status.json', {'state': 'stopped', 'step': 20})
    return path


def change(path:Path)->None:
    "Turn a bit; the length stays."
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)


def test_a_run_that_is_whole(run):
    assert check_run(run).state == 'ok' and 'newest step-00000020' in check_run(run).seen
    assert check_checkpoint('x', run/'checkpoints'/'step-00000010').state == 'ok'


@pytest.mark.parametrize('which,how,state', [('20', 'cut', 'problem'), ('20', 'change', 'problem'), ('20', 'gone', 'problem'), ('10', 'change', 'warning'), ('both', 'change', 'problem')])
def test_a_damaged_checkpoint_is_named_with_its_remedy(run, which, how, state):
    for path in (run/'checkpoints').iterdir():
        if which != 'both' and not path.name.endswith(which): continue
        file = path/'model.safetensors'
        {'cut': lambda: file.write_bytes(file.read_bytes()[:-9]), 'change': lambda: change(file), 'gone': (path/'complete.json').unlink}[how]()
    found = check_run(run)
    assert found.state == state and 'step-000000' in found.seen
    assert ('No checkpoint of it is whole' if which == 'both' else f'step-000000{which}: the run goes on from step-000000{"10" if which == "20" else "20"}') in found.advice
    if which == '20': assert check_checkpoint('x', run/'checkpoints'/'step-00000020').state == 'problem'


def test_runs_that_cannot_be_looked_at(run, tmp_path):
    write_json(run/'status.json', {'state': 'running', 'pid': os.getpid(), 'host': os.uname().nodename})
    assert 'is running' in check_run(run).seen
    (run/'config.yaml').write_text('trainer: {bach_size: 1}')
    assert check_run(run).state == 'problem'
    assert doctor._named_run('two', str(tmp_path/'runs')).state == 'problem' and 'Is it one of one?' in doctor._named_run('oen', str(tmp_path/'runs')).seen
    assert doctor._named_run('one/checkpoints/step-00000010', str(tmp_path/'runs')).state == 'problem' # a checkpoint is named by its path
    assert doctor._named_run(str(run/'checkpoints'/'step-00000010'), 'runs').about == 'checkpoint step-00000010'


def tuning(plan, init, **peft): return load_config('sft', [f'finetune.init={init}', f'run.folder={plan.run.folder}', *(f'finetune.peft.{k}={v}' for k, v in peft.items())])


def test_a_tuning_looks_at_the_model_that_it_loads(run, plan):
    needs, found = check_base(tuning(plan, run))
    assert [f.state for f in found] == ['ok', 'ok'] and needs['parameters'] == 100*8+8*16 and needs['checkpoint'] == 12*928
    assert check_base(tuning(plan, 'one', method='lora', r=4))[0]['checkpoint'] == 12*4*(8+16)
    change(run/'checkpoints'/'step-00000020'/'model.safetensors')
    assert check_base(tuning(plan, 'one'))[1][0].state == 'problem'
    assert check_base(tuning(plan, 'two'))[1][0].state == 'problem'


def test_a_tuning_of_a_hugging_face_model(run, plan, tmp_path, monkeypatch):
    folder = tmp_path/'theirs'
    folder.mkdir(); (folder/'config.json').write_text('{}')
    assert 'no .safetensors' in check_base(tuning(plan, folder))[1][0].seen
    shutil.copy(run/'checkpoints'/'step-00000020'/'model.safetensors', folder)
    assert check_base(tuning(plan, folder))[0]['memory'] == 16*928
    (folder/'model.safetensors').write_bytes(b'cut')
    assert check_base(tuning(plan, folder))[1][0].state == 'problem'
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    needs, found = check_base(tuning(plan, 'nobody/no-such-model'))
    assert needs == {} and found[0].state == 'problem' and 'not here yet' in found[0].seen
    monkeypatch.delenv('HF_HUB_OFFLINE')
    assert check_base(tuning(plan, 'nobody/no-such-model'))[1][0].state == 'ok'


def test_the_cache_that_a_run_would_use(plan, one_thread):
    from llmlab.recipes import prepare
    assert find_cache(plan) is None and 'none yet' in check_cache(plan).seen
    data = prepare(plan, say=lambda line: None)
    assert find_cache(plan) == data.train.path
    assert check_cache(plan).state == 'ok' and f'complete: {data.train.num_rows:,} rows' in check_cache(plan).seen
    assert find_cache(tiny.config(f'packing.folder={plan.packing.folder}', 'packing.seq_len=32')) is None
    (data.train.path/data.train.chunks[0]['file']).unlink()
    assert check_cache(plan).state == 'problem' and '--mode inverse' in check_cache(plan).advice
    (data.train.path/'cache_metadata.json').write_text('{}')
    assert check_cache(plan).state == 'problem'


def test_what_a_config_names(tmp_path):
    def text(**data): return check_text(Config(data=data))
    (tmp_path/'mine.py').write_text('def documents(): yield "a"')
    assert text(name='file', file=str(tmp_path/'mine.py')).state == 'ok'
    assert check_text(Config(data=dict(name='file', file=str(tmp_path/'mine.py')), finetune=dict(init='x'))).state == 'problem'
    for wrong in ('def documents(:', 'def texts(): pass'):
        (tmp_path/'mine.py').write_text(wrong)
        assert text(name='file', file=str(tmp_path/'mine.py')).state == 'problem'
    assert text(name='bins', path=str(tmp_path)).state == 'problem'
    (tmp_path/'train.bin').touch()
    assert text(name='bins', path=str(tmp_path)).state == 'ok'
    assert wants_hub(Config(data=dict(name='hub', path='owner/name'))) and not wants_hub(Config(data=dict(name='hub', path=str(tmp_path)))) and not wants_hub(Config())
    assert check_tokenizer(Config(tokenizer=dict(kind='hf', path=str(tmp_path/'no')))).state == 'problem'
    assert rows_to_make(Config(data=dict(name='openwebtext'), packing=dict(folder=str(tmp_path/'cache')))) > 10*GB and rows_to_make(Config()) == 0


def test_mend(plan, run, tmp_path):
    dead = dict(state='running', pid=2**22+1, step=20)
    write_json(run/'status.json', dead | {'host': os.uname().nodename})
    write_json(tmp_path/'runs'/'far'/'status.json', dead | {'host': 'elsewhere'})
    (run/'checkpoints'/'.step-00000030.4194305.tmp').mkdir()
    write_json(tmp_path/'cache'/'packed_sequences'/'cache_registry.json', {'changed': True})
    done = mend(plan)
    assert len(done) == 3 and json.loads((run/'status.json').read_text()) == dead | {'host': os.uname().nodename, 'state': 'killed'}
    assert json.loads((tmp_path/'runs'/'far'/'status.json').read_text())['state'] == 'running' # it may be alive there
    assert len(list((run/'checkpoints').iterdir())) == 2 and check_run(run).state == 'ok'
    assert mend(plan) == []
    assert len(mend(tiny.config(f'run.folder={tmp_path/"a"/"runs"}', f'packing.folder={tmp_path/"a"/"cache"}'))) == 2


def test_what_a_command_plans(run, tmp_path):
    assert plan_of(None) is None and plan_of(None, runs=['no-such-run'], folder=tmp_path) is None
    assert plan_of('quickstart').data.name == 'python' and plan_of(None, runs=['one'], folder=tmp_path/'runs').data.name == 'stories'
    assert plan_of(None, runs=[str(run/'checkpoints'/'step-00000010')]).data.name == 'stories'
    assert isinstance(plan_of('no-such-preset'), ConfigError)


def test_the_door(quick, run, tmp_path, capsys, monkeypatch):
    from llmlab.cli import doctor as door
    monkeypatch.chdir(tmp_path)
    door(['--run', 'one', '--fix'])
    said = capsys.readouterr().out
    assert 'made the folder' in said and 'run one' in said and 'cached rows' in said
    change(run/'checkpoints'/'step-00000020'/'model.safetensors')
    with pytest.raises(SystemExit) as e: door(['--run', 'one', '--config', 'tiny_test', 'trainer.bach_size=1'])
    said = capsys.readouterr()
    assert e.value.code == 1 and 'did you mean trainer.batch_size?' in said.out and 'goes on from step-00000010' in said.out and 'there are problems' in said.err


@given(st.floats(0, 1e14), st.floats(0, 1e14), st.booleans())
def test_more_never_hurts(free, needed, on_cpu):
    worse = ['ok', 'warning', 'problem'].index
    assert worse(check_memory(2*free, needed, on_cpu).state) <= worse(check_memory(free, needed, on_cpu).state)
    assert worse(check_disk('d', Path(), 2*free, needed).state) <= worse(check_disk('d', Path(), free, needed).state)
