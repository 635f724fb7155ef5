"What the tests share: a quiet environment, and the commands as a person would run them."
import os, subprocess, sys
from pathlib import Path
import pytest, torch

root = Path(__file__).resolve().parent.parent
quiet = dict(WANDB_MODE='offline', WANDB_SILENT='true', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1', MPLBACKEND='agg')
os.environ.update(quiet)


@pytest.fixture
def shared()->Path:
    "The folder of real texts beside the project; tests that need it are skipped where it is absent."
    folder = root.parent/'shared'
    if not folder.is_dir(): pytest.skip(f'{folder.name}/ with the real texts is not beside the project')
    return folder


names = {'llmlab_eval': 'evaluate'} # doors whose function has another name


def command(door:str, *words:str)->list[str]:
    "A command line that runs a door of this environment, whether or not its scripts are on PATH."
    return [sys.executable, '-c', f'from llmlab.cli import {names.get(door, door.removeprefix("llmlab_"))} as d; d()', *words]


@pytest.fixture
def llmlab(tmp_path):
    "Run a door in an empty folder: llmlab('llmlab_train', '--config', 'tiny_test') gives the finished process."
    def run(door:str, *words:str, cwd:Path=tmp_path, timeout:float=300, **env:str)->subprocess.CompletedProcess:
        return subprocess.run(command(door, *words), cwd=cwd, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                              env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'} | env)
    return run


@pytest.fixture(scope='module')
def one_thread():
    "Tiny tensors: a second thread only waits, and badly so on busy cores."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
