"A training process is killed at any moment, goes on, and ends with the same bits."
import random, signal, subprocess, time
from pathlib import Path
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from conftest import Running, run_door
from llmlab.files import read_jsonl

words = ['--config', 'tiny_test', 'run.name=r', 'trainer.max_steps=60', 'trainer.save_interval=7', 'trainer.log_interval=3', 'trainer.eval_interval=20', 'trainer.gradient_accumulation_steps=2']
unlike = {'train/tokens_per_sec', 'train/memory_gb', 'train/mfu', 'train/data_wait', 'time', 'seconds'} # what no two runs share


def start(folder:Path, *more:str)->Running: return Running('llmlab_train', *more, cwd=folder)


def outcome(folder:Path)->tuple[list[dict], dict]:
    "What was logged, but for the clock; the last weights."
    run = folder/'runs'/'r'
    last = sorted((run/'checkpoints').glob('step-*'))[-1]
    assert last.name == 'step-00000060'
    return [{k: v for k, v in r.items() if k not in unlike} for r in read_jsonl(run/'metrics.jsonl')], load_file(last/'model.safetensors')


def prepared(folder:Path)->Path:
    folder.mkdir()
    assert run_door('llmlab_prepare', '--config', 'tiny_test', cwd=folder).returncode == 0
    return folder


def kill_and_resume(folder:Path, kills:int, chance:random.Random)->int:
    "Train with kills at random moments; gives the number of kills that hit."
    hits = 0
    p = start(folder, *words)
    for _ in range(kills):
        try: p.wait(timeout=chance.uniform(.3, 2.5))
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL); p.wait(); hits += 1
        else:
            assert p.returncode == 0, p.err
            break
        p = start(folder, *(['--resume'] if (folder/'runs'/'r'/'config.yaml').exists() else words))
    assert p.wait(timeout=300) == 0, p.err
    return hits


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The run that nobody disturbed."
    folder = prepared(tmp_path_factory.mktemp('a')/'straight')
    p = start(folder, *words)
    assert p.wait(timeout=300) == 0, p.err
    return outcome(folder)


@pytest.mark.parametrize('kills', [3, pytest.param(100, marks=pytest.mark.proof)])
def test_kill_and_resume_is_bit_exact(kills, straight, tmp_path):
    hits = kill_and_resume(prepared(tmp_path/'killed'), kills, random.Random(kills))
    records, weights = outcome(tmp_path/'killed')
    assert hits and records == straight[0]
    assert weights.keys() == straight[1].keys()
    for name in weights: assert_close(weights[name], straight[1][name], rtol=0, atol=0)


@pytest.mark.parametrize('family', ['diffusion', 'sdd'])
def test_the_other_families_are_killed_and_resume(family, tmp_path):
    more = [f'model.architecture={family}', 'model.sdd.feedback_warmup_steps=0', 'trainer.eval_rows=16', 'trainer.sample_tokens=8']
    folder = prepared(tmp_path/'straight')
    p = start(folder, *words, *more)
    assert p.wait(timeout=300) == 0, p.err
    other = prepared(tmp_path/'killed')
    p = start(other, *words, *more)
    log = other/'runs'/'r'/'metrics.jsonl'
    while p.poll() is None and not (log.exists() and len(read_jsonl(log)) >= 6): time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert start(other, '--resume').wait(timeout=300) == 0
    (a, weights), (b, others) = outcome(folder), outcome(other)
    assert a == b and weights.keys() == others.keys()
    for name in weights: assert_close(weights[name], others[name], rtol=0, atol=0)


def test_ctrl_c_saves_and_goes_on(straight, tmp_path):
    folder = prepared(tmp_path/'stopped')
    p = start(folder, *words)
    log = folder/'runs'/'r'/'metrics.jsonl'
    while p.poll() is None and not (log.exists() and len(read_jsonl(log)) >= 2): time.sleep(.05)
    p.send_signal(signal.SIGINT)
    code, err = p.wait(timeout=60), p.err
    if code == 0: pytest.skip('the run was over before the signal came')
    assert code == 75 and '--resume' in err, err
    assert start(folder, '--resume').wait(timeout=300) == 0
    records, weights = outcome(folder)
    assert records == straight[0]
    for name in weights: assert_close(weights[name], straight[1][name], rtol=0, atol=0)
